"""An estimate for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_SHOWN_TERMS = 5


def show(document: Mapping[str, Any]) -> str:
    """The document of an estimate as text."""
    return "\n".join(_lines(document))


def _lines(document: Mapping[str, Any]) -> Iterator[str]:
    for stage in document["stages"]:
        parts = []
        if stage["reads_bytes"]:
            parts.append(f"reads {_size(stage['reads_bytes'])}")
        if stage["writes_bytes"]:
            parts.append(f"writes {_size(stage['writes_bytes'])}")
        parts.append(f"host {_size(stage['host_bytes'])}")
        if stage["gpu_bytes"] is not None:
            parts.append(f"GPU {_size(stage['gpu_bytes'])}")
        if stage["seconds"] is not None:
            parts.append(_range(stage["seconds"]))
        yield f"{'stage':<11} {stage['stage']}: {', '.join(parts)}"
    for key, label in (("host", "host memory"), ("gpu", "GPU memory")):
        need = document[key]
        if need is not None:
            usable = "unknown" if need["usable_bytes"] is None else _size(need["usable_bytes"])
            yield f"{label:<11} peak {_size(need['peak_bytes'])} in {need['stage']}, usable {usable}: {need['verdict']}"
            yield from _terms(next(s for s in document["stages"] if s["stage"] == need["stage"])[f"{key}_terms"])
    for disk in document["disks"]:
        needed, free = _size(disk["needed_bytes"]), _size(disk["free_bytes"])
        yield f"{'disk':<11} {disk['folder']}: needs {needed}, free {free}: {disk['verdict']}"
    for old in document["replaced"]:
        yield f"{'replaced':<11} {old['folder']}: {_size(old['bytes'])}, kept until the new one is complete"
    time = document["time"]
    if time["seconds"] is not None:
        yield f"{'time':<11} {_range(time['seconds'])} ({time['machine']}: {time['origin']})"
    else:
        yield f"{'time':<11} no estimate"
    yield from (f"{'note':<11} {note}" for note in document["notes"])
    yield f"{'verdict':<11} {'fits; nothing was written' if document['fits'] else 'DOES NOT FIT; nothing was written'}"


def _terms(terms: Mapping[str, int]) -> Iterator[str]:
    ordered: Sequence[tuple[str, int]] = sorted(terms.items(), key=lambda item: -item[1])
    for name, size in ordered[:_SHOWN_TERMS]:
        yield f"{'':<11}   {_size(size):>9}  {name}"
    rest = sum(size for _, size in ordered[_SHOWN_TERMS:])
    if rest:
        yield f"{'':<11}   {_size(rest):>9}  the rest"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _range(seconds: Sequence[float]) -> str:
    low, high = seconds
    return f"{low / 60:.0f} to {high / 60:.0f} min" if high >= 600 else f"{low:.0f} to {high:.0f} s"
