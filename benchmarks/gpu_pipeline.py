"""Whole merges on a GPU, process by process: qconv beside the tools that people use for the same result today.

    python benchmarks/gpu_pipeline.py --out build/gpu --only ours
    python benchmarks/gpu_pipeline.py --out build/gpu --only peers --jobs bf16,fp8,gptq
    python benchmarks/gpu_pipeline.py --out build/gpu --only peers --jobs awq
    python benchmarks/gpu_pipeline.py --out build/gpu --table
    python benchmarks/gpu_pipeline.py --out build/gpu --jobs gptq --layers 4,8   # seconds per layer, and full depth
    python benchmarks/gpu_pipeline.py --out build/gpu --shape 70b --layers 4,8 --only ours --gpu-memory 24GB

Builds a random model of a real shape (NF4 with double quantization, r=16 adapter; see shapes.py). Every step is a
process of its own, imports included. Results are appended to a file of JSON lines, so the work may be cut into pieces;
``--table`` prints everything that the file holds. Outputs are removed, except for the peers' merged model, which their
later steps read (``--clean`` removes that too).

Jobs: gptq (4-bit symmetric in groups of 128, compressed-tensors), awq (4-bit asymmetric in groups of 128), fp8
(dynamic), bf16 (a plain merge); gptq-format is qconv's alone. The peers' first step is shared by all their jobs:
transformers loads the base with bitsandbytes, dequantizes it, peft merges the adapter, BF16 is saved. The second is
llm-compressor's one-shot on that folder. Both sides calibrate on the same rows. Needs, for the peers: peft,
bitsandbytes, datasets, llmcompressor==0.14.0.1 (which needs compressed-tensors==0.19.0 and transformers<=5.17).

How it is measured (process_cost.py has the rest):
- A job of the peers is the sum of its two steps. qconv flushes its files to the disk before it ends and the peers do
  not: what that takes afterwards is noted as ``flush_s`` and not counted.
- Cold files: a step's inputs are dropped from the page cache before it starts (``--warm`` leaves them there);
  ``read_gb`` says what the disk then gave.
- Bytecode: installed libraries have theirs, so each side first imports everything, unmeasured, into a cache of its own.
- Kernels compiled at run time are kept in --out too: the first run compiles them, a second (``--runs 2``; the tables
  show the median) does not. ``--warm-up full`` runs every step on a tiny model first.

Disk, 8b: 6 GB for the base, 16 GB for the peers' merged model, up to 16 GB for an output. All of 70b needs 80 GB;
``--models /dev/shm/models`` keeps base and adapter (40 GB) in memory instead.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from process_cost import GB, Row, device_name, measure

REPOSITORY = Path(__file__).resolve().parent.parent
JOBS: dict[str, list[str]] = {  # qconv's options
    "gptq": ["--requant", "w4a16", "--group-size", "128"],
    "awq": ["--requant", "awq", "--group-size", "128"],
    "fp8": ["--requant", "fp8"],
    "bf16": [],
    "gptq-format": ["--requant", "gptq", "--group-size", "128"],
}
PEER_JOBS = ("gptq", "awq", "fp8")  # what llm-compressor makes; bf16 is the shared step alone
DEFAULT_JOBS = "gptq,awq,fp8,bf16"
DEPTHS = {"1b": 16, "8b": 32, "70b": 80, "tiny": 2}
IMPORTS = {
    "ours": "qconv.* torch triton.compiler triton.backends.nvidia.compiler triton.backends.nvidia.driver tokenizers "
    "transformers.modeling_utils transformers.models.auto.tokenization_auto transformers.models.llama.modeling_llama",
    "peers": "torch transformers.models.llama.modeling_llama transformers.models.auto.tokenization_auto "
    "transformers.integrations.bitsandbytes peft peft.tuners.lora.bnb peft.utils.transformers_weight_conversion "
    "bitsandbytes datasets llmcompressor llmcompressor.modifiers.gptq llmcompressor.modifiers.transform.awq "
    "llmcompressor.modifiers.quantization llmcompressor.modeling.moe.gpt_oss "
    "compressed_tensors.linear.compressed_linear triton.compiler triton.backends.nvidia.compiler "
    "triton.backends.nvidia.driver qconv.corpus",
}


def drop_from_cache(folders: Iterable[Path]) -> None:
    os.sync()  # pages that are not yet written stay
    for file in (file for folder in folders for file in folder.rglob("*") if file.is_file()):
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def flush_seconds(folder: Path) -> float:
    start = time.monotonic()
    for file in folder.glob("*"):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    return time.monotonic() - start


def step(name: str, *arguments: str | Path | int) -> list[str]:
    """A command: the functions of peer_steps.py run in processes of their own."""
    return [sys.executable, str(REPOSITORY / "benchmarks/peer_steps.py"), name, *map(str, arguments)]


class Bench:
    """One model in one folder, and the steps that are measured on it."""

    def __init__(self, arguments: argparse.Namespace, shape: str, layers: int | None):
        self.arguments, self.shape, self.layers = arguments, shape, layers
        self.out: Path = arguments.out.resolve()
        self.results: Path = arguments.results or self.out / "results.jsonl"
        self.label = f"{shape}-{layers}-layers" if layers else shape
        self.models = (arguments.models or self.out).resolve() / self.label
        self.base, self.adapter = self.models / "base-nf4", self.models / "adapter"
        self.merged, self.scratch = self.out / f"{self.label}-peer-merged", self.out / "output"
        self.logs = self.out / "logs"
        self.failures = 0
        self.logs.mkdir(parents=True, exist_ok=True)
        self.environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        paths = [str(REPOSITORY), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        self.environment |= {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONPYCACHEPREFIX": str(self.out / "bytecode"),
            "TRITON_CACHE_DIR": str(self.out / "kernels"),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",  # llm-compressor sets it too, with a warning
        }

    def build(self) -> None:
        """A step that is not measured, in a process of its own: what it leaves on the GPU is gone afterwards."""
        subprocess.run(step("build", self.shape, self.models, self.layers or ""), check=True, env=self.environment)

    def run(self, side: str, name: str, command: list[str], inputs: list[Path], out: Path, record: bool) -> bool:
        shutil.rmtree(out, ignore_errors=True)
        if not self.arguments.warm:
            drop_from_cache(inputs)
        log = self.logs / f"{self.label}-{side}-{name}.txt"
        row = measure(command, REPOSITORY, self.environment, log, self.arguments.limit)
        if row["status"]:
            self.failures += 1
            print(f"{self.label}: {side} {name} ended with {row['status']} after {row['seconds']} s; {log} ends with:")
        if row["status"] or self.arguments.show_log:
            print(log.read_text(errors="replace")[-4000:], flush=True)
        if record and not row["status"]:
            row |= {"flush_s": round(flush_seconds(out), 2), "output_gb": round(size_of(out) / GB, 2)}
            self.record({"side": side, "step": name} | row)
        return not row["status"]

    def record(self, row: Row) -> None:
        arguments = self.arguments
        key = {"device": device_name(), "shape": self.shape, "layers": self.layers or DEPTHS[self.shape]}
        key |= {"samples": arguments.samples, "seq_len": arguments.seq_len, "warm": arguments.warm}
        options = [f"--gpu-memory {arguments.gpu_memory}"] if arguments.gpu_memory else []
        options += [arguments.options] if arguments.options else []
        line = json.dumps(key | {"options": " ".join(options) if row["side"] == "ours" else ""} | row)
        with self.results.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def ours(self, job: str, record: bool = True) -> None:
        arguments = self.arguments
        size = ["--samples", str(arguments.samples), "--seq-len", str(arguments.seq_len)]
        command = [sys.executable, "-m", "qconv", "merge", str(self.base), str(self.adapter), *JOBS[job], *size]
        command += ["--no-validate", "-q", "-o", str(self.scratch), *arguments.options.split()]
        if arguments.gpu_memory:
            command += ["--gpu-memory", arguments.gpu_memory]
        self.run("ours", job, command, [self.base, self.adapter], self.scratch, record)
        shutil.rmtree(self.scratch, ignore_errors=True)

    def peer(self, job: str, record: bool = True) -> None:
        """The shared step where it is asked for or missing, then the job's own."""
        if job not in ("bf16", *PEER_JOBS):
            return
        done = self.merged / "done"
        if job == "bf16" or not done.exists():
            command = step("peer-merge", self.base, self.adapter, self.merged)
            if not self.run("peers", "merge", command, [self.base, self.adapter], self.merged, record):
                return
            done.touch()
        if job in PEER_JOBS:
            size = self.arguments.samples, self.arguments.seq_len
            command = step("peer-quantize", job, self.merged, self.scratch, *size)
            self.run("peers", job, command, [self.merged], self.scratch, record)
            shutil.rmtree(self.scratch, ignore_errors=True)

    def all(self, sides: list[str], jobs: list[str], record: bool = True) -> None:
        for side in sides:
            # The shared step of the peers comes first, once.
            for job in sorted(jobs, key=lambda job: job != "bf16"):
                for _ in range(self.arguments.runs if record else 1):
                    self.ours(job, record) if side == "ours" else self.peer(job, record)
        if self.arguments.clean or not record:
            shutil.rmtree(self.merged, ignore_errors=True)


def warm_up(bench: Bench, sides: list[str], jobs: list[str]) -> None:
    """What an installation has and a new machine has not: bytecode, and compiled kernels if that is asked for."""
    if bench.arguments.warm_up == "none":
        return
    for side in sides:
        done = bench.out / f"imported-{side}"
        if not done.exists():
            subprocess.run(step("import", IMPORTS[side]), check=True, env=bench.environment)
            done.touch()
    if bench.arguments.warm_up == "full":
        tiny = Bench(bench.arguments, "tiny", 1)
        tiny.build()
        tiny.all(sides, jobs, record=False)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def median(rows: list[Row]) -> Row | None:
    """The run with the median seconds."""
    return sorted(rows, key=lambda row: row["seconds"])[(len(rows) - 1) // 2] if rows else None


def sections(rows: list[Row], keys: tuple[str, ...]) -> Iterator[tuple[tuple[Any, ...], list[Row]]]:
    for value in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        yield value, [row for row in rows if tuple(row[key] for key in keys) == value]


def cost(rows: list[Row], side: str, job: str, options: str = "") -> Row | None:
    """Seconds and peaks of a job; those of the peers are of both steps together. None until all of it was measured."""
    names = [job] if side == "ours" else ["merge"] if job == "bf16" else ["merge", job]
    steps = []
    for name in names:
        same = [row for row in rows if (row["side"], row["step"], row["options"]) == (side, name, options)]
        steps.append(median(same))
    known = [step for step in steps if step is not None]
    if len(known) < len(steps):
        return None
    gpu = [step["gpu_gb"] for step in known if step["gpu_gb"] is not None]
    return {
        "seconds": sum(step["seconds"] for step in known),
        "gpu_gb": max(gpu) if gpu else None,
        "host_gb": max(step["host_gb"] for step in known),
    }


def cells(one: Row | None) -> str:
    if one is None:
        return "- | - | -"
    gpu = "-" if one["gpu_gb"] is None else f"{one['gpu_gb']:.1f}"
    return f"{one['seconds']:.1f} | {gpu} | {one['host_gb']:.1f}"


def print_tables(rows: list[Row]) -> None:
    machine = ("device", "shape", "samples", "seq_len", "warm")
    for (device, shape, samples, seq_len, warm), part in sections(rows, machine):
        files = "files in the page cache" if warm else "cold files"
        for (layers,), same in sections(part, ("layers",)):
            print(f"\n{shape} shape, {layers} layers, {samples} x {seq_len} tokens, {device}, {files}\n")
            print("| job | ours s | ours GPU GB | ours host GB | peers s | peers GPU GB | peers host GB | ratio |")
            print("|---|---|---|---|---|---|---|---|")
            for job in JOBS:
                peers = cost(same, "peers", job)
                variants = dict.fromkeys(row["options"] for row in same if (row["side"], row["step"]) == ("ours", job))
                for options in variants or ([""] if peers else []):
                    ours = cost(same, "ours", job, options)
                    ratio = f"{peers['seconds'] / ours['seconds']:.1f}" if ours and peers else "-"
                    print(f"| {' '.join([job, options]).strip()} | {cells(ours)} | {cells(peers)} | {ratio} |")
        if len({row["layers"] for row in part}) > 1:
            print_slopes(part, shape)


def print_slopes(rows: list[Row], shape: str) -> None:
    """Seconds against layers: a straight line through all depths below the full one, and what it says of that."""
    full = DEPTHS[shape]
    print("\n| job | side | layers | s per layer | s besides | off the line s | full depth s | measured s |")
    print("|---|---|---|---|---|---|---|---|")
    for job in JOBS:
        for side, options in dict.fromkeys((row["side"], row["options"]) for row in rows):
            found = {layers: cost(same, side, job, options) for (layers,), same in sections(rows, ("layers",))}
            points = {layers: one["seconds"] for layers, one in sorted(found.items()) if one is not None}
            measured = points.pop(full, None)
            if len(points) < 2:
                continue
            slope, rest = statistics.linear_regression(list(points), list(points.values()))
            off = max(abs(rest + slope * layers - seconds) for layers, seconds in points.items())
            print(
                f"| {' '.join([job, options]).strip()} | {side} | {', '.join(map(str, points))} | {slope:.2f} "
                f"| {rest:.1f} | {f'{off:.2f}' if len(points) > 2 else '-'} | {rest + slope * full:.1f} "
                f"| {'-' if measured is None else f'{measured:.1f}'} |"
            )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("build/gpu"), help="folder for models, outputs, logs and caches")
    add("--results", type=Path, help="the file that results are appended to [default: results.jsonl in --out]")
    add("--models", type=Path, help="folder for the base and the adapter, e.g. in memory [default: --out]")
    add("--shape", choices=list(DEPTHS), default="8b", metavar="{8b,1b,70b}")
    add("--layers", type=lambda text: [int(word) for word in text.split(",")], default=[None], help="e.g. 4,8")
    add("--jobs", type=lambda text: text.split(","), default=DEFAULT_JOBS, help=f"of {', '.join(JOBS)}")
    add("--only", choices=["ours", "peers"])
    add("--samples", type=int, default=128)
    add("--seq-len", type=int, default=2048)
    add("--runs", type=int, default=1, help="times that each step is measured")
    add("--limit", type=float, metavar="SECONDS", help="stop a step after this long")
    add("--gpu-memory", metavar="SIZE", help="handed to qconv")
    add("--options", default="", help="more options for qconv, e.g. '--profile'")
    add("--warm", action="store_true", help="leave the inputs in the page cache")
    add("--warm-up", choices=["imports", "full", "none"], default="imports")
    add("--show-log", action="store_true", help="print the end of what each step wrote")
    add("--clean", action="store_true", help="remove the peers' merged model at the end")
    add("--table", action="store_true", help="only print the tables of the results so far")
    arguments = parser.parse_args()
    unknown = set(arguments.jobs) - set(JOBS)
    if unknown:
        parser.error(f"unknown jobs: {', '.join(sorted(unknown))}; there are {', '.join(JOBS)}")
    return arguments


def main() -> None:
    arguments = parse()
    sides = [arguments.only] if arguments.only else ["ours", "peers"]
    failures = 0
    results: Path = arguments.results or arguments.out / "results.jsonl"
    if not arguments.table:
        for layers in arguments.layers:
            bench = Bench(arguments, arguments.shape, layers)
            warm_up(bench, sides, arguments.jobs)
            bench.build()
            bench.all(sides, arguments.jobs)
            failures += bench.failures
    print_tables([json.loads(line) for line in results.read_text().splitlines()] if results.exists() else [])
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
