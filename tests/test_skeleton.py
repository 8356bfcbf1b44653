"""What is known of a family without its code, against what transformers builds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qconv.checkpoint import open_checkpoint
from qconv.skeleton import StoredBlocks, build_skeleton, find_blocks, linear_weights, other_linears

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 12}),
    ("llama", {"tie_word_embeddings": True, "head_dim": 64}),
    ("mistral", {}),
    ("mistral", {"head_dim": None, "num_key_value_heads": 4}),
    ("qwen2", {}),
    ("qwen3", {"attention_bias": True}),
    ("qwen3", {"head_dim": 16}),
]


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_known_families_are_what_transformers_builds(
    random_model: Callable[..., Path], family: str, changes: dict[str, Any]
) -> None:
    view = open_checkpoint(random_model(family, **changes))
    blocks = StoredBlocks.of(view)
    assert blocks is not None
    model = build_skeleton(view, torch.bfloat16)
    layers_name, layers = find_blocks(model, "")
    modules = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inside = [f"{name}.weight" for name in modules if name.startswith(layers_name + ".")]
    assert blocks.linears == linear_weights(view) == inside
    assert other_linears(view, inside) == ["lm_head"]
    assert other_linears(view, inside[1:]) == [modules[0], "lm_head"]
    assert blocks.num_blocks == len(layers)
    parameters = dict(model.named_parameters())
    for index in range(blocks.num_blocks):
        prefix = blocks.block_prefix(index)
        for name, tensor in blocks.read_block(index).items():
            assert tensor.shape == parameters[prefix + name].shape
            assert torch.equal(tensor, view.read(prefix + name))


@pytest.mark.parametrize("family", ["gemma", "gemma2", "phi3", "gpt2"])
def test_of_other_families_transformers_is_asked(random_model: Callable[..., Path], family: str) -> None:
    view = open_checkpoint(random_model(family))
    assert StoredBlocks.of(view) is None
    modules = build_skeleton(view, torch.bfloat16).named_modules()
    linears = [name for name, module in modules if isinstance(module, nn.Linear)]
    inside = linear_weights(view)
    assert [name.removesuffix(".weight") for name in inside] + other_linears(view, inside) == linears


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        ({}, {"model.layers.1.mlp.up_proj.weight": None}),
        ({}, {"lm_head.weight": None}),
        ({}, {"model.layers.1.mlp.up_proj.weight": torch.zeros(4, 4)}),
        ({}, {"model.layers.1.mlp.up_proj.bias": torch.zeros(256)}),
        ({}, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16)}),
        ({"attention_bias": True}, {}),
        ({"num_hidden_layers": 3}, {}),
        ({"head_dim": 16}, {}),
        ({"hidden_size": "wide"}, {}),
        ({"num_key_value_heads": None}, {}),
        ({"rope_scaling": {"rope_type": "nonesuch"}, "rope_parameters": None}, {}),
        ({"rope_scaling": {"rope_type": "llama3"}, "rope_parameters": None}, {}),
        ({"hidden_act": "nonesuch"}, {}),
        ({"pad_token_id": 10**6}, {}),
        ({"attention_dropout": None}, {}),
        ({"mlp_bias": None}, {}),
        ({"text_config": {}}, {}),
    ],
    ids=str,
)
def test_what_differs_in_anything_is_not_known(
    random_model: Callable[..., Path],
    tmp_path: Path,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor | None],
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(random_model("llama"), folder)
    assert StoredBlocks.of(open_checkpoint(folder)) is not None
    stored = load_file(folder / "model.safetensors") | tensors
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    assert StoredBlocks.of(open_checkpoint(folder)) is None


def test_skeletons_are_built_once_and_never_shared(random_model: Callable[..., Path]) -> None:
    view = open_checkpoint(random_model("llama"))
    first, second = build_skeleton(view, torch.bfloat16), build_skeleton(view, torch.bfloat16)
    assert first is not second
    first.get_submodule("model.layers.0").to_empty(device="cpu")
    assert all(parameter.is_meta for parameter in second.parameters())
    assert all(parameter.dtype == torch.bfloat16 for parameter in second.parameters())
    buffers = dict(second.named_buffers())
    assert buffers
    assert not any(buffer.is_meta for buffer in buffers.values())
    assert all(parameter.dtype == torch.float32 for parameter in build_skeleton(view, torch.float32).parameters())
    deeper = open_checkpoint(random_model("llama", num_hidden_layers=3))
    assert len(find_blocks(build_skeleton(deeper, torch.bfloat16), "")[1]) == 3
