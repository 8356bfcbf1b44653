"""Which linears of a model are quantized, and with which scheme each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace

from qconv.convert import COMPRESSED
from qconv.errors import SchemeError, UsageError
from qconv.experts import EXPERTS, FAMILIES, expert_of, names_of
from qconv.overrides import OverrideConfig, fused_linears, matches
from qconv.quantization_config import QuantizationConfig
from qconv.skeleton import other_linears, text_config
from qconv.suggest import did_you_mean
from qconv.targets import TARGETS, mixed_target, target_scheme
from qconv.types import Checkpoint, Scheme

HEAD = "lm_head"


def chosen_linears(view: Checkpoint, linears: Collection[str], config: QuantizationConfig) -> list[str]:
    """The weights to quantize: ``linears`` (those of the decoder blocks) without ``--ignore``, and ``--lm-head``.

    Raises:
        UsageError: a pattern that matches no linear; names those that are near.
        SchemeError: nothing is left, an output head that cannot be quantized by itself, or linears that engines fuse of
            which only some are left out.
    """
    _check_experts(view, config)
    if config.target == "gpt-oss-mxfp4":
        linears = [name for name in linears if expert_of(name.removesuffix(".weight")) is not None]
    if config.lm_head:
        _check_head(view)
        linears = [*linears, HEAD + ".weight"]
    modules = [name.removesuffix(".weight") for name in linears]
    known = [*modules, *(other_linears(view, linears) if config.ignore else ())]
    ignored: set[str] = set()
    for pattern in config.ignore:
        ignored |= _matching("--ignore", pattern, known)
    if config.lm_head and HEAD in ignored:
        raise UsageError(f"--lm-head asks for what --ignore leaves out: {HEAD}")
    left = [module for module in modules if module not in ignored]
    if not left:
        raise SchemeError(f"{view.location}: --ignore leaves no linear to quantize; drop --requant for a plain merge")
    _check_fused({module: module not in ignored for module in modules}, view.location, "--ignore")
    _check_readers(view, left, config.target)
    return [module + ".weight" for module in left]


def kept_linears(
    view: Checkpoint, linears: Collection[str], config: QuantizationConfig, kept: Mapping[str, Scheme]
) -> tuple[Scheme, dict[str, Scheme]]:
    """The scheme of most linears that the base has quantized, and that of each, for an output that keeps their codes.

    Args:
        kept: by module, of the base; empty where it has no integer codes.

    Raises:
        SchemeError: the base has no codes that this output can hold.
    """
    target = TARGETS[config.target]
    if not kept:
        raise SchemeError(
            f"{view.location}: --algorithm zeros keeps the integer codes of a GPTQ, AWQ or compressed-tensors base, "
            "and this one has none; choose another --algorithm"
        )
    outside = [module for module in kept if f"{module}.weight" not in linears]
    if outside:
        raise SchemeError(
            f"{view.location}: --algorithm zeros: the base quantizes {outside[0]}, which is no linear of a decoder "
            "block; choose another --algorithm"
        )
    found: dict[str, Scheme] = {}
    for module, scheme in kept.items():
        if scheme.kind != "int" or scheme.rounds_activations or scheme.bits not in {*target.bits, *target.mixed_bits}:
            raise SchemeError(
                f"{view.location}: --algorithm zeros: {module} has {scheme.bits}-bit {scheme.kind} codes"
                f"{' and inputs that are rounded' if scheme.rounds_activations else ''}, which {target.name} does not "
                "hold; choose the format of the base"
            )
        size = scheme.group_size
        if target.scheme is not None:
            k = view.specs()[f"{module}.weight"].shape[1]
            size = target.scheme.group_size
            if (k if scheme.group_size == -1 else scheme.group_size) % size:
                raise SchemeError(
                    f"{view.location}: --algorithm zeros: {target.name} has groups of {size} inputs, and {module} of "
                    f"{scheme.group_size}, which are no multiple; choose the format of the base"
                )
        found[f"{module}.weight"] = replace(
            scheme, symmetric=False, group_size=size, activation_order=False, min_zero=config.min_zero(False)
        )
    return Counter(found.values()).most_common(1)[0][0], found


def schemes_of(
    view: Checkpoint, weights: Collection[str], config: QuantizationConfig
) -> tuple[Scheme, dict[str, Scheme]]:
    """The scheme of all weights that no override is about, and that of each weight.

    Where overrides are about all of them, the first is that of most weights: what describes an output is true of some.

    Raises:
        UsageError: an override that matches no linear, or only such that an earlier one has taken.
        SchemeError: a group size that does not divide, or linears that engines fuse with different schemes.
    """
    specs = view.specs()
    modules = [name.removesuffix(".weight") for name in weights]
    taken: dict[str, int] = {}
    for number, override in enumerate(config.overrides):
        found = _matching("--override", override.pattern, modules)
        if found <= taken.keys():
            raise UsageError(
                f"--override {override.pattern!r}: earlier overrides have taken all linears that it matches"
            )
        taken |= {module: number for module in found if module not in taken}
    own_size = {m for m, n in taken.items() if config.overrides[n].group_size or config.overrides[n].target}
    base = config.scheme_for([specs[f"{m}.weight"].shape[1] for m in modules if m not in own_size], view.location)
    others = [_overridden(base, override, config) for override in config.overrides]
    schemes = {m: others[taken[m]] if m in taken else base for m in modules}
    _check_fused(schemes, view.location, "--override")
    if len(taken) == len(modules):
        base = Counter(schemes.values()).most_common(1)[0][0]
    return base, {f"{module}.weight": scheme for module, scheme in schemes.items()}


def _overridden(base: Scheme, override: OverrideConfig, config: QuantizationConfig) -> Scheme:
    if override.target is not None:
        return replace(target_scheme(override.target), activation_order=base.activation_order)
    symmetric = base.symmetric if override.symmetric is None else override.symmetric
    return replace(
        base,
        bits=override.bits or base.bits,
        group_size=override.group_size or base.group_size,
        symmetric=symmetric,
        min_zero=config.min_zero(symmetric),
    )


def _matching(option: str, pattern: str, modules: Collection[str]) -> set[str]:
    found = {module for module in modules if matches(pattern, module)}
    if not found:
        roles = dict.fromkeys("*." + module.rpartition(".")[2] for module in modules if "." in module)
        hint = did_you_mean(pattern, [*roles, *modules]) or f"; there are {', '.join(roles)}"
        raise UsageError(f"{option} {pattern!r} matches no linear{hint}")
    return found


def _check_experts(view: Checkpoint, config: QuantizationConfig) -> None:
    """Refuses experts that would stay behind as they are, unsaid: they are most of a model."""
    names = names_of(view.config)
    if config.target == "gpt-oss-mxfp4" and (names is None or not names.fused_in_files):
        raise SchemeError(
            f"{view.location}: gpt-oss-mxfp4 is how engines read the experts of gpt-oss, and model_type is "
            f"{view.config.get('model_type')!r}; choose another target, such as w4a16"
        )
    if names is not None:
        if config.target == "nf4":
            raise SchemeError(
                f"{view.location}: bitsandbytes quantizes linears, and transformers keeps experts as bare parameters, "
                "so it could load an nf4 folder only with its experts in 16 bits; choose another target"
            )
        return
    fused = next((s for s in view.specs().values() if f".{EXPERTS}." in s.name and len(s.shape) == 3), None)
    if fused is not None:
        raise SchemeError(
            f"{view.location}: tensor {fused.name!r} {list(fused.shape)} holds the experts of a family that is not "
            f"known ({view.config.get('model_type')!r}; known are {', '.join(FAMILIES)}): they would stay unquantized"
        )


def _check_readers(view: Checkpoint, modules: Collection[str], target: str) -> None:
    """Refuses what no engine loads: experts of a family whose readers know fused ones alone, in formats of linears."""
    names = names_of(view.config)
    if names is None or not names.fused_in_files or target == "gpt-oss-mxfp4":
        return
    beside = [name for name, other in TARGETS.items() if other.format in COMPRESSED]
    if any(expert_of(module) is not None for module in modules) or target not in beside:
        raise SchemeError(
            f"{view.location}: transformers, vLLM and SGLang read the experts of {view.config['model_type']} in 16 "
            f"bits or in MXFP4, and not in the layout of {target}. Choose --requant gpt-oss-mxfp4 (experts in 4 bits, "
            f"attention in 16), no --requant, or {', '.join(beside[:-1])} or {beside[-1]} for attention alone, with "
            "--ignore '*.experts.*'"
        )


def _check_head(view: Checkpoint) -> None:
    if text_config(view).tie_word_embeddings or HEAD + ".weight" not in view.specs():
        raise SchemeError(
            f"{view.location}: --lm-head: the output head is the input embedding (tie_word_embeddings), which stays in "
            "16 bits; it could only be quantized as a second copy of it. Drop --lm-head"
        )


def _check_fused(values: Mapping[str, bool | Scheme], location: str, option: str) -> None:
    """Engines run these as one linear, so they are quantized alike or not at all."""
    for members in fused_linears(values).values():
        if len({values[module] for module in members}) > 1:
            expert = expert_of(members[0])
            if expert is not None:
                raise SchemeError(
                    f"{location}: serving engines run all experts of a layer as one, and {option} makes those of "
                    f"{expert.experts} different; write a pattern that matches all of their linears or none, such as "
                    f"'re:{re.escape(expert.experts)}'"
                )
            found = ", ".join(f"{module} {_in_words(values[module])}" for module in members)
            parent, roles = members[0].rpartition(".")[0], [module.rpartition(".")[2] for module in members]
            raise SchemeError(
                f"{location}: serving engines run {' and '.join(roles)} as one linear, and {option} makes them "
                f"different: {found}; write a pattern that matches all of them or none, such as "
                f"'re:{re.escape(parent)}\\.({'|'.join(roles)})'"
            )


def _in_words(value: bool | Scheme) -> str:
    if isinstance(value, Scheme) and mixed_target(value) is not None:
        return f"({mixed_target(value)})"
    if isinstance(value, Scheme):
        return f"({value.bits}-bit, group size {value.group_size}, {'symmetric' if value.symmetric else 'asymmetric'})"
    return "(quantized)" if value else "(left out)"
