"""Attribution against whole models with a part exchanged, run by transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qconv.checkpoint import open_checkpoint
from qconv.convert import dequantize
from qconv.streaming import StreamedModel
from qconv.validate.attribution import EMBEDDING, HEAD, attribute
from tests.merge_cases import TensorsInMemory


@pytest.fixture(scope="module")
def weights(tiny_llama: Path) -> dict[str, Tensor]:
    view = dequantize(open_checkpoint(tiny_llama))
    return {name: view.read(name).float() for name in view.specs()}


def streamed(tiny_llama: Path, weights: Mapping[str, Tensor]) -> StreamedModel:
    config = dict(open_checkpoint(tiny_llama).config)
    return StreamedModel(TensorsInMemory(dict(weights), config), "cpu", torch.float32)


def logits(tiny_llama: Path, weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model.load_state_dict(dict(weights), strict=False)
    with torch.no_grad():
        return torch.log_softmax(model(ids).logits.double(), -1)[:, :-1]


def test_costs_are_those_of_the_model_with_that_part_exchanged(tiny_llama: Path, weights: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    noisy = {
        name: tensor * (1 + 0.2 * torch.randn(tensor.shape, generator=generator)) if tensor.ndim == 2 else tensor
        for name, tensor in weights.items()
    }
    noisy["model.layers.1.mlp.down_proj.weight"] = weights["model.layers.1.mlp.down_proj.weight"] * 2.5
    ids = torch.randint(2048, (2, 48), generator=generator)
    result = attribute(streamed(tiny_llama, weights), streamed(tiny_llama, noisy), ids)
    p = logits(tiny_llama, weights, ids)

    def cost(*parts: str) -> float:
        mixed = {n: noisy[n] if n.startswith(parts) else tensor for n, tensor in weights.items()}
        q = logits(tiny_llama, mixed, ids)
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert result.total == pytest.approx(cost("model"), rel=1e-3, abs=1e-6)
    assert result.blocks.keys() == {EMBEDDING, HEAD, *(f"model.layers.{index}" for index in range(4))}
    for index in range(4):
        assert result.blocks[f"model.layers.{index}"] == pytest.approx(
            cost(f"model.layers.{index}."), rel=1e-3, abs=1e-6
        )
    assert max(result.blocks, key=lambda name: result.blocks[name]) == "model.layers.1"
    for name, kl in result.linears.items():
        assert kl == pytest.approx(cost(name + "."), rel=1e-3, abs=1e-6), name
    assert next(iter(result.linears)) == "model.layers.1.mlp.down_proj"
    assert sum(name.startswith("model.layers.1.") for name in result.linears) == 7
    assert result.blocks[HEAD] > 1e-3  # tied: the candidate's embedding is its head too
    report = result.as_dict()
    assert report["additivity"] == pytest.approx(sum(result.blocks.values()) / result.total)


def test_an_identical_candidate_costs_nothing(tiny_llama: Path, weights: dict[str, Tensor]) -> None:
    models = [streamed(tiny_llama, weights) for _ in range(2)]
    result = attribute(*models, torch.randint(2048, (1, 32)))
    assert result.total == 0
    assert set(result.blocks.values()) == {0.0}
    assert result.linears == {}
    assert result.as_dict()["additivity"] is None


def test_folded_scales_are_swapped_together(tiny_llama: Path, weights: dict[str, Tensor]) -> None:
    """Scales moved from a norm into the linears behind it change nothing, and no linear alone may be blamed."""
    folded = dict(weights)
    for index in range(4):
        prefix = f"model.layers.{index}."
        scale = torch.linspace(0.5, 2, 256)
        folded[prefix + "input_layernorm.weight"] = weights[prefix + "input_layernorm.weight"] / scale
        for name in ("q_proj", "k_proj", "v_proj"):
            folded[f"{prefix}self_attn.{name}.weight"] = weights[f"{prefix}self_attn.{name}.weight"] * scale
    damaged = "model.layers.2.mlp.up_proj.weight"
    folded[damaged] = weights[damaged] * 1.5
    ids = torch.randint(2048, (2, 48), generator=torch.Generator().manual_seed(1))
    result = attribute(streamed(tiny_llama, weights), streamed(tiny_llama, folded), ids)
    assert max(result.blocks, key=lambda name: result.blocks[name]) == "model.layers.2"
    worst, *others = result.linears
    assert worst == "model.layers.2.mlp with post_attention_layernorm"
    assert "model.layers.2.self_attn with input_layernorm" in others
    assert all(result.linears[name] < 1e-6 for name in others)


def test_models_are_left_as_they_were(tiny_llama: Path, weights: dict[str, Tensor]) -> None:
    view = TensorsInMemory(dict(weights), dict(open_checkpoint(tiny_llama).config))
    reference = StreamedModel(view, "cpu", torch.float32, keep_blocks=True)
    other = streamed(tiny_llama, {n: t * 1.1 for n, t in weights.items()})
    attribute(reference, other, torch.randint(2048, (1, 16)))
    block = reference.load_block(1)
    assert torch.equal(block.get_parameter("mlp.up_proj.weight"), weights["model.layers.1.mlp.up_proj.weight"])
