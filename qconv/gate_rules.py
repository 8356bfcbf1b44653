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
from typing import Literal

from qconv.errors import UsageError
from qconv.gate_limits import Origin, Rule, parse_rule, rule_from_text
from qconv.gate_metrics import METRICS, TASK_PATTERN, Metric, find_metric
from qconv.nodes import Node, PlaceError, read_nodes

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
    "read_policy",
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


def default_rules(kinds: ArtifactKind | Mapping[ArtifactKind, int], has_adapter: bool) -> tuple[Rule, ...]:
    """What is gated unless told otherwise: limits that a sound conversion meets with room and a broken one does not.

    Where linears have several kinds, each weight brings its share of the limit of its own: rounding errors of different
    linears are independent, so what they add to the KL adds up. One linear in 2 bits does not give all others the room
    of 2 bits, and a few in 8 bits do not take away that of 4.

    They catch breakage; a release should set limits of its own, or relative ones: how far a number of bits
    brings one away depends on the model. The evidence, mean KL in nats on SmolLM2-135M with a real adapter
    (docs/quality.md; a small model suffers more from quantization than a large one):

    - plain, 0.01: a bf16 merge measures 0.0016, fp32 0.0010; merging into the wrong base 0.16, a merge that is
      rounded to 4 bits again 0.38, no adapter at all 0.39.
    - int8, 0.02: measures 0.0020 (llama.cpp reports 0.0014 for q8_0 of an 8B model).
    - fp8, 0.1: measures 0.021; its 3 bits of mantissa also round the activations.
    - int4, 0.3, 4-bit floats too: calibrated quantization measures 0.066 to 0.112, of NVFP4 weights 0.039
      (llama.cpp's q4_K_M of an 8B model: 0.031), asymmetric round-to-nearest 0.26, symmetric round-to-nearest 0.63,
      which is worse than no adapter.
    - int3 and int2, 1.0: no evidence here; only that the output still resembles the reference.
    - merge.kl_mean, 0.01 with an adapter: that a 16-bit merge of this base and adapter is possible at all; it is
      made here, so it says nothing of the candidate. The limit is the plain one.
    - findings, 0: an error found in the files is one however close the logits are.

    Args:
        kinds: what the quantized weights are; of several kinds how many are of each.
    """
    parts = {kinds: 1} if isinstance(kinds, str) else kinds
    shared = sum(count * _MAX_KL[kind] for kind, count in parts.items()) / sum(parts.values())
    limits = {"kl_mean": float(f"{shared:.3g}")}
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
        return read_policy(read_nodes(Path(path), "policy"), today)
    except PlaceError as error:
        raise UsageError(str(error)) from None


def read_policy(document: Node, today: date | None = None) -> Policy:
    """A policy from the content of its file; see `load_policy`.

    Raises:
        PlaceError: it is not such a content.
    """
    today = today or today_utc()
    if document.content is None:
        raise document.error("empty; expected at least one of: defaults, gates, waivers")
    content = document.keys(("defaults", "gates", "waivers"))
    rules = [_file_rule(name, item) for name, item in content["gates"].keys().items()] if "gates" in content else []
    waivers: dict[str, Waiver] = {}
    for item in content["waivers"].items() if "waivers" in content else ():
        waiver = _waiver(item, today)
        if waiver.gate in waivers:
            raise item.keys()["gate"].error(f"{waiver.gate} is waived twice; keep one")
        waivers[waiver.gate] = waiver
    defaults = content["defaults"].switch() if "defaults" in content else True
    return Policy(rules=tuple(rules), waivers=tuple(waivers.values()), defaults=defaults)


def _file_rule(name: str, item: Node) -> Rule:
    with item.blamed():
        metric = find_metric(name)
        sides = item.keys(("max", "min"))
        if len(sides) != 1:
            expected = f"{{{'min' if metric.larger_is_better else 'max'}: LIMIT}}"
            raise item.error(f"expected {expected}, got {item.kind}")
        ((side, limit),) = sides.items()
        if not isinstance(limit.content, str):
            raise limit.error(f"expected a number, 90% or '5x floor', got {limit.kind}")
        return rule_from_text(metric, side == "max", limit.content, "file")


def _waiver(item: Node, today: date) -> Waiver:
    keys = ("gate", "reason", "approved_by", "expires")
    content = item.keys(keys)
    for key in keys:
        if key not in content:
            raise item.error(f"{key} is missing; a waiver has {', '.join(keys)}")
    texts = {key: " ".join(content[key].text().split()) for key in keys}
    expires = _date(texts.pop("expires"), content["expires"])
    if expires - today > timedelta(days=MAX_WAIVER_DAYS):
        raise content["expires"].error(
            f"{expires} is more than {MAX_WAIVER_DAYS} days ahead; a waiver is temporary: "
            "what is meant to stay is a limit, under gates"
        )
    with item.blamed():
        return Waiver(expires=expires, **texts)


def _date(text: str, node: Node) -> date:
    try:
        if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
            raise ValueError("not YYYY-MM-DD")
        return date.fromisoformat(text)
    except ValueError as error:
        raise node.error(f"expected a date such as 2026-12-31, got {text!r} ({error})") from None
