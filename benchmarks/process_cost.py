"""What one process costs: seconds, and the most host and GPU memory that it held. Linux only.

- seconds: from the start of the process to its end, imports included.
- host: the most resident memory (VmHWM), files that are mapped into the process included; ``anonymous_gb`` leaves
  those out. Child processes count.
- GPU: the most that nvidia-smi shows as used, every 100 ms, above the least that it shows during the run.
- ``read_gb`` and ``written_gb``: what the kernel moved from and to the disk for the process.
"""

from __future__ import annotations

import functools
import os
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

GB = 1e9
POLL_SECONDS = 0.025
GPU_MS = 100
START_SECONDS = 10.0  # given to nvidia-smi for its first line
POLLS_PER_TREE = 20  # finding child processes is dearer than reading the memory of known ones
Row = dict[str, Any]


def process_tree(root: int) -> list[int]:
    found = [root]
    for pid in found:  # grows while it is walked
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:  # the thread has ended
                continue
    return found


def fields(file: str, names: Iterable[str]) -> list[int]:
    """Numbers behind ``name:`` in a file of /proc; zeros when the process is gone or the file not readable."""
    try:
        lines = dict(line.split(":", 1) for line in Path(file).read_text().splitlines() if ":" in line)
    except OSError:
        lines = {}
    return [int(lines.get(name, "0").split()[0]) for name in names]


class GpuMemory:
    """nvidia-smi in the background; without such a GPU nothing is sampled."""

    def __init__(self) -> None:
        self.text = ""
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", gpu]
        # A terminal, since output to a pipe or a file may be held back.
        self.terminal, end = os.openpty()
        os.set_blocking(self.terminal, False)
        try:
            self.process: subprocess.Popen[bytes] | None = subprocess.Popen(
                [*query, f"--loop-ms={GPU_MS}"], stdout=end, stderr=subprocess.DEVNULL
            )
        except OSError:
            self.process = None
        os.close(end)
        start = time.monotonic()
        while self.process is not None and self.process.poll() is None and time.monotonic() - start < START_SECONDS:
            self.poll()
            if self.text:
                break
            time.sleep(POLL_SECONDS)

    def poll(self) -> None:
        with suppress(OSError):  # nothing there, or closed
            self.text += os.read(self.terminal, 1 << 16).decode()

    def peak_gb(self) -> float | None:
        """Ends the sampling; above the least that was in use."""
        self.poll()
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
        os.close(self.terminal)
        used = [int(line) for line in self.text.splitlines()[:-1] if line.strip().isdigit()]  # the last may be cut
        return round((max(used) - min(used)) * 2**20 / GB, 2) if used else None


@functools.cache
def device_name() -> str:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "CPU"


class Usage:
    """The most memory that a process and its children held, and what was read and written, in bytes."""

    def __init__(self, pid: int):
        self.pid, self.tree, self.polls = pid, [pid], 0
        self.resident = self.anonymous = self.read = self.written = 0

    def poll(self) -> None:
        if self.polls % POLLS_PER_TREE == 0:
            self.tree = process_tree(self.pid)
        self.polls += 1
        memory = [fields(f"/proc/{pid}/status", ("VmRSS", "RssAnon", "RssShmem")) for pid in self.tree]
        # The kernel's own maximum misses nothing between two polls. Not that of wait4, which for a process that a large
        # one started begins with what the large one held.
        (peak,) = fields(f"/proc/{self.pid}/status", ("VmHWM",))
        self.resident = max(self.resident, peak * 1024, sum(row[0] for row in memory) * 1024)
        self.anonymous = max(self.anonymous, sum(row[1] + row[2] for row in memory) * 1024)
        read, written = fields(f"/proc/{self.pid}/io", ("read_bytes", "write_bytes"))
        self.read, self.written = max(self.read, read), max(self.written, written)


def measure(command: list[str], folder: Path, environment: dict[str, str], log: Path, limit: float | None) -> Row:
    """Runs a command in ``folder`` to its end, or for ``limit`` seconds; its output goes to ``log``.

    Returns the exit status (negative: the signal) and the numbers of the module docstring, GB and seconds.
    """
    gpu = GpuMemory()
    with log.open("wb") as output:
        start = time.monotonic()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder)
        usage = Usage(process.pid)
        while True:
            ended, status = os.waitpid(process.pid, os.WNOHANG)
            if ended:
                break
            usage.poll()
            gpu.poll()
            if limit is not None and time.monotonic() - start > limit:
                process.kill()
            time.sleep(POLL_SECONDS)
        seconds = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "status": process.returncode,
        "seconds": round(seconds, 2),
        "gpu_gb": gpu.peak_gb(),
        "host_gb": round(usage.resident / GB, 2),
        "anonymous_gb": round(usage.anonymous / GB, 2),
        "read_gb": round(usage.read / GB, 2),
        "written_gb": round(usage.written / GB, 2),
    }
