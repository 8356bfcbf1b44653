"""Gates: measurements against rules, with four outcomes.

A gate compares the whole 95% interval with its limit, not the point estimate: a limit inside the interval cannot be
decided from what was evaluated, and says how much more would decide it. Whatever is missing fails: a metric that was
not measured, a value that is not a number, a relative limit without a measured noise floor or with a floor so large
that the limit would admit anything.

A waiver turns a gate that fails or is inconclusive into ``"waived"`` until it expires. It does not cover a value that
is not a number: nobody approved that. Imports no torch.

Left out: a correction for judging several gates at once (each interval is a 95% one of its own), and the uncertainty
of the noise floor itself (a relative limit takes the floor's value as exact).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from typing import Literal

from qconv.gate_rules import FINDING_PREFIX, Metric, Rule, Waiver, find_metric
from qconv.validate.gate_results import GateResult, Measurement, OverallVerdict, Verdict, overall
from qconv.validate.gate_words import reasons

__all__ = [
    "GateResult",
    "Measurement",
    "OverallVerdict",
    "Verdict",
    "count_findings",
    "judge",
    "overall",
    "reasons",
]

# ((1.96 + 0.84) / 1.96)^2: with just the tokens that shrink the interval to the gap between value and limit, the next
# value would scatter across that edge half of the time. This makes it four times out of five (80% power).
_POWER = ((1.959964 + 0.841621) / 1.959964) ** 2


def count_findings(codes: Iterable[str]) -> dict[str, Measurement]:
    """Measurements of the audit's error findings: ``findings`` and, for waivers, ``finding:<code>`` for each code.

    Args:
        codes: the code of every finding of severity error, repeated as often as it was found.
    """
    counts = Counter(codes)
    by_code = {FINDING_PREFIX + code: Measurement.exact(count) for code, count in counts.items()}
    return {"findings": Measurement.exact(counts.total()), **by_code}


def judge(
    rules: Iterable[Rule],
    measurements: Mapping[str, Measurement],
    *,
    floor: Mapping[str, Measurement] | None,
    precision: float,
    waivers: Iterable[Waiver],
    today: date,
) -> list[GateResult]:
    """Every rule against what was measured, in the order of the rules.

    Args:
        measurements: by metric name; findings as `count_findings` gives them.
        floor: the reference against itself, by the same names; ``merge.kl_mean`` is looked up as ``kl_mean`` where
            it does not stand there itself. None = not measured.
        precision: epsilon of the dtype that the reference computes in; a floor below what that can tell apart counts
            as that (`Metric.least_floor`).
        waivers: applied through the end of the day on which they expire.
        today: the day of judgement.
    """
    waivers = tuple(waivers)
    return [_judge(rule, measurements, floor or {}, precision, waivers, today) for rule in rules]


def _judge(
    rule: Rule,
    measurements: Mapping[str, Measurement],
    floor: Mapping[str, Measurement],
    precision: float,
    waivers: Sequence[Waiver],
    today: date,
) -> GateResult:
    metric = find_metric(rule.metric)
    measured = measurements.get(rule.metric)
    limit, least_floor, problem = _limit(rule, metric, floor, precision)
    if measured is None:
        problem = f"was not measured, which counts as a failure: {metric.needs}, or drop the gate"
    elif not measured.is_number:
        problem = "is not a number, which counts as a failure and cannot be waived"
    judged: Literal["pass", "fail", "inconclusive"] = "fail"
    tokens = None
    if measured is not None and limit is not None and not problem:
        judged = _compare(measured, limit, rule.upper)
        tokens = _tokens_to_settle(measured, limit) if judged == "inconclusive" else None
    live: tuple[Waiver, ...] = ()
    expired: tuple[Waiver, ...] = ()
    if judged != "pass" and (measured is None or measured.is_number):
        live, expired = _waivers_for(rule, measurements, waivers, today)
    return GateResult(
        rule=rule,
        limit=limit,
        least_floor=least_floor,
        measurement=measured,
        judged=judged,
        problem=problem,
        tokens_to_settle=tokens,
        waivers=live,
        expired=expired,
    )


def _limit(
    rule: Rule, metric: Metric, floor: Mapping[str, Measurement], precision: float
) -> tuple[float | None, float | None, str]:
    """(limit, the least floor where it stood in for a smaller one, why there is no usable limit)."""
    least = metric.least_floor(precision)
    if rule.floor_factor is None or least is None:
        return rule.limit, None, ""
    own = floor.get(rule.metric) or floor.get(rule.metric.rpartition(".")[2])
    if own is None or not math.isfinite(own.value):
        was = "was not measured" if own is None else "is not a finite number"
        return None, None, f"cannot be judged, which counts as a failure: the noise floor {was}"
    distance = own.value if rule.upper else 1 - own.value
    used = least if distance < least else None
    allowed = rule.floor_factor * max(distance, least)
    limit = allowed if rule.upper else 1 - allowed
    if limit >= metric.highest if rule.upper else limit <= metric.lowest:
        why = f"the noise floor is so large ({own.value:g}) that {rule.floor_factor:g} x floor would admit anything"
        return limit, used, f"cannot be judged, which counts as a failure: {why}"
    return limit, used, ""


def _compare(measured: Measurement, limit: float, upper: bool) -> Literal["pass", "fail", "inconclusive"]:
    # The value itself counts as part of its interval: a bootstrap can leave it just outside.
    points = (measured.low, measured.value, measured.high)
    bad, good = (max(points), min(points)) if upper else (min(points), max(points))

    def meets(value: float) -> bool:
        return value <= limit if upper else value >= limit

    return "pass" if meets(bad) else "inconclusive" if meets(good) else "fail"


def _tokens_to_settle(measured: Measurement, limit: float) -> int | None:
    """Tokens at which the limit would lie outside the interval in four runs out of five, if the value stays.

    The half of the interval that faces the limit shrinks like 1/sqrt(tokens): tokens x (half / gap)^2, times `_POWER`.
    """
    gap = abs(measured.value - limit)
    half = measured.high - measured.value if limit > measured.value else measured.value - measured.low
    if measured.tokens is None or gap == 0 or not math.isfinite(half):
        return None
    growth = max(half / gap, 1.0)
    if growth > 1e6:  # not a number of tokens that anyone has
        return None
    return _readable(measured.tokens * growth**2 * _POWER)


def _readable(tokens: float) -> int:
    """The next 2^k or 3 x 2^k that is at least 1024: whole rows at every usual length."""
    power = 1024
    while power < tokens:
        if power * 3 // 2 >= tokens:
            return power * 3 // 2
        power *= 2
    return power


def _waivers_for(
    rule: Rule, measurements: Mapping[str, Measurement], waivers: Sequence[Waiver], today: date
) -> tuple[tuple[Waiver, ...], tuple[Waiver, ...]]:
    """(those that excuse this gate today, those that no longer do)."""
    if rule.metric == "findings":
        return _finding_waivers(rule, measurements, waivers, today)
    mine = [waiver for waiver in waivers if waiver.gate == rule.metric]
    live = tuple(waiver for waiver in mine if waiver.applies(today))
    return live[:1], () if live else tuple(mine)


def _finding_waivers(
    rule: Rule, measurements: Mapping[str, Measurement], waivers: Sequence[Waiver], today: date
) -> tuple[tuple[Waiver, ...], tuple[Waiver, ...]]:
    """Findings are excused where the ones that no live waiver names would pass."""
    if "findings" not in measurements:
        return (), ()
    mine = [waiver for waiver in waivers if waiver.gate.startswith(FINDING_PREFIX) and waiver.gate in measurements]
    live = {waiver.gate: waiver for waiver in mine if waiver.applies(today)}
    left = measurements["findings"].value - sum(measurements[gate].value for gate in live)
    expired = tuple(waiver for waiver in mine if waiver.gate not in live)
    return (tuple(live.values()) if rule.limit is not None and left <= rule.limit else ()), expired
