"""Adapter tensors that do not fit the base are refused; the message names the tensor, expected and found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qconv.checkpoint import open_checkpoint
from qconv.errors import AdapterError, CheckpointError, NumericsError
from qconv.merge import load_adapter, merge
from tests.merge_cases import (
    PREFIX,
    Q_PROJ,
    Q_WEIGHT,
    TINY_LLAMA,
    K,
    N,
    R,
    change,
    edit_adapter,
    factors,
    llama,
    refused,
    toy_base,
    trained,
    write_adapter,
)


def test_no_tensors(tmp_path: Path) -> None:
    refused(write_adapter(tmp_path, {}), "no tensors")


def test_a_without_b(tmp_path: Path) -> None:
    refused(write_adapter(tmp_path, change(lambda t: t.pop(Q_PROJ + "lora_B.weight"))), "has no lora_B", "incomplete")


def test_b_without_a(tmp_path: Path) -> None:
    refused(write_adapter(tmp_path, change(lambda t: t.pop(Q_PROJ + "lora_A.weight"))), "has no lora_A", "incomplete")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (PREFIX, PREFIX + "_orig_mod."),
        (PREFIX, "_orig_mod." + PREFIX),
        (".layers.0.", ".layers.0._orig_mod."),
        (PREFIX, "module." + PREFIX),
        (PREFIX, PREFIX + "module."),
    ],
)
def test_names_of_a_wrapped_model(before: str, after: str, tmp_path: Path) -> None:
    expected = load_adapter(write_adapter(tmp_path / "plain"), toy_base()).deltas[Q_WEIGHT]
    tensors = {name.replace(before, after): tensor for name, tensor in factors().items()}
    found = load_adapter(write_adapter(tmp_path / "wrapped", tensors), toy_base()).deltas[Q_WEIGHT]
    assert found.a == expected.a.replace(before, after)
    assert (found.rank, found.scaling) == (expected.rank, expected.scaling)


def test_both_spellings_of_one_tensor(tmp_path: Path) -> None:
    tensors = {**factors(), **{"module." + name: tensor.clone() for name, tensor in factors().items()}}
    refused(write_adapter(tmp_path, tensors), "same part", "module." + PREFIX)


def test_wrong_prefix(tmp_path: Path) -> None:
    tensors = change(lambda t: t.update({Q_PROJ.removeprefix("base_model.") + "lora_A.weight": torch.ones(R, K)}))
    refused(write_adapter(tmp_path, tensors), "'base_model.model.'", "'model.model.layers.0")


def test_name_unknown_to_the_base(tmp_path: Path) -> None:
    tensors = {name.replace("q_proj", "qq_proj"): tensor for name, tensor in factors().items()}
    refused(write_adapter(tmp_path, tensors), "qq_proj.weight", f"nearest name there is {Q_WEIGHT!r}")


def test_wrong_shape(tmp_path: Path) -> None:
    tensors = change(lambda t: t.update({Q_PROJ + "lora_A.weight": torch.randn(R, K + 1)}))
    refused(write_adapter(tmp_path, tensors), f"[{N}, {K + 1}]", f"found [{N}, {K}]", "another base model")


@pytest.mark.parametrize("shape", [(R,), (R, K, 1, 1)])
def test_factors_that_are_no_matrices(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = change(lambda t: t.update({Q_PROJ + "lora_A.weight": torch.randn(shape)}))
    refused(write_adapter(tmp_path, tensors), "expected 2-D matrices", str(list(shape)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(value: float, tmp_path: Path) -> None:
    tensors = change(lambda t: t[Q_PROJ + "lora_B.weight"].__setitem__((1, 1), value))
    refused(write_adapter(tmp_path, tensors), "lora_B.weight", "1 of 8", error=NumericsError)


def test_integer_tensors(tmp_path: Path) -> None:
    tensors = change(lambda t: t.update({Q_PROJ + "lora_B.weight": torch.ones(N, R, dtype=torch.int8)}))
    refused(write_adapter(tmp_path, tensors), "lora_B.weight", "torch.int8")


@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight"])
def test_never_trained(part: str, tmp_path: Path) -> None:
    refused(write_adapter(tmp_path, change(lambda t: t[Q_PROJ + part].zero_())), "never trained", "all 1 modules")


def test_one_untrained_module_beside_a_trained_one(tmp_path: Path) -> None:
    other = PREFIX + "model.layers.0.self_attn.o_proj."
    tensors = {**factors(), other + "lora_A.weight": torch.ones(R, K), other + "lora_B.weight": torch.zeros(K, R)}
    assert len(load_adapter(write_adapter(tmp_path, tensors), toy_base()).deltas) == 2


def test_trained_lora_bias_counts_as_training(tmp_path: Path) -> None:
    zero_b = {**change(lambda t: t[Q_PROJ + "lora_B.weight"].zero_()), Q_PROJ + "lora_B.bias": torch.ones(N)}
    assert load_adapter(write_adapter(tmp_path, zero_b, lora_bias=True), toy_base()).deltas[Q_WEIGHT].b_bias
    zero_b[Q_PROJ + "lora_B.bias"].zero_()
    refused(write_adapter(tmp_path, zero_b, lora_bias=True), "never trained")


def test_peft_adapter_before_any_training(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="never trained"):
        load_adapter(tmp_path, open_checkpoint(TINY_LLAMA))


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("model.embed_tokens.trainable_tokens_delta", "trained rows"),
        ("model.layers.0.self_attn.q_proj.lora_E", "AdaLoRA"),
        ("model.layers.0.self_attn.q_proj.lora_diag", "KaSA"),
        ("model.layers.0.self_attn.q_proj.lora_left_over", "not a part of plain LoRA"),
        ("model.layers.0.self_attn.q_proj.lora_A.bias", "no part of a LoRA layer"),
    ],
)
def test_tensors_of_other_methods(name: str, word: str, tmp_path: Path) -> None:
    refused(write_adapter(tmp_path, {**factors(), PREFIX + name: torch.ones(2, 2)}), name, word)


def test_spare_tensor(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, {**factors(), PREFIX + "model.norm.weight": torch.ones(K)})
    refused(folder, "spare tensor", "model.norm.weight", "modules_to_save=[]")
    write_adapter(tmp_path, {**factors(), PREFIX + "model.norm.weight": torch.ones(K)}, modules_to_save=["norm"])
    assert load_adapter(tmp_path, toy_base()).replacements == {"model.norm.weight": PREFIX + "model.norm.weight"}


def test_spare_magnitude_and_missing_magnitude(tmp_path: Path) -> None:
    with_magnitude = {**factors(), Q_PROJ + "lora_magnitude_vector": torch.ones(N)}
    refused(write_adapter(tmp_path, with_magnitude), "spare tensor", "use_dora is false")
    refused(write_adapter(tmp_path, use_dora=True), "has no lora_magnitude_vector")
    wrong = {**factors(), Q_PROJ + "lora_magnitude_vector": torch.ones(K)}
    refused(write_adapter(tmp_path, wrong, use_dora=True), f"expected shape [{N}], found [{K}]")


def test_spare_and_missing_tensors_of_training(tmp_path: Path) -> None:
    with_projection = {**factors(), Q_PROJ + "lora_velora_embed": torch.ones(3)}
    refused(write_adapter(tmp_path, with_projection), "spare tensor", "velora_config is false or not set")
    refused(write_adapter(tmp_path, velora_config={"num_groups": 2}), "has no tensor of velora_config")
    assert load_adapter(write_adapter(tmp_path, with_projection, velora_config={"num_groups": 2}), toy_base()).deltas


def test_spare_and_missing_lora_bias(tmp_path: Path) -> None:
    refused(write_adapter(tmp_path, {**factors(), Q_PROJ + "lora_B.bias": torch.ones(N)}), "lora_bias is false")
    refused(write_adapter(tmp_path, lora_bias=True), "has no lora_B.bias")


def test_lora_bias_without_a_bias_in_the_base(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, {**factors(), Q_PROJ + "lora_B.bias": torch.ones(N)}, lora_bias=True)
    without = toy_base()
    del without.tensors["model.layers.0.self_attn.q_proj.bias"]
    refused(folder, "q_proj.bias", "does not have", on=without)


def test_trained_bias_without_a_bias_in_the_base(tmp_path: Path) -> None:
    tensors = {**factors(), Q_PROJ + "base_layer.bias": torch.ones(N)}
    without = toy_base()
    del without.tensors["model.layers.0.self_attn.q_proj.bias"]
    refused(write_adapter(tmp_path, tensors, bias="lora_only"), "q_proj.bias", "does not have", on=without)


def test_bias_that_the_config_denies(tmp_path: Path) -> None:
    tensors = {**factors(), Q_PROJ + "base_layer.bias": torch.ones(N)}
    refused(write_adapter(tmp_path, tensors), "spare tensor", "bias='none'")


def test_module_to_save_that_the_base_lacks(tmp_path: Path) -> None:
    folder = write_adapter(
        tmp_path, {**factors(), PREFIX + "score.weight": torch.ones(2, K)}, modules_to_save=["score"]
    )
    refused(folder, "'score.weight'", "nearest name")


def test_module_to_save_of_another_shape(tmp_path: Path) -> None:
    tensors = {**factors(), PREFIX + "model.norm.weight": torch.ones(K + 1)}
    refused(write_adapter(tmp_path, tensors, modules_to_save=["norm"]), f"expected shape [{K}]", f"found [{K + 1}]")


def test_lora_and_whole_weight_of_one_module(tmp_path: Path) -> None:
    tensors = {**factors(), PREFIX + Q_WEIGHT: torch.ones(N, K)}
    refused(
        write_adapter(tmp_path, tensors, modules_to_save=["q_proj"]),
        "both a layer of the adapter and a whole trained weight",
    )


def test_frozen_copy_of_another_base(tmp_path: Path) -> None:
    head = PREFIX + "lm_head."
    own = toy_base()
    tensors = {
        **factors(),
        head + "lora_A.weight": torch.ones(R, K),
        head + "lora_B.weight": torch.ones(10, R),
        head + "base_layer.weight": own.tensors["lm_head.weight"].bfloat16(),
    }
    adapter = load_adapter(write_adapter(tmp_path, tensors), own)
    assert adapter.replacements == {"lm_head.weight": head + "base_layer.weight"}
    tensors[head + "base_layer.weight"] = torch.randn(10, K)
    refused(
        write_adapter(tmp_path / "x", tensors), "base_layer.weight", "pass the base that the adapter was trained on"
    )


def test_lora_on_what_is_no_linear(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    assert load_adapter(folder, toy_base(), linear_weights=[Q_WEIGHT]).deltas
    with pytest.raises(AdapterError, match=r"q_proj\.weight, which is not the weight of a linear layer"):
        load_adapter(folder, toy_base(), linear_weights=["model.layers.0.self_attn.o_proj.weight"])


def test_square_weights_of_unclear_orientation(tmp_path: Path) -> None:
    other = PREFIX + "model.layers.0.self_attn.o_proj."
    square = {other + "lora_A.weight": torch.ones(R, K), other + "lora_B.weight": torch.ones(K, R)}
    refused(write_adapter(tmp_path, {**factors(), **square}, fan_in_fan_out=True), "fan_in_fan_out", "unclear")
    alone = load_adapter(write_adapter(tmp_path / "alone", square, fan_in_fan_out=True), toy_base())
    assert alone.deltas["model.layers.0.self_attn.o_proj.weight"].transposed


def test_vocabulary_that_disagrees(tmp_path: Path) -> None:
    tensors = {**factors(), PREFIX + "model.embed_tokens.weight": torch.ones(12, K)}
    adapter = load_adapter(write_adapter(tmp_path, tensors, modules_to_save=["embed_tokens"]), toy_base())
    with pytest.raises(AdapterError, match=r"embed_tokens\.weight has 12 rows and lm_head\.weight has 10"):
        merge(toy_base(), [adapter])


def test_tied_weights_that_were_to_stay_equal_differ(tmp_path: Path) -> None:
    tensors = {
        **factors(),
        PREFIX + "model.embed_tokens.weight": torch.randn(10, K),
        PREFIX + "lm_head.weight": torch.randn(10, K),
    }
    tied = toy_base()
    tied.config["tie_word_embeddings"] = True
    del tied.tensors["lm_head.weight"]
    folder = write_adapter(tmp_path, tensors, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    refused(folder, "ensure_weight_tying", "differ", on=tied)


def test_two_values_for_one_tensor(tmp_path: Path) -> None:
    name = PREFIX + "model.norm."
    tensors = {**factors(), name + "weight": torch.ones(K), name + "modules_to_save.weight": torch.zeros(K)}
    refused(write_adapter(tmp_path, tensors, modules_to_save=["norm"]), "both stand for model.norm.weight")


def test_original_without_its_trained_copy(tmp_path: Path) -> None:
    tensors = {**factors(), PREFIX + "model.norm.original_module.weight": torch.ones(K)}
    refused(write_adapter(tmp_path, tensors, modules_to_save=["norm"]), "original_module", "trained one is missing")


def test_several_adapters(tmp_path: Path) -> None:
    adapter = load_adapter(write_adapter(tmp_path), toy_base())
    with pytest.raises(AdapterError, match=r"expected one adapter, found 2.*combine_adapters first"):
        merge(toy_base(), [adapter, adapter])
    with pytest.raises(AdapterError, match="expected one adapter, found 0"):
        merge(toy_base(), [])


def test_merge_into_another_base(tmp_path: Path) -> None:
    adapter = load_adapter(write_adapter(tmp_path), toy_base())
    other = toy_base()
    del other.tensors[Q_WEIGHT]
    with pytest.raises(AdapterError, match="does not have"):
        merge(other, [adapter])


def test_unknown_tensor_of_the_view(tmp_path: Path) -> None:
    view = merge(toy_base(), [load_adapter(write_adapter(tmp_path), toy_base())])
    with pytest.raises(CheckpointError, match="no tensor 'nothing'"):
        view.read("nothing")


def test_legacy_spellings_mean_the_same(tmp_path: Path) -> None:
    """Files of older peft keep the adapter's name inside."""
    pytest.importorskip("peft")
    adapted = trained(llama(), target_modules=["q_proj"], modules_to_save=["norm"], use_dora=True)
    adapted.save_pretrained(tmp_path / "new")

    def spell_as_before(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        old = {}
        for name, tensor in tensors.items():
            name = name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
            name = name.replace("model.norm.weight", "model.norm.modules_to_save.default.weight")
            old[name.replace("lora_magnitude_vector", "lora_magnitude_vector.default.weight")] = tensor
        return old

    edit_adapter(tmp_path / "new", tmp_path / "old", spell_as_before)
    source = open_checkpoint(TINY_LLAMA)
    new, old = (merge(source, [load_adapter(tmp_path / age, source)]) for age in ("new", "old"))
    assert new.changed == old.changed
    assert "model.norm.weight" in new.changed
    for name in new.changed:
        assert torch.equal(new.read(name), old.read(name))
