"""Tensors that lie in files of one folder: read lazily, one at a time, by where each begins.

Bytes are fetched with `pread` into fresh buffers rather than memory-mapped, so that resident memory is what the caller
holds and nothing more.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from qconv.errors import CheckpointError
from qconv.read_ahead import ReadAhead
from qconv.read_bytes import read_to_gpu, read_to_host
from qconv.timeline import TIMELINE
from qconv.types import TensorSpec

SMALL_BYTES = 1 << 20  # below this a tensor reaches a GPU in one plain copy
MOST_PINNED = 1 << 28  # locking pages takes longer than reading them, and nobody else talks to the GPU meanwhile


class FileCheckpoint:
    """A `Checkpoint` over files of one local folder; who knows their format fills in specs and places.

    Args:
        folder: local folder.
        config: the content of ``config.json`` or ``adapter_config.json``, or what stands for it.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        self.folder = folder
        self.config = config
        self._specs: dict[str, TensorSpec] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        self._handles: dict[Path, int] = {}
        self._ahead = ReadAhead()
        self._lent: dict[tuple[str, str], Tensor] = {}
        self._opening = threading.Lock()

    @property
    def location(self) -> str:
        return str(self.folder)

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def file_of(self, name: str) -> Path:
        return self._places[name][0]

    def read(self, name: str, device: str = "cpu") -> Tensor:
        if name not in self._specs:
            raise CheckpointError(f"{self.folder}: no tensor {name!r}")
        if (name, device) in self._lent:
            return self._lent[name, device]
        tensor = self._ahead.take(name)
        if tensor is None and device.startswith("cuda") and self._specs[name].num_bytes >= SMALL_BYTES:
            return self._read_to_gpu(name, device)
        if tensor is None:
            with TIMELINE.stage("read"):
                tensor = self._read_host(name)
        return tensor.to(device, non_blocking=True)

    def lend(self, tensors: Mapping[str, Tensor], device: str) -> None:
        """Has `read` to ``device`` give these: somebody holds them there, as they are stored. Empty = no more."""
        self._lent = {(name, device): tensor for name, tensor in tensors.items()}

    def is_lent(self, name: str, device: str) -> bool:
        return (name, device) in self._lent

    def read_part(self, name: str, begin: int, shape: tuple[int, ...], device: str = "cpu") -> Tensor:
        """A range of neighbouring elements of a stored tensor, from element ``begin``, as a tensor of ``shape``."""
        spec = self._specs[name]
        file, offset = self._places[name]
        with TIMELINE.stage("read"):
            num_bytes = prod(shape) * spec.dtype.itemsize
            data = read_to_host(self._handle(file), file, offset + begin * spec.dtype.itemsize, num_bytes)
        return data.view(spec.dtype).reshape(shape).to(device)

    def read_ahead(self, names: Iterable[str], pin: bool = False, max_bytes: int | None = None) -> None:
        """Begins to read ``names`` in the background, see `ReadsAhead`; with ``pin`` no very large ones."""
        read = partial(self._read_host, pin=pin)
        if pin:
            names = [name for name in names if self._specs[name].num_bytes <= MOST_PINNED]
        self._ahead.start(names, read, lambda name: self._specs[name].num_bytes, max_bytes)

    def _read_host(self, name: str, *, pin: bool = False) -> Tensor:
        spec = self._specs[name]
        file, offset = self._places[name]
        data = read_to_host(self._handle(file), file, offset, spec.num_bytes, pin=pin)
        return self._arranged(name, data.view(spec.dtype).reshape(spec.shape))

    def _read_to_gpu(self, name: str, device: str) -> Tensor:
        spec = self._specs[name]
        file, offset = self._places[name]
        data = read_to_gpu(self._handle(file), file, offset, spec.num_bytes, device)
        return self._arranged(name, data.view(spec.dtype).reshape(spec.shape))

    def _arranged(self, name: str, stored: Tensor) -> Tensor:
        """The tensor as the model has it, from how its bytes lie in the file."""
        return stored

    def _handle(self, file: Path) -> int:
        with self._opening:  # reading ahead happens in another thread
            if file not in self._handles:
                self._handles[file] = os.open(file, os.O_RDONLY)
            return self._handles[file]

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # modules may be gone by then
        for handle in getattr(self, "_handles", {}).values():
            close(handle)
