"""What a ``quantization_config`` says of one module, where it does not say the same of all.

GPTQ (GPTQModel's `QuantizeConfig.dynamic`, vLLM's `get_dynamic_override`): the first rule of ``dynamic`` whose regular
expression matches the beginning of the module's name decides; ``-:`` excludes it, ``+:`` or nothing changes settings.

compressed-tensors 0.20 (`utils/match.py`): ``ignore`` excludes names and ``re:`` patterns; of the config groups the one
counts whose target is the module's name, else whose ``re:`` pattern matches (patterns in alphabetical order), else
whose target is the class ``Linear``. A group may name a layout of its own (``mixed-precision``).

HQQ (transformers' integration): ``quant_config`` holds settings for all linears, or by tag (the name without blocks).

Left out: targets that are other classes, and fused names that only engines know.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qconv.convert.hqq import tag_of
from qconv.errors import CheckpointError


def config_for(config: Mapping[str, Any], module: str, location: str) -> Mapping[str, Any]:
    """The configuration of a module that is stored quantized, as if all were like it.

    Raises:
        CheckpointError: the configuration excludes the module or says nothing of it, or is malformed.
    """
    match config.get("quant_method"):
        case "gptq":
            return _by_rule(config, module, location)
        case "compressed-tensors":
            return _by_group(config, module, location)
        case "hqq":
            return _by_tag(config, module, location)
    return config


def _by_rule(config: Mapping[str, Any], module: str, location: str) -> Mapping[str, Any]:
    rules = config.get("dynamic") or {}
    if not isinstance(rules, dict):
        raise CheckpointError(f"{location}: quantization_config: expected an object under 'dynamic', found {rules!r}")
    rest = {key: value for key, value in config.items() if key != "dynamic"}
    for rule, changes in rules.items():
        if not _matches(module, rule.removeprefix("-:").removeprefix("+:"), location):
            continue
        if rule.startswith("-:"):
            raise _excluded(module, f"the rule {rule!r} of 'dynamic'", location)
        if not isinstance(changes, dict):
            raise CheckpointError(f"{location}: quantization_config: rule {rule!r} of 'dynamic' is not an object")
        return rest | changes
    return rest


def _by_tag(config: Mapping[str, Any], module: str, location: str) -> Mapping[str, Any]:
    settings = config.get("quant_config")
    if isinstance(settings, dict) and "weight_quant_params" not in settings:
        if tag_of(module) not in settings:
            raise CheckpointError(
                f"{location}: module {module!r} is stored quantized, and 'quant_config' says nothing of "
                f"{tag_of(module)!r}; there are {', '.join(map(repr, settings)) or 'no others'}"
            )
        return {**config, "quant_config": settings[tag_of(module)]}
    return config


def _by_group(config: Mapping[str, Any], module: str, location: str) -> Mapping[str, Any]:
    for name in config.get("ignore") or ():
        if _is_named(module, name, location):
            raise _excluded(module, f"{name!r} under 'ignore'", location)
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise CheckpointError(f"{location}: quantization_config: expected objects under 'config_groups'")
    targets = {target: name for name, group in groups.items() for target in group.get("targets") or ()}
    by_name = [t for t in sorted(targets, key=lambda t: ("re:" in t, t)) if _is_named(module, t, location)]
    found = next(iter([*by_name, *(t for t in targets if t == "Linear")]), None)
    if found is None:
        raise CheckpointError(
            f"{location}: module {module!r} is stored quantized, and no config group of quantization_config is for it; "
            f"there are targets {', '.join(map(repr, targets)) or 'of none'}"
        )
    group = groups[targets[found]]
    return {**config, "format": group.get("format") or config.get("format"), "config_groups": {"group_0": group}}


def formats_of(config: Mapping[str, Any]) -> list[str]:
    """The layouts that config groups of compressed-tensors name, each once."""
    groups = config.get("config_groups")
    own = (
        [group.get("format") for group in groups.values() if isinstance(group, dict)]
        if isinstance(groups, dict)
        else []
    )
    return list(dict.fromkeys(str(name or config.get("format")) for name in own or [None]))


def _is_named(module: str, pattern: str, location: str) -> bool:
    if pattern.startswith("re:"):
        return _matches(module, pattern.removeprefix("re:"), location)
    return module == pattern


def _matches(module: str, expression: str, location: str) -> bool:
    try:
        return re.match(expression, module) is not None
    except re.error as error:
        raise CheckpointError(
            f"{location}: quantization_config: {expression!r} is not a regular expression ({error})"
        ) from error


def _excluded(module: str, by: str, location: str) -> CheckpointError:
    return CheckpointError(
        f"{location}: module {module!r} is stored quantized, but {by} of quantization_config excludes it; "
        "configuration and tensors come from different runs: fetch or save the folder again"
    )
