"""Every rule of `merge/spellings.py`: names that are not peft's own merge to what peft's own names merge to."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qconv.adapter_configs import NormaliseConfig
from qconv.checkpoint import open_checkpoint
from qconv.merge import load_adapter, merge
from qconv.merge.spellings import (
    BARE,
    DATA_PARALLEL,
    MOVED,
    NAMED,
    RULES,
    TORCHTUNE,
    TURNED_IN_HALVES,
    TURNED_IN_PAIRS,
    WRAPPERS,
)
from qconv.normalise import normalise
from qconv.types import Checkpoint
from tests.merge_cases import (
    PREFIX,
    Q_PROJ,
    Q_WEIGHT,
    TINY_LLAMA,
    TensorsInMemory,
    change,
    edit_adapter,
    factors,
    llama,
    logits,
    plain_model,
    refused,
    toy_base,
    trained,
    write_adapter,
)

DOCS = Path(__file__).parents[1] / "docs" / "adapters.md"


def loaded(folder: Path, tensors: dict[str, Tensor], base: Checkpoint | None = None, **config: object) -> Tensor:
    """The merged toy weight of an adapter with these tensors, and the rules in ``.rules``."""
    base = base or toy_base()
    adapter = load_adapter(write_adapter(folder, tensors, **config), base)
    (weight,) = adapter.deltas
    merged = merge(base, [adapter]).read(weight)
    merged.rules = adapter.name_rules  # type: ignore[attr-defined]
    return merged


@pytest.mark.parametrize(
    ("before", "after", "rule"),
    [
        *((".layers.0.", f".layers.0.{wrapper}.", rule) for wrapper, rule in WRAPPERS.items()),
        (PREFIX, "module." + PREFIX, DATA_PARALLEL),
        (PREFIX, PREFIX + "module.", DATA_PARALLEL),
        (".weight", ".default.weight", NAMED),
        (".weight", ".sft.weight", NAMED),
        (PREFIX, "", BARE),
    ],
)
def test_names_by_rules_that_need_no_base(before: str, after: str, rule: str, tmp_path: Path) -> None:
    expected = loaded(tmp_path / "peft", factors())
    assert expected.rules == ()
    found = loaded(tmp_path / "other", {name.replace(before, after): t for name, t in factors().items()})
    assert found.rules == (rule,)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("here", "there"), MOVED)
def test_modules_under_another_name_in_the_base(here: str, there: str, tmp_path: Path) -> None:
    rest = "" if here.endswith("lm_head") else "layers.0.q_proj" if here != "layers." else "0.q_proj"
    weight = toy_base().read(Q_WEIGHT)
    base = TensorsInMemory({f"{there}{rest}.weight": weight}, {"tie_word_embeddings": False})
    tensors = {name.replace(Q_PROJ, f"{PREFIX}{here}{rest}."): t for name, t in factors().items()}
    pattern = {"rank_pattern": {re.escape(f"{here}{rest}"): 2}, "r": 7}  # as training called the module
    found = loaded(tmp_path / "moved", tensors, base, **pattern)
    assert found.rules == (MOVED[here, there],)
    assert torch.equal(found, loaded(tmp_path / "peft", factors()))


def test_two_places_in_the_base(tmp_path: Path) -> None:
    weight = toy_base().read(Q_WEIGHT)
    places = [f"{there}layers.0.q_proj.weight" for there in ("language_model.model.", "model.language_model.")]
    base = TensorsInMemory(dict.fromkeys(places, weight), {})
    tensors = {name.replace(Q_PROJ, PREFIX + "model.layers.0.q_proj."): t for name, t in factors().items()}
    refused(write_adapter(tmp_path, tensors), *places, "is not recorded", on=base)


def test_two_modules_in_one_place(tmp_path: Path) -> None:
    """The base has the module under its own name, and a rule leads there, too."""
    tensors = factors() | {name.replace("model.layers", "model.model.layers"): t for name, t in factors().items()}
    refused(write_adapter(tmp_path, tensors), "same part", "model.model.layers.0")


def test_a_whole_tensor_under_another_name_in_the_base(tmp_path: Path) -> None:
    tensors = {name.replace("model.layers", "model.language_model.layers"): t for name, t in factors().items()}
    norm = torch.randn(6)
    tensors[PREFIX + "model.language_model.norm.weight"] = norm
    folder = write_adapter(tmp_path, tensors, modules_to_save=["language_model.norm"])
    view = merge(toy_base(), [load_adapter(folder, toy_base())])
    assert torch.equal(view.read("model.norm.weight"), norm)


def test_two_adapters_in_one_file(tmp_path: Path) -> None:
    tensors = {name.replace(".weight", f".{own}.weight"): t for own in ("one", "two") for name, t in factors().items()}
    refused(write_adapter(tmp_path, tensors), "several adapters (one, two)", "selected_adapters")


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("model.layers.0.self_attn.q_proj.lora_a", "MLX"),
        ("lora_te_text_model_layers_0.lora_down.weight", "kohya"),
        ("model.layers.0.self_attn.lora_kqv_adapter.linear_in.weight", "NeMo"),
        ("decoder.layers.0.layer.attn.q_proj.lora_a.weight", "torchtune"),
        ("layers.0.mlp.experts.lora_a.weight", "torchtune"),
    ],
)
def test_names_that_no_rule_reads(name: str, word: str, tmp_path: Path) -> None:
    refused(write_adapter(tmp_path, {name: torch.ones(2, 6)}), repr(name), word)


def test_fused_linears_of_the_first_peft(tmp_path: Path) -> None:
    refused(write_adapter(tmp_path, enable_lora=[True, False, True]), "enable_lora", "another layout")


def in_torchtune(tensors: dict[str, Tensor], heads: dict[str, int]) -> dict[str, Tensor]:
    """peft's tensors of a Llama as torchtune has them: its own names, rotary channels side by side.

    Of a head of D channels, row c of transformers is row 2c of torchtune for c < D/2, and 2(c - D/2) + 1 for the rest:
    written as an index for every row, where the code under test reshapes.
    """
    modules = {"self_attn.q_proj": "attn.q_proj", "self_attn.k_proj": "attn.k_proj", "self_attn.v_proj": "attn.v_proj"}
    modules |= {"self_attn.o_proj": "attn.output_proj"}
    modules |= {"mlp.gate_proj": "mlp.w1", "mlp.down_proj": "mlp.w2", "mlp.up_proj": "mlp.w3"}
    parts = {"lora_A.weight": "lora_a.weight", "lora_B.weight": "lora_b.weight", "lora_magnitude_vector": "magnitude"}
    result = {}
    for name, tensor in tensors.items():
        module, part = re.fullmatch(r"base_model\.model\.(.*?)\.(lora_.*)", name).groups()
        layer, inner = re.fullmatch(r"model\.(layers\.\d+)\.(.*)", module).groups()
        if part != "lora_A.weight" and inner.rpartition(".")[2] in heads:
            size = len(tensor) // heads[inner.rpartition(".")[2]]
            moved = torch.empty_like(tensor)
            for row in range(len(tensor)):
                head, channel = divmod(row, size)
                half = size // 2
                moved[head * size + (2 * channel if channel < half else 2 * (channel - half) + 1)] = tensor[row]
            tensor = moved
        result[f"{layer}.{modules[inner]}.{parts[part]}"] = tensor
    return result


@pytest.mark.parametrize("dora", [False, True])
def test_torchtune(dora: bool, tmp_path: Path) -> None:
    """The oracle is peft's unmerged model with the same factors under peft's names."""
    pytest.importorskip("peft")
    adapted = trained(llama(), target_modules="all-linear", use_dora=dora)
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "peft")
    config = json.loads((TINY_LLAMA / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    assert heads["q_proj"] != heads["k_proj"]
    folder = edit_adapter(tmp_path / "peft", tmp_path / "torchtune", lambda t: in_torchtune(t, heads))
    base = open_checkpoint(TINY_LLAMA)
    adapter = load_adapter(folder, base)
    assert adapter.name_rules == (TORCHTUNE,)
    found = logits(plain_model(merge(base, [adapter]), tmp_path / "merged"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_torchtune_in_a_family_that_it_does_not_reorder(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from tests.merge_cases import qwen2, save_model

    adapted = trained(qwen2(), target_modules=["q_proj", "k_proj", "down_proj"])
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "peft")
    base = open_checkpoint(save_model(qwen2(), tmp_path / "base"))
    folder = edit_adapter(tmp_path / "peft", tmp_path / "torchtune", lambda t: in_torchtune(t, {}))
    found = logits(plain_model(merge(base, [load_adapter(folder, base)]), tmp_path / "merged"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def torchtune_toy() -> dict[str, Tensor]:
    return {name.replace(Q_PROJ, "layers.0.attn.q_proj.").replace("lora_A", "lora_a").replace("lora_B", "lora_b"): t
            for name, t in factors().items()}  # fmt: skip


def test_torchtune_in_a_family_that_nobody_listed(tmp_path: Path) -> None:
    base = toy_base()
    base.config["model_type"] = "phi3"
    refused(write_adapter(tmp_path, torchtune_toy()), "'phi3'", *TURNED_IN_PAIRS, *TURNED_IN_HALVES, on=base)


def test_torchtune_with_heads_that_do_not_divide_the_rows(tmp_path: Path) -> None:
    base = toy_base()
    base.config["num_attention_heads"] = 3
    refused(write_adapter(tmp_path, torchtune_toy()), "4 rows", "3 heads", on=base)


def test_a_plain_lora_of_other_names_has_peft_names(tmp_path: Path) -> None:
    """`qconv convert --to lora` with the base writes what peft loads."""
    pytest.importorskip("peft")
    adapted = trained(llama(), target_modules=["q_proj", "v_proj"])
    adapted.save_pretrained(tmp_path / "peft")
    config = json.loads((TINY_LLAMA / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"]}
    folder = edit_adapter(tmp_path / "peft", tmp_path / "torchtune", lambda t: in_torchtune(t, heads))
    normalise(NormaliseConfig(adapter=str(folder), out=tmp_path / "out", base=str(TINY_LLAMA)))
    before = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert after.keys() == before.keys()
    for name in before:
        scale = 6 / 4 if "lora_B" in name else 1  # alpha / r is in B now
        found = after[name][: len(before[name]), : before[name].shape[1]]
        torch.testing.assert_close(found, before[name] * scale)


def test_a_bare_adapter_needs_its_base(tmp_path: Path) -> None:
    tensors = {name.removeprefix(PREFIX): t for name, t in factors().items()}
    folder = write_adapter(tmp_path / "bare", tensors)
    with pytest.raises(Exception, match="give the base with --base"):
        normalise(NormaliseConfig(adapter=str(folder), out=tmp_path / "out"))


def test_every_rule_is_documented() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert [rule for rule in RULES if rule not in text] == []


def test_a_value_that_two_spellings_share(tmp_path: Path) -> None:
    tensors = change(lambda t: t.update({Q_PROJ + "lora_A.default.weight": t[Q_PROJ + "lora_A.weight"].clone()}))
    refused(write_adapter(tmp_path, tensors), "same part")
