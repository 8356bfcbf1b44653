"""Adapters whose initialisation changed the base: converted when they are saved, or merged into the base they need."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qconv.checkpoint import open_checkpoint
from qconv.cli import main
from qconv.errors import AdapterError
from qconv.merge import load_adapter, merge
from qconv.streaming import StreamedModel
from qconv.validate.reference import unmerged
from tests.merge_cases import IDS, logits, plain_model, qwen2, save_model
from tests.test_merge_oracle import assert_matches_unmerged, close, merged_view
from tests.test_streaming import run

peft = pytest.importorskip("peft")
TARGETS = ["q_proj", "v_proj", "down_proj"]


def pissa(model: nn.Module) -> Any:
    return peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights="pissa")


def rs_pissa(model: nn.Module) -> Any:
    return peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights="pissa", use_rslora=True)


def olora(model: nn.Module) -> Any:
    return peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights="olora")


def corda(model: nn.Module) -> Any:
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights="corda", corda_config=CordaConfig()
    )
    preprocess_corda(model, config, run_model=lambda: model(input_ids=IDS[:1]))
    return config


def loftq(model: nn.Module) -> Any:
    return peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=TARGETS,
        init_lora_weights="loftq",
        loftq_config=peft.LoftQConfig(loftq_bits=4, loftq_iter=1),
    )


@pytest.fixture(autouse=True)
def _loftq_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft's LoftQ wants a GPU; one iteration of it by bitsandbytes' CPU kernels, to what peft does with the result."""

    def init(
        weight: torch.Tensor, num_bits: int, reduced_rank: int, num_iter: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        import bitsandbytes.functional as bnb

        base = bnb.dequantize_4bit(*bnb.quantize_4bit(weight.detach(), quant_type="nf4"))
        u, s, v = torch.linalg.svd(weight.detach() - base, full_matrices=False)
        root = s[:reduced_rank].sqrt()
        return base, root[:, None] * v[:reduced_rank], u[:, :reduced_rank] * root

    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", init)


CONVERTED = [pissa, rs_pissa, olora, corda]


def initialised(make: Callable[[nn.Module], Any], tmp_path: Path) -> Any:
    """The peft model before training, its initial adapter saved as peft's guide for conversion says."""
    model = qwen2()
    save_model(model, tmp_path / "base")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, make(model))
    config = adapted.peft_config["default"]
    name, config.init_lora_weights = config.init_lora_weights, True
    adapted.save_pretrained(tmp_path / "initial")
    config.init_lora_weights = name
    return adapted.eval()


def train(adapted: nn.Module) -> None:
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.mark.parametrize("make", CONVERTED)
def test_converted_when_saved_it_is_plain_lora_of_the_untouched_base(
    make: Callable[[nn.Module], Any], tmp_path: Path
) -> None:
    adapted = initialised(make, tmp_path)
    before = logits(adapted)
    train(adapted)
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    base = open_checkpoint(tmp_path / "base")
    adapter = load_adapter(tmp_path / "adapter", base)
    assert {delta.rank for delta in adapter.deltas.values()} == {8}  # what it became, beside what it was
    view = merge(base, [adapter])
    close(logits(plain_model(view, tmp_path / "plain")), expected, relative=1e-4)
    (found,) = run(StreamedModel(base, "cpu", torch.float32, unmerged(adapter)), [IDS])
    close(found, expected, relative=1e-4)
    assert float((expected - before).abs().max()) > 1e-2


@pytest.mark.parametrize("make", [*CONVERTED, loftq])
def test_with_the_base_that_its_initialisation_left(
    make: Callable[[nn.Module], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused as it was saved, since the base is another; merged when base and config say that it is not."""
    adapted = initialised(make, tmp_path)
    before = logits(adapted)
    train(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    with pytest.raises(AdapterError, match="merging into the untouched base is wrong"):
        load_adapter(tmp_path / "adapter", open_checkpoint(tmp_path / "base"))
    words = ["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), "--trained-on", "16bit", "--dry-run"]
    with pytest.raises(SystemExit):
        main([*words, "-o", str(tmp_path / "out"), "--device", "cpu"])
    assert "ass the base as that initialisation left it" in capsys.readouterr().err
    file.write_text(json.dumps({**config, "init_lora_weights": True}))
    own = type(qwen2())(qwen2().config)
    state = {name.replace(".base_layer.", "."): value for name, value in adapted.base_model.model.state_dict().items()}
    own.load_state_dict({name: value for name, value in state.items() if ".lora_" not in name})
    save_model(own, tmp_path / "own")
    view = merged_view(tmp_path / "own", tmp_path / "adapter")
    assert_matches_unmerged(view, adapted, before, tmp_path)
    untouched = merged_view(tmp_path / "base", tmp_path / "adapter")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert float((untouched.read(name) - view.read(name)).norm()) > 1e-2 * float(view.read(name).norm())
