"""Prints what calibration is worth inside llama.cpp: our GGUF files beside those of its own data-free quantizer.

    make .venv-llama-cpp/.complete
    .venv/bin/python benchmarks/gguf_quality.py --out build/gguf

SmolLM2-135M in NF4 with an adapter (built and trained by `bench.py`, or given) is merged into a ``gguf-f32``
file, from which llama.cpp makes its files (`llama_model_quantize`), and into one calibrated file of each kind. All are
run by llama.cpp on the same held-out rows, and compared with its own logits of the float32 file, so that nothing of
qconv measures. About 12 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from qconv import corpus

HERE = Path(__file__).absolute().parent
KINDS = ("q4_0", "q4_1", "q8_0")
CALIBRATION = "--calibration default-prose --samples 32"
ROWS, TOKENS = 8, 512


def qconv(arguments: str, out: Path) -> Path:
    """The file that a command writes; made once."""
    if not out.exists():
        command = [sys.executable, "-m", "qconv", *shlex.split(arguments), "-o", str(out), "--no-validate", "--quiet"]
        subprocess.run([*command, "--device", "cpu"], check=True, stdout=subprocess.DEVNULL)
    (file,) = out.glob("*.gguf")
    return file


def model_and_adapter(out: Path) -> tuple[Path, Path]:
    from bench import Bench

    bench = Bench(out)
    bench.prepare()
    return bench.nf4, bench.adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gguf"))
    parser.add_argument("--base", type=Path, help="SmolLM2 in NF4 [default: built]")
    parser.add_argument("--adapter", type=Path, help="an adapter for it [default: trained]")
    parser.add_argument("--python", type=Path, default=Path(".venv-llama-cpp/bin/python"), help="with llama-cpp-python")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    base, adapter = arguments.base, arguments.adapter
    if base is None or adapter is None:
        base, adapter = model_and_adapter(out)
    merge = f"merge {base} {adapter} --requant"
    reference = qconv(f"{merge} gguf-f32", out / "f32")
    files = {"f32, qconv": str(reference)}
    made = {f"{kind}, llama.cpp": str(out / f"llama.cpp-{kind}.gguf") for kind in (*KINDS, "q4_k_m")}
    files |= made
    for kind in KINDS:
        files[f"{kind}, qconv"] = str(qconv(f"{merge} gguf-{kind} {CALIBRATION}", out / kind))
    documents, tokenizer = corpus.load_documents("default-prose-eval"), corpus.load_tokenizer(reference.parent)
    rows = corpus.pack_tokens(documents, tokenizer, ROWS, TOKENS, seed=0).tolist()
    asked, answered = out / "request.json", out / "answer.json"
    quantize = {path: label.partition(",")[0] for label, path in made.items()}
    request = {"reference": str(reference), "quantize": quantize, "files": files, "rows": rows}
    asked.write_text(json.dumps(request))
    subprocess.run([str(arguments.python), str(HERE / "peers/run_llama_cpp.py"), str(asked), str(answered)], check=True)
    show(json.loads(answered.read_text()))


def show(answer: dict[str, dict[str, float]]) -> None:
    print("| kind | by | MB | KL mean, nats per token | KL p99 | same top token | perplexity |")
    print("|---|---|---|---|---|---|---|")
    for label, row in sorted(answer.items()):
        kind, _, by = label.partition(", ")
        print(
            f"| {kind} | {by} | {row['megabytes']:.1f} | {row['kl']:.4f} ± {row['interval']:.4f} | {row['p99']:.3f} "
            f"| {row['top1']:.1%} | {row['perplexity']:.2f} |"
        )


if __name__ == "__main__":
    main()
