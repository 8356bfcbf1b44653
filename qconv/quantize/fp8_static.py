"""float8 with scales of inputs that are found by calibration and stored, one for each linear's input.

Method: the "FP8" preset of compressed-tensors (FP8 Formats for Deep Learning, Micikevicius et al. 2022, section 3):
one scale for all inputs of a linear and one for its whole weight, both shared by linears that share an input, since
engines fuse those into one product with one scale each. The weight's scale is searched as in `fp8.py`.

The input scale is the power of two with which the largest magnitude in calibration is just not clipped. float8's
precision is relative, so a smaller scale gains nothing but for values 2^15 below the largest; what is clipped is lost.
On SmolLM2-135M (4,096 tokens, KL to the 16-bit model): 0.0285; half of it 0.099, twice 0.0295, sixteen times 0.053;
the largest magnitude / 448 0.0287; the power of two with the least squared error of inputs, or of outputs, 0.0290;
the 99.99th percentile of magnitudes 0.98. With dynamic scales 0.0252, and with weights by channel too 0.0207.

Rounding points: the weight's scale once, to a number that bfloat16 and float16 both hold. The input scale needs none:
a power of two divides exactly, so readers that multiply by its reciprocal (vLLM's kernels) or divide in 16 bits
(compressed-tensors) round alike. Codes of inputs round to nearest even and saturate at 448.

Left out: scales per channel of weights beside static inputs (only some engines' kernels take both), e5m2.

Legend: N = out features, K = in features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qconv.quantize.fp8 import FP8_MAX, quantize_per_channel, to_fp8
from qconv.quantize.grid import check_finite
from qconv.quantize.sample import InputSample
from qconv.types import QuantizedLinear, Scheme

MIN_EXPONENT = -24  # of the smallest float16


def quantize_per_tensor(
    weights: Sequence[Tensor], input_scale: Tensor, scheme: Scheme, name: str, *, num_candidates: int = 1
) -> list[QuantizedLinear]:
    """float8_e4m3fn codes of linears that share an input, with one scale for all of them.

    Args:
        weights: float32 ``[N_i, K]`` each.
        input_scale: ``[1]`` float32.
        scheme: a ``"float"`` scheme with static activations.
        name: the weights, for messages.
        num_candidates: see `fp8.quantize_per_channel`.

    Raises:
        NumericsError: NaN or infinity in the weights, or weights too large for a float16 scale.
    """
    stacked_NK = torch.cat(list(weights))
    as_one_row = quantize_per_channel(stacked_NK.reshape(1, -1), scheme, name, num_candidates=num_candidates)
    parts = torch.split(as_one_row.codes_NK.view(stacked_NK.shape), [len(w_NK) for w_NK in weights])
    return [
        replace(
            as_one_row,
            codes_NK=codes_NK.contiguous(),
            scales_NG=as_one_row.scales_NG.expand(len(codes_NK), 1).contiguous(),
            input_scale=input_scale,
        )
        for codes_NK in parts
    ]


def choose_input_scale(sample: InputSample) -> Tensor:
    """``[1]`` float32: the smallest power of two that clips nothing which calibration saw; 1 where all was zero."""
    largest = float(sample.max_abs_K.max())
    exponent = math.ceil(math.log2(largest / FP8_MAX)) if largest > 0 else 0
    return sample.max_abs_K.new_tensor([2.0 ** max(exponent, MIN_EXPONENT)])


def fake_quantize_static(x: Tensor, scale: float, name: str = "activation") -> Tensor:
    """What an engine's float8 matmul sees of its input beside a stored scale.

    Args:
        x: ``[..., K]``.
        scale: of all tokens.
        name: the module, for messages.

    Returns:
        The same shape and dtype; clipped at 448 times the scale.

    Raises:
        NumericsError: NaN or infinity in the input.
    """
    check_finite(x, name)
    return to_fp8(x.float(), x.new_tensor(scale, dtype=torch.float32)).float().mul_(scale).to(x.dtype)
