"""What ``adapter_config.json`` of a PEFT adapter means for a merge.

Method: LoRA (Hu et al. 2021, section 4.1) scales its update by alpha / r, rsLoRA (Kalajdzievski
2023, equation 3) by alpha / sqrt(r); peft lets patterns override r and alpha per module. Every key
is either understood, known not to touch the weights, or refused by name: a key that a newer peft
invents may change the maths, so an unknown key that is set is an error.

AdaLoRA (Zhang et al. 2023, equation 3) prunes components of each update; its ``rank_pattern`` holds masks. Other kinds
bring the names of their keys along (`kinds/`).

Left out, and refused with the reason: kinds and LoRA variants whose forward pass is not one matrix, and
initialisations that changed the base weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from qconv.errors import AdapterError
from qconv.merge.config_values import ConfigReader, alpha_value, rank_value, short
from qconv.merge.kinds import KINDS, LOW_RANK, Kind, check_type

BiasMode = Literal["none", "lora_only", "all"]

# Set by peft or by tools, without effect on the merged weights once training is over.
HARMLESS_KEYS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",  # acts only through init_lora_weights
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
        "kasa_config",
        "lora_alpha",
        "lora_bias",
        "modules_to_save",
        "monteclora_config",
        "peft_type",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "target_parameters",
        "trainable_token_indices",
        "use_dora",
        "use_qalora",
        "use_rslora",
        "velora_config",
    }
)
REFUSED_KEYS = {
    "alora_invocation_tokens": "Activated LoRA acts only on tokens after the invocation, so no fixed weight equals it; "
    "serve it beside the base model, or train a plain LoRA",
    "arrow_config": "Arrow routes every token to other adapters, so no fixed weight equals it; merge one of these, or "
    "several with --combine",
    "enable_lora": "peft before 0.3 put several LoRAs into one fused linear, whose factors lie in another layout",
    "layer_replication": "the trained model has other layers than the base; build that base first, without an adapter",
    "megatron_config": "Megatron layers are sharded and named differently; convert the adapter to plain peft first",
    "use_bdlora": "block-diagonal factors are stored in another layout; merge it with peft's merge_and_unload into the "
    "16-bit base (qconv convert BASE --to bf16), then use qconv quantize",
}
# VeLoRA compresses what the backward pass keeps, MonteCLoRA samples A in training: what runs afterwards is plain LoRA.
TRAINING_KEYS = ("monteclora_config", "velora_config")
# Of AdaLoRA: its schedule, which is over once it was saved, and what is read.
ADALORA_KEYS = frozenset(
    {"beta1", "beta2", "deltaT", "init_r", "orth_reg_weight", "target_r", "tfinal", "tinit", "total_step"}
)
# Of every other kind, beside its own.
KEYS_OF_ALL_KINDS = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_weights",
        "layers_pattern",
        "layers_to_transform",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "rank_pattern",
        "revision",
        "target_modules",
        "task_type",
    }
)
ROWS_KEYS = frozenset({"token_indices"})  # of trainable tokens
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
    """The keys of an adapter that decide the merge.

    Attributes:
        where: the file, for messages.
        rank, alpha: defaults for modules that no pattern names; 1 for a kind that has none.
        rank_pattern, alpha_pattern: regular expressions that end a module name -> value.
        modules_to_save: ends of module names that were trained whole.
        tie_trained: ``ensure_weight_tying``; the output head uses the trained embedding.
        kind: what the adapter is, when its update is not made of LoRA's two factors.
        read: for the keys that only this kind has.
        is_kasa: KaSA as peft has it: the base lost its R smallest components, and a diagonal stands between A and B.
        of_training: ``velora``, ``monteclora``: their own tensors, which only training uses, are in the file.
        qalora_group: inputs that peft's QA-LoRA pools, or None.
        pattern_key: what ``rank_pattern`` is called.
        kept_ranks: AdaLoRA alone: module -> components that were kept. Modules without an entry keep all.
    """

    where: str
    kind: Kind | None
    read: ConfigReader
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
    is_kasa: bool = False
    of_training: frozenset[str] = frozenset()
    qalora_group: int | None = None
    pattern_key: str = "rank_pattern"
    kept_ranks: Mapping[str, int] | None = None

    @property
    def is_adalora(self) -> bool:
        return self.kept_ranks is not None

    def rank_of(self, module: str) -> int:
        if self.kept_ranks is not None:
            return self.kept_ranks.get(module, self.rank)
        return int(self._of_pattern(self.rank_pattern, self.pattern_key, module, self.rank))

    def alpha_of(self, module: str) -> float:
        return self._of_pattern(self.alpha_pattern, "alpha_pattern", module, self.alpha)

    def scaling_of(self, module: str) -> float:
        """What the update is multiplied by; AdaLoRA divides by the rank that training began with, and peft's 1e-5."""
        if self.is_adalora:
            return self.alpha / (self.rank + 1e-5)
        rank, alpha = self.rank_of(module), self.alpha_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def saves_module(self, module: str) -> bool:
        """Whether ``modules_to_save`` trained this module whole, itself or as part of a parent."""
        parts = module.split(".")
        parents = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return any(parent.endswith(name) for parent in parents for name in self.modules_to_save)

    def _of_pattern(self, pattern: Mapping[str, float], key_name: str, module: str, default: float) -> float:
        """The value of the pattern that ends a module's name, by peft's rule.

        Raises:
            AdapterError: two patterns fit and disagree. peft sorts the keys when it saves, so the
                order that decided in training is lost.
        """
        try:
            matches = [key for key in pattern if re.match(rf"(.*\.)?({key})$", module)]
        except re.error as error:
            raise AdapterError(f"{self.where}: {key_name} has a key that is no regular expression ({error})") from error
        values = {pattern[key] for key in matches}
        if len(values) > 1:
            raise AdapterError(
                f"{self.where}: {key_name} keys {', '.join(map(repr, matches))} all match {module} and give "
                f"{sorted(values)}; which one training used is not recorded: keep the one that was meant"
            )
        return pattern[matches[0]] if matches else default


def parse_adapter_config(config: Mapping[str, Any], where: str) -> AdapterConfig:
    """Reads the config of an adapter of any kind that is merged.

    Raises:
        AdapterError: a kind, a variant or an initialisation that cannot be merged exactly, an
            unknown key that is set, or a value of the wrong type.
    """
    check_type(config.get("peft_type"), where)
    kind, is_adalora = KINDS.get(config["peft_type"]), config["peft_type"] == "ADALORA"
    has_factors = config["peft_type"] in LOW_RANK
    read = ConfigReader(config, where)
    if has_factors:
        for key, reason in REFUSED_KEYS.items():
            if config.get(key):
                raise AdapterError(f"{where}: {key} is set ({short(config[key])}), which cannot be merged: {reason}")
        _check_init(config.get("init_lora_weights", True), where)
        known = HARMLESS_KEYS | UNDERSTOOD_KEYS | REFUSED_KEYS.keys() | ADALORA_KEYS
    else:
        known = KEYS_OF_ALL_KINDS | (ROWS_KEYS if kind is None else kind.keys | kind.harmless)
    for key in sorted(config.keys() - known):
        if config[key]:
            raise AdapterError(
                f"{where}: unknown key {key!r} is set to {short(config[key])}; a newer peft may mean other maths by "
                "it. Update qconv, or remove the key if you know that it does not change the weights"
            )
    is_kasa, is_qalora = has_factors and bool(config.get("kasa_config")), has_factors and read.flag("use_qalora")
    variants = [key for key in ("use_dora", "kasa_config", "use_qalora") if config.get(key)]
    if len(variants) > 1 or (variants and variants[0] != "use_dora" and is_adalora):
        raise AdapterError(f"{where}: expected at most one variant of LoRA, found {', '.join(variants)} set")
    bias = config.get("bias") or "none"
    if not isinstance(bias, str) or not (bias in ("none", "all") or bias.endswith("_only")):
        read.refuse("bias", "'none', 'lora_only' or 'all'")
    rank_key, alpha_key = (None, None) if kind is None else (kind.rank_key, kind.alpha_key)
    if has_factors:
        rank_key, alpha_key = "init_r" if is_adalora else "r", "lora_alpha"
    masks = read.table("rank_pattern") if is_adalora else []
    pattern_key = "rank_pattern" if kind is None else kind.rank_pattern
    ranks = [] if is_adalora or rank_key is None else read.table(pattern_key)
    alphas = [] if alpha_key is None else read.table("alpha_pattern")
    return AdapterConfig(
        where=where,
        kind=kind,
        read=read,
        rank=1 if rank_key is None else read.rank(rank_key),
        alpha=1.0 if alpha_key is None else read.number(alpha_key),
        use_rslora=has_factors and not is_adalora and read.flag("use_rslora"),
        use_dora=has_factors and read.flag("use_dora"),
        fan_in_fan_out=read.flag("fan_in_fan_out"),
        bias=cast(BiasMode, bias if bias in ("none", "all") else "lora_only"),
        lora_bias=has_factors and read.flag("lora_bias"),
        rank_pattern={key: rank_value(value, f"{pattern_key}[{key!r}]", where) for key, value in ranks},
        alpha_pattern={key: alpha_value(value, f"alpha_pattern[{key!r}]", where) for key, value in alphas},
        modules_to_save=read.names("modules_to_save"),
        tie_trained=read.flag("ensure_weight_tying"),
        is_kasa=is_kasa,
        of_training=frozenset(key.removesuffix("_config") for key in TRAINING_KEYS if has_factors and config.get(key)),
        qalora_group=read.whole("qalora_group_size", 2) if is_qalora else None,
        pattern_key=pattern_key,
        kept_ranks={_module_of(key): _kept_rank(value, key, where) for key, value in masks} if is_adalora else None,
    )


def _module_of(key: str) -> str:
    """The module that a ``rank_pattern`` key of AdaLoRA names (``<module>.lora_E``, and with the adapter's name)."""
    return key.removesuffix(".default").removesuffix(".lora_E")


def _kept_rank(mask: Any, key: str, where: str) -> int:
    if not (isinstance(mask, list) and all(isinstance(value, bool) for value in mask)):
        raise AdapterError(
            f"{where}: expected rank_pattern[{key!r}] to be a list of true and false, as AdaLoRA writes it, "
            f"found {short(mask)}"
        )
    return sum(mask)


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
        f"{where}: unknown init_lora_weights {short(init)}; if it did not change the base weights, set it to true"
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
