"""Combining the updates of one weight element by element, at full rank.

Method: TIES (Yadav et al. 2023, section 4: trim to the largest, elect a sign, average those that agree), DARE (Yu et
al. 2023, section 3: drop at random, rescale by 1 / density), both as task arithmetic (Ilharco et al. 2022) on updates.
Definitions are those of peft's ``add_weighted_adapter``, so trimming is per weight, where the TIES paper trims over the
whole model, and signs are elected before weights are applied. peft runs them on A and B apart unless the method ends in
``_svd``; here they see ``scaling * (B @ A)``, the update itself, and no rank is lost, unless that is asked for.

Rounding: float32 throughout.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from qconv.adapter_configs import CombinationConfig


@torch.no_grad()
def combined_update(
    updates: Sequence[Tensor], weights: Sequence[float], config: CombinationConfig, weight_name: str
) -> Tensor:
    """One update of the shape of each, in float32.

    Args:
        updates: ``[N, K]`` each, float32.
        weights: one for each.
        weight_name: random choices depend on it and on the seed alone, not on the order of reading.
    """
    density = 1.0 if config.density is None else config.density
    generator = torch.Generator().manual_seed(zlib.crc32(f"{config.seed} {weight_name}".encode()))
    if config.method in ("dare", "dare-ties"):
        kept = [_drop(update, density, generator) for update in updates]
    else:
        kept = [_trim(update, density) for update in updates]
    if config.method not in ("ties", "dare-ties"):
        return sum((update * weight for update, weight in zip(kept, weights, strict=True)), torch.zeros_like(kept[0]))
    counted = kept if config.majority_sign != "frequency" else [update.sign() for update in kept]
    sign = torch.where(sum(counted, torch.zeros_like(kept[0])) >= 0, 1.0, -1.0)
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for update, weight in zip(kept, weights, strict=True):
        agrees = update.sign() == sign  # zeros agree with neither
        total += torch.where(agrees, update * weight, 0.0)
        count += agrees
    return total / count.clamp_(min=1)


def _trim(update: Tensor, density: float) -> Tensor:
    """All but the largest ``int(density * size)`` magnitudes set to zero."""
    if density >= 1:
        return update
    flat = update.reshape(-1)
    largest = flat.abs().topk(int(density * flat.numel())).indices
    result = torch.zeros_like(flat)
    result[largest] = flat[largest]
    return result.view_as(update)


def _drop(update: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each element kept with probability ``density`` and rescaled; drawn on the CPU, alike on every device."""
    if density >= 1:
        return update
    keeps = torch.rand(update.shape, generator=generator) < density
    return torch.where(keeps.to(update.device), update / density, 0.0)
