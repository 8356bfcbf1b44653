"""Whether a tensor holds NaN or infinity, in one pass and without temporaries.

A sum over NaN or infinity is never finite again, so a finite sum proves that all is finite. The sum of finite numbers
may overflow; only then each of them is looked at.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def is_surely_finite(x: Tensor) -> Tensor:
    """bool [] on the device of ``x``, which is not waited for; False may also mean that the sum overflowed."""
    return x.sum().isfinite()


def all_finite(x: Tensor) -> bool:
    """Whether no element of a floating-point tensor, any shape, is NaN or infinite; waits for the device."""
    return math.isfinite(float(x.sum())) or bool(torch.isfinite(x).all())
