"""Which linears an option is about, and what it says of them; and which linears engines run as one."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from qconv.errors import UsageError

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),  # DeepSeek-V2 and V3
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),  # Qwen3.5
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
"""Linears that serving engines run as one, under the name that they give it."""
_SYNTAX = (
    "PATTERN:bits=8,group-size=32,sym or PATTERN:target=nvfp4a16, such as '*.down_proj:bits=8' or "
    "'re:.*layers\\.0\\..*:group-size=32,asym'"
)


@dataclass(frozen=True, kw_only=True)
class OverrideConfig:
    """Settings of the linears whose module name matches a pattern; what is None is as for all others.

    Attributes:
        pattern: a glob over the whole name (``*.down_proj``), or ``re:`` and a regular expression that matches its
            beginning, as compressed-tensors has it.
        bits: of a weight.
        group_size: inputs per scale; -1 = the whole row.
        symmetric: without zero points.
        target: the scheme of another target in the place of all these, in its own layout: 4-bit floats.
    """

    pattern: str
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    target: str | None = None

    def __post_init__(self) -> None:
        check_pattern(self.pattern)
        has_settings = self.bits is not None or self.group_size is not None or self.symmetric is not None
        if not has_settings and self.target is None:
            raise UsageError(f"--override {self.pattern!r} changes nothing: no bits, group-size, symmetric or target")
        if has_settings and self.target is not None:
            raise UsageError(
                f"--override {self.pattern!r}: {self.target} has one scheme, and bits, group-size or symmetric say "
                "others; drop them or the target"
            )
        if self.group_size is not None and self.group_size != -1 and self.group_size < 8:
            raise UsageError(
                f"--override {self.pattern!r}: group-size is at least 8, or -1 for one group per row, "
                f"got {self.group_size}"
            )


def parse_override(text: str) -> OverrideConfig:
    """``"re:.*down_proj:bits=8,group-size=32,sym"``; the settings stand behind the last colon.

    Raises:
        UsageError: not of that form.
    """
    pattern, _, settings = text.rpartition(":")
    values: dict[str, int | bool | str] = {}
    for setting in settings.split(","):
        name, has_value, value = setting.strip().partition("=")
        if name in ("sym", "asym") and not has_value:
            new: dict[str, int | bool | str] = {"symmetric": name == "sym"}
        elif name in ("bits", "group-size") and re.fullmatch(r"-?\d+", value):
            new = {name.replace("-", "_"): int(value)}
        elif name == "target" and value:
            new = {"target": value}
        else:
            raise UsageError(f"--override {text!r}: {setting!r} is no setting; expected {_SYNTAX}")
        if new.keys() & values.keys():
            raise UsageError(f"--override {text!r}: {setting!r} says again what was said before it")
        values |= new
    if not pattern:
        raise UsageError(f"--override {text!r}: no pattern before the settings; expected {_SYNTAX}")
    return OverrideConfig(pattern=pattern, **values)  # type: ignore[arg-type]


def check_pattern(pattern: str) -> None:
    """Raises `UsageError` for an empty pattern, or ``re:`` before what is not a regular expression."""
    if not pattern.removeprefix("re:"):
        raise UsageError("an empty pattern names no linear")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            raise UsageError(f"{pattern!r} is not a regular expression: {error}") from error


def matches(pattern: str, module: str) -> bool:
    """Whether a checked pattern is about a module."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    return fnmatchcase(module, pattern)


def fused_linears(modules: Iterable[str]) -> dict[str, list[str]]:
    """What engines run as one: the name that they give it -> its parts among ``modules``."""
    found: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        parent, _, role = module.rpartition(".")
        for fused, roles in FUSED.items():
            if role in roles:
                found[f"{parent}.{fused}"].append(module)
        layer, _, number = parent.rpartition(".")
        if layer.endswith(".experts") and number.isdecimal():  # all experts of a layer run in one kernel
            found[layer].append(module)
    return found
