"""Running a model block by block against transformers running it whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from qconv.checkpoint import open_checkpoint
from qconv.errors import CheckpointError
from qconv.skeleton import find_blocks, linear_weights
from qconv.streaming import BlockModel, StreamedModel
from qconv.validate.resident import ResidentModel
from tests.conftest import FAMILIES


def run(model: BlockModel, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    hidden = model.embed(batches)
    for index in range(model.num_blocks):
        block = model.load_block(index)
        hidden = [model.run_block(index, block, h_BSH) for h_BSH in hidden]
    head = model.head()
    return [head(h_BSH) for h_BSH in hidden]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(random_model, family, dtype):
    folder = random_model(family)
    batches = [torch.randint(2048, (2, 96)), torch.randint(2048, (1, 33))]
    streamed = run(StreamedModel(open_checkpoint(folder), "cpu", dtype), batches)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    whole.config._experts_implementation = "eager"  # others round sums in another order
    with torch.no_grad():
        for ids, logits in zip(batches, streamed, strict=True):
            assert torch.equal(logits, whole(ids).logits)


SMALL = {"vocab_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 64}
SMALL |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "initializer_range": 0.1}
TUPLE_FAMILIES: dict[str, dict[str, Any]] = {
    "falcon": {},
    "bloom": {},
    "mpt": {"d_model": 64, "n_layers": 4, "n_heads": 4, "max_seq_len": 64},
    "gptj": {"n_embd": 64, "n_layer": 4, "n_head": 4, "rotary_dim": 8},
}


def save_random(folder: Path, family: str, model_class: Any = AutoModelForCausalLM, **sizes: Any) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class.from_config(AutoConfig.for_model(family, **sizes), dtype=torch.float32)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)  # biases and norms too
        model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", TUPLE_FAMILIES)
def test_families_whose_layers_return_tuples(tmp_path, family):
    folder = save_random(tmp_path / "m", family, **(SMALL | TUPLE_FAMILIES[family]))
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    batches = [torch.randint(512, (2, 48)), torch.randint(512, (1, 33))]
    results = [
        run(StreamedModel(open_checkpoint(folder), "cpu", torch.float32), batches),
        run(ResidentModel(whole, "cpu"), batches),
    ]
    kinds: list[bool] = []
    find_blocks(whole, family)[1][0].register_forward_hook(lambda *call: kinds.append(isinstance(call[2], tuple)))
    with torch.no_grad():
        for number, ids in enumerate(batches):
            expected = whole(ids).logits
            assert all(torch.equal(result[number], expected) for result in results)
    assert kinds == [True, True]  # otherwise this family tests nothing


def test_trained_tied_model(tiny_llama):
    ids = torch.randint(2048, (2, 64))
    (logits,) = run(StreamedModel(open_checkpoint(tiny_llama), "cpu", torch.float32), [ids])
    with torch.no_grad():
        assert torch.equal(logits, AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)(ids).logits)


def test_linear_weights_are_those_bitsandbytes_quantizes(tiny_llama, tiny_nf4):
    packed = {name.removesuffix(".absmax") for name in open_checkpoint(tiny_nf4).specs() if name.endswith(".absmax")}
    packed = {name for name in packed if not name.endswith("nested_absmax")}
    assert set(linear_weights(open_checkpoint(tiny_llama))) == {name for name in packed if name.endswith(".weight")}


def test_at_most_one_block_is_in_memory(tiny_llama):
    model = StreamedModel(open_checkpoint(tiny_llama), "cpu", torch.float32)
    model.load_block(0)
    assert all(parameter.is_meta for layer in model._layers for parameter in layer.parameters())


@pytest.mark.parametrize("fault", ["missing", "shape", "architecture"])
def test_a_checkpoint_that_is_not_the_model_is_refused(tiny_llama, tmp_path, fault):
    folder = tmp_path / "m"
    shutil.copytree(tiny_llama, folder)
    tensors = load_file(folder / "model.safetensors")
    if fault == "missing":
        del tensors["model.layers.2.mlp.up_proj.weight"]
    elif fault == "shape":
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(4, 4)
    else:
        config = json.loads((folder / "config.json").read_text()) | {"model_type": "nonesuch"}
        (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    message = {
        "missing": r"needs tensor.*layers\.2\.mlp\.up_proj",
        "shape": r"has shape \[4, 4\]",
        "architecture": "nonesuch",
    }
    with pytest.raises(CheckpointError, match=message[fault]):
        StreamedModel(open_checkpoint(folder), "cpu", torch.float32)


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("lama", "has model_type 'lama'; .* did you mean llama"),
        ("nonesuch", "has model_type 'nonesuch'"),
        (None, "has no model_type"),
        (3, "has model_type 3"),
    ],
)
def test_a_family_that_transformers_does_not_know_is_told_in_a_few_lines(tiny_llama, tmp_path, model_type, words):
    folder = tmp_path / "m"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": model_type}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words) as caught:
        StreamedModel(open_checkpoint(folder), "cpu", torch.float32)
    assert "plain merge" in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "values",
    [
        {"num_attention_heads": 0},
        {"hidden_size": "wide"},
        {"num_hidden_layers": [4]},
        {"rope_parameters": {"rope_type": "nonesuch", "rope_theta": 1e4}},
    ],
)
def test_a_config_that_transformers_refuses_is_the_users(tiny_llama, tmp_path, values):
    folder = tmp_path / "m"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json.*'llama'") as raised:
        linear_weights(open_checkpoint(folder))
    assert raised.value.__cause__ is not None


@pytest.mark.parametrize("use", [linear_weights, lambda view: StreamedModel(view, "cpu", torch.float32)])
def test_a_composite_checkpoint_is_refused(tmp_path, use):
    text = SMALL | {"intermediate_size": 64, "head_dim": 16, "num_key_value_heads": 2, "pad_token_id": 0}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"text_config": text, "vision_config": vision | {"image_size": 28, "patch_size": 14}}
    folder = save_random(tmp_path / "m", "gemma3", AutoModelForImageTextToText, **sizes)
    with pytest.raises(CheckpointError, match=r"'gemma3' is a composite model.*--no-validate"):
        use(open_checkpoint(folder))


def test_experts_of_an_unknown_family_are_refused_before_any_work(tmp_path):
    sizes = SMALL | {"intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 4}
    folder = save_random(tmp_path / "m", "phimoe", **sizes)
    with pytest.raises(CheckpointError, match=r"'phimoe' are not known; known are .*, mixtral, .*--no-validate"):
        StreamedModel(open_checkpoint(folder), "cpu", torch.float32)
