"""One gate rule: a metric and its limit, absolute or relative to the noise floor. Imports no torch.

The noise floor is what the reference measures against itself, computed in another order. ``merge.kl_mean<=5x floor``
allows five times that. A metric where larger is better counts from perfect agreement: ``top1_agreement >= 5x floor``
allows five times the floor's disagreement, so its limit is 1 - 5 x (1 - floor).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from qconv.errors import UsageError
from qconv.gate_metrics import Metric, find_metric

Origin = Literal["default", "flag", "file"]

_NUMBER = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_LIMIT = re.compile(rf"(?P<number>{_NUMBER})\s*(?P<kind>%|[xX×*]\s*floor)?")
_RULE = re.compile(r"\s*(?P<metric>[^\s<>=]+)\s*(?P<operator><=|>=)\s*(?P<limit>[^<>=]*?)\s*")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What one metric must meet; checked when built.

    Attributes:
        metric: a name that `find_metric` knows.
        upper: True = the value must not exceed the limit, False = it must reach it; the metric decides which.
        limit: absolute limit in the metric's unit (shares as fractions), or None.
        floor_factor: limit as a multiple of the noise floor, or None. Exactly one of the two is set.
        origin: where the rule comes from.
    """

    metric: str
    upper: bool
    limit: float | None = None
    floor_factor: float | None = None
    origin: Origin = "default"

    def __post_init__(self) -> None:
        metric = find_metric(self.metric)
        if self.upper == metric.larger_is_better:
            better, key = ("larger", "min") if metric.larger_is_better else ("smaller", "max")
            raise UsageError(
                f"{metric.name} is better the {better} it is: write {metric.name}{metric.operator}LIMIT "
                f"({key}: LIMIT in a file)"
            )
        if (self.limit is None) == (self.floor_factor is None):
            raise UsageError(f"{metric.name} takes one limit: a number, or a multiple of the floor")
        if self.limit is not None:
            _check_limit(metric, self.limit)
        if self.floor_factor is not None:
            _check_factor(metric, self.floor_factor)

    @property
    def operator(self) -> str:
        return "<=" if self.upper else ">="

    def __str__(self) -> str:
        """As `parse_rule` reads it."""
        limit = f"{self.limit!r}" if self.floor_factor is None else f"{self.floor_factor!r}x floor"
        return f"{self.metric} {self.operator} {limit}"


def _check_limit(metric: Metric, limit: float) -> None:
    if not math.isfinite(limit):
        raise UsageError(f"the limit of {metric.name} must be a finite number, got {limit}")
    if metric.lowest <= limit <= metric.highest and not (metric.unit == "ratio" and limit == 0):
        return
    if metric.unit == "ratio":
        bounds = "is positive (1 = like the reference)"
    elif limit < metric.lowest:
        bounds = f"is never below {metric.lowest:g}"
    else:
        bounds = f"is at most {metric.highest:g}{f' = 100%; {limit:g}% is written with its %' if limit <= 100 else ''}"
    raise UsageError(f"{metric.name} {bounds}: the limit cannot be {limit:g}")


def _check_factor(metric: Metric, factor: float) -> None:
    if metric.noise_power is None:
        raise UsageError(f"{metric.name} has no noise floor to be relative to: give a number as its limit")
    if not (math.isfinite(factor) and factor >= 1):
        raise UsageError(
            f"a limit of {factor:g} x floor for {metric.name}: the factor must be at least 1 and finite, for nothing "
            "can be asked to be closer to the reference than the reference is to itself"
        )


def parse_rule(text: str, origin: Origin = "flag") -> Rule:
    """A rule such as ``kl_mean<=0.1``, ``top1_agreement >= 90%`` or ``merge.kl_mean <= 5x floor``.

    Raises:
        UsageError: not a rule; quotes the text, names the nearest metrics, says what was expected.
    """
    match = _RULE.fullmatch(text)
    try:
        if match is None:
            raise UsageError(
                "expected METRIC<=LIMIT or METRIC>=LIMIT, in quotes (an unquoted < or > is the shell's), "
                "with a limit such as 0.1, 90% or '5x floor'"
            )
        metric = find_metric(match["metric"])
        return rule_from_text(metric, match["operator"] == "<=", match["limit"], origin)
    except UsageError as error:
        raise UsageError(f"gate {text!r}: {error}") from None


def rule_from_text(metric: Metric, upper: bool, limit: str, origin: Origin) -> Rule:
    """A rule whose limit is still text."""
    match = _LIMIT.fullmatch(limit.strip())
    if match is None:
        raise UsageError(f"expected a limit such as 0.1, 90% or '5x floor', got {limit!r}")
    number, kind = match["number"], match["kind"]
    if kind is None:
        return Rule(metric=metric.name, upper=upper, limit=float(number), origin=origin)
    if kind == "%":
        if metric.unit not in ("share", "ratio"):
            raise UsageError(f"{metric.name} is measured in {metric.unit}, not in percent")
        # In decimal: 99.9 / 100 in floating point is not 0.999.
        return Rule(metric=metric.name, upper=upper, limit=float(Decimal(number).scaleb(-2)), origin=origin)
    return Rule(metric=metric.name, upper=upper, floor_factor=float(number), origin=origin)
