"""Input statistics against float64."""

import pytest
import torch

from qconv.errors import CalibrationError, NumericsError
from qconv.quantize.gram import GramAccumulator, output_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_agree_with_float64(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    power_K = torch.exp(2 * torch.randn(96, generator=generator)).clamp_max(50)
    batches = [(torch.randn(*shape, 96, generator=generator) * power_K).to(dtype) for shape in ((4, 50), (300,), (0,))]
    sums = GramAccumulator(96)
    for batch in batches:
        sums.add(batch)
    x_TK = torch.cat([batch.reshape(-1, 96) for batch in batches]).double()
    assert sums.num_tokens == 500
    exact_KK = x_TK.T @ x_TK / 500
    norm_K = exact_KK.diagonal().sqrt()
    assert float(((sums.gram() - exact_KK).abs() / torch.outer(norm_K, norm_K)).max()) < 1e-6
    assert torch.equal(sums.gram(), sums.gram().T)
    assert sums.gram().dtype == torch.float32
    torch.testing.assert_close(sums.mean_abs().double(), x_TK.abs().mean(0), rtol=1e-5, atol=0)
    assert torch.equal(sums.max_abs().double(), x_TK.abs().amax(0))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["gram", "mean_abs", "max_abs"])
def test_non_finite_inputs_are_named(value: float, method: str) -> None:
    sums = GramAccumulator(8, name="model.layers.3.mlp.down_proj")
    x_TK = torch.ones(4, 8)
    x_TK[2, 5] = value
    sums.add(x_TK)
    sums.add(torch.ones(4, 8))
    with pytest.raises(NumericsError, match=r"layers\.3\.mlp\.down_proj.*1 of 8 input channels \(first: 5\)"):
        getattr(sums, method)()


def test_overflow_of_the_sums_is_an_error() -> None:
    sums = GramAccumulator(4, name="o_proj")
    sums.add(torch.full((2, 4), 1e20))
    with pytest.raises(NumericsError, match="o_proj"):
        sums.gram()


def test_no_tokens_is_an_error() -> None:
    sums = GramAccumulator(4, name="experts.7.up_proj")
    sums.add(torch.empty(0, 4))
    with pytest.raises(CalibrationError, match=r"experts\.7\.up_proj.*none"):
        sums.gram()


def test_output_error_is_the_mean_squared_output() -> None:
    generator = torch.Generator().manual_seed(1)
    error_NK, x_TK = torch.randn(5, 32, generator=generator), torch.randn(200, 32, generator=generator)
    sums = GramAccumulator(32)
    sums.add(x_TK)
    expected_N = (x_TK.double() @ error_NK.double().T).square().mean(0)
    torch.testing.assert_close(output_error(error_NK, sums.gram()).double(), expected_N, rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_sums_agree_with_float64(dtype: torch.dtype) -> None:
    x_TK = torch.randn(8192, 512, generator=torch.Generator().manual_seed(2)).to(dtype)
    sums = GramAccumulator(512, "cuda")
    for batch in x_TK.cuda().split(2048):
        sums.add(batch)
    exact_KK = x_TK.double().T @ x_TK.double() / 8192
    norm_K = exact_KK.diagonal().sqrt()
    # Tensor cores truncate where float32 units round: 1.0e-5 was measured for 16-bit inputs on an H100.
    tolerated = 2e-6 if dtype == torch.float32 else 3e-5
    assert float(((sums.gram().cpu() - exact_KK).abs() / torch.outer(norm_K, norm_K)).max()) < tolerated
