"""What ``adapter_config.json`` of a PEFT adapter means for a merge.

Method: LoRA (Hu et al. 2021, section 4.1) scales its update by alpha / r, rsLoRA (Kalajdzievski
2023, equation 3) by alpha / sqrt(r); peft lets patterns override r and alpha per module. Every key
is either understood, known not to touch the weights, or refused by name: a key that a newer peft
invents may change the maths, so an unknown key that is set is an error.

Left out, and refused with the reason: every peft type but LORA, LoRA variants whose forward pass
is not one matrix, and initialisations that changed the base weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, cast

from qconv.errors import AdapterError

BiasMode = Literal["none", "lora_only", "all"]

MAX_RANK, MIN_ALPHA, MAX_ALPHA = 1 << 20, 1e-9, 1e9  # keep alpha / r finite and above zero
PROMPT_TYPES = frozenset(
    {
        "PROMPT_TUNING",
        "MULTITASK_PROMPT_TUNING",
        "P_TUNING",
        "PREFIX_TUNING",
        "ADAPTION_PROMPT",
        "CPT",
        "CARTRIDGE",
    }
)

# Set by peft or by tools, without effect on the merged weights once training is over.
HARMLESS_KEYS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",  # acts only through init_lora_weights
        "enable_lora",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "merge_weights",
        "modules_to_tie",
        "peft_version",
        "qalora_group_size",  # acts only with use_qalora
        "revision",
        "runtime_config",
        "target_modules",
        "target_modules_to_tie",
        "task_type",
    }
)
UNDERSTOOD_KEYS = frozenset(
    {
        "alpha_pattern",
        "bias",
        "ensure_weight_tying",
        "fan_in_fan_out",
        "init_lora_weights",
        "lora_alpha",
        "lora_bias",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "use_dora",
        "use_rslora",
    }
)
REFUSED_KEYS = {
    "alora_invocation_tokens": "Activated LoRA acts only on tokens after the invocation, so no fixed weight equals it",
    "arrow_config": "Arrow routes every token to other adapters, so no fixed weight equals it",
    "kasa_config": "KaSA truncates the base weights and scales the rank components",
    "layer_replication": "the trained model has other layers than the base; build that base first, without an adapter",
    "megatron_config": "Megatron layers are sharded and named differently; convert the adapter to plain peft first",
    "monteclora_config": "MonteCLoRA samples its weights; its tensors are not a plain low-rank update",
    "target_parameters": "LoRA on bare parameters (fused experts) is not read yet; train with target_modules",
    "trainable_token_indices": "trained token rows are not read yet; train with modules_to_save=['embed_tokens']",
    "use_bdlora": "block-diagonal factors are stored in another layout",
    "use_qalora": "QA-LoRA pools the inputs in groups before A, so its update is not B @ A",
    "velora_config": "VeLoRA adds its own tensors, which are not read",
}
PLAIN_INITS = frozenset({"true", "false", "gaussian", "eva", "orthogonal", "mica"})
BASE_CHANGING_INITS = {
    "pissa": "PiSSA subtracts the principal components from the base",
    "olora": "OLoRA subtracts its QR factors from the base",
    "corda": "CorDA subtracts its components from the base",
    "lora_ga": "LoRA-GA subtracts its initial update from the base",
    "loftq": "LoftQ replaces the base by its own quantized approximation",
}


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The keys of a LoRA adapter that decide the merge.

    Attributes:
        where: the file, for messages.
        rank, alpha: defaults for modules that no pattern names.
        rank_pattern, alpha_pattern: regular expressions that end a module name -> value.
        modules_to_save: ends of module names that were trained whole.
        tie_trained: ``ensure_weight_tying``; the output head uses the trained embedding.
    """

    where: str
    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    bias: BiasMode
    lora_bias: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    modules_to_save: tuple[str, ...]
    tie_trained: bool

    def rank_of(self, module: str) -> int:
        matches = self._matches(self.rank_pattern, "rank_pattern", module)
        return int(self.rank_pattern[matches[0]]) if matches else self.rank

    def alpha_of(self, module: str) -> float:
        """The alpha of a module: the first pattern that ends its name, by peft's rule.

        Raises:
            AdapterError: two patterns fit and disagree. peft sorts the keys when it saves, so the
                order that decided in training is lost.
        """
        matches = self._matches(self.alpha_pattern, "alpha_pattern", module)
        values = {self.alpha_pattern[key] for key in matches}
        if len(values) > 1:
            raise AdapterError(
                f"{self.where}: alpha_pattern keys {', '.join(map(repr, matches))} all match {module} and give "
                f"{sorted(values)}; which one training used is not recorded: keep the one that was meant"
            )
        return self.alpha_pattern[matches[0]] if matches else self.alpha

    def scaling_of(self, module: str) -> float:
        rank, alpha = self.rank_of(module), self.alpha_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def saves_module(self, module: str) -> bool:
        """Whether ``modules_to_save`` trained this module whole, itself or as part of a parent."""
        parts = module.split(".")
        parents = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return any(parent.endswith(name) for parent in parents for name in self.modules_to_save)

    def _matches(self, pattern: Mapping[str, Any], key_name: str, module: str) -> list[str]:
        try:
            return [key for key in pattern if re.match(rf"(.*\.)?({key})$", module)]
        except re.error as error:
            raise AdapterError(f"{self.where}: {key_name} has a key that is no regular expression ({error})") from error


def parse_adapter_config(config: Mapping[str, Any], where: str) -> AdapterConfig:
    """Reads the config of a LoRA adapter.

    Raises:
        AdapterError: not LoRA, a variant or initialisation that cannot be merged exactly, an
            unknown key that is set, or a value of the wrong type.
    """
    _check_type(config.get("peft_type"), where)
    for key, reason in REFUSED_KEYS.items():
        if config.get(key):
            raise AdapterError(f"{where}: {key} is set ({_short(config[key])}), which cannot be merged: {reason}")
    _check_init(config.get("init_lora_weights", True), where)
    for key in sorted(config.keys() - HARMLESS_KEYS - UNDERSTOOD_KEYS - REFUSED_KEYS.keys()):
        if config[key]:
            raise AdapterError(
                f"{where}: unknown key {key!r} is set to {_short(config[key])}; a newer peft may mean other maths by "
                "it. Update qconv, or remove the key if you know that it does not change the weights"
            )
    read = _Reader(config, where)
    bias = config.get("bias") or "none"
    if bias not in ("none", "lora_only", "all"):
        read.refuse("bias", "'none', 'lora_only' or 'all'")
    return AdapterConfig(
        where=where,
        rank=_rank(config.get("r"), "r", where),
        alpha=_alpha(config.get("lora_alpha"), "lora_alpha", where),
        use_rslora=read.flag("use_rslora"),
        use_dora=read.flag("use_dora"),
        fan_in_fan_out=read.flag("fan_in_fan_out"),
        bias=cast(BiasMode, bias),
        lora_bias=read.flag("lora_bias"),
        rank_pattern={key: _rank(value, f"rank_pattern[{key!r}]", where) for key, value in read.table("rank_pattern")},
        alpha_pattern={
            key: _alpha(value, f"alpha_pattern[{key!r}]", where) for key, value in read.table("alpha_pattern")
        },
        modules_to_save=read.names("modules_to_save"),
        tie_trained=read.flag("ensure_weight_tying"),
    )


class _Reader:
    def __init__(self, config: Mapping[str, Any], where: str):
        self.config = config
        self.where = where

    def refuse(self, key: str, expected: str) -> NoReturn:
        raise AdapterError(f"{self.where}: expected {key} to be {expected}, found {_short(self.config.get(key))}")

    def flag(self, key: str) -> bool:
        value = self.config.get(key)
        if value is not None and not isinstance(value, bool):
            self.refuse(key, "true or false")
        return bool(value)

    def table(self, key: str) -> list[tuple[str, Any]]:
        value = self.config.get(key)
        if value is not None and not isinstance(value, dict):
            self.refuse(key, "an object")
        return list((value or {}).items())

    def names(self, key: str) -> tuple[str, ...]:
        value = self.config.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(v, str) and v for v in value)):
            self.refuse(key, "a list of module names")
        return tuple(value or ())


def _check_type(peft_type: Any, where: str) -> None:
    if peft_type == "LORA":
        return
    if isinstance(peft_type, str) and peft_type in PROMPT_TYPES:
        raise AdapterError(
            f"{where}: peft_type {peft_type} learns prompts or prefixes and has no weight delta, so there is nothing "
            "to merge; serve it beside the base model, or train with LoRA"
        )
    if not isinstance(peft_type, str) or not peft_type:
        raise AdapterError(f"{where}: expected peft_type 'LORA', found {_short(peft_type)}; not a peft adapter config?")
    raise AdapterError(
        f"{where}: expected peft_type LORA (plain, rsLoRA or DoRA), found {peft_type}, whose weight update is "
        "another formula that qconv does not merge; train with LoRA"
    )


def _check_init(init: Any, where: str) -> None:
    name = str(init).lower()
    if name in PLAIN_INITS:
        return
    for prefix, reason in BASE_CHANGING_INITS.items():
        if name.startswith(prefix):
            raise AdapterError(
                f"{where}: init_lora_weights is {init!r}: {reason}, so merging into the untouched base is wrong. "
                f"{_init_advice(prefix)}"
            )
    raise AdapterError(
        f"{where}: unknown init_lora_weights {_short(init)}; if it did not change the base weights, set it to true"
    )


def _init_advice(prefix: str) -> str:
    own_base = (
        "pass the base as that initialisation left it (saved before training) and set init_lora_weights to true, "
        "which states that the base is the adapter's own"
    )
    if prefix == "loftq":
        return own_base[0].upper() + own_base[1:]
    return (
        "Convert the adapter with peft's save_pretrained(..., path_initial_model_for_weight_conversion=...), or "
        + own_base
    )


def _rank(value: Any, key: str, where: str) -> int:
    if type(value) is not int or not 0 < value <= MAX_RANK:
        raise AdapterError(f"{where}: expected {key} to be a positive integer, found {_short(value)}")
    return value


def _alpha(value: Any, key: str, where: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value == 0:
            raise AdapterError(f"{where}: {key} is 0, so the adapter changes nothing; was the config edited?")
        if MIN_ALPHA <= abs(value) <= MAX_ALPHA:
            return float(value)
    raise AdapterError(f"{where}: expected {key} to be a number, found {_short(value)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
