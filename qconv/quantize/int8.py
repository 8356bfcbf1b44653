"""Weights and activations in 8-bit integers (W8A8).

Method: symmetric; one scale per output channel for weights, one per token, found at run time, for activations
(LLM.int8(), Dettmers et al. 2022, section 2.1, without its outlier columns; the "W8A8" preset of compressed-tensors,
per-token dynamic quantization of vLLM). The weight scale is searched (see `grid.search_grid`): 2% less squared error
than the largest magnitude gives on SmolLM2-135M. Scales stay positive: the extra code of negative ones is worth 0.5%
at 8 bits, and engines' integer kernels were not tried with them.

Rounding points: the weight scale once, then codes (see `grid.py`). Activations: the reciprocal 127 / absmax in
float32, the product, then the nearest whole number, half to even, as vLLM's kernel does; codes are in -127 .. 127.

Outliers of activations are moved into the weights in `smooth.py`.

Left out: zero points, static activation scales.

Legend: N = out features, K = in features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qconv.errors import SchemeError
from qconv.quantize.fp4_inputs import fake_quantize_fp4
from qconv.quantize.fp8 import fake_quantize_per_token as fake_quantize_to_fp8
from qconv.quantize.grid import check_finite
from qconv.quantize.rtn import rtn
from qconv.types import QuantizedLinear, Scheme

INT8_MAX = 127.0
TINY = torch.finfo(torch.float32).tiny


def quantize_per_channel(
    w_NK: Tensor, scheme: Scheme, name: str, *, column_importance_K: Tensor | None = None
) -> QuantizedLinear:
    """8-bit codes and one positive scale per output channel, exact in bfloat16 and float16.

    Args:
        w_NK: ``[N, K]`` float32.
        scheme: an 8-bit symmetric integer scheme with ``group_size=-1``.
        name: the weight, for messages.
        column_importance_K: ``[K]`` weights of the squared error, the diagonal of the Gram matrix.

    Raises:
        NumericsError: NaN or infinity in the weights, or weights too large for a float16 scale.
        SchemeError: another scheme.
    """
    if (scheme.kind, scheme.bits, scheme.symmetric, scheme.group_size) != ("int", 8, True, -1):
        raise SchemeError(f"{name}: expected 8-bit symmetric integers with one scale per channel, got {scheme}")
    return rtn(w_NK, scheme, name, mse=True, column_importance_K=column_importance_K, signed_scales=False)


def fake_quantize_per_token(x: Tensor, name: str = "activation") -> Tensor:
    """What an engine's int8 matmul sees of its input: per-token dynamic quantization and back.

    Args:
        x: ``[..., K]``; each row along the last axis is one token.
        name: the module, for messages.

    Returns:
        The same shape and dtype; computed in float32, rounded once to the dtype of ``x``.

    Raises:
        NumericsError: NaN or infinity in the input.
    """
    check_finite(x, name)
    x_float = x.float()
    absmax = x_float.abs().amax(dim=-1, keepdim=True)
    # Below float32's normal numbers the reciprocal overflows; such tokens are zeros to any kernel.
    reciprocal = (absmax.new_tensor(INT8_MAX) / absmax).where(absmax >= TINY, 0.0)
    codes = x_float.mul(reciprocal).round_().clamp_(-INT8_MAX, INT8_MAX)
    return codes.mul_(absmax / absmax.new_tensor(INT8_MAX)).to(x.dtype)


def fake_quantize_inputs(x: Tensor, scheme: Scheme, name: str = "activation") -> Tensor:
    """What an engine's matmul sees of its input beside weights of ``scheme``: see the functions for each kind.

    Not where a scale of the inputs is stored.

    Raises:
        NumericsError: NaN or infinity in the input.
    """
    if not scheme.dynamic_activations:
        return x
    if scheme.float8_activations:
        return fake_quantize_to_fp8(x, name)
    if scheme.is_fp4:
        return fake_quantize_fp4(x, scheme, name=name)
    if scheme.kind == "int":
        return fake_quantize_per_token(x, name)
    return fake_quantize_to_fp8(x, name, scheme.group_size)
