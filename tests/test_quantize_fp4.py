"""4-bit floats: rounding against compressed-tensors' own, grids, solvers, and whole models run by transformers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales
from torch import Tensor
from transformers import AutoModelForCausalLM

from qconv import e2m1, pipeline
from qconv.checkpoint import open_checkpoint
from qconv.config import CalibrationConfig, MergeJob, OutputConfig, ValidationConfig
from qconv.convert import dequantize
from qconv.errors import NumericsError
from qconv.quantization_config import QuantizationConfig
from qconv.quantize.fp4_inputs import fake_quantize_fp4, input_global_scales
from qconv.quantize.global_scale import global_scales, power_of_two
from qconv.quantize.gptq import gptq
from qconv.quantize.gram import output_error
from qconv.quantize.grid import grid_of_range, groups_of, range_of, round_scale, search_grid
from qconv.quantize.rtn import encode_linear, rtn
from qconv.quantize.sample import InputSample
from qconv.runners import Candidate, candidate_model
from qconv.types import QuantizedLinear, Scheme
from tests.fp4_cases import MXFP4, MXFP4A16, NVFP4, NVFP4A16, scheme_of_the_package
from tests.test_streaming import run as run_streamed

SCHEMES = [NVFP4A16, MXFP4A16]


def test_numbers_are_rounded_as_the_package_rounds_them() -> None:
    generator = torch.Generator().manual_seed(0)
    ties = torch.arange(-6.5, 6.5, 0.125)
    x = torch.cat([torch.randn(5000, generator=generator) * 3, ties, torch.tensor([0.0, -0.0, 1e-9, -1e-9, 100.0])])
    expected = FP4_E2M1_DATA.cast_to_fp4(x.clamp(-6, 6))
    assert torch.equal(e2m1.nearest(x), expected)
    assert torch.equal(e2m1.decode(e2m1.encode(x)), expected)
    codes = torch.arange(16)
    assert torch.equal(e2m1.encode(e2m1.decode(codes)).int(), codes.where(codes != 8, 0).int())


def weight(rows: int = 48, columns: int = 128, size: float = 1.0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * size


def error_of(linear: QuantizedLinear, w_NK: Tensor) -> float:
    return float((linear.dequantize() - w_NK).square().sum())


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.scale_format)
def test_search_lowers_the_error_of_the_largest_weight(scheme: Scheme) -> None:
    """Of float8 scales by more than clipping can: one at which the largest weight becomes 4 is often the better one."""
    w_NK = weight(size=400.0)
    w_NGg = groups_of(w_NK, scheme.group_size)
    plain = encode_linear(w_NK, grid_of_range(*range_of(w_NGg), scheme), scheme)
    searched = rtn(w_NK, scheme, "w", mse=True)
    assert error_of(searched, w_NK) < {"e4m3": 0.8, "e8m0": 0.995}[scheme.scale_format] * error_of(plain, w_NK)
    grid = search_grid(w_NGg, scheme)
    assert bool((grid.scale > 0).all())
    assert torch.equal(round_scale(grid.scale, scheme), grid.scale)
    if scheme.scale_format == "e4m3":
        is_four = (w_NGg.abs().amax(-1) / grid.scale).sub(4).abs() < 0.5
        assert 0.05 < float(is_four.float().mean()) < 0.95


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.scale_format)
def test_gptq_lowers_the_output_error(scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(2)
    mixing_KK = torch.randn(128, 128, generator=generator) / 8
    x_TK = torch.randn(1024, 128, generator=generator) @ mixing_KK
    gram_KK = x_TK.T @ x_TK / len(x_TK)
    w_NK = weight(size=100.0)

    def loss(linear: QuantizedLinear) -> float:
        return float(output_error(w_NK - linear.dequantize(), gram_KK).sum())

    nearest, plain = rtn(w_NK, scheme, "w", mse=True), gptq(w_NK, gram_KK, scheme, "w", refine_passes=0).linear
    refined = gptq(w_NK, gram_KK, scheme, "w").linear
    assert loss(plain) < 0.75 * loss(nearest)
    assert loss(refined) < loss(plain)
    assert int(refined.codes_NK.max()) <= 15
    assert torch.equal(round_scale(refined.scales_NG, scheme), refined.scales_NG)


def test_powers_of_two_are_those_of_the_package() -> None:
    """Where weights are not searched: its `generate_mx_scales`, which rounds the largest of a group in bfloat16."""
    largest = torch.rand(4096, generator=torch.Generator().manual_seed(3)).mul_(4).exp2_().bfloat16()
    expected = 2.0 ** (generate_mx_scales(largest).float() - 127)
    assert torch.equal(grid_of_range(-largest.float(), largest.float(), MXFP4A16).scale, expected)


@pytest.mark.parametrize("largest", [1e-30, 3e-5, 0.0824, 1.0, 6 * 448.0, 1e6, 3e38])
def test_global_scale_is_the_largest_power_of_two_that_fits(largest: float) -> None:
    scale = power_of_two(largest)
    assert math.log2(scale) == round(math.log2(scale))
    assert largest * scale <= 448 * 6
    assert largest * scale * 2 > 448 * 6 or scale == 2.0**126


def test_linears_that_engines_fuse_have_one_global_scale() -> None:
    sizes = {"q_proj": 1.0, "k_proj": 0.1, "v_proj": 0.01, "o_proj": 0.001}
    scales = global_scales({f"self_attn.{name}.weight": torch.full((2, 16), s) for name, s in sizes.items()}, "block.")
    assert list(scales.values()) == [2048.0] * 3 + [2.0**21]
    assert global_scales({"mlp.down_proj.weight": torch.zeros(2, 16)}, "block.") == {"mlp.down_proj.weight": 1.0}
    with pytest.raises(NumericsError, match=r"block.mlp.down_proj.weight: expected finite numbers"):
        global_scales({"mlp.down_proj.weight": torch.full((2, 16), torch.nan)}, "block.")


@pytest.mark.parametrize("scheme", [NVFP4, MXFP4], ids=lambda s: s.scale_format)
def test_inputs_are_rounded_as_the_package_rounds_them(scheme: Scheme) -> None:
    x = torch.randn(4, 32, 96, generator=torch.Generator().manual_seed(4)) * 5
    x[0, 0] = 0
    x[0, 1, :16] *= 1e-7  # a float8 scale of zero
    x[0, 2, 5] = 1e6  # and one that saturates
    name = "nvfp4-pack-quantized" if scheme.has_global_scale else "mxfp4-pack-quantized"
    args = scheme_of_the_package(name, scheme).input_activations
    assert args is not None
    global_scale = torch.tensor([64.0]) if scheme.has_global_scale else None
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Module(), global_scale)
    expected = fake_quantize(x, scale, zero, args, global_scale)
    found = fake_quantize_fp4(x, scheme, 64.0)
    assert torch.equal(found[0, 1:], expected[0, 1:])
    assert torch.equal(found[1:], expected[1:])
    assert not found[0, 0].any()
    assert fake_quantize_fp4(x.bfloat16(), scheme, 64.0).dtype == torch.bfloat16
    with pytest.raises(NumericsError, match="down_proj"):
        fake_quantize_fp4(torch.tensor([[1.0, torch.inf]]), scheme, name="down_proj")


def test_inputs_of_fused_linears_have_one_global_scale() -> None:
    """Room is left above what calibration saw."""
    sizes = {"w1": 3.0, "w3": 6.0, "w2": 0.5}
    samples = {
        f"mlp.experts.0.{name}.weight": InputSample(torch.zeros(1, 4), torch.tensor([0.0, size, 0.1, 0.0]))
        for name, size in sizes.items()
    }
    assert list(input_global_scales(samples).values()) == [128.0] * 3
    lone = {"mlp.down_proj.weight": InputSample(torch.zeros(1, 4), torch.tensor([0.5]))}
    assert input_global_scales(lone) == {"mlp.down_proj.weight": 2048.0}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Callable[..., Path]:
    made: dict[tuple[str, str], Path] = {}

    def make(target: str, algorithm: str) -> Path:
        if (target, algorithm) not in made:
            out = tmp_path_factory.mktemp(target) / "out"
            quantization = QuantizationConfig(target=target, algorithm=algorithm)  # type: ignore[arg-type]
            job = MergeJob(
                base=str(tiny_llama),
                outputs=(OutputConfig(out=out, quantization=quantization),),
                calibration=CalibrationConfig(samples=8, seq_len=64),
                validation=ValidationConfig(tokens=512, seq_len=64, defaults=False, attribution="never"),
                device="cpu",
            )
            pipeline.run(job)
            made[target, algorithm] = out
        return made[target, algorithm]

    return make


def logits_in_float32(folder: Path, ids: Tensor) -> tuple[Tensor, torch.nn.Module]:
    """By transformers, whose first forward pass decodes the weights to bfloat16, in which ours are exact."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    with torch.no_grad():
        model(ids)
        torch.nn.Module.float(model)  # transformers' own refuses to cast what was quantized
        return model(ids).logits, model


@pytest.mark.parametrize(
    ("target", "algorithm"),
    [("nvfp4a16", "gptq"), ("nvfp4a16", "rtn"), ("nvfp4", "rtn"), ("mxfp4a16", "gptq"), ("mxfp4", "rtn")],
)
def test_transformers_computes_our_logits(
    quantized: Callable[..., Path], tmp_path: Path, target: str, algorithm: str
) -> None:
    """It decodes weights and rounds inputs itself; a validation that did not would be far off."""
    folder = tmp_path / "model"
    shutil.copytree(quantized(target, algorithm), folder)
    ids = torch.arange(96)[None] * 37 % 2048
    expected, theirs = logits_in_float32(folder, ids)
    view = dequantize(open_checkpoint(folder))
    assert len(view.quantized_modules) == 28
    for module in view.quantized_modules:
        assert torch.equal(theirs.get_submodule(module).weight, view.read(f"{module}.weight")), module
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    candidate = Candidate.of(open_checkpoint(folder))
    model, how = candidate_model(candidate, candidate.view, "cpu", False, "qconv")
    (found,) = run_streamed(model, [ids])
    assert ("rounded to 4-bit floats" in how) == (not target.endswith("a16"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_inputs_are_rounded_once(quantized: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice is not the same where a group's scale is one of float8's subnormal numbers: its largest may become a 4."""
    candidate = Candidate.of(open_checkpoint(quantized("nvfp4", "rtn")))
    rounded: list[str] = []

    def spy(x: Tensor, scheme: Scheme, scale: float, name: str) -> Tensor:
        rounded.append(name)
        return x

    monkeypatch.setattr("qconv.runners.fake_quantize_fp4", spy)
    model, _ = candidate_model(candidate, candidate.view, "cpu", False, "qconv")
    ids = torch.arange(8)[None]
    for times in (1, 2):
        run_streamed(model, [ids])
        assert sorted(rounded) == sorted(times * candidate.view.quantized_modules)
    with torch.no_grad():
        model.whole()(ids)
    assert sorted(rounded) == sorted(3 * candidate.view.quantized_modules)


@pytest.mark.parametrize("algorithm", ["gptq", "awq", "awq+gptq"])
def test_calibration_beats_rounding(quantized: Callable[..., Path], algorithm: str) -> None:
    def kl(algorithm: str) -> float:
        report = json.loads((quantized("nvfp4a16", algorithm) / "qconv-report.json").read_text())
        assert not report["findings"]
        return float(report["fidelity"]["total"]["kl"]["mean"])

    assert kl(algorithm) < 0.95 * kl("rtn")
