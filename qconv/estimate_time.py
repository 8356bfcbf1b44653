"""Seconds from units of work and a table of measured throughputs; a range, since machines of one kind differ.

Units: ``start`` (processes that import torch alone), ``start running`` (transformers too), ``merge`` (weights decoded
and merged), ``write`` (bytes to the disk), ``forward`` (floating-point operations of forward passes and Gram matrices),
``gptq`` (N K^2 of each solve; ``gptq of floats`` where codes are 4-bit floats, which no GPU was measured on), ``awq``,
``fp8``, ``round`` (weights that each algorithm goes through), ``compare`` (floating-point operations of a comparison,
its statistics and audits included), ``svd`` (N K min(N, K) of each singular value decomposition), ``train`` (operations
of training).

What is written goes to the disk beside the work, so a stage takes the longer of the two. A unit that a machine's row
does not have gives no estimate: nothing is guessed from another machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Units = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Attributes:
    name: the class, for people.
    origin: where the numbers are from.
    cores: of the machine that was measured, when it was a CPU; others are scaled by their number.
    per_second: units done in a second; for the starts, seconds.
    spread: the range is the estimate divided and multiplied by this.
    """

    name: str
    origin: str
    per_second: Units
    spread: float
    cores: int | None = None


H100 = Machine(
    name="NVIDIA H100",
    origin="docs/performance.md and docs/validation.md: an 8B model, 128 x 2048 tokens, torch 2.11",
    per_second={
        "start": 4.0,
        "start running": 7.5,
        "merge": 1.5e9,
        "write": 1.07e9,
        "forward": 4.8e14,
        "gptq": 4.6e12,
        "awq": 8.3e8,
        "fp8": 1.5e9,
        "round": 1.5e9,
        "compare": 1.5e14,
    },
    spread=1.5,
)
CPU = Machine(
    name="CPU",
    origin="docs/planning.md: 1 core of a busy x86 server with AVX512-BF16",
    per_second={
        "start": 2.0,
        "start running": 8.0,
        "merge": 1.0e8,
        "write": 1.5e8,
        "forward": 8.0e10,
        "gptq": 2.5e9,
        "gptq of floats": 1.0e9,
        "awq": 1.0e6,
        "fp8": 4.5e6,
        "round": 2.0e7,
        "compare": 8.0e10,
        "svd": 8.0e8,
        "train": 3.3e10,
    },
    spread=2.5,
    cores=1,
)


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """A range, from the optimistic to the pessimistic end."""

    low: float
    high: float

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(low=self.low + other.low, high=self.high + other.high)


def machine_for(device_name: str | None) -> Machine | None:
    """The row of the table for a GPU by its name, or for a CPU (None); None where nobody has measured."""
    if device_name is None:
        return CPU
    return H100 if "H100" in device_name else None


def seconds(units: Units, machine: Machine, cores: int) -> Seconds | None:
    """How long a stage takes; None where the table lacks a unit.

    Args:
        cores: that the process uses, for machines that are scaled by them.
    """
    if not units.keys() <= machine.per_second.keys():
        return None
    scale = 1.0 if machine.cores is None else machine.cores / max(1, cores)
    start = sum(machine.per_second[name] * count for name, count in units.items() if name.startswith("start"))
    written = units.get("write", 0.0) / machine.per_second["write"]
    work = sum(
        count / machine.per_second[name] * scale
        for name, count in units.items()
        if name != "write" and not name.startswith("start")
    )
    expected = start + max(work, written)
    return Seconds(low=expected / machine.spread, high=expected * machine.spread)
