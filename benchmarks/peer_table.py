"""What ``quality.py --peers`` runs: each tool quantizes the same merged model with the same calibration rows.

Every job is a process of its own, imports and writing included, in the tool's environment; token ids reach it in a
file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from process_cost import Row, measure

HERE = Path(__file__).absolute().parent / "peers"
SAMPLES, SEQ_LEN, SOURCE = 32, 512, "default-prose"
OURS = "qconv"
PEERS = {
    "llm-compressor": ("run_llm_compressor.py", {"gptq": "GPTQ, symmetric", "awq": "AWQ, asymmetric"}),
    "gptqmodel": ("run_gptqmodel.py", {"gptq": "GPTQ, symmetric"}),  # its AWQ needs CUDA
    "auto-round": ("run_auto_round.py", {"20": "20 steps, symmetric"}),
}
"""Script by tool, and its last argument by what the table says; 4 bits, groups of 64, the tool's defaults otherwise."""

OUR_OPTIONS = {
    "AWQ's scales and GPTQ, symmetric": "--to w4a16 --algorithm awq+gptq",
    "GPTQ, symmetric": "--to w4a16",
    "AWQ, symmetric": "--to awq --sym",
    "AWQ's scales and GPTQ, asymmetric": "--to awq --algorithm awq+gptq",
    "AWQ, asymmetric": "--to awq",
    "GPTQ, asymmetric": "--to awq --algorithm gptq",
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One tool and one method: a process that writes a folder."""

    tool: str
    method: str
    command: tuple[str, ...]
    out: Path


def jobs(tools: list[str], merged: Path, rows: Path, out: Path) -> list[Job]:
    """Ours first, then those of each peer; all paths are absolute, as each runs in ``out``: some leave logs there."""
    found = []
    merged, rows, out = merged.absolute(), rows.absolute(), out.absolute()
    for method, options in OUR_OPTIONS.items():
        folder = out / f"{OURS}-{'-'.join(re.findall('[a-z]+', method.lower()))}"
        ours = f"quantize {merged} {options} --group-size 64 --calibration {SOURCE} --samples {SAMPLES}"
        ours += f" --seq-len {SEQ_LEN} --no-validate --overwrite --quiet --device cpu -o {folder}"
        found.append(Job(tool=OURS, method=method, command=(sys.executable, "-m", "qconv", *ours.split()), out=folder))
    for tool in tools:
        script, variants = PEERS[tool]
        for argument, method in variants.items():
            folder = out / f"{tool}-{argument}"
            python = str(Path(f".venv-{tool}/bin/python").absolute())
            command = (python, str(HERE / script), str(merged), str(rows), str(folder), argument)
            found.append(Job(tool=tool, method=method, command=command, out=folder))
    return found


def write_rows(merged: Path, file: Path) -> str:
    """The rows that ``qconv quantize`` calibrates with, as token ids; returns the digest that its report has."""
    from qconv import corpus

    documents, tokenizer = corpus.load_documents(SOURCE), corpus.load_tokenizer(merged)
    rows_TS = corpus.pack_tokens(documents, tokenizer, SAMPLES, SEQ_LEN, seed=0)
    file.write_text(json.dumps(rows_TS.tolist()))
    return corpus.calibration_digest(rows_TS)


def rows_of(job: Job) -> str:
    """The digest of the rows that one of our own jobs calibrated with."""
    report = json.loads((job.out / "qconv-report.json").read_text())
    digest: str = report["stages"]["calibration"]["sha256"]
    return digest


def run(job: Job) -> Row:
    """What `process_cost.measure` says of the job; its output goes beside the folder that it writes."""
    shutil.rmtree(job.out, ignore_errors=True)
    log = job.out.with_suffix(".log")
    return measure(list(job.command), job.out.parent, os.environ | {"HF_HUB_OFFLINE": "1"}, log, limit=None)


def artifact(job: Job) -> Path:
    """The folder with the model; some tools write one inside of what they are told."""
    return min(job.out.rglob("config.json"), key=lambda path: len(path.parts)).parent
