"""What LoRA's descendants on quantized bases do beside ``B @ A``, as far as their files do not say it.

QA-LoRA (Xu et al. 2023): inputs are pooled in groups before A, which is ``[R, K / g]``, so that the update is constant
in each group of a quantized weight. Three conventions are published: the sum of a group (the paper, and the integer
quantizer of IR-QLoRA's repository), its mean (``merge.py`` of the paper's repository and the last ``peft_utils.py``
beside it), and the mean times the number of groups (peft's ``use_qalora``). They differ by constant factors, which
belong to the scaling.

IR-QLoRA (Qin et al. 2024): elastic connections beside A and B, as ``utils.py`` of its repository computes them. R has
to divide inputs and outputs.

DyLoRA and QDyLoRA (Valipour et al. 2023, Rajabzadeh et al. 2024): every first b components are trained to work, scaled
by alpha / b; keeping alpha / r is the other scaling that is found.

Nothing is rounded here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from qconv.errors import AdapterError
from qconv.merge.adapter_source import AdapterSource
from qconv.types import Adapter, LoraDelta


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """``inputs`` are summed before A, and ``factor`` belongs to the scaling."""

    inputs: int = 1
    factor: float = 1.0


def find_pooling(source: AdapterSource, module: str, a: str, b: str, base_shape: tuple[int, ...]) -> Pooling:
    """How a module's inputs are pooled; the group is what its shapes say.

    Raises:
        AdapterError: no whole group of two or more, or one that the config contradicts.
    """
    convention, group = source.options.qa_lora, source.config.qalora_group
    if group is not None and convention not in (None, "peft"):
        source.refuse(f"{source.config.where} says use_qalora, which is peft's convention, not --qa-lora {convention}")
    convention = "peft" if group is not None else convention
    if convention is None or len(source.shape(a)) != 2 or len(source.shape(b)) != 2 or len(base_shape) != 2:
        return Pooling()
    rows, columns = source.shape(b)[0], source.shape(a)[1]
    k = base_shape[1] if base_shape[0] == rows else base_shape[0]
    inputs = k // columns if columns and k % columns == 0 else 0
    if inputs < 2 or (group is not None and inputs != group):
        wanted = f"groups of {group}" if group is not None else "whole groups of two or more"
        source.refuse(
            f"tensor {a!r} has {columns} columns for {k} inputs of {module}: QA-LoRA pools {wanted}; without --qa-lora "
            "it is read as plain LoRA"
        )
    if source.config.use_dora:
        source.refuse("QA-LoRA and DoRA do not go together")
    factors = {"sum": 1.0, "mean": 1 / inputs, "peft": columns / inputs}
    return Pooling(inputs=inputs, factor=factors[convention])


def could_be_pooled(update: tuple[int, int], base_shape: tuple[int, ...]) -> bool:
    """Whether shapes that do not fit would, with pooled inputs."""
    if len(base_shape) != 2 or update[0] not in base_shape or not update[1]:
        return False
    k = base_shape[1] if base_shape[0] == update[0] else base_shape[0]
    return k % update[1] == 0 and k > update[1]


def check_elastic(source: AdapterSource, delta: LoraDelta, n: int, k: int) -> None:
    """Refuses elastic connections that their layer cannot have."""
    for tensor in (delta.elastic_a, delta.elastic_b):
        if tensor is not None and source.shape(tensor) != (1,):
            source.refuse(f"tensor {tensor!r}: expected shape [1], found {list(source.shape(tensor))}")
    if delta.elastic_a is None:
        return
    if delta.pooled > 1 or source.config.use_dora or delta.singular is not None:
        source.refuse("IR-QLoRA's elastic connections are read beside plain LoRA alone")
    if n % delta.rank or k % delta.rank:
        source.refuse(f"{delta.module} is [{n}, {k}], which rank {delta.rank} does not divide; IR-QLoRA needs that")


def truncated(adapter: Adapter, rank: int, scaling: Literal["trained", "truncated"]) -> Adapter:
    """The first ``rank`` components of every module.

    Args:
        scaling: ``"truncated"`` divides alpha by ``rank``, ``"trained"`` by the rank of training.

    Raises:
        AdapterError: no plain LoRA, a module of a smaller rank, or rsLoRA with the scaling of another rank.
    """
    if adapter.transforms or not adapter.deltas:
        raise AdapterError(f"{adapter.location}: --rank is for LoRA, and this is of kind {adapter.kind}")
    if scaling == "truncated" and adapter.tensors.config.get("use_rslora"):
        raise AdapterError(
            f"{adapter.location}: --rank-scaling truncated is alpha / rank, and this adapter was trained with rsLoRA's "
            "alpha / sqrt(r); use --rank-scaling trained"
        )
    deltas = {}
    for name, delta in adapter.deltas.items():
        odd = delta.magnitude or delta.b_bias or delta.singular or delta.elastic_a
        if odd or delta.pooled > 1:
            raise AdapterError(
                f"{adapter.location}: --rank is for plain LoRA, of which any first components were trained to work by "
                f"themselves; {delta.module} has {odd or 'pooled inputs'}"
            )
        if rank > delta.rank:
            raise AdapterError(f"{adapter.location}: --rank {rank}, and {delta.module} has rank {delta.rank}")
        factor = delta.rank / rank if scaling == "truncated" else 1.0
        deltas[name] = replace(delta, rank=rank, scaling=delta.scaling * factor)
    return replace(adapter, deltas=deltas)
