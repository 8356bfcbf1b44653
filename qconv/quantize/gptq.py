"""GPTQ: codes chosen column by column, each column's error made up for by the columns that come after it.

Method: GPTQ (Frantar et al. 2022, Algorithm 1) in its equivalent form as Babai's nearest plane (Chen et al. 2025, "The
Geometry of LLM Quantization", theorem 4): with the damped Gram matrix H = U U^T, U upper triangular, the loss of the
errors e = w - q is ||e U||^2, whose term k holds the errors of the columns 0 .. k only. Column k therefore goes to the
code nearest to ``w_k + sum_{j<k} e_j U_jk / U_kk``. That needs one Cholesky factorisation and no inverse; Algorithm 1's
R is U^-1. Columns are visited in order of decreasing activation power (optional in the paper); groups are static, found
on the original weights, so column k stays in group k // g and no group index is stored. Grids are searched with
importance U_kk^2, the weight that the rounding error of column k has in the loss of Algorithm 1.

After it, each optional pass refits the scales and runs one coordinate descent over the codes (`refine.py`). Descent has
the shape of the solve: column k goes to the code nearest to ``q_k + (e H)_k / H_kk``, so that one `sweep` does both.

Rounding points: float32 throughout; scales are rounded before any code is chosen against them (see `grid.py`). On a GPU
the inner loops run in fused kernels (`fused.py`), and the products between blocks of columns in TF32: where a weight is
closer than about 1e-3 of a step to the border between two codes, it may then fall to the other side.

Left out: groups found on already corrected weights (they need columns in their original order).

Legend: N = out features, K = in features, G = groups; H = damped Gram matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qconv.errors import NumericsError, UsageError
from qconv.quantize.gram import output_error
from qconv.quantize.grid import Grid, check_finite, check_scale, grid_of_range, groups_of, range_of
from qconv.quantize.precision import tf32
from qconv.quantize.refine import descend, refit_scales
from qconv.quantize.rtn import as_linear, check_grid
from qconv.quantize.sweep import Kernels
from qconv.timeline import TIMELINE
from qconv.types import QuantizedLinear, Scheme

# Geometric means over five linears of SmolLM2-135M at 4 bits, g64, 16,384 calibration tokens, held-out squared error
# relative to min-max rounding (symmetric, act-order): min-max grids 0.349; searched 0.302; and negative scales 0.268;
# damping 0.01 -> 0.03 0.267; one refine pass 0.259, two 0.256.
DAMPING = 0.03
MAX_DAMPING = 10.0
REFINE_PASSES = 1
STATISTICS_ROWS = 1024
FACTOR_COLUMNS = 1024


@dataclass(frozen=True, kw_only=True)
class GptqStats:
    """What happened in one solve, for the report.

    Attributes:
        damping: fraction of the mean diagonal that was added to the diagonal in the end.
        attempts: factorisations tried; more than 1 means that damping had to be raised.
        dead_columns: input channels that no calibration token excited.
        relative_error: ``tr(E G E^T) / tr(W G W^T)``, E = W - dequantized, G without damping; over at most
            1,024 evenly spaced rows.
    """

    damping: float
    attempts: int
    dead_columns: int
    relative_error: float


class GptqResult(NamedTuple):
    linear: QuantizedLinear
    stats: GptqStats


class Factor(NamedTuple):
    """``u_KK`` upper triangular with ``gram + shift * I = u u^T``, columns in the order of processing."""

    u_KK: Tensor
    shift: Tensor
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
    fuse: bool = True,
) -> GptqResult:
    """Quantizes a weight, or the stacked weights of linears that share an input (rows are independent).

    Args:
        w_NK: ``[N, K]`` float32.
        gram_KK: ``[K, K]`` float32, symmetric positive semi-definite, mean of ``x x^T``.
        scheme: of integers or 4-bit floats; ``activation_order`` sets the order of the columns.
        name: the weight, for messages.
        damping: fraction of the mean diagonal of live channels that is added to the diagonal.
        mse: search each group's grid (else min-max).
        signed_scales: let the search of a symmetric scheme use negative scales.
        refine_passes: rounds of scale refit and coordinate descent afterwards; 0 = plain GPTQ.
        fuse: fused kernels and TF32 where they can run; False = plain PyTorch in float32, the reference.

    A dead channel (zero diagonal) is quantized to the nearest code: it neither feeds nor receives error.

    Raises:
        NumericsError: NaN or infinity in weights or Gram matrix, a Gram matrix that is not positive semi-definite,
            or weights too large for a float16 scale.
        SchemeError: a float8 scheme.
        UsageError: damping is not positive.
    """
    check_grid(scheme, name)
    kernels = Kernels.of(w_NK, fuse)
    w_NK = w_NK.float()
    diagonal_K = gram_KK.diagonal()
    order_K = torch.arange(len(diagonal_K), device=w_NK.device)
    if scheme.activation_order:
        order_K = torch.argsort(diagonal_K, descending=True, stable=True)
    with TIMELINE.stage("solve: factorise"):
        _check_inputs(w_NK, gram_KK, name)
        factor = factorise(gram_KK, damping, name, order_K)
    with TIMELINE.stage("solve: grids"):
        importance_K = torch.empty_like(diagonal_K)
        importance_K[order_K] = factor.u_KK.diagonal().square()
        if mse:
            grid = kernels.search_grid(w_NK, scheme, importance_K, signed_scales)
        else:
            grid = grid_of_range(*range_of(groups_of(w_NK, scheme.group_size)), scheme)
    with TIMELINE.stage("solve: codes"):
        codes_NK = _solve(w_NK, factor.u_KK, order_K, grid, scheme, kernels)
    shift, damping, attempts = factor.shift, factor.damping, factor.attempts
    del factor  # as much memory as the Gram matrix takes
    for _ in range(refine_passes):
        with TIMELINE.stage("solve: refit"):
            grid = refit_scales(w_NK, gram_KK, shift, codes_NK, grid, scheme, kernels)
        with TIMELINE.stage("solve: descend"):
            codes_NK = descend(w_NK, gram_KK, shift, codes_NK, grid, scheme, kernels)
    linear = as_linear(codes_NK, grid, scheme)
    check_scale(grid.scale, name)
    with tf32(kernels.is_fused):
        relative_error, dead_columns = _statistics(w_NK, gram_KK, linear)
    stats = GptqStats(damping=damping, attempts=attempts, dead_columns=dead_columns, relative_error=relative_error)
    return GptqResult(linear, stats)


def _check_inputs(w_NK: Tensor, gram_KK: Tensor, name: str) -> None:
    sums = torch.stack([w_NK.sum(dtype=torch.float64), gram_KK.sum(dtype=torch.float64)])
    if not bool(torch.isfinite(sums).all()):  # one look at the device; then which
        check_finite(w_NK, name)
        check_finite(gram_KK, f"{name}: Gram matrix of the inputs")


def factorise(gram_KK: Tensor, damping: float, name: str, order_K: Tensor) -> Factor:
    """The upper triangular factor of the damped Gram matrix, its rows and columns in ``order_K``.

    Raises:
        UsageError: damping is not positive.
        NumericsError: not positive definite even with ten times the mean diagonal added.
    """
    if damping <= 0:
        raise UsageError(f"GPTQ damping must be positive, got {damping}; the usual value is {DAMPING}")
    diagonal_K = gram_KK.diagonal()
    num_live = (diagonal_K != 0).sum()
    mean = torch.where(num_live > 0, diagonal_K.sum() / num_live.clamp_min(1), 1.0)
    attempts = 0
    while damping <= MAX_DAMPING:
        attempts += 1
        u_KK = _in_order(gram_KK, order_K)
        u_KK.diagonal().add_(damping * mean)
        if _factorise_in_place(u_KK):
            return Factor(u_KK, damping * mean, damping, attempts)
        del u_KK
        damping *= 10.0
    raise NumericsError(
        f"{name}: the Gram matrix of its inputs is not positive semi-definite: {attempts} factorisations failed, "
        f"the last with damping {damping / 10:g}; the calibration activations overflow, or the matrix is damaged"
    )


def _in_order(gram_KK: Tensor, order_K: Tensor) -> Tensor:
    """A copy with rows and columns in ``order_K``; indexing with both at once would make an index of ``[K, K]``."""
    ordered_KK = torch.empty_like(gram_KK)
    for start in range(0, len(order_K), FACTOR_COLUMNS):
        rows = slice(start, start + FACTOR_COLUMNS)
        ordered_KK[rows] = gram_KK.index_select(0, order_K[rows]).index_select(1, order_K)
    return ordered_KK


def _factorise_in_place(h_KK: Tensor) -> bool:
    """Puts the upper triangular ``u`` with ``h = u u^T`` in the place of ``h``; False if that has no positive diagonal.

    Block by block from the last column, reading the upper triangle alone (Golub and Van Loan 2013, section 4.2.6, from
    the other end): at K = 14336 a copy for a library's factorisation and its workspace would take 2 GB more.
    """
    is_good = torch.ones((), dtype=torch.bool, device=h_KK.device)
    for stop in range(len(h_KK), 0, -FACTOR_COLUMNS):
        start = max(0, stop - FACTOR_COLUMNS)
        # With J the flip of all columns, J H J = L L^T gives H = U U^T for U = J L J.
        lower_BB, info = torch.linalg.cholesky_ex(h_KK[start:stop, start:stop].flip(0, 1))
        u_BB = lower_BB.flip(0, 1)
        # A finite, positive diagonal bounds every other entry of its row.
        pivots_B = u_BB.diagonal()
        is_good &= (info == 0) & (torch.isfinite(pivots_B) & (pivots_B > 0)).all()
        h_KK[start:stop, start:stop] = u_BB
        if start == 0:
            break
        above_AB = torch.linalg.solve_triangular(u_BB.mT, h_KK[:start, start:stop], upper=False, left=False)
        h_KK[:start, start:stop] = above_AB
        for top in range(0, start, FACTOR_COLUMNS):
            bottom = min(top + FACTOR_COLUMNS, start)
            h_KK[top:bottom, top:start].addmm_(above_AB[top:bottom], above_AB[top:].mT, alpha=-1)
    h_KK.triu_()
    return bool(is_good)


def _solve(w_NK: Tensor, u_KK: Tensor, order_K: Tensor, grid: Grid, scheme: Scheme, kernels: Kernels) -> Tensor:
    """Codes ``[N, K]`` uint8; ``u_KK`` is in the order of processing, the grid in the original one."""
    size = w_NK.shape[1] if scheme.group_size == -1 else scheme.group_size
    w_KN = w_NK.t().index_select(0, order_K)
    grid_GN = Grid(grid.scale.t().contiguous(), grid.zero.t().contiguous())
    group_K = (order_K // size).to(torch.int32)
    power_K = u_KK.diagonal().contiguous()
    codes_KN = kernels.sweep(w_KN, torch.zeros_like(w_KN), u_KK, power_K, group_K, grid_GN, scheme)
    original_K = torch.empty_like(order_K)
    original_K[order_K] = torch.arange(len(order_K), device=order_K.device)
    return codes_KN.index_select(0, original_K).t().contiguous()


def _statistics(w_NK: Tensor, gram_KK: Tensor, linear: QuantizedLinear) -> tuple[float, int]:
    """The relative error of a sample of rows, and the number of dead columns."""
    step = -(-len(w_NK) // STATISTICS_ROWS)
    rows_NK = w_NK[::step]
    numbers = [
        output_error(rows_NK, gram_KK).sum(),
        output_error(rows_NK - linear.rows(slice(None, None, step)).dequantize(), gram_KK).sum(),
        (gram_KK.diagonal() == 0).sum(),
    ]
    total, error, dead = torch.stack([number.double() for number in numbers]).tolist()
    return (error / total if total > 0 else 0.0), int(dead)
