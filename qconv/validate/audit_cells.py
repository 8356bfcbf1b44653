"""Which base a 4-bit candidate was merged into, told from how its rounding errors are spread.

A 4-bit candidate's own rounding hides the difference between the original 16-bit weights and the base that was
rounded from them: both are about a tenth of the weight. Their shapes differ. The candidate's grid is even, so its
error does not depend on where a weight lay on the base's grid. The levels of NF4 (Dettmers et al. 2023, appendix E)
and FP4 are uneven: in a wide cell between two levels the original weights lie further from the level. So, with the
error in units of the largest weight of its block of 64, the mean square error of each level is regressed on the
variance that weights spread evenly over that level's cell would have. The slope is near 1 when the adapter was
merged into the original weights, and near 0 or below when it was merged into the dequantized ones.

Measured on SmolLM2-135M, 20 weights each: GPTQ of a merge into the original weights 0.66 to 1.06; of one into the
dequantized weights GPTQ -1.12 to -0.18, asymmetric GPTQ -0.76 to 0.08, round to nearest -1.28 to -0.91 (below 0,
because values that share a level also share their place on the candidate's grid).

The outermost three levels of each side are left out: there the candidate's grid clips, and errors grow for that
reason. Left out: weights with scales folded into them, float8 and 4-bit floats (their errors grow with the weight),
other grids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qconv.validate.audit_words import finding

BLOCK = 64
_OUTER = 3
_LARGEST_ERROR = 0.3  # of the weight's norm; more is no rounding error
MOST_ELEMENTS = 1 << 19
LEAST_SLOPE = 0.5
LEAST_WEIGHTS = 4


@torch.no_grad()
def cell_slope(stored: Tensor, expected: Tensor, base: Tensor, levels: Tensor) -> float | None:
    """Slope of the squared error on the variance of a level's cell, over a part of one weight.

    Args:
        stored, expected, base: what the candidate holds, what the merge gives, and the base as training saw it,
            same shape, any float dtype; the base lies on its 4-bit grid in blocks of 64 along the rows.
        levels: float32 ``[16]``, ascending, from -1 to 1.

    Returns:
        None where it would say nothing: errors that are no rounding, or a base on another grid.
    """
    num = min(MOST_ELEMENTS, base.numel()) // BLOCK * BLOCK
    base_BE = base.flatten()[:num].view(-1, BLOCK).float()
    expected_BE = expected.flatten()[:num].view(-1, BLOCK).float()
    error_BE = stored.flatten()[:num].view(-1, BLOCK).float() - expected_BE
    if not num or error_BE.norm() > _LARGEST_ERROR * expected_BE.norm():
        return None
    largest_B1 = base_BE.abs().amax(1, keepdim=True).clamp_min(1e-30)
    levels = levels.to(base_BE.device)
    edges = (levels[1:] + levels[:-1]) / 2
    codes_BE = torch.bucketize((base_BE / largest_B1).contiguous(), edges)
    if (base_BE / largest_B1 - levels[codes_BE]).abs().max() > 0.02:
        return None
    squares_BE = (error_BE / largest_B1).square().double()
    counts = torch.bincount(codes_BE.flatten(), minlength=16).double()
    means = torch.bincount(codes_BE.flatten(), squares_BE.flatten(), minlength=16) / counts.clamp_min(1)
    inner = slice(_OUTER, 16 - _OUTER)
    above, below = edges[inner] - levels[inner], levels[inner] - edges[_OUTER - 1 : 15 - _OUTER]
    variances = ((above**3 + below**3) / (3 * (above + below))).double()
    weights = counts[inner]
    if float(weights.min()) < BLOCK:
        return None
    x = variances - (weights * variances).sum() / weights.sum()
    y = means[inner] - (weights * means[inner]).sum() / weights.sum()
    return float((weights * x * y).sum() / (weights * x * x).sum())


def cell_findings(slopes: Mapping[str, float]) -> list[dict[str, Any]]:
    """The finding for a candidate whose errors are spread like those of the base's own rounding, if they are."""
    if len(slopes) < LEAST_WEIGHTS:
        return []
    mean = sum(slopes.values()) / len(slopes)
    if mean < LEAST_SLOPE:
        return []
    return [
        finding(
            "error",
            "wrong-base",
            "made from the original 16-bit base",
            f"the errors of {len(slopes)} weights are larger where the base was rounded more coarsely (slope "
            f"{mean:.2f}; 1 = the adapter was merged into the weights that the 4-bit base was made from, 0 = into the "
            "4-bit base): merge it into the dequantized base that it was trained on",
            list(slopes),
        )
    ]
