"""Experts that lie fused in a file, as transformers holds them in memory, seen as linears of their own.

``gate_up_proj [E, 2I, H]`` holds the rows of each expert's gate above those of its up projection, ``down_proj
[E, H, I]`` those of its down projection; both are ``[out, in]`` as a linear's weight is, so a linear is a range of
neighbouring elements, and is read without the rest.

Left out: other orientations (see `experts.py`) and quantized fused parameters.

Dimension legend: E = experts, H = hidden features, I = inner features of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

from qconv.checkpoint import SafetensorsCheckpoint
from qconv.errors import CheckpointError
from qconv.experts import DOWN, EXPERTS, GATE_UP, ExpertNames, names_of
from qconv.types import Checkpoint, TensorSpec


@dataclass(frozen=True, kw_only=True)
class Part:
    """A range of a stored tensor.

    Attributes:
        stored: name of that tensor.
        begin: element at which the range begins.
        spec: of the range, as a tensor of its own.
    """

    stored: str
    begin: int
    spec: TensorSpec


def fused_experts(checkpoint: Checkpoint) -> dict[str, Part]:
    """Logical tensor -> where it lies, for every expert of a fused parameter and for what lies under the names of
    transformers' modules beside it; empty where nothing is fused, or the family is not known.

    Raises:
        CheckpointError: a fused parameter that is none of its family's.
    """
    names = names_of(checkpoint.config)
    specs = checkpoint.specs()
    ends = (f".{EXPERTS}.{GATE_UP}", f".{EXPERTS}.{DOWN}")
    if names is None or not any(name.endswith(ends) for name in specs):
        return {}
    found: dict[str, Part] = {}
    for name, spec in specs.items():
        logical = names.stored_name(name)
        if name.endswith(ends):
            found |= _parts(names, logical, spec, checkpoint.location)
        elif logical != name:
            found[logical] = Part(
                stored=name, begin=0, spec=TensorSpec(name=logical, shape=spec.shape, dtype=spec.dtype)
            )
    return found


def _parts(names: ExpertNames, logical: str, spec: TensorSpec, location: str) -> dict[str, Part]:
    experts, _, parameter = logical.rpartition(".")
    linears = names.parts[parameter]
    if len(spec.shape) != 3 or spec.shape[1] % len(linears) or not spec.dtype.is_floating_point:
        raise CheckpointError(
            f"{location}: tensor {spec.name!r}: expected the weights of all experts as numbers [experts, out, in], "
            f"found {spec.dtype} {list(spec.shape)}"
        )
    num_experts, rows, k = spec.shape
    n = rows // len(linears)
    result = {}
    for number in range(num_experts):
        for place, linear in enumerate(linears):
            name = f"{experts}.{number}.{linear}.weight"
            begin = (number * rows + place * n) * k
            result[name] = Part(
                stored=spec.name, begin=begin, spec=TensorSpec(name=name, shape=(n, k), dtype=spec.dtype)
            )
    return result


def read_part(checkpoint: Checkpoint, part: Part, device: str) -> Tensor:
    """The range as a tensor of its own."""
    if isinstance(checkpoint, SafetensorsCheckpoint):
        return checkpoint.read_part(part.stored, part.begin, part.spec.shape, device)
    whole = checkpoint.read(part.stored, device).reshape(-1)
    return whole[part.begin : part.begin + prod(part.spec.shape)].reshape(part.spec.shape).clone()


def logical_specs(specs: Mapping[str, TensorSpec], parts: Mapping[str, Part]) -> dict[str, TensorSpec]:
    """Specs with every stored tensor that has parts replaced by them, where it stood."""
    owners: dict[str, dict[str, TensorSpec]] = {}
    for name, part in parts.items():
        owners.setdefault(part.stored, {})[name] = part.spec
    result: dict[str, TensorSpec] = {}
    for name, spec in specs.items():
        result |= owners.get(name, {name: spec})
    return result
