"""Gate rules: what must hold before an artifact may be released - defaults, policy files, waivers.

Where several rules name one metric, the command line replaces the file, and the file replaces the defaults.

A waiver lets one gate fail until a date, with a reason and a name. It is temporary by construction: at most
`MAX_WAIVER_DAYS` ahead. What is meant to stay is a limit, and belongs under ``gates``.

Imports no torch. Left out: several rules on one metric (a metric has one direction, so the stricter one decides).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from qconv.errors import UsageError
from qconv.gate_file import read_document
from qconv.gate_limits import Origin, Rule, parse_rule, rule_from_text
from qconv.gate_metrics import METRICS, TASK_PATTERN, Metric, find_metric

__all__ = [
    "FINDING_PREFIX",
    "MAX_WAIVER_DAYS",
    "METRICS",
    "TASK_PATTERN",
    "ArtifactKind",
    "Metric",
    "Origin",
    "Policy",
    "Rule",
    "Waiver",
    "artifact_kind",
    "combine",
    "default_rules",
    "find_metric",
    "load_policy",
    "parse_rule",
    "today_utc",
]

ArtifactKind = Literal["plain", "fp8", "int8", "int4", "int3", "int2"]

FINDING_PREFIX = "finding:"
MAX_WAIVER_DAYS = 366


def artifact_kind(bits: int | None, is_float: bool = False) -> ArtifactKind:
    """The row of `default_rules` for stored weights of ``bits`` bits; None or 16 and more = plain."""
    if bits is None or bits >= 16:
        return "plain"
    if bits >= 8:
        return "fp8" if is_float else "int8"
    return "int4" if bits >= 4 else "int3" if bits == 3 else "int2"


_MAX_KL: Mapping[ArtifactKind, float] = {
    "plain": 0.01,
    "fp8": 0.1,
    "int8": 0.02,
    "int4": 0.3,
    "int3": 1.0,
    "int2": 1.0,
}


def default_rules(kind: ArtifactKind, has_adapter: bool) -> tuple[Rule, ...]:
    """What is gated unless told otherwise: limits that a sound conversion meets with room and a broken one does not.

    They catch breakage; a release should set limits of its own, or relative ones: how far a number of bits
    brings one away depends on the model. The evidence, mean KL in nats on SmolLM2-135M with a real adapter
    (docs/quality.md; a small model suffers more from quantization than a large one):

    - plain, 0.01: a bf16 merge measures 0.0016, fp32 0.0010; merging into the wrong base 0.16, a merge that is
      rounded to 4 bits again 0.38, no adapter at all 0.39.
    - int8, 0.02: measures 0.0020 (llama.cpp reports 0.0014 for q8_0 of an 8B model).
    - fp8, 0.1: measures 0.021; its 3 bits of mantissa also round the activations.
    - int4, 0.3: calibrated quantization measures 0.066 to 0.112 (llama.cpp's q4_K_M of an 8B model: 0.031),
      asymmetric round-to-nearest 0.26, symmetric round-to-nearest 0.63, which is worse than no adapter.
    - int3 and int2, 1.0: no evidence here; only that the output still resembles the reference.
    - merge.kl_mean, 0.01 with an adapter: that a 16-bit merge of this base and adapter is possible at all; it is
      made here, so it says nothing of the candidate. The limit is the plain one.
    - findings, 0: an error found in the files is one however close the logits are.
    """
    limits = {"kl_mean": _MAX_KL[kind]}
    if has_adapter:
        limits["merge.kl_mean"] = _MAX_KL["plain"]
    limits["findings"] = 0.0
    return tuple(Rule(metric=metric, upper=True, limit=limit) for metric, limit in limits.items())


def combine(defaults: Iterable[Rule], file_rules: Iterable[Rule], flag_rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """One rule for each metric: a flag replaces the file's, which replaces the default. Origins are set accordingly.

    Raises:
        UsageError: two rules of the same origin on one metric.
    """
    combined: dict[str, Rule] = {}
    levels: Sequence[tuple[Origin, Iterable[Rule]]] = (
        ("default", defaults),
        ("file", file_rules),
        ("flag", flag_rules),
    )
    for origin, rules in levels:
        own: dict[str, Rule] = {}
        for rule in rules:
            if rule.metric in own:
                raise UsageError(f"two gates on {rule.metric}: {own[rule.metric]} and {rule}; keep one")
            own[rule.metric] = replace(rule, origin=origin)
        combined.update(own)
    return tuple(combined.values())


def today_utc() -> date:
    """The day that waivers are held against: the same wherever the check runs."""
    return datetime.now(UTC).date()


@dataclass(frozen=True, kw_only=True)
class Waiver:
    """Permission for one gate to fail for a while; checked when built.

    Attributes:
        gate: metric name, or ``finding:<code>`` for one kind of finding. Not ``findings``: that would also
            cover errors that nobody has seen yet.
        reason, approved_by: who allowed it and why.
        expires: last day on which it applies.
    """

    gate: str
    reason: str
    expires: date
    approved_by: str

    def __post_init__(self) -> None:
        for key in ("reason", "approved_by"):
            if not getattr(self, key).strip():
                raise UsageError(f"{key} is empty: a waiver says why and who approved it")
        if self.gate.startswith(FINDING_PREFIX):
            if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.gate.removeprefix(FINDING_PREFIX)):
                raise UsageError(f"expected a finding's code such as finding:adapter-scale, got {self.gate!r}")
        elif find_metric(self.gate).name == "findings":
            raise UsageError("findings are waived one code at a time: write finding:<code>")

    def applies(self, today: date) -> bool:
        return today <= self.expires


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a policy file says.

    Attributes:
        rules: of origin ``"file"``.
        waivers: at most one for each gate; expired ones included.
        defaults: False = the default rules do not apply.
    """

    rules: tuple[Rule, ...] = ()
    waivers: tuple[Waiver, ...] = ()
    defaults: bool = True


def load_policy(path: Path, today: date | None = None) -> Policy:
    """Reads a policy from a YAML file (JSON where the name ends in .json)::

        defaults: true            # false: only what stands here
        gates:
          kl_mean: {max: 0.1}
          merge.kl_mean: {max: 5x floor}
          adapter_effect_retained: {min: 75%}
        waivers:
          - gate: kl_p99
            reason: names in code change; not part of what we serve
            approved_by: J. Doe
            expires: 2026-12-31

    Args:
        today: waivers may expire at most `MAX_WAIVER_DAYS` after it; None = today, UTC.

    Raises:
        UsageError: unreadable, larger than 64 KiB, not as above; names the file and the key.
    """
    try:
        return _policy(read_document(Path(path)), today or today_utc())
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _policy(document: Any, today: date) -> Policy:
    if document is None:
        raise UsageError("empty; expected at least one of: defaults, gates, waivers")
    content = _mapping(document, "the file", {"defaults", "gates", "waivers"})
    defaults = content.get("defaults", True)
    if not isinstance(defaults, bool):
        raise UsageError(f"defaults: expected true or false, got {defaults!r}")
    gates = _mapping(content.get("gates", {}), "gates")
    waivers = content.get("waivers", [])
    if not isinstance(waivers, list):
        raise UsageError(f"waivers: expected a list, got {_kind(waivers)}")
    read = tuple(_waiver(item, f"waivers[{index}]", today) for index, item in enumerate(waivers))
    for index, waiver in enumerate(read):
        if waiver.gate in {earlier.gate for earlier in read[:index]}:
            raise UsageError(f"waivers[{index}].gate: {waiver.gate} is waived twice; keep one")
    rules = tuple(_file_rule(name, item) for name, item in gates.items())
    return Policy(rules=rules, waivers=read, defaults=defaults)


def _file_rule(name: str, item: Any) -> Rule:
    where = f"gates.{name}"
    try:
        metric = find_metric(name)
        sides = _mapping(item, where, {"max", "min"})
        if len(sides) != 1:
            raise UsageError(f"expected {{{'min' if metric.larger_is_better else 'max'}: LIMIT}}, got {item!r}")
        ((side, limit),) = sides.items()
        if not isinstance(limit, str):
            raise UsageError(f"{side}: expected a number, 90% or '5x floor', got {_kind(limit)}")
        return rule_from_text(metric, side == "max", limit, "file")
    except UsageError as error:
        raise UsageError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def _waiver(item: Any, where: str, today: date) -> Waiver:
    keys = ("gate", "reason", "approved_by", "expires")
    content = _mapping(item, where, set(keys))
    for key in keys:
        if key not in content:
            raise UsageError(f"{where}: {key} is missing; a waiver has {', '.join(keys)}")
        if not isinstance(content[key], str):
            raise UsageError(f"{where}.{key}: expected text, got {_kind(content[key])}")
    expires = _date(content["expires"].strip(), f"{where}.expires")
    if expires - today > timedelta(days=MAX_WAIVER_DAYS):
        raise UsageError(
            f"{where}.expires: {expires} is more than {MAX_WAIVER_DAYS} days ahead; a waiver is temporary: "
            "what is meant to stay is a limit, under gates"
        )
    texts = {key: " ".join(content[key].split()) for key in ("gate", "reason", "approved_by")}
    try:
        return Waiver(expires=expires, **texts)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def _date(text: str, where: str) -> date:
    try:
        if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
            raise ValueError("not YYYY-MM-DD")
        return date.fromisoformat(text)
    except ValueError as error:
        raise UsageError(f"{where}: expected a date such as 2026-12-31, got {text!r} ({error})") from None


def _mapping(value: Any, where: str, known: set[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where}: expected keys with values, got {_kind(value)}")
    for key in value:
        if not isinstance(key, str) or (known is not None and key not in known):
            expected = f"; expected {', '.join(sorted(known))}" if known else ""
            raise UsageError(f"{where}: unknown key {key!r}{expected}")
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    names = {dict: "keys with values", list: "a list", bool: "true or false", str: "text"}
    return f"{names[type(value)]} ({value!r:.60})"
