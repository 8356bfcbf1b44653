"""Scales of an FP8 cache of keys and values, as checkpoints hold them.

Layout source: compressed-tensors 0.20, `quantization/lifecycle/initialize.py` (``kv_cache_scheme``; ``k_scale`` and
``v_scale`` of an attention, ``[1]`` in the model's dtype, or ``[heads, 1, 1]``), and vLLM 0.32, which reads them there
and in checkpoints with ``quant_method`` fp8; other names in `model_executor/layers/quantization/base_config.py`.

What an attention keeps is divided by its scale and rounded to float8_e4m3fn. Where a cache is announced, an attention
without scales of its own gets 1 in vLLM (`CompressedTensorsKVCacheMethod.create_weights`; `BaseKVCacheMethod` for
``quant_method`` fp8), and here. A scheme of another kind, or a dynamic one, is not computed: `CacheReading.why_not`
says so, for reports.

Left out: zero points (refused by engines), scales of queries, caches of latents (MLA).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qconv.convert.format import SCALE_DTYPES
from qconv.errors import CheckpointError
from qconv.types import Checkpoint, TensorSpec

KEY_SCALE, VALUE_SCALE = ".k_scale", ".v_scale"
SCHEME: Mapping[str, Any] = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
"""The package's ``QuantizationArgs`` of what is written."""
_ENDINGS = {  # longer ones first
    ".k_proj.output_scale": 0,
    ".v_proj.output_scale": 1,
    ".k_proj.k_scale": 0,
    ".v_proj.v_scale": 1,
    KEY_SCALE: 0,
    VALUE_SCALE: 1,
}
_INNER = (".attn", ".qkv_proj")
_UNUSED = (".q_scale", ".k_zero_point", ".v_zero_point", ".q_zero_point")


@dataclass(frozen=True, kw_only=True)
class CacheReading:
    """What a checkpoint says of the cache that it is served with.

    Attributes:
        is_float8: an FP8 cache is announced, of the kind that is computed here.
        scales: of the attentions that have some, the tensors that scale keys and values; empty without such a cache.
        tensors: all that belong to the cache, and are no weights.
        why_not: in words, what it announces or holds beyond that and is not computed here; None = nothing.
    """

    is_float8: bool = False
    scales: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    tensors: frozenset[str] = frozenset()
    why_not: str | None = None


def cache_specs(attention: str, dtype: torch.dtype) -> tuple[TensorSpec, TensorSpec]:
    """What is stored of one attention."""
    keys, values = (TensorSpec(name=attention + end, shape=(1,), dtype=dtype) for end in (KEY_SCALE, VALUE_SCALE))
    return keys, values


def read_cache(
    specs: Mapping[str, TensorSpec], quantization: Mapping[str, Any], location: str, keeps_latents: bool = False
) -> CacheReading:
    """Finds the scales of a quantized checkpoint, from headers alone.

    Args:
        keeps_latents: the model's attentions cache one latent in the place of keys and values (MLA).

    Raises:
        CheckpointError: an attention has a scale of keys and none of values, or the other way round.
    """
    found: dict[str, list[str | None]] = {}
    unused = [name for name in specs if name.endswith(_UNUSED) and name.rpartition(".")[0] + ".weight" not in specs]
    for name in specs:
        ending = next((ending for ending in _ENDINGS if name.endswith(ending)), None)
        if ending is not None:
            attention = name.removesuffix(ending)
            for inner in _INNER:  # of vLLM's own names
                attention = attention.removesuffix(inner)
            found.setdefault(attention, [None, None])[_ENDINGS[ending]] = name
    scales: dict[str, tuple[str, str]] = {}
    for attention, (keys, values) in found.items():
        if keys is None or values is None:
            raise CheckpointError(
                f"{location}: {attention!r} has a scale of {'values' if keys is None else 'keys'} for its cache and "
                f"none of {'keys' if keys is None else 'values'}; the checkpoint is incomplete: save or fetch it again"
            )
        scales[attention] = keys, values
    names = frozenset([*unused, *(name for pair in scales.values() for name in pair)])
    scheme = quantization.get("kv_cache_scheme")
    why_not = _why_not(scheme, bool(scales), keeps_latents)
    is_float8 = scheme is not None and why_not is None
    return CacheReading(is_float8=is_float8, scales=scales if is_float8 else {}, tensors=names, why_not=why_not)


def _why_not(scheme: Any, has_scales: bool, keeps_latents: bool) -> str | None:
    if scheme is None:
        return (
            "the folder holds scales for an FP8 cache, and its config asks for none: an engine that is told to keep "
            "one rounds keys and values, which was not computed"
            if has_scales
            else None
        )
    args = scheme if isinstance(scheme, Mapping) else {}
    asked = [args.get(key, default) for key, default in (("num_bits", 8), ("type", "int"), ("symmetric", True))]
    is_static = args.get("dynamic", False) is False and args.get("strategy") in ("tensor", "attn_head")
    if asked != [8, "float", True] or not is_static:
        return f"its config announces a cache of keys and values that is not computed here ({scheme})"
    if keeps_latents:
        return "its config announces an FP8 cache of one latent for keys and values (MLA), which is not computed here"
    return None


def read_cache_scale(source: Checkpoint, name: str) -> Tensor:
    """``[1]`` or ``[heads, 1, 1]`` float32.

    Raises:
        CheckpointError: another dtype or shape, or not positive and finite.
    """
    spec, where = source.specs()[name], f"{source.location}: tensor {name!r}"
    is_per_head = len(spec.shape) == 3 and spec.shape[1:] == (1, 1)
    if spec.dtype not in SCALE_DTYPES or not (spec.shape in ((), (1,)) or is_per_head):
        raise CheckpointError(f"{where}: expected a scale [1] or [heads, 1, 1], found {spec.dtype} {list(spec.shape)}")
    scale = source.read(name).to(torch.float32)
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise CheckpointError(f"{where}: a scale is positive and finite, found {scale.flatten().tolist()[:4]}")
    return scale if is_per_head else scale.reshape(1)
