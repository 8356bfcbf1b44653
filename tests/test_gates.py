"""Gates: intervals against limits, noise floors, waivers, how many tokens settle a gate, and the words for it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from datetime import date, timedelta

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qconv.gate_rules import METRICS, TASK_PATTERN, Rule, Waiver, parse_rule
from qconv.validate.gates import Measurement, count_findings, judge, overall, reasons

TODAY = date(2026, 6, 1)
NAN, INF = float("nan"), float("inf")
FLOAT32, FLOAT16, BFLOAT16 = 2.0**-23, 2.0**-10, 2.0**-7
RANK = {"fail": 0, "inconclusive": 1, "pass": 2}


def one(rule, measured, *, floor=None, precision=FLOAT32, waivers=(), today=TODAY):
    """The result of a single rule; ``measured`` is a Measurement, or measurements by name."""
    rule = parse_rule(rule) if isinstance(rule, str) else rule
    if isinstance(measured, Measurement):
        measured = {rule.metric: measured}
    (result,) = judge([rule], measured, floor=floor, precision=precision, waivers=waivers, today=today)
    return result


def waive(gate, expires=TODAY, reason="known", approved_by="J. Doe"):
    return Waiver(gate=gate, reason=reason, expires=expires, approved_by=approved_by)


@pytest.mark.parametrize(
    ("upper", "low", "high", "verdict"),
    [
        (True, 0.1, 0.4, "pass"),
        (True, 0.1, 0.5, "pass"),
        (True, 0.4, 0.6, "inconclusive"),
        (True, 0.5, 0.6, "inconclusive"),
        (True, 0.6, 0.9, "fail"),
        (False, 0.6, 0.9, "pass"),
        (False, 0.5, 0.9, "pass"),
        (False, 0.4, 0.6, "inconclusive"),
        (False, 0.1, 0.4, "fail"),
        (True, -INF, INF, "inconclusive"),
        (True, INF, INF, "fail"),
        (False, INF, INF, "pass"),
        (True, NAN, NAN, "fail"),
        (False, 0.6, NAN, "fail"),
        (True, NAN, 0.1, "fail"),
    ],
)
def test_a_gate_compares_the_interval(upper, low, high, verdict):
    rule = Rule(metric="kl_mean" if upper else "block_sqnr_db_min", upper=upper, limit=0.5)
    middle = 0.5 if low == -INF else (low + high) / 2
    result = one(rule, Measurement(middle, low, high, 1000))
    assert result.verdict == verdict
    assert overall([result]) == verdict


@pytest.mark.parametrize("value", [NAN, 0.6])
def test_a_value_outside_its_interval_counts(value):
    """A bootstrap interval can miss the point estimate; it must not pass on the interval alone."""
    assert one("kl_mean<=0.5", Measurement(value, 0.1, 0.4)).verdict != "pass"
    assert one("top1_agreement>=0.7", Measurement(value, 0.8, 0.9)).verdict != "pass"


def test_a_value_that_is_not_a_number_cannot_be_waived():
    measured = Measurement(NAN, 0.1, 0.2)
    result = one("kl_mean<=0.5", measured, waivers=[waive("kl_mean")])
    assert result.verdict == "fail"
    assert "not a number" in reasons([result])[0]
    assert result.as_dict()["value"] is None


@pytest.mark.parametrize("name", [name for name in METRICS if name != TASK_PATTERN] + ["task.arc.acc_drop"])
def test_what_was_not_measured_fails(name):
    other = "kl_mean" if name != "kl_mean" else "kl_p99"
    larger = (METRICS[TASK_PATTERN] if name.startswith("task.") else METRICS[name]).larger_is_better
    result = one(Rule(metric=name, upper=not larger, limit=0.5), {other: Measurement.exact(0.5)})
    assert result.verdict == "fail"
    (words,) = reasons([result])
    assert "was not measured, which counts as a failure" in words
    assert result.metric.needs in words
    row = result.as_dict()
    assert (row["value"], row["interval_95"], row["tokens_to_settle"]) == (None, [None, None], None)


finite = st.floats(-10, 10)


@st.composite
def measurements(draw):
    low, value, high = sorted(draw(st.tuples(finite, finite, finite)))
    return Measurement(value, low, high, draw(st.integers(1, 10**6)))


def rank(limit, measured, upper):
    rule = Rule(metric="log_perplexity_ratio" if upper else "block_sqnr_db_min", upper=upper, limit=limit)
    return RANK[one(rule, measured).verdict]


@settings(deadline=None)
@given(measured=measurements(), limit=finite, looser=st.floats(0, 20), upper=st.booleans())
def test_a_looser_limit_never_judges_worse(measured, limit, looser, upper):
    relaxed = limit + looser if upper else limit - looser
    assert rank(relaxed, measured, upper) >= rank(limit, measured, upper)


@settings(deadline=None)
@given(measured=measurements(), limit=finite, down=st.floats(0, 9), up=st.floats(0, 9), upper=st.booleans())
def test_a_wider_interval_never_decides_more(measured, limit, down, up, upper):
    wider = replace(measured, low=measured.low - down, high=measured.high + up)
    before, after = rank(limit, measured, upper), rank(limit, wider, upper)
    assert after in (before, RANK["inconclusive"])


@settings(deadline=None)
@given(measured=measurements(), limit=finite)
def test_both_directions_mirror_each_other(measured, limit):
    mirrored = Measurement(-measured.value, -measured.high, -measured.low, measured.tokens)
    assert rank(limit, measured, True) == rank(-limit, mirrored, False)


@pytest.mark.parametrize(
    ("rule", "own", "limit", "text"),
    [
        ("kl_mean<=3x floor", 4e-4, 1.2e-3, "<= 3 x floor = 0.0012"),
        ("merge.kl_mean<=5x floor", 4e-4, 2e-3, "<= 5 x floor = 0.002"),
        ("kl_mean<=3x floor", 0.0, 3e-6, "<= 3 x floor = 3e-06"),
        ("flips<=2x floor", 0.0, 2e-4, "<= 2 x floor = 0.0002"),
        ("top1_agreement>=3x floor", 0.99, 0.97, ">= 1 - 3 x (1 - floor) = 0.97"),
        ("top1_agreement>=3x floor", 1.0, 0.9997, ">= 1 - 3 x (1 - floor) = 0.9997"),
    ],
)
def test_limits_relative_to_the_noise_floor(rule, own, limit, text):
    rule = parse_rule(rule)
    bare = rule.metric.removeprefix("merge.")
    for offset, verdict in ((-1e-9, "pass"), (1e-9, "fail")):
        value = limit + offset if rule.upper else limit - offset
        result = one(rule, Measurement.exact(value), floor={bare: Measurement.exact(own)})
        assert result.verdict == verdict
        assert result.limit == pytest.approx(limit, rel=1e-12)
        assert result.as_dict()["rule"] == text


@pytest.mark.parametrize(
    ("rule", "precision", "own", "limit"),
    [
        ("merge.kl_mean<=5x floor", FLOAT32, 0.0, 5e-6),  # what log-probabilities are rounded by is coarser
        ("merge.kl_mean<=5x floor", FLOAT16, 0.0, 5e-6),
        ("merge.kl_mean<=5x floor", BFLOAT16, 0.0, 5 * 2.0**-14),
        ("merge.kl_mean<=5x floor", BFLOAT16, 1e-5, 5 * 2.0**-14),
        ("merge.kl_mean<=5x floor", BFLOAT16, 1e-3, 5e-3),
        ("flips<=2x floor", FLOAT16, 0.0, 2 * 2.0**-10),
        ("top1_agreement>=3x floor", BFLOAT16, 1.0, 1 - 3 * 2.0**-7),
    ],
)
def test_a_floor_counts_as_the_resolution_of_the_dtype_at_least(rule, precision, own, limit):
    rule = parse_rule(rule)
    floor = {rule.metric.removeprefix("merge."): Measurement.exact(own)}
    for factor, verdict in ((1 - 1e-9, "pass"), (1 + 1e-9, "fail")):
        value = limit * factor if rule.upper else limit / factor
        result = one(rule, Measurement.exact(value), floor=floor, precision=precision)
        assert result.verdict == verdict
        assert result.limit == pytest.approx(limit, rel=1e-12)


def test_a_floor_of_the_metric_itself_comes_first():
    floor = {"kl_mean": Measurement.exact(1.0), "merge.kl_mean": Measurement.exact(1e-3)}
    assert one("merge.kl_mean<=2x floor", Measurement.exact(0.1), floor=floor).limit == pytest.approx(2e-3)


@pytest.mark.parametrize(
    ("floor", "words"),
    [
        (None, "noise floor was not measured"),
        ({"kl_p99": Measurement.exact(1e-3)}, "noise floor was not measured"),
        ({"kl_mean": Measurement.exact(NAN)}, "noise floor is not a finite number"),
        ({"kl_mean": Measurement.exact(INF)}, "noise floor is not a finite number"),
    ],
)
def test_a_relative_rule_without_a_floor_fails(floor, words):
    result = one("kl_mean<=5x floor", Measurement.exact(0.0), floor=floor)
    assert result.verdict == "fail"
    assert words in reasons([result])[0]
    assert result.as_dict()["rule"] == "<= 5 x floor"


@pytest.mark.parametrize(("rule", "own"), [("top1_agreement>=5x floor", 0.75), ("flips<=5x floor", 0.2)])
def test_a_floor_that_would_admit_anything_fails(rule, own):
    name = parse_rule(rule).metric
    perfect = Measurement.exact(1.0 if "top1" in name else 0.0)
    result = one(rule, perfect, floor={name: Measurement.exact(own)})
    assert result.verdict == "fail"
    assert "would admit anything" in reasons([result])[0]


@pytest.mark.parametrize("measured", [Measurement.exact(0.6), Measurement(0.5, 0.4, 0.6)], ids=["fail", "inconclusive"])
@pytest.mark.parametrize(("days", "verdict"), [(-1, None), (0, "waived"), (1, "waived")])
def test_a_waiver_applies_through_its_last_day(measured, days, verdict):
    expires = TODAY + timedelta(days=days)
    result = one("kl_mean<=0.5", measured, waivers=[waive("kl_mean", expires), waive("kl_p99")])
    assert result.verdict == (verdict or result.judged)
    assert result.judged in ("fail", "inconclusive")
    assert overall([result]) == ("pass" if verdict else result.judged)
    facts = {"reason": "known", "expires": expires.isoformat(), "approved_by": "J. Doe"}
    assert result.as_dict()["waiver"] == (facts if verdict else None)
    words = " ".join(reasons([result]))
    assert (f"waived until {expires} by J. Doe: known" in words) == bool(verdict)
    assert (f"waiver expired on {expires}: known" in words) == (not verdict)


def test_a_waiver_leaves_a_passing_gate_alone():
    result = one("kl_mean<=0.5", Measurement.exact(0.1), waivers=[waive("kl_mean"), waive("kl_mean", date(2020, 1, 1))])
    assert result.verdict == "pass"
    assert result.as_dict()["waiver"] is None
    assert reasons([result]) == ["the gate passes"]


def test_a_waiver_is_for_one_metric():
    waivers = [waive("kl_p99"), waive("merge.kl_mean"), waive("finding:kl-mean")]
    assert one("kl_mean<=0.5", Measurement.exact(0.6), waivers=waivers).verdict == "fail"


def test_what_was_not_measured_can_be_waived():
    assert one("task.arc.acc_drop<=1%", {}, waivers=[waive("task.arc.acc_drop")]).verdict == "waived"


@pytest.mark.parametrize(
    ("codes", "waivers", "rule", "verdict"),
    [
        ([], [], "findings<=0", "pass"),
        (["a"], [], "findings<=0", "fail"),
        (["a"], [waive("finding:a")], "findings<=0", "waived"),
        (["a", "a"], [waive("finding:a")], "findings<=0", "waived"),
        (["a", "b"], [waive("finding:a")], "findings<=0", "fail"),
        (["a", "b"], [waive("finding:a"), waive("finding:b")], "findings<=0", "waived"),
        (["a", "b"], [waive("finding:a")], "findings<=1", "waived"),
        (["a"], [waive("finding:a", date(2026, 5, 31))], "findings<=0", "fail"),
        (["a"], [waive("finding:b")], "findings<=0", "fail"),
        (["a"], [waive("kl_mean")], "findings<=0", "fail"),
        (["a", "b"], [], "findings<=2", "pass"),
    ],
)
def test_findings_are_waived_by_code(codes, waivers, rule, verdict):
    measured = {"kl_mean": Measurement.exact(5.0), **count_findings(codes)}
    assert one(rule, measured, waivers=waivers).verdict == verdict


def test_several_finding_waivers_are_told_as_one():
    waivers = [waive("finding:a", date(2026, 9, 1), "first"), waive("finding:b", date(2026, 8, 1), "second", "M. Roe")]
    result = one("findings<=0", count_findings(["a", "b"]), waivers=waivers)
    facts = {"reason": "first; second", "expires": "2026-08-01", "approved_by": "J. Doe, M. Roe"}
    assert result.as_dict()["waiver"] == facts


def test_the_worst_verdict_wins():
    fail = one("kl_mean<=0.5", Measurement.exact(0.6))
    unclear = one("kl_mean<=0.5", Measurement(0.5, 0.4, 0.6))
    waived = one("kl_mean<=0.5", Measurement.exact(0.6), waivers=[waive("kl_mean")])
    good = one("kl_mean<=0.5", Measurement.exact(0.4))
    assert overall([]) == "not gated"
    assert overall([good]) == overall([waived]) == overall([good, waived]) == "pass"
    assert overall([good, waived, unclear]) == "inconclusive"
    assert overall([unclear, good, fail, waived]) == "fail"
    assert [words.split()[0] for words in reasons([good, waived])] == ["1", "KL"]
    assert "exceeds" in reasons([waived, unclear, fail])[0]
    assert "undecided" in reasons([waived, unclear, fail])[1]
    assert len(reasons([waived, unclear, fail])) == 3


@pytest.mark.parametrize(
    ("measured", "tokens"),
    [
        # half/gap = 2: 4 x 2.043 x 16384 = 133,902.
        (Measurement(0.09, 0.07, 0.11, 16384), 196608),
        # Only the half that faces the limit counts.
        (Measurement(0.09, 0.0, 0.11, 16384), 196608),
        (Measurement(0.11, 0.09, 0.9, 16384), 196608),
        (Measurement(0.1, 0.09, 0.11, 16384), None),
        (Measurement(0.09, -INF, INF, 16384), None),
        (Measurement(0.09, 0.07, 0.11, None), None),
        (Measurement(0.1 - 1e-12, 0.07, 0.11, 16384), None),
        (Measurement(0.05, 0.0, 0.1, 16384), None),  # passes: the limit is not inside
    ],
)
def test_tokens_to_settle(measured, tokens):
    assert one("kl_mean<=0.1", measured).tokens_to_settle == tokens


@settings(deadline=None)
@given(measured=measurements(), limit=finite)
def test_tokens_to_settle_are_more_and_round(measured, limit):
    assume(measured.tokens >= 1024)
    result = one(Rule(metric="log_perplexity_ratio", upper=True, limit=limit), measured)
    if result.tokens_to_settle is None:
        return
    assert result.verdict == "inconclusive"
    tokens = result.tokens_to_settle
    gap = abs(measured.value - limit)
    half = measured.high - measured.value if limit > measured.value else measured.value - measured.low
    needed = measured.tokens * 2.0432 * (half / gap) ** 2
    assert needed * 0.9999 <= tokens <= max(needed * 1.5001, 1024)
    assert bin(tokens).count("1") <= 2
    assert tokens % 512 == 0


def sampled(rng, tokens, mean):
    """Mean of exponentials and its normal interval: KL per token is about as skewed."""
    values = rng.exponential(mean, tokens)
    half = 1.96 * values.std(ddof=1) / math.sqrt(tokens)
    return Measurement(values.mean(), values.mean() - half, values.mean() + half, tokens)


@pytest.mark.parametrize("mean", [0.093, 0.107])
def test_the_predicted_tokens_settle_the_gate_in_most_runs(mean):
    """From a first run whose value is right on the truth, and from first runs as they come."""
    rng = np.random.default_rng(0)
    rule = parse_rule("kl_mean<=0.1")
    half = 1.96 * mean / math.sqrt(512)
    typical = one(rule, Measurement(mean, mean - half, mean + half, 512))
    assert typical.verdict == "inconclusive"
    assert typical.tokens_to_settle <= 512 * (half / 0.007) ** 2 * 2.05 * 1.5  # not by asking for the moon
    verdicts = [one(rule, sampled(rng, typical.tokens_to_settle, mean)).verdict for _ in range(200)]
    assert verdicts.count("inconclusive") <= 0.2 * 200
    assert verdicts.count("fail" if mean < 0.1 else "pass") <= 0.02 * 200  # settled the right way

    settled = []
    while len(settled) < 100:
        first = one(rule, sampled(rng, 512, mean))
        if first.verdict == "inconclusive" and (first.tokens_to_settle or 10**9) < 10**5:
            settled.append(one(rule, sampled(rng, first.tokens_to_settle, mean)).verdict != "inconclusive")
    assert sum(settled) >= 75


@pytest.mark.parametrize(
    ("rule", "measured", "words"),
    [
        (
            "kl_mean<=0.1",
            Measurement(0.31, 0.29, 0.33, 100),
            "KL mean 0.31 nats (95% interval 0.29 to 0.33) exceeds the limit 0.1",
        ),
        (
            "top1_agreement>=90%",
            Measurement(0.818, 0.801, 0.83),
            "top-1 agreement 81.8% (95% interval 80.1% to 83%) is below the limit 90%",
        ),
        (
            "kl_mean<=0.1",
            Measurement(0.092, 0.08, 0.104, 16384),
            "KL mean 0.092 nats (95% interval 0.08 to 0.104) is undecided against the limit 0.1: "
            "evaluate about 98,000 tokens (--eval-tokens 98304)",
        ),
        (
            "kl_mean<=0.1",
            Measurement(0.1, 0.09, 0.11, 16384),
            "KL mean 0.1 nats (95% interval 0.09 to 0.11) is undecided against the limit 0.1: "
            "the value lies on the limit, where more tokens do not help: choose another limit",
        ),
        ("kl_max<=1", Measurement.exact(1.00004), "KL maximum 1.00004 nats exceeds the limit 1"),
        ("kl_p99_9<=1", Measurement.exact(INF), "KL p99.9 infinity nats exceeds the limit 1"),
        ("block_sqnr_db_min>=20", Measurement.exact(12.34), "lowest block SQNR 12.3 dB is below the limit 20"),
        ("findings<=0", Measurement.exact(1), "1 error finding exceeds the limit 0"),
        ("findings<=0", Measurement.exact(2), "2 error findings exceed the limit 0"),
        (
            "top5_agreement>=100%",
            Measurement(0.99997, 0.9999, 0.999999),
            "top-5 agreement 99.997% (95% interval 99.99% to 99.9999%) is below the limit 100%",
        ),
        (
            "prompts_identical>=50%",
            Measurement(0.5, 0.3, 0.7),
            "share of identical answers 50% (95% interval 30% to 70%) is undecided against the limit 50%: "
            "compare more prompts",
        ),
        (
            "task.arc.acc_drop<=0%",
            Measurement(0.01, -0.01, 0.03),
            "acc drop on arc 1% (95% interval -1% to 3%) is undecided against the limit 0%: "
            "run more samples of the task",
        ),
    ],
)
def test_sentences(rule, measured, words):
    assert reasons([one(rule, measured)]) == [words]


def test_sentences_about_floors():
    measured = {"merge.kl_mean": Measurement.exact(0.01)}
    result = one("merge.kl_mean<=3x floor", measured, floor={"kl_mean": Measurement.exact(4e-4)})
    assert reasons([result]) == ["KL mean (merge alone) 0.01 nats exceeds the limit 0.0012 (3 x floor)"]
    result = one("merge.kl_mean<=3x floor", measured, floor={"kl_mean": Measurement.exact(0)})
    assert "3e-06 (3 x floor, with a floor that counts as 1e-06)" in reasons([result])[0]


def test_sentences_about_success():
    good = one("kl_mean<=0.5", Measurement.exact(0.4))
    assert reasons([]) == ["no gate was set: nothing was judged"]
    assert reasons([good, good]) == ["all 2 gates pass"]


@settings(deadline=None)
@given(measured=measurements(), limit=finite)
def test_a_row_of_the_report_is_json(measured, limit):
    result = one(Rule(metric="log_perplexity_ratio", upper=True, limit=limit), replace(measured, low=-INF))
    row = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    keys = {"name", "rule", "value", "interval_95", "verdict", "tokens_to_settle", "origin", "waiver"}
    assert set(row) == keys
    assert row["interval_95"] == [None, measured.high]
    assert (row["value"], row["origin"]) == (measured.value, "default")


def test_results_come_in_the_order_of_the_rules():
    rules = [parse_rule(text) for text in ("kl_p99<=1", "kl_mean<=1", "flips<=10%")]
    results = judge(rules, {}, floor=None, precision=FLOAT32, waivers=[], today=TODAY)
    assert [result.rule.metric for result in results] == ["kl_p99", "kl_mean", "flips"]
