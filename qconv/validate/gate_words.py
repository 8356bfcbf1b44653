"""Gate results in sentences for people: what was measured, against which limit, and what to do. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qconv.gate_metrics import Unit
from qconv.gate_rules import Waiver
from qconv.validate.gate_results import GateResult, Measurement, overall

_MAX_DIGITS = 12


def reasons(results: Sequence[GateResult]) -> list[str]:
    """Why the verdict is what it is: a sentence for each gate that did not pass, failures first; one if none failed."""
    rank = {"fail": 0, "inconclusive": 1, "waived": 2}
    others = sorted((result for result in results if result.verdict != "pass"), key=lambda r: rank[r.verdict])
    sentences = [_sentence(result) for result in others]
    if overall(results) in ("pass", "not gated"):
        sentences.insert(0, _summary(len(results), len(others)))
    return sentences


def _summary(num_gates: int, num_waived: int) -> str:
    if num_gates == 0:
        return "no gate was set: nothing was judged"
    passed = num_gates - num_waived
    if num_waived == 0:
        return "the gate passes" if num_gates == 1 else f"all {num_gates} gates pass"
    return f"{passed} of {num_gates} gates pass and {num_waived} {'is' if num_waived == 1 else 'are'} waived"


def _sentence(result: GateResult) -> str:
    """One gate that does not pass."""
    words = _outcome(result)
    if result.waivers:
        return f"{words}, {'; '.join(_waived(waiver) for waiver in result.waivers)}"
    expired = "; ".join(f"waiver expired on {waiver.expires}: {waiver.reason}" for waiver in result.expired)
    return f"{words} ({expired})" if expired else words


def _waived(waiver: Waiver) -> str:
    return f"waived until {waiver.expires} by {waiver.approved_by}: {waiver.reason}"


def _outcome(result: GateResult) -> str:
    metric, measured = result.metric, result.measurement
    if result.problem or measured is None or result.limit is None:
        return f"{metric.label} ({result.rule_text}) {result.problem}"
    value, low, high, limit = _numbers(measured, result.limit, metric.unit)
    if result.rule.floor_factor is not None:
        factor = f"{result.rule.floor_factor:g} x floor"
        least = "" if result.least_floor is None else f", with a floor that counts as {result.least_floor:g}"
        limit += f" ({factor}{least})"
    if metric.unit == "count":
        one = measured.value == 1
        label = metric.label.removesuffix("s") if one else metric.label
        return f"{value} {label} {'exceeds' if one else 'exceed'} the limit {limit}"
    unit = f" {metric.unit}" if metric.unit in ("nats", "dB") else ""
    interval = "" if measured.low == measured.value == measured.high else f" (95% interval {low} to {high})"
    start = f"{metric.label} {value}{unit}{interval}"
    if result.judged == "inconclusive":
        return f"{start} is undecided against the limit {limit}: {_advice(result, measured)}"
    return f"{start} {'exceeds' if result.rule.upper else 'is below'} the limit {limit}"


def _advice(result: GateResult, measured: Measurement) -> str:
    if result.tokens_to_settle is not None:
        tokens = result.tokens_to_settle
        digits = len(str(tokens)) - 2
        return f"evaluate about {round(tokens, -digits):,} tokens (--eval-tokens {tokens})"
    if measured.tokens is None:
        return result.metric.more
    if not (math.isfinite(measured.low) and math.isfinite(measured.high)):
        return f"the interval is unbounded: {result.metric.more}, at least a few rows"
    return "the value lies on the limit, where more tokens do not help: choose another limit"


def _numbers(measured: Measurement, limit: float, unit: Unit) -> tuple[str, str, str, str]:
    """(value, low, high, limit) with as few digits as tell the value from the limit and the interval's ends apart."""
    values = (measured.value, measured.low, measured.high, limit)
    texts: list[str] = []
    for digits in range(1 if unit == "share" else 3, _MAX_DIGITS):
        texts = [_number(value, unit, digits) for value in values]
        # 99.97% is not rounded to 100%: whether it is exactly 100% may be what is gated.
        rounded_to_bound = any(
            text in ("0%", "-0%", "100%") and value not in (0, 1) for text, value in zip(texts, values, strict=True)
        )
        if len(set(texts)) == len(set(values)) and not rounded_to_bound:
            break
    value, low, high, limit_text = texts
    return value, low, high, limit_text


def _number(value: float, unit: Unit, digits: int) -> str:
    if math.isinf(value):
        return "infinity" if value > 0 else "-infinity"
    if unit != "share":
        return f"{value:.{digits}g}"
    whole, point, decimals = f"{value:.{digits}%}".removesuffix("%").partition(".")
    return f"{whole}{point}{decimals}".rstrip("0").rstrip(".") + "%" if point else f"{whole}%"
