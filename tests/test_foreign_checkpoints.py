"""Quantized checkpoints that other tools wrote are read, converted, and merged with adapters trained on them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qconv import pipeline
from qconv.checkpoint import open_checkpoint
from qconv.config import MergeJob, OutputConfig
from qconv.convert import dequantize
from qconv.errors import CheckpointError
from tests.conftest import save_random_adapter
from tests.foreign import Write, awq, float8, float8_blocks, gptq, make, pack_quantized

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
GPTQ_ALONE = {key: value for key, value in GPTQ.items() if key != "quant_method"}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
ASYM = INT4 | {"symmetric": False, "group_size": 32}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
TOKENS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}


def group(targets: list[str], weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None} | more


def compressed(groups: list[dict[str, Any]], ignore: list[str], name: str = "pack-quantized") -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": ignore,
    }


def by_name(*rules: tuple[str, Write | None]) -> Callable[[str], Write | None]:
    """The first rule whose pattern is found in a module's name."""
    return lambda module: next(write for pattern, write in rules if re.search(pattern, module))


CASES: dict[str, tuple[Callable[[str], Write | None], dict[str, Any] | None, dict[str, dict[str, Any]]]] = {
    "gptq": (by_name(("", gptq(4, 128, True))), GPTQ, {}),
    "gptq, quantize_config.json alone": (
        by_name(("", gptq(4, 32, False))),
        None,
        {"quantize_config.json": GPTQ_ALONE | {"group_size": 32, "sym": False, "model_file_base_name": "model"}},
    ),
    "gptq with desc_act": (by_name(("", gptq(4, 64, True, True))), GPTQ | {"group_size": 64, "desc_act": True}, {}),
    "gptq_v2": (
        by_name(("", gptq(3, 32, False, minus=0))),
        GPTQ | {"bits": 3, "group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"},
        {},
    ),
    "gptq with rules": (
        by_name(
            (r"\.1\.mlp\.down", None),
            ("down_proj", gptq(8, 32, True)),
            ("self_attn", gptq(4, 128, False)),
            ("", gptq(2, -1, True)),
        ),
        GPTQ
        | {
            "bits": 2,
            "group_size": -1,
            "dynamic": {
                r"-:model\.layers\.1\.mlp\.down_proj": {},
                r"+:.*\.down_proj": {"bits": 8, "group_size": 32},
                r".*self_attn.*": {"bits": 4, "group_size": 128, "sym": False},
            },
        },
        {},
    ),
    "awq with modules_to_not_convert": (
        by_name(("layers.0.self_attn", None), ("", awq(64))),
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 64,
            "zero_point": True,
            "version": "GEMM",
            "modules_to_not_convert": ["layers.0.self_attn"],
        },
        {},
    ),
    "awq, quant_config.json alone": (
        by_name(("", awq(128))),
        None,
        {"quant_config.json": {"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"}},
    ),
    "compressed-tensors with groups": (
        by_name(
            (r"\.3\.mlp", None),
            ("down_proj", pack_quantized(8, -1, True)),
            ("o_proj", pack_quantized(4, 32, False)),
            ("", pack_quantized(4, 64, True)),
        ),
        compressed(
            [
                group(["Linear"], INT4),
                group(["re:.*down_proj$"], INT8),
                group([f"model.layers.{i}.self_attn.o_proj" for i in range(4)], ASYM),
            ],
            ["lm_head", r"re:.*layers\.3\.mlp.*"],
        ),
        {},
    ),
    "compressed-tensors with layouts": (
        by_name(("mlp", float8), ("", pack_quantized(4, 64, True))),
        compressed(
            [
                group([r"re:.*self_attn\..*"], INT4, format="pack-quantized"),
                group([r"re:.*mlp\..*"], FLOAT8, format="float-quantized", input_activations=TOKENS),
            ],
            ["lm_head"],
            "mixed-precision",
        ),
        {},
    ),
    "fp8 with modules_to_not_convert": (
        by_name(("k_proj|v_proj", None), ("", float8_blocks)),
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["k_proj", "v_proj", "lm_head"],
        },
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_read_bit_for_bit(tmp_path: Path, case: str) -> None:
    write, quantization, files = CASES[case]
    expected = make(tmp_path / "m", write, quantization, files)
    view = dequantize(open_checkpoint(tmp_path / "m"))
    assert set(view.specs()) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(view.read(name).float(), tensor.float()), name
    quantized = [name.removesuffix(".weight") for name in expected if name.endswith("_proj.weight") and write(name)]
    assert sorted(view.quantized_modules) == sorted(quantized)
    assert view.schemes.keys() == set(quantized)


@pytest.mark.parametrize("case", CASES)
def test_convert_writes_the_weights_rounded_once(tmp_path: Path, case: str) -> None:
    write, quantization, files = CASES[case]
    expected = make(tmp_path / "m", write, quantization, files)
    output = OutputConfig(out=tmp_path / "out", dtype="bf16")
    pipeline.run(MergeJob(base=str(tmp_path / "m"), outputs=(output,), validation=None, device="cpu"))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not [file for file in files if (tmp_path / "out" / file).exists()]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], tensor.bfloat16()) for name, tensor in expected.items())


MERGED = [
    "gptq with rules",
    "awq with modules_to_not_convert",
    "compressed-tensors with layouts",
    "fp8 with modules_to_not_convert",
]


@pytest.mark.parametrize("case", MERGED)
def test_an_adapter_is_merged_into_what_the_base_decodes_to(tmp_path: Path, case: str) -> None:
    """In float32: decoded weight + alpha / r * B A, by numpy's float64 product."""
    write, quantization, files = CASES[case]
    expected = make(tmp_path / "m", write, quantization, files)
    adapter, base, out = tmp_path / "adapter", tmp_path / "m", tmp_path / "out"
    save_adapter(adapter, base)
    outputs = (OutputConfig(out=out, dtype="fp32"),)
    pipeline.run(MergeJob(base=str(base), adapter=str(adapter), outputs=outputs, validation=None, device="cpu"))
    stored, lora = load_file(out / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    changed = 0
    for name, tensor in expected.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        wanted = tensor.double()
        if prefix + "A.weight" in lora:
            wanted = wanted + scaling * lora[prefix + "B.weight"].double() @ lora[prefix + "A.weight"].double()
            changed += 1
        assert torch.allclose(stored[name].double(), wanted, rtol=1e-6, atol=1e-7), name
    assert changed == 28


def save_adapter(folder: Path, base: Path) -> None:
    """Made on the plain model, since peft cannot load these bases without kernels; names and shapes are the same."""
    from tests.conftest import TINY_LLAMA

    save_random_adapter(TINY_LLAMA, folder, str(base), target_modules="all-linear")


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "marlin": ("gptq", {"is_marlin_format": True}, "'marlin' is not read.*repacked for one kernel.*folder from before"),
    "exllama": ("gptq", {"checkpoint_format": "exllama"}, "'exllama' is not read"),
    "gemv": ("awq with modules_to_not_convert", {"version": "gemv"}, "version 'gemv'.*take the gemm folder"),
    "excluded": ("gptq", {"dynamic": {r"-:.*down_proj": {}}}, "stored quantized, but the rule '-:.*down_proj'"),
    "expression": ("gptq", {"dynamic": {"+:(": {}}}, r"'\(' is not a regular expression"),
    "changes": ("gptq", {"dynamic": {"+:.*": 8}}, "is not an object"),
    "rules": ("gptq", {"dynamic": [8]}, "expected an object under 'dynamic'"),
    "ignored": (
        "compressed-tensors with groups",
        {"ignore": ["re:.*q_proj"]},
        "q_proj' is stored quantized, but 're:.*q_proj' under 'ignore'",
    ),
    "no group": (
        "compressed-tensors with layouts",
        {"config_groups": {"group_0": group(["re:.*nonesuch.*"], INT4)}, "format": "pack-quantized"},
        "no config group of quantization_config is for it",
    ),
    "no groups": ("compressed-tensors with groups", {"config_groups": [1]}, "expected objects under 'config_groups'"),
    "layout": (
        "compressed-tensors with layouts",
        {"config_groups": {"group_0": group(["Linear"], INT4, format="marlin-24")}},
        "'marlin-24' is not read",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    source, changes, message = REFUSED[case]
    write, quantization, files = CASES[source]
    make(tmp_path / "m", write, (quantization or {}) | changes, files)
    with pytest.raises(CheckpointError, match=message) as caught:
        dequantize(open_checkpoint(tmp_path / "m"))
    assert str(tmp_path / "m") in str(caught.value)


def test_several_gguf_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in ("model-Q4_K_M.gguf", "model-F16.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(
        CheckpointError, match=r"holds 2 GGUF files \(model-F16\.gguf, model-Q4_K_M\.gguf\); expected one"
    ):
        open_checkpoint(tmp_path)


def test_a_quantization_file_beside_plain_weights_is_stale(tmp_path: Path) -> None:
    expected = make(tmp_path / "m", lambda _: None, None, {"quantize_config.json": GPTQ_ALONE})
    view = dequantize(open_checkpoint(tmp_path / "m"))
    assert (view.kind, set(view.specs())) == ("plain", set(expected))
