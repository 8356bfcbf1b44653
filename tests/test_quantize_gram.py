"""Input statistics against float64."""

import pytest
import torch

from qconv.errors import CalibrationError, NumericsError
from qconv.quantize.gram import CPU_STRIP, GPU_STRIP, MIRROR_COLUMNS, GramAccumulator, check_inputs, output_error


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["gram", "mean_abs"])
def test_non_finite_inputs_are_named(value: float, method: str) -> None:
    sums = GramAccumulator(8, name="model.layers.3.mlp.down_proj")
    x_TK = torch.ones(4, 8)
    x_TK[2, 5] = value
    sums.add(x_TK)
    sums.add(torch.ones(4, 8))
    with pytest.raises(NumericsError, match=r"layers\.3\.mlp\.down_proj.*1 of 8 input channels \(first: 5\)"):
        getattr(sums, method)()


@pytest.mark.parametrize("columns", [1, CPU_STRIP, CPU_STRIP + 1, MIRROR_COLUMNS + CPU_STRIP + 7])
def test_the_triangle_is_mirrored_whatever_the_width(columns: int) -> None:
    x_TK = torch.randint(-8, 9, (20, columns), generator=torch.Generator().manual_seed(4)).float()  # exact sums
    sums = GramAccumulator(columns, with_mean_abs=False)
    sums.add(x_TK[:16])
    sums.add(x_TK[16:])
    assert torch.equal(sums.gram(), x_TK.T @ x_TK / 20)


def test_taking_the_matrix_copies_nothing_and_ends_the_sums() -> None:
    sums = GramAccumulator(32, name="q_proj", with_mean_abs=False)
    place = sums._gram_KK.data_ptr()
    sums.add(torch.ones(3, 32))
    assert sums.gram().data_ptr() == place
    assert sums.gram() is sums.gram()
    with pytest.raises(ValueError, match="q_proj"):
        sums.add(torch.ones(3, 32))
    with pytest.raises(ValueError, match="without mean_abs"):
        sums.mean_abs()


@pytest.mark.parametrize("value", [2e19, -2e19, 3e38])
def test_overflow_anywhere_shows_on_the_diagonal(value: float) -> None:
    """Its largest entry is on the diagonal: alone it overflows there first, and beside any other column."""
    sums = GramAccumulator(3, name="o_proj", with_mean_abs=False)
    sums.add(torch.tensor([[1.0, value, 1e18]]))
    with pytest.raises(NumericsError, match=r"1 of 3 input channels \(first: 1\)"):
        sums.gram()
    sums = GramAccumulator(2, with_mean_abs=False)
    for _ in range(4):
        sums.add(torch.full((1, 2), 1e19))  # finite squares, whose sum is not
    with pytest.raises(NumericsError, match="2 of 2"):
        sums.gram()


def test_several_are_checked_at_once() -> None:
    good, bad, empty = (GramAccumulator(4, name=name, with_mean_abs=False) for name in ("good", "bad", "empty"))
    good.add(torch.ones(2, 4))
    bad.add(torch.tensor([[1.0, 1.0, float("nan"), 1.0]]))
    check_inputs([good])
    check_inputs([])
    with pytest.raises(NumericsError, match=r"^bad: .*first: 2"):
        check_inputs([good, bad])
    with pytest.raises(CalibrationError, match=r"^empty: "):
        check_inputs([good, empty])
    good.add(torch.full((1, 4), float("inf")))  # what comes after a check is checked again
    with pytest.raises(NumericsError, match=r"^good: "):
        good.gram()


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_triangle_of_a_large_batch_agrees_with_float64(dtype: torch.dtype) -> None:
    """16,384 tokens of 4,096 and of a number of channels that no strip divides, some much louder than others."""
    for columns in (2 * GPU_STRIP, GPU_STRIP + MIRROR_COLUMNS + 8):
        generator = torch.Generator("cuda").manual_seed(5)
        loud_K = torch.exp(torch.randn(columns, generator=generator, device="cuda"))
        x_TK = torch.randn(16384, columns, generator=generator, device="cuda").add_(0.3).mul_(loud_K).to(dtype)
        sums = GramAccumulator(columns, "cuda")
        for batch in x_TK.split(8192):
            sums.add(batch)
        gram_KK = sums.gram()
        wide_TK = x_TK.double()
        exact_KK = wide_TK.T @ wide_TK / 16384
        diagonal_K = exact_KK.diagonal()
        # Sums over 8,192 tokens on tensor cores, which truncate: 1e-5 was measured on an H100 for 2,048.
        assert float(((gram_KK.diagonal() - diagonal_K).abs() / diagonal_K).max()) < 1e-4
        off_KK = (gram_KK - exact_KK).abs_() / torch.outer(diagonal_K, diagonal_K).sqrt_()
        assert float(off_KK.max()) < 1e-4
        assert torch.equal(gram_KK, gram_KK.T)
        torch.testing.assert_close(sums.mean_abs().double(), wide_TK.abs().mean(0), rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("with_mean_abs", [True, False])
def test_gpu_memory_is_one_matrix(with_mean_abs: bool) -> None:
    columns = 8192
    x_TK = torch.randn(4096, columns, device="cuda", dtype=torch.bfloat16)
    GramAccumulator(64, "cuda").add(x_TK[:, :64])  # what a first call makes is not counted
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sums = GramAccumulator(columns, "cuda", with_mean_abs=with_mean_abs)
    sums.add(x_TK)
    sums.gram()
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < 1.2 * 4 * columns**2
