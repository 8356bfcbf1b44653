"""The ``quantization_config`` of linears with several schemes: inverse of `module_config`.

compressed-tensors: a config group for each scheme, which names its layout where there are several (the whole is then
called ``mixed-precision``, as the package does). GPTQ: the rules of ``dynamic``, whose first match counts, for
modules as well as for what vLLM fuses of them (it asks with the fused name). Patterns name one role in all blocks where
they can, and single modules elsewhere; class names are not used, since engines match them before the parts of a fused
linear.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from qconv.convert.compressed_tensors import PackQuantized
from qconv.convert.format import Format
from qconv.convert.fp4 import MXFP4, NVFP4
from qconv.convert.hqq import settings_of, tag_of
from qconv.errors import SchemeError
from qconv.overrides import fused_linears
from qconv.types import Scheme

MIXED = "mixed-precision"


def format_for(fmt: Format, scheme: Scheme) -> Format:
    """The layout of a linear with this scheme among others in ``fmt``: 4-bit floats have those of their own."""
    if scheme.is_fp4 and fmt.name == PackQuantized.name:
        return NVFP4 if scheme.has_global_scale else MXFP4
    return fmt


def mixed_config(
    fmt: Format,
    default: Scheme,
    schemes: Mapping[str, Scheme],
    ignored: Collection[str],
    has_group_index: bool,
) -> dict[str, Any]:
    """The configuration of modules with their ``schemes``; ``default`` is that of modules that no rule is about.

    ``ignored`` are the linears that stay unquantized.

    Raises:
        SchemeError: the format has one scheme for all.
    """
    config = format_for(fmt, default).quantization_config(default, list(schemes), ignored, has_group_index)
    groups: dict[Scheme, list[str]] = {default: []}
    for module, scheme in schemes.items():
        groups.setdefault(scheme, []).append(module)
    everything = [*schemes, *ignored]
    if config["quant_method"] == "gptq":
        everything += fused_linears(everything)
        skipped = [name for name in ignored if name != "lm_head"]
        rules: dict[str, dict[str, Any]] = {
            f"-:{pattern}": {} for pattern in _patterns([*skipped, *fused_linears(skipped)], everything)
        }
        for scheme, modules in list(groups.items())[1:]:
            settings = {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}
            named = _patterns([*modules, *fused_linears(modules)], everything)
            rules |= {f"+:{pattern}": dict(settings) for pattern in named}
        return config | ({"dynamic": rules} if rules else {})
    if len(groups) == 1 and "lm_head" not in schemes:
        return config
    if config["quant_method"] == "hqq":
        return config | {"quant_config": _by_tag(schemes)}
    if config["quant_method"] != "compressed-tensors":
        raise SchemeError(f"{fmt.name} has one scheme for all linears, got {len(groups)}")
    config["config_groups"] = {}
    layouts = dict.fromkeys(format_for(fmt, scheme).name for scheme, modules in groups.items() if modules)
    if len(layouts) > 1:
        config["format"] = MIXED
    for scheme, modules in groups.items():
        if modules:
            layout = format_for(fmt, scheme)
            own = layout.quantization_config(scheme, modules, ignored, has_group_index)["config_groups"]["group_0"]
            own |= {"format": layout.name} if len(layouts) > 1 else {}
            # Whole names where a pattern would stand for one module: engines that rename modules can map those.
            by_pattern = {f"re:^{re.escape(module)}$": module for module in modules}
            targets = [by_pattern.get(f"re:{pattern}", f"re:{pattern}") for pattern in _patterns(modules, everything)]
            config["config_groups"][f"group_{len(config['config_groups'])}"] = own | {"targets": targets}
    return config


def _by_tag(schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """HQQ's settings of linears by what transformers calls those of one role."""
    found: dict[str, Scheme] = {}
    for module, scheme in schemes.items():
        if found.setdefault(tag_of(module), scheme) != scheme:
            raise SchemeError(f"{module}: hqq has one scheme for {tag_of(module)} of all blocks, got several")
    return {tag: settings_of(scheme) for tag, scheme in found.items()}


def _patterns(modules: Collection[str], everything: Collection[str]) -> list[str]:
    """Regular expressions that match ``modules`` and nothing else of ``everything``."""
    wanted = set(modules)
    partial = {_role(module) for module in everything if module not in wanted}
    return list(dict.fromkeys(
        f"^{re.escape(module)}$" if _role(module) in partial else f"^{_role(module)}$" for module in modules
    ))  # fmt: skip


def _role(module: str) -> str:
    """Of a linear in any block, as a regular expression."""
    return r"\.".join(r"\d+" if part.isdecimal() else re.escape(part) for part in module.split("."))
