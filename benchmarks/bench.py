"""What the tables of `quality.py` and `budget.py` share: SmolLM2-135M with a real adapter, and how rows are printed.

The first run builds the model (NF4) and trains an adapter on all seven linears (90 steps of 8 x 256
tokens of prose, the setting of the tables in docs/quality.md); later runs reuse them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qconv import judging, pipeline
from qconv.config import CalibrationConfig, MergeJob, OutputConfig, ValidateJob, ValidationConfig
from qconv.progress import Progress, quiet_libraries
from qconv.quantization_config import QuantizationConfig
from qconv.training_config import TrainConfig

CALIBRATION = CalibrationConfig(sources=("default-prose",), samples=32, seq_len=512)

Fidelity = dict[str, Any]
Row = tuple[str, Callable[[], Fidelity]]
"""What the table says of a row, and what measures it."""


class Bench:
    """Assets in one folder, and what is measured of them.

    Attributes:
        nf4: the model, in bitsandbytes' 4 bits.
        candidate: the folder that was written last.
        reports: on that folder.
    """

    def __init__(self, out: Path, tokens: int = 0, device: str = "auto"):
        self.out, self.device = out, device
        self.nf4, self.adapter = out / "base-nf4", out / "adapter"
        self.candidate, self.reports = out / "candidate", out / "reports"
        self.validation = ValidationConfig(
            source="default-prose-eval", tokens=tokens, control_tokens=tokens, attribution="never", defaults=False
        )

    def prepare(self) -> None:
        from qconv.demo_model import build_smollm2
        from qconv.train import train

        self.out.mkdir(parents=True, exist_ok=True)
        with quiet_libraries():
            if not self.nf4.exists():
                build_smollm2(self.nf4, quantized=True)
        if not self.adapter.exists():
            config = TrainConfig(
                base=str(self.nf4),
                out=self.adapter,
                data="default-prose",
                steps=90,
                batch_size=8,
                seq_len=256,
                device=self.device,
            )
            train(config, Progress(verbosity=1))

    def skip_controls(self) -> None:
        """For tables that show nothing of base, merge and noise floor on their own."""
        self.validation = replace(self.validation, control_tokens=self.validation.seq_len)

    def merge(self, target: str | None = None, dtype: str | None = None, **options: Any) -> Fidelity:
        """One whole job: adapter to validated artifact."""
        job = MergeJob(
            base=str(self.nf4),
            adapter=str(self.adapter),
            outputs=(
                OutputConfig(
                    out=self.candidate,
                    dtype=dtype,
                    quantization=QuantizationConfig(target=target, **options) if target else None,
                ),
            ),
            calibration=CALIBRATION,
            validation=self.validation,
            report_dir=self.reports,
            device=self.device,
            overwrite=True,
        )
        (outcome,) = pipeline.run(job)
        fidelity = outcome.fidelity
        assert fidelity is not None
        return dict(fidelity)

    def judge(self, candidate: Path) -> Fidelity:
        """A folder that somebody else made."""
        job = ValidateJob(
            reference=str(self.nf4),
            adapter=str(self.adapter),
            candidate=str(candidate),
            validation=self.validation,
            device=self.device,
        )
        fidelity = judging.validate(job).fidelity
        assert fidelity is not None
        return dict(fidelity)


CELLS: dict[str, Callable[[Fidelity], str]] = {
    "KL mean": lambda fidelity: f"{fidelity['total']['kl']['mean']:.5f}",
    "95% interval": lambda fidelity: " to ".join(f"{end:.5f}" for end in fidelity["total"]["kl"]["interval_95"]),
    "KL p99": lambda fidelity: f"{fidelity['total']['kl']['p99']:.4f}",
    "top-1": lambda fidelity: f"{fidelity['total']['top1_agreement']['value']:.1%}",
    "ppl (reference)": lambda fidelity: (
        f"{fidelity['total']['perplexity']:.2f} ({fidelity['total']['reference_perplexity']:.2f})"
    ),
    "effect retained": lambda fidelity: f"{fidelity['adapter_effect_retained']['value']:.1%}",
}
"""Columns of tables."""


def print_header(*names: str) -> None:
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}", flush=True)


def print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def print_table(rows: Mapping[str, Row], first: str, cells: Mapping[str, Callable[[Fidelity], str]]) -> None:
    """Each row as soon as it is measured."""
    print_header(first, *cells, "seconds")
    for label, measure in rows.values():
        start = time.monotonic()
        fidelity = measure()
        seconds = time.monotonic() - start
        print_row(label, *(cell(fidelity) for cell in cells.values()), f"{seconds:.0f}")


def parser_of(doc: str | None, tokens: int) -> argparse.ArgumentParser:
    """With the options of both tables."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/quality"))
    parser.add_argument("--rows", help="names, separated by commas [default: all]")
    parser.add_argument("--tokens", type=int, default=tokens)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--base", type=Path, help="SmolLM2 in NF4 [default: built]")
    parser.add_argument("--adapter", type=Path, help="an adapter for it [default: trained]")
    return parser


def bench_of(arguments: argparse.Namespace) -> Bench:
    bench = Bench(arguments.out, arguments.tokens, arguments.device)
    bench.nf4, bench.adapter = arguments.base or bench.nf4, arguments.adapter or bench.adapter
    bench.prepare()
    return bench


def chosen_rows(parser: argparse.ArgumentParser, wanted: str | None, rows: Mapping[str, Row]) -> dict[str, Row]:
    names = wanted.split(",") if wanted else list(rows)
    if unknown := [name for name in names if name not in rows]:
        parser.error(f"unknown rows {', '.join(unknown)}; there are {', '.join(rows)}")
    return {name: rows[name] for name in names}
