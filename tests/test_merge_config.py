"""Adapter configs that cannot be merged exactly are refused; the message names the key and what to do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qconv.errors import AdapterError
from qconv.merge import load_adapter
from qconv.merge.adapter_config import HARMLESS_KEYS, REFUSED_KEYS, UNDERSTOOD_KEYS, parse_adapter_config
from tests.merge_cases import (
    ADAPTER_CONFIG,
    Q_WEIGHT,
    K,
    R,
    refused,
    toy_base,
    write_adapter,
)


def test_the_plain_case_loads(tmp_path: Path) -> None:
    adapter = load_adapter(write_adapter(tmp_path), toy_base())
    delta = adapter.deltas[Q_WEIGHT]
    assert (delta.rank, delta.scaling, delta.transposed, delta.module) == (
        2,
        2.0,
        False,
        Q_WEIGHT.removesuffix(".weight"),
    )
    assert not adapter.replacements
    assert adapter.trained_on is None
    assert adapter.location == str(tmp_path)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT"])
def test_prompts_have_no_delta(kind: str, tmp_path: Path) -> None:
    refused(write_adapter(tmp_path, peft_type=kind), kind, "no weight delta")


def test_unknown_method(tmp_path: Path) -> None:
    refused(
        write_adapter(tmp_path / "a", peft_type="SOMETHING_NEW"), "unknown peft_type 'SOMETHING_NEW'", "LORA, ADALORA"
    )
    refused(write_adapter(tmp_path / "b", peft_type="LOHAA"), "did you mean 'LOHA'?")


@pytest.mark.parametrize("kind", [None, 7, ""])
def test_not_a_peft_config(kind: Any, tmp_path: Path) -> None:
    refused(write_adapter(tmp_path, peft_type=kind), "expected peft_type 'LORA'", repr(kind))


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("layer_replication", [[0, 2], [1, 2]], "other layers"),
        ("use_bdlora", {"nblocks": 2}, "block-diagonal"),
        ("alora_invocation_tokens", [5], "invocation"),
        ("alora_invocation_tokens", [5], "serve it beside the base model"),
        ("arrow_config", {"top_k": 3}, "routes"),
        ("arrow_config", {"top_k": 3}, "merge one of these, or several with --combine"),
        ("megatron_config", {"a": 1}, "Megatron"),
    ],
)
def test_variants(key: str, value: Any, word: str, tmp_path: Path) -> None:
    refused(write_adapter(tmp_path, **{key: value}), "adapter_config.json", f"{key} is set", word)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga"])
def test_inits_that_changed_the_base(init: str, tmp_path: Path) -> None:
    refused(
        write_adapter(tmp_path, init_lora_weights=init),
        repr(init),
        "untouched base",
        "path_initial_model_for_weight_conversion",
    )


def test_loftq_needs_its_own_base(tmp_path: Path) -> None:
    refused(write_adapter(tmp_path, init_lora_weights="loftq"), "LoftQ", "Pass the base as that initialisation left it")


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_inits_that_left_the_base_alone(init: Any, tmp_path: Path) -> None:
    assert load_adapter(write_adapter(tmp_path, init_lora_weights=init), toy_base()).deltas


def test_unknown_init(tmp_path: Path) -> None:
    refused(write_adapter(tmp_path, init_lora_weights="brand_new"), "unknown init_lora_weights 'brand_new'")


def test_unknown_key_that_is_set(tmp_path: Path) -> None:
    refused(write_adapter(tmp_path, use_next_year_lora={"beta": 2}), "unknown key 'use_next_year_lora'", "newer peft")


def test_unknown_keys_that_are_off(tmp_path: Path) -> None:
    assert load_adapter(
        write_adapter(tmp_path, use_next_year_lora=False, other_config=None, third={}), toy_base()
    ).deltas


def test_every_key_that_this_peft_writes_is_known(tmp_path: Path) -> None:
    """Each field of peft's own LoraConfig is understood, harmless or refused: none is met by surprise."""
    peft = pytest.importorskip("peft")
    written = peft.LoraConfig().to_dict().keys()
    assert set(written) <= HARMLESS_KEYS | UNDERSTOOD_KEYS | REFUSED_KEYS.keys()
    assert not HARMLESS_KEYS & UNDERSTOOD_KEYS
    assert not (HARMLESS_KEYS | UNDERSTOOD_KEYS) & REFUSED_KEYS.keys()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0),
        ("r", 10**400),
        ("lora_alpha", 10**400),
        ("lora_alpha", 1e-300),
        ("r", "8"),
        ("r", True),
        ("r", None),
        ("lora_alpha", None),
        ("lora_alpha", "16"),
        ("lora_alpha", True),
        ("use_rslora", "yes"),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": 1.5}),
        ("alpha_pattern", {"q_proj": None}),
        ("modules_to_save", "lm_head"),
        ("bias", "some"),
    ],
)
def test_values_of_the_wrong_type(key: str, value: Any, tmp_path: Path) -> None:
    refused(write_adapter(tmp_path, **{key: value}), "adapter_config.json", "expected " + key)


def test_alpha_zero(tmp_path: Path) -> None:
    refused(write_adapter(tmp_path, lora_alpha=0), "lora_alpha is 0", "changes nothing")


def test_alpha_patterns_that_disagree(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, alpha_pattern={"q_proj": 3, r"layers\.0\..*": 5})
    refused(folder, "'q_proj'", "all match", "[3.0, 5.0]")


def test_rank_patterns_that_disagree(tmp_path: Path) -> None:
    """The tensors fit one of them; the scaling that training used is still the first's of an order that is lost."""
    for ranks in ({"q_proj": 2, r"layers\.0\..*": 5}, {r"layers\.0\..*": 5, "q_proj": 2}):
        refused(write_adapter(tmp_path, rank_pattern=ranks), "rank_pattern keys", "[2, 5]", "keep the one")


def test_alpha_patterns_that_agree(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, alpha_pattern={"q_proj": 3, r"layers\.0\..*": 3})
    assert load_adapter(folder, toy_base()).deltas[Q_WEIGHT].scaling == 1.5


def test_pattern_that_is_no_regular_expression(tmp_path: Path) -> None:
    refused(write_adapter(tmp_path, rank_pattern={"q_proj(": 4}), "rank_pattern", "no regular expression")


def test_rank_of_config_and_tensor_differ(tmp_path: Path) -> None:
    refused(write_adapter(tmp_path, r=8), "rank 8", "[8, in]", f"[{R}, {K}]")
    refused(write_adapter(tmp_path / "p", rank_pattern={"q_proj": 3}), "rank 3", "config and tensors")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None)
@given(edits=st.dictionaries(st.sampled_from(sorted({*UNDERSTOOD_KEYS, *HARMLESS_KEYS})), JSON_VALUES, max_size=3))
def test_no_config_meets_anything_but_an_adapter_error(edits: dict[str, Any]) -> None:
    message = None
    try:
        scaling = parse_adapter_config({**ADAPTER_CONFIG, **edits}, "FILE").scaling_of("model.q_proj")
    except AdapterError as error:
        message, scaling = str(error), 1.0
    assert message is None or message.startswith("FILE: ")
    assert math.isfinite(scaling)
    assert scaling != 0
