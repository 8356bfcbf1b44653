"""How far two tensors of one shape are apart, without a full-size temporary."""

from __future__ import annotations

from torch import Tensor

CHUNK = 1 << 24  # elements


def relative_difference(first: Tensor, second: Tensor) -> float:
    """``||first - second|| / ||second||`` in the Frobenius norm, float64 terms; 0 only when all values are equal."""
    difference = reference = 0.0
    flat_first, flat_second = first.reshape(-1), second.reshape(-1)
    for start in range(0, flat_second.numel(), CHUNK):
        a = flat_first[start : start + CHUNK].double()
        b = flat_second[start : start + CHUNK].double()
        difference += float((a - b).square().sum())
        reference += float(b.square().sum())
    if difference == 0:
        return 0.0
    return float("inf") if reference == 0 else (difference / reference) ** 0.5
