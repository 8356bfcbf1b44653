"""AWQ: scale up the input channels that matter before rounding to nearest, and clip the ranges.

Method: AWQ (Lin et al. 2023, section 3.2, equations 4 and 5): s = mean|x|^alpha, alpha on a grid of 20 over [0, 1).
Beside it the variant of the authors' code that also divides by the weights' own magnitude,
s = mean|x|^alpha / mean|w|^(1 - alpha); the better of the two is kept. The loss is evaluated exactly on the Gram
matrix, tr(E G E^T) with E = Q(W s) / s - W on sampled rows: one matrix product per candidate, no forward passes.
Clipping searches shrunk ranges as the authors do, each group judged by its own diagonal block of the Gram matrix.

Rounding points: those of `grid.py`; ``s`` is float32 and not rounded here (the fold into the preceding operation
decides its storage).

Left out: which operation absorbs 1/s (that is model knowledge), activation clipping.

Legend: N = out features, K = in features, G = groups, g = features of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qconv.quantize.gram import output_error
from qconv.quantize.grid import (
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
        loss_after: the same with ``s_K``; never larger.
    """

    s_K: Tensor
    ratio: float
    duo: bool
    loss_before: float
    loss_after: float


def search_scale(
    weights: Sequence[Tensor], gram_KK: Tensor, mean_abs_K: Tensor, scheme: Scheme, name: str = "linear"
) -> AwqScale:
    """The channel scale that minimises the output error of linears that share an input.

    Args:
        weights: float32 ``[N_i, K]`` each.
        gram_KK: ``[K, K]`` float32, mean of ``x x^T``.
        mean_abs_K: ``[K]`` float32, mean of ``|x|``. Channels with 0 keep scale 1.
        scheme: the integer scheme that the weights will get; min-max grids are used in the search.

    Raises:
        NumericsError: NaN or infinity in an argument.
    """
    for tensor, what in (*((w, "weight") for w in weights), (gram_KK, "Gram matrix"), (mean_abs_K, "mean input")):
        check_finite(tensor, f"{name}: {what}")
    w_NK = sample_rows(weights)
    w_mean_K = _mean_relative_magnitude(w_NK, scheme)
    ones_K = torch.ones_like(mean_abs_K)
    loss_before = scaled_loss(w_NK, ones_K, gram_KK, scheme)
    best = AwqScale(ones_K, 0.0, False, loss_before, loss_before)
    live_K = (mean_abs_K > 0) & (w_mean_K > 0)
    if not bool(live_K.any()):
        return best
    for duo in (False, True):
        for i in range(NUM_RATIOS):
            ratio = i / NUM_RATIOS
            s_K = mean_abs_K[live_K].pow(ratio)
            if duo:
                s_K = s_K / w_mean_K[live_K].pow(1.0 - ratio)
            s_K = s_K.clamp_min(1e-4)
            s_K = ones_K.masked_scatter(live_K, s_K / (s_K.max() * s_K.min()).sqrt())
            loss = scaled_loss(w_NK, s_K, gram_KK, scheme)
            if loss < best.loss_after:
                best = AwqScale(s_K, ratio, duo, loss_before, loss)
    return best


def sample_rows(weights: Sequence[Tensor]) -> Tensor:
    """At most `SEARCH_ROWS` rows of the stacked weights, evenly spaced: enough to rank a few dozen scales."""
    w_NK = torch.cat([w.float() for w in weights])
    return w_NK[:: -(-len(w_NK) // SEARCH_ROWS)]


def _mean_relative_magnitude(w_NK: Tensor, scheme: Scheme) -> Tensor:
    """``[K]``: mean over rows of ``|w|`` relative to the largest of its group."""
    total_K = torch.zeros_like(w_NK[0])
    for rows in row_chunks(w_NK):
        magnitude_NGg = groups_of(w_NK[rows].abs(), scheme.group_size)
        largest_NG1 = magnitude_NGg.amax(dim=-1, keepdim=True)
        relative_NGg = magnitude_NGg / torch.where(largest_NG1 == 0, 1.0, largest_NG1)
        total_K += ungroup(relative_NGg, w_NK.shape[1]).sum(0)
    return total_K / w_NK.shape[0]


def scaled_loss(w_NK: Tensor, s_K: Tensor, gram_KK: Tensor, scheme: Scheme) -> float:
    """Mean squared output error, summed over outputs, of rounding ``W * s`` (min-max grids) and feeding ``x / s``."""
    loss = torch.zeros((), dtype=torch.float64, device=w_NK.device)
    for rows in row_chunks(w_NK):
        scaled_NGg = groups_of(w_NK[rows] * s_K, scheme.group_size)
        scale_NG, zero_NG = grid_of_range(*range_of(scaled_NGg), scheme)
        q_NGg = quantize_dequantize(scaled_NGg, scale_NG.unsqueeze(-1), zero_NG.unsqueeze(-1), scheme)
        error_NK = ungroup(q_NGg, w_NK.shape[1]) / s_K - w_NK[rows]
        loss += output_error(error_NK, gram_KK).sum(dtype=torch.float64)
    return float(loss)


def search_block_grid(w_NK: Tensor, gram_KK: Tensor, scheme: Scheme, signed: bool = True) -> Grid:
    """The clipped grid per group with the smallest error of the group's own contribution.

    That error is ``e G_j e^T`` with ``G_j`` the ``[g, g]`` diagonal block of the group; cross terms between groups
    are ignored. The candidates are those of `search_grid`. Pass the result to `rtn` as ``grid``.

    Args:
        w_NK: ``[N, K]`` float32, already multiplied by ``s`` if there is one.
        gram_KK: ``[K, K]`` float32, already divided by it (see `apply_scale`).
        signed: as for `search_grid`.
    """
    blocks_Ggg = _diagonal_blocks(gram_KK, scheme)
    return search_grid_by(
        groups_of(w_NK.float(), scheme.group_size), scheme, lambda error_NGg: _block_loss(error_NGg, blocks_Ggg), signed
    )


def _diagonal_blocks(gram_KK: Tensor, scheme: Scheme) -> Tensor:
    """``[G, g, g]``; a short last block is padded with zeros, as `groups_of` pads the weights."""
    num_columns = len(gram_KK)
    size = min(num_columns, scheme.group_size if scheme.group_size != -1 else num_columns)
    num_groups = scheme.num_groups(num_columns)
    blocks_Ggg = gram_KK.new_zeros(num_groups, size, size)
    for j in range(num_groups):
        block = gram_KK[j * size : (j + 1) * size, j * size : (j + 1) * size]
        blocks_Ggg[j, : block.shape[0], : block.shape[1]] = block
    return blocks_Ggg


def _block_loss(error_NGg: Tensor, blocks_Ggg: Tensor) -> Tensor:
    error_GNg = error_NGg.transpose(0, 1)
    return torch.bmm(error_GNg, blocks_Ggg).mul_(error_GNg).sum(-1).t()


def apply_scale(gram_KK: Tensor, mean_abs_K: Tensor, s_K: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrix and mean magnitude of the inputs ``x / s``."""
    return gram_KK / s_K.unsqueeze(0) / s_K.unsqueeze(1), mean_abs_K / s_K
