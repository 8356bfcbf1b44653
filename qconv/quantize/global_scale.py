"""NVFP4's second scale: one number for a whole weight, which puts the scales of its groups into the range of float8.

Method: NVFP4 (NVIDIA, "Pretraining large language models with NVFP4", 2025, section 2): a group of 16 weights has a
float8_e4m3fn scale; what a reader multiplies by is that scale divided by the weight's global scale. Writers usually
take 448 * 6 / absmax. Here it is the largest power of two up to that: float8's precision is relative, so nothing is
lost, weights times it are exact, and so are quotients and reciprocals of it in every reader.

Linears that engines run as one have one global scale: vLLM takes the largest of theirs for all.

So a solver sees weights times the global scale, on a grid whose scales are float8 numbers, and knows nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qconv import e2m1
from qconv.overrides import fused_linears
from qconv.quantize.grid import MAX_E4M3, check_finite
from qconv.types import QuantizedLinear

MAX_EXPONENT = 126  # its reciprocal is a normal number, too


def power_of_two(largest: float) -> float:
    """The largest power of two that keeps ``largest`` times it at 448 * 6 or below; 1 where all is zero."""
    if largest == 0:
        return 1.0
    return 2.0 ** max(-MAX_EXPONENT, min(math.floor(math.log2(MAX_E4M3 * e2m1.MAX / largest)), MAX_EXPONENT))


def global_scales(weights: Mapping[str, Tensor], where: str) -> dict[str, float]:
    """Of each weight ``[N, K]``, by name; those that engines fuse have the same.

    Raises:
        NumericsError: NaN or infinity in a weight; names it, after ``where``.
    """
    for name, w_NK in weights.items():
        check_finite(w_NK, where + name)
    largest = dict(zip(weights, torch.stack([w.abs().amax() for w in weights.values()]).tolist(), strict=True))
    return {name: power_of_two(value) for name, value in shared_by_fused(largest).items()}


def shared_by_fused(largest: Mapping[str, float]) -> dict[str, float]:
    """The largest of what engines fuse, for each weight of it; by name."""
    groups = {name: name for name in largest}
    for fused, modules in fused_linears(name.removesuffix(".weight") for name in largest).items():
        groups |= {f"{module}.weight": fused for module in modules}
    shared: dict[str, float] = {}
    for name, group in groups.items():
        shared[group] = max(shared.get(group, 0.0), largest[name])
    return {name: shared[group] for name, group in groups.items()}


def divided(linear: QuantizedLinear, scale: float, input_scale: float | None) -> QuantizedLinear:
    """What was solved, with the scales that readers multiply by."""
    scales_NG = linear.scales_NG
    return replace(
        linear,
        scales_NG=scales_NG / scale,
        global_scale=scales_NG.new_tensor([scale]),
        input_scale=None if input_scale is None else scales_NG.new_tensor([input_scale]),
    )
