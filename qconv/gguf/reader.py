"""Reading a GGUF file: its header with checks, its tensors under the model's names, raw.

A tensor that lies in blocks appears as ``NAME.KIND`` (``...q_proj.weight.q4_0``), uint8 ``[rows, bytes of a row]``,
for `convert.dequantize` to decode; rows of q and k are put back into the model's order, and experts taken apart.
The config is made of the file's own keys and not of a config.json beside it: what is judged is what llama.cpp runs.

Layout source: the GGUF specification (ggml, docs/gguf.md), version 3 and 2.

Left out: files in several parts, big-endian files.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qconv.errors import CheckpointError
from qconv.gguf.blocks import PLAIN_KINDS
from qconv.gguf.families import VECTOR, added_to, family_of_keys, heads_to_interleave, in_halves, model_names
from qconv.gguf.metadata import config_of
from qconv.gguf.package import gguf_package
from qconv.gguf.rotary import CONSTANTS
from qconv.stored_tensors import FileCheckpoint
from qconv.types import TensorSpec

_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_TENSORS, _MAX_KEYS, _MAX_TEXT = 1 << 20, 1 << 16, 1 << 26


@dataclass(frozen=True, kw_only=True)
class _Entry:
    kind: str
    shape: tuple[int, ...]
    offset: int
    block: int  # weights in a block
    block_bytes: int

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) // self.block * self.block_bytes


@dataclass(kw_only=True)
class _Header:
    keys: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, _Entry] = field(default_factory=dict)
    data_begins: int = 0


class GgufCheckpoint(FileCheckpoint):
    """A `Checkpoint` over one GGUF file.

    Args:
        file: the file.
        folder: what was named: the file itself, or the folder that it lies in.

    Raises:
        CheckpointError: a malformed file, or an architecture, key or tensor that is not read.
    """

    def __init__(self, file: Path, folder: Path):
        header = read_header(file)
        shapes = {name: entry.shape for name, entry in header.tensors.items()}
        config = config_of(header.keys, shapes, lambda name: _constant(file, header, name), str(file))
        super().__init__(folder, config)
        family = family_of_keys(header.keys, str(file))
        names = model_names(family, int(config["num_hidden_layers"]), int(config.get("num_experts", 0)))
        self._heads: dict[str, int] = {}
        self._added: dict[str, float] = {}
        kinds: list[str] = []
        for stored, entry in header.tensors.items():
            if stored in CONSTANTS:
                continue
            if stored not in names:
                raise CheckpointError(f"{file}: tensor {stored!r} is none that {family.architecture} is read with")
            if stored.endswith(VECTOR):
                entry = replace(entry, shape=(1, entry.shape[-1]))
            for number, name in enumerate(names[stored]):
                part = entry if len(names[stored]) == 1 else _part(file, stored, entry, number, len(names[stored]))
                raw = self._add(file, header.data_begins, name, part)
                heads, added = heads_to_interleave(family, name, config), added_to(family, name)
                if heads is not None:
                    self._heads[raw] = heads
                if added:
                    self._added[raw] = added
            if len(entry.shape) >= 2 and stored.startswith("blk."):
                kinds.append(entry.kind)
        most = max(dict.fromkeys(kinds), key=kinds.count, default="f32")
        config["quantization_config"] = {"quant_method": "gguf", "kind": most}

    def _add(self, file: Path, begin: int, name: str, entry: _Entry) -> str:
        """The name that the raw tensor appears under."""
        if entry.kind in PLAIN_KINDS:
            spec = TensorSpec(name=name, shape=entry.shape, dtype=PLAIN_KINDS[entry.kind])
        else:
            if len(entry.shape) != 2:
                raise CheckpointError(f"{file}: tensor {name!r} of {entry.kind} has the shape {entry.shape}")
            row = entry.num_bytes // entry.shape[0]
            spec = TensorSpec(name=f"{name}.{entry.kind}", shape=(entry.shape[0], row), dtype=torch.uint8)
        self._specs[spec.name] = spec
        self._places[spec.name] = (file, begin + entry.offset)
        return spec.name

    def _arranged(self, name: str, stored: Tensor) -> Tensor:
        if name in self._added:
            return stored - self._added[name]
        heads = self._heads.get(name)
        return stored if heads is None else in_halves(stored, heads)


def _part(file: Path, stored: str, entry: _Entry, number: int, count: int) -> _Entry:
    """One expert's part of a tensor."""
    if len(entry.shape) != 3 or entry.shape[0] != count:
        raise CheckpointError(f"{file}: tensor {stored!r}: expected {count} experts, found the shape {entry.shape}")
    size = entry.num_bytes // count
    return replace(entry, shape=entry.shape[1:], offset=entry.offset + number * size)


def _constant(file: Path, header: _Header, name: str) -> Tensor | None:
    entry = header.tensors.get(name)
    if entry is None:
        return None
    if entry.kind != "f32":
        raise CheckpointError(f"{file}: tensor {name!r} is {entry.kind}, expected f32")
    with open(file, "rb") as handle:
        handle.seek(header.data_begins + entry.offset)
        return torch.frombuffer(bytearray(handle.read(entry.num_bytes)), dtype=torch.float32)


def open_gguf(file: Path, folder: Path) -> GgufCheckpoint:
    """Opens a file, reading its header only; see `GgufCheckpoint`."""
    return GgufCheckpoint(file, folder)


def read_header(file: Path) -> _Header:
    """Keys (of arrays only their length, as ``range``) and tensors.

    Raises:
        CheckpointError: not a GGUF file, or a damaged one.
    """
    try:
        with open(file, "rb") as handle:
            return _Parser(handle, file).parse()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from error
    except (struct.error, UnicodeDecodeError, OverflowError) as error:
        raise CheckpointError(f"{file}: the header of this GGUF file is damaged or cut off ({error})") from error


class _Parser:
    def __init__(self, handle: BinaryIO, file: Path):
        self._handle, self._file = handle, file
        self._size = file.stat().st_size

    def parse(self) -> _Header:
        if self._handle.read(4) != b"GGUF" or self._number("<I") not in (2, 3):
            raise CheckpointError(f"{self._file}: not a little-endian GGUF file of version 2 or 3")
        num_tensors, num_keys = self._number("<Q"), self._number("<Q")
        if num_tensors > _MAX_TENSORS or num_keys > _MAX_KEYS:
            raise CheckpointError(f"{self._file}: {num_tensors} tensors, {num_keys} keys in the header: damaged")
        header = _Header()
        for _ in range(num_keys):
            key = self._text()
            if key in header.keys:
                raise CheckpointError(f"{self._file}: key {key!r} stands twice")
            header.keys[key] = self._value(self._number("<I"))
        if int(header.keys.get("split.count") or 1) > 1:
            raise CheckpointError(f"{self._file}: is one part of several; join them with llama-gguf-split --merge")
        for _ in range(num_tensors):
            name = self._text()
            if name in header.tensors:
                raise CheckpointError(f"{self._file}: tensor {name!r} stands twice")
            header.tensors[name] = self._entry(name)
        alignment = int(header.keys.get("general.alignment") or 32)
        header.data_begins = -(-self._handle.tell() // alignment) * alignment
        self._check_places(header, alignment)
        return header

    def _check_places(self, header: _Header, alignment: int) -> None:
        end = 0
        for name, entry in sorted(header.tensors.items(), key=lambda item: item[1].offset):
            if entry.offset != -(-end // alignment) * alignment:
                raise CheckpointError(f"{self._file}: tensor {name!r} begins at {entry.offset}, expected after {end}")
            end = entry.offset + entry.num_bytes
        if header.data_begins + end > self._size:
            raise CheckpointError(
                f"{self._file}: expected {header.data_begins + end} bytes, found {self._size}; the file is cut off"
            )

    def _entry(self, name: str) -> _Entry:
        num_dims = self._number("<I")
        if not 1 <= num_dims <= 4:
            raise CheckpointError(f"{self._file}: tensor {name!r} has {num_dims} dimensions")
        shape = tuple(reversed([self._number("<Q") for _ in range(num_dims)]))
        number, offset = self._number("<I"), self._number("<Q")
        gguf = gguf_package()
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError:
            raise CheckpointError(f"{self._file}: tensor {name!r} has the unknown type {number}") from None
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block or prod(shape) == 0:
            raise CheckpointError(f"{self._file}: tensor {name!r}: {shape} is no whole number of {kind.name} blocks")
        return _Entry(kind=kind.name.lower(), shape=shape, offset=offset, block=block, block_bytes=block_bytes)

    def _number(self, code: str) -> Any:
        return struct.unpack(code, self._handle.read(struct.calcsize(code)))[0]

    def _text(self) -> str:
        length = self._number("<Q")
        if length > min(_MAX_TEXT, self._size):
            raise CheckpointError(f"{self._file}: a text of {length} bytes in the header: damaged")
        return self._handle.read(length).decode()

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise CheckpointError(f"{self._file}: a key of type {kind} in the header: damaged")
        inner, length = self._number("<I"), self._number("<Q")
        if length > self._size:
            raise CheckpointError(f"{self._file}: an array of {length} in the header: damaged")
        if inner in _NUMBERS:
            self._handle.seek(length * struct.calcsize(_NUMBERS[inner]), 1)
        else:
            for _ in range(length):
                self._value(inner)
        return range(length)
