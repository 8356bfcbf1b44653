"""Where the seconds of a run go: stages with host and GPU time, and how busy the GPU was.

Off unless `Timeline.start` was called (``--profile``); a stage then costs nothing. One timeline per process, as one
process does one job: threads of reading and writing report to it too.

Method: a stage's host time is the wall time of its thread without the stages nested in it. Its GPU time lies between
CUDA events that the main thread records on the current stream where stages begin and end: kernels are charged to the
stage that enqueued them, and so is the time in which the stream waited for that stage to enqueue more. How much of the
run the GPU executed anything is what the driver says (``utilization.gpu`` of nvidia-smi, sampled). GPU memory is the
most that torch had given out at any time in the stage.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import IO, Any

_SAMPLE_MS = 200
OUTSIDE = "(between stages)"


class Timeline:
    """See the module docstring; threads may use it at the same time."""

    def __init__(self) -> None:
        self._is_on = False
        self._start = 0.0
        self._lock = threading.Lock()
        self._local = threading.local()
        self._host: dict[str, Counter[str]] = defaultdict(Counter)  # thread -> stage -> seconds
        self._calls: Counter[tuple[str, str]] = Counter()
        self._marks: list[tuple[str, Any]] = []  # stage that the GPU is charged to from this event on
        self._peaks: Counter[str] = Counter()  # most bytes that tensors took on the GPU, by stage
        self._current = OUTSIDE
        self._sampler: subprocess.Popen[bytes] | None = None
        self._sampled: IO[str] | None = None

    @property
    def is_on(self) -> bool:
        return self._is_on

    def start(self) -> None:
        """Begins to measure; the seconds of the process until now count as start-up."""
        self._is_on = True
        self._start = time.monotonic() - _process_seconds()
        query = ["nvidia-smi", "--query-gpu=uuid,utilization.gpu", "--format=csv,noheader,nounits"]
        self._sampled = tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe that nobody reads would fill
        try:
            self._sampler = subprocess.Popen(
                [*query, f"-lms={_SAMPLE_MS}"], stdout=self._sampled, stderr=subprocess.DEVNULL
            )
        except OSError:  # no NVIDIA driver here
            self._sampler = None

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Charges the time inside to ``name``."""
        return self._stage(name) if self._is_on else nullcontext()

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        stack: list[list[Any]] = self._local.__dict__.setdefault("stack", [])
        stack.append([name, time.monotonic(), 0.0])
        self._mark(name)
        try:
            yield
        finally:
            _, begun, nested = stack.pop()
            seconds = time.monotonic() - begun
            if stack:
                stack[-1][2] += seconds
            self._mark(stack[-1][0] if stack else OUTSIDE)
            with self._lock:
                thread = threading.current_thread().name
                self._host[thread][name] += seconds - nested
                self._calls[_pool_of(thread), name] += 1

    def _mark(self, name: str) -> None:
        torch = sys.modules.get("torch")
        if threading.current_thread() is not threading.main_thread() or torch is None:
            return
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
            self._peaks[self._current] = max(self._peaks[self._current], torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
            self._current = name

    def table(self) -> str:
        """What was measured since `start`, as text; ends the measurement.

        Threads whose names differ by a number only are one row each stage, and their share is that of all of them.
        """
        wall = time.monotonic() - self._start
        gpu = self._gpu_seconds()
        self._is_on = False
        pools: dict[str, Counter[str]] = defaultdict(Counter)
        sizes: Counter[str] = Counter()
        for thread, stages in self._host.items():
            pool = _pool_of(thread)
            sizes[pool] += 1
            pools[pool].update(stages)
        lines = [f"{'threads':<20}{'stage':<26}{'calls':>7}{'seconds':>9}{'busy':>6}{'GPU s':>8}{'GPU GB':>8}"]
        for pool, stages in sorted(pools.items(), key=lambda item: (item[0] != "MainThread", item[0])):
            available = wall * sizes[pool]
            name = pool if sizes[pool] == 1 else f"{pool} x{sizes[pool]}"
            for stage, seconds in stages.most_common():
                on_gpu = (
                    f"{gpu[stage]:8.2f}{self._peaks[stage] / 1e9:8.2f}" if pool == "MainThread" and stage in gpu else ""
                )
                calls = self._calls[pool, stage]
                lines.append(f"{name:<20}{stage:<26}{calls:>7}{seconds:>9.2f}{seconds / available:>6.0%}{on_gpu}")
            busy = sum(stages.values())
            lines.append(
                f"{name:<20}{'(nothing of these)':<26}{'':>7}{available - busy:>9.2f}{1 - busy / available:>6.0%}"
            )
        lines.append(f"whole process so far: {wall:.2f} s")
        samples = self._samples()
        if samples:
            lines.append(f"GPU: executing {sum(samples) / len(samples):.0f}% of the time ({len(samples)} samples)")
        return "\n".join(lines)

    def _gpu_seconds(self) -> Counter[str]:
        seconds: Counter[str] = Counter()
        if not self._marks:
            return seconds
        with suppress(RuntimeError):  # a GPU that failed has no times; the error is told elsewhere
            self._marks[-1][1].synchronize()
            for (stage, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
                seconds[stage] += begin.elapsed_time(end) / 1e3
        return seconds

    def _samples(self) -> list[float]:
        if self._sampler is None:
            return []
        self._sampler.terminate()
        self._sampler.wait()
        assert self._sampled is not None
        self._sampled.seek(0)
        lines = [line.replace(",", " ").split() for line in self._sampled]
        self._sampled.close()
        found = [(words[0], float(words[1])) for words in lines if len(words) == 2 and words[1].isdigit()]
        ours = _uuid_of_gpu()
        return [value for uuid, value in found if ours is None or ours in uuid]


def _uuid_of_gpu() -> str | None:
    """Of the current CUDA device, as the driver spells it behind a prefix; None where no GPU was used."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return str(getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", "")) or None


def _pool_of(thread: str) -> str:
    """``qconv-read`` of ``qconv-read-3``."""
    return re.sub(r"[-_]?\d+$", "", thread)


def _process_seconds() -> float:
    """How long this process has run, to a hundredth; 0 where the system does not say."""
    try:
        with open("/proc/self/stat", encoding="ascii") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


TIMELINE = Timeline()
