"""Layers of the kinds that are not low-rank products: checked against the base, and applied to a weight.

Rounding: stored values are read exactly into float32 (float64 where float32 products would run in TF32); the formula
of the kind (`kinds/`) is computed there; nothing is rounded to 16 bits here. The one rounding to the storage dtype is
the writer's.

Dimensions: N = out, K = in; a base that stores ``[K, N]`` (Conv1D) is handled transposed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from qconv.errors import NumericsError
from qconv.finite import all_finite
from qconv.merge.adapter_source import AdapterSource
from qconv.merge.kinds import KINDS, Kind, Layer
from qconv.merge.lora_layers import CONV1D_MODEL_TYPES
from qconv.types import Adapter, Transform


def find_transforms(
    source: AdapterSource, replacements: Mapping[str, str], linear_weights: Collection[str] | None
) -> dict[str, Transform]:
    """Base weight -> its update; empty for LoRA and its relatives.

    Raises:
        AdapterError: a part is missing or spare, a shape does not fit, the base lacks the weight, or the weight is
            no linear layer's.
    """
    kind = source.config.kind
    if kind is None:
        return {}
    found = {}
    for module, parts in source.names.layers.items():
        weight, first = module + ".weight", next(iter(parts.values()))
        shape = source.base_spec(weight, first).shape
        if weight in replacements:
            shape = source.shape(replacements[weight])
        is_head = weight == source.vocabulary.head
        source.refuse_convolution(weight, first)
        if weight == source.vocabulary.embedding:
            source.refuse(
                f"tensor {first!r} changes {weight}: on embeddings, LoRA and trainable tokens are read, no other kind"
            )
        if len(shape) != 2 or (linear_weights is not None and weight not in linear_weights and not is_head):
            source.refuse(f"tensor {first!r} changes {weight}, which is not the weight of a linear layer")
        transposed = source.base.config.get("model_type") in CONV1D_MODEL_TYPES and not is_head
        shared = _shared(source, kind, module)
        tensors = parts | shared
        for part in parts.keys() & shared.keys():
            if not source.are_same(parts[part], tensors[part]):
                source.refuse(
                    f"{parts[part]!r} and {tensors[part]!r} should be equal and differ; save the adapter again"
                )
        layer = Layer(
            where=source.where,
            module=module,
            shapes={part: source.shape(tensor) for part, tensor in tensors.items()},
            n=shape[1] if transposed else shape[0],
            k=shape[0] if transposed else shape[1],
            rank=source.rank_of(module),
            scaling=source.scaling_of(module),
            read=source.config.read,
            dtype=source.base_spec(weight, first).dtype,
            has_bias=module + ".bias" in source.base.specs(),
        )
        settings = kind.check(layer)
        spare = [tensors[part] for part in layer.shapes if part not in layer.seen]
        if spare:
            source.refuse(f"spare tensor {spare[0]!r}: {module} has that part in another form already; keep one")
        found[weight] = Transform(
            kind=kind.peft_type,
            weight=weight,
            tensors=tensors,
            settings=settings,
            transposed=transposed,
            changes_weight=kind.merged is not None,
            changes_bias=kind.merged_bias is not None,
        )
    unused = set(source.names.shared.values()) - {tensor for t in found.values() for tensor in t.tensors.values()}
    if found and unused:
        source.refuse(f"spare tensor {sorted(unused)[0]!r}: no layer in the file uses it; it is incomplete")
    return found


def _shared(source: AdapterSource, kind: Kind, module: str) -> dict[str, str]:
    """Part -> adapter tensor, of those that a module uses and other modules may, too."""
    if kind.shared_of is None:
        return dict(source.names.shared)
    used = kind.shared_of(source, module)
    return {part: source.names.shared[name] for part, name in used.items() if name in source.names.shared}


@torch.no_grad()
def transformed_weight(w: Tensor, adapter: Adapter, transform: Transform) -> Tensor:
    """The base weight as the adapter leaves it, in float32 on the weight's device.

    Args:
        w: ``[N, K]``, or ``[K, N]`` when the base stores it transposed; any float dtype. Not changed.

    Raises:
        NumericsError: NaN or infinity in the result.
    """
    dtype = _compute_dtype(w)
    w_NK = (w.T if transform.transposed else w).to(dtype)
    change = KINDS[transform.kind].merged
    assert change is not None
    result_NK = change(w_NK, _parts(adapter, transform, w, dtype), transform.settings).float()
    result = result_NK.T.contiguous() if transform.transposed else result_NK
    return _checked(result, w, transform.weight, adapter)


@torch.no_grad()
def transformed_bias(
    bias_N: Tensor, read_weight: Callable[[], Tensor], adapter: Adapter, transform: Transform
) -> Tensor:
    """The bias ``[N]`` beside a weight that `transformed_weight` makes, in float32.

    Args:
        read_weight: the base weight as it is stored, for kinds that need it.

    Raises:
        NumericsError: NaN or infinity in the result.
    """
    change = KINDS[transform.kind].merged_bias
    assert change is not None
    dtype = _compute_dtype(bias_N)

    def weight() -> Tensor:
        w = read_weight().to(dtype)
        return w.T if transform.transposed else w

    parts = _parts(adapter, transform, bias_N, dtype)
    result_N = change(bias_N.to(dtype), weight, parts, transform.settings).float()
    return _checked(result_N, bias_N, transform.bias, adapter)


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.is_cuda and torch.get_float32_matmul_precision() != "highest" else torch.float32


def _parts(adapter: Adapter, transform: Transform, like: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    parts = {part: adapter.tensors.read(name, str(like.device)) for part, name in transform.tensors.items()}
    return {part: x.to(dtype) if x.is_floating_point() else x for part, x in parts.items()}


def _checked(result: Tensor, before: Tensor, name: str, adapter: Adapter) -> Tensor:
    if not all_finite(result):
        cause = (
            "the update overflows float32 or divides by a norm of 0: training diverged"
            if before.isfinite().all()
            else "the base has them already: it is damaged or was decoded from damaged blocks"
        )
        raise NumericsError(f"{adapter.location}: NaN or infinity in the merged {name!r}; {cause}")
    return result
