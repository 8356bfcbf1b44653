"""What a run says while it works: bars on a terminal, messages on stderr, nothing on stdout.

For machines each message is a line of JSON, `log_line`, and `as_json_lines` makes such lines of what libraries say.
"""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any, Literal, TextIO, TypeVar
from unittest.mock import patch

Item = TypeVar("Item")


Level = Literal["debug", "info", "error"]
_BEGIN = '{"time": '


def log_line(level: Level, **fields: Any) -> str:
    """One JSON object with the time (UTC, ISO 8601, milliseconds), the level and ``fields``, and a line end."""
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": time, "level": level, **fields}, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Progress:
    """Attributes:
    verbosity: 0 = errors only, 1 = stages and bars, 2 = each solve and training step.
    as_json: messages are lines of JSON: ``message``, or ``event`` (begin, end) with ``label`` in the place of a bar.
    """

    verbosity: int = 0
    as_json: bool = False

    def track(self, items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
        """The items, with a bar on stderr when that is a terminal."""
        if self.verbosity >= 1 and self.as_json:
            yield from self._track_as_json(items, label, total)
            return
        if self.verbosity < 1 or not sys.stderr.isatty():
            yield from items
            return
        yield from _bar_class()(items, desc=label, total=total, file=sys.stderr, leave=False, dynamic_ncols=True)

    def _track_as_json(self, items: Iterable[Item], label: str, total: int | None) -> Iterator[Item]:
        if total is None and isinstance(items, Sized):
            total = len(items)
        _write(log_line("info", event="begin", label=label, total=total))
        count = 0
        for item in items:
            yield item
            count += 1
        _write(log_line("info", event="end", label=label, count=count))

    def say(self, message: str) -> None:
        if self.verbosity >= 1:
            self._tell("info", message)

    def detail(self, message: str) -> None:
        if self.verbosity >= 2:
            self._tell("debug", message)

    def _tell(self, level: Level, message: str) -> None:
        _write(log_line(level, message=message) if self.as_json else message + "\n")


def _write(text: str) -> None:
    sys.stderr.write(text)  # at once: threads say something too
    sys.stderr.flush()


@cache
def _bar_class() -> Any:
    """Our own bars, as `quiet_libraries` knows them."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        """Of `Progress.track`."""

    return Bar


class _JsonLines(io.TextIOBase):
    """A text stream whose lines reach another as lines of JSON; those that are such lines already, as they are."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._begun = ""
        self._lock = threading.RLock()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._begun = (self._begun + text).split("\n")
            for line in lines:
                self._pass_on(line)
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def finish(self) -> None:
        """Passes on a last line that never ended."""
        with self._lock:
            line, self._begun = self._begun, ""
            self._pass_on(line)
            self._stream.flush()

    def _pass_on(self, line: str) -> None:
        message = line.rpartition("\r")[2].rstrip()  # a bar writes over itself
        if message:
            self._stream.write(line + "\n" if line.startswith(_BEGIN) else log_line("info", message=message))


@contextmanager
def as_json_lines() -> Iterator[None]:
    """Inside, everything that Python code writes to stderr (warnings, logs of libraries) comes out as lines of JSON."""
    before = sys.stderr
    lines = _JsonLines(before)
    sys.stderr = lines
    try:
        yield
    finally:
        sys.stderr = before
        lines.finish()


QUIET = Progress()


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without noise that asks nothing of the user: an absent CPU kernel for inference (training calls none), a
    deprecated name that peft reads, and bars of the libraries, of which some heed no setting (compressed-tensors)."""
    from tqdm.std import tqdm

    begin = tqdm.__init__

    def begin_unseen(bar: Any, *arguments: Any, **options: Any) -> None:
        begin(bar, *arguments, **options if isinstance(bar, _bar_class()) else options | {"disable": True})

    kernels = logging.getLogger("bitsandbytes.backends.cpu.ops")
    kernels.addFilter(_is_not_about_kernels)
    try:
        with warnings.catch_warnings(), patch.object(tqdm, "__init__", begin_unseen):
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
            yield
    finally:
        kernels.removeFilter(_is_not_about_kernels)


def _is_not_about_kernels(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in record.getMessage()
