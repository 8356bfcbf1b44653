"""Compares the perplexity that vLLM computes on an artifact with qconv's own reading of the same bytes.

    .venv/bin/python benchmarks/vllm_perplexity.py ours OUT [OUT ...] --rows build/rows.json
    VLLM_CPU_INT4_W4A8=0 VLLM_ENV/bin/python benchmarks/vllm_perplexity.py vllm OUT --rows build/rows.json

The first command writes the token rows (8 x 512 of held-out prose) that the second one scores; vLLM lives in an
environment of its own. On CPUs with AMX vLLM's 4-bit kernels also round activations to 8 bits unless
VLLM_CPU_INT4_W4A8=0.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def score_with_qconv(folder: Path, rows_file: Path) -> float:
    from qconv import corpus
    from qconv.checkpoint import open_checkpoint
    from qconv.runners import Candidate, candidate_model
    from qconv.validate.compare import Entrant, run_candidate
    from qconv.validate.distribution import Distribution

    tokenizer = corpus.load_tokenizer(folder)
    rows = corpus.pack_rows(corpus.load_documents("default-prose-eval"), tokenizer, 8, 512, seed=0)
    rows_file.parent.mkdir(parents=True, exist_ok=True)
    rows_file.write_text(json.dumps(rows.ids_TS.tolist()))
    candidate = Candidate.of(open_checkpoint(folder))
    model, _ = candidate_model(candidate, candidate.view, "cpu", False, "qconv")
    total, count = 0.0, 0

    def visit(row: int, logits_TV: Tensor) -> None:
        nonlocal total, count
        targets_T = rows.ids_TS[row, 1:]
        total -= float(Distribution(logits_TV, "candidate").logp(targets_T).double().sum())
        count += len(targets_T)

    run_candidate(Entrant(name="candidate", model=model, num_rows=8, rows_per_batch=8), rows, visit)
    return math.exp(total / count)


def score_with_vllm(folder: Path, rows_file: Path) -> float:
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    from vllm import LLM, SamplingParams

    rows = json.loads(rows_file.read_text())
    engine = LLM(model=str(folder), enforce_eager=True, max_model_len=600, max_num_seqs=8, dtype="bfloat16")
    prompts = [{"prompt_token_ids": row} for row in rows]
    outputs = engine.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0))
    total = count = 0.0
    for row, output in zip(rows, outputs, strict=True):
        for token, logprobs in list(zip(row, output.prompt_logprobs, strict=True))[1:]:
            total -= logprobs[token].logprob
            count += 1
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=["ours", "vllm"])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--rows", type=Path, default=Path("build/rows.json"))
    arguments = parser.parse_args()
    score = score_with_qconv if arguments.reader == "ours" else score_with_vllm
    for folder in arguments.folders:
        print(f"| {arguments.reader} | {folder} | perplexity {score(folder, arguments.rows):.3f} |", flush=True)


if __name__ == "__main__":
    main()
