"""GPTQ: codes chosen column by column, each column's error fed to the columns that come after it.

Method: GPTQ (Frantar et al. 2022, Algorithm 1): blocks of 128 columns with lazy batch updates (step 2), Cholesky
reformulation (step 3), optional order of decreasing activation power. Groups are static then (found on the original
weights), so column k stays in group k // g and no group index is stored. Grids are searched with importance
1 / R_kk^2, the weight that column k's rounding error has in the loss of Algorithm 1. After it, each
optional pass refits the scales by least squares and then runs one coordinate descent over the codes (QuantEase,
Behdin et al. 2023); both only ever lower the layer's (damped) squared error.

The factor: Algorithm 1 needs the upper triangular R with H^-1 = R^T R. With J the flip of all columns,
J H J = L L^T gives H = U U^T for the upper triangular U = J L J, so H^-1 = (U^-1)^T U^-1 and R = U^-1 = J L^-1 J:
one Cholesky and one triangular inverse.

Rounding points: float32 throughout; scales are rounded before any code is chosen against them (see `grid.py`).

Left out: per-column group search inside a block (act-order with dynamic groups), which needs a group index.
This solver is the readable reference; a fused kernel may replace `_solve`.

Legend: N = out features, K = in features, G = groups; H = damped Gram matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qconv.errors import NumericsError, UsageError
from qconv.quantize.gram import output_error
from qconv.quantize.grid import (
    Grid,
    check_finite,
    check_scale,
    encode,
    grid_of_range,
    groups_of,
    range_of,
    round_scale,
    search_grid,
    ungroup,
)
from qconv.quantize.rtn import as_linear, check_integer
from qconv.types import QuantizedLinear, Scheme

BLOCK_COLUMNS = 128
# Geometric means over five linears of SmolLM2-135M at 4 bits, g64, 16,384 calibration tokens, held-out squared error
# relative to min-max rounding (symmetric, act-order): min-max grids 0.349; searched 0.302; and negative scales 0.268;
# damping 0.01 -> 0.03 0.267; one refine pass 0.259, two 0.256.
DAMPING = 0.03
MAX_DAMPING = 10.0
REFINE_PASSES = 1
REFIT_RIDGE = 1e-4
REFIT_ELEMENTS = 1 << 24  # bounds the [rows, G, G] normal equations of a scale refit


@dataclass(frozen=True, kw_only=True)
class GptqStats:
    """What happened in one solve, for the report.

    Attributes:
        damping: fraction of the mean diagonal that was added to the diagonal in the end.
        attempts: factorisations tried; more than 1 means that damping had to be raised.
        dead_columns: input channels that no calibration token excited.
        relative_error: ``tr(E G E^T) / tr(W G W^T)``, E = W - dequantized, G without damping.
    """

    damping: float
    attempts: int
    dead_columns: int
    relative_error: float


class GptqResult(NamedTuple):
    linear: QuantizedLinear
    stats: GptqStats


class Factor(NamedTuple):
    """``r_KK`` upper triangular with ``(gram + shift * I)^-1 = r^T r``."""

    r_KK: Tensor
    shift: float
    damping: float
    attempts: int


def gptq(
    w_NK: Tensor,
    gram_KK: Tensor,
    scheme: Scheme,
    name: str,
    *,
    damping: float = DAMPING,
    mse: bool = True,
    signed_scales: bool = True,
    refine_passes: int = REFINE_PASSES,
) -> GptqResult:
    """Quantizes a weight, or the stacked weights of linears that share an input (rows are independent).

    Args:
        w_NK: ``[N, K]`` float32.
        gram_KK: ``[K, K]`` float32, symmetric positive semi-definite, mean of ``x x^T``.
        scheme: an integer scheme; ``activation_order`` sets the order of the columns.
        name: the weight, for messages.
        damping: fraction of the mean diagonal of live channels that is added to the diagonal.
        mse: search each group's grid (else min-max).
        signed_scales: let the search of a symmetric scheme use negative scales.
        refine_passes: rounds of scale refit and coordinate descent afterwards; 0 = plain GPTQ.

    A dead channel (zero diagonal) is quantized to the nearest code: it neither feeds nor receives error.

    Raises:
        NumericsError: NaN or infinity in weights or Gram matrix, a Gram matrix that is not positive semi-definite,
            or weights too large for a float16 scale.
        SchemeError: a float scheme.
    """
    check_integer(scheme, name)
    check_finite(w_NK, name)
    check_finite(gram_KK, f"{name}: Gram matrix of the inputs")
    diagonal_K = gram_KK.diagonal()
    order_K = torch.arange(len(diagonal_K), device=w_NK.device)
    if scheme.activation_order:
        order_K = torch.argsort(diagonal_K, descending=True, stable=True)
    factor = factorise(gram_KK[order_K][:, order_K], damping, name)
    importance_K = torch.empty_like(diagonal_K)
    importance_K[order_K] = factor.r_KK.diagonal().square().reciprocal()
    codes_NK, grid = _solve(w_NK.float(), factor.r_KK, order_K, importance_K, scheme, (mse, signed_scales))
    check_scale(grid.scale, name)
    for _ in range(refine_passes):
        grid = refit_scales(w_NK.float(), gram_KK, factor.shift, codes_NK, grid, scheme)
        codes_NK = descend(w_NK.float(), gram_KK, factor.shift, codes_NK, grid, scheme)
    linear = as_linear(codes_NK, grid, scheme)
    total = float(output_error(w_NK.float(), gram_KK).sum())
    error = float(output_error(w_NK - linear.dequantize(), gram_KK).sum())
    stats = GptqStats(
        damping=factor.damping,
        attempts=factor.attempts,
        dead_columns=int((diagonal_K == 0).sum()),
        relative_error=error / total if total > 0 else 0.0,
    )
    return GptqResult(linear, stats)


def factorise(gram_KK: Tensor, damping: float, name: str) -> Factor:
    """The factor of Algorithm 1 by one Cholesky and one triangular inverse (see the module docstring).

    Raises:
        UsageError: damping is not positive.
        NumericsError: not positive definite even with ten times the mean diagonal added.
    """
    if damping <= 0:
        raise UsageError(f"GPTQ damping must be positive, got {damping}; the usual value is {DAMPING}")
    diagonal_K = gram_KK.diagonal()
    live_K = diagonal_K != 0
    mean = float(diagonal_K[live_K].mean()) if bool(live_K.any()) else 1.0
    identity_KK = torch.eye(len(diagonal_K), device=gram_KK.device)
    attempts = 0
    while damping <= MAX_DAMPING:
        attempts += 1
        flipped_KK = gram_KK.flip(0, 1)
        flipped_KK.diagonal().add_(damping * mean)
        lower_KK, info = torch.linalg.cholesky_ex(flipped_KK)
        if int(info) == 0:
            r_KK = torch.linalg.solve_triangular(lower_KK, identity_KK, upper=False).flip(0, 1)
            if bool(torch.isfinite(r_KK).all()) and bool((r_KK.diagonal() > 0).all()):
                return Factor(r_KK, damping * mean, damping, attempts)
        damping *= 10.0
    raise NumericsError(
        f"{name}: the Gram matrix of its inputs is not positive semi-definite: {attempts} factorisations failed, "
        f"the last with damping {damping / 10:g}; the calibration activations overflow, or the matrix is damaged"
    )


def _solve(
    w_NK: Tensor, r_KK: Tensor, order_K: Tensor, importance_K: Tensor, scheme: Scheme, search: tuple[bool, bool]
) -> tuple[Tensor, Grid]:
    """Algorithm 1. ``r_KK`` is in the order of the columns, ``importance_K`` in the original one.

    Inside a block the update is left-looking: a column subtracts all earlier errors of its block when its turn
    comes (one matrix-vector product), which reads the errors once and writes nothing but the column.
    """
    mse, signed = search
    num_rows, num_columns = w_NK.shape
    size = num_columns if scheme.group_size == -1 else scheme.group_size
    importance_Gg = groups_of(importance_K, scheme.group_size)

    def find_grid(w_NGg: Tensor, weight_Gg: Tensor) -> Grid:
        return search_grid(w_NGg, scheme, weight_Gg, signed) if mse else grid_of_range(*range_of(w_NGg), scheme)

    if scheme.activation_order:
        static = find_grid(groups_of(w_NK, scheme.group_size), importance_Gg)
        scale_GN, zero_GN = static.scale.t().contiguous(), static.zero.t().contiguous()
    else:
        scale_GN = w_NK.new_empty(scheme.num_groups(num_columns), num_rows)
        zero_GN = torch.empty_like(scale_GN)
    columns = order_K.tolist()
    w_KN = w_NK.t()[order_K]  # a copy, one column of the weight per row: contiguous in the inner loop
    codes_KN = torch.empty_like(w_KN, dtype=torch.uint8)
    for start in range(0, num_columns, BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, num_columns)
        error_BN = torch.empty_like(w_KN[start:end])
        for k in range(start, end):
            done_BN = error_BN[: k - start]
            group = columns[k] // size
            if not scheme.activation_order and k % size == 0:
                stop = min(k + size, num_columns)
                current_gN = torch.addmm(w_KN[k:stop], r_KK[start:k, k:stop].t(), done_BN, alpha=-1)
                grid = find_grid(current_gN.t().unsqueeze(1).contiguous(), importance_K[k:stop].unsqueeze(0))
                scale_GN[group], zero_GN[group] = grid.scale[:, 0], grid.zero[:, 0]
            scale_N, zero_N = scale_GN[group], zero_GN[group]
            w_N = torch.addmv(w_KN[k], done_BN.t(), r_KK[start:k, k], alpha=-1)
            code_N = encode(w_N, scale_N, zero_N, scheme)
            codes_KN[k] = code_N
            error_BN[k - start] = (w_N - (code_N - zero_N) * scale_N) / r_KK[k, k]
        w_KN[end:].addmm_(r_KK[start:end, end:].t(), error_BN, alpha=-1)
    codes_NK = torch.empty_like(w_NK, dtype=torch.uint8)
    codes_NK[:, order_K] = codes_KN.t()
    return codes_NK, Grid(scale_GN.t().contiguous(), zero_GN.t().contiguous())


def descend(w_NK: Tensor, gram_KK: Tensor, shift: float, codes_NK: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    """One pass of cyclic coordinate descent over the codes; returns new codes ``[N, K]`` uint8.

    Each column in turn moves to the codes that minimise ``tr(E H E^T)``, H = gram + shift * I, with all others
    fixed: the nearest to ``q_k + (E H)_k / H_kk``. The pass never raises that loss.
    """
    num_columns = w_NK.shape[1]
    size = num_columns if scheme.group_size == -1 else scheme.group_size
    q_KN = _dequantize(codes_NK, grid, scheme).t().contiguous()
    error_NK = w_NK - q_KN.t()
    pull_KN = (error_NK @ gram_KK).add_(error_NK, alpha=shift).t().contiguous()  # (E H)^T
    scale_GN, zero_GN = grid.scale.t().contiguous(), grid.zero.t().contiguous()
    power_K = (gram_KK.diagonal() + shift).tolist()
    codes_KN = torch.empty_like(q_KN, dtype=torch.uint8)
    for start in range(0, num_columns, BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, num_columns)
        change_BN = torch.empty_like(q_KN[start:end])
        for k in range(start, end):
            scale_N, zero_N = scale_GN[k // size], zero_GN[k // size]
            pull_N = torch.addmv(pull_KN[k], change_BN[: k - start].t(), gram_KK[start:k, k])
            code_N = encode(pull_N.div_(power_K[k]).add_(q_KN[k]), scale_N, zero_N, scheme)
            codes_KN[k] = code_N
            change_BN[k - start] = q_KN[k] - (code_N - zero_N) * scale_N
        pull_KN[end:].addmm_(gram_KK[end:, start:end], change_BN)
    return codes_KN.t().contiguous()


def refit_scales(w_NK: Tensor, gram_KK: Tensor, shift: float, codes_NK: Tensor, grid: Grid, scheme: Scheme) -> Grid:
    """Least squares scales for fixed codes: per row, the normal equations ``(C^T H C) ds = C^T H e`` over its groups.

    ``C`` holds the row's centred codes, one column per group; ds is added to the scales, which are rounded again.
    A row keeps its old scales where the rounded new ones are no better.
    """
    num_columns = w_NK.shape[1]
    num_groups = grid.scale.shape[1]
    scales: list[Tensor] = []
    step = max(1, REFIT_ELEMENTS // max(num_groups**2, num_columns))
    for start in range(0, len(w_NK), step):
        rows = slice(start, start + step)
        old = Grid(grid.scale[rows], grid.zero[rows])
        centred_NGg = groups_of(codes_NK[rows].float(), scheme.group_size) - old.zero.unsqueeze(-1)
        centred_NK = ungroup(centred_NGg, num_columns)
        error_NK = w_NK[rows] - _dequantize(codes_NK[rows], old, scheme)
        pull_NK = (error_NK @ gram_KK).add_(error_NK, alpha=shift)
        rhs_NG = groups_of(pull_NK * centred_NK, scheme.group_size).sum(-1)
        normal_NGG = _normal_equations(centred_NK, gram_KK, shift, scheme)
        ridge_NG = normal_NGG.diagonal(dim1=1, dim2=2) * REFIT_RIDGE
        unused_NG = ridge_NG == 0  # a group whose codes all mean zero has no say in its scale
        normal_NGG += torch.diag_embed(ridge_NG + unused_NG)
        step_NG = torch.linalg.solve(normal_NGG, rhs_NG)
        new_scale = torch.where(unused_NG, old.scale, round_scale(old.scale + step_NG))
        new = Grid(new_scale, old.zero)
        new_error_NK = w_NK[rows] - _dequantize(codes_NK[rows], new, scheme)
        new_loss_N = output_error(new_error_NK, gram_KK) + shift * new_error_NK.square().sum(1)
        old_loss_N = (pull_NK * error_NK).sum(1)
        scales.append(torch.where((new_loss_N < old_loss_N).unsqueeze(1), new_scale, old.scale))
    return Grid(torch.cat(scales), grid.zero)


def _normal_equations(centred_NK: Tensor, gram_KK: Tensor, shift: float, scheme: Scheme) -> Tensor:
    num_columns = centred_NK.shape[1]
    size = num_columns if scheme.group_size == -1 else scheme.group_size
    groups = []
    for start in range(0, num_columns, size):
        part_Ng = centred_NK[:, start : start + size]
        product_NK = part_Ng @ gram_KK[start : start + size]
        product_NK[:, start : start + size].add_(part_Ng, alpha=shift)
        groups.append(groups_of(product_NK * centred_NK, scheme.group_size).sum(-1))
    return torch.stack(groups, dim=1)


def _dequantize(codes_NK: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    codes_NGg = groups_of(codes_NK.float(), scheme.group_size)
    # Padding dequantizes to some number, which `ungroup` drops.
    return ungroup((codes_NGg - grid.zero.unsqueeze(-1)).mul_(grid.scale.unsqueeze(-1)), codes_NK.shape[1])
