"""What a job will take: stages, bytes, memory, room on the disks and time. Reads headers and text, writes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qconv import __version__
from qconv.disk_room import Room
from qconv.errors import CapacityError, CheckpointError, concerning
from qconv.estimate_memory import Steps, Terms, peak
from qconv.estimate_time import Machine, Seconds, Units, seconds
from qconv.host_memory import usable_bytes

ESTIMATE_FORMAT = 1
TOLERANCE = 0.15  # how far planned memory was seen to be off; a job is refused only if it does not fit even so


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of a job.

    Attributes:
        name: of the stage, with its output where there are several.
        reads: bytes of weights read from files, once for each reading.
        writes: bytes of files written.
        host, gpu: steps and what each holds; `gpu` is empty on a CPU.
        units: see `estimate_time`.
    """

    name: str
    reads: int = 0
    writes: int = 0
    host: Steps = field(default_factory=dict)
    gpu: Steps = field(default_factory=dict)
    units: Units = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A job on this machine.

    Attributes:
        process: what is held in every stage, in host memory.
        rooms: what the outputs need on each disk.
        replaced: folders that ``--overwrite`` removes in the end, with their bytes.
        machine: whose throughputs are used; None = nobody has measured this GPU.
        gpu_usable: bytes that the process may take on the GPU; None on a CPU.
        problems: found on the way, in words; more are found by comparing with what is there.
    """

    command: str
    device: str
    stages: Sequence[Stage]
    process: Terms
    rooms: Sequence[Room] = ()
    replaced: Mapping[Path, int] = field(default_factory=dict)
    machine: Machine | None
    cores: int
    gpu_usable: int | None = None
    problems: Sequence[str] = ()
    notes: Sequence[str] = ()

    def host_terms(self, stage: Stage) -> dict[str, int]:
        """What the largest step of a stage holds, largest first."""
        terms = {**self.process, **peak(stage.host)}
        return dict(sorted(((k, v) for k, v in terms.items() if v), key=lambda item: -item[1]))

    @property
    def host_peak(self) -> tuple[str, int]:
        """The stage that needs most host memory, and how much."""
        return max(((stage.name, sum(self.host_terms(stage).values())) for stage in self.stages), key=lambda p: p[1])

    @property
    def gpu_peak(self) -> tuple[str, int]:
        return max(((stage.name, sum(peak(stage.gpu).values())) for stage in self.stages), key=lambda p: p[1])

    def stage_seconds(self, stage: Stage) -> Seconds | None:
        return None if self.machine is None else seconds(stage.units, self.machine, self.cores)

    @property
    def seconds(self) -> Seconds | None:
        """Of all stages; None as soon as one is not known."""
        total = Seconds(low=0.0, high=0.0)
        for stage in self.stages:
            found = self.stage_seconds(stage)
            if found is None:
                return None
            total += found
        return total

    def complaints(self) -> list[str]:
        """Why the job does not fit, in words; empty when it does."""
        found = [room.complaint for room in self.rooms if room.complaint is not None]
        usable = usable_bytes()
        name, need = self.host_peak
        if usable is not None and _verdict(need, usable) == "does not fit":
            found.append(_too_large(name, need, usable, "host memory", self._largest_terms(name)))
        if self.gpu_usable is not None and not self.problems:
            name, need = self.gpu_peak
            if _verdict(need, self.gpu_usable) == "does not fit":
                stage = next(stage for stage in self.stages if stage.name == name)
                found.append(_too_large(name, need, self.gpu_usable, "GPU memory", _words(peak(stage.gpu))))
        return [*self.problems, *found]

    def _largest_terms(self, name: str) -> str:
        return _words(self.host_terms(next(stage for stage in self.stages if stage.name == name)))

    def check(self) -> list[str]:
        """Raises what is sure to stop the job on this machine; what is only estimated comes back, in words.

        Raises:
            CheckpointError: a disk is too full; says what is needed and what is there.
            CapacityError: the GPU is too small for quantizing, however it is run; the same.
        """
        full = next((room.complaint for room in self.rooms if room.complaint is not None), None)
        with concerning("outputs"):
            if full is not None:
                raise CheckpointError(full)
            if self.problems:
                raise CapacityError("\n".join(self.problems))
        return self.complaints()

    def as_dict(self) -> dict[str, Any]:
        """The document of ``--dry-run --json``; docs/planning.md describes it."""
        usable = usable_bytes()
        complaints = self.complaints()
        total = self.seconds
        host_stage, host_bytes = self.host_peak
        gpu = None
        if self.gpu_usable is not None:
            gpu_stage, gpu_bytes = self.gpu_peak
            gpu = _need(gpu_stage, gpu_bytes, self.gpu_usable)
        return {
            "format": ESTIMATE_FORMAT,
            "tool": f"qconv {__version__}",
            "command": self.command,
            "dry_run": True,
            "device": self.device,
            "fits": not complaints,
            "problems": complaints,
            "notes": list(self.notes),
            "reads_bytes": sum(stage.reads for stage in self.stages),
            "writes_bytes": sum(stage.writes for stage in self.stages),
            "stages": [self._stage(stage) for stage in self.stages],
            "host": _need(host_stage, host_bytes, usable),
            "gpu": gpu,
            "disks": [
                {
                    "folder": str(room.folder),
                    "needed_bytes": room.need,
                    "free_bytes": room.free,
                    "verdict": "fits" if room.complaint is None else "does not fit",
                }
                for room in self.rooms
            ],
            "replaced": [{"folder": str(folder), "bytes": size} for folder, size in self.replaced.items()],
            "time": {
                "seconds": None if total is None else [round(total.low, 1), round(total.high, 1)],
                "machine": None if self.machine is None else self.machine.name,
                "origin": None if self.machine is None else self.machine.origin,
            },
        }

    def _stage(self, stage: Stage) -> dict[str, Any]:
        host, gpu, took = self.host_terms(stage), dict(peak(stage.gpu)), self.stage_seconds(stage)
        return {
            "stage": stage.name,
            "reads_bytes": stage.reads,
            "writes_bytes": stage.writes,
            "host_bytes": sum(host.values()),
            "host_terms": host,
            "gpu_bytes": sum(gpu.values()) if stage.gpu else None,
            "gpu_terms": gpu,
            "seconds": None if took is None else [round(took.low, 1), round(took.high, 1)],
        }


def _need(stage: str, need: int, usable: int | None) -> dict[str, Any]:
    return {"stage": stage, "peak_bytes": need, "usable_bytes": usable, "verdict": _verdict(need, usable)}


def _verdict(need: int, usable: int | None) -> str:
    if usable is None:
        return "unknown"
    if need <= usable:
        return "fits"
    return "tight" if need * (1 - TOLERANCE) <= usable else "does not fit"


def _too_large(stage: str, need: int, usable: int, what: str, terms: str) -> str:
    advice = {
        "host memory": "free or allow more of it, or take fewer or shorter rows (--samples, --seq-len, --eval-seq-len)",
        "GPU memory": "free or allow more of it, take shorter rows (--seq-len, --eval-seq-len), or use --device cpu",
    }[what]
    return (
        f"{stage}: needs about {need / 1e9:.2f} GB of {what} and {usable / 1e9:.2f} GB can be had "
        f"(the largest parts: {terms}); {advice}"
    )


def _words(terms: Terms) -> str:
    largest = sorted(terms.items(), key=lambda item: -item[1])[:4]
    return ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in largest)
