"""4-bit integers beside 8-bit inputs: the layout against compressed-tensors, and whole models run by transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig as TheirConfig
from compressed_tensors.quantization import QuantizationScheme
from transformers import AutoModelForCausalLM

from qconv import pipeline
from qconv.checkpoint import open_checkpoint
from qconv.config import CalibrationConfig, MergeJob, OutputConfig
from qconv.convert import FORMATS, dequantize
from qconv.errors import CheckpointError, SchemeError, UsageError
from qconv.quantization_config import QuantizationConfig
from qconv.runners import Candidate, candidate_model
from qconv.types import Scheme
from tests.test_convert_formats import assert_same, random_linear
from tests.test_streaming import run as run_streamed

INT8 = Scheme(group_size=32, dynamic_activations=True)
FLOAT8 = replace(INT8, float8_activations=True)


@pytest.mark.parametrize("scheme", [INT8, FLOAT8], ids=["int8", "float8"])
@pytest.mark.parametrize("size", [32, -1])
def test_packed_codes_are_the_packages(scheme: Scheme, size: int) -> None:
    scheme, fmt = replace(scheme, group_size=size), FORMATS["pack-quantized"]
    q = random_linear(scheme, 24, 96)
    fmt.check(q, "layer", torch.bfloat16)
    tensors = fmt.pack(q, "layer", torch.float32)
    assert_same(fmt.unpack(tensors, "layer", scheme), q)
    config = fmt.quantization_config(scheme, ["layer"], ["lm_head"])
    theirs = TheirConfig.model_validate(config)
    assert fmt.scheme_of(config, "folder") == fmt.scheme_of(theirs.model_dump(mode="json"), "folder") == scheme
    (group,) = theirs.config_groups.values()
    local = {key.removeprefix("layer."): tensor for key, tensor in tensors.items()}
    package = BaseCompressor.get_value_from_registry(group.format)
    assert torch.equal(package.decompress(local, group)["weight"], q.dequantize())


@pytest.mark.parametrize("size", [32, -1])
def test_int_quantized_of_other_tools_is_read(size: int) -> None:
    """What the package makes of the preset W4A8: a code to a byte."""
    scheme = replace(INT8, group_size=size)
    q = random_linear(scheme, 24, 96)
    strategy = {"strategy": "channel"} if size == -1 else {"strategy": "group", "group_size": size}
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False} | strategy
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    package = BaseCompressor.get_value_from_registry("int-quantized")
    local = {"weight": q.dequantize(), "weight_scale": q.scales_NG, "weight_zero_point": torch.zeros_like(q.scales_NG)}
    tensors = {f"layer.{key}": tensor for key, tensor in package.compress(local, group).items()}
    fmt = FORMATS["int-quantized"]
    config = {"config_groups": {"group_0": group.model_dump(mode="json")}}
    assert fmt.scheme_of(config, "folder") == scheme
    assert_same(fmt.unpack(tensors, "layer", scheme), q)
    tensors["layer.weight"][1, 2] = 8
    with pytest.raises(CheckpointError, match=r"folder: tensor 'layer\.weight' holds a code outside of 4 bits"):
        fmt.unpack(tensors, "layer", scheme, "folder")


def test_what_is_refused() -> None:
    fmt = FORMATS["pack-quantized"]
    for scheme in (replace(INT8, bits=8), replace(INT8, symmetric=False)):
        with pytest.raises(SchemeError, match="dynamic activations beside symmetric 4-bit weights alone"):
            fmt.check_scheme(scheme)
    config = fmt.quantization_config(INT8, ["layer"], [])
    config["config_groups"]["group_0"]["input_activations"]["dynamic"] = False
    with pytest.raises(
        CheckpointError, match=r"folder: .* are read activations of 8 bits that are symmetric and dynamic"
    ):
        fmt.scheme_of(config, "folder")
    with pytest.raises(UsageError, match="w4a8: kernels of rounded inputs take symmetric weights alone; drop --asym"):
        QuantizationConfig(target="w4a8", symmetric=False)
    with pytest.raises(SchemeError, match="float8 activations are dynamic ones beside integers"):
        Scheme(float8_activations=True)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Callable[[str], Path]:
    def make(target: str) -> Path:
        out = tmp_path_factory.mktemp(target) / "out"
        quantization = QuantizationConfig(target=target)
        job = MergeJob(
            base=str(tiny_llama),
            outputs=(OutputConfig(out=out, dtype="fp32", quantization=quantization),),
            calibration=CalibrationConfig(samples=4, seq_len=64),
            validation=None,
            device="cpu",
        )
        pipeline.run(job)
        return out

    return make


@pytest.mark.parametrize(
    ("target", "words", "tolerance"),
    # The package divides int8 inputs by absmax / 127.5, engines and we by absmax / 127.
    [("w4a8", "int8", 0.5), ("w4a8-fp8", "float8", 1e-3)],
)
def test_transformers_computes_our_logits(
    quantized: Callable[[str], Path], target: str, words: str, tolerance: float
) -> None:
    folder = quantized(target)
    ids = torch.arange(96)[None] * 37 % 2048
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    with torch.no_grad():
        expected = theirs(ids).logits
    view = dequantize(open_checkpoint(folder))
    for module in view.quantized_modules:
        assert torch.equal(theirs.get_submodule(module).weight, view.read(f"{module}.weight")), module
        assert bool((view.read_quantized(module).scales_NG > 0).all()), module
    candidate = Candidate.of(open_checkpoint(folder))
    model, how = candidate_model(candidate, candidate.view, "cpu", False, "qconv")
    (found,) = run_streamed(model, [ids])
    assert f"rounded to {words} as engines do" in how
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
