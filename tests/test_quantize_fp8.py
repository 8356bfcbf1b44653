"""float8 weights and activations against compressed-tensors' own quantizer."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from transformers.integrations.finegrained_fp8 import Fp8Quantize
from transformers.utils.quantization_config import FineGrainedFP8Config

from qconv.errors import NumericsError, SchemeError
from qconv.quantize import fp8, int8
from qconv.quantize.fp8 import fake_quantize_per_token, quantize_per_block, quantize_per_channel, to_fp8
from qconv.quantize.rtn import rtn
from qconv.types import Scheme

FP8 = Scheme(kind="float", bits=8, group_size=-1, dynamic_activations=True)
BLOCKS = Scheme(kind="float", bits=8, group_size=128, block_rows=128, dynamic_activations=True)
INT8 = Scheme(bits=8, group_size=-1, dynamic_activations=True)


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


def by_compressed_tensors(w: torch.Tensor, scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """``w`` rounded to float8 in blocks with given scales, and back."""
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="block", block_structure=[rows, columns])
    rounded: torch.Tensor = fake_quantize(w, scale, torch.zeros_like(scale), args)
    return rounded


@pytest.mark.parametrize("num_candidates", [1, 4])
def test_block_codes_agree_with_compressed_tensors(num_candidates: int) -> None:
    w = torch.cat([weight(0), weight(1), weight(2), weight(3)])
    q = quantize_per_block(w, BLOCKS, "w", num_candidates=num_candidates)
    assert (q.codes_NK.dtype, q.scales_NG.dtype, q.scales_NG.shape) == (torch.float8_e4m3fn, torch.float32, (2, 3))
    assert torch.equal(q.dequantize(), by_compressed_tensors(w, q.scales_NG, 128, 128))


def test_block_scales_agree_with_transformers() -> None:
    """It takes the reciprocal of a reciprocal, so its scales are ours but for the last bits, and so are the weights."""
    w = torch.cat([weight(0), weight(1), weight(2), weight(3)])
    w[:128, 128:256] = 0
    quantizer = type("Quantizer", (), {"quantization_config": FineGrainedFP8Config()})()
    theirs = Fp8Quantize(quantizer).convert({"layer.weight": w})
    q = quantize_per_block(w, BLOCKS, "w")
    torch.testing.assert_close(q.scales_NG, theirs["layer.weight_scale_inv"], rtol=3e-7, atol=0)
    assert float(q.scales_NG[0, 1]) == float(theirs["layer.weight_scale_inv"][0, 1]) == 1.0
    differ = q.codes_NK.float() != theirs["layer.weight"].float()
    assert float(differ.double().mean()) < 1e-3


@pytest.mark.parametrize("shape", [(1, 1), (129, 127), (300, 130), (7, 512)])
def test_partial_blocks(shape: tuple[int, int]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    q = quantize_per_block(w, BLOCKS, "w")
    for row in range(0, shape[0], 128):
        for column in range(0, shape[1], 128):
            block = w[row : row + 128, column : column + 128]
            scale = block.abs().max() / 448
            assert q.scales_NG[row // 128, column // 128] == scale
            stored = q.codes_NK[row : row + 128, column : column + 128]
            assert torch.equal(stored.float(), (block / scale).to(torch.float8_e4m3fn).float())


def test_many_blocks_at_once_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(700, 256, generator=torch.Generator().manual_seed(6))
    one_by_one = quantize_per_block(w, BLOCKS, "w", num_candidates=4)
    monkeypatch.setattr(fp8, "CPU_CHUNK", 3 * 128 * 256)
    in_threes = quantize_per_block(w, BLOCKS, "w", num_candidates=4)
    assert torch.equal(in_threes.scales_NG, one_by_one.scales_NG)
    assert torch.equal(in_threes.codes_NK.view(torch.uint8), one_by_one.codes_NK.view(torch.uint8))


def test_block_search_lowers_the_error_of_every_block() -> None:
    w = torch.cat([weight(0), weight(1), weight(2), weight(3)])

    def loss(num_candidates: int) -> torch.Tensor:
        error = quantize_per_block(w, BLOCKS, "w", num_candidates=num_candidates).dequantize() - w
        return error.square().view(2, 128, 3, 128).sum((1, 3))

    assert bool((loss(16) <= loss(1) * (1 + 1e-5)).all())
    assert float(loss(16).sum()) < 0.99 * float(loss(1).sum())


@pytest.mark.parametrize("magnitude", [1e-44, 1e-37, 1e30])
def test_blocks_of_extreme_weights(magnitude: float) -> None:
    w = torch.randn(130, 140, generator=torch.Generator().manual_seed(7)).clamp_(-3, 3) * magnitude
    q = quantize_per_block(w, BLOCKS, "w", num_candidates=2)
    assert bool(torch.isfinite(q.dequantize()).all())
    assert bool((q.scales_NG > 0).all())
    assert float((q.dequantize() - w).abs().max()) <= max(float(w.abs().max()) / 16, 448 * torch.finfo(w.dtype).tiny)


def test_blocks_refuse_what_they_cannot_quantize() -> None:
    with pytest.raises(NumericsError, match=r"up_proj.*found 1 of"):
        quantize_per_block(torch.tensor([[1.0, float("inf")]]), BLOCKS, "up_proj")
    for scheme in (FP8, INT8):
        with pytest.raises(SchemeError, match=r"up_proj: expected a float8 scheme with blocks"):
            quantize_per_block(torch.ones(2, 2), scheme, "up_proj")


def test_activations_in_groups_are_tokens_of_their_own() -> None:
    """As beside block scales: every 128 features of a token are rounded as a token of 128 features is."""
    x = torch.randn(3, 5, 384, generator=torch.Generator().manual_seed(8))
    in_groups = fake_quantize_per_token(x, group_size=128)
    assert torch.equal(in_groups, fake_quantize_per_token(x.view(3, 5, 3, 128)).view(3, 5, 384))
    assert torch.equal(in_groups, int8.fake_quantize_inputs(x, BLOCKS))
    assert torch.equal(fake_quantize_per_token(x), int8.fake_quantize_inputs(x, FP8))
    assert not torch.equal(in_groups, fake_quantize_per_token(x))
    partial = fake_quantize_per_token(x[..., :200], group_size=128)
    assert torch.equal(partial[..., :128], in_groups[..., :128])
    # Small groups keep their precision: engines have a much lower floor for them than for tokens.
    small = x * 1e-6
    assert float((fake_quantize_per_token(small, group_size=128) / small - 1).abs().median()) < 0.03
    assert torch.equal(int8.fake_quantize_inputs(x, Scheme()), x)


# Integers -----------------------------------------------------------------------------------------


def test_int8_weights_are_never_worse_than_the_largest_magnitude() -> None:
    w = weight()
    plain, searched = rtn(w, INT8, "w"), int8.quantize_per_channel(w, INT8, "w")
    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    scale, _ = calculate_qparams(w.amin(1, keepdim=True), w.amax(1, keepdim=True), args)
    assert torch.equal(plain.scales_NG, scale.bfloat16().float())
    assert torch.equal(
        searched.dequantize(), fake_quantize(w, searched.scales_NG, torch.zeros_like(searched.scales_NG), args)
    )
    losses = [(q.dequantize() - w).square().sum(1) for q in (plain, searched)]
    assert bool((losses[1] <= losses[0] * (1 + 1e-5)).all())
    assert float(losses[1].sum()) < 0.99 * float(losses[0].sum())
    assert bool((searched.scales_NG > 0).all())
    assert torch.equal(searched.scales_NG.bfloat16().float(), searched.scales_NG)
    assert torch.equal(searched.scales_NG.half().float(), searched.scales_NG)


def test_int8_weights_of_another_scheme() -> None:
    for scheme in (FP8, Scheme(bits=4, group_size=-1), Scheme(bits=8), Scheme(bits=8, group_size=-1, symmetric=False)):
        with pytest.raises(SchemeError, match="up_proj: expected 8-bit symmetric integers with one scale per channel"):
            int8.quantize_per_channel(weight(), scheme, "up_proj")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_activations_agree_with_torch(dtype: torch.dtype) -> None:
    """torch's own fake quantization with the scale that vLLM computes, in the range that it reaches.

    torch multiplies by the reciprocal of the rounded scale, vLLM and we by the rounded 127 / absmax: single codes
    differ where the quotient lies at the middle of two, which for bfloat16 inputs is not rare.
    """
    x = (torch.randn(40, 384, generator=torch.Generator().manual_seed(9)) * 3).to(dtype)
    x[7] = 0
    absmax = x.float().abs().amax(1)
    scale = torch.where(absmax == 0, 1.0, absmax / 127)
    zero = torch.zeros(40, dtype=torch.int32)
    reference = torch.fake_quantize_per_channel_affine(x.float(), scale, zero, 0, -127, 127)
    ours = int8.fake_quantize_per_token(x)
    assert ours.dtype == dtype
    assert torch.equal(ours[7], x[7])
    quotient = x.double() * 127 / absmax.double().clamp_min(1e-30)[:, None]
    is_middle = (quotient - quotient.floor() - 0.5).abs() < 1e-4
    differs = (ours.float() - reference.to(dtype).float()).abs() > 1e-6 * reference.abs()
    assert not bool((differs & ~is_middle).any())
    assert float(differs.double().mean()) < 1e-2
    assert torch.equal(ours, int8.fake_quantize_inputs(x, INT8))
    assert torch.equal(int8.fake_quantize_per_token(x.view(4, 10, 384)[:, 3:4]), ours.view(4, 10, 384)[:, 3:4])


def test_int8_activations_at_the_edges() -> None:
    x = torch.tensor([[0.0, 0.0], [1e-40, 0.0], [1.0, -127.0], [3e38, -1.0]])
    assert int8.fake_quantize_per_token(x)[:3].tolist() == [[0.0, 0.0], [0.0, 0.0], [1.0, -127.0]]
    assert bool(torch.isfinite(int8.fake_quantize_per_token(x)).all())
    with pytest.raises(NumericsError, match="o_proj"):
        int8.fake_quantize_per_token(torch.tensor([[float("nan")]]), "o_proj")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_gives_the_same_codes() -> None:
    on_gpu = quantize_per_channel(weight().cuda(), FP8, "w")
    on_cpu = quantize_per_channel(weight(), FP8, "w")
    assert torch.equal(on_gpu.scales_NG.cpu(), on_cpu.scales_NG)
    assert torch.equal(on_gpu.codes_NK.cpu().view(torch.uint8), on_cpu.codes_NK.view(torch.uint8))
    x = weight(3)
    assert torch.equal(fake_quantize_per_token(x.cuda()).cpu(), fake_quantize_per_token(x))
    blocks_gpu, blocks_cpu = (quantize_per_block(w, BLOCKS, "w") for w in (weight().cuda(), weight()))
    assert torch.equal(blocks_gpu.scales_NG.cpu(), blocks_cpu.scales_NG)
    assert torch.equal(blocks_gpu.codes_NK.cpu().view(torch.uint8), blocks_cpu.codes_NK.view(torch.uint8))
    for scheme in (BLOCKS, INT8):
        assert torch.equal(int8.fake_quantize_inputs(x.cuda(), scheme).cpu(), int8.fake_quantize_inputs(x, scheme))
