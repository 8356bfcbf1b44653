"""Files that are written in the background, while the next tensors are computed.

Data on a GPU is copied to page-locked host memory, from where it goes to the file without another copy; data in host
memory is written from where it lies. What waits to be written is bounded in bytes. The system is told to begin writing
to the disk at once: left alone it collects gigabytes first, and the final fsync takes as long as if nothing had been
written in the meantime.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from functools import cache, partial

import torch
from torch import Tensor

from qconv.timeline import TIMELINE

NUM_THREADS = 4
PIECE_BYTES = 32 << 20  # a power of two, as page-locked memory is handed out in powers of two
HOST_BYTES = 64 << 20  # of host tensors that wait
PINNED_BYTES = 1 << 30  # of tensors from a GPU: a second of a fast disk
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
_FALLBACK_SYNC_BYTES = 256 << 20


def pwrite_all(handle: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of ``data``: the system may write less at a time. Raises OSError."""
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done:], offset + done)


class WriteBehind:
    """Writes tensors into open files in threads of its own. Any thread may `write`; each may exceed a bound by a piece.

    An error in the background is raised, as it was, by the next `write` or by `flush`; what waits is dropped then.

    Args:
        on_written: called in the background with a file, an offset and the number of bytes just written there.
        num_threads: that write side by side.
        host_bytes: of tensors in host memory that may wait.
        pinned_bytes: of tensors from a GPU that may wait.

    Attributes:
        peak_bytes: the most that waited at once.
    """

    def __init__(
        self,
        on_written: Callable[[int, int, int], None] = lambda handle, offset, num_bytes: None,
        num_threads: int = NUM_THREADS,
        host_bytes: int = HOST_BYTES,
        pinned_bytes: int = PINNED_BYTES,
    ):
        self._on_written = on_written
        self._limits = {"cpu": host_bytes, "cuda": pinned_bytes}
        self._changed = threading.Condition()
        self._tasks: deque[tuple[Callable[[], None], str, int]] = deque()
        self._bytes = 0  # handed over and not yet written
        self._unfinished = 0
        self._error: BaseException | None = None
        self._is_closed = False
        self._unsynced = 0
        self.peak_bytes = 0
        self._threads = [
            threading.Thread(target=self._work, name=f"qconv-write-{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def write(self, handle: int, offset: int, tensor: Tensor) -> None:
        """Writes the bytes of a tensor at a place in a file; waits while too much is on its way.

        A tensor in host memory must not be changed afterwards; one on a GPU is copied in the order of its stream.
        """
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        limit = self._limits[data.device.type]
        for begin in range(0, data.numel(), PIECE_BYTES):
            piece = data[begin : begin + PIECE_BYTES]
            self._admit(piece.numel(), limit)
            self._submit(self._writing(handle, offset + begin, piece), "write", piece.numel())
        if data.device.type == "cpu" and data.numel() > limit:
            self._wait_for(lambda: self._bytes == 0)  # its memory is held until its last piece is written

    def sync(self, handles: Iterable[int]) -> None:
        """Begins to bring to the disk for good what was written into files; `flush` waits for it. From any thread."""
        for handle in handles:
            self._submit(partial(os.fsync, handle), "fsync", 0)

    def flush(self) -> None:
        """Waits until everything that was handed over is done."""
        self._wait_for(lambda: self._unfinished == 0)

    def close(self) -> None:
        """Drops what waits and ends the threads; files may be closed afterwards. May be called twice."""
        with self._changed:
            self._drop()
            self._is_closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _admit(self, num_bytes: int, limit: int) -> None:
        self._wait_for(lambda: self._bytes == 0 or self._bytes + num_bytes <= limit)

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        with TIMELINE.stage("wait for writer"), self._changed:
            self._changed.wait_for(lambda: self._error is not None or self._is_closed or condition())
            if self._error is not None:
                raise self._error
            if self._is_closed:
                raise RuntimeError("nothing is written any more")

    def _submit(self, task: Callable[[], None], stage: str, num_bytes: int) -> None:
        with self._changed:
            self._bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self._bytes)
            self._unfinished += 1
            self._tasks.append((task, stage, num_bytes))
            self._changed.notify_all()

    def _drop(self) -> None:
        self._bytes -= sum(num_bytes for _, _, num_bytes in self._tasks)
        self._unfinished -= len(self._tasks)
        self._tasks.clear()

    def _writing(self, handle: int, offset: int, piece: Tensor) -> Callable[[], None]:
        """What a thread has to do for one piece; a piece on a GPU begins its way to the host now."""
        if not piece.is_cuda:
            return partial(self._write_piece, handle, offset, piece, None)
        host = torch.empty(piece.numel(), dtype=torch.uint8, pin_memory=True)
        with torch.cuda.device(piece.device):
            host.copy_(piece, non_blocking=True)
            copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # who waits sleeps
            copied.record()
        return partial(self._write_piece, handle, offset, host, copied)

    def _write_piece(self, handle: int, offset: int, piece: Tensor, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        data = memoryview(piece.numpy().data)
        pwrite_all(handle, data, offset)
        self._begin_sync(handle, offset, len(data))
        self._on_written(handle, offset, len(data))

    def _begin_sync(self, handle: int, offset: int, count: int) -> None:
        function = _sync_file_range()
        if function is not None and function(handle, offset, count, _SYNC_FILE_RANGE_WRITE) == 0:
            return
        with self._changed:
            self._unsynced += count
            if self._unsynced < _FALLBACK_SYNC_BYTES:
                return
            self._unsynced = 0
        os.fdatasync(handle)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tasks or self._is_closed)
                if not self._tasks:
                    return
                task, stage, num_bytes = self._tasks.popleft()
            error: BaseException | None = None
            try:
                with TIMELINE.stage(stage):
                    task()
            except BaseException as raised:
                error = raised
            del task  # and with it the memory of the piece, before room for the next one is announced
            with self._changed:
                self._bytes -= num_bytes
                self._unfinished -= 1
                if error is not None and self._error is None:
                    self._error = error
                    self._drop()
                self._changed.notify_all()


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """The system call that begins to write a part of a file to the disk; None where the C library lacks it."""
    try:
        function = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    function.restype = ctypes.c_int
    return function
