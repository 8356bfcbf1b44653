"""Tensors that are read from disk in the background before they are asked for.

All reading in the background is done by a few threads of the process: one for each tensor that is on its way, and for
parts of tensors that are large.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

from torch import Tensor

from qconv.timeline import TIMELINE
from qconv.types import ReadsAhead

NUM_THREADS = 4


class ReadAhead:
    """Reads named tensors in the background, in their order; each is handed out once. Any thread may take them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._generation = _Generation(read=None, sizes={}, max_bytes=None)

    def start(
        self,
        names: Iterable[str],
        read: Callable[[str], Tensor],
        size: Callable[[str], int] = lambda _: 0,
        max_bytes: int | None = None,
    ) -> None:
        """Begins to read ``names``; what was begun earlier and never asked for is dropped.

        Args:
            size: bytes of a tensor.
            max_bytes: of tensors that wait to be taken; with every one that is taken, further ones are begun.
                Tensors that alone are larger than this are left out.
        """
        sizes = {name: size(name) for name in names}
        if max_bytes is not None:
            sizes = {name: num_bytes for name, num_bytes in sizes.items() if num_bytes <= max_bytes}
        with self._lock:
            self._generation.cancel()
            self._generation = _Generation(read, sizes, max_bytes)
            self._generation.fill()

    def take(self, name: str) -> Tensor | None:
        """The tensor, waiting for it if need be; None when it was not begun. Raises what reading it raised."""
        with self._lock:
            coming = self._generation.take(name)
        if coming is None:
            return None
        with TIMELINE.stage("wait for read"):
            return coming.result()


class _Generation:
    """What one `start` asked for: names to begin, and reads on their way."""

    def __init__(self, read: Callable[[str], Tensor] | None, sizes: dict[str, int], max_bytes: int | None):
        self._read = read
        self._sizes = sizes
        self._max_bytes = max_bytes
        self._waiting = dict.fromkeys(sizes)
        self._coming: dict[str, Future[Tensor]] = {}
        self._bytes = 0

    def fill(self) -> None:
        """Begins what there is room for."""
        while self._waiting:
            name = next(iter(self._waiting))
            if self._max_bytes is not None and self._bytes + self._sizes[name] > self._max_bytes:
                return
            del self._waiting[name]
            self._bytes += self._sizes[name]
            self._coming[name] = reading_pool().submit(self._run, name)

    def _run(self, name: str) -> Tensor:
        assert self._read is not None  # there is nothing to read without
        with TIMELINE.stage("read"):
            return self._read(name)

    def take(self, name: str) -> Future[Tensor] | None:
        self._waiting.pop(name, None)
        coming = self._coming.pop(name, None)
        if coming is not None:
            self._bytes -= self._sizes[name]
            self.fill()
        return coming

    def cancel(self) -> None:
        for unused in self._coming.values():
            unused.cancel()


def read_ahead(view: object, names: Iterable[str], pin: bool = False, max_bytes: int | None = None) -> None:
    """Has a view begin to read ``names``, where it knows how to; see `ReadsAhead`."""
    if isinstance(view, ReadsAhead):
        view.read_ahead(names, pin=pin, max_bytes=max_bytes)


@cache
def reading_pool() -> ThreadPoolExecutor:
    """Threads that read whole tensors."""
    return _pool("qconv-read")


@cache
def part_pool() -> ThreadPoolExecutor:
    """Threads that read parts of large tensors, for others that wait for them."""
    return _pool("qconv-read-part")


def _pool(name: str) -> ThreadPoolExecutor:
    numbers = itertools.count()

    def begin() -> None:
        threading.current_thread().name = f"{name}-{next(numbers)}"

    return ThreadPoolExecutor(NUM_THREADS, initializer=begin)
