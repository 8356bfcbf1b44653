"""Kinds of adapters that are not merged: why, and what to do instead."""

from __future__ import annotations

_SERVE = "serve it beside the base model, or train with LoRA"
_PEFT_MERGES = (
    "merge it with peft's merge_and_unload into the 16-bit base (of a 4-bit one, `qconv convert BASE --to bf16` writes "
    "what training saw), then give the result to `qconv quantize`"
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
    "BEFT": ("is not read: the biases that it adds are in a layout of its own", _PEFT_MERGES),
    "BONE": (
        "was removed from peft",
        "convert it with peft's scripts/convert-bone-to-miss.py: MISS adapters are merged",
    ),
    "ADAMSS": ("is a sum over subspaces of the base weight's own decomposition, which is not read", _PEFT_MERGES),
    "DEFT": ("projects the base weight before it adds to it, a formula that is not read", _PEFT_MERGES),
    "FROD": ("adds to joint factors of all base weights, a formula that is not read", _PEFT_MERGES),
    "GLORA": ("adds five terms to weight and bias, a formula that is not read", _PEFT_MERGES),
    "GRALORA": ("is low-rank in blocks, a formula that is not read", _PEFT_MERGES),
    "OSF": ("replaces part of the base weight's own decomposition, which it has to be split again for", _PEFT_MERGES),
    "PSOFT": ("rotates the leading components of the base weight's own decomposition", _PEFT_MERGES),
    "SUPERTUNING": (
        "writes weights at places that the base's magnitudes give, a formula that is not read",
        _PEFT_MERGES,
    ),
    "TINYLORA": ("scales components of the base weight's own decomposition, a formula that is not read", _PEFT_MERGES),
    "UNILORA": ("projects one vector with a seeded random matrix, a formula that is not read", _PEFT_MERGES),
    "VBLORA": ("composes its factors of a shared bank of vectors, a formula that is not read", _PEFT_MERGES),
    "WAVEFT": ("is an inverse wavelet transform, a formula that is not read", _PEFT_MERGES),
}
