"""What a validation costs: whole-process seconds and peak GPU memory, against bare forward passes.

    python benchmarks/validation_cost.py cpu --base BASE_NF4 --adapter ADAPTER --candidate OUT --tokens 20480
    python benchmarks/validation_cost.py gpu --out /tmp/shapes

``cpu`` prints the seconds of the two bare forward passes over the same tokens, logits included and nothing done with
them: the reference as users run it (transformers, bitsandbytes and peft), the same decoded to bf16 with the adapter
unmerged, and the candidate decoded to bf16; then those of ``qconv validate``, whole process.
``gpu`` builds an 8B shape with random weights (NF4 base, adapter, AWQ candidate) and validates 64 x 1024 tokens.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from process_cost import GpuMemory
from torch import Tensor

QCONV = [sys.executable, "-m", "qconv"]


def run(*arguments: str | Path) -> tuple[float, float]:
    """Whole-process seconds of a qconv command, and the GPU memory that it held at most, GB (0 without a GPU).

    One nvidia-smi watches all the time: starting one for each look is work beside what is measured.
    """
    watch = GpuMemory()
    start = time.monotonic()
    try:
        subprocess.run([*QCONV, *map(str, arguments)], check=True)
    finally:
        seconds, peak = time.monotonic() - start, watch.peak_gb()
    return seconds, peak or 0.0


def bare(model: Any, ids_TS: Tensor, batch: int = 8) -> float:
    with torch.no_grad():
        model(ids_TS[:1])
        start = time.monotonic()
        for rows_BS in torch.split(ids_TS, batch):
            _ = model(rows_BS).logits
    return time.monotonic() - start


def on_cpu(base: Path, adapter: Path, candidate: Path, tokens: int) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: F401 - the latter registers bitsandbytes

    from qconv import corpus
    from qconv.checkpoint import open_checkpoint
    from qconv.inputs import load_candidate, load_reference
    from qconv.runners import candidate_model, streamed

    documents, tokenizer = corpus.load_documents("default-prose-eval"), corpus.load_tokenizer(base)
    ids_TS = corpus.pack_tokens(documents, tokenizer, tokens // 512, 512, seed=0)
    models = ["--reference", base, "--adapter", adapter, "--candidate", candidate]
    options = ["--eval-tokens", str(tokens), "--eval-data", "default-prose-eval", "--device", "cpu", "-q"]
    validated, _ = run("validate", *models, *options)
    reference = load_reference(open_checkpoint(str(base)), str(adapter), None)
    side = load_candidate(str(candidate), None)
    other, _ = candidate_model(side, side.view, "cpu", False, "qconv")
    seconds = {"candidate, decoded to bf16": bare(other.whole(), ids_TS)}
    seconds["reference, decoded to bf16, adapter unmerged"] = bare(
        streamed(reference.base, reference.adapter, None, "cpu").whole(), ids_TS
    )
    from peft import PeftModel

    whole = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    seconds["reference, bitsandbytes and peft"] = bare(PeftModel.from_pretrained(whole, adapter).eval(), ids_TS)
    print("| what | seconds |\n|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.1f} |")
    print(f"| `qconv validate`, whole process | {validated:.1f} |")
    decoded, own, kernels = seconds.values()
    print(f"| ratio to the two forward passes, both decoded | {validated / (decoded + own):.2f} |")
    print(f"| ratio to the two forward passes, reference as users run it | {validated / (decoded + kernels):.2f} |")


def on_gpu(out: Path) -> None:
    # In a process of its own: what it leaves on the GPU is gone when the measurements begin.
    subprocess.run([sys.executable, Path(__file__).with_name("shapes.py"), "8b", "--out", out], check=True)
    base, adapter = out / "base-nf4", out / "adapter"
    candidate = out / "awq"
    if not candidate.exists():
        seconds, peak = run(
            *("merge", base, adapter, "--requant", "awq", "--samples", "16", "--no-validate", "-q", "-o", candidate)
        )
        print(f"made the candidate in {seconds:.1f} s, {peak:.1f} GB", flush=True)
    models = ["--reference", base, "--adapter", adapter, "--candidate", candidate]
    size = ["--eval-tokens", str(64 * 1024), "--eval-seq-len", "1024"]
    libraries = "import torch, transformers.modeling_utils, peft, bitsandbytes"
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", libraries], check=True)
    print(f"importing torch, transformers, peft and bitsandbytes alone takes {time.monotonic() - start:.1f} s here")
    print("| 64 x 1024 tokens, 8B shape | seconds | peak GPU GB |\n|---|---|---|")
    for name in ("cold", "warm", "warm"):
        seconds, peak = run("validate", *models, *size, "--no-default-gates", "-q")
        print(f"| `qconv validate` ({name} files) | {seconds:.1f} | {peak:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("where", choices=["cpu", "gpu"])
    parser.add_argument("--base", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--candidate", type=Path)
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--out", type=Path, default=Path("build/shapes"))
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if arguments.where == "cpu":
        on_cpu(arguments.base, arguments.adapter, arguments.candidate, arguments.tokens)
    else:
        on_gpu(arguments.out)


if __name__ == "__main__":
    main()
