"""The Triton kernels of `distribution`, and their launches: each reads the logits once.

The largest logits: one kernel finds the maximum of every block of `BLOCK` tokens, another searches the blocks with the
largest maxima, which hold the largest logits. Sums over the vocabulary: one kernel adds up a tile of one position.

Rounding points: those of plain PyTorch: differences from the maxima, weights and products in float32, sums of a tile in
float32, of tiles in float64. `_exp` reduces its argument as the C library does: the hardware has a power of two, and
to round what it is given (x times log2 e) would cost a relative 1e-6 where a logit is 20 below the largest.

Dimension legend: T = positions, V = vocabulary, K = top tokens, B = blocks, W = tokens of a tile.
"""

# mypy: ignore-errors
# (Triton's language has no types.)
from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, BLOCKS_AT_ONCE = 256, 16
TILE, WARPS = 4096, 8
MAX_TOP = 8  # blocks that are searched for the largest logits
_BLOCK, _MAX_TOP = tl.constexpr(BLOCK), tl.constexpr(MAX_TOP)
LOWEST = tl.constexpr(-(2**31))  # below what any float becomes in `_order`
LOWEST_KEY = tl.constexpr(-(2**63))
LAST_ID = tl.constexpr(2**31 - 1)
QUIET_NAN = tl.constexpr(0x7FC00000)
LOG2_E = tl.constexpr(1.4426950408889634)
LN2_HIGH, LN2_LOW = tl.constexpr(0.693145751953125), tl.constexpr(1.4286068203094172e-06)  # the first has 15 bits
SMALLEST = tl.constexpr(-87.0)  # exp of less is no normal float32


@triton.jit
def _order(x):
    """Integers in the order of float32 values: NaN on top, both zeros alike."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ LAST_ID, bits)
    bits = tl.where(bits == -1, 0, bits)  # minus zero
    return tl.where(x != x, QUIET_NAN, bits)


@triton.jit
def _keys(order, ids):
    """Integers in which larger values come first and, of equal ones, lower ids."""
    return (order.to(tl.int64) << 32) | (ids ^ LAST_ID).to(tl.int64)


@triton.jit
def _exp(x):
    """exp of float32 values up to 0, to two units in the last place; 0 where it is no normal number."""
    bounded = tl.maximum(x, SMALLEST)
    whole = tl.floor(bounded * LOG2_E + 0.5)
    rest = (bounded - whole * LN2_HIGH) - whole * LN2_LOW
    power = ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < SMALLEST, 0.0, tl.exp2(rest * LOG2_E) * power)


@triton.jit
def block_maxima_kernel(logits_ptr, maxima_ptr, V, stride, num_blocks, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block_B = tl.program_id(1) * B + tl.arange(0, B)
    id_BW = block_B[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    x_BW = tl.load(logits_ptr + row * stride + id_BW, mask=id_BW < V, other=0.0).to(tl.float32)
    order_BW = tl.where(id_BW < V, _order(x_BW), LOWEST)
    tl.store(maxima_ptr + row * num_blocks + block_B, tl.max(order_BW, axis=1), mask=block_B < num_blocks)


@triton.jit
def top_kernel(
    logits_ptr, maxima_ptr, top_ptr, ids_ptr, V, stride, num_blocks, K: tl.constexpr, NUM_BLOCKS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    block_B = tl.arange(0, NUM_BLOCKS)
    maxima_B = tl.load(maxima_ptr + row * num_blocks + block_B, mask=block_B < num_blocks, other=LOWEST)
    keys_B = _keys(maxima_B, block_B)
    place_K = tl.arange(0, _MAX_TOP)
    best_K = tl.zeros((_MAX_TOP,), tl.int32)
    for i in tl.static_range(K):
        best = tl.max(keys_B, axis=0)
        best_K = tl.where(place_K == i, ((best & LAST_ID) ^ LAST_ID).to(tl.int32), best_K)
        keys_B = tl.where(keys_B == best, LOWEST_KEY, keys_B)
    id_KW = best_K[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    is_in = (place_K < K)[:, None] & (id_KW < V)
    x_KW = tl.load(logits_ptr + row * stride + id_KW, mask=is_in, other=0.0).to(tl.float32)
    keys_KW = tl.where(is_in, _keys(_order(x_KW), id_KW), LOWEST_KEY)
    for i in tl.static_range(K):
        best = tl.max(tl.max(keys_KW, axis=1), axis=0)
        keys_KW = tl.where(keys_KW == best, LOWEST_KEY, keys_KW)
        found = (best & LAST_ID) ^ LAST_ID
        tl.store(ids_ptr + row * K + i, found)
        tl.store(top_ptr + row * K + i, tl.load(logits_ptr + row * stride + found))


@triton.jit
def totals_kernel(logits_ptr, max_ptr, sums_ptr, V, stride, W: tl.constexpr):
    row, tile, num_tiles = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    id_W = tile * W + tl.arange(0, W)
    is_in = id_W < V
    x_W = tl.load(logits_ptr + row * stride + id_W, mask=is_in, other=0.0).to(tl.float32) - tl.load(max_ptr + row)
    tl.store(sums_ptr + row * num_tiles + tile, tl.sum(tl.where(is_in, _exp(x_W), 0.0), axis=0))


@triton.jit
def sums_kernel(p_ptr, q_ptr, p_max_ptr, q_max_ptr, sums_ptr, V, p_stride, q_stride, W: tl.constexpr):
    row, tile, num_tiles = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    id_W = tile * W + tl.arange(0, W)
    is_in = id_W < V
    p_W = tl.load(p_ptr + row * p_stride + id_W, mask=is_in, other=0.0).to(tl.float32)
    q_W = tl.load(q_ptr + row * q_stride + id_W, mask=is_in, other=0.0).to(tl.float32)
    p_W = tl.where(is_in, p_W - tl.load(p_max_ptr + row), 0.0)
    q_W = tl.where(is_in, q_W - tl.load(q_max_ptr + row), 0.0)
    distance_W = p_W - q_W  # 0 beyond the vocabulary
    weight_p_W, weight_q_W = _exp(p_W), _exp(q_W)
    sums = sums_ptr + row * 4 * num_tiles + tile
    tl.store(sums, tl.sum(tl.where(is_in, weight_p_W, 0.0), axis=0))
    tl.store(sums + num_tiles, tl.sum(tl.where(is_in, weight_q_W, 0.0), axis=0))
    tl.store(sums + 2 * num_tiles, tl.sum(weight_p_W * distance_W, axis=0))
    tl.store(sums + 3 * num_tiles, tl.sum(-weight_q_W * distance_W, axis=0))


def top_tokens(logits_TV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest logits and their ids, in order; see `distribution.top_tokens`. At most `MAX_TOP`."""
    num, size = logits_TV.shape
    num_blocks = triton.cdiv(size, BLOCK)
    maxima_TB = logits_TV.new_empty(num, num_blocks, dtype=torch.int32)
    top_TK, ids_TK = logits_TV.new_empty(num, k), logits_TV.new_empty(num, k, dtype=torch.int64)
    with _on_device(logits_TV):
        block_maxima_kernel[num, triton.cdiv(num_blocks, BLOCKS_AT_ONCE)](
            logits_TV, maxima_TB, size, logits_TV.stride(0), num_blocks, B=BLOCKS_AT_ONCE, num_warps=WARPS
        )
        top_kernel[(num,)](
            logits_TV,
            maxima_TB,
            top_TK,
            ids_TK,
            size,
            logits_TV.stride(0),
            num_blocks,
            K=k,
            NUM_BLOCKS=max(MAX_TOP, triton.next_power_of_2(num_blocks)),  # blocks that are not there come last
        )
    return top_TK, ids_TK


def totals(logits_TV: Tensor, max_T: Tensor) -> Tensor:
    """Sum of ``exp(logit - max)`` over the vocabulary, float64 ``[T]``."""
    num, size = logits_TV.shape
    sums_TP = max_T.new_empty(num, triton.cdiv(size, TILE))
    with _on_device(logits_TV):
        totals_kernel[sums_TP.shape](logits_TV, max_T, sums_TP, size, logits_TV.stride(0), W=TILE, num_warps=WARPS)
    return sums_TP.sum(-1, dtype=torch.float64)


def divergence_sums(p_TV: Tensor, q_TV: Tensor, p_max_T: Tensor, q_max_T: Tensor) -> Tensor:
    """The sums of `distribution.Distribution.divergence_sums`, float64 ``[T, 4]``."""
    num, size = p_TV.shape
    sums_T4P = p_max_T.new_empty(num, 4, triton.cdiv(size, TILE))
    with _on_device(p_TV):
        sums_kernel[num, sums_T4P.shape[2]](
            p_TV,
            q_TV,
            p_max_T,
            q_max_T,
            sums_T4P,
            size,
            p_TV.stride(0),
            q_TV.stride(0),
            W=TILE,
            num_warps=WARPS,
        )
    return sums_T4P.sum(-1, dtype=torch.float64)


def _on_device(tensor: Tensor):
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
