"""Triton kernels of the inner loops; `fused.py` checks arguments and launches them.

Rounding points: whatever decides a code rounds as in `grid.py`. Scales go through bfloat16 and float16 by arithmetic on
their bits, since not every back end's casts round to nearest. ``x / scale`` is ``x * (1 / scale)`` and one correction
by its remainder (Markstein 1990, "Computation of elementary functions on the IBM RISC System/6000 processor"): with
scales of 8 significant bits, quotients near a border between codes are those of IEEE's division (all 128 scales, all
borders up to `SAFE` and the 40 floats on either side were tried). ``(code - zero) * scale`` is exact.

Left out: groups whose size is no power of two (`fused.fits`).

Legend: N = rows of a tile (out features), K = in features, G = groups, g = features of a group, S = columns of a
sub-block; capitals without a suffix are compile-time constants.
"""

# mypy: ignore-errors
# (Triton's language has no types.)
from __future__ import annotations

import triton
import triton.language as tl

from qconv.quantize import grid

# Added to a float32 of magnitude under 2^22 it leaves no bits for fractions: the sum rounds to nearest, ties to even.
ROUND = tl.constexpr(1.5 * 2.0**23)
ROUND_HALF = tl.constexpr(1.5 * 2.0**-1)  # the same for multiples of 2^-24, of magnitudes under 2^-2
SAFE = tl.constexpr(1024.0)  # quotients beyond it end at the first or last code, whatever the zero point
MIN_SCALE = tl.constexpr(grid.MIN_SCALE)
MAX_SCALE = tl.constexpr(grid.MAX_SCALE)
SMALLEST_NORMAL_HALF = tl.constexpr(2.0**-14)

PLAIN = tl.constexpr(0)  # losses: sum of e^2,
IMPORTANCE = tl.constexpr(1)  # sum of importance * e^2,
GRAM = tl.constexpr(2)  # e G e^T


@triton.jit
def round_to_whole(x):
    """Nearest whole number, ties to even; exact for magnitudes up to `SAFE`, which larger ones become."""
    return tl.minimum(tl.maximum(x, -SAFE), SAFE) + ROUND - ROUND


@triton.jit
def encode(x, scale, inverse, zero, MAX_CODE: tl.constexpr):
    """`grid.encode`; ``inverse`` is 1 / scale, rounded once; the scale is exact in bfloat16."""
    rough = x * inverse
    quotient = tl.fma(tl.fma(rough, -scale, x), inverse, rough)
    quotient = tl.where(tl.abs(rough) < SAFE, quotient, rough)  # a correction may overflow where this did
    return tl.minimum(tl.maximum(round_to_whole(quotient) + zero, 0.0), MAX_CODE)


@triton.jit
def round_scale(scale):
    """`grid.round_scale` of a non-negative scale."""
    bits = scale.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    rounded = bits.to(tl.float32, bitcast=True)
    # float16 keeps all 8 bits that are left, except among its subnormals, which are multiples of 2^-24.
    rounded = tl.where(rounded < SMALLEST_NORMAL_HALF, rounded + ROUND_HALF - ROUND_HALF, rounded)
    rounded = tl.where(rounded > MAX_SCALE, float("inf"), rounded)
    return tl.maximum(rounded, MIN_SCALE)


@triton.jit
def divide(x, DIVISOR: tl.constexpr, BY_RECIPROCAL: tl.constexpr):
    """By a constant, as PyTorch does it: with one division on a CPU, with one multiplication on CUDA."""
    if BY_RECIPROCAL:
        return x * (1.0 / DIVISOR)
    else:
        return tl.div_rn(x, tl.full(x.shape, DIVISOR, tl.float32))


@triton.jit
def grid_of_range(
    low_N,
    high_N,
    SYMMETRIC: tl.constexpr,
    MAX_CODE: tl.constexpr,
    MIN_ZERO: tl.constexpr,
    BY_RECIPROCAL: tl.constexpr,
):
    """`grid.grid_of_range`: scale and zero."""
    if SYMMETRIC:
        scale_N = divide(tl.maximum(-low_N, high_N), MAX_CODE / 2, BY_RECIPROCAL)
        scale_N = tl.where(scale_N == 0, 1.0, round_scale(scale_N))
        zero_N = tl.full(scale_N.shape, (MAX_CODE + 1) // 2, tl.float32)
    else:
        if MIN_ZERO > 0:
            low_N = tl.minimum(low_N, divide(-high_N, MAX_CODE - 1, BY_RECIPROCAL))
        scale_N = divide(high_N - low_N, MAX_CODE, BY_RECIPROCAL)
        scale_N = tl.where(scale_N == 0, 1.0, round_scale(scale_N))
        zero_N = round_to_whole(tl.div_rn(-low_N, scale_N))
        zero_N = tl.minimum(tl.maximum(zero_N, MIN_ZERO), MAX_CODE)
    return scale_N, zero_N


@triton.jit
def loss_of(w_Ng, scale_N, zero_N, weight, MAX_CODE: tl.constexpr, LOSS: tl.constexpr):
    """The loss of each row's group; ``weight`` is the importance ``[g]`` or the Gram block ``[g, g]``."""
    inverse_N = tl.div_rn(tl.full(scale_N.shape, 1.0, tl.float32), scale_N)
    scale_N1, zero_N1 = scale_N[:, None], zero_N[:, None]
    codes_Ng = encode(w_Ng, scale_N1, inverse_N[:, None], zero_N1, MAX_CODE)
    error_Ng = (codes_Ng - zero_N1) * scale_N1 - w_Ng
    if LOSS == GRAM:
        return tl.sum(tl.dot(error_Ng, weight, input_precision="tf32x3") * error_Ng, axis=1)
    elif LOSS == IMPORTANCE:
        return tl.sum(error_Ng * error_Ng * weight[None, :], axis=1)
    else:
        return tl.sum(error_Ng * error_Ng, axis=1)


@triton.jit
def search_grid(
    w_ptr,
    weight_ptr,
    factors_ptr,
    scale_ptr,
    zero_ptr,
    num_rows,
    num_columns,
    num_groups,
    stride_n,
    stride_k,
    SYMMETRIC: tl.constexpr,
    SIGNED: tl.constexpr,
    MAX_CODE: tl.constexpr,
    MIN_ZERO: tl.constexpr,
    LOSS: tl.constexpr,
    NUM_CANDIDATES: tl.constexpr,
    FIRST_SIDE: tl.constexpr,
    BY_RECIPROCAL: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`grid.search_grid` of a tile of rows in one group; the weights stay in registers.

    Candidate i multiplies the ends of the range by ``factors[i]``; candidate 0 is the range itself, and from
    ``FIRST_SIDE`` on the range is the best so far. One loop for all, since the compiler's time goes by its length.
    Compile without fusing products and sums: ``high * factor - low * factor`` must round as it does in PyTorch.
    """
    group = tl.program_id(1)
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    g_g = tl.arange(0, GROUP)
    k_g = group * GROUP + g_g
    live_N, live_g = n_N < num_rows, k_g < num_columns
    at_Ng = n_N.to(tl.int64)[:, None] * stride_n + k_g.to(tl.int64)[None, :] * stride_k
    w_Ng = tl.load(w_ptr + at_Ng, mask=live_N[:, None] & live_g[None, :], other=0.0)
    if LOSS == GRAM:
        weight = tl.load(weight_ptr + group.to(tl.int64) * GROUP * GROUP + g_g[:, None] * GROUP + g_g[None, :])
    elif LOSS == IMPORTANCE:
        weight = tl.load(weight_ptr + k_g, mask=live_g, other=0.0)
    else:
        weight = 0.0

    low_N, high_N = tl.minimum(tl.min(w_Ng, axis=1), 0.0), tl.maximum(tl.max(w_Ng, axis=1), 0.0)
    # The end of the range that is farther from zero is given the extra (negative) code.
    sign_N = tl.where(high_N > -low_N, -1.0, 1.0)
    best_low_N, best_high_N = low_N, high_N
    scale_N, zero_N, loss_N = tl.zeros_like(low_N), tl.zeros_like(low_N), tl.zeros_like(low_N)
    for i in range(NUM_CANDIDATES):
        # No branch: compiled by Triton 3.6, one that only assigns what the loop carries was also taken after this.
        low_N = tl.where(i == FIRST_SIDE, best_low_N, low_N)
        high_N = tl.where(i == FIRST_SIDE, best_high_N, high_N)
        new_low_N = low_N * tl.load(factors_ptr + 2 * i)
        new_high_N = high_N * tl.load(factors_ptr + 2 * i + 1)
        new_scale_N, new_zero_N = grid_of_range(new_low_N, new_high_N, SYMMETRIC, MAX_CODE, MIN_ZERO, BY_RECIPROCAL)
        if SYMMETRIC and SIGNED:
            new_scale_N = tl.where(i == 0, new_scale_N, new_scale_N * sign_N)
        new_loss_N = loss_of(w_Ng, new_scale_N, new_zero_N, weight, MAX_CODE, LOSS)
        better_N = (new_loss_N < loss_N) | (i == 0)
        scale_N, zero_N = tl.where(better_N, new_scale_N, scale_N), tl.where(better_N, new_zero_N, zero_N)
        best_low_N = tl.where(better_N, new_low_N, best_low_N)
        best_high_N = tl.where(better_N, new_high_N, best_high_N)
        loss_N = tl.where(better_N, new_loss_N, loss_N)
    at_N = n_N.to(tl.int64) * num_groups + group
    tl.store(scale_ptr + at_N, scale_N, mask=live_N)
    tl.store(zero_ptr + at_N, zero_N, mask=live_N)


@triton.jit
def take(x_SN, s_S, index):
    """Row ``index`` of ``x_SN``, bit for bit."""
    bits_SN = tl.where(s_S[:, None] == index, x_SN.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits_SN, axis=0).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["first", "num_columns", "num_rows", "stride_j"])
def sweep_block(
    start_ptr,
    pull_ptr,
    coupling_ptr,
    inverse_power_ptr,
    group_ptr,
    scale_ptr,
    inverse_scale_ptr,
    zero_ptr,
    codes_ptr,
    change_ptr,
    first,
    num_columns,
    num_rows,
    stride_j,
    MAX_CODE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUB_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Codes of ``BLOCK_K`` columns from ``first`` on, for a tile of weight rows; and their changes ``[BLOCK_K, N]``.

    A weight row is one lane's business: all columns of a sub-block lie in its registers, so that a column reaches
    the next one without leaving them. The columns before a sub-block act on it first, then its own columns one by one.
    The loops are not unrolled, which would take the compiler many seconds.
    """
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Hides the alignment, else a lane would get four adjacent rows, and its columns would be spread over the lanes.
    n_N = tl.multiple_of(n_N, 1)
    live_N = n_N < num_rows
    s_S = tl.arange(0, SUB_K)
    tile_SN = s_S[:, None] * num_rows + n_N[None, :]
    # From here on offsets are relative to the block, and fit 32 bits.
    num_live = tl.minimum(BLOCK_K, num_columns - first)
    coupling_ptr += first.to(tl.int64) * stride_j + first
    start_ptr += first.to(tl.int64) * num_rows
    pull_ptr += first.to(tl.int64) * num_rows
    codes_ptr += first.to(tl.int64) * num_rows
    inverse_power_ptr += first
    group_ptr += first
    for sub in range(0, num_live, SUB_K):
        live_S = sub + s_S < num_live
        live_SN = live_S[:, None] & live_N[None, :]
        sum_SN = tl.zeros([SUB_K, BLOCK_N], tl.float32)
        # The last round, of the sub-block on itself, adds zeros: it brings what the next loop reads into the cache.
        for before in range(0, sub + SUB_K, SUB_K):
            at_SS = (before + s_S)[None, :] * stride_j + (sub + s_S)[:, None]
            in_bounds_SS = live_S[:, None] & (before + s_S < num_live)[None, :]
            coupling_SS = tl.load(coupling_ptr + at_SS, mask=in_bounds_SS, other=0.0)
            coupling_SS = tl.where((before + s_S)[None, :] < (sub + s_S)[:, None], coupling_SS, 0.0)
            is_done_SN = live_N[None, :] & (before + s_S < sub)[:, None]
            change_SN = tl.load(change_ptr + before * num_rows + tile_SN, mask=is_done_SN, other=0.0)
            sum_SN = tl.dot(coupling_SS, change_SN, sum_SN, input_precision="ieee")
        at_SN = sub * num_rows + tile_SN
        inverse_power_S = tl.load(inverse_power_ptr + sub + s_S, mask=live_S, other=0.0)
        pull_SN = tl.load(pull_ptr + at_SN, mask=live_SN, other=0.0) + sum_SN
        target_SN = tl.load(start_ptr + at_SN, mask=live_SN, other=0.0) + pull_SN * inverse_power_S[:, None]
        for s in range(0, tl.minimum(SUB_K, num_live - sub)):
            at_N = (sub + s) * num_rows + n_N
            grid_N = tl.load(group_ptr + sub + s) * num_rows + n_N
            scale_N = tl.load(scale_ptr + grid_N, mask=live_N, other=1.0)
            inverse_N = tl.load(inverse_scale_ptr + grid_N, mask=live_N, other=1.0)
            zero_N = tl.load(zero_ptr + grid_N, mask=live_N, other=0.0)
            start_N = tl.load(start_ptr + at_N, mask=live_N, other=0.0)
            # Columns up to this one change too; nobody reads them again.
            coupling_S = tl.load(coupling_ptr + (sub + s) * stride_j + sub + s_S, mask=live_S, other=0.0)
            code_N = encode(take(target_SN, s_S, s), scale_N, inverse_N, zero_N, MAX_CODE)
            change_N = start_N - (code_N - zero_N) * scale_N
            target_SN += change_N[None, :] * (coupling_S * inverse_power_S)[:, None]
            tl.store(codes_ptr + at_N, code_N.to(tl.int32).to(tl.uint8), mask=live_N)
            tl.store(change_ptr + at_N, change_N, mask=live_N)
        tl.debug_barrier()  # the next sub-block reads these changes


@triton.jit
def tf32_part(x):
    """``x`` rounded to TF32 (10 bits of mantissa, half up in magnitude)."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def normal_equations(
    centred_ptr,
    gram_ptr,
    shift_ptr,
    normal_ptr,
    num_rows,
    num_columns,
    num_groups,
    stride_n,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_TILES: tl.constexpr,
):
    """Entries (i, j) and (j, i) of the normal equations of some rows.

    Centred codes are whole numbers below 2^9, exact in TF32; the Gram block is split into two TF32 numbers.
    """
    i, j = tl.program_id(1), tl.program_id(2)
    if i <= j:
        g_g = tl.arange(0, GROUP)
        a_g, b_g = i * GROUP + g_g, j * GROUP + g_g
        live_a, live_b = a_g < num_columns, b_g < num_columns
        # Read transposed (the matrix is symmetric), with the axis that is summed over contiguous.
        block_ptr_ab = gram_ptr + b_g.to(tl.int64)[None, :] * num_columns + a_g[:, None]
        gram_ab = tl.load(block_ptr_ab, mask=live_a[:, None] & live_b[None, :], other=0.0)
        gram_ab += tl.where(a_g[:, None] == b_g[None, :], tl.load(shift_ptr), 0.0)
        high_ab = tf32_part(gram_ab)
        low_ab = tf32_part(gram_ab - high_ab)
        for tile in range(NUM_TILES):
            n_N = (tl.program_id(0) * NUM_TILES + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
            live_N = n_N < num_rows
            row_ptr_N1 = centred_ptr + n_N.to(tl.int64)[:, None] * stride_n
            left_Na = tl.load(row_ptr_N1 + a_g[None, :], mask=live_N[:, None] & live_a[None, :], other=0)
            right_Nb = tl.load(row_ptr_N1 + b_g[None, :], mask=live_N[:, None] & live_b[None, :], other=0)
            left_Na = left_Na.to(tl.float32)
            product_Nb = tl.dot(left_Na, low_ab, input_precision="tf32")
            product_Nb = tl.dot(left_Na, high_ab, product_Nb, input_precision="tf32")
            entry_N = tl.sum(product_Nb * right_Nb.to(tl.float32), axis=1)
            at_N = n_N.to(tl.int64) * num_groups * num_groups
            tl.store(normal_ptr + at_N + i * num_groups + j, entry_N, mask=live_N)
            tl.store(normal_ptr + at_N + j * num_groups + i, entry_N, mask=live_N)
