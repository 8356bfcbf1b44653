"""What a gate measured and decided. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qconv.gate_rules import Metric, Rule, Waiver, find_metric

Verdict = Literal["pass", "fail", "inconclusive", "waived"]
OverallVerdict = Literal["pass", "fail", "inconclusive", "not gated"]


@dataclass(frozen=True)
class Measurement:
    """A value and its 95% interval, in the metric's unit.

    Attributes:
        value: point estimate; NaN fails every gate.
        low, high: ends of the interval; both equal to the value where there is nothing to estimate; infinite where
            the interval is unbounded (a single row).
        tokens: evaluated tokens it rests on, as `--eval-tokens` counts them; None where it rests on something else.
    """

    value: float
    low: float
    high: float
    tokens: int | None = None

    @classmethod
    def exact(cls, value: float) -> Measurement:
        """A count or another value without an interval."""
        return cls(value, value, value)

    @property
    def is_number(self) -> bool:
        return not any(map(math.isnan, (self.value, self.low, self.high)))


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """One rule and how the measurement meets it.

    Attributes:
        limit: the limit that was applied; None where a relative one could not be computed.
        least_floor: the floor that a relative limit counted with in place of a smaller measured one, or None.
        measurement: None where the metric was not measured.
        judged: the verdict before waivers.
        problem: why it fails regardless of value and limit; empty where those decide.
        tokens_to_settle: evaluated tokens that would decide an inconclusive gate in four runs out of five; None where
            no number would (value on the limit, unbounded interval) or tokens are not what is counted.
        waivers: those that apply; several only for findings.
        expired: those that would have applied earlier.
    """

    rule: Rule
    limit: float | None
    least_floor: float | None = None
    measurement: Measurement | None
    judged: Literal["pass", "fail", "inconclusive"]
    problem: str = ""
    tokens_to_settle: int | None = None
    waivers: tuple[Waiver, ...] = ()
    expired: tuple[Waiver, ...] = ()

    @property
    def metric(self) -> Metric:
        return find_metric(self.rule.metric)

    @property
    def verdict(self) -> Verdict:
        return "waived" if self.waivers else self.judged

    @property
    def rule_text(self) -> str:
        """Such as ``<= 0.1``, ``<= 3 x floor = 0.0012`` or ``>= 1 - 3 x (1 - floor) = 0.997``."""
        rule = self.rule
        if rule.floor_factor is None:
            return f"{rule.operator} {rule.limit:.10g}"
        times = f"{rule.floor_factor:g} x floor" if rule.upper else f"1 - {rule.floor_factor:g} x (1 - floor)"
        return f"{rule.operator} {times}" + ("" if self.limit is None else f" = {self.limit:.6g}")

    def as_dict(self) -> dict[str, Any]:
        """A row of the report's ``gates``; infinities and NaN as None."""
        measured = self.measurement or Measurement.exact(math.nan)
        return {
            "name": self.rule.metric,
            "rule": self.rule_text,
            "value": _finite(measured.value),
            "interval_95": [_finite(measured.low), _finite(measured.high)],
            "verdict": self.verdict,
            "tokens_to_settle": self.tokens_to_settle,
            "origin": self.rule.origin,
            "waiver": _waiver_facts(self.waivers),
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _waiver_facts(waivers: Sequence[Waiver]) -> dict[str, str] | None:
    """One entry for all: the earliest date is when the gate will fail again."""
    if not waivers:
        return None
    return {
        "reason": "; ".join(waiver.reason for waiver in waivers),
        "expires": min(waiver.expires for waiver in waivers).isoformat(),
        "approved_by": ", ".join(dict.fromkeys(waiver.approved_by for waiver in waivers)),
    }


def overall(results: Iterable[GateResult]) -> OverallVerdict:
    """The worst verdict: one failure fails, one undecided gate leaves the whole undecided; waived counts as passed."""
    verdicts = {result.verdict for result in results}
    if not verdicts:
        return "not gated"
    return "fail" if "fail" in verdicts else "inconclusive" if "inconclusive" in verdicts else "pass"
