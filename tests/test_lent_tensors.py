"""What a reference holds on the device anyway is not read a second time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qconv.checkpoint import open_checkpoint
from qconv.convert import FORMATS, dequantize
from qconv.quantize.rtn import rtn
from qconv.remembered import Remembered
from qconv.remembered_codes import RememberedCodes
from qconv.types import Scheme
from qconv.validate.resident import ResidentModel
from tests.merge_cases import TensorsInMemory


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


def test_an_embedding_that_was_let_go_comes_back(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=64,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    stored = open_checkpoint(str(tmp_path))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    model = ResidentModel(whole, "cpu")
    ids_BS = torch.arange(12)[None]
    with torch.no_grad():
        expected = whole(ids_BS).logits
        (hidden_BSH,) = model.embed([ids_BS])
        assert model.let_embedding_go(stored.specs(), stored.read) == "model.embed_tokens.weight"
        assert whole.get_input_embeddings().weight.numel() == 0
        for index in range(2):
            hidden_BSH = model.run_block(index, model.load_block(index), hidden_BSH)
        assert torch.equal(model.head()(hidden_BSH), expected)
        assert torch.equal(model.whole()(ids_BS).logits, expected)
        assert model.let_embedding_go(stored.specs(), stored.read) is not None
        model.embed([ids_BS])
        assert torch.equal(whole(ids_BS).logits, expected)


def test_an_embedding_that_is_the_head_stays(tiny_llama: Path) -> None:
    stored = open_checkpoint(str(tiny_llama))
    model = ResidentModel(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="auto"), "cpu")
    assert model.let_embedding_go(stored.specs(), stored.read) is None


def test_parameters_in_another_dtype_or_shape_are_read_from_the_file(tiny_llama: Path) -> None:
    stored = open_checkpoint(str(tiny_llama))
    other = torch.float32 if stored.specs()["model.norm.weight"].dtype != torch.float32 else torch.bfloat16
    model = ResidentModel(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=other), "cpu")
    assert model.held(stored.specs()) == {}


def test_the_readers_of_a_candidate_share_its_codes() -> None:
    module, scheme = "model.layers.0.mlp.up_proj", Scheme(bits=4, group_size=32, symmetric=False)
    linear = rtn(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), scheme, module)
    packed = FORMATS["awq"].pack(linear, module, torch.float16)
    config = {"quantization_config": FORMATS["awq"].quantization_config(scheme, [module], [])}
    source = TensorsInMemory({**packed, "model.norm.weight": torch.ones(128)}, config)
    reads: list[str] = []

    class Counted(TensorsInMemory):
        def read(self, name: str, device: str = "cpu") -> torch.Tensor:
            reads.append(name)
            return super().read(name, device)

    view = RememberedCodes(Counted({**packed, "model.norm.weight": torch.ones(128)}, config))
    codes = view.read_quantized(module)
    assert torch.equal(view.read(f"{module}.weight"), dequantize(source).read(f"{module}.weight"))
    assert view.read_quantized(module) is codes
    assert torch.equal(codes.codes_NK, linear.codes_NK)
    assert sorted(reads) == sorted(packed)
    view.forget()
    assert view.read_quantized(module) is not codes
    view.stop()
    assert view.read_quantized(module) is not view.read_quantized(module)
    assert torch.equal(view.read("model.norm.weight"), torch.ones(128))


def test_codes_of_a_resident_base_are_not_read_again(
    tiny_nf4: Path, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under an adapter of peft, too; and give the values that those of the file give."""
    stored, lent = open_checkpoint(str(tiny_nf4)), open_checkpoint(str(tiny_nf4))
    whole = AutoModelForCausalLM.from_pretrained(tiny_nf4, dtype="auto")
    model = ResidentModel(PeftModel.from_pretrained(whole, str(tiny_adapter)).get_base_model(), "cpu")
    codes = {name: spec for name, spec in lent.specs().items() if spec.dtype == torch.uint8}
    held = model.held(codes)
    view = dequantize(stored)
    assert held.keys() == {f"{module}.weight" for module in view.quantized_modules}
    assert held
    lent.lend(held, "cpu")
    wanted = {name: view.read(name) for name in view.specs()}
    reads: list[str] = []
    read_host = type(lent)._read_host

    def counted(self: Any, name: str, **options: Any) -> torch.Tensor:
        reads.append(name)
        return read_host(self, name, **options)

    monkeypatch.setattr(type(lent), "_read_host", counted)
    found = dequantize(lent)
    for name, tensor in wanted.items():
        assert torch.equal(found.read(name), tensor), name
    assert reads
    assert not held.keys() & set(reads)
    lent.lend({}, "cpu")
    found.read(next(iter(held)))
    assert held.keys() & set(reads)
