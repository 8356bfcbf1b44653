"""AWQ's folds followed by GPTQ's rounding: each step alone must be in it, and both together must be worth more."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qconv.checkpoint import open_checkpoint
from qconv.convert import FORMATS
from qconv.quantization_config import QuantizationConfig
from qconv.quantize import fold_block
from qconv.quantize.awq import AwqScale
from qconv.quantize.blocks import QuantizeRequest, quantize_blocks
from qconv.quantize.fold_block import FoldContext, Statistics, fold_scales
from qconv.quantize.folds import Fold, Heads
from qconv.quantize.gram import GramAccumulator
from qconv.quantize.solve import solve
from qconv.skeleton import linear_weights
from qconv.streaming import StreamedModel
from qconv.targets import Algorithm
from qconv.types import QuantizedLinear, Scheme

NORM = Fold("norm", "norm", ("q_proj", "k_proj"))


def quantized(folder: Path, algorithm: Algorithm) -> tuple[dict[str, QuantizedLinear], dict[str, Tensor], Counter[str]]:
    view = open_checkpoint(folder)
    request = QuantizeRequest(
        config=QuantizationConfig(target="w4a16", algorithm=algorithm),
        scheme=Scheme(group_size=64, activation_order=True),
        weights=linear_weights(view),
        storage=torch.bfloat16,
        model_type="llama",
    )
    rows_TS = torch.randint(2048, (4, 64), generator=torch.Generator().manual_seed(0))
    linears: dict[str, QuantizedLinear] = {}
    plain: dict[str, Tensor] = {}
    for block in quantize_blocks(StreamedModel(view, "cpu", torch.float32), [request], rows_TS):
        linears |= block.linears
        plain |= block.plain
    return linears, plain, request.counts


def test_scales_of_one_leave_gptq(random_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def ones(weights: list[Tensor], *_: object, **__: object) -> AwqScale:
        return AwqScale(torch.ones_like(weights[0][0]), ratio=0.0, duo=False, loss_before=1.0, loss_after=0.5)

    folder = random_model("llama")
    scaled, *_ = quantized(folder, "awq+gptq")
    expected, norms, counts = quantized(folder, "gptq")
    monkeypatch.setattr(fold_block, "search_scale", ones)
    found, norms_then, both = quantized(folder, "awq+gptq")
    assert norms_then.keys() == norms.keys()
    assert all(torch.equal(norms_then[name].float(), norm.float()) for name, norm in norms.items())
    assert both == counts + Counter({"awq folds without effect": 8})
    assert found.keys() == expected.keys() == scaled.keys()
    for name, linear in expected.items():
        assert torch.equal(found[name].codes_NK, linear.codes_NK)
        assert torch.equal(found[name].scales_NG, linear.scales_NG)
        assert not torch.equal(scaled[name].codes_NK, linear.codes_NK)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_both_have_less_output_error_than_either(symmetric: bool, seed: int) -> None:
    """Two linears behind a norm, a few of whose channels are loud; errors on inputs that were not calibrated on."""
    generator = torch.Generator().manual_seed(seed)
    mix_KK = torch.randn(128, 128, generator=generator) / 128**0.5 + torch.eye(128)
    norm_K = torch.ones(128)
    norm_K[torch.randperm(128, generator=generator)[:6]] = 30.0
    x_TK = torch.randn(4096, 128, generator=generator) @ mix_KK
    before = {f"{name}.weight": torch.randn(96, 128, generator=generator) * 0.05 for name in NORM.targets}
    sums = GramAccumulator(128)
    sums.add(x_TK[:2048] * norm_K)

    def held_out_error(algorithm: Algorithm) -> float:
        tensors = before | {"norm.weight": norm_K}
        config = QuantizationConfig(target="w4a16", algorithm=algorithm)
        scheme = Scheme(group_size=32, symmetric=symmetric, activation_order=config.solves)
        shared = Statistics(sums.gram(), sums.mean_abs())
        statistics = dict.fromkeys(before, shared)
        if config.folding is not None:
            context = FoldContext(
                method=config.folding, heads=Heads(1, 1, 128), scheme=scheme, storage=torch.bfloat16, counts=Counter()
            )
            fold_scales(tensors, statistics, NORM, context)
            assert not torch.equal(tensors["norm.weight"], norm_K)
            assert context.counts["awq folds applied"] == 1
        norm = tensors.pop("norm.weight")
        linears = solve(tensors, statistics, "", config, scheme, Counter())
        return sum(
            float(((x_TK[2048:] * norm) @ q.dequantize().T - (x_TK[2048:] * norm_K) @ before[name].T).square().sum())
            for name, q in linears.items()
        )

    both, *either = [held_out_error(algorithm) for algorithm in ("awq+gptq", "gptq", "awq")]
    assert both < 0.9 * min(either)


def test_gptq_of_int8_has_positive_scales_and_less_output_error() -> None:
    generator = torch.Generator().manual_seed(4)
    mix_KK = torch.randn(128, 128, generator=generator) / 128**0.5 + torch.eye(128)
    x_TK = torch.randn(2048, 128, generator=generator) @ mix_KK
    w_NK = torch.randn(64, 128, generator=generator) * 0.05
    errors = {}
    for algorithm in ("gptq", "int8"):
        config = QuantizationConfig(target="int8", algorithm=algorithm)  # type: ignore[arg-type]
        scheme = config.scheme_for([128], "model")
        statistics = {"a.weight": Statistics(gram_KK=x_TK.T @ x_TK / len(x_TK))}
        linear = solve({"a.weight": w_NK.clone()}, statistics, "", config, scheme, Counter())["a.weight"]
        FORMATS["int-quantized"].check(linear, "a", torch.bfloat16)
        assert bool((linear.scales_NG > 0).all())
        errors[algorithm] = float((x_TK @ (linear.dequantize() - w_NK).T).square().sum())
    assert errors["gptq"] < 0.7 * errors["int8"]
