"""Whole jobs with Conv1D layers, fused linears, embeddings and kinds of adapters that are no LoRA, validated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qconv import pipeline
from qconv.quantization_config import QuantizationConfig
from tests.cli_cases import evaluation_ids, job, logits_of, mean_kl
from tests.merge_cases import trained

pytest.importorskip("peft")

CASES: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "gpt2-lora": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}, None),
    "gpt2-embedding": ("gpt2", {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}, None),
    "gpt2-ia3": (
        "gpt2",
        {"config_class": "IA3Config", "target_modules": ["c_attn"], "feedforward_modules": [], "fan_in_fan_out": True},
        None,
    ),
    "phi3-lora": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}, "gptq"),
    "phi3-gralora": (
        "phi3",
        {"config_class": "GraloraConfig", "target_modules": ["qkv_proj", "gate_up_proj"], "r": 8},
        "gptq",
    ),
    "llama-embedding": ("tiny", {"target_modules": ["embed_tokens", "q_proj"]}, "gptq"),
    "llama-rows": ("tiny", {"target_modules": ["q_proj"], "trainable_token_indices": list(range(40, 90))}, "gptq"),
    "llama-tokens-alone": (
        "tiny",
        {"config_class": "TrainableTokensConfig", "token_indices": list(range(40, 90))},
        None,
    ),
    "llama-norms": (
        "tiny",
        {"config_class": "LNTuningConfig", "target_modules": ["norm", "input_layernorm", "post_attention_layernorm"]},
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_output_computes_what_peft_computes_unmerged(
    name: str,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    random_model: Callable[..., Path],
    tiny_llama: Path,
) -> None:
    family, config, target = CASES[name]
    base = tiny_llama if family == "tiny" else random_model(family)
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = evaluation_ids(tmp_path_factory)
    without = logits_of(before.eval(), ids)
    adapted = trained(before, **config)
    adapted.save_pretrained(tmp_path / "adapter")
    quantization = QuantizationConfig(target=target, bits=8, algorithm="rtn") if target else None
    out = tmp_path / "out"
    options = {"trained_on": "16bit", "dtype": "fp32", "quantization": quantization}
    (report,) = pipeline.run(job(tmp_path_factory, out, base, tmp_path / "adapter", **options))
    expected = logits_of(adapted, ids)
    effect = mean_kl(expected, without)
    found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval() if target is None else None
    if found is not None:
        assert mean_kl(expected, logits_of(found, ids)) < 1e-4 * effect
    assert report.fidelity is not None
    limit = 1e-2 if target else 2e-3  # the report's models run in bfloat16
    assert report.fidelity["total"]["kl"]["mean"] < limit
    retained = report.fidelity["adapter_effect_retained"]["value"]
    assert retained > (0.75 if name == "llama-norms" else 0.9)  # whose effect is small beside bfloat16
    assert report.fidelity["base_without_adapter"]["kl"]["mean"] > 0.5 * effect
    if name in ("llama-embedding", "gpt2-embedding"):
        assert AutoConfig.from_pretrained(out).tie_word_embeddings is False
        assert any("untied" in note for note in report.stages["merge"]["notes"])
    if name == "llama-rows":
        assert AutoConfig.from_pretrained(out).tie_word_embeddings is True
        assert report.stages["merge"]["tensors with rows replaced"] == 2
