"""Every kind of adapter that peft defines is merged as peft merges and runs it, or is refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qconv.checkpoint import open_checkpoint
from qconv.errors import AdapterError
from qconv.merge import load_adapter, merge
from qconv.merge.adapter_config import KEYS_OF_ALL_KINDS
from qconv.merge.kinds import KINDS, LOW_RANK, WHOLE
from qconv.merge.kinds.refused import REFUSED
from qconv.streaming import StreamedModel
from qconv.validate.reference import unmerged
from tests.kind_cases import KIND_CASES, LLAMA_LINEARS
from tests.merge_cases import (
    IDS,
    edit_adapter,
    gpt2,
    logits,
    plain_model,
    qwen2,
    refused,
    save_model,
    trained,
    write_adapter,
)
from tests.test_merge_oracle import assert_matches_peft_merge, assert_matches_unmerged, close, merged_view
from tests.test_streaming import run

peft = pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft's BOFT would build a CUDA extension, which puts blocks on the diagonal of a matrix; so does this."""

    class BlockDiagonal:
        @staticmethod
        def apply(blocks: torch.Tensor) -> torch.Tensor:
            return torch.stack([torch.block_diag(*factor) for factor in blocks])

    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: True)
    monkeypatch.setattr("peft.tuners.boft.layer.FastBlockDiag", BlockDiagonal)


def assert_merges_as_peft_does(model: Any, config_class: type, config: Mapping[str, Any], folder: Path) -> None:
    """Against peft's unmerged logits and its merged tensors; and the unmerged reference against the same logits."""
    base_folder = save_model(model, folder / "base")
    before = logits(model)
    adapted = trained(model, config_class=config_class, **config)
    adapted.save_pretrained(folder / "adapter")
    view = merged_view(base_folder, folder / "adapter")
    assert_matches_unmerged(view, adapted, before, folder)
    base = open_checkpoint(base_folder)
    reference = StreamedModel(base, "cpu", torch.float32, unmerged(load_adapter(folder / "adapter", base)))
    (found,) = run(reference, [IDS])
    close(found, logits(adapted))
    assert_matches_peft_merge(view, adapted)


@pytest.mark.parametrize("name", KIND_CASES)
def test_kind_merges_as_peft_does(name: str, tmp_path: Path) -> None:
    """On a model with biases in q, k and v; against peft's unmerged logits and its merged tensors."""
    config_class, config = KIND_CASES[name]
    model = qwen2()
    assert_merges_as_peft_does(model, config_class, {"target_modules": LLAMA_LINEARS, **config}, tmp_path)


def test_every_kind_that_peft_knows_is_merged_or_refused() -> None:
    """A kind that a newer peft brings is met here first."""
    known = {kind.value for kind in peft.PeftType}
    merged = {*LOW_RANK, *WHOLE, *KINDS}
    assert known == (merged | REFUSED.keys()) - {"BONE", "BOTTLENECK"}
    assert not merged & REFUSED.keys()


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_refusals_name_reason_and_alternative(kind: str, tmp_path: Path) -> None:
    reason, alternative = REFUSED[kind]
    refused(write_adapter(tmp_path, peft_type=kind), f"peft_type {kind} {reason}; {alternative}")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_key_of_a_merged_kind_is_known(kind: str) -> None:
    """Each field of peft's own config is read, or known to be without effect: none is met by surprise."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    written = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
    assert written <= KEYS_OF_ALL_KINDS | KINDS[kind].keys | KINDS[kind].harmless
    assert not KINDS[kind].keys & KINDS[kind].harmless


def small_adapter(name: str, tmp_path: Path) -> tuple[Path, Path]:
    """Base and adapter folders, q alone adapted."""
    config_class, config = KIND_CASES[name]
    model = qwen2()
    base = save_model(model, tmp_path / "base")
    extra = {"feedforward_modules": []} if name == "ia3" else {}
    trained(model, config_class=config_class, **{**config, **extra, "target_modules": ["q_proj"]}).save_pretrained(
        tmp_path / "adapter"
    )
    return base, tmp_path / "adapter"


@pytest.mark.parametrize("name", [name for name in KIND_CASES if name != "waveft-proportional"])  # of no known length
def test_a_layer_that_is_not_whole_is_refused(name: str, tmp_path: Path) -> None:
    """Each tensor in turn is left out, has another shape, or stands beside one that is too much."""
    base_folder, folder = small_adapter(name, tmp_path)
    base = open_checkpoint(base_folder)
    stored = load_file(folder / "adapter_model.safetensors")
    assert load_adapter(folder, base)
    for index, tensor_name in enumerate(key for key in stored if ".layers.1." in key):
        copies = "randlora_A" in tensor_name or "randlora_B" in tensor_name  # peft stores one for all layers as well
        bad = {
            "without": {key: value for key, value in stored.items() if key != tensor_name},
            "shape": {**stored, tensor_name: torch.cat([stored[tensor_name]] * 2)},
            "spare": {**stored, tensor_name + "_more": stored[tensor_name].clone()},
        }
        is_whole_layer = sum(".layers.1." in key for key in stored) == 1
        for what, tensors in bad.items():
            if what == "without" and (is_whole_layer or copies):
                continue
            other = edit_adapter(folder, tmp_path / f"{what}{index}", lambda _, tensors=tensors: tensors)
            with pytest.raises(AdapterError) as caught:
                load_adapter(other, base)
            assert str(other) in str(caught.value)


# What is zero there is no identity; TinyLoRA of several vectors is refused for its zero P before.
NEVER_IDENTITY = ("ia3", "boft", "hra", "road", "deft", "osf", "frod", "tinylora-two")


@pytest.mark.parametrize("name", [name for name in KIND_CASES if not name.startswith(NEVER_IDENTITY)])
def test_an_adapter_that_was_never_trained_is_refused(name: str, tmp_path: Path) -> None:
    base_folder, folder = small_adapter(name, tmp_path)
    other = edit_adapter(
        folder, tmp_path / "zero", lambda tensors: {k: torch.zeros_like(v) for k, v in tensors.items()}
    )
    with pytest.raises(AdapterError, match="never trained"):
        load_adapter(other, open_checkpoint(base_folder))


def test_vera_without_its_projections_is_refused(tmp_path: Path) -> None:
    model = qwen2()
    base_folder = save_model(model, tmp_path / "base")
    adapted = trained(model, config_class="VeraConfig", target_modules=["q_proj"], r=8, save_projection=False)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="save_projection=True"):
        load_adapter(tmp_path / "adapter", open_checkpoint(base_folder))


@pytest.mark.parametrize(
    ("config_class", "config", "message"),
    [
        ("UniLoraConfig", {"theta_d_length": 64}, "save_indices=True"),
        ("TinyLoraConfig", {"save_projection": False}, "save_projection=True"),
        ("FrodConfig", {"save_projection": False}, "save_projection=True"),
        ("SupertuningConfig", {"sparsity": 0.9, "save_precomputed_indices": False}, "save_precomputed_indices=True"),
    ],
)
def test_what_a_file_lacks_is_asked_for(
    config_class: str, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = qwen2()
    base_folder = save_model(model, tmp_path / "base")
    trained(model, config_class=config_class, target_modules=["q_proj"], **config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path / "adapter", open_checkpoint(base_folder))


def test_tinylora_of_unknown_order_is_refused(tmp_path: Path) -> None:
    """The layers' P are exchanged: each still says which vector is the layer's. Ones that no seed gave say nothing."""
    base_folder, folder = small_adapter("tinylora-two", tmp_path)
    base = open_checkpoint(base_folder)
    first, second = (f"base_model.model.model.layers.{layer}.self_attn.q_proj.tinylora_P" for layer in "01")
    adapter = load_adapter(folder, base)
    assert adapter.transforms["model.layers.1.self_attn.q_proj.weight"].tensors["tinylora_v"].endswith("v.1")
    swapped = edit_adapter(folder, tmp_path / "swapped", lambda t: {**t, first: t[second], second: t[first]})
    adapter = load_adapter(swapped, base)
    assert adapter.transforms["model.layers.1.self_attn.q_proj.weight"].tensors["tinylora_v"].endswith("v.0")
    other = edit_adapter(folder, tmp_path / "other", lambda t: {**t, first: t[first] + 1})
    with pytest.raises(AdapterError, match="projection_seed 42 gives for any of 2 layers"):
        load_adapter(other, base)


@pytest.mark.parametrize("name", ["boft-factors", "boft-factors-blocks"])
def test_several_butterfly_factors_without_pefts_extension(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unmerged reference has all factors where peft alone would take one."""
    base_folder, folder = small_adapter(name, tmp_path)
    base = open_checkpoint(base_folder)

    def outputs() -> torch.Tensor:
        adapter = load_adapter(folder, base)
        found: torch.Tensor = run(StreamedModel(base, "cpu", torch.float32, unmerged(adapter)), [IDS])[0]
        return found

    expected = outputs()
    close(expected, logits(plain_model(merge(base, [load_adapter(folder, base)]), tmp_path / "merged")))
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
    monkeypatch.setattr("peft.tuners.boft.layer.FastBlockDiag", None)
    close(outputs(), expected)


def test_indices_beyond_the_end_are_refused(tmp_path: Path) -> None:
    for name, part in (
        ("shira", "shira_indices"),
        ("super", "supertuning_indices"),
        ("unilora", "unilora_indices_B"),
        ("vblora-topk", "vblora_logits_A_topk_indices"),
        ("frod", "frod_s_indices.self_attn_q_proj"),
    ):
        base_folder, folder = small_adapter(name, tmp_path / name)
        damaged = edit_adapter(
            folder,
            tmp_path / name / "damaged",
            lambda tensors, part=part: {
                k: torch.full_like(v, 127)
                if k.endswith(part) and v.dtype == torch.uint8
                else torch.full_like(v, 9999)
                if k.endswith(part)
                else v
                for k, v in tensors.items()
            },
        )
        view = merged_view(base_folder, damaged)
        with pytest.raises(AdapterError, match="do not all lie in"):
            view.read("model.layers.0.self_attn.q_proj.weight")


def test_a_bias_that_the_base_lacks_is_refused(tmp_path: Path) -> None:
    model = qwen2()
    base_folder = save_model(model, tmp_path / "base")
    trained(model, config_class="BeftConfig", target_modules=["o_proj"]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="no bias in the base"):
        load_adapter(tmp_path / "adapter", open_checkpoint(base_folder))


def test_beft_changes_biases_alone(tmp_path: Path) -> None:
    view = merged_view(*small_adapter("beft", tmp_path))
    assert view.changed == {f"model.layers.{layer}.self_attn.q_proj.bias" for layer in range(2)}


def test_adalora_after_its_ranks_were_allocated(tmp_path: Path) -> None:
    """Pruned tensors, masks in the config; a module keeps no component at all. peft loads it, which is the oracle."""
    model = qwen2()
    base_folder = save_model(model, tmp_path / "base")
    before = logits(model)
    adapted = trained(
        model, config_class="AdaLoraConfig", target_modules=["q_proj", "v_proj"], init_r=6, target_r=3, total_step=9
    )
    masks = {"q_proj": [True, False, True, False, False, True], "v_proj": [False] * 5 + [True]}
    config = adapted.peft_config["default"]
    config.rank_pattern = {
        f"model.layers.{layer}.self_attn.{name}.lora_E.default": mask
        for layer in range(2)
        for name, mask in masks.items()
    }
    config.rank_pattern["model.layers.0.self_attn.v_proj.lora_E.default"] = [False] * 6
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = type(model).from_pretrained(base_folder, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    view = merged_view(base_folder, tmp_path / "adapter")
    assert_matches_unmerged(view, loaded, before, tmp_path)


def test_ln_tuning_replaces_norms(tmp_path: Path) -> None:
    for build, targets in ((qwen2, ["input_layernorm", "norm"]), (gpt2, ["ln_f", "ln_1"])):
        model = build()
        folder = tmp_path / build.__name__
        base_folder = save_model(model, folder / "base")
        before = logits(model)
        adapted = trained(model, config_class="LNTuningConfig", target_modules=targets, task_type="CAUSAL_LM")
        adapted.save_pretrained(folder / "adapter")
        view = merged_view(base_folder, folder / "adapter")
        assert_matches_unmerged(view, adapted, before, folder)


CONV1D = ["c_attn", "c_proj", "c_fc"]
# Of the kinds that peft puts on Conv1D layers; it refuses all others there.
CONV1D_KINDS = (
    "adalora",
    "ia3",
    "vera",
    "fourierft",
    "hira",
    "randlora",
    "gralora",
    "deft",
    "frod",
    "vblora",
    "unilora",
)
CONV1D_CASES = [name for name in KIND_CASES if name.startswith((*CONV1D_KINDS, "tinylora", "waveft"))]


@pytest.mark.parametrize("name", CONV1D_CASES)
def test_kinds_on_conv1d(name: str, tmp_path: Path) -> None:
    """Weights stored [in, out], square ones among them: all kinds that peft puts on GPT-2."""
    config_class, config = KIND_CASES[name]
    config = {key: value for key, value in config.items() if not key.endswith("_pattern")}
    if name == "ia3":
        config["feedforward_modules"] = ["mlp.c_proj"]
    config["fan_in_fan_out"] = True
    model = gpt2()
    targets = [*CONV1D, "mlp.c_proj"] if name == "ia3" else CONV1D
    assert_merges_as_peft_does(model, config_class, {"target_modules": targets, **config}, tmp_path)


def test_the_table_of_kinds_names_each_where_it_belongs() -> None:
    text = (Path(__file__).parent.parent / "docs" / "adapters.md").read_text()
    merged, refused_part = text.split("## Merged")[1].split("## Refused")
    rows = {kind for line in refused_part.splitlines() if line.startswith("| `") for kind in line.split("`")[1::2]}
    assert REFUSED.keys() <= rows
    assert {line.split("`")[1] for line in merged.splitlines() if line.startswith("| `")} == {
        "peft_type",
        *LOW_RANK,
        *WHOLE,
        *KINDS,
    }
