"""Families whose tensors lie otherwise in GGUF files than in the model, experts, Phi-3 and Gemma: against gguf-py's
reader, transformers' loader where it knows the family, and the original model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from qconv import pipeline
from qconv.checkpoint import open_checkpoint
from qconv.config import MergeJob, OutputConfig
from qconv.convert import dequantize
from qconv.errors import CheckpointError
from qconv.gguf.families import family_of, family_of_keys
from qconv.plan import make_plan
from qconv.progress import QUIET
from qconv.quantization_config import QuantizationConfig
from tests.cli_cases import job, report_of
from tests.conftest import copy_tokenizer
from tests.test_gguf import by_transformers, decoded, file_in

SIZES: dict[str, Any] = {
    "vocab_size": 2080,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 64, "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [1.0 + 0.5 * i for i in range(6)],
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_GEMMA = {"tie_word_embeddings": True, "num_hidden_layers": 7, "sliding_window": 8, "query_pre_attn_scalar": 16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("olmoe", _EXPERTS | {"num_key_value_heads": 4}),
    "qwen2_moe": ("qwen2_moe", _EXPERTS | {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("qwen3_moe", _EXPERTS | {"moe_intermediate_size": 48, "norm_topk_prob": True}),
    "phi3": ("phi3", {}),
    "phi3, long rope": ("phi3", {"original_max_position_embeddings": 64, "rope_parameters": LONG}),
    "gemma": ("gemma", {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3": ("gemma3_text", _GEMMA),
}
# Sizes that transformers' loader takes for granted, as it does not read them from the file.
LOADED: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    "qwen3_moe": {"moe_intermediate_size": 768},
    "phi3": {"vocab_size": 32064, "pad_token_id": 32000},
    "gemma2": {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096},
    "gemma3": {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096},
}
IDS = torch.arange(3, 51).reshape(2, 24) * 31 % 2048


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, nn.Module]]:
    """A random model in float32, its norms and biases too."""

    def make(case: str, **changes: Any) -> tuple[Path, nn.Module]:
        family, options = CASES[case]
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **(SIZES | options | changes))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        folder = tmp_path_factory.mktemp("models") / family
        model.save_pretrained(folder)
        copy_tokenizer(folder)
        return folder, model

    return make


def job_of(base: Path, out: Path, target: str) -> MergeJob:
    output = OutputConfig(out=out, quantization=QuantizationConfig(target=target))  # type: ignore[arg-type]
    return MergeJob(base=str(base), outputs=(output,), validation=None, device="cpu")


def written(base: Path, out: Path, target: str = "gguf-f32") -> Path:
    pipeline.run(job_of(base, out, target))
    return out


def tensors_of(folder: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in GGUFReader(file_in(folder)).tensors}


@pytest.mark.parametrize("case", CASES)
def test_the_file_alone_computes_what_the_model_does(
    saved: Callable[..., tuple[Path, nn.Module]], tmp_path: Path, case: str
) -> None:
    """From the config that the file's keys give."""
    base, model = saved(case)
    out = written(base, tmp_path / "out")
    for beside in ("config.json", "generation_config.json"):
        (out / beside).unlink(missing_ok=True)
    original, read = dequantize(open_checkpoint(base)), dequantize(open_checkpoint(out))
    assert original.specs().keys() == read.specs().keys()
    for name in original.specs():  # a norm plus one, minus one
        assert torch.allclose(original.read(name), read.read(name), rtol=0, atol=1e-6), name
    again = AutoModelForCausalLM.from_config(AutoConfig.for_model(**dict(read.config)), dtype=torch.float32).eval()
    again.load_state_dict(fused_as_in_memory(again, {name: read.read(name) for name in read.specs()}), strict=False)
    with torch.no_grad():
        assert torch.allclose(again(IDS).logits, model(IDS).logits, atol=1e-4)


def fused_as_in_memory(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts stacked into the parameters that transformers has."""
    result = dict(tensors)
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        if kind not in ("gate_up_proj", "down_proj") or parameter.ndim != 3:
            continue
        stored = module if f"{module}.0.gate_proj.weight" in tensors else module.replace(".mlp.", ".block_sparse_moe.")
        roles = ("w1", "w3", "w2") if stored != module else ("gate_proj", "up_proj", "down_proj")
        wanted = roles[:2] if kind == "gate_up_proj" else roles[2:]
        result[name] = torch.stack(
            [torch.cat([tensors[f"{stored}.{e}.{role}.weight"] for role in wanted]) for e in range(len(parameter))]
        )
        router = f"{stored.removesuffix('.experts')}.gate.weight"
        result[f"{module.removesuffix('.experts')}.gate.weight"] = tensors[router]
    return result


@pytest.mark.parametrize("case", LOADED)
def test_transformers_computes_the_same_from_the_file(
    saved: Callable[..., tuple[Path, nn.Module]], tmp_path: Path, case: str
) -> None:
    base, model = saved(case, **LOADED[case])
    out = written(base, tmp_path / "out")
    with torch.no_grad():
        assert torch.allclose(by_transformers(out)(IDS).logits, model(IDS).logits, atol=1e-4)


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe"])
def test_experts_of_a_layer_are_one_tensor_and_routers_stay_in_float32(
    saved: Callable[..., tuple[Path, nn.Module]], tmp_path: Path, case: str
) -> None:
    base, _ = saved(case, intermediate_size=64, moe_intermediate_size=64)
    out = written(base, tmp_path / "out", "gguf-f16")
    planned = make_plan(job_of(base, tmp_path / "elsewhere" / "out", "gguf-f16"), QUIET).writers[0]
    assert planned.weights_bytes == file_in(out).stat().st_size
    source, stored = dequantize(open_checkpoint(base)), tensors_of(out)
    module, up = ("block_sparse_moe", "w3") if case == "mixtral" else ("mlp", "up_proj")
    tensor = stored["blk.1.ffn_up_exps.weight"]
    expected = torch.stack([source.read(f"model.layers.1.{module}.experts.{e}.{up}.weight") for e in range(4)]).half()
    assert tensor.tensor_type.name == "F16"
    assert torch.equal(torch.from_numpy(tensor.data.copy()), expected)
    assert stored["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"
    fields = GGUFReader(file_in(out)).fields
    arch = fields["general.architecture"].contents()
    assert (fields[f"{arch}.expert_count"].contents(), fields[f"{arch}.expert_used_count"].contents()) == (4, 2)
    if case == "qwen2_moe":
        assert stored["blk.0.ffn_gate_inp_shexp.weight"].tensor_type.name == "F32"
        assert fields["qwen2moe.expert_shared_feed_forward_length"].contents() == 64


def test_gemmas_norms_are_stored_plus_one(saved: Callable[..., tuple[Path, nn.Module]], tmp_path: Path) -> None:
    base, model = saved("gemma3")
    stored = tensors_of(written(base, tmp_path / "out"))
    layer = model.model.layers[0]  # type: ignore[union-attr,index]
    for name, norm in (
        ("attn_norm", layer.input_layernorm), ("post_attention_norm", layer.post_attention_layernorm),
        ("ffn_norm", layer.pre_feedforward_layernorm), ("post_ffw_norm", layer.post_feedforward_layernorm),
        ("attn_q_norm", layer.self_attn.q_norm),
    ):  # fmt: skip
        assert torch.equal(torch.from_numpy(stored[f"blk.0.{name}.weight"].data.copy()), norm.weight.detach() + 1), name


def test_experts_are_calibrated_and_judged_from_the_file(
    saved: Callable[..., tuple[Path, nn.Module]], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base, _ = saved("olmoe", vocab_size=2048)
    out = tmp_path / "out"
    pipeline.run(job(tmp_path_factory, out, base, quantization=QuantizationConfig(target="gguf-q8_0")))
    report = report_of(out)
    assert report["findings"] == []
    assert report["fidelity"]["total"]["kl"]["mean"] < 0.01
    assert report["stages"]["quantization"]["linears quantized"] == 2 * (4 + 4 * 3)
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors_of(out).items()}
    assert (kinds["blk.0.ffn_down_exps.weight"], kinds["blk.0.ffn_gate_inp.weight"]) == ("Q8_0", "F32")
    assert decoded(out).keys() == dequantize(open_checkpoint(base)).specs().keys()


def test_an_importance_matrix_counts_the_tokens_of_each_expert(
    saved: Callable[..., tuple[Path, nn.Module]], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base, _ = saved("olmoe")
    config = QuantizationConfig(target="gguf-f16", imatrix=True)
    options = job(tmp_path_factory, tmp_path / "out", base, quantization=config, validation=None)
    pipeline.run(options)
    stored = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "out" / "model.imatrix").tensors}
    assert stored["blk.0.ffn_down_exps.weight.in_sum2"].shape == (4, 96)
    assert stored["blk.1.ffn_up_exps.weight.in_sum2"].shape == (4, 64)
    chosen, all_tokens = stored["blk.0.ffn_up_exps.weight.counts"], stored["blk.0.attn_q.weight.counts"]
    assert chosen.shape == (4, 1)
    assert chosen.sum() == 2 * all_tokens.sum()  # two experts for each token


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob False: llama.cpp's architecture has True"),
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob True"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers \[1\]"),
        ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads 2: llama.cpp's architecture has 4"),
        ("qwen2_moe", {"tie_word_embeddings": True}, r"'lm_head.weight' is missing, and a GGUF file of qwen2moe"),
        ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar 64"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping False"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "layer_types"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    saved: Callable[..., tuple[Path, nn.Module]], tmp_path: Path, case: str, changes: dict[str, Any], message: str
) -> None:
    base, _ = saved(case, **changes)
    with pytest.raises(CheckpointError, match=message):
        written(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_families_are_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="model type 'gpt2' is not written as GGUF; written are llama, mistral"):
        family_of({"model_type": "gpt2"}, "here")
    with pytest.raises(CheckpointError, match="architecture 'gemma2' with experts is not read"):
        family_of_keys({"general.architecture": "gemma2", "gemma2.expert_count": 8}, "here")
