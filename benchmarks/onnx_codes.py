"""What calibrated codes are worth inside ONNX Runtime, against the codes that its own tools choose without data.

    qconv merge BASE ADAPTER --dtype fp32 --no-validate -o merged
    qconv convert merged --to onnx -o merged-onnx
    qconv merge BASE ADAPTER --requant onnx-int4 --no-validate -o calibrated
    python -m benchmarks.onnx_codes merged merged-onnx calibrated

Builds 4-bit graphs of the plain folder with the model builder of ONNX Runtime GenAI (output head and embedding left as
they are, as in qconv's), runs all of them in ONNX Runtime on the CPU on the embedded held-out text, and prints how far
each is from the float32 graph.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from qconv import corpus
from qconv.onnx import MODEL_FILE, OnnxSession

DATA_FREE = (("default", 32), ("default", 64), ("k_quant", 32))  # the builder's k_quant takes blocks of 32 alone
HEADER = (
    "| codes by | block | file | KL mean, nats per token | same top token | perplexity |\n|---|---|---|---|---|---|"
)


def built_without_data(plain: Path, out: Path, method: str, block: int) -> Path:
    with tempfile.TemporaryDirectory() as cache:
        words = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(plain), "-o", str(out)]
        words += ["-p", "int4", "-e", "cpu", "-c", cache, "--extra_options", "hf_token=false", f"algo_config={method}"]
        words += [f"block_size={block}", "nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather"]
        subprocess.run(words, check=True, capture_output=True)
    return out


def log_probabilities(folder: Path, ids_TS: Tensor) -> list[Tensor]:
    session = OnnxSession(folder / MODEL_FILE)
    return [session.logits(row[None])[0, :-1].log_softmax(-1) for row in ids_TS]


def line(name: str, block: str, folder: Path, reference: list[Tensor] | None, ids_TS: Tensor) -> str:
    found = log_probabilities(folder, ids_TS)
    losses = torch.cat([-p.gather(-1, row[1:, None]) for p, row in zip(found, ids_TS, strict=True)])
    size = f"{(folder / f'{MODEL_FILE}.data').stat().st_size / 1e6:.0f} MB"
    kl = same = ""
    if reference is not None:
        pairs = list(zip(reference, found, strict=True))
        kl = f"{torch.cat([(r.exp() * (r - f)).sum(-1) for r, f in pairs]).mean():.4f}"
        same = f"{torch.cat([r.argmax(-1) == f.argmax(-1) for r, f in pairs]).double().mean():.1%}"
    return f"| {name} | {block} | {size} | {kl} | {same} | {losses.double().mean().exp():.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plain", type=Path, help="transformers folder in float32")
    parser.add_argument("float32", type=Path, help="the same as a float32 graph")
    parser.add_argument("calibrated", type=Path, nargs="+", help="folders of --requant onnx-int4")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    options = parser.parse_args()
    tokenizer = corpus.load_tokenizer(options.plain)
    documents = corpus.load_documents("default-eval", tokenizer)
    ids_TS = corpus.pack_rows(documents, tokenizer, options.rows, options.seq_len, 0).ids_TS
    reference = log_probabilities(options.float32, ids_TS)
    print(HEADER)
    print(line("float32", "", options.float32, None, ids_TS), flush=True)
    for folder in options.calibrated:
        print(line(f"qconv: {folder.name}", "", folder, reference, ids_TS), flush=True)
    with tempfile.TemporaryDirectory() as root:
        for method, block in DATA_FREE:
            folder = built_without_data(options.plain, Path(root) / f"{method}-{block}", method, block)
            print(line(f"builder, {method}", str(block), folder, reference, ids_TS), flush=True)


if __name__ == "__main__":
    main()
