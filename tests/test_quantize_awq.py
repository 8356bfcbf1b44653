"""AWQ's searches against losses measured the long way: by running inputs through the layer."""

import pytest
import torch
from torch import Tensor

from qconv.errors import NumericsError
from qconv.quantize.awq import apply_scale, scaled_loss, search_block_grid, search_scale
from qconv.quantize.gram import GramAccumulator
from qconv.quantize.rtn import rtn
from qconv.types import Scheme


def layer(seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Two linears that share inputs, a few channels of which are much louder (as in language models)."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(rows, 256, generator=generator) * 0.03 for rows in (96, 32)]
    loud_K = torch.exp(1.5 * torch.randn(256, generator=generator))
    x_TK = torch.randn(512, 256, generator=generator) * loud_K
    return weights, x_TK


def statistics(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    sums = GramAccumulator(x_TK.shape[1])
    sums.add(x_TK)
    return sums.gram(), sums.mean_abs()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [64, -1])
def test_scale_lowers_the_output_error_of_the_layer(symmetric: bool, group_size: int) -> None:
    scheme = Scheme(group_size=group_size, symmetric=symmetric)
    weights, x_TK = layer()
    found = search_scale(weights, *statistics(x_TK), scheme)

    def output_error(s_K: Tensor) -> float:
        total = 0.0
        for w_NK in weights:
            y = (x_TK / s_K).double() @ rtn(w_NK * s_K, scheme, "w").dequantize().double().T
            total += float((y - x_TK.double() @ w_NK.double().T).square().sum(1).mean())
        return total

    assert found.loss_before == pytest.approx(output_error(torch.ones(256)), rel=1e-4)
    assert found.loss_after == pytest.approx(output_error(found.s_K), rel=1e-4)
    assert found.loss_after < 0.8 * found.loss_before
    assert 0 < found.ratio < 1
    assert float(found.s_K.max() * found.s_K.min()) == pytest.approx(1.0, rel=1e-4)


def test_plain_ratio_is_the_papers_grid() -> None:
    weights, x_TK = layer()
    gram_KK, mean_abs_K = statistics(x_TK)
    scheme = Scheme(group_size=64, symmetric=False)
    losses = {}
    for i in range(20):
        s_K = mean_abs_K ** (i / 20)
        losses[i / 20] = scaled_loss(torch.cat(weights), s_K / (s_K.max() * s_K.min()).sqrt(), gram_KK, scheme)
    found = search_scale(weights, gram_KK, mean_abs_K, scheme)
    assert found.loss_before == losses[0.0]
    assert found.loss_after <= min(losses.values())
    if not found.duo:
        assert found.ratio == min(losses, key=lambda ratio: losses[ratio])


def test_scale_never_hurts_where_all_channels_are_alike() -> None:
    generator = torch.Generator().manual_seed(3)
    w_NK = torch.randn(16, 64, generator=generator)
    found = search_scale([w_NK], torch.eye(64), torch.full((64,), 0.8), Scheme(group_size=32))
    assert found.loss_after <= found.loss_before


def test_dead_channels_keep_scale_one() -> None:
    weights, x_TK = layer()
    x_TK[:, [2, 200]] = 0
    gram_KK, mean_abs_K = statistics(x_TK)
    found = search_scale(weights, gram_KK, mean_abs_K, Scheme(group_size=64))
    assert found.s_K[[2, 200]].tolist() == [1.0, 1.0]
    assert bool(torch.isfinite(found.s_K).all())
    assert bool((found.s_K > 0).all())
    silent = search_scale(weights, torch.zeros(256, 256), torch.zeros(256), Scheme(group_size=64))
    assert torch.equal(silent.s_K, torch.ones(256))


def test_non_finite_arguments_are_named() -> None:
    weights, x_TK = layer()
    gram_KK, mean_abs_K = statistics(x_TK)
    mean_abs_K[9] = float("nan")
    with pytest.raises(NumericsError, match="o_proj: mean input"):
        search_scale(weights, gram_KK, mean_abs_K, Scheme(), "o_proj")


def test_applied_scale_is_the_statistics_of_scaled_inputs() -> None:
    _, x_TK = layer()
    s_K = torch.rand(256, generator=torch.Generator().manual_seed(5)) + 0.5
    gram_KK, mean_abs_K = apply_scale(*statistics(x_TK), s_K)
    expected_gram_KK, expected_mean_K = statistics(x_TK / s_K)
    torch.testing.assert_close(gram_KK, expected_gram_KK, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mean_abs_K, expected_mean_K, rtol=1e-5, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [256, 200])
def test_clip_lowers_each_groups_own_output_error(symmetric: bool, columns: int) -> None:
    scheme = Scheme(group_size=64, symmetric=symmetric)
    weights, x_TK = layer()
    w_NK, x_TK = weights[0][:, :columns], x_TK[:, :columns]
    w_NK = torch.where(w_NK.abs() > 0.09, w_NK * 2, w_NK)  # outliers, worth clipping
    gram_KK, _ = statistics(x_TK)

    def group_errors(back_NK: Tensor) -> Tensor:
        parts = []
        for start in range(0, columns, 64):
            part = slice(start, start + 64)
            y_TN = x_TK[:, part].double() @ (back_NK - w_NK)[:, part].double().T
            parts.append(y_TN.square().mean(0))
        return torch.stack(parts, dim=1)

    plain_NG = group_errors(rtn(w_NK, scheme, "w").dequantize())
    searched_NG = group_errors(rtn(w_NK, scheme, "w", grid=search_block_grid(w_NK, gram_KK, scheme)).dequantize())
    assert bool((searched_NG <= plain_NG * (1 + 1e-4)).all())
    assert float(searched_NG.sum()) < 0.8 * float(plain_NG.sum())
    unsigned = search_block_grid(w_NK, gram_KK, scheme, signed=False)
    assert bool((unsigned.scale > 0).all())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_with_cpu() -> None:
    scheme = Scheme(group_size=64, symmetric=False)
    weights, x_TK = layer()
    gram_KK, mean_abs_K = statistics(x_TK)
    on_cpu = search_scale(weights, gram_KK, mean_abs_K, scheme)
    on_gpu = search_scale([w.cuda() for w in weights], gram_KK.cuda(), mean_abs_K.cuda(), scheme)
    assert on_gpu.loss_after == pytest.approx(on_cpu.loss_after, rel=1e-3)
    grid = search_block_grid(weights[0].cuda(), gram_KK.cuda(), scheme)
    expected = search_block_grid(weights[0], gram_KK, scheme)
    assert float((grid.scale.cpu() != expected.scale).float().mean()) < 0.02
