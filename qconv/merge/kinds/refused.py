"""Kinds of adapters that are not merged: why, and what to do instead."""

from __future__ import annotations

_SERVE = "serve it beside the base model, or train with LoRA"
_PEFT_MERGES = (
    "merge it with peft's merge_and_unload where it was trained, into the 16-bit base (of a 4-bit one, `qconv convert "
    "BASE --to bf16` writes what training saw), then give the result to `qconv quantize`"
)
_PROMPT = ("learns prompts or prefixes and has no weight delta, so there is nothing to merge", _SERVE)

REFUSED: dict[str, tuple[str, str]] = {
    "ADAPTION_PROMPT": _PROMPT,
    "CARTRIDGE": _PROMPT,
    "CPT": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
    "PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "LILY": ("mixes its factors with weights that depend on the input, so no fixed weight equals it", _SERVE),
    "PEANUT": ("puts a nonlinear network of its own beside each layer, so no fixed weight equals it", _SERVE),
    "POLY": ("routes by task, so it is another weight for every task id", _SERVE),
    "PVERA": ("draws its scales from a distribution that depends on the input, so no fixed weight equals it", _SERVE),
    "SHADOW": ("runs a second, smaller model beside the base, so no fixed weight equals it", _SERVE),
    "XLORA": (
        "weighs several LoRAs for every token, so no fixed weight equals it",
        "merge one of its LoRAs, or serve it",
    ),
    "BOTTLENECK": (
        "puts small nonlinear networks behind the layers, so no fixed weight equals it",
        _SERVE,
    ),
    "BONE": (
        "was removed from peft",
        "convert it with peft's scripts/convert-bone-to-miss.py: MISS adapters are merged",
    ),
    "ADAMSS": (
        "trains rows in groups that clustering the base gave, and does not store which row is in which",
        _PEFT_MERGES,
    ),
    "PSOFT": (
        "rotates leading singular vectors of the base, whose signs depend on the machine that decomposes it, and does "
        "not store them",
        _PEFT_MERGES,
    ),
}
