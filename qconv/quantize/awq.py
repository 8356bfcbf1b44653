"""AWQ: scale up the input channels that matter before rounding to nearest, and clip the ranges.

Method: AWQ (Lin et al. 2023, section 3.2, equations 4 and 5): s = mean|x|^alpha, alpha on a grid of 20 over [0, 1).
Beside it the variant of the authors' code that also divides by the weights' own magnitude,
s = mean|x|^alpha / mean|w|^(1 - alpha); the better of the two is kept. The loss is evaluated exactly on the Gram
matrix, tr(E G E^T) with E = Q(W s) / s - W on sampled rows: one matrix product per candidate, no forward passes.
Clipping searches shrunk ranges as the authors do, each group judged by its own diagonal block of the Gram matrix.

Rounding points: those of `grid.py`; ``s`` is float32 and not rounded here (the fold into the preceding operation
decides its storage). On CUDA the products that rank candidate scales are TF32 (both factors rounded to 10 bits of
mantissa): all candidates of a search, plain rounding among them, are judged alike.

Left out: which operation absorbs 1/s (that is model knowledge), activation clipping.

Legend: N = out features, K = in features, G = groups, g = features of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from qconv.quantize import fused
from qconv.quantize.gram import output_error
from qconv.quantize.grid import (
    GPU_CHUNK,
    Grid,
    check_finite,
    grid_of_range,
    groups_of,
    quantize_dequantize,
    range_of,
    row_chunks,
    search_grid_by,
    ungroup,
)
from qconv.quantize.precision import tf32
from qconv.triton_support import available
from qconv.types import Scheme

NUM_RATIOS = 20
SEARCH_ROWS = 512


class AwqScale(NamedTuple):
    """Result of `search_scale`.

    Attributes:
        s_K: ``[K]`` float32, positive; quantize ``W * s`` and feed ``x / s``. All ones where nothing helps.
        ratio: the exponent alpha.
        duo: the weights' magnitude took part.
        loss_before: mean squared output error of plain rounding, summed over outputs.
        loss_after: the same with ``s_K``; never larger, unless the scale was shared afterwards.
    """

    s_K: Tensor
    ratio: float
    duo: bool
    loss_before: float
    loss_after: float

    @property
    def is_idle(self) -> bool:
        return not (self.ratio or self.duo)


def search_scale(
    weights: Sequence[Tensor],
    gram_KK: Tensor,
    mean_abs_K: Tensor,
    scheme: Scheme,
    name: str = "linear",
    *,
    share: Callable[[Tensor], Tensor] | None = None,
    powers_of_two: bool = False,
) -> AwqScale:
    """The channel scale that minimises the output error of linears that share an input.

    Candidates are judged in batches and stay on the device; it is waited for once.

    Args:
        weights: float32 ``[N_i, K]`` each.
        gram_KK: ``[K, K]`` float32, mean of ``x x^T``.
        mean_abs_K: ``[K]`` float32, mean of ``|x|``. Channels with 0 keep scale 1.
        scheme: that the weights will get; min-max grids are used in the search, and scales that a global scale moves
            into the range of float8 count as exact.
        name: for messages.
        share: applied to the best scale, ``[K]`` to ``[K]``, whose loss is ``loss_after`` then and may exceed
            ``loss_before``.
        powers_of_two: round every scale that is tried to one.

    Raises:
        NumericsError: NaN or infinity in an argument.
    """
    if scheme.has_global_scale:
        scheme = replace(scheme, scale_format="plain")
    w_NK = sample_rows(weights)
    w_mean_K = _mean_relative_magnitude(w_NK, scheme)
    s_CK = torch.cat([torch.ones_like(mean_abs_K).unsqueeze(0), _candidates(mean_abs_K, w_mean_K)])
    if powers_of_two:
        s_CK = nearest_powers(s_CK)
    # A loss that is not a number never wins; the first of equals does: plain rounding, then small exponents.
    loss_C = _losses(w_NK, s_CK, gram_KK, scheme).nan_to_num(nan=float("inf"))
    best = loss_C.argmin()
    s_K = s_CK.index_select(0, best.unsqueeze(0))[0]
    loss_after = loss_C.index_select(0, best.unsqueeze(0))[0]
    if share is not None:
        s_K = share(s_K)
        loss_after = _losses(w_NK, s_K.unsqueeze(0), gram_KK, scheme)[0]
    named = [*((w, f"{name}: weight") for w in weights), (gram_KK, f"{name}: Gram matrix")]
    named.append((mean_abs_K, f"{name}: mean input"))
    sums = [tensor.sum(dtype=torch.float64) for tensor, _ in named]  # not finite where the tensor is not
    index, before, after, *totals = torch.stack([best.double(), loss_C[0], loss_after, *sums]).tolist()
    if not all(isfinite(total) for total in totals):
        for tensor, what in named:
            check_finite(tensor, what)
    candidate = int(index) - 1
    return AwqScale(
        s_K=s_K,
        ratio=max(candidate, 0) % NUM_RATIOS / NUM_RATIOS,
        duo=candidate >= NUM_RATIOS,
        loss_before=before,
        loss_after=after,
    )


def nearest_powers(s: Tensor) -> Tensor:
    """Powers of two, nearest by ratio."""
    return torch.ldexp(torch.ones_like(s), s.log2().round().int())


def _candidates(mean_abs_K: Tensor, w_mean_K: Tensor) -> Tensor:
    """``[2 * NUM_RATIOS, K]``: all exponents, then all of them with the weights' magnitude; 1 for dead channels."""
    ratios = [i / NUM_RATIOS for i in range(NUM_RATIOS)]
    plain_CK = torch.stack([mean_abs_K.pow(ratio) for ratio in ratios])
    duo_CK = plain_CK / torch.stack([w_mean_K.pow(1.0 - ratio) for ratio in ratios])
    s_CK = torch.cat([plain_CK, duo_CK]).clamp_min_(1e-4)
    live_K = (mean_abs_K > 0) & (w_mean_K > 0)
    largest_C1 = s_CK.masked_fill(~live_K, 0.0).amax(dim=1, keepdim=True)
    smallest_C1 = s_CK.masked_fill(~live_K, float("inf")).amin(dim=1, keepdim=True)
    return torch.where(live_K, s_CK / (largest_C1 * smallest_C1).sqrt(), 1.0)


def sample_rows(weights: Sequence[Tensor]) -> Tensor:
    """At most `SEARCH_ROWS` rows of the stacked weights, evenly spaced: enough to rank a few dozen scales."""
    step = -(-sum(len(w) for w in weights) // SEARCH_ROWS)
    parts, above = [], 0
    for w_NK in weights:
        parts.append(w_NK[-above % step :: step].float())
        above += len(w_NK)
    return torch.cat(parts)


def _mean_relative_magnitude(w_NK: Tensor, scheme: Scheme) -> Tensor:
    """``[K]``: mean over rows of ``|w|`` relative to the largest of its group."""
    total_K = torch.zeros_like(w_NK[0])
    for rows in row_chunks(w_NK):
        magnitude_NGg = groups_of(w_NK[rows].abs(), scheme.group_size)
        largest_NG1 = magnitude_NGg.amax(dim=-1, keepdim=True)
        relative_NGg = magnitude_NGg / torch.where(largest_NG1 == 0, 1.0, largest_NG1)
        total_K += ungroup(relative_NGg, w_NK.shape[1]).sum(0)
    return total_K / w_NK.shape[0]


def _losses(w_NK: Tensor, s_CK: Tensor, gram_KK: Tensor, scheme: Scheme) -> Tensor:
    """Mean squared output error, summed over outputs, of rounding ``W * s`` (min-max grids) and feeding ``x / s``.

    Of each candidate, ``[C]`` float64 on the device, one matrix product for several of them.
    """
    num_columns = w_NK.shape[1]
    step = _candidates_at_once(w_NK)
    parts: list[Tensor] = []
    for start in range(0, len(s_CK), step):
        s_C1K = s_CK[start : start + step].unsqueeze(1)
        loss_C = torch.zeros(len(s_C1K), dtype=torch.float64, device=w_NK.device)
        for rows in row_chunks(w_NK):
            scaled_CNGg = groups_of(w_NK[rows] * s_C1K, scheme.group_size)
            scale_CNG, zero_CNG = grid_of_range(*range_of(scaled_CNGg), scheme)
            q_CNGg = quantize_dequantize(scaled_CNGg, scale_CNG.unsqueeze(-1), zero_CNG.unsqueeze(-1), scheme)
            error_CNK = (ungroup(q_CNGg, num_columns) / s_C1K).sub_(w_NK[rows])
            del scaled_CNGg, q_CNGg
            with tf32(w_NK.is_cuda):
                error_M = output_error(error_CNK.flatten(0, 1), gram_KK)
            loss_C += error_M.view(len(s_C1K), -1).sum(dim=1, dtype=torch.float64)
        parts.append(loss_C)
    return torch.cat(parts)


def _candidates_at_once(w_NK: Tensor) -> int:
    """On a CPU one: its temporaries stay in the cache, and its losses do not depend on the other candidates."""
    return max(1, GPU_CHUNK // w_NK.numel()) if w_NK.is_cuda else 1


def search_block_grid(w_NK: Tensor, gram_KK: Tensor, scheme: Scheme, signed: bool = True) -> Grid:
    """The clipped grid per group with the smallest error of the group's own contribution.

    That error is ``e G_j e^T`` with ``G_j`` the ``[g, g]`` diagonal block of the group; cross terms between groups
    are ignored. The candidates are those of `search_grid`. Pass the result to `rtn` as ``grid``.

    Args:
        w_NK: ``[N, K]`` float32, already multiplied by ``s`` if there is one.
        gram_KK: ``[K, K]`` float32, already divided by it (see `scaled_gram`).
        signed: as for `search_grid`.
    """
    blocks_Ggg = _diagonal_blocks(gram_KK, scheme)
    if available(w_NK) and scheme.kind == "int" and fused.fits(w_NK, scheme):
        return fused.search_grid(w_NK.float(), scheme, gram_Ggg=blocks_Ggg, signed=signed)
    return search_grid_by(
        groups_of(w_NK.float(), scheme.group_size), scheme, lambda error_NGg: _block_loss(error_NGg, blocks_Ggg), signed
    )


def _diagonal_blocks(gram_KK: Tensor, scheme: Scheme) -> Tensor:
    """``[G, g, g]``; a short last block is padded with zeros, as `groups_of` pads the weights."""
    num_columns = len(gram_KK)
    size = min(num_columns, scheme.group_size if scheme.group_size != -1 else num_columns)
    num_full = num_columns // size
    end = num_full * size
    blocks_Ggg = gram_KK[:end, :end].view(num_full, size, num_full, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    if end == num_columns:
        return blocks_Ggg.contiguous()
    last = torch.nn.functional.pad(gram_KK[end:, end:], (0, size - (num_columns - end)) * 2)
    return torch.cat([blocks_Ggg, last.unsqueeze(0)])


def _block_loss(error_NGg: Tensor, blocks_Ggg: Tensor) -> Tensor:
    error_GNg = error_NGg.transpose(0, 1)
    return torch.bmm(error_GNg, blocks_Ggg).mul_(error_GNg).sum(-1).t()


def scaled_gram(gram_KK: Tensor, s_K: Tensor) -> Tensor:
    """Gram matrix of the inputs ``x / s``."""
    return (gram_KK / s_K.unsqueeze(0)).div_(s_K.unsqueeze(1))
