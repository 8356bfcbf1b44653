"""Stored scales of float8 inputs against compressed-tensors' own rounding, and a whole model run by transformers."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize, quantize
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qconv import pipeline
from qconv.checkpoint import open_checkpoint
from qconv.config import CalibrationConfig, MergeJob, OutputConfig
from qconv.errors import NumericsError
from qconv.quantization_config import QuantizationConfig
from qconv.quantize.fp8_static import FP8_MAX, choose_input_scale, fake_quantize_static, quantize_per_tensor
from qconv.quantize.sample import InputSample
from qconv.runners import Candidate, candidate_model
from qconv.skeleton import block_linears
from qconv.types import Scheme
from tests.cli_cases import stored_tensors
from tests.test_streaming import run as run_streamed

STATIC = Scheme(kind="float", bits=8, group_size=-1, static_activations=True)
ARGS = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="tensor")


def weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(rows, 96, generator=generator) * size for rows, size in ((40, 0.02), (24, 0.3))]


@pytest.mark.parametrize("num_candidates", [1, 16])
def test_weights_that_share_an_input_share_a_scale(num_candidates: int) -> None:
    linears = quantize_per_tensor(weights(), torch.tensor([0.25]), STATIC, "w", num_candidates=num_candidates)
    scale = linears[0].scales_NG[0, 0]
    for w_NK, linear in zip(weights(), linears, strict=True):
        assert linear.scales_NG.shape == (len(w_NK), 1)
        assert bool((linear.scales_NG == scale).all())
        assert torch.equal(linear.input_scale, torch.tensor([0.25]))
        expected = quantize(w_NK, scale.view(1), torch.zeros(1), ARGS, dtype=torch.float8_e4m3fn)
        assert torch.equal(linear.codes_NK.view(torch.uint8), expected.view(torch.uint8))
    largest = max(float(w_NK.abs().max()) for w_NK in weights())
    assert largest / FP8_MAX * 0.99 < float(scale) < largest / FP8_MAX * 2
    if num_candidates > 1:
        plain = quantize_per_tensor(weights(), torch.tensor([0.25]), STATIC, "w")
        errors = [
            sum(float((q.dequantize() - w).square().sum()) for q, w in zip(found, weights(), strict=True))
            for found in (linears, plain)
        ]
        assert errors[0] < errors[1]


@pytest.mark.parametrize("largest", [1e-3, 0.9, 448.0, 448.1, 3e4])
def test_input_scale_is_the_smallest_power_of_two_that_clips_nothing(largest: float) -> None:
    max_abs_K = torch.tensor([0.1 * largest, largest, 0.0])
    scale = choose_input_scale(InputSample(torch.zeros(2, 3), max_abs_K))
    assert (scale.dtype, scale.shape) == (torch.float32, (1,))
    value = float(scale)
    assert math.log2(value) == round(math.log2(value))
    assert value / 2 < float(max_abs_K[1]) / 448 <= value
    assert torch.equal(scale.bfloat16().float(), scale)
    assert torch.equal(scale.half().float(), scale)


def test_inputs_that_are_always_zero_get_scale_one() -> None:
    assert choose_input_scale(InputSample(torch.zeros(2, 3), torch.zeros(3))).tolist() == [1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [2.0**-6, 2.0**-2, 1.0])
def test_inputs_round_as_compressed_tensors_rounds_them(dtype: torch.dtype, scale: float) -> None:
    """With a power of two it agrees bit for bit, though it divides in the dtype of the input."""
    x = (torch.randn(64, 96, generator=torch.Generator().manual_seed(3)) * 30).to(dtype)
    x[0, :4] = torch.tensor([500.0 * scale, -1e4, 2.0**-9 * scale, 2.0**-11 * scale]).to(dtype)
    ours = fake_quantize_static(x, scale)
    theirs = fake_quantize(x, torch.tensor([scale], dtype=dtype), torch.zeros(1), ARGS)
    assert ours.dtype == dtype
    assert torch.equal(ours, theirs)
    assert float(ours.abs().max()) == 448 * scale
    assert ours[0, 2] == 2.0**-9 * scale
    assert ours[0, 3] == 0


def test_inputs_that_are_not_finite_are_named() -> None:
    with pytest.raises(NumericsError, match="down_proj"):
        fake_quantize_static(torch.tensor([1.0, torch.inf]), 0.5, "down_proj")


@pytest.fixture(scope="module")
def static_model(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    out = tmp_path_factory.mktemp("static") / "out"
    job = MergeJob(
        base=str(tiny_llama),
        outputs=(
            OutputConfig(out=out, dtype="fp32", quantization=QuantizationConfig(target="fp8", activations="static")),
        ),
        calibration=CalibrationConfig(samples=4, seq_len=64),
        validation=None,
        device="cpu",
    )
    pipeline.run(job)
    return out


def test_linears_that_engines_fuse_have_the_same_scales(static_model: Path) -> None:
    tensors = stored_tensors(static_model)
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith("_scale")}
    assert len(scales) == 2 * 28
    assert all(tensor.shape == (1,) for tensor in scales.values())
    for layer in range(4):
        for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            for kind in ("input_scale", "weight_scale"):
                assert len({float(scales[f"model.layers.{layer}.{name}.{kind}"]) for name in names}) == 1
    assert len({float(tensor) for tensor in scales.values()}) > 8


@pytest.mark.parametrize("clipping", [False, True])
def test_transformers_runs_the_model_that_was_validated(static_model: Path, tmp_path: Path, clipping: bool) -> None:
    """transformers and compressed-tensors load the folder and round inputs themselves; logits agree in float32.

    With input scales an eighth as large, most inputs saturate: a validation that did not clip would be far off.
    """
    folder = tmp_path / "model"
    shutil.copytree(static_model, folder)
    if clipping:
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        for name in tensors:
            if name.endswith(".input_scale"):
                tensors[name] = tensors[name] / 8
        save_file(tensors, file, metadata={"format": "pt"})
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    ids = torch.arange(96)[None] * 37 % 2048
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = loaded(ids).logits
    candidate = Candidate.of(open_checkpoint(folder))
    model, how = candidate_model(candidate, candidate.view, "cpu", False, "qconv")
    (found,) = run_streamed(model, [ids])
    assert "rounded to float8" in how
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    hooks = {len(linear._forward_pre_hooks) for linear in block_linears(model.load_block(0)).values()}
    assert hooks == {1}, "inputs are rounded once"
