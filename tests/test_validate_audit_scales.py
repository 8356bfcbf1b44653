"""Channel scales: the weighted median, by its definition."""

from __future__ import annotations

import torch

from qconv.validate.audit_scales import Scales


def weighted_median(log_K: torch.Tensor, error_K: torch.Tensor) -> float:
    """The least value with half of the weight at or below it."""
    weight_K = error_K.pow(-2)
    return min(float(x) for x in log_K if float(weight_K[log_K <= x].sum()) >= float(weight_K.sum()) / 2)


def test_the_middle_under_other_errors_and_another_factor() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 8, 301):
        scales = Scales.of(torch.rand(size, generator=generator) + 0.1, torch.full((size,), 0.02))
        other_K = torch.rand(size, generator=generator).double() + 0.01
        assert scales.middle() == weighted_median(scales.log_K, scales.error_K)
        assert scales.weighted(other_K).middle() == weighted_median(scales.log_K, other_K)
        assert (scales + scales).middle() == 2 * scales.middle()
