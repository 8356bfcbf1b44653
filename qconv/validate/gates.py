"""Gates: a measured value against a limit, with three outcomes.

A gate compares the whole 95% interval, not the point estimate: a limit inside the interval cannot
be decided from the tokens that were evaluated, and says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["pass", "fail", "inconclusive"]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One limit and how the measurement meets it.

    Attributes:
        name: what is gated, e.g. ``"kl_mean"``.
        limit: the limit the user set.
        upper: True when the value must not exceed the limit, False when it must reach it.
        value: the point estimate.
        low, high: its 95% interval.
    """

    name: str
    limit: float
    upper: bool
    value: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        good_end, bad_end = (self.low, self.high) if self.upper else (self.high, self.low)
        if self._meets(bad_end):
            return "pass"
        return "inconclusive" if self._meets(good_end) else "fail"

    def _meets(self, value: float) -> bool:
        # Written so that NaN meets nothing.
        return value <= self.limit if self.upper else value >= self.limit

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "rule": f"{'<=' if self.upper else '>='} {self.limit:g}",
            "value": self.value,
            "interval_95": [self.low, self.high],
            "verdict": self.verdict,
        }


def overall(gates: list[Gate]) -> Verdict:
    """The worst verdict: one failure fails, one undecided gate leaves the whole undecided."""
    verdicts = {gate.verdict for gate in gates}
    if "fail" in verdicts:
        return "fail"
    return "inconclusive" if "inconclusive" in verdicts else "pass"
