"""What a reference holds on the device anyway is not read a second time."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from qconv.checkpoint import open_checkpoint
from qconv.remembered import Remembered
from qconv.validate.resident import ResidentModel


def test_a_view_gives_what_a_resident_model_holds(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="auto")
    stored = open_checkpoint(str(tiny_llama))
    view = Remembered(stored)
    held = ResidentModel(model, "cpu").held(view.specs())
    view.lend(held, "cpu")
    view.forget()
    view.stop()
    name = "model.embed_tokens.weight"
    assert view.read(name).data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert view.is_lent(name, "cpu")
    assert not view.is_lent(name, "cuda")
    assert not view.is_lent("model.norm.weight", "cpu")
    for other in view.specs():
        assert torch.equal(view.read(other), stored.read(other)), other


def test_parameters_in_another_dtype_or_shape_are_read_from_the_file(tiny_llama: Path) -> None:
    stored = open_checkpoint(str(tiny_llama))
    other = torch.float32 if stored.specs()["model.norm.weight"].dtype != torch.float32 else torch.bfloat16
    model = ResidentModel(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=other), "cpu")
    assert model.held(stored.specs()) == {}
