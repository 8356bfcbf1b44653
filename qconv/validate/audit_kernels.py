"""The Triton kernels of `audit_gather`, and their launches.

A program works on a tile of the weight: it computes the stored value from its code, multiplies what the sums need, adds
up each product along both sides of the tile, and stores that. What the tiles stored is added up in float64.

Rounding points: those of `Stored`: a quotient is rounded once by IEEE's division and once to a whole number, half to
even; beyond `SAFE`, where every quotient ends at the first or last code, it is clamped first.

Legend: N = rows, K = columns, G = groups; of the weight. R = rows, C = columns of a tile.
"""

# mypy: ignore-errors
# (Triton's language has no types.)
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qconv.validate.audit_stored import Stored

TILE_ROWS, TILE_COLUMNS, WARPS = 32, 128, 8
NUM_TOTALS = 4
BOTH, ROWS, COLUMNS = 0, 1, 2  # the sides of a weight that are wanted
_ROWS, _COLUMNS = tl.constexpr(ROWS), tl.constexpr(COLUMNS)
ROUND = tl.constexpr(1.5 * 2.0**23)  # added to a float32 of magnitude under 2^22 it leaves no bits for fractions
SAFE = tl.constexpr(1024.0)  # codes have 8 bits at most


@triton.jit
def _store_sums(x_RC, y_RC, row_ptr, column_ptr, pair, pid_n, pid_k, n_R, k_C, N, K, num_n, num_k, SIDE: tl.constexpr):
    """Of products: along rows to ``[pair, tile column, n]``, along columns to ``[pair, tile row, k]``."""
    product_RC = x_RC * y_RC
    if SIDE != _COLUMNS:
        tl.store(row_ptr + (pair * num_k + pid_k).to(tl.int64) * N + n_R, tl.sum(product_RC, axis=1), mask=n_R < N)
    if SIDE != _ROWS:
        tl.store(column_ptr + (pair * num_n + pid_n).to(tl.int64) * K + k_C, tl.sum(product_RC, axis=0), mask=k_C < K)


@triton.jit(do_not_specialize=["has_base"])
def sums_kernel(
    expected_ptr,
    base_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    row_factor_ptr,
    column_factor_ptr,
    row_ptr,
    column_ptr,
    total_ptr,
    N,
    K,
    G,
    group_size,
    expected_stride,
    base_stride,
    code_stride_n,
    code_stride_k,
    mid_code,
    max_code,
    has_base,
    HAS_ZEROS: tl.constexpr,
    WHOLE: tl.constexpr,
    SIDE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    pid_n, pid_k = tl.program_id(0), tl.program_id(1)
    num_n, num_k = tl.num_programs(0), tl.num_programs(1)
    n_R, k_C = pid_n * R + tl.arange(0, R), pid_k * C + tl.arange(0, C)
    is_in = (n_R < N)[:, None] & (k_C < K)[None, :]
    wide_R1, k_1C = n_R.to(tl.int64)[:, None], k_C[None, :]
    factor_R1 = tl.load(row_factor_ptr + n_R, mask=n_R < N, other=0.0)[:, None]
    factor_RC = factor_R1 * tl.load(column_factor_ptr + k_C, mask=k_C < K, other=0.0)[None, :]

    expected_RC = tl.load(expected_ptr + wide_R1 * expected_stride + k_1C, mask=is_in, other=0.0)
    a_RC = expected_RC * factor_RC
    code_RC = tl.load(codes_ptr + wide_R1 * code_stride_n + k_1C * code_stride_k, mask=is_in, other=0).to(tl.float32)
    group_RC = wide_R1 * G + k_1C // group_size
    scale_RC = tl.load(scale_ptr + group_RC, mask=is_in, other=0.0)
    if HAS_ZEROS:
        zero_RC = tl.load(zero_ptr + group_RC, mask=is_in, other=0).to(tl.float32)
    else:
        zero_RC = tl.full((R, C), 0.0, tl.float32) + mid_code
    y_RC = tl.where(is_in, (code_RC - zero_RC) * scale_RC - a_RC, 0.0)

    _store_sums(a_RC, a_RC, row_ptr, column_ptr, 0, pid_n, pid_k, n_R, k_C, N, K, num_n, num_k, SIDE)
    _store_sums(y_RC, a_RC, row_ptr, column_ptr, 1, pid_n, pid_k, n_R, k_C, N, K, num_n, num_k, SIDE)
    if WHOLE:
        _store_sums(y_RC, y_RC, row_ptr, column_ptr, 2, pid_n, pid_k, n_R, k_C, N, K, num_n, num_k, SIDE)
        scale_RC = tl.where(scale_RC == 0, 1.0, scale_RC)
        quotient_RC = tl.minimum(tl.maximum(tl.div_rn(a_RC, scale_RC), -SAFE), SAFE) + ROUND - ROUND
        nearest_RC = tl.minimum(tl.maximum(quotient_RC + zero_RC, 0.0), tl.full((R, C), 0.0, tl.float32) + max_code)
        z_RC = tl.where(is_in, (nearest_RC - zero_RC) * scale_RC - a_RC, 0.0)
        off_RC = y_RC - z_RC
        total = total_ptr + (pid_n * num_k + pid_k) * 4
        tl.store(total, tl.sum(z_RC * a_RC))
        tl.store(total + 1, tl.sum(z_RC * z_RC))
        tl.store(total + 2, tl.sum(off_RC * off_RC))
        if has_base != 0:
            base_RC = tl.load(base_ptr + wide_R1 * base_stride + k_1C, mask=is_in, other=0.0).to(tl.float32)
            d_RC = (expected_RC - base_RC) * factor_RC
            _store_sums(a_RC, d_RC, row_ptr, column_ptr, 3, pid_n, pid_k, n_R, k_C, N, K, num_n, num_k, SIDE)
            _store_sums(d_RC, d_RC, row_ptr, column_ptr, 4, pid_n, pid_k, n_R, k_C, N, K, num_n, num_k, SIDE)
            _store_sums(y_RC, d_RC, row_ptr, column_ptr, 5, pid_n, pid_k, n_R, k_C, N, K, num_n, num_k, SIDE)
            tl.store(total + 3, tl.sum(z_RC * d_RC))


@triton.jit
def slopes_kernel(aa_ptr, ya_ptr, slope_ptr, num_parts, size, C: tl.constexpr):
    k_C = tl.program_id(0) * C + tl.arange(0, C)
    aa_C = tl.zeros((C,), tl.float64)
    ya_C = tl.zeros((C,), tl.float64)
    place_C = k_C.to(tl.int64)
    for _ in range(num_parts):
        aa_C += tl.load(aa_ptr + place_C, mask=k_C < size, other=0.0).to(tl.float64)
        ya_C += tl.load(ya_ptr + place_C, mask=k_C < size, other=0.0).to(tl.float64)
        place_C += size
    slope_C = tl.where(aa_C > 0, (ya_C + aa_C) / tl.where(aa_C > 0, aa_C, 1.0), 1.0)
    tl.store(slope_ptr + k_C, slope_C.to(tl.float32), mask=k_C < size)


def slopes(parts_PTK: Tensor) -> Tensor:
    """Least-squares scales of ``y + a`` by ``a``, from what tiles have of ``a a`` and ``y a``; 1 where a is 0.

    Args:
        parts_PTK: of one side, as `launch` gives it: float32 ``[at least 2 pairs, tiles, K]``.

    Returns:
        float32 ``[K]``; sums and quotients are float64.
    """
    _, num_parts, size = parts_PTK.shape
    result = parts_PTK.new_empty(size)
    aa_TK, ya_TK = parts_PTK[0], parts_PTK[1]
    grid = (triton.cdiv(size, TILE_COLUMNS),)
    slopes_kernel[grid](aa_TK, ya_TK, result, num_parts, size, C=TILE_COLUMNS, num_warps=4)
    return result


def launch(
    stored: Stored,
    expected_NK: Tensor,
    base_NK: Tensor | None,
    row_N: Tensor,
    column_K: Tensor,
    side: int = BOTH,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the tiles found, on the device.

    Args:
        stored: integer codes, groups one after the other.
        expected_NK: float32.
        base_NK: any float dtype, or None.
        row_N, column_K: float32 factors of expected weight and update.
        side: of `ROWS` or `COLUMNS` the first two pairs alone are found, and neither the other side nor ``z``.

    Returns:
        float32, to be added up along dimension 1: of each of the 3 pairs of `Sums` (6 with a base) what tiles have
        along rows ``[pairs, tile columns, N]`` and along columns ``[pairs, tile rows, K]``; and ``[tiles, 4]``: with
        ``z = nearest(a) - a``, the sums of z a, z z, (y - z)^2 and z d.
    """
    quantized = stored.quantized
    num_rows, num_columns = expected_NK.shape
    expected_NK = expected_NK if expected_NK.stride(1) == 1 else expected_NK.contiguous()
    has_base = base_NK is not None
    base_NK = expected_NK if base_NK is None else base_NK
    base_NK = base_NK if base_NK.stride(1) == 1 else base_NK.contiguous()
    scales_NG = quantized.scales_NG.float().contiguous()
    num_groups = scales_NG.shape[1]
    has_zeros = quantized.zeros_NG is not None
    zeros_NG = quantized.zeros_NG.contiguous() if has_zeros else quantized.codes_NK
    tiles = triton.cdiv(num_rows, TILE_ROWS), triton.cdiv(num_columns, TILE_COLUMNS)
    whole = side == BOTH
    num_pairs = (6 if has_base else 3) if whole else 2
    rows = expected_NK.new_empty(num_pairs, tiles[1] if side != COLUMNS else 0, num_rows)
    columns = expected_NK.new_empty(num_pairs, tiles[0] if side != ROWS else 0, num_columns)
    totals = expected_NK.new_zeros(*(tiles if whole else (0, 0)), NUM_TOTALS)
    sums_kernel[tiles](
        expected_NK,
        base_NK,
        quantized.codes_NK,
        scales_NG,
        zeros_NG,
        row_N,
        column_K,
        rows,
        columns,
        totals,
        num_rows,
        num_columns,
        num_groups,
        num_columns if num_groups == 1 else quantized.scheme.group_size,
        expected_NK.stride(0),
        base_NK.stride(0),
        *quantized.codes_NK.stride(),
        quantized.scheme.mid_code,
        quantized.scheme.max_code,
        int(has_base),
        HAS_ZEROS=has_zeros,
        WHOLE=whole,
        SIDE=side,
        R=TILE_ROWS,
        C=TILE_COLUMNS,
        num_warps=WARPS,
    )
    return rows, columns, totals.flatten(0, 1)
