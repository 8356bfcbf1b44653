"""Channel scales of one fold (AWQ's or SmoothQuant's): search, make them storable, move them into the producer.

Dimension legend: N = out features, K = in features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qconv.quantization_config import Folding
from qconv.quantize.awq import AwqScale, scaled_gram, search_scale
from qconv.quantize.folds import (
    Fold,
    Heads,
    fold_into_norm,
    fold_into_rows,
    producer_scale,
    share_across_heads,
)
from qconv.quantize.sample import InputSample, pooled_samples
from qconv.quantize.smooth import SmoothScale, search_smoothing
from qconv.types import Scheme


@dataclass(frozen=True)
class Statistics:
    """Of one distinct linear input, float32: Gram matrix ``[K, K]``, mean magnitude ``[K]``, and tokens.

    What was not asked for is None. ``num_tokens``: that reached the linears.
    """

    gram_KK: Tensor | None = None
    mean_abs_K: Tensor | None = None
    sample: InputSample | None = None
    num_tokens: int = 0

    def divided_by(self, s_K: Tensor) -> Statistics:
        """Those of the inputs ``x / s``."""
        gram_KK, mean_abs_K, sample = self.gram_KK, self.mean_abs_K, self.sample
        return Statistics(
            gram_KK=None if gram_KK is None else scaled_gram(gram_KK, s_K),
            mean_abs_K=None if mean_abs_K is None else mean_abs_K / s_K,
            sample=None if sample is None else sample.divided_by(s_K),
            num_tokens=self.num_tokens,
        )


def pooled(several: Sequence[Statistics]) -> Statistics:
    """Of an input that reaches linears in parts (experts, each with its own tokens): the mean, each by its tokens."""
    distinct = list({id(one): one for one in several}.values())
    if len(distinct) == 1:
        return distinct[0]
    tokens = [one.num_tokens for one in distinct]
    shares = [number / sum(tokens) if any(tokens) else 1 / len(tokens) for number in tokens]
    seen = [(one, share) for one, share in zip(distinct, shares, strict=True) if share]
    return Statistics(
        gram_KK=_mean([(one.gram_KK, share) for one, share in seen]),
        mean_abs_K=_mean([(one.mean_abs_K, share) for one, share in seen]),
        sample=pooled_samples([one.sample for one, _ in seen if one.sample is not None]),
        num_tokens=sum(tokens),
    )


def _mean(parts: Sequence[tuple[Tensor | None, float]]) -> Tensor | None:
    total = None
    for part, share in parts:
        if part is not None:
            total = part * share if total is None else total.add_(part, alpha=share)
    return total


@dataclass(frozen=True, kw_only=True)
class FoldContext:
    """What folding needs to know beyond the block: method, attention shape, scheme, storage dtype, where to count.

    ``where`` completes local names in messages.
    """

    method: Folding
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
        context.counts[f"{context.method} folds skipped: layer not found"] += 1
        return
    stats = pooled([statistics[name] for name in weights])
    w_list = [tensors[name].float() for name in weights]
    shares_heads = fold.kind == "rows" and fold.targets[0].endswith("o_proj")
    share = partial(share_across_heads, heads=context.heads) if shares_heads else None
    name = context.where + " + ".join(weights)
    found = _search(w_list, stats, context, name, share, powers_of_two=bool(fold.beside))
    scale_K = found.s_K
    if shares_heads and found.loss_after >= found.loss_before:
        context.counts[f"{context.method} folds skipped: no gain with scales shared between heads"] += 1
        return
    if fold.kind == "rows":
        _fold_into_rows(tensors, fold, scale_K, context.heads)
    else:
        plus_one = fold.kind == "norm_plus_one"
        tensors[source], scale_K = fold_into_norm(tensors[source], scale_K, context.storage, plus_one)
    for name in (f"{module}.weight" for module in fold.beside):
        tensors[name] = tensors[name].float() * scale_K
    for name, w_NK in zip(weights, w_list, strict=True):
        tensors[name] = w_NK * scale_K
    del stats
    _divide(statistics, weights, scale_K)
    context.counts[f"{context.method} folds {'without effect' if found.is_idle else 'applied'}"] += 1


def _search(
    weights: list[Tensor],
    stats: Statistics,
    context: FoldContext,
    name: str,
    share: Callable[[Tensor], Tensor] | None,
    *,
    powers_of_two: bool,
) -> AwqScale | SmoothScale:
    if context.method == "smoothquant":
        if stats.sample is None:
            raise ValueError(f"{name}: SmoothQuant needs tokens of the inputs")
        return search_smoothing(weights, stats.sample, context.scheme, name, share, powers_of_two=powers_of_two)
    if stats.gram_KK is None or stats.mean_abs_K is None:
        raise ValueError(f"{name}: AWQ needs the Gram matrix and the mean magnitude of the inputs")
    return search_scale(
        weights, stats.gram_KK, stats.mean_abs_K, context.scheme, name, share=share, powers_of_two=powers_of_two
    )


def _divide(statistics: dict[str, Statistics], names: Sequence[str], scale_K: Tensor) -> None:
    """Puts statistics of the inputs ``x / s`` in the place of those of ``x``; what was one object stays one."""
    sharing: dict[int, list[str]] = {}
    for name in names:
        sharing.setdefault(id(statistics[name]), []).append(name)
    for together in sharing.values():
        statistics |= dict.fromkeys(together, statistics[together[0]].divided_by(scale_K))


def _fold_into_rows(tensors: dict[str, Tensor], fold: Fold, scale_K: Tensor, heads: Heads) -> None:
    """Divides the producing rows."""
    source, bias = f"{fold.source}.weight", f"{fold.source}.bias"
    rows, new_bias = fold_into_rows(tensors[source], tensors.get(bias), producer_scale(scale_K, fold, heads))
    tensors[source] = rows
    if new_bias is not None:
        tensors[bias] = new_bias
