"""Runs the same jobs on the CPU and on a GPU and prints KL, wall seconds and peak memory of each.

    python benchmarks/devices.py --base BASE_NF4 --adapter ADAPTER --out /tmp/devices
    python benchmarks/devices.py --base BASE_NF4 --adapter ADAPTER --jobs gptq,int8 --seeds 4 --out /tmp/devices
    python benchmarks/devices.py --random-1b --devices cuda --out /tmp/devices

``--random-1b`` builds a model of Llama-3.2-1B's shape with random weights: right for speed and memory, meaningless
for quality. The GPU's reference runs bitsandbytes' kernels and peft's adapter, the CPU's is decoded by qconv. Codes
that calibration chose follow the last bits of the activations, so one calibration is one draw: ``--seeds`` makes
several, of other texts each, and with both devices prints the mean of their ratios and its standard error.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from shapes import build

from qconv import pipeline
from qconv.config import CalibrationConfig, MergeJob, OutputConfig, ValidationConfig
from qconv.progress import quiet_libraries
from qconv.quantization_config import QuantizationConfig

JOBS: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "fp8": {"target": "fp8"},
    "awq": {"target": "awq"},
    "gptq": {"target": "gptq"},
    "w4a16": {"target": "w4a16"},
    "gptq_v2": {"target": "gptq_v2"},
    "w8a16": {"target": "w8a16"},
    "w4a16 (awq+gptq)": {"target": "w4a16", "algorithm": "awq+gptq"},
    "int8": {"target": "int8"},
    "int8 (smoothquant+gptq)": {"target": "int8", "algorithm": "smoothquant+gptq"},
    "fp8 (static)": {"target": "fp8", "activations": "static"},
}
"""Rows of the table, and what `QuantizationConfig` takes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--random-1b", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--devices", default="cpu,cuda")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seeds", type=int, default=1, help="calibrations of each row")
    parser.add_argument("--jobs", help="rows, separated by commas [default: all]")
    arguments = parser.parse_args()
    jobs = arguments.jobs.split(",") if arguments.jobs else list(JOBS)
    arguments.out.mkdir(parents=True, exist_ok=True)
    base, adapter = arguments.base, arguments.adapter
    if arguments.random_1b:
        base, adapter = build("1b", arguments.out, "cuda" if torch.cuda.is_available() else "cpu")
    devices = arguments.devices.split(",")
    print(
        "| target | seed | device | KL mean | top-1 | ppl (reference) | seconds | peak GPU GB | reference |", flush=True
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    ratios: dict[str, list[float]] = {name: [] for name in jobs}
    for name in jobs:
        for seed in range(arguments.seeds):
            found = {device: measure(name, seed, device, base, adapter, arguments) for device in devices}
            if len(found) == 2:
                ratios[name].append(found[devices[1]] / found[devices[0]])
    for name, values in ratios.items():
        if len(values) > 1:
            error = stdev(values) / len(values) ** 0.5
            print(f"{name}: KL on {devices[1]} is {mean(values):.3f} +- {error:.3f} times that on {devices[0]}")


def measure(name: str, seed: int, device: str, base: Path, adapter: Path, arguments: argparse.Namespace) -> float:
    """Makes and validates one artifact, prints its row, and returns the mean KL."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.monotonic()
    options = JOBS[name]
    quantization = QuantizationConfig(**options) if options else None
    job = MergeJob(
        base=str(base),
        adapter=str(adapter),
        outputs=(OutputConfig(out=arguments.out / "candidate", quantization=quantization),),
        calibration=CalibrationConfig(sources=("default-prose",), samples=arguments.samples, seq_len=512, seed=seed),
        validation=ValidationConfig(source="default-prose-eval", tokens=arguments.tokens),
        device=device,
        overwrite=True,
    )
    with quiet_libraries():
        (outcome,) = pipeline.run(job)
    fidelity = outcome.fidelity
    assert fidelity is not None
    pair = fidelity["total"]
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
    print(
        f"| {name} | {seed} | {device} | {pair['kl']['mean']:.5f} | {pair['top1_agreement']['value']:.1%} "
        f"| {pair['perplexity']:.2f} ({pair['reference_perplexity']:.2f}) "
        f"| {time.monotonic() - start:.1f} | {peak:.2f} | {fidelity['reference']['runs']} |",
        flush=True,
    )
    kl: float = pair["kl"]["mean"]
    return kl


if __name__ == "__main__":
    main()
