"""Tensors that are read from disk in the background before they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor


class ReadAhead:
    """Reads named tensors one after the other in a thread of its own; each is handed out once."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[str, Future[Tensor]] = {}

    def start(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        """Begins to read ``names``; what was begun earlier and never asked for is dropped."""
        names = list(names)
        if self._pool is None:
            if not names:
                return
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="qconv-read-ahead")
        for unused in self._coming.values():
            unused.cancel()
        self._coming = {name: self._pool.submit(read, name) for name in names}

    def take(self, name: str) -> Tensor | None:
        """The tensor, waiting for it if need be; None when it was not begun. Raises what reading it raised."""
        coming = self._coming.pop(name, None)
        return None if coming is None else coming.result()
