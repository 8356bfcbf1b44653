"""Weights and activations in 8-bit floating point (float8_e4m3fn).

Method: one scale per output channel, absmax / 448, for weights; one scale per token, found at run time, for
activations (FP8 Formats for Deep Learning, Micikevicius et al. 2022, section 3; the "FP8_DYNAMIC" preset of
compressed-tensors, per-token dynamic quantization of vLLM). Or one scale per block of weights, and per token and
group of features for activations (DeepSeek-V3 technical report, 2024, section 3.3.2). Optionally the weight scale is
searched: a power of two changes nothing but the reach of the subnormals, the mantissa of the scale decides where the
weights fall.

Rounding points: a channel's scale is rounded once, to a number that bfloat16 and float16 both hold; a block's is the
float32 quotient as it is, which formats store in float32. Codes are chosen after that. The cast to float8_e4m3fn
rounds to nearest even; it turns overflow into NaN, so values are clamped to 448 first.

Static activation scales are in `fp8_static.py`.

Left out: e5m2, scales that are powers of two (ue8m0).

Legend: N = out features, K = in features, T = tokens, B = blocks of rows, r = rows of a block, G = groups of columns,
g = columns of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qconv.errors import SchemeError
from qconv.quantize.grid import (
    CPU_CHUNK,
    GPU_CHUNK,
    MIN_SCALE,
    check_finite,
    check_scale,
    groups_of,
    round_scale,
    row_chunks,
    ungroup,
)
from qconv.types import QuantizedLinear, Scheme

FP8_MAX = 448.0
MIN_TOKEN_SCALE = 1.0 / (FP8_MAX * 512.0)  # vLLM's floor for dynamic scales
MIN_GROUP_SCALE = 1e-10 / FP8_MAX  # and for those of groups
MIN_BLOCK_SCALE = torch.finfo(torch.float32).tiny  # below it, devices differ


def quantize_per_channel(
    w_NK: Tensor,
    scheme: Scheme,
    name: str,
    *,
    column_importance_K: Tensor | None = None,
    num_candidates: int = 1,
) -> QuantizedLinear:
    """float8_e4m3fn codes and one scale per output channel, exact in bfloat16 and float16.

    Args:
        w_NK: ``[N, K]`` float32.
        scheme: a ``"float"`` scheme with ``group_size=-1``.
        name: the weight, for messages.
        column_importance_K: ``[K]`` weights of the squared error, the diagonal of the Gram matrix.
        num_candidates: scales tried per channel, ``absmax / 448 * 2**(i / num_candidates)``; 1 = the plain scale.

    Raises:
        NumericsError: NaN or infinity in the weights, or weights too large for a float16 scale.
    """
    check_finite(w_NK, name)
    importance_K = torch.ones_like(w_NK[0]) if column_importance_K is None else column_importance_K
    codes_NK = torch.empty_like(w_NK, dtype=torch.float8_e4m3fn)
    scales_N1 = torch.empty_like(w_NK[:, :1])
    for rows in row_chunks(w_NK):
        w_nK = w_NK[rows]
        plain_n1 = w_nK.abs().amax(dim=1, keepdim=True) / w_nK.new_tensor(FP8_MAX)
        best_n1 = _round_weight_scale(plain_n1)
        if num_candidates > 1:
            best_loss_n1 = torch.full_like(best_n1, torch.inf)
            for i in range(num_candidates):
                scale_n1 = _round_weight_scale(plain_n1 * 2.0 ** (i / num_candidates))
                error_nK = to_fp8(w_nK, scale_n1).float().mul_(scale_n1).sub_(w_nK)
                loss_n1 = error_nK.square_().mv(importance_K).unsqueeze(1)
                better_n1 = loss_n1 < best_loss_n1
                best_n1 = torch.where(better_n1, scale_n1, best_n1)
                best_loss_n1 = torch.where(better_n1, loss_n1, best_loss_n1)
        codes_NK[rows] = to_fp8(w_nK, best_n1)
        scales_N1[rows] = best_n1
    check_scale(scales_N1, name)
    return QuantizedLinear(codes_NK=codes_NK, scales_NG=scales_N1, zeros_NG=None, group_index_K=None, scheme=scheme)


def quantize_per_block(w_NK: Tensor, scheme: Scheme, name: str, *, num_candidates: int = 1) -> QuantizedLinear:
    """float8_e4m3fn codes and one float32 scale per block of rows and columns; last blocks may be partial.

    Args:
        w_NK: ``[N, K]`` float32.
        scheme: a ``"float"`` scheme with ``block_rows`` and ``group_size``.
        name: the weight, for messages.
        num_candidates: scales tried per block, ``absmax / 448 * 2**(i / num_candidates)``; 1 = the plain scale.

    Raises:
        NumericsError: NaN or infinity in the weights.
        SchemeError: the scheme has no blocks.
    """
    if scheme.kind != "float" or scheme.group_size == -1:
        raise SchemeError(f"{name}: expected a float8 scheme with blocks, got {scheme}")
    check_finite(w_NK, name)
    (n, k), size = w_NK.shape, scheme.block_rows
    codes_NK = torch.empty_like(w_NK, dtype=torch.float8_e4m3fn)
    scales_BG = w_NK.new_empty(scheme.scales_shape(n, k))
    num_blocks = max(1, (GPU_CHUNK if w_NK.is_cuda else CPU_CHUNK) // (size * k))
    for first in range(0, len(scales_BG), num_blocks):
        rows = slice(first * size, min((first + num_blocks) * size, n))
        w_rK = torch.nn.functional.pad(w_NK[rows], (0, 0, 0, -(rows.stop - rows.start) % size))
        w_BrGg = groups_of(w_rK, scheme.group_size)
        w_BrGg = w_BrGg.view(-1, size, *w_BrGg.shape[1:])
        scale_B1G1 = _block_scale(w_BrGg, num_candidates)
        scales_BG[first : first + num_blocks] = scale_B1G1[:, 0, :, 0]
        codes_NK[rows] = ungroup(to_fp8(w_BrGg, scale_B1G1).flatten(0, 1), k)[: rows.stop - rows.start]
    return QuantizedLinear(codes_NK=codes_NK, scales_NG=scales_BG, zeros_NG=None, group_index_K=None, scheme=scheme)


def _block_scale(w_BrGg: Tensor, num_candidates: int) -> Tensor:
    """``[B, 1, G, 1]``: the candidate with the smallest squared error; 1 for blocks of zeros."""
    plain = w_BrGg.abs().amax(dim=(1, 3), keepdim=True) / w_BrGg.new_tensor(FP8_MAX)
    plain = torch.where(plain == 0, 1.0, plain.clamp_min(MIN_BLOCK_SCALE))
    best, best_loss = plain, torch.full_like(plain, torch.inf)
    for i in range(num_candidates if num_candidates > 1 else 0):
        scale = plain * 2.0 ** (i / num_candidates)
        error_BrGg = to_fp8(w_BrGg, scale).float().mul_(scale).sub_(w_BrGg)
        loss = error_BrGg.square_().sum(dim=(1, 3), keepdim=True)
        best, best_loss = torch.where(loss < best_loss, scale, best), torch.minimum(loss, best_loss)
    return best


def to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """``x / scale`` in float8_e4m3fn, saturated at 448 (the bare cast would give NaN)."""
    return x.div(scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def fake_quantize_per_token(x: Tensor, name: str = "activation", group_size: int = -1) -> Tensor:
    """What an engine's float8 matmul sees of its input: per-token dynamic quantization and back.

    Args:
        x: ``[..., K]``; each row along the last axis is one token.
        name: the module, for messages.
        group_size: features of a token that share a scale, as beside weights in blocks; -1 = all.

    Returns:
        The same shape and dtype; scale and product are float32 (as in vLLM), rounded once to the dtype of ``x``.

    Raises:
        NumericsError: NaN or infinity in the input.
    """
    check_finite(x, name)
    x_Gg, floor = groups_of(x.float(), group_size), MIN_TOKEN_SCALE if group_size == -1 else MIN_GROUP_SCALE
    # Divided by a tensor: CUDA replaces a division by a number with a product by its rounded reciprocal.
    scale = x_Gg.abs().amax(dim=-1, keepdim=True).div_(x_Gg.new_tensor(FP8_MAX)).clamp_min_(floor)
    return ungroup(to_fp8(x_Gg, scale).float().mul_(scale), x.shape[-1]).to(x.dtype)


def _round_weight_scale(scale: Tensor) -> Tensor:
    """Nearest number that bfloat16 and float16 both hold (as float32); zero channels get 1.

    Among float16's subnormals a scale that would be cut by more than bfloat16 cuts goes up instead: too small a
    scale would clip the largest weights, too large a one only moves them along float8's exponents.
    """
    rounded = round_scale(scale)
    rounded = torch.where(rounded < scale * (1 - 2.0**-8), round_scale(scale + MIN_SCALE), rounded)
    return torch.where(scale == 0, 1.0, rounded)
