"""The 4-bit floating-point numbers of MXFP4 and NVFP4: one sign bit, two of exponent, one of mantissa.

Source: OCP Microscaling Formats specification 1.0 (2023), section 5.3.3. A code is a nibble: bit 3 is the sign, the
others are the place of the magnitude in ``0, 0.5, 1, 1.5, 2, 3, 4, 6``.

Rounding points: to the nearest number, ties to the even mantissa, saturated at 6; what rounds to zero is the positive
zero. A stored negative zero (code 8) reads as zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX = 6.0
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SIGN = 8


def encode(x: Tensor) -> Tensor:
    """The codes of the numbers nearest to ``x``, whole numbers in ``0 .. 15`` in the dtype of ``x``."""
    magnitude = x.abs()
    # Steps are 0.5 up to 2, 1 up to 4, 2 above: the place on the finest that applies is the smallest of the three.
    code = torch.minimum(magnitude.mul(2).round_(), magnitude.round().add_(2))
    code = torch.minimum(code, magnitude.mul_(0.5).round_().add_(4)).clamp_(max=7)
    return code.add_(((x < 0) & (code > 0)).to(x.dtype), alpha=SIGN)


def decode(codes: Tensor) -> Tensor:
    """The numbers that codes stand for, float32 of the same shape."""
    numbers = torch.tensor((*MAGNITUDES, *(-m for m in MAGNITUDES)), device=codes.device)
    return numbers.add_(0.0)[codes.int()]  # adding zero makes the negative zero a positive one


def nearest(x: Tensor) -> Tensor:
    """``x`` rounded to the nearest number, `decode` of `encode` without the codes."""
    magnitude = x.abs().clamp_max_(MAX)
    # Up to 2 the step is 0.5; from there on the power of two below the number, halved.
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return magnitude.div_(step).round_().mul_(step).copysign_(x).add_(0.0)
