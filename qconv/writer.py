"""Writing a model folder: header first, tensors in any order, visible only when complete.

All names, shapes and dtypes are known before the first tensor is computed, so shard files are
laid out up front and every tensor is written straight to its place, in the background (`write_behind.py`):
host memory is the tensors that are on their way, which is bounded.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from qconv.checkpoint import DTYPES, INDEX_NAME
from qconv.disk_room import Room, rooms_for
from qconv.errors import CheckpointError
from qconv.running_digest import RunningDigest
from qconv.timeline import TIMELINE
from qconv.types import TensorSpec
from qconv.work_folder import WorkFolder, disk_error
from qconv.write_behind import WriteBehind, pwrite_all

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SIDE_BYTES = 64 << 20  # room left on the disk for tokenizer, reports and file system overhead


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """A file of weights before there is any.

    Attributes:
        head: what comes before the data.
        begins: tensor -> where it begins in the file; between tensors lie zeros.
        num_bytes: of the whole file.
    """

    name: str
    head: bytes
    begins: Mapping[str, int]
    num_bytes: int


class CheckpointWriter:
    """Writes one model folder atomically; use as a context manager and end with `commit`.

    Leaving the block without `commit` (an error, an interrupt) removes ``OUT.partial``.

    Args:
        out: final folder.
        specs: every tensor that will be written, in the order of the model.
        max_shard_bytes: a shard closes before it would exceed this (a larger tensor gets its own).
        overwrite: replace an existing ``out`` at commit; until then it stays as it is.
        with_digests: hash the weights files while they are written.
        files: where the tensors lie; None = in shards of safetensors.
        made_of_them: bytes that are made of the tensors beside them, before they go.

    Attributes:
        digests: SHA-256 (hex) of the weights files by name, from `finish_tensors` on, if they were asked for.

    Raises:
        CheckpointError: ``out`` exists and ``overwrite`` is false, or the disk is too full.
    """

    def __init__(
        self,
        out: Path,
        specs: Iterable[TensorSpec],
        max_shard_bytes: int,
        overwrite: bool = False,
        with_digests: bool = False,
        files: Sequence[PlannedFile] | None = None,
        made_of_them: int = 0,
    ):
        self.out = out
        self._made_of_them = made_of_them
        self._folder = WorkFolder(out, overwrite)
        self.partial = self._folder.path
        self._specs = {spec.name: spec for spec in specs}
        self._files = _shards_of(list(self._specs.values()), max_shard_bytes) if files is None else files
        self._places: dict[str, tuple[int, int]] = {}
        self._pending = {name: prod(spec.shape) for name, spec in self._specs.items()}  # elements to come
        self._handles: list[int] = []
        self._behind: WriteBehind | None = None
        self.digests: dict[str, str] = {}
        self._with_digests = with_digests
        self._running: dict[int, RunningDigest] = {}
        self._counting = threading.Lock()
        self._missing: dict[int, int] = {}  # bytes to come, by file

    def __enter__(self) -> CheckpointWriter:
        check_room([self])
        try:
            self._folder.begin()
            for file in self._files:
                self._start_file(file)
            self._behind = WriteBehind(self._count)
        except OSError as error:
            self._discard()
            raise disk_error(self.partial, error) from error
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._handles:  # given up without an error of its own: one of the disk is still told
                self._flush()
        finally:
            self._discard()

    @property
    def num_bytes(self) -> int:
        """Room that the folder will take on the disk, with some to spare."""
        return sum(spec.num_bytes for spec in self._specs.values()) + self._made_of_them + SIDE_BYTES

    @property
    def weights_bytes(self) -> int:
        """What the weights files will hold, headers included, and their index where there is one; exact."""
        files = sum(file.num_bytes for file in self._files)
        return files + (len(json_text(self._index())) if len(self._files) > 1 else 0)

    def _start_file(self, file: PlannedFile) -> None:
        handle = os.open(self.partial / file.name, os.O_CREAT | os.O_RDWR | os.O_TRUNC, 0o644)
        self._handles.append(handle)
        pwrite_all(handle, file.head, 0)
        os.ftruncate(handle, file.num_bytes)
        self._missing[handle] = sum(self._specs[name].num_bytes for name in file.begins)
        if self._with_digests:
            running = self._running[handle] = RunningDigest(self.partial / file.name)
            end = 0
            for begin, num_bytes in [(0, len(file.head)), *self._pieces(file), (file.num_bytes, 0)]:
                running.written(end, begin - end)  # zeros between tensors
                end = begin + num_bytes
            running.written(0, len(file.head))
        for name, begin in file.begins.items():
            self._places[name] = (handle, begin)

    def _pieces(self, file: PlannedFile) -> list[tuple[int, int]]:
        return sorted((begin, self._specs[name].num_bytes) for name, begin in file.begins.items())

    def write(self, name: str, tensor: Tensor) -> None:
        """Hands over one tensor; its shape and dtype must be those of its spec, and it comes once.

        It is written in the background: a tensor in host memory must not be changed afterwards. Waits while too much
        is on its way. A failure of the disk is raised here, for a later tensor, or by `finish_tensors`.

        Raises:
            CheckpointError: the tensor was not announced like this, or one before it could not be written.
        """
        spec = self._announced(name)
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
            raise CheckpointError(
                f"{self.out}: tensor {name!r} announced as {spec.dtype} {spec.shape}, "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
        self._write(name, 0, tensor)

    def write_part(self, name: str, begin: int, tensor: Tensor) -> None:
        """`write` for neighbouring elements of a tensor, from element ``begin``; each element comes once."""
        spec = self._announced(name)
        if begin + tensor.numel() > prod(spec.shape) or tensor.dtype != spec.dtype:
            raise CheckpointError(
                f"{self.out}: tensor {name!r} announced as {spec.dtype} {spec.shape}, "
                f"got {tensor.numel()} elements of {tensor.dtype} from element {begin}"
            )
        self._write(name, begin, tensor)

    def _announced(self, name: str) -> TensorSpec:
        spec = self._specs.get(name)
        if spec is None or name not in self._pending:
            raise CheckpointError(f"{self.out}: tensor {name!r} was {'written twice' if spec else 'not announced'}")
        return spec

    def _write(self, name: str, begin: int, tensor: Tensor) -> None:
        assert self._behind is not None  # tensors are written inside of the context
        handle, offset = self._places[name]
        try:
            self._behind.write(handle, offset + begin * tensor.dtype.itemsize, tensor)
        except OSError as error:
            raise disk_error(self.partial, error) from error
        self._pending[name] -= tensor.numel()
        if self._pending[name] <= 0:
            del self._pending[name]

    def _count(self, handle: int, offset: int, num_bytes: int) -> None:
        """A file that is complete goes to the disk for good at once, while others are written."""
        if handle in self._running:
            self._running[handle].written(offset, num_bytes)
        with self._counting:
            self._missing[handle] -= num_bytes
            is_complete = self._missing[handle] == 0
        if is_complete and self._behind is not None:
            self._behind.sync([handle])

    def _flush(self, sync: bool = False) -> None:
        """Waits until all tensors are written; with ``sync``, until they are on the disk for good."""
        if self._behind is None:
            return
        try:
            self._behind.flush()
            if sync:
                self._behind.sync(self._handles)
                self._behind.flush()
        except OSError as error:
            raise disk_error(self.partial, error) from error

    def write_text(self, file_name: str, text: str) -> None:
        try:
            (self.partial / file_name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise disk_error(self.partial, error) from error

    def write_json(self, file_name: str, value: Mapping[str, Any]) -> None:
        self.write_text(file_name, json_text(value).decode())

    def copy_files(self, files: Iterable[Path]) -> None:
        """Copies side files (tokenizer and the like) byte for byte."""
        try:
            for file in files:
                shutil.copyfile(file, self.partial / file.name)
        except OSError as error:
            raise disk_error(self.partial, error) from error

    def finish_tensors(self) -> None:
        """Closes the shards and writes the index; the folder can then be read at `partial`.

        Raises:
            CheckpointError: an announced tensor was never written, or one could not be.
        """
        if self._pending:
            name = min(self._pending)
            raise CheckpointError(
                f"{self.out}: {len(self._pending)} announced tensors were never written, first {name!r}"
            )
        self._flush(sync=True)
        with TIMELINE.stage("wait for hashes"):
            for handle, running in self._running.items():
                digest = running.result(os.fstat(handle).st_size)
                if digest is not None:
                    self.digests[self._files[self._handles.index(handle)].name] = digest
        try:
            self._close()
        except OSError as error:
            raise disk_error(self.partial, error) from error
        if len(self._files) > 1:
            self.write_json(INDEX_NAME, self._index())

    def _index(self) -> dict[str, Any]:
        weight_map = {name: file.name for file in self._files for name in file.begins}
        total = sum(spec.num_bytes for spec in self._specs.values())
        return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}

    def commit(self, first: WorkFolder | None = None) -> None:
        """Makes the folder visible under its final name, replacing an old one only now.

        Args:
            first: see `WorkFolder.publish`.
        """
        if self._handles:
            self.finish_tensors()
        self._folder.publish(first)

    def reject(self) -> Path:
        """Keeps a complete folder that missed a gate aside; see `WorkFolder.reject`."""
        return self._folder.reject()

    def _close(self) -> None:
        if self._behind is not None:
            self._behind.close()
        for running in self._running.values():
            running.stop()
        self._running.clear()
        while self._handles:
            os.close(self._handles.pop())
        self._missing.clear()

    def _discard(self) -> None:
        try:
            self._close()
        finally:  # also when a second ctrl-C ends the wait for the disk
            self._folder.discard()


def json_text(value: Mapping[str, Any]) -> bytes:
    """A JSON file as it is written."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _shards_of(specs: list[TensorSpec], max_shard_bytes: int) -> list[PlannedFile]:
    shards = _plan_shards(specs, max_shard_bytes)
    return [_planned(name, shard) for name, shard in zip(_shard_names(len(shards)), shards, strict=True)]


def _planned(name: str, shard: list[TensorSpec]) -> PlannedFile:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins, offset = {}, 0
    for spec in shard:
        begins[spec.name], end = offset, offset + spec.num_bytes
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    begins = {name: len(head) + begin for name, begin in begins.items()}
    return PlannedFile(name=name, head=head, begins=begins, num_bytes=len(head) + offset)


def rooms_of(writers: Iterable[CheckpointWriter]) -> list[Room]:
    """`rooms_for` the folders of writers; raises as it does."""
    return rooms_for({writer.partial: writer.num_bytes for writer in writers})


def check_room(writers: Iterable[CheckpointWriter]) -> None:
    """Refuses folders that the disks have no room for, together.

    Raises:
        CheckpointError: a disk is too full, or cannot be looked at.
    """
    for room in rooms_of(writers):
        if room.complaint is not None:
            raise CheckpointError(room.complaint)


def _plan_shards(specs: list[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.num_bytes
    # Readers expect every tensor aligned to its element, as it is with the widest elements first.
    return [shard if _is_aligned(shard) else sorted(shard, key=lambda spec: -spec.dtype.itemsize) for shard in shards]


def _is_aligned(shard: list[TensorSpec]) -> bool:
    offset = 0
    for spec in shard:
        if offset % spec.dtype.itemsize:
            return False
        offset += spec.num_bytes
    return True


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
