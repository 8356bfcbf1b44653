"""Prints what `--dry-run` plans beside what the same job takes: host memory, bytes written, seconds. Linux, CPU.

    OMP_NUM_THREADS=1 python benchmarks/plan.py --out build/plan
    OMP_NUM_THREADS=1 python benchmarks/plan.py --out build/plan --base BASE --adapter ADAPTER --jobs bf16,fp8

The first line builds SmolLM2-135M in NF4 with a random adapter, and a random model of Llama-3.2-1B's shape with two
blocks (`shapes.py`). Each job is a process of its own; its memory is the most that it held itself (anonymous memory,
every 25 ms; pages of files do not count), as the plan has it. Jobs are merges without validation, and a validation of
what `w4a16` made.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from memory import build_smollm2_with_adapter
from process_cost import measure
from shapes import build

TARGETS: dict[str, list[str]] = {
    "bf16": [],
    "fp8": ["--requant", "fp8"],
    "w4a16": ["--requant", "w4a16"],
    "awq": ["--requant", "awq"],
    "int8": ["--requant", "int8"],
    "fp8 static": ["--requant", "fp8", "--activations", "static"],
    "several": ["--requant", "w4a16", "--requant", "awq", "--requant", "fp8"],
}
VALIDATION = ["--eval-tokens", "4096", "--no-default-gates", "--attribution", "never"]


def command(job: str, base: Path, adapter: Path, out: Path, samples: int) -> list[str]:
    """The arguments of ``qconv`` for one job."""
    if job == "validate":
        models = ["--reference", str(base), "--adapter", str(adapter), "--candidate", str(out / "w4a16")]
        return ["validate", *models, *VALIDATION, "--device", "cpu"]
    calibration = ["--samples", str(samples)] if job not in ("bf16", "fp8") else []
    made = ["-o", str(out / job.replace(" ", "-")), "--overwrite", "--no-validate", "--device", "cpu"]
    return ["merge", str(base), str(adapter), *TARGETS[job], *calibration, *made]


def planned(arguments: list[str]) -> dict[str, Any]:
    words = [sys.executable, "-m", "qconv", *arguments, "--dry-run", "--json"]
    result: dict[str, Any] = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/plan"))
    parser.add_argument("--base", type=Path, help="SmolLM2 in NF4 [default: built]")
    parser.add_argument("--adapter", type=Path, help="an adapter for it [default: random]")
    parser.add_argument("--jobs", default="bf16,fp8,fp8 static,w4a16,awq,int8,several,validate")
    parser.add_argument("--models", default="smollm2,1b-shape")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    print("| model | job | planned GB | measured GB | error | planned s | measured s |\n|---|---|---|---|---|---|---|")
    for name in arguments.models.split(","):
        if name == "smollm2":
            given = arguments.base is not None
            pair = (arguments.base, arguments.adapter) if given else build_smollm2_with_adapter(out)
        else:
            pair = build("1b", out / "shape", "cpu", layers=2)
        for job in arguments.jobs.split(","):
            words = command(job, *pair, out / name, 32 if name == "smollm2" else 16)
            plan = planned(words)
            log = out / f"{name}-{job}.log"
            row = measure([sys.executable, "-m", "qconv", *words], Path.cwd(), dict(os.environ), log, None)
            if row["status"] != 0:
                sys.exit(f"{' '.join(words)}: exit status {row['status']}, see {log}")
            peak, found = plan["host"]["peak_bytes"] / 1e9, row["anonymous_gb"]
            low, high = plan["time"]["seconds"]
            print(
                f"| {name} | {job} | {peak:.2f} | {found:.2f} | {peak / found - 1:+.0%} "
                f"| {low:.0f} to {high:.0f} | {row['seconds']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
