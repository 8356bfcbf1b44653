"""Channel scales: the weighted median, by its definition."""

from __future__ import annotations

import pytest
import torch

from qconv.convert import simulate_weight
from qconv.validate.audit_measure import measure
from qconv.validate.audit_scales import Scales, follows, is_hidden
from qconv.validate.audit_stored import Stored


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


@pytest.mark.parametrize("spread", [0.003, 0.006, 0.02])
def test_a_weak_fold_is_followed_or_cannot_be_refuted(spread: float) -> None:
    """An NF4 base, divided by a norm's scales and rounded to nearest on an integer grid of 4 bits."""
    generator = torch.Generator().manual_seed(0)
    weight_NK = simulate_weight((torch.randn(4096, 256, generator=generator) * 0.02).bfloat16(), "nf4-dq").float()
    norm_K = (torch.randn(256, generator=generator) * spread).exp().bfloat16().float()
    groups_NGK = (weight_NK / norm_K).view(4096, 2, 128)
    low, high = groups_NGK.amin(-1, keepdim=True), groups_NGK.amax(-1, keepdim=True)
    step = (high - low) / 15
    zero = (-low / step).round()
    stored_NK = (((groups_NGK / step).round() + zero).clamp(0, 15) - zero).mul(step).reshape(4096, 256)
    fit = measure(Stored(plain=stored_NK, quantized=None, nearest_is_known=False), weight_NK, None)
    assert fit is not None
    own, wanted = Scales.of(fit.channels.column_K, fit.channels.column_error_K), Scales.of(1 / norm_K)
    assert is_hidden(wanted, own, 0.5 / 15) == (spread < 0.01)
    assert is_hidden(wanted, own, 0.5 / 15) or follows(own, wanted)
    assert not follows(own, -wanted)
    assert not follows(own, Scales.of(norm_K[torch.randperm(256, generator=generator)]))


def test_scales_within_half_a_step_cannot_be_refuted() -> None:
    """A weight on a grid of 4 bits, divided by them and rounded to that grid, is as it was."""
    norm_K = torch.linspace(0.97, 1.03, 256)
    own = Scales.of(torch.ones(256), torch.full((256,), 1e-3))
    assert is_hidden(Scales.of(norm_K), own, half_step=0.5 / 15)
    assert not is_hidden(Scales.of(norm_K), own, half_step=0.5 / 255)
    norm_K[7] = 1.05
    assert not is_hidden(Scales.of(norm_K), own, half_step=0.5 / 15)
