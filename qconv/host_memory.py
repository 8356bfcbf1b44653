"""How much host memory a process may still take, without being killed for it. Linux; elsewhere nothing is known."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def total_bytes() -> int | None:
    """What the system has."""
    with suppress(OSError, KeyError, ValueError, IndexError):
        return _field(PROC / "meminfo", "MemTotal:")
    return None


def usable_bytes() -> int | None:
    """Memory that this process may hold in all: what is free for it, and what it holds already.

    The least of what the system has and what the process's own cgroup (version 2) allows; None where neither tells.
    Pages of files and the kernel's caches do not count: the system takes them back.
    """
    found = []
    with suppress(OSError, KeyError, ValueError, IndexError):
        found.append(_field(PROC / "meminfo", "MemAvailable:"))
    with suppress(OSError, KeyError, ValueError, IndexError):
        folder = CGROUP / (PROC / "self/cgroup").read_text().split("::")[1].strip().lstrip("/")
        if not (folder / "memory.max").exists():  # a container sees its own group as the root
            folder = CGROUP
        limit, current = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
        pages = {name: int(_plain(folder / "memory.stat", name)) for name in ("file", "shmem", "slab_reclaimable")}
        found.append(limit - current + pages["file"] - pages["shmem"] + pages["slab_reclaimable"])
    if not found:
        return None
    with suppress(OSError, KeyError, ValueError):
        return max(0, min(found)) + _field(PROC / "self/status", "RssAnon:")
    return max(0, min(found))


def _field(file: Path, name: str) -> int:
    """A number of kB behind its name, in bytes."""
    return int(_plain(file, name)) << 10


def _plain(file: Path, name: str) -> str:
    rows = dict(line.split(maxsplit=1) for line in file.read_text(encoding="ascii").splitlines() if " " in line)
    return rows[name].split()[0] if name in rows else rows[name + ":"].split()[0]
