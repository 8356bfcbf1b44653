"""Ranges of bytes from files into memory of the host or a GPU; large ones in parts, side by side."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future
from pathlib import Path

import torch
from torch import Tensor

from qconv.errors import CheckpointError
from qconv.read_ahead import part_pool
from qconv.timeline import TIMELINE

PART_BYTES = 32 << 20  # a power of two, as page-locked memory is handed out in powers of two
PARTS_AT_ONCE = 8


def read_to_host(handle: int, file: Path, offset: int, num_bytes: int, *, pin: bool = False) -> Tensor:
    """uint8 ``[num_bytes]``; ``pin`` for page-locked memory.

    Raises:
        CheckpointError: the file ends before.
    """
    buffer = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pin)
    data = memoryview(buffer.numpy().data)
    if num_bytes < 2 * PART_BYTES:
        _pread_into(handle, data, offset, file)
        return buffer
    parts = [
        part_pool().submit(_pread_into, handle, data[start : start + PART_BYTES], offset + start, file)
        for start in range(0, num_bytes, PART_BYTES)
    ]
    for part in parts:
        part.result()
    return buffer


def read_to_gpu(handle: int, file: Path, offset: int, num_bytes: int, device: str) -> Tensor:
    """uint8 ``[num_bytes]`` on a GPU, through page-locked buffers: as fast as the disk, and never whole on the host.

    Raises:
        CheckpointError: the file ends before.
    """
    result = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    starts = deque(range(0, num_bytes, PART_BYTES))
    coming: deque[tuple[int, Future[Tensor]]] = deque()
    while starts or coming:
        while starts and len(coming) < PARTS_AT_ONCE:
            start = starts.popleft()
            count = min(PART_BYTES, num_bytes - start)
            coming.append((start, part_pool().submit(_read_pinned, handle, file, offset + start, count)))
        begin, future = coming.popleft()
        with TIMELINE.stage("wait for read"):
            part = future.result()
        result[begin : begin + len(part)].copy_(part, non_blocking=True)
    return result


def _read_pinned(handle: int, file: Path, offset: int, num_bytes: int) -> Tensor:
    part = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    with TIMELINE.stage("read"):
        _pread_into(handle, memoryview(part.numpy().data), offset, file)
    return part


def _pread_into(handle: int, buffer: memoryview, offset: int, file: Path) -> None:
    done = 0
    while done < len(buffer):
        try:
            got = os.preadv(handle, [buffer[done : done + (1 << 30)]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read at byte {offset + done} ({error.strerror})") from error
        if got == 0:
            raise CheckpointError(f"{file}: ended at byte {offset + done}; the file was truncated while it was read")
        done += got
