"""Running a model block by block against transformers running it whole."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qconv.checkpoint import open_checkpoint
from qconv.errors import CheckpointError
from qconv.streaming import StreamedModel, linear_weights
from tests.conftest import FAMILIES


def run(model: StreamedModel, batches: list[torch.Tensor]) -> list[torch.Tensor]:
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
    with torch.no_grad():
        for ids, logits in zip(batches, streamed, strict=True):
            assert torch.equal(logits, whole(ids).logits)


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
