"""Prints what a budget for the size buys, on SmolLM2-135M with a real adapter: mixed widths beside uniform ones.

    .venv/bin/python benchmarks/budget.py --out build/quality

Model, adapter and texts are those of `quality.py`, which makes them on the first run. Bits per weight are those of all
tensors that are stored for the quantized linears. ``--rows`` takes a part, e.g. ``--rows 4,mixed-4.5``. A row takes two
to ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from quality import Bench
from safetensors import safe_open

from qconv.checkpoint import open_checkpoint
from qconv.convert import dequantize
from qconv.overrides import OverrideConfig

WIDE = (4, 5, 6, 8)


def every(bits: int) -> tuple[OverrideConfig, ...]:
    """All linears in so many bits, of which `w4a16` has no target of its own."""
    return (OverrideConfig(pattern="*", bits=bits),)


ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "4": ("4 bits", "w4a16", {}),
    "4-fine": ("4 bits, groups of 32", "w4a16", {"group_size": 32}),
    "mixed-4.5": ("`--budget 4.5bpw`", "w4a16", {"budget": 4.5}),
    "mixed-4.5-wide": ("`--budget 4.5bpw --budget-bits 4,5,6,8`", "w4a16", {"budget": 4.5, "budget_bits": WIDE}),
    "mixed-4.75-wide": ("`--budget 4.75bpw --budget-bits 4,5,6,8`", "w4a16", {"budget": 4.75, "budget_bits": WIDE}),
    "mixed-5": ("`--budget 5bpw`", "w4a16", {"budget": 5.0}),
    "mixed-5-wide": ("`--budget 5bpw --budget-bits 4,5,6,8`", "w4a16", {"budget": 5.0, "budget_bits": WIDE}),
    "5": ("5 bits", "w4a16", {"overrides": every(5)}),
    "5-row": ("5 bits, one scale for each row", "w4a16", {"overrides": every(5), "group_size": -1}),
    "5-rtn": ("5 bits, round-to-nearest", "w4a16", {"overrides": every(5), "algorithm": "rtn"}),
    "q5_0": ("`gguf-q5_0`, by llama.cpp's rule", "gguf-q5_0", {}),
}


def bits_per_weight(folder: Path) -> float:
    """Of the quantized linears, from the files alone."""
    view = dequantize(open_checkpoint(folder))
    if any(folder.glob("*.gguf")):
        return 5.5  # a block of 32 codes of 5 bits and a scale of 16
    stored = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no dictionary
                if name.rpartition(".")[0] in view.quantized_modules:
                    tensor = tensors.get_tensor(name)
                    stored += tensor.numel() * tensor.element_size()
    specs = view.specs()
    return 8 * stored / sum(prod(specs[f"{module}.weight"].shape) for module in view.quantized_modules)


def print_table(bench: Bench, names: list[str]) -> None:
    print("| linears | bits per weight | KL mean | 95% interval | top-1 | ppl (reference) | seconds |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in names or ROWS:
        label, target, options = ROWS[name]
        start = time.monotonic()
        pair = bench.merge(target, **options)["total"]
        seconds = time.monotonic() - start
        low, high = pair["kl"]["interval_95"]
        print(
            f"| {label} | {bits_per_weight(bench.out / 'candidate'):.3f} | {pair['kl']['mean']:.5f} "
            f"| {low:.5f} to {high:.5f} | {pair['top1_agreement']['value']:.1%} "
            f"| {pair['perplexity']:.2f} ({pair['reference_perplexity']:.2f}) | {seconds:.0f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/quality"))
    parser.add_argument("--rows", help=f"names, separated by commas [default: all]: {', '.join(ROWS)}")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    names = arguments.rows.split(",") if arguments.rows else []
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"unknown rows {', '.join(unknown)}; there are {', '.join(ROWS)}")
    bench = Bench(arguments.out, arguments.tokens, arguments.device)
    bench.prepare()
    # Nothing is shown of base, merge and noise floor on their own.
    bench.validation = replace(bench.validation, control_tokens=bench.validation.seq_len)
    print_table(bench, names)


if __name__ == "__main__":
    main()
