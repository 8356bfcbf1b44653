"""Better scales for given codes, and better codes for given scales; both only ever lower a row's damped loss.

Method: least squares for the scales; one pass of cyclic coordinate descent over the codes (QuantEase, Behdin et al.
2023, algorithm 1). The loss of a row with errors e is ``e H e^T``, H = gram + shift * I.

Rounding points: float32; on a GPU the products with the Gram matrix run in TF32. New scales are rounded (`grid.py`)
before they are judged.

Legend: N = out features, K = in features, G = groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qconv.quantize.grid import Grid, decode, groups_of, round_scale, ungroup
from qconv.quantize.precision import tf32
from qconv.quantize.sweep import Kernels
from qconv.types import Scheme

REFIT_RIDGE = 1e-4
REFIT_ELEMENTS = 1 << 24  # bounds the [rows, G, G] normal equations of a scale refit, and its [rows, K] temporaries
REFIT_ELEMENTS_CUDA = 1 << 26


def descend(
    w_NK: Tensor, gram_KK: Tensor, shift: Tensor, codes_NK: Tensor, grid: Grid, scheme: Scheme, kernels: Kernels
) -> Tensor:
    """One pass of cyclic coordinate descent over the codes; returns new codes ``[N, K]`` uint8.

    Each column in turn moves to the codes that minimise the loss with all others fixed: the nearest to
    ``q_k + (e H)_k / H_kk``.
    """
    num_columns = w_NK.shape[1]
    size = num_columns if scheme.group_size == -1 else scheme.group_size
    q_NK = _dequantize(codes_NK, grid, scheme)
    error_NK = w_NK - q_NK
    with tf32(kernels.is_fused):
        pull_KN = torch.mm(gram_KK, error_NK.t())
    pull_KN.addcmul_(error_NK.t(), shift)
    del error_NK
    start_KN = q_NK.t().contiguous()
    del q_NK
    group_K = torch.arange(num_columns, dtype=torch.int32, device=w_NK.device) // size
    grid_GN = Grid(grid.scale.t().contiguous(), grid.zero.t().contiguous())
    codes_KN = kernels.sweep(start_KN, pull_KN, gram_KK, gram_KK.diagonal() + shift, group_K, grid_GN, scheme)
    return codes_KN.t().contiguous()


def refit_scales(
    w_NK: Tensor, gram_KK: Tensor, shift: Tensor, codes_NK: Tensor, grid: Grid, scheme: Scheme, kernels: Kernels
) -> Grid:
    """Least squares scales for fixed codes: per row, the normal equations ``(C^T H C) ds = C^T H e`` over its groups.

    ``C`` holds the row's centred codes (of floats their numbers), one column per group; ds is added to the scales,
    which are rounded again. A row keeps its old scales where the rounded new ones are no better: by
    ``ds (C^T H C) ds - 2 ds C^T H e < 0``.
    """
    num_columns = w_NK.shape[1]
    num_groups = grid.scale.shape[1]
    scales: list[Tensor] = []
    limit = REFIT_ELEMENTS_CUDA if w_NK.is_cuda else REFIT_ELEMENTS
    step = max(1, limit // max(num_groups**2, num_columns))
    for start in range(0, len(w_NK), step):
        rows = slice(start, start + step)
        old = Grid(grid.scale[rows], grid.zero[rows])
        centred_NGg = decode(groups_of(codes_NK[rows].float(), scheme.group_size), old.zero.unsqueeze(-1), scheme)
        error_NK = w_NK[rows] - ungroup(centred_NGg * old.scale.unsqueeze(-1), num_columns)
        centred_NK = ungroup(centred_NGg, num_columns)
        del centred_NGg
        with tf32(kernels.is_fused):
            pull_NK = (error_NK @ gram_KK).addcmul_(error_NK, shift)
        del error_NK
        rhs_NG = groups_of(pull_NK.mul_(centred_NK), scheme.group_size).sum(-1)
        del pull_NK
        normal_NGG = kernels.normal_equations(centred_NK, gram_KK, shift, scheme)
        del centred_NK
        new_scale = round_scale(old.scale + _solve(normal_NGG, rhs_NG), scheme)
        new_scale = torch.where(_is_unused(normal_NGG), old.scale, new_scale)
        change_NG = new_scale - old.scale
        gain_N = (change_NG * (2 * rhs_NG - torch.einsum("ngh,nh->ng", normal_NGG, change_NG))).sum(1)
        scales.append(torch.where((gain_N > 0).unsqueeze(1), new_scale, old.scale))
    return Grid(torch.cat(scales), grid.zero)


def _is_unused(normal_NGG: Tensor) -> Tensor:
    """A group whose codes all mean zero has no say in its scale."""
    return normal_NGG.diagonal(dim1=1, dim2=2) == 0


def _solve(normal_NGG: Tensor, rhs_NG: Tensor) -> Tensor:
    """The steps of the scales, slightly regularised."""
    diagonal_NG = normal_NGG.diagonal(dim1=1, dim2=2)
    ridged_NGG = normal_NGG + torch.diag_embed(diagonal_NG * REFIT_RIDGE + (diagonal_NG == 0))
    step_NG: Tensor = torch.linalg.solve(ridged_NGG, rhs_NG)
    return step_NG


def _dequantize(codes_NK: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    codes_NGg = groups_of(codes_NK.float(), scheme.group_size)
    # Padding dequantizes to some number, which `ungroup` drops.
    centred_NGg = decode(codes_NGg, grid.zero.unsqueeze(-1), scheme)
    return ungroup(centred_NGg.mul_(grid.scale.unsqueeze(-1)), codes_NK.shape[1])
