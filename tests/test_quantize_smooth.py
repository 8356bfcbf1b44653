"""SmoothQuant's scales against equation 4 in float64, and its losses against products of rounded inputs and weights."""

import numpy as np
import pytest
import torch
from torch import Tensor

from qconv.errors import CalibrationError, NumericsError
from qconv.quantize import smooth
from qconv.quantize.int8 import fake_quantize_per_token
from qconv.quantize.rtn import rtn
from qconv.quantize.sample import SAMPLE_TOKENS, InputSample, SampleAccumulator
from qconv.quantize.smooth import ALPHAS, search_smoothing, smoothing_scale
from qconv.types import Scheme

INT8 = Scheme(bits=8, group_size=-1, dynamic_activations=True)


def layer(seed: int = 0, loudness: float = 40.0) -> tuple[list[Tensor], InputSample]:
    """Two linears and their inputs, a few channels of which are outliers, as in language models."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(rows, 256, generator=generator) * 0.03 for rows in (96, 32)]
    loud_K = torch.ones(256)
    loud_K[torch.randperm(256, generator=generator)[:5]] = loudness
    x_tK = torch.randn(300, 256, generator=generator) * loud_K
    return weights, InputSample(x_tK, x_tK.abs().amax(0))


def output_error(weights: list[Tensor], x_tK: Tensor, s_K: Tensor) -> float:
    total = 0.0
    for w_NK in weights:
        rounded_NK = rtn(w_NK * s_K, INT8, "w").dequantize().double()
        y = fake_quantize_per_token(x_tK / s_K).double() @ rounded_NK.T
        total += float((y - x_tK.double() @ w_NK.double().T).square().sum(1).mean())
    return total


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.9])
def test_scale_is_equation_4(alpha: float) -> None:
    weights, sample = layer()
    w_max_K = torch.cat(weights).abs().amax(0)
    ours = smoothing_scale(sample.max_abs_K, w_max_K, alpha).double().numpy()
    x, w = sample.max_abs_K.double().numpy(), w_max_K.double().numpy()
    paper = x**alpha / w ** (1 - alpha)
    np.testing.assert_allclose(ours / ours[0], paper / paper[0], rtol=1e-5)
    assert ours.max() * ours.min() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_search_lowers_the_error_of_rounded_inputs_and_weights(seed: int) -> None:
    weights, sample = layer(seed)
    found = search_smoothing(weights, sample, INT8)
    assert found.loss_before == pytest.approx(output_error(weights, sample.x_tK, torch.ones(256)), rel=1e-4)
    assert found.loss_after == pytest.approx(output_error(weights, sample.x_tK, found.s_K), rel=1e-4)
    assert found.loss_after < 0.2 * found.loss_before
    fixed_K = smoothing_scale(sample.max_abs_K, torch.cat(weights).abs().amax(0), 0.5)
    assert found.loss_after <= output_error(weights, sample.x_tK, fixed_K) * (1 + 1e-4)
    assert found.alpha in ALPHAS
    assert not found.is_idle


def test_no_scales_where_none_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """All alphas but one that moves what the inputs have too much of the wrong way."""
    weights, sample = layer()
    monkeypatch.setattr(smooth, "ALPHAS", (-1.0,))
    found = search_smoothing(weights, sample, INT8)
    assert torch.equal(found.s_K, torch.ones(256))
    assert found.loss_after == found.loss_before
    assert found.is_idle


def test_a_scale_that_must_be_shared_is_judged_as_shared() -> None:
    weights, sample = layer()
    wrong_K = torch.rand(256, generator=torch.Generator().manual_seed(1)) * 100 + 1e-2
    found = search_smoothing(weights, sample, INT8, share=lambda _: wrong_K)
    assert torch.equal(found.s_K, wrong_K)
    assert found.loss_after == pytest.approx(output_error(weights, sample.x_tK, wrong_K), rel=1e-4)
    assert found.loss_after > found.loss_before


def test_channels_without_a_signal_keep_scale_one() -> None:
    weights, sample = layer()
    sample.x_tK[:, 3] = sample.max_abs_K[3] = 0
    for w_NK in weights:
        w_NK[:, 9] = 0
    found = search_smoothing(weights, sample, INT8)
    assert found.s_K[[3, 9]].tolist() == [1.0, 1.0]
    assert not found.is_idle
    silent = InputSample(torch.zeros(4, 256), torch.zeros(256))
    assert torch.equal(search_smoothing(weights, silent, INT8).s_K, torch.ones(256))


def test_bad_weights_are_named() -> None:
    weights, sample = layer()
    weights[1][3, 4] = torch.nan
    with pytest.raises(NumericsError, match="up_proj: weight"):
        search_smoothing(weights, sample, INT8, "up_proj")


# Tokens that are kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_kept_evenly_and_the_largest_of_all_is_known(dtype: torch.dtype) -> None:
    batches = [torch.randn(2, 300, 8, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(4)]
    batches[2][1, 7, 5] = -77.0  # 307 is no multiple of the step: this token is not kept
    sums = SampleAccumulator(8, "cpu", "q_proj", num_batches=4)
    for batch in batches:
        sums.add(batch)
    sample = sums.sample()
    step = -(-600 // (SAMPLE_TOKENS // 4))
    assert torch.equal(sample.x_tK, torch.cat([batch.view(600, 8)[::step] for batch in batches]).float())
    assert len(sample.x_tK) <= SAMPLE_TOKENS
    assert torch.equal(sample.max_abs_K, torch.cat(batches).float().abs().amax((0, 1)))
    assert sample.max_abs_K[5] == 77.0
    assert float(sample.x_tK.abs().max()) < 77.0
    s_K = torch.linspace(0.5, 2, 8)
    scaled = sample.divided_by(s_K)
    assert torch.equal(scaled.x_tK, sample.x_tK / s_K)
    assert torch.equal(scaled.max_abs_K, sample.max_abs_K / s_K)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_inputs_that_are_not_finite_are_named(value: float) -> None:
    sums = SampleAccumulator(3, "cpu", "o_proj", num_batches=1)
    sums.add(torch.ones(5, 3))
    sums.add(torch.tensor([[1.0, value, 2.0]]))
    sums.add(torch.ones(5, 3))
    with pytest.raises(NumericsError, match=r"o_proj: .* 1 of 3 input channels \(first: 1\)"):
        sums.sample()


def test_no_tokens_is_an_error() -> None:
    sums = SampleAccumulator(3, "cpu", "o_proj", num_batches=1)
    sums.add(torch.ones(0, 3))
    with pytest.raises(CalibrationError, match="o_proj"):
        sums.sample()
