"""Experts that lie fused in files, seen as linears of their own; and fused again where files are read like that.

A fused tensor holds one slab for each expert, in which the outputs of gate and up projection lie above one another or
take turns (`experts.py`). A linear is some rows of a slab, or columns where weights are stored ``[in, out]``: one slab
is read for it, or the range alone where its elements are neighbours. Nothing is computed.

Dimension legend: E = experts, H = hidden features, I = inner features of an expert.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from qconv.checkpoint import SafetensorsCheckpoint
from qconv.errors import CheckpointError
from qconv.experts import DOWN, EXPERTS, FUSED_TENSORS, GATE_UP, ExpertNames, expert_of, names_of
from qconv.read_ahead import read_ahead
from qconv.types import Checkpoint, TensorSpec


@dataclass(frozen=True, kw_only=True)
class Part:
    """Where a tensor lies in another one.

    Attributes:
        stored: name of that tensor.
        begin: element at which the range begins that holds it.
        slab: shape of that range.
        outputs: which of the slab's outputs are the tensor's.
        transposed: the slab is ``[in, out]``, and the tensor ``[out, in]``.
        spec: of the tensor.
    """

    stored: str
    begin: int
    slab: tuple[int, ...]
    outputs: slice
    transposed: bool
    spec: TensorSpec

    def of(self, slab: Tensor) -> Tensor:
        """The tensor in its range; a view."""
        return slab[:, self.outputs].T if self.transposed else slab[self.outputs]


class SeparateExperts:
    """A view over a checkpoint with fused experts in which every linear of every expert has tensors of its own, under
    the names that files of the family have."""

    def __init__(self, source: Checkpoint, parts: Mapping[str, Part]):
        self.source = source
        self._parts = parts
        self._specs = _separated(source.specs(), parts)

    @property
    def location(self) -> str:
        return self.source.location

    @property
    def config(self) -> Mapping[str, Any]:
        return self.source.config

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def read(self, name: str, device: str = "cpu") -> Tensor:
        part = self._parts.get(name)
        if part is None:
            return self.source.read(name, device)
        if isinstance(self.source, SafetensorsCheckpoint):
            slab = self.source.read_part(part.stored, part.begin, part.slab, device)
        else:
            whole = self.source.read(part.stored, device).reshape(-1)
            slab = whole[part.begin : part.begin + prod(part.slab)].reshape(part.slab)
        return part.of(slab).clone(memory_format=torch.contiguous_format)

    def read_ahead(self, names: Iterable[str], pin: bool = False, max_bytes: int | None = None) -> None:
        """Begins to fetch what is not fused: ranges are not read ahead."""
        read_ahead(self.source, [name for name in names if name not in self._parts], pin, max_bytes)


def separate_experts(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with every linear of every expert by itself; itself where nothing is fused, or the family is not
    known.

    Raises:
        CheckpointError: a fused tensor that is none of its family's.
    """
    names = names_of(checkpoint.config)
    specs = checkpoint.specs()
    if names is None or not any(is_fused(name) for name in specs):
        return checkpoint
    parts: dict[str, Part] = {}
    for name, spec in specs.items():
        logical = names.stored_name(name)
        if is_fused(name):
            parts |= {part.spec.name: part for part in _parts(names, logical, spec, checkpoint.location)}
        elif logical != name:
            whole = TensorSpec(name=logical, shape=spec.shape, dtype=spec.dtype)
            parts[logical] = Part(
                stored=name, begin=0, slab=spec.shape, outputs=slice(None), transposed=False, spec=whole
            )
    return SeparateExperts(checkpoint, parts)


def is_fused(name: str) -> bool:
    """Whether a tensor holds the weights or biases of all experts of a layer, by its name."""
    return _ends(name) is not None


def _ends(name: str) -> tuple[str, str] | None:
    """The fused parameter that a tensor belongs to, and what follows its name; None for all other tensors."""
    parent, _, leaf = name.rpartition(".")
    if not parent.endswith(f".{EXPERTS}"):
        return None
    found = ((parameter, leaf.removeprefix(parameter)) for parameter in (GATE_UP, DOWN) if leaf.startswith(parameter))
    return next(((parameter, end) for parameter, end in found if end in FUSED_TENSORS.values()), None)


def _parts(names: ExpertNames, logical: str, spec: TensorSpec, location: str) -> Iterator[Part]:
    """The linears' tensors in a fused one; ``logical`` is its name as files of the family have it."""
    found = _ends(logical)
    assert found is not None
    parameter, end = found
    suffix = next(suffix for suffix, fused in FUSED_TENSORS.items() if fused == end)
    _check(names, parameter, suffix, spec, location)
    num_experts, *slab = spec.shape
    transposed = names.transposed and suffix == ".weight"
    num_outputs = slab[-1] if transposed else slab[0]
    experts = logical.rpartition(".")[0]
    for number in range(num_experts):
        for linear in names.parts[parameter]:
            outputs = names.outputs(parameter, linear, num_outputs)
            n = len(range(*outputs.indices(num_outputs)))
            own = TensorSpec(
                name=f"{experts}.{number}.{linear}{suffix}",
                shape=(n, slab[0]) if transposed else (n, *slab[1:]),
                dtype=spec.dtype,
            )
            part = Part(
                stored=spec.name,
                begin=number * prod(slab),
                slab=tuple(slab),
                outputs=outputs,
                transposed=transposed,
                spec=own,
            )
            yield part if transposed or outputs.step is not None else _alone(part)


def _alone(part: Part) -> Part:
    """The same tensor, whose elements are neighbours, in a range that holds nothing else."""
    begin = part.begin + part.outputs.start * prod(part.slab[1:])
    return replace(part, begin=begin, slab=part.spec.shape, outputs=slice(None))


def _check(names: ExpertNames, parameter: str, suffix: str, spec: TensorSpec, location: str) -> None:
    num_linears = len(names.parts[parameter])
    is_weight = suffix == ".weight"
    form = {".weight": "experts, in, out" if names.transposed else "experts, out, in", ".bias": "experts, out"}
    expected = form.get(suffix, "experts, out, groups, 16" if suffix == ".weight_blocks" else "experts, out, groups")
    fits = len(spec.shape) == expected.count(",") + 1 and spec.dtype.is_floating_point == (suffix in form)
    if not fits or spec.shape[-1 if is_weight and names.transposed else 1] % num_linears:
        raise CheckpointError(
            f"{location}: tensor {spec.name!r}: expected the weights of all experts as numbers [{expected}], "
            f"found {spec.dtype} {list(spec.shape)}"
        )


def _separated(specs: Mapping[str, TensorSpec], parts: Mapping[str, Part]) -> dict[str, TensorSpec]:
    """Specs with every stored tensor that has parts replaced by them, where it stood."""
    owners: dict[str, dict[str, TensorSpec]] = defaultdict(dict)
    for name, part in parts.items():
        owners[part.stored][name] = part.spec
    result: dict[str, TensorSpec] = {}
    for name, spec in specs.items():
        result |= owners.get(name, {name: spec})
    return result


class Files(Protocol):
    """Where tensors are handed to."""

    def write(self, name: str, tensor: Tensor) -> None: ...

    def write_part(self, name: str, begin: int, tensor: Tensor) -> None: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class FusedPlan:
    """What files hold of a family whose experts are written fused.

    Attributes:
        specs: of all tensors of the files.
        parts: tensor of a linear -> where it lies in them.
    """

    specs: list[TensorSpec]
    parts: Mapping[str, Part]


def plan_fused(config: Mapping[str, Any], specs: list[TensorSpec]) -> FusedPlan | None:
    """Plans files for these tensors, experts fused; None for families whose files hold linears."""
    names = names_of(config)
    if names is None or not names.fused_in_files:
        return None
    fused: dict[str, TensorSpec] = {}
    for spec in specs:
        own = _fused_spec(names, spec)
        if own is None:
            fused[spec.name] = spec
        else:  # the number of experts is that of the last one
            before = fused.get(own.name)
            fused[own.name] = own if before is None or before.shape[0] < own.shape[0] else before
    parts = [part for spec in fused.values() if is_fused(spec.name) for part in _parts(names, spec.name, spec, "")]
    return FusedPlan(specs=list(fused.values()), parts={part.spec.name: part for part in parts})


def _fused_spec(names: ExpertNames, spec: TensorSpec) -> TensorSpec | None:
    """The fused tensor that holds the tensor of a linear, with as many experts as the number of its own asks for."""
    suffix = next((suffix for suffix in FUSED_TENSORS if spec.name.endswith(suffix)), None)
    expert = None if suffix is None else expert_of(spec.name.removesuffix(suffix))
    if suffix is None or expert is None:
        return None
    parameter = next(parameter for parameter, linears in names.parts.items() if expert.role in linears)
    n, *rest = spec.shape
    outputs = n * len(names.parts[parameter])
    slab = (*rest, outputs) if suffix == ".weight" and names.transposed else (outputs, *rest)
    name = f"{expert.experts}.{parameter}{FUSED_TENSORS[suffix]}"
    return TensorSpec(name=name, shape=(expert.number + 1, *slab), dtype=spec.dtype)


class FusedOutput:
    """Takes the tensors of linears, and hands them on as they lie in files; those that share a slab wait for it."""

    def __init__(self, files: Files, plan: FusedPlan):
        self._files, self._plan = files, plan
        self._slabs: dict[tuple[str, int], Tensor] = {}
        self._missing: dict[tuple[str, int], int] = {}

    def write(self, name: str, tensor: Tensor) -> None:
        part = self._plan.parts.get(name)
        if part is None:
            self._files.write(name, tensor)
            return
        place = (part.stored, part.begin)
        slab = self._slabs.get(place)
        if slab is None:
            slab = self._slabs[place] = tensor.new_empty(part.slab)
            self._missing[place] = slab.numel()
        part.of(slab).copy_(tensor)
        self._missing[place] -= tensor.numel()
        if not self._missing[place]:
            del self._slabs[place], self._missing[place]
            self._files.write_part(part.stored, part.begin, slab)
