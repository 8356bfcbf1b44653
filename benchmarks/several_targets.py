"""Prints how long several targets take in one run, against each of them in a run of its own. Linux only.

    .venv/bin/python benchmarks/several_targets.py --base BASE_NF4 --adapter ADAPTER --out build/several

Each row is a whole process (`qconv merge --no-validate`, imports included): wall time and the processor time of all its
threads. The second is the one to compare on a machine that does other work, too. ``--targets w4a16,awq`` takes others,
``--samples`` other amounts of calibration text (rows of 512 tokens): the more of it, the more there is to share.
Without ``--base`` SmolLM2-135M in NF4 is built in ``--out``, with a random adapter.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple


class Cost(NamedTuple):
    seconds: float
    processor_seconds: float


def measure(base: Path, adapter: Path, out: Path, targets: list[str], options: list[str]) -> Cost:
    command = [sys.executable, "-m", "qconv", "merge", str(base), str(adapter), "--no-validate", "--overwrite", "-q"]
    command += [word for target in targets for word in ("--requant", target)]
    start = time.monotonic()
    process = subprocess.Popen([*command, *options, "-o", str(out)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return Cost(time.monotonic() - start, usage.ru_utime + usage.ru_stime)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/several"))
    parser.add_argument("--targets", default="w4a16,awq,fp8")
    parser.add_argument("--alone", help="targets to make in a run of their own [default: all]")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    base, adapter = arguments.base, arguments.adapter
    if base is None:
        from memory import build_smollm2_with_adapter

        base, adapter = build_smollm2_with_adapter(arguments.out)
    targets = arguments.targets.split(",")
    options = ["--device", arguments.device, "--samples", str(arguments.samples)]
    print(f"{arguments.samples} x 512 calibration tokens, {arguments.device}, {os.cpu_count()} cores\n")
    print("| targets | seconds | processor seconds |\n|---|---|---|", flush=True)
    costs = {}
    alone = arguments.alone.split(",") if arguments.alone else targets
    for run in [*([target] for target in alone), targets]:
        name = " + ".join(run)
        costs[name] = measure(base, adapter, arguments.out / f"out-{len(run)}" / name.replace(" ", ""), run, options)
        print(f"| {name} | {costs[name].seconds:.1f} | {costs[name].processor_seconds:.1f} |", flush=True)
    together = costs.pop(" + ".join(targets))
    print("\n| all together, relative to | seconds | processor seconds |\n|---|---|---|")
    if len(costs) == len(targets):
        costs["the runs of their own"] = Cost(*map(sum, zip(*costs.values(), strict=True)))
    for name, cost in costs.items():
        ratios = [mine / other for mine, other in zip(together, cost, strict=True)]
        print(f"| {name} | {ratios[0]:.2f} | {ratios[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
