"""LoRA on embeddings and trained rows: merged as peft runs them unmerged, with tied and untied heads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qconv.adapter_configs import NormaliseConfig
from qconv.checkpoint import open_checkpoint
from qconv.convert import simulate_training_base
from qconv.errors import AdapterError
from qconv.merge import load_adapter, merge
from qconv.normalise import normalise
from qconv.remembered import Remembered
from qconv.skeleton import linear_weights
from qconv.streaming import StreamedModel
from qconv.types import Adapter, Checkpoint
from qconv.validate.reference import unmerged
from tests.merge_cases import IDS, TINY_LLAMA, edit_adapter, gpt2, logits, plain_model, qwen2, save_model, trained
from tests.test_merge_oracle import (
    assert_matches_peft_merge,
    assert_matches_unmerged,
    close,
    merged_view,
)
from tests.test_streaming import run

pytest.importorskip("peft")

ROWS = [3, 10, 31, 7]  # tokens of the rows that the models are asked about


def tied() -> nn.Module:
    return qwen2(tied=True)


def gemma() -> nn.Module:
    """Its embeddings are scaled by the root of the hidden size."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(14)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads, **tokens)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def reference_logits(base: Checkpoint, adapter: Adapter) -> torch.Tensor:
    """What validation compares with; no merging code runs."""
    (found,) = run(StreamedModel(base, "cpu", torch.float32, unmerged(adapter)), [IDS])
    return found


# name -> (model, config, whether the merged model is tied, None where it was not before either)
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], bool | None]] = {
    "lora": (qwen2, {"target_modules": ["embed_tokens", "q_proj"]}, None),
    "lora-alone": (qwen2, {"target_modules": ["embed_tokens"], "use_rslora": True, "r": 6}, None),
    "lora-dora": (qwen2, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}, None),
    "lora-and-head": (qwen2, {"target_modules": ["embed_tokens", "lm_head"]}, None),
    "lora-tied": (tied, {"target_modules": ["embed_tokens", "q_proj"]}, False),
    "lora-tied-dora": (tied, {"target_modules": ["embed_tokens"], "use_dora": True}, False),
    "lora-tied-and-head": (tied, {"target_modules": ["embed_tokens", "lm_head"]}, False),
    "lora-tied-and-head-saved": (tied, {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]}, False),
    "lora-kept-tied": (tied, {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}, True),
    "lora-head-kept-tied": (tied, {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True}, True),
    "lora-gpt2": (gpt2, {"target_modules": ["wte", "wpe", "c_attn"], "fan_in_fan_out": True}, False),
    "lora-gemma": (gemma, {"target_modules": ["embed_tokens", "q_proj"]}, False),
    "rows": (qwen2, {"target_modules": ["q_proj"], "trainable_token_indices": ROWS}, None),
    "rows-of-both": (
        qwen2,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": ROWS, "lm_head": [7, 8]}},
        None,
    ),
    "rows-tied": (tied, {"target_modules": ["q_proj"], "trainable_token_indices": ROWS}, True),
    "rows-tied-apart": (
        tied,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": ROWS, "lm_head": [7, 8]}},
        False,
    ),
    "rows-tied-head": (tied, {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [7, 8]}}, False),
    "rows-alone": (qwen2, {"config_class": "TrainableTokensConfig", "token_indices": ROWS}, None),
    "rows-alone-both": (
        qwen2,
        {
            "config_class": "TrainableTokensConfig",
            "token_indices": ROWS,
            "target_modules": ["embed_tokens", "lm_head"],
        },
        None,
    ),
    "rows-alone-tied": (tied, {"config_class": "TrainableTokensConfig", "token_indices": ROWS}, True),
    "rows-alone-gpt2": (gpt2, {"config_class": "TrainableTokensConfig", "token_indices": ROWS}, True),
    "rows-gemma": (gemma, {"target_modules": ["q_proj"], "trainable_token_indices": ROWS}, True),
}


@pytest.mark.parametrize("name", CASES)
def test_merges_as_peft_runs_it(name: str, tmp_path: Path) -> None:
    build, config, stays_tied = CASES[name]
    model = build()
    base_folder = save_model(model, tmp_path / "base")
    before = logits(model)
    adapted = trained(model, **config)
    adapted.save_pretrained(tmp_path / "adapter")
    view = merged_view(base_folder, tmp_path / "adapter")
    assert_matches_unmerged(view, adapted, before, tmp_path)
    base = open_checkpoint(base_folder)
    close(reference_logits(base, load_adapter(tmp_path / "adapter", base)), logits(adapted))
    if stays_tied is False:
        assert view.config["tie_word_embeddings"] is False
        assert "was untied from" in view.notes[0]
        assert "lm_head.weight" in view.specs()
    else:
        assert view.config["tie_word_embeddings"] == base.config["tie_word_embeddings"]
        assert not view.notes
        assert view.specs().keys() == base.specs().keys()
    if stays_tied is None:
        assert_matches_peft_merge(view, adapted)


def test_on_a_base_in_four_bits(tmp_path: Path) -> None:
    """Linears decoded from NF4, embedding and head in 16 bits; the unmerged model runs on just that."""
    source = open_checkpoint(TINY_LLAMA)
    base = simulate_training_base(source, "nf4", linear_weights(source))
    model = plain_model(base, tmp_path / "decoded")
    before = logits(model)
    adapted = trained(model, target_modules=["embed_tokens", "q_proj"])
    adapted.save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter", base)
    view = merge(base, [adapter])
    assert_matches_unmerged(view, adapted, before, tmp_path)
    close(reference_logits(base, adapter), logits(adapted))
    assert view.config["tie_word_embeddings"] is False


WHOLE: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "embedding": (tied, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "head": (tied, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "both": (tied, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "kept-tied": (
        tied,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "biases": (qwen2, {"target_modules": ["q_proj"], "bias": "all"}),
    "norms": (qwen2, {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "model.norm"]}),
    "dora": (qwen2, {"target_modules": ["q_proj"], "use_dora": True, "bias": "all", "modules_to_save": ["lm_head"]}),
    "ln-tuning": (qwen2, {"config_class": "LNTuningConfig", "target_modules": ["input_layernorm", "norm"]}),
}


@pytest.mark.parametrize("name", WHOLE)
def test_the_reference_has_whole_tensors_without_any_merging(name: str, tmp_path: Path) -> None:
    """So that a mistake in how they are merged shows between reference and candidate."""
    build, config = WHOLE[name]
    model = build()
    base = open_checkpoint(save_model(model, tmp_path / "base"))
    before = logits(model)
    adapted = trained(model, **config)
    adapted.save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter", base)
    found = reference_logits(base, adapter)
    close(found, logits(adapted))
    assert float((found - before).abs().max()) > 1e-2


def test_reading_changes_no_base_that_is_shared(tmp_path: Path) -> None:
    base_folder, folder = adapter_of(tmp_path, target_modules=["q_proj"], trainable_token_indices=ROWS)
    base = Remembered(open_checkpoint(base_folder))
    before = base.read("model.embed_tokens.weight").clone()
    merged = merge(base, [load_adapter(folder, base)]).read("model.embed_tokens.weight")
    assert torch.equal(base.read("model.embed_tokens.weight"), before)
    assert {int(row) for row in (merged != before).any(dim=1).nonzero()} == set(ROWS)


def test_rows_of_a_resized_vocabulary(tmp_path: Path) -> None:
    """New tokens, whose rows alone were trained: the whole embedding is saved along, and stays tied."""
    model = tied()
    base_folder = save_model(model, tmp_path / "base")
    model.resize_token_embeddings(72, mean_resizing=False)
    adapted = trained(model, target_modules=["q_proj"], trainable_token_indices=[7, 66, 71])
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    view = merged_view(base_folder, tmp_path / "adapter")
    assert view.config["vocab_size"] == 72
    assert view.config["tie_word_embeddings"] is True
    close(logits(plain_model(view, tmp_path / "plain")), logits(adapted))


def adapter_of(tmp_path: Path, **config: Any) -> tuple[Path, Path]:
    model = qwen2()
    base = save_model(model, tmp_path / "base")
    trained(model, **config).save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter"


ROWS_TENSOR = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
A_TENSOR = "base_model.model.model.embed_tokens.lora_embedding_A"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([3, 3], "each once"),
        ([3, -1], "each once"),
        ([3, 64], "trains row 64 of model.embed_tokens.weight, which has 64"),
        ([3], "a row of model.embed_tokens.weight for each of the 1 tokens"),
        ({"lm_head": [3, 4]}, "each once"),
        (None, "each once"),
    ],
)
def test_rows_that_config_and_file_disagree_on_are_refused(rows: Any, message: str, tmp_path: Path) -> None:
    base, folder = adapter_of(tmp_path, target_modules=["q_proj"], trainable_token_indices=[3, 5])
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "trainable_token_indices": rows}))
    with pytest.raises(AdapterError, match=message):
        load_adapter(folder, open_checkpoint(base))


@pytest.mark.parametrize("indices", [[3, 5], {"embed_tokens": [3, 5]}])
def test_rows_that_are_not_in_the_file_are_refused(indices: Any, tmp_path: Path) -> None:
    base, folder = adapter_of(tmp_path, target_modules=["q_proj"], trainable_token_indices=indices)
    other = edit_adapter(
        folder, tmp_path / "without", lambda tensors: {k: v for k, v in tensors.items() if "lora" in k}
    )
    with pytest.raises(AdapterError, match="the file does not hold the rows"):
        load_adapter(other, open_checkpoint(base))


def test_an_embedding_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    base_folder, folder = adapter_of(tmp_path, target_modules=["embed_tokens"])
    stored, base = load_file(folder / "adapter_model.safetensors"), open_checkpoint(base_folder)
    linear = {A_TENSOR.replace("embedding_A", "A.weight"): stored[A_TENSOR].clone()}
    bad = {
        "incomplete": {key: value for key, value in stored.items() if key != A_TENSOR},
        "another base": {**stored, A_TENSOR: stored[A_TENSOR][:, :-1]},
        "keep one": {**stored, **linear},
    }
    for message, tensors in bad.items():
        other = edit_adapter(folder, tmp_path / message.replace(" ", "-"), lambda _, tensors=tensors: tensors)
        with pytest.raises(AdapterError, match=message):
            load_adapter(other, base)


def test_a_lora_of_a_linear_is_none_of_an_embedding(tmp_path: Path) -> None:
    """Shapes fit when the model is told to be square; what each layer is decides."""
    base_folder, folder = adapter_of(tmp_path, target_modules=["embed_tokens"])
    other = edit_adapter(
        folder,
        tmp_path / "renamed",
        lambda tensors: {
            key.replace("lora_embedding_A", "lora_A.weight").replace("lora_embedding_B", "lora_B.weight"): value
            for key, value in tensors.items()
        },
    )
    base = open_checkpoint(base_folder)
    with pytest.raises(AdapterError, match="is not the weight of a linear layer"):
        load_adapter(other, base, linear_weights=linear_weights(base))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["embed_tokens"]}, "an embedding, on which vLLM loads no LoRA"),
        (
            {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
            "trained rows of model.embed_tokens.weight",
        ),
    ],
)
def test_what_engines_do_not_load_is_no_plain_lora(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    base, folder = adapter_of(tmp_path, **config)
    with pytest.raises(AdapterError, match=message):
        normalise(NormaliseConfig(adapter=str(folder), base=str(base), out=tmp_path / "out"))
