"""What a job writes, through readers that nobody here wrote: transformers, compressed-tensors, and layouts from paper.

vLLM's loaders are not run here; what they demand of ``config.json`` is asserted key by key.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qconv.checkpoint import open_checkpoint
from qconv.convert import dequantize
from qconv.runners import Candidate, candidate_model
from tests.cli_cases import (
    LAYOUTS,
    NUM_LINEARS,
    VARIANTS,
    Variant,
    decoded_weights,
    evaluation_ids,
    logits_of,
    made,
    mean_kl,
    stored_tensors,
    whole_model,
)
from tests.test_streaming import run

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, tiny_nf4: Path, tiny_adapter: Path) -> Make:
    return partial(made, tmp_path_factory, tiny_nf4, tiny_adapter)


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    return evaluation_ids(tmp_path_factory)


def ours(folder: Path, ids: Tensor) -> Tensor:
    """Logits of the candidate that validation judges."""
    candidate = Candidate.of(open_checkpoint(folder))
    model, _ = candidate_model(candidate, candidate.view, "cpu", False, "qconv")
    (logits,) = run(model, [ids])
    return logits


def quantization_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_transformers_computes_our_logits_from_a_plain_merge(output: Make, ids: Tensor, dtype: str) -> None:
    folder = output(None, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert str(model.dtype) == {"bf16": "torch.bfloat16", "fp16": "torch.float16", "fp32": "torch.float32"}[dtype]
    assert not hasattr(model.config, "quantization_config")
    assert torch.equal(logits_of(model, ids), ours(folder, ids))


SYMMETRIC = [v for v in VARIANTS if v.target in ("w4a16", "w8a16") and v.symmetric and v.algorithm in ("rtn", "gptq")]


@pytest.mark.parametrize("variant", SYMMETRIC, ids=str)
def test_compressed_tensors_computes_our_logits_from_integers(output: Make, ids: Tensor, variant: Variant) -> None:
    """The reader multiplies code and scale in bfloat16, which is our float32 product rounded once: the same weights."""
    folder = output(variant)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"] | {key for key, *_ in info["mismatched_keys"]}
    found, expected = logits_of(model.eval(), ids), ours(folder, ids)
    assert mean_kl(expected, found) < 1e-6
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.999
    view = dequantize(open_checkpoint(folder))
    assert len(view.quantized_modules) == NUM_LINEARS
    for module in view.quantized_modules:  # the first forward has decompressed the loaded model
        weight = model.get_submodule(module).weight
        assert torch.equal(weight.to(torch.bfloat16), view.read(f"{module}.weight").to(torch.bfloat16)), module


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_compressed_tensors_computes_our_logits_from_fp8(output: Make, ids: Tensor, dtype: str) -> None:
    """Both quantize the inputs per token. In float32 every code agrees, and so do the logits.

    In bfloat16 the package divides by the scale in bfloat16 and so rounds twice; serving engines and we divide in
    float32. That noise is about as large as the quantization of the activations (KL 0.0014 here), hence the bound.
    """
    folder = output(Variant("fp8", "fp8", 8), dtype)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    found, expected = logits_of(model.eval(), ids), ours(folder, ids)
    view = dequantize(open_checkpoint(folder))
    if dtype == "fp32":
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        weight_only = whole_model({name: view.read(name) for name in view.specs()}, torch.float32)
        assert (found - logits_of(weight_only, ids)).abs().max() > 0.05  # the activations do matter
    else:
        assert mean_kl(expected, found) < 0.005
    for module in view.quantized_modules:
        weight = model.get_submodule(module).weight
        assert torch.equal(weight, view.read(f"{module}.weight").to(weight.dtype)), module


PACKED = [
    variant
    for variant in VARIANTS
    if variant.target in ("gptq", "gptq_v2", "awq") and variant.algorithm in ("rtn", "gptq")
]


@pytest.mark.parametrize("variant", PACKED, ids=str)
def test_published_layout_decodes_to_our_weights(output: Make, ids: Tensor, variant: Variant) -> None:
    folder = output(variant)
    weights = decoded_weights(folder)
    view = dequantize(open_checkpoint(folder))
    assert weights.keys() == view.specs().keys()
    assert len(view.quantized_modules) == NUM_LINEARS
    for name, weight in weights.items():
        assert torch.equal(weight, view.read(name).float()), name
    assert torch.equal(logits_of(whole_model(weights, torch.bfloat16), ids), ours(folder, ids))


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if v.target.startswith("gptq") and v.algorithm == "gptq"], ids=str
)
def test_what_vllm_needs_of_gptq(output: Make, variant: Variant) -> None:
    """vLLM's GPTQConfig reads these keys without a default, and takes Marlin kernels for what `desc_act` says."""
    folder = output(variant)
    config = quantization_config(folder)
    required = {key: config[key] for key in ("quant_method", "bits", "group_size", "desc_act", "sym")}
    assert required == {
        "quant_method": "gptq",
        "bits": variant.bits,
        "group_size": 128,
        "desc_act": variant.desc_act,
        "sym": variant.symmetric,
    }
    assert (config["checkpoint_format"], config["lm_head"]) == (variant.target, False)
    assert json.loads((folder / "quantize_config.json").read_text()) == config
    tensors = stored_tensors(folder)
    for name, tensor in tensors.items():
        if name.endswith(".g_idx"):
            in_order = torch.equal(tensor, torch.arange(len(tensor), dtype=torch.int32) // 128)
            assert in_order == (not variant.desc_act), name
            assert torch.equal(tensor.bincount(), torch.full((len(tensor) // 128,), 128))
        if name.endswith(".scales"):
            assert tensor.dtype == torch.float16
    if variant.symmetric:
        # The middle code, less one in version 1, over and over; three bits repeat after three words.
        middle = 2 ** (variant.bits - 1) - (variant.target == "gptq")
        stream = sum(middle << (place * variant.bits) for place in range(32)).to_bytes(4 * variant.bits, "little")
        words = torch.frombuffer(bytearray(stream), dtype=torch.int32)
        for name in (name for name in tensors if name.endswith(".qzeros")):
            assert torch.equal(
                tensors[name].view(-1, len(words)), words.expand(tensors[name].numel() // len(words), -1)
            )
    # Engines fuse these, and one fused layer has one group index.
    layer = "model.layers.1.self_attn."
    assert torch.equal(tensors[layer + "q_proj.g_idx"], tensors[layer + "v_proj.g_idx"])


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_vllm_needs_of_awq(output: Make, symmetric: bool) -> None:
    folder = output(Variant("awq", "rtn", 4, symmetric))
    config = quantization_config(folder)
    assert config == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    zeros = [t for name, t in stored_tensors(folder).items() if name.endswith(".qzeros")]
    assert len(zeros) == NUM_LINEARS
    assert all(bool((t == 0x88888888 - (1 << 32)).all()) for t in zeros) == symmetric


@pytest.mark.parametrize("variant", [v for v in LAYOUTS if v.target in ("w4a16", "w8a16", "fp8")], ids=str)
def test_what_vllm_needs_of_compressed_tensors(output: Make, variant: Variant) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    folder = output(variant)
    config = QuantizationConfig.model_validate(quantization_config(folder))
    assert (config.quant_method, config.quantization_status, config.ignore) == (
        "compressed-tensors",
        "compressed",
        ["lm_head"],
    )
    assert config.format == ("float-quantized" if variant.target == "fp8" else "pack-quantized")
    (group,) = config.config_groups.values()
    assert (group.targets, group.weights.num_bits, group.weights.dynamic) == (["Linear"], variant.bits, False)
    names = stored_tensors(folder).keys()
    zero_points = [name for name in names if name.endswith(".weight_zero_point")]
    assert len(zero_points) == (NUM_LINEARS if variant.symmetric is False else 0)
    assert not any(name.endswith(".weight_g_idx") for name in names)
    is_static = variant.activations == "static"
    assert sum(name.endswith(".input_scale") for name in names) == (NUM_LINEARS if is_static else 0)
    if is_static:
        assert (group.weights.strategy, group.input_activations.strategy) == ("tensor", "tensor")
        assert group.input_activations.dynamic is False
    elif variant.target == "fp8":
        assert (group.input_activations.strategy, group.input_activations.dynamic) == ("token", True)
    else:
        assert group.input_activations is None
