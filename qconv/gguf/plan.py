"""What a GGUF file will hold, from names and shapes alone: tensors with their kinds, keys, and where each begins.

Kinds as llama.cpp's tools choose them: vectors in float32; the output head (or the embedding, where it is the head) in
q8_0 when weights are quantized to anything, since an error there reaches every token (llama-quantize takes q6_K where
rows are multiples of 256, and q8_0 elsewhere); an embedding of its own as the weights; what chooses experts in float32.
The header is written by the gguf package; tensors follow in its order, each at a multiple of 32 bytes. Experts are
handed over one by one, each to its place within the tensor of its layer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qconv.errors import CheckpointError
from qconv.gguf.blocks import BLOCK, BLOCK_KINDS, PLAIN_KINDS, encode, row_bytes
from qconv.gguf.families import VECTOR, Family, added_to, family_of, heads_to_interleave, interleaved, places
from qconv.gguf.metadata import add_metadata, check_config, num_experts
from qconv.gguf.package import gguf_package
from qconv.gguf.rotary import rope_tensors
from qconv.gguf.tokenizer import Vocabulary
from qconv.targets import gguf_file_name
from qconv.types import Checkpoint, TensorSpec

ALIGNMENT = 32
ENCODED_AT_ONCE = 1 << 20  # elements; temporaries take about 40 bytes for each
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROUTERS = ("ffn_gate_inp.weight", VECTOR)
_KIND_OF = {dtype: kind for kind, dtype in PLAIN_KINDS.items()}


class Files(Protocol):
    """Where tensors of a file are handed to."""

    def write(self, name: str, tensor: Tensor) -> None: ...

    def write_part(self, name: str, begin: int, tensor: Tensor) -> None: ...


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor of the model in the file.

    Attributes:
        name: in the model.
        stored: of the tensor in the file that it is, or is a part of.
        shape: in the model, but for `VECTOR`.
        heads: whose rows are interleaved, or None.
        expert: of which it is a part, or None.
        added: what the file's numbers have more than the model's.
    """

    name: str
    stored: str
    kind: str
    shape: tuple[int, ...]
    heads: int | None = None
    expert: int | None = None
    added: float = 0.0

    @property
    def spec(self) -> TensorSpec:
        """As it is handed to a writer of files."""
        name = self.stored if self.expert is None else f"{self.stored}[{self.expert}]"
        if self.kind in PLAIN_KINDS:
            return TensorSpec(name=name, shape=self.shape, dtype=PLAIN_KINDS[self.kind])
        shape = (self.shape[0], row_bytes(self.kind, self.shape[1], self.name))
        return TensorSpec(name=name, shape=shape, dtype=torch.uint8)


@dataclass(frozen=True, kw_only=True, eq=False)
class GgufPlan:
    """What the file will hold.

    Attributes:
        kind: of the quantized linears.
        tensors: by name in the model, in the order of the file.
        constants: tensors that no model has, by name in the file.
    """

    family: Family
    kind: str
    tensors: Mapping[str, GgufTensor]
    constants: Mapping[str, Tensor]
    config: Mapping[str, Any]
    location: str

    @property
    def file_name(self) -> str:
        return gguf_file_name(self.kind)

    @property
    def specs(self) -> list[TensorSpec]:
        constants = [TensorSpec(name=n, shape=tuple(t.shape), dtype=t.dtype) for n, t in self.constants.items()]
        return [*(tensor.spec for tensor in self.tensors.values()), *constants]

    def write_constants(self, files: Files) -> None:
        for name, tensor in self.constants.items():
            files.write(name, tensor)

    def header(self, vocabulary: Vocabulary, name: str) -> tuple[bytes, dict[str, int], int]:
        """All before the data, where each tensor begins in the file, and where the file ends."""
        gguf = gguf_package()
        writer = gguf.GGUFWriter(path=None, arch=self.family.architecture)
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(int(_file_type(self.kind)))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_metadata(writer, self.config, len(vocabulary.tokens), self.location)
        vocabulary.add_to(writer)
        begins: dict[str, int] = {}
        end = 0
        for parts in self._parts():
            kind = gguf.GGMLQuantizationType[parts[0].kind.upper()]
            spec = parts[0].spec
            shape = spec.shape if parts[0].expert is None else (len(parts), *spec.shape)
            num_bytes = len(parts) * spec.num_bytes
            writer.add_tensor_info(parts[0].stored, shape, _numpy_dtype(spec.dtype), num_bytes, raw_dtype=kind)
            begins |= {part.spec.name: end + number * spec.num_bytes for number, part in enumerate(parts)}
            end += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        with tempfile.TemporaryDirectory(prefix="qconv-gguf-") as folder:
            file = Path(folder) / "header"
            writer.write_header_to_file(path=file)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            head = file.read_bytes()
        head += bytes(-len(head) % ALIGNMENT)
        return head, {name: len(head) + begin for name, begin in begins.items()}, len(head) + end

    def _parts(self) -> list[list[GgufTensor]]:
        """What each tensor of the file is made of: one tensor, or those of all experts by their numbers."""
        found: dict[str, list[GgufTensor]] = {}
        for tensor in self.tensors.values():
            found.setdefault(tensor.stored, []).append(tensor)
        for name, constant in self.constants.items():
            found[name] = [GgufTensor(name=name, stored=name, kind="f32", shape=tuple(constant.shape))]
        return [sorted(parts, key=lambda part: part.expert or 0) for parts in found.values()]


def _numpy_dtype(dtype: torch.dtype) -> Any:
    """What `GGUFWriter.add_tensor_info` wants beside a kind: whether a shape counts bytes."""
    import numpy as np

    return np.dtype(np.uint8) if dtype == torch.uint8 else np.dtype(np.float32)


def _file_type(kind: str) -> Any:
    types = gguf_package().LlamaFileType
    return types.ALL_F32 if kind == "f32" else types[f"MOSTLY_{kind.upper()}"]


def plan_gguf(view: Checkpoint, kind: str, quantized: Collection[str], storage: torch.dtype) -> GgufPlan:
    """Plans a file.

    Args:
        kind: of ``quantized``, and, for a kind without blocks, of embedding and head.
        quantized: weights of linears, by name in the model.
        storage: dtype of linears that are left out.

    Raises:
        CheckpointError: a family, tensor or setting that llama.cpp does not have, or computes otherwise.
        SchemeError: rows that are no whole number of blocks.
        UsageError: the gguf package is missing.
    """
    config, location = view.config, view.location
    family = family_of(config, location)
    check_config(config, location)
    constants = rope_tensors(config, location)
    specs = view.specs()
    for needed in (EMBEDDING, HEAD) if family.needs_head else (EMBEDDING,):
        if needed not in specs:
            raise CheckpointError(
                f"{location}: tensor {needed!r} is missing, and a GGUF file of {family.architecture} needs it"
            )
    found = places(family, list(specs), int(config["num_hidden_layers"]), location)
    kinds = {
        name: "f32"
        if place.stored.endswith(_ROUTERS)
        else _kind_of(name, specs[name], kind, name in quantized, HEAD in specs, _KIND_OF[storage])
        for name, place in found.items()
    }
    tensors = {
        name: GgufTensor(
            name=name,
            stored=place.stored,
            kind=kinds[name],
            shape=specs[name].shape[place.stored.endswith(VECTOR) :],
            heads=heads_to_interleave(family, name, config),
            expert=place.expert,
            added=added_to(family, name),
        )
        for name, place in found.items()
    }
    _check_experts(tensors.values(), config, location)
    return GgufPlan(
        family=family,
        kind=kind,
        tensors=tensors,
        constants=constants,
        config=config,
        location=location,
    )


def _check_experts(tensors: Collection[GgufTensor], config: Mapping[str, Any], location: str) -> None:
    """A file holds all experts of a layer in one tensor: alike, and none missing."""
    layers: dict[str, list[GgufTensor]] = {}
    for tensor in tensors:
        if tensor.expert is not None:
            layers.setdefault(tensor.stored, []).append(tensor)
    for stored, parts in layers.items():
        if {part.expert for part in parts} != set(range(num_experts(config))):
            raise CheckpointError(
                f"{location}: {parts[0].name}: expected {num_experts(config)} experts, found {len(parts)}"
            )
        if len({(part.kind, part.shape) for part in parts}) > 1:
            raise CheckpointError(
                f"{location}: experts of {stored!r} are of several kinds or shapes, and lie in one tensor of the file; "
                "let --ignore name all experts of a layer, or none"
            )


def _kind_of(name: str, spec: TensorSpec, kind: str, is_quantized: bool, has_head: bool, left_out: str) -> str:
    if len(spec.shape) < 2:
        return "f32"
    if is_quantized:
        return kind
    if name not in (EMBEDDING, HEAD):
        return left_out
    if kind not in BLOCK_KINDS:
        return kind
    if spec.shape[1] % BLOCK:
        return left_out
    return kind if name == EMBEDDING and has_head else "q8_0"


class GgufOutput:
    """Takes tensors by their name in the model, and hands them on as they lie in the file, a few rows at a time: beside
    a large tensor there is never another one of its size.

    Linears whose codes are chosen already come packed, as uint8 and with their kind behind the name.
    """

    def __init__(self, files: Files, plan: GgufPlan):
        self._files, self._plan = files, plan

    def write(self, name: str, tensor: Tensor) -> None:
        own = self._plan.tensors.get(name.removesuffix(f".{self._plan.kind}"))
        if own is None:  # a constant buffer, which llama.cpp computes itself
            return
        spec, is_packed = own.spec, tensor.dtype == torch.uint8
        tensor = tensor.reshape(spec.shape if is_packed else own.shape)
        num_rows, row_elements = tensor.shape[0], prod(spec.shape[1:])
        order = None if own.heads is None else interleaved(torch.arange(num_rows, device=tensor.device), own.heads)
        step = max(1, ENCODED_AT_ONCE // prod(own.shape[1:]))
        for begin in range(0, num_rows, step):
            rows = slice(begin, begin + step)
            part = tensor[rows] if order is None else tensor[order[rows]]
            if not is_packed:
                part = part.float() + own.added if own.added else part
                part = encode(part, own.kind, f"{self._plan.location}: {name}")
            self._files.write_part(spec.name, begin * row_elements, part)
