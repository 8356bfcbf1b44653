"""Adapters on mixtures of experts: merged and unmerged models compute what peft's unmerged model computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qconv import runners
from qconv.checkpoint import open_checkpoint
from qconv.convert import dequantize
from qconv.errors import AdapterError, CheckpointError, UsageError
from qconv.inputs import load_reference
from qconv.merge import load_adapter, merge
from qconv.records import write_train_record
from qconv.runners import streamed
from qconv.types import Checkpoint
from tests.expert_cases import (
    ALIKE,
    FAMILIES,
    PREFIX,
    adapted,
    moe,
    roles,
    save_fused,
    save_linear_adapter,
    stored_module,
    written_model,
)
from tests.merge_cases import IDS, edit_adapter, logits, save_model, trained
from tests.test_streaming import run

peft = pytest.importorskip("peft")
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
BARE: dict[str, dict[str, Any]] = {
    "experts, router and attention": {
        "target_modules": ["q_proj", "o_proj"],
        "target_parameters": [*EXPERTS, "gate.weight"],
    },
    "gate and up alone": {"target_modules": [], "target_parameters": EXPERTS[:1], "use_rslora": True},
    "down alone, with patterns": {
        "target_modules": ["v_proj"],
        "target_parameters": ["mlp.experts.down_proj"],
        "rank_pattern": {r"layers\.0\.mlp\.experts\.down_proj": 3},
        "alpha_pattern": {"experts.down_proj": 11},
    },
    "ranks of all": {
        "target_modules": [],
        "target_parameters": EXPERTS,
        "rank_pattern": {r".*\.gate_up_proj": 5},
        "alpha_pattern": {r".*\.gate_up_proj": 1.5},
    },
}


def close(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def unmerged(folder: Path, adapter: Path) -> Tensor:
    """peft's own logits, of a fresh model."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return logits(peft.PeftModel.from_pretrained(base, adapter).eval())


def check(base: Checkpoint, adapter: Path, expected: Tensor, before: Tensor, tmp_path: Path) -> None:
    assert float((expected - before).abs().max()) > 1e-2, "the adapter must matter for the comparison to mean anything"
    loaded = load_adapter(adapter, base)
    close(logits(written_model(merge(base, [loaded]), tmp_path / "plain")), expected)
    (found,) = run(streamed(base, loaded, None, "cpu"), [IDS])
    close(found, expected)


@pytest.mark.parametrize(
    ("family", "case"),
    [*((family, case) for family in FAMILIES for case in BARE), *((family, next(iter(BARE))) for family in ALIKE)],
)
def test_lora_on_fused_experts(family: str, case: str, tmp_path: Path) -> None:
    model = moe(family)
    before = logits(model)
    folder = save_model(model, tmp_path / "base")
    adapted(model, family, BARE[case]).save_pretrained(tmp_path / "adapter")
    expected = unmerged(folder, tmp_path / "adapter")
    check(dequantize(open_checkpoint(folder)), tmp_path / "adapter", expected, before, tmp_path)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_lora_on_every_expert_by_itself(family: str, tmp_path: Path) -> None:
    """peft converts such adapters to fused experts as it loads them."""
    model = moe(family)
    folder = save_model(model, tmp_path / "base")
    adapter = save_linear_adapter(tmp_path / "adapter", family)
    check(dequantize(open_checkpoint(folder)), adapter, unmerged(folder, adapter), logits(model), tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_that_is_stored_fused(family: str, tmp_path: Path) -> None:
    """It reads as the one with separate experts does, tensor by tensor, and is merged alike."""
    model = moe(family)
    separate = dequantize(open_checkpoint(save_model(model, tmp_path / "base")))
    fused = dequantize(open_checkpoint(save_fused(model, tmp_path / "fused")))
    assert any(name.endswith("experts.down_proj") for name in open_checkpoint(tmp_path / "fused").specs())
    assert {name: spec.shape for name, spec in fused.specs().items()} == {
        name: spec.shape for name, spec in separate.specs().items()
    }
    for name in separate.specs():
        assert torch.equal(fused.read(name), separate.read(name))
    before = logits(model)
    adapted(model, family, BARE["experts, router and attention"]).save_pretrained(tmp_path / "adapter")
    check(fused, tmp_path / "adapter", unmerged(tmp_path / "base", tmp_path / "adapter"), before, tmp_path)


def save_nf4(folder: Path, out: Path) -> Path:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(out)
    return out


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_base_in_nf4_has_its_experts_in_16_bits(family: str, tmp_path: Path) -> None:
    """As transformers 5 saves it; the reference is peft on a model that bitsandbytes decoded."""
    bnb = pytest.importorskip("bitsandbytes")
    model = moe(family)
    folder = save_nf4(save_model(model, tmp_path / "16bit"), tmp_path / "base")
    base = dequantize(open_checkpoint(folder))
    expert = f"model.layers.0.{stored_module(family)}.experts.0.{roles(family)[0]}.weight"
    assert expert.removesuffix(".weight") not in base.quantized_modules
    assert "model.layers.0.self_attn.q_proj" in base.quantized_modules
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stored = loaded.get_parameter(name)
            if isinstance(stored, bnb.nn.Params4bit):
                stored = bnb.functional.dequantize_4bit(stored.data, stored.quant_state)
            parameter.copy_(stored)
    before = logits(model)
    unmerged_model = adapted(model, family, BARE["experts, router and attention"])
    unmerged_model.save_pretrained(tmp_path / "adapter")
    check(base, tmp_path / "adapter", logits(unmerged_model), before, tmp_path)


def test_a_base_with_experts_in_nf4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers 4 saved it, where every expert was a linear; transformers 5 cannot run that."""
    bnb = pytest.importorskip("bitsandbytes")
    model = moe("mixtral", intermediate_size=64)
    folder = save_model(model, tmp_path / "base")
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if ".experts." in name or name.endswith("block_sparse_moe.gate.weight")]:
        codes, how = bnb.functional.quantize_4bit(state[name], quant_type="nf4")
        parts = how.as_dict(packed=True)
        state |= {name: codes} | {f"{name}.{part}": tensor for part, tensor in parts.items()}
        parameter, rows = _place(model, name)
        with torch.no_grad():
            parameter[rows] = bnb.functional.dequantize_4bit(codes, how)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    seen = save_model(model, tmp_path / "seen")
    adapter = save_linear_adapter(tmp_path / "adapter", "mixtral", inner=64)
    check(dequantize(open_checkpoint(folder)), adapter, unmerged(seen, adapter), logits(model), tmp_path)
    reference = load_reference(open_checkpoint(folder), str(adapter), None)
    monkeypatch.setattr(runners, "why_not_resident", lambda *_: None)
    _, how_it_runs = runners.reference_model(reference, reference.base, "cpu", False)
    assert "transformers keeps experts in 16 bits, and training had them in 4" in how_it_runs


def _place(model: Any, name: str) -> tuple[Tensor, Any]:
    """Where transformers 5 holds a stored tensor of Mixtral."""
    layer = model.model.layers[int(name.split(".")[2])].mlp
    if ".experts." not in name:
        return layer.gate.weight, slice(None)
    number, role = int(name.split(".")[5]), name.split(".")[6]
    if role == "w2":
        return layer.experts.down_proj, number
    n = layer.experts.gate_up_proj.shape[1] // 2
    return layer.experts.gate_up_proj, (number, slice(0, n) if role == "w1" else slice(n, None))


def test_the_release_that_trained_decides_what_was_in_4_bits(tmp_path: Path) -> None:
    """A 16-bit base is rounded as training saw it: experts too, where they were linears."""
    model = moe("mixtral").to(torch.bfloat16)
    folder = save_model(model, tmp_path / "base")
    modules = ("block_sparse_moe.experts.1.w3", "block_sparse_moe.gate", "self_attn.k_proj")
    expert, router, attention = (f"model.layers.0.{module}.weight" for module in modules)

    def rounded(adapter: Path) -> set[str]:
        source = open_checkpoint(folder)
        seen = load_reference(source, str(adapter), "nf4").base
        return {name for name in (expert, router, attention) if not torch.equal(seen.read(name), source.read(name))}

    assert rounded(save_linear_adapter(tmp_path / "linears", "mixtral")) == {expert, router, attention}
    trained(moe("mixtral"), **BARE["gate and up alone"]).save_pretrained(tmp_path / "fused")
    assert rounded(tmp_path / "fused") == {attention}
    trained(moe("mixtral"), target_modules=["q_proj"]).save_pretrained(tmp_path / "neither")
    with pytest.raises(UsageError, match="does not tell whether training had them in 4 bits"):
        rounded(tmp_path / "neither")
    write_train_record(tmp_path / "neither", "nf4", str(folder))  # `qconv train` needs transformers 5
    assert rounded(tmp_path / "neither") == {attention}


def fused_adapter(tmp_path: Path, **config: Any) -> tuple[Checkpoint, Path]:
    folder = save_model(moe("qwen3_moe"), tmp_path / "base")
    trained(moe("qwen3_moe"), target_modules=[], target_parameters=EXPERTS, **config).save_pretrained(tmp_path / "a")
    return dequantize(open_checkpoint(folder)), tmp_path / "a"


OUTER = f"{PREFIX}model.layers.0.mlp.experts.lora_A.weight"
INNER = f"{PREFIX}model.layers.0.mlp.experts.base_layer.lora_B.weight"
DAMAGED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "a factor is missing": (lambda s: {k: v for k, v in s.items() if k != INNER}, "has no lora_B"),
    "fewer experts": (lambda s: s | {OUTER: s[OUTER][:-4]}, "config.* rank 4|expected shape"),
    "transposed": (
        lambda s: s | {OUTER: s[OUTER].T},
        r"factor A of 4 experts' down_proj.*expected shape \[4 \* rank, 24\]",
    ),
    "a third wrapper": (
        lambda s: s | {INNER.replace("base_layer", "base_layer.base_layer"): s[INNER].clone()},
        "belongs to 3 or more parameters",
    ),
    "no such layer": (lambda s: s | {OUTER.replace("layers.0", "layers.1"): s[OUTER].clone()}, "does not have"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    edit, message = DAMAGED[case]
    base, adapter = fused_adapter(tmp_path)
    with pytest.raises(AdapterError, match=message):
        load_adapter(edit_adapter(adapter, tmp_path / "b", edit), base)


def test_factors_exchanged_between_experts_show(tmp_path: Path) -> None:
    """The order in which experts lie in A and B matters: other orders must not pass for it."""
    base, adapter = fused_adapter(tmp_path)
    weight = "model.layers.0.mlp.experts.1.down_proj.weight"
    expected = merge(base, [load_adapter(adapter, base)]).read(weight)

    def exchange(state: dict[str, Tensor]) -> dict[str, Tensor]:
        a_XK = state[OUTER].view(4, 4, -1)  # experts, rank
        return state | {OUTER: a_XK[[1, 0, 2, 3]].reshape_as(state[OUTER])}

    other = edit_adapter(adapter, tmp_path / "b", exchange)
    found = merge(base, [load_adapter(other, base)]).read(weight)
    assert (found - expected).norm() > 0.1 * (expected - base.read(weight)).norm()


def test_experts_of_other_families_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    _, adapter = fused_adapter(tmp_path)
    with pytest.raises(
        AdapterError, match="bare parameters is read for mixtures of experts of the families deepseek_v2"
    ):
        load_adapter(adapter, open_checkpoint(tiny_llama))


def test_fused_parameters_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = save_fused(moe("qwen3_moe"), tmp_path / "fused")
    file, name = folder / "model.safetensors", "model.layers.0.mlp.experts.gate_up_proj"
    state = load_file(file)
    save_file(state | {name: state[name].flatten(1)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"expected the weights of all experts as numbers \[experts, out, in\]"):
        dequantize(open_checkpoint(folder))
