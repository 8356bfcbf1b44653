"""AWQ's searches against losses measured the long way: by running inputs through the layer."""

import pytest
import torch
from torch import Tensor

from qconv.errors import NumericsError
from qconv.quantize import awq
from qconv.quantize.awq import sample_rows, search_block_grid, search_scale
from qconv.quantize.fold_block import Statistics
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


def output_error(weights: list[Tensor], x_TK: Tensor, s_K: Tensor, scheme: Scheme) -> float:
    total = 0.0
    for w_NK in weights:
        y = (x_TK / s_K).double() @ rtn(w_NK * s_K, scheme, "w").dequantize().double().T
        total += float((y - x_TK.double() @ w_NK.double().T).square().sum(1).mean())
    return total


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [64, -1])
def test_scale_lowers_the_output_error_of_the_layer(symmetric: bool, group_size: int) -> None:
    scheme = Scheme(group_size=group_size, symmetric=symmetric)
    weights, x_TK = layer()
    found = search_scale(weights, *statistics(x_TK), scheme)
    assert found.loss_before == pytest.approx(output_error(weights, x_TK, torch.ones(256), scheme), rel=1e-4)
    assert found.loss_after == pytest.approx(output_error(weights, x_TK, found.s_K, scheme), rel=1e-4)
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
        losses[i / 20] = output_error(weights, x_TK, s_K / (s_K.max() * s_K.min()).sqrt(), scheme)
    found = search_scale(weights, gram_KK, mean_abs_K, scheme)
    assert found.loss_before == pytest.approx(losses[0.0], rel=1e-4)
    assert found.loss_after <= min(losses.values()) * (1 + 1e-4)
    if not found.duo:
        assert found.ratio == min(losses, key=lambda ratio: losses[ratio])


def loop_over_candidates(
    weights: list[Tensor], gram_KK: Tensor, mean_abs_K: Tensor, scheme: Scheme
) -> tuple[Tensor, float, bool]:
    """The search as a plain loop: one candidate, one forward pass through rounded weights, at a time, in float64."""
    stacked_NK = torch.cat(weights)
    w_NK = stacked_NK[:: -(-len(stacked_NK) // 512)]
    size = scheme.group_size if scheme.group_size != -1 else w_NK.shape[1]
    groups = w_NK.abs().view(len(w_NK), -1, size)
    w_mean_K = (groups / groups.amax(-1, keepdim=True)).flatten(1).mean(0)

    def loss(s_K: Tensor) -> float:
        error_NK = (rtn(w_NK * s_K, scheme, "w").dequantize() / s_K - w_NK).double()
        return float(torch.einsum("nk,kj,nj->", error_NK, gram_KK.double(), error_NK))

    live_K = mean_abs_K > 0
    best, best_loss = (torch.ones_like(mean_abs_K), 0.0, False), loss(torch.ones_like(mean_abs_K))
    for duo in (False, True):
        for i in range(20):
            s_K = mean_abs_K[live_K] ** (i / 20) / (w_mean_K[live_K] ** (1 - i / 20) if duo else 1.0)
            s_K = s_K.clamp_min(1e-4)
            whole_K = torch.ones_like(mean_abs_K)
            whole_K[live_K] = s_K / (s_K.max() * s_K.min()).sqrt()
            if (found := loss(whole_K)) < best_loss:
                best, best_loss = (whole_K, i / 20, duo), found
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("group_size", [64, -1])
def test_batched_search_chooses_what_a_loop_does(seed: int, group_size: int) -> None:
    scheme = Scheme(group_size=group_size, symmetric=seed % 2 == 0)
    weights, x_TK = layer(seed)
    if seed == 5:
        weights = [torch.randn(700, 256, generator=torch.Generator().manual_seed(9)), *weights]  # more than the sample
        x_TK[:, 7] = 0
    gram_KK, mean_abs_K = statistics(x_TK)
    s_K, ratio, duo = loop_over_candidates(weights, gram_KK, mean_abs_K, scheme)
    found = search_scale(weights, gram_KK, mean_abs_K, scheme)
    assert (found.ratio, found.duo) == (ratio, duo)
    torch.testing.assert_close(found.s_K, s_K, rtol=1e-5, atol=0)


def test_ties_go_to_plain_rounding_then_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, x_TK = layer()
    gram_KK, mean_abs_K = statistics(x_TK)
    losses = torch.full((41,), 3.0, dtype=torch.float64)
    monkeypatch.setattr(awq, "_losses", lambda *_: losses.clone())
    found = search_scale(weights, gram_KK, mean_abs_K, Scheme(group_size=64))
    assert torch.equal(found.s_K, torch.ones(256))
    assert (found.ratio, found.duo, found.loss_before, found.loss_after) == (0.0, False, 3.0, 3.0)
    losses[[1 + 6, 1 + 20 + 2]] = 2.0
    found = search_scale(weights, gram_KK, mean_abs_K, Scheme(group_size=64))
    assert (found.ratio, found.duo, found.loss_after) == (0.3, False, 2.0)
    losses[7], losses[4] = 5.0, torch.nan  # not a number never wins
    found = search_scale(weights, gram_KK, mean_abs_K, Scheme(group_size=64))
    assert (found.ratio, found.duo, found.loss_after) == (0.1, True, 2.0)


def test_chunks_of_candidates_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where several candidates share one product."""
    weights, x_TK = layer()
    gram_KK, _ = statistics(x_TK)
    w_NK = sample_rows(weights)
    s_CK = torch.rand(7, 256, generator=torch.Generator().manual_seed(1)) + 0.5
    scheme = Scheme(group_size=64)
    one_by_one = torch.stack([awq._losses(w_NK, s_K.unsqueeze(0), gram_KK, scheme)[0] for s_K in s_CK])
    for chunk in (3 * w_NK.numel(), 100 * w_NK.numel()):
        monkeypatch.setattr(awq, "_candidates_at_once", lambda w, chunk=chunk: chunk // w.numel())
        torch.testing.assert_close(awq._losses(w_NK, s_CK, gram_KK, scheme), one_by_one, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sizes", [(3,), (512,), (513,), (700, 3, 900), (1, 511, 1, 2000)])
def test_sampled_rows_are_those_of_the_stacked_weights(sizes: tuple[int, ...]) -> None:
    weights = [torch.randn(size, 4) for size in sizes]
    stacked_NK = torch.cat(weights)
    assert torch.equal(sample_rows(weights), stacked_NK[:: -(-len(stacked_NK) // 512)])


def test_a_scale_that_must_be_shared_is_judged_as_shared() -> None:
    weights, x_TK = layer()
    gram_KK, mean_abs_K = statistics(x_TK)
    scheme = Scheme(group_size=64)
    found = search_scale(weights, gram_KK, mean_abs_K, scheme)
    shared = search_scale(weights, gram_KK, mean_abs_K, scheme, share=torch.square)
    assert torch.equal(shared.s_K, found.s_K.square())
    assert shared.loss_after == pytest.approx(output_error(weights, x_TK, shared.s_K, scheme), rel=1e-4)
    assert (shared.loss_before, shared.ratio) == (found.loss_before, found.ratio)


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
    mean_abs_K[9] = 1.0
    weights[1][0, 0] = float("inf")
    with pytest.raises(NumericsError, match=r"o_proj: weight.*found 1 of 8192"):
        search_scale(weights, gram_KK, mean_abs_K, Scheme(), "o_proj")


def test_applied_scale_is_the_statistics_of_scaled_inputs() -> None:
    _, x_TK = layer()
    s_K = torch.rand(256, generator=torch.Generator().manual_seed(5)) + 0.5
    scaled = Statistics(*statistics(x_TK)).divided_by(s_K)
    expected_gram_KK, expected_mean_K = statistics(x_TK / s_K)
    assert scaled.gram_KK is not None
    torch.testing.assert_close(scaled.gram_KK, expected_gram_KK, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scaled.mean_abs_K, expected_mean_K, rtol=1e-5, atol=0)
    assert scaled.sample is None


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_search_waits_once_and_leaves_tf32_as_it_was() -> None:
    weights, x_TK = layer()
    gram_KK, mean_abs_K = (tensor.cuda() for tensor in statistics(x_TK))
    w_list = [w.cuda() for w in weights]
    scheme = Scheme(group_size=64)
    search_scale(w_list, gram_KK, mean_abs_K, scheme)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.cuda.set_sync_debug_mode("error")  # the one wait is `tolist` at the end: nothing before it may raise
    try:
        with pytest.raises(RuntimeError, match="synchroniz") as raised:
            search_scale(w_list, gram_KK, mean_abs_K, scheme)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert "tolist" in str(raised.traceback[-1].statement)
    assert torch.backends.cuda.matmul.fp32_precision == before
