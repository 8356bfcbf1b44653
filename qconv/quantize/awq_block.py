"""AWQ scales of one fold: search, make them storable, move them into the producer.

Dimension legend: N = out features, K = in features.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qconv.quantize.awq import apply_scale, search_scale
from qconv.quantize.folds import (
    Fold,
    Heads,
    fold_into_norm,
    fold_into_rows,
    producer_scale,
    share_across_heads,
)
from qconv.types import Scheme


@dataclass(frozen=True)
class Statistics:
    """Of one distinct linear input: Gram matrix ``[K, K]`` and, where AWQ needs it, mean magnitude ``[K]``, float32."""

    gram_KK: Tensor
    mean_abs_K: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class FoldContext:
    """What folding needs to know beyond the block: attention shape, scheme, storage dtype, where to count.

    ``where`` completes local names in messages.
    """

    heads: Heads
    scheme: Scheme
    storage: torch.dtype
    counts: Counter[str]
    where: str = ""


def fold_scales(
    tensors: dict[str, Tensor], statistics: dict[str, Statistics], fold: Fold, context: FoldContext
) -> None:
    """Searches the scale of one fold; puts scaled copies in the place of ``tensors`` and ``statistics``.

    Raises:
        NumericsError: NaN or infinity in weights or statistics; names the weights.
    """
    weights = [f"{target}.weight" for target in fold.targets]
    source = f"{fold.source}.weight"
    if source not in tensors or any(name not in statistics for name in weights):
        context.counts["awq folds skipped: layer not found"] += 1
        return
    stats = statistics[weights[0]]
    if stats.mean_abs_K is None:
        raise ValueError(f"{weights[0]}: AWQ needs the mean magnitude of the inputs")
    w_list = [tensors[name].float() for name in weights]
    shares_heads = fold.kind == "rows" and fold.targets[0].endswith("o_proj")
    share = partial(share_across_heads, heads=context.heads) if shares_heads else None
    name = context.where + " + ".join(weights)
    found = search_scale(w_list, stats.gram_KK, stats.mean_abs_K, context.scheme, name, share=share)
    scale_K = found.s_K
    if shares_heads and found.loss_after >= found.loss_before:
        context.counts["awq folds skipped: no gain with scales shared between heads"] += 1
        return
    if fold.kind == "rows":
        _fold_into_rows(tensors, fold, scale_K, context.heads)
    else:
        plus_one = fold.kind == "norm_plus_one"
        tensors[source], scale_K = fold_into_norm(tensors[source], scale_K, context.storage, plus_one)
    scaled = Statistics(*apply_scale(stats.gram_KK, stats.mean_abs_K, scale_K))
    for name, w_NK in zip(weights, w_list, strict=True):
        tensors[name] = w_NK * scale_K
        statistics[name] = scaled
    context.counts["awq folds applied" if found.ratio or found.duo else "awq folds without effect"] += 1


def _fold_into_rows(tensors: dict[str, Tensor], fold: Fold, scale_K: Tensor, heads: Heads) -> None:
    """Divides the producing rows."""
    source, bias = f"{fold.source}.weight", f"{fold.source}.bias"
    rows, new_bias = fold_into_rows(tensors[source], tensors.get(bias), producer_scale(scale_K, fold, heads))
    tensors[source] = rows
    if new_bias is not None:
        tensors[bias] = new_bias
