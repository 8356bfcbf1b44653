"""A merged model computes what peft's unmerged model computes, and holds what peft's own fp32 merge holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qconv.checkpoint import open_checkpoint
from qconv.merge import MergedCheckpoint, load_adapter, merge
from tests.merge_cases import TINY_LLAMA, gpt2, llama, logits, plain_model, qwen2, save_model, trained

peft = pytest.importorskip("peft")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEARS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]


def merged_view(base_folder: Path, adapter_folder: Path) -> MergedCheckpoint:
    base = open_checkpoint(base_folder)
    return merge(base, [load_adapter(adapter_folder, base)])


def close(found: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= relative * float(expected.abs().max())


def assert_matches_unmerged(view: MergedCheckpoint, adapted: nn.Module, before: torch.Tensor, tmp_path: Path) -> None:
    expected = logits(adapted)
    assert float((expected - before).abs().max()) > 1e-2, "the adapter must matter for the comparison to mean anything"
    close(logits(plain_model(view, tmp_path / "plain")), expected)


def assert_matches_peft_merge(view: MergedCheckpoint, adapted: nn.Module) -> None:
    """Compares every tensor; call last, since peft merges in place."""
    state = adapted.merge_and_unload(safe_merge=False).state_dict()
    for name in view.specs():
        close(view.read(name).float(), state[name].float(), relative=2e-6)


def velora() -> Any:
    return peft.VeloraConfig(num_groups=2, init_type="random")


def monteclora() -> Any:
    return peft.MontecloraConfig(num_samples=2)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "llama-lora": (llama, {"target_modules": ALL_LINEARS}),
    "llama-rslora": (llama, {"target_modules": ALL_LINEARS, "use_rslora": True, "r": 8}),
    "llama-patterns": (
        llama,
        {
            "target_modules": ALL_LINEARS,
            "rank_pattern": {"q_proj": 2, r"layers\.[12]\.mlp\.down_proj": 8, "^model.layers.3.self_attn.o_proj": 3},
            "alpha_pattern": {"k_proj": 1, r"model.layers.0.mlp.(gate|up)_proj": 20},
        },
    ),
    "llama-rslora-patterns": (
        llama,
        {
            "target_modules": ["q_proj", "v_proj"],
            "use_rslora": True,
            "rank_pattern": {"v_proj": 9},
            "alpha_pattern": {"q_proj": 3},
        },
    ),
    "llama-dora": (llama, {"target_modules": ALL_LINEARS, "use_dora": True}),
    "llama-rsdora": (llama, {"target_modules": ["o_proj", "up_proj"], "use_dora": True, "use_rslora": True}),
    "llama-norm-saved": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "model.norm"]}),
    "llama-linear-saved": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
    "llama-mica": (llama, {"target_modules": ["q_proj"], "init_lora_weights": "mica"}),
    "llama-velora": (llama, {"target_modules": ["q_proj", "up_proj"], "velora_config": velora()}),
    "llama-monteclora": (llama, {"target_modules": ["q_proj", "up_proj"], "monteclora_config": monteclora()}),
    "llama-orthogonal": (llama, {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
    "qwen2-lora": (qwen2, {"target_modules": ALL_LINEARS}),
    "qwen2-bias-lora-only": (qwen2, {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}),
    "qwen2-bias-all": (qwen2, {"target_modules": ["q_proj"], "bias": "all"}),
    "qwen2-lora-bias": (qwen2, {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "qwen2-lora-bias-and-bias-all": (qwen2, {"target_modules": ["q_proj"], "lora_bias": True, "bias": "all"}),
    "qwen2-dora-bias-all": (qwen2, {"target_modules": ["q_proj", "k_proj"], "use_dora": True, "bias": "all"}),
    "qwen2-untied-saved": (qwen2, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "qwen2-untied-head-saved": (qwen2, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "qwen2-untied-head-lora": (qwen2, {"target_modules": ["q_proj", "lm_head"]}),
    "gpt2-conv1d": (gpt2, {"target_modules": CONV1D, "fan_in_fan_out": True}),
    "gpt2-conv1d-dora": (gpt2, {"target_modules": CONV1D, "fan_in_fan_out": True, "use_dora": True}),
    "gpt2-bias-all-norm-saved": (gpt2, {"target_modules": CONV1D, "bias": "all", "modules_to_save": ["ln_f"]}),
}


@pytest.mark.parametrize("name", CASES)
def test_unmerged_logits_and_peft_merge(name: str, tmp_path: Path) -> None:
    build, config = CASES[name]
    model = build()
    base_folder = TINY_LLAMA if build is llama else save_model(model, tmp_path / "base")
    before = logits(model)
    adapted = trained(model, **config)
    adapted.save_pretrained(tmp_path / "adapter")
    view = merged_view(base_folder, tmp_path / "adapter")
    assert_matches_unmerged(view, adapted, before, tmp_path)
    assert not view.notes
    assert_matches_peft_merge(view, adapted)


def tied_case(tmp_path: Path, **config: Any) -> tuple[MergedCheckpoint, nn.Module]:
    """A tied model (peft's own merge is no oracle here: it adds a head's update to the embedding too)."""
    model = llama()
    before = logits(model)
    adapted = trained(model, **config)
    adapted.save_pretrained(tmp_path / "adapter")
    view = merged_view(TINY_LLAMA, tmp_path / "adapter")
    assert_matches_unmerged(view, adapted, before, tmp_path)
    return view, adapted


def test_lora_on_a_tied_head_unties(tmp_path: Path) -> None:
    view, _ = tied_case(tmp_path, target_modules=["q_proj", "lm_head"])
    assert view.config["tie_word_embeddings"] is False
    assert view.specs()["lm_head.weight"].dtype is torch.float32
    assert "lm_head.weight" in view.changed
    assert "model.embed_tokens.weight" not in view.changed
    assert "lm_head.weight was untied from model.embed_tokens.weight" in view.notes[0]
    assert list(view.specs())[-1] == "lm_head.weight"


def test_dora_on_a_tied_head_unties(tmp_path: Path) -> None:
    view, _ = tied_case(tmp_path, target_modules=["lm_head"], use_dora=True)
    assert view.config["tie_word_embeddings"] is False


def test_saved_tied_head_unties(tmp_path: Path) -> None:
    view, _ = tied_case(tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert view.config["tie_word_embeddings"] is False
    assert "trained the head alone" in view.notes[0]


def test_saved_tied_embedding_alone_keeps_the_base_as_head(tmp_path: Path) -> None:
    """peft runs the trained copy as embedding while the head stays the base's; so does the merged model."""
    view, _ = tied_case(tmp_path, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    assert view.config["tie_word_embeddings"] is False
    assert "trained the embedding alone" in view.notes[0]
    base = open_checkpoint(TINY_LLAMA)
    assert torch.equal(view.read("lm_head.weight"), base.read("model.embed_tokens.weight"))


def test_tied_embedding_and_head_saved_apart_untie(tmp_path: Path) -> None:
    view, _ = tied_case(tmp_path, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    assert view.config["tie_word_embeddings"] is False
    assert "they differ" in view.notes[0]


@pytest.mark.parametrize("saved", ["embed_tokens", "lm_head"])
def test_ensure_weight_tying_stays_tied(saved: str, tmp_path: Path) -> None:
    view, _ = tied_case(tmp_path, target_modules=["q_proj"], modules_to_save=[saved], ensure_weight_tying=True)
    assert view.config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in view.specs()
    assert "model.embed_tokens.weight" in view.changed
    assert not view.notes


def test_saved_embedding_with_lora_on_the_tied_head(tmp_path: Path) -> None:
    view, _ = tied_case(tmp_path, target_modules=["lm_head"], modules_to_save=["embed_tokens"])
    assert view.config["tie_word_embeddings"] is False
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= view.changed


@pytest.mark.parametrize("vocab_size", [64, 32])
def test_gpt2_tied_head_and_square_conv1d(vocab_size: int, tmp_path: Path) -> None:
    """peft leaves fan_in_fan_out false in the file, since the head came last; the layers are Conv1D all the same.

    With 32 tokens the head is square too, and it is the one that is not Conv1D.
    """
    model = gpt2(vocab_size)
    base_folder = save_model(model, tmp_path / "base")
    before = logits(model)
    adapted = trained(model, target_modules=[*CONV1D, "lm_head"])
    adapted.save_pretrained(tmp_path / "adapter")
    view = merged_view(base_folder, tmp_path / "adapter")
    assert_matches_unmerged(view, adapted, before, tmp_path)
    assert view.specs()["lm_head.weight"].shape == (vocab_size, 32)


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"target_modules": ["q_proj"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
    ],
    ids=["saved-along", "embedding", "head", "both", "kept-tied", "head-lora"],
)
def test_resized_tied_vocabulary(config: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    model = llama()
    torch.manual_seed(3)
    model.resize_token_embeddings(2056, mean_resizing=False)
    adapted = trained(model, **config)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    view = merged_view(TINY_LLAMA, tmp_path / "adapter")
    assert view.config["vocab_size"] == 2056
    assert view.config["tie_word_embeddings"] is tied
    assert any("2056 rows, 2048 in the base" in note for note in view.notes)
    close(logits(plain_model(view, tmp_path / "plain")), logits(adapted))


def test_resized_untied_vocabulary(tmp_path: Path) -> None:
    model = qwen2()
    base_folder = save_model(model, tmp_path / "base")
    model.resize_token_embeddings(72, mean_resizing=False)
    adapted = trained(model, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    adapted.save_pretrained(tmp_path / "adapter")
    view = merged_view(base_folder, tmp_path / "adapter")
    assert view.config["vocab_size"] == 72
    close(logits(plain_model(view, tmp_path / "plain")), logits(adapted))


def test_sixteen_bit_adapter_on_a_sixteen_bit_base(tmp_path: Path) -> None:
    """Factors stored in bfloat16 are read exactly and multiplied in float32."""
    adapted = trained(llama(), target_modules=ALL_LINEARS)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16().float()
    expected = logits(adapted)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    adapted.save_pretrained(tmp_path / "adapter")
    view = merged_view(TINY_LLAMA, tmp_path / "adapter")
    close(logits(plain_model(view, tmp_path / "plain")), expected)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert view.specs()[name].dtype is torch.float32
    assert view.specs()["model.norm.weight"].dtype is torch.bfloat16
    assert view.read("model.norm.weight").dtype is torch.bfloat16


def test_unchanged_tensors_are_the_bases_own(tmp_path: Path) -> None:
    adapted = trained(llama(), target_modules=["q_proj"], layers_to_transform=[1])
    adapted.save_pretrained(tmp_path / "adapter")
    base = open_checkpoint(TINY_LLAMA)
    view = merge(base, [load_adapter(tmp_path / "adapter", base)])
    assert view.changed == {"model.layers.1.self_attn.q_proj.weight"}
    assert list(view.specs()) == list(base.specs())
    for name in view.specs().keys() - view.changed:
        assert torch.equal(view.read(name), base.read(name))


@pytest.mark.parametrize("kind", ["LoraConfig", "LoHaConfig", "IA3Config", "OFTConfig"])
def test_fused_projections(kind: str, tmp_path: Path) -> None:
    """Phi-3 holds q, k and v in one linear, and gate and up in another; so does an adapter on them."""
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(13)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    model = Phi3ForCausalLM(Phi3Config(**sizes, **heads, **tokens, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    base_folder = save_model(model, tmp_path / "base")
    before = logits(model)
    config: dict[str, Any] = {"feedforward_modules": []} if kind == "IA3Config" else {}
    adapted = trained(model, config_class=kind, target_modules=["qkv_proj", "gate_up_proj"], **config)
    adapted.save_pretrained(tmp_path / "adapter")
    view = merged_view(base_folder, tmp_path / "adapter")
    assert_matches_unmerged(view, adapted, before, tmp_path)
    assert_matches_peft_merge(view, adapted)
