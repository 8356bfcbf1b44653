"""Prints what a budget for the size buys, on SmolLM2-135M with a real adapter: mixed widths beside uniform ones.

    .venv/bin/python benchmarks/budget.py --out build/quality
    .venv/bin/python benchmarks/budget.py --base BASE_NF4 --adapter ADAPTER --device cuda --rows 4,wide,5

Model and adapter are made on the first run (`bench.py`), or given. Bits per weight are those of all tensors that are
stored for the quantized linears. The report of each row stays in ``OUT/reports``. A row takes two to ten minutes on two
cores, and a fraction of one on a GPU.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from bench import CELLS, Bench, Fidelity, Row, bench_of, chosen_rows, parser_of, print_table
from safetensors import safe_open

from qconv.checkpoint import open_checkpoint
from qconv.convert import dequantize
from qconv.overrides import OverrideConfig

WIDE = (3, 4, 5, 6, 8)
FLOATS = (*WIDE, "nvfp4a16", "mxfp4a16")


def every(bits: int) -> tuple[OverrideConfig, ...]:
    """All linears in so many bits, of which `w4a16` has no target of its own."""
    return (OverrideConfig(pattern="*", bits=bits),)


ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "4": ("4 bits", "w4a16", {}),
    "4-row": ("4 bits, one scale for each row", "w4a16", {"group_size": -1}),
    "4-fine": ("4 bits, groups of 32", "w4a16", {"group_size": 32}),
    "nvfp4": ("`nvfp4a16`, 4-bit floats", "nvfp4a16", {}),
    "mixed": ("`--budget 4.5bpw`", "w4a16", {"budget": 4.5}),
    "wide": ("`--budget 4.5bpw --budget-bits 3,4,5,6,8`", "w4a16", {"budget": 4.5, "budget_bits": WIDE}),
    "floats": (
        "`--budget 4.5bpw --budget-bits 3,4,5,6,8,nvfp4a16,mxfp4a16`",
        "w4a16",
        {"budget": 4.5, "budget_bits": FLOATS},
    ),
    "floats-4.75": ("the same, `--budget 4.75bpw`", "w4a16", {"budget": 4.75, "budget_bits": FLOATS}),
    "floats-48": (
        "`--budget 4.5bpw --budget-bits 4,8,nvfp4a16`",
        "w4a16",
        {"budget": 4.5, "budget_bits": (4, 8, "nvfp4a16")},
    ),
    "wide-64": ("the same, `--group-size 64`", "w4a16", {"budget": 4.5, "budget_bits": WIDE, "group_size": 64}),
    "wide-4.75": ("`--budget 4.75bpw --budget-bits 3,4,5,6,8`", "w4a16", {"budget": 4.75, "budget_bits": WIDE}),
    "wide-5": ("`--budget 5bpw --budget-bits 3,4,5,6,8`", "w4a16", {"budget": 5.0, "budget_bits": WIDE}),
    "5": ("5 bits", "w4a16", {"overrides": every(5)}),
    "5-row": ("5 bits, one scale for each row", "w4a16", {"overrides": every(5), "group_size": -1}),
    "5-rtn": ("5 bits, round-to-nearest", "w4a16", {"overrides": every(5), "algorithm": "rtn"}),
    "q5_0": ("`gguf-q5_0`, by llama.cpp's rule", "gguf-q5_0", {}),
    "wide-awq": (
        "`--budget 4.5bpw --budget-bits 3,4,5,6,8 --algorithm awq+gptq`",
        "w4a16",
        {"budget": 4.5, "budget_bits": WIDE, "algorithm": "awq+gptq"},
    ),
    "5-awq": ("5 bits, `--algorithm awq+gptq`", "w4a16", {"overrides": every(5), "algorithm": "awq+gptq"}),
}


def bits_per_weight(folder: Path) -> float:
    """Of the quantized linears, from the files alone."""
    if any(folder.glob("*.gguf")):
        return 5.5  # a block of 32 codes of 5 bits and a scale of 16
    view = dequantize(open_checkpoint(folder))
    stored = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no dictionary
                if name.rpartition(".")[0] in view.quantized_modules:
                    tensor = tensors.get_tensor(name)
                    stored += tensor.numel() * tensor.element_size()
    specs = view.specs()
    return 8 * stored / sum(prod(specs[f"{module}.weight"].shape) for module in view.quantized_modules)


def row_of(bench: Bench, name: str) -> Row:
    label, target, options = ROWS[name]

    def measure() -> Fidelity:
        bench.reports = bench.out / "reports" / name
        return bench.merge(target, **options)

    return label, measure


def main() -> None:
    parser = parser_of(__doc__, tokens=4096)
    arguments = parser.parse_args()
    bench = bench_of(arguments)
    bench.skip_controls()
    rows = chosen_rows(parser, arguments.rows, {name: row_of(bench, name) for name in ROWS})
    size = {"bits per weight": lambda _: f"{bits_per_weight(bench.candidate):.3f}"}
    print_table(
        rows, "linears", size | {name: CELLS[name] for name in CELLS if name not in ("KL p99", "effect retained")}
    )


if __name__ == "__main__":
    main()
