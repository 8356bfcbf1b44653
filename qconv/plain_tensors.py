"""Tensors that are stored without quantization: decoded, merged, rounded once and written.

Reading, computing and writing overlap. On a GPU kernels are enqueued one tensor after the other; on a CPU several
tensors are computed at a time, since most are too small to keep all cores busy.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from qconv.errors import NumericsError
from qconv.experts import stays_float32
from qconv.finite import all_finite, is_surely_finite
from qconv.timeline import TIMELINE
from qconv.types import Checkpoint

MAX_WORKERS = 4
ELEMENTS_AT_ONCE = 1 << 27  # in all threads; a tensor in work takes 8 bytes an element, for a moment
TRIM_ELEMENTS = 1 << 26


class TensorWriter(Protocol):
    """What finished tensors are handed to: a `CheckpointWriter`, or several of them."""

    def write(self, name: str, tensor: Tensor) -> None: ...


def is_plain_float(dtype: torch.dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def write_plain(
    writer: TensorWriter, view: Checkpoint, storage: torch.dtype | None, names: Iterable[str], device: str
) -> None:
    """Writes named tensors of the view, rounded to ``storage`` or, without one, as they come; see the module's text.

    Raises:
        NumericsError: a value overflows the storage dtype or is not finite.
        CheckpointError: a tensor cannot be read or written.
    """
    if device.startswith("cuda"):
        _write_from_gpu(writer, view, storage, names, device)
    else:
        _write_from_threads(writer, view, storage, names)


def _write_from_gpu(
    writer: TensorWriter, view: Checkpoint, storage: torch.dtype | None, names: Iterable[str], device: str
) -> None:
    """Waits for no tensor: whether all values were finite is looked at in the end, before anything is kept."""
    is_finite: dict[str, Tensor] = {}
    for name in names:
        with TIMELINE.stage("decode and merge"):
            stored = _cast(view, name, view.read(name, device), storage)
            if is_plain_float(stored.dtype):
                is_finite[name] = is_surely_finite(stored)
        writer.write(name, stored)
    if is_finite and not torch.stack(list(is_finite.values())).all():
        for name, flag in is_finite.items():
            if not flag:  # says what is wrong with it
                to_storage(view, name, view.read(name, device), storage)


def _write_from_threads(
    writer: TensorWriter, view: Checkpoint, storage: torch.dtype | None, names: Iterable[str]
) -> None:
    """Several tensors at a time, within a bound of memory."""
    threads = torch.get_num_threads()
    workers = min(MAX_WORKERS, threads)

    def convert(name: str) -> Tensor:
        with TIMELINE.stage("decode and merge"):
            return to_storage(view, name, view.read(name), storage)

    waiting: deque[tuple[str, Future[Tensor], int]] = deque()
    pool = ThreadPoolExecutor(workers, "qconv-merge", initializer=torch.set_num_threads, initargs=(threads // workers,))
    since_trim = 0
    try:
        for name in names:
            elements = prod(view.specs()[name].shape)
            while waiting and (len(waiting) >= workers or elements + sum(n for _, _, n in waiting) > ELEMENTS_AT_ONCE):
                _write_next(writer, waiting)
            waiting.append((name, pool.submit(convert, name), elements))
            since_trim += elements
            if since_trim > TRIM_ELEMENTS:
                since_trim = 0
                _return_freed_memory()
        while waiting:
            _write_next(writer, waiting)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the workers changed what is common to all threads, too


def _write_next(writer: TensorWriter, waiting: deque[tuple[str, Future[Tensor], int]]) -> None:
    name, future, _ = waiting.popleft()
    with TIMELINE.stage("wait for decode and merge"):
        tensor = future.result()
    writer.write(name, tensor)


def _return_freed_memory() -> None:
    """glibc keeps what threads freed, each its own share of it: of large tensors that is a gigabyte soon."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def to_storage(view: Checkpoint, name: str, tensor: Tensor, storage: torch.dtype | None) -> Tensor:
    """One rounding of a tensor to the storage dtype, if any; ``view`` and ``name`` say in messages where it is from.

    Raises:
        NumericsError: a value overflows the storage dtype or is not finite.
    """
    stored = _cast(view, name, tensor, storage)
    if is_plain_float(stored.dtype) and not all_finite(stored):
        where = f"{view.location}: tensor {name!r}"
        num_bad = int((~torch.isfinite(tensor)).sum())
        if num_bad:
            raise NumericsError(
                f"{where} has NaN or infinity in {num_bad} of {tensor.numel()} values, in the base or after the merge; "
                "the file is damaged or training diverged: fetch or save it again"
            )
        raise NumericsError(
            f"{where} does not fit {storage}: largest magnitude {float(tensor.abs().max()):g}; "
            "choose --dtype bf16 or fp32"
        )
    return stored


def _cast(view: Checkpoint, name: str, tensor: Tensor, storage: torch.dtype | None) -> Tensor:
    if storage is None or not is_plain_float(tensor.dtype) or stays_float32(name, view.config):
        return tensor
    return tensor.to(storage)
