"""float8 weights and activations against compressed-tensors' own quantizer."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams

from qconv.errors import NumericsError
from qconv.quantize.fp8 import fake_quantize_per_token, quantize_per_channel, to_fp8
from qconv.types import Scheme

FP8 = Scheme(kind="float", bits=8, group_size=-1, dynamic_activations=True)


def weight(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(64, 384, generator=generator) * torch.exp(torch.randn(64, 1, generator=generator)) * 0.02


def test_channel_scales_and_codes_agree_with_compressed_tensors() -> None:
    w = weight()
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="channel")
    scale, _ = calculate_qparams(w.amin(1, keepdim=True), w.amax(1, keepdim=True), args)
    q = quantize_per_channel(w, FP8, "w")
    assert torch.equal(q.scales_NG, scale.bfloat16().float())
    reference = fake_quantize(w, q.scales_NG, torch.zeros_like(scale), args)
    assert torch.equal(q.dequantize(), reference)
    assert q.codes_NK.dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("num_candidates", [1, 8])
@pytest.mark.parametrize("magnitude", [1e-37, 1e-7, 1e-3, 1.0, 1e4])
def test_codes_saturate_and_no_readers_cast_changes_a_scale(num_candidates: int, magnitude: float) -> None:
    w = weight() * magnitude
    q = quantize_per_channel(w, FP8, "w", num_candidates=num_candidates)
    assert bool(torch.isfinite(q.codes_NK.float()).all())
    assert torch.equal(q.scales_NG.bfloat16().float(), q.scales_NG)
    assert torch.equal(q.scales_NG.half().float(), q.scales_NG)
    # A scale that was rounded down puts the largest weight above 448; half a step of e4m3 is 1/16 relative.
    assert bool((q.scales_NG * 448 < w.abs().amax(1, keepdim=True)).any()) or num_candidates > 1 or magnitude < 1
    error = (q.dequantize() - w).abs()
    assert bool((error <= w.abs() / 16 + q.scales_NG * 2.0**-10 * 1.01).all())


def test_weights_too_large_for_a_float16_scale_are_refused() -> None:
    with pytest.raises(NumericsError, match=r"up_proj.*too large"):
        quantize_per_channel(weight() * 1e30, FP8, "up_proj")


def test_overflow_saturates_where_the_bare_cast_gives_nan() -> None:
    x = torch.tensor([1000.0, -1000.0, 460.0, 448.0])
    assert bool(torch.isnan(x.to(torch.float8_e4m3fn).float()).any()) or float(x.to(torch.float8_e4m3fn)[0]) == 448
    assert to_fp8(x, torch.tensor(1.0)).float().tolist() == [448.0, -448.0, 448.0, 448.0]


def test_zero_channels_and_non_finite_weights() -> None:
    w = weight()
    w[5] = 0
    q = quantize_per_channel(w, FP8, "w")
    assert float(q.scales_NG[5]) == 1.0
    assert bool((q.dequantize()[5] == 0).all())
    w[7, 3] = float("nan")
    with pytest.raises(NumericsError, match=r"up_proj.*found 1 of"):
        quantize_per_channel(w, FP8, "up_proj")


def test_search_lowers_the_weighted_error() -> None:
    w = weight()
    importance_K = torch.rand(384, generator=torch.Generator().manual_seed(1)) ** 3

    def loss(**options: object) -> torch.Tensor:
        back = quantize_per_channel(w, FP8, "w", **options).dequantize()  # type: ignore[arg-type]
        return ((back - w).square() * importance_K).sum(1)

    searched = loss(column_importance_K=importance_K, num_candidates=16)
    assert bool((searched <= loss() * (1 + 1e-5)).all())
    assert float(searched.sum()) < float(loss(num_candidates=16).sum()) < float(loss().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_per_token_activations_agree_with_compressed_tensors(dtype: torch.dtype) -> None:
    x = (torch.randn(3, 17, 384, generator=torch.Generator().manual_seed(2)) * 3).to(dtype)
    ours = fake_quantize_per_token(x)
    assert ours.dtype == dtype
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="token", dynamic=True)
    tokens = x.float().reshape(-1, 384)
    scale, zero = calculate_qparams(tokens.amin(1, keepdim=True), tokens.amax(1, keepdim=True), args)
    reference = fake_quantize(tokens, scale, zero.to(scale.dtype), args).reshape(x.shape).to(dtype)
    assert torch.equal(ours, reference)
    # Tokens do not see each other.
    assert torch.equal(fake_quantize_per_token(x[:, 4:5]), ours[:, 4:5])


def test_per_token_edge_cases() -> None:
    x = torch.zeros(2, 8)
    assert torch.equal(fake_quantize_per_token(x), x)
    x[1, 2] = float("inf")
    with pytest.raises(NumericsError, match="lm_head"):
        fake_quantize_per_token(x, "lm_head")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_gives_the_same_codes() -> None:
    on_gpu = quantize_per_channel(weight().cuda(), FP8, "w")
    on_cpu = quantize_per_channel(weight(), FP8, "w")
    assert torch.equal(on_gpu.scales_NG.cpu(), on_cpu.scales_NG)
    assert torch.equal(on_gpu.codes_NK.cpu().view(torch.uint8), on_cpu.codes_NK.view(torch.uint8))
    x = weight(3)
    assert torch.equal(fake_quantize_per_token(x.cuda()).cpu(), fake_quantize_per_token(x))
