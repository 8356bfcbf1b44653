"""What a report says, in the order in which it matters; every renderer takes its rows from here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qconv.report.values import at, bounds, count, items, number, number_at, one_line, percent, points, signed, span

Document = Mapping[str, Any]

VERDICT_WORDS = {
    "pass": "PASS",
    "fail": "FAIL",
    "inconclusive": "INCONCLUSIVE",
    "not gated": "NOT GATED",
    "waived": "WAIVED",
}
SEVERITIES = ("error", "warning", "note")
_GATE_ORDER = ("fail", "inconclusive", "waived", "pass")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One distance in the three-way account of where the error comes from.

    Attributes:
        label: for people.
        meaning: which two models it compares.
        kl: mean KL in nats per token; low and high: 95% interval, or None.
        is_context: not part of the error: what the adapter changes, and what rounding alone does.
    """

    label: str
    meaning: str
    kl: float
    low: float | None
    high: float | None
    is_context: bool
    pair: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Statistic:
    label: str
    value: str
    interval: str
    meaning: str


_BUDGETS = (
    ("merge", "Merge", "merged in 16 bit, against the reference", False),
    ("requantization", "Requantization", "the stored candidate, against the 16-bit merge", False),
    ("total", "Total", "the stored candidate, against the reference", False),
    (
        "base_without_adapter",
        "Base without adapter",
        "the base alone, against the reference: what losing the adapter would cost",
        True,
    ),
    ("floor", "Floor", "the reference, against itself in another batch shape: rounding alone", True),
)


def budgets(document: Document) -> list[Budget]:
    """The measured distances, error first and context last."""
    found = []
    for key, label, meaning, is_context in _BUDGETS:
        pair = at(document, "fidelity", key)
        mean = number_at(pair, "kl", "mean")
        if mean is None:
            continue
        low, high = bounds(at(pair, "kl", "interval_95")) or (None, None)
        found.append(
            Budget(label=label, meaning=meaning, kl=mean, low=low, high=high, is_context=is_context, pair=pair)
        )
    return found


def verdict(document: Document) -> str:
    return str(document.get("verdict") or "not gated")


def verdict_word(name: Any) -> str:
    return VERDICT_WORDS.get(str(name), one_line(name).upper())


def findings(document: Document) -> list[Mapping[str, Any]]:
    """Findings, errors first, otherwise in the order of the document."""
    rank = {severity: place for place, severity in enumerate(SEVERITIES)}
    return sorted(items(document, "findings"), key=lambda finding: rank.get(finding.get("severity"), len(rank)))


def gates(document: Document) -> list[Mapping[str, Any]]:
    """Gates, those that stop a release first."""
    rank = {name: place for place, name in enumerate(_GATE_ORDER)}
    return sorted(items(document, "gates"), key=lambda gate: rank.get(gate.get("verdict"), len(rank)))


def gate_value(gate: Mapping[str, Any]) -> str:
    """Four digits in the units of the rule, so that the two can be compared by eye."""
    return plain_number(gate.get("value"))


def gate_interval(gate: Mapping[str, Any]) -> str:
    """Empty where it is unknown, or where the value is exact."""
    pair = bounds(gate.get("interval_95"))
    return "" if pair is None or pair[0] == pair[1] else f"{plain_number(pair[0])} to {plain_number(pair[1])}"


def plain_number(value: Any) -> str:
    """Up to four digits, without zeros at the end, as limits are written."""
    text = number(value, 4)
    if "." not in text:
        return text
    mantissa, mark, power = text.partition("e")
    return mantissa.rstrip("0").rstrip(".") + mark + power


def gate_note(gate: Mapping[str, Any]) -> str:
    """What to know beside the verdict: why it was waived, how much text would settle it."""
    notes = []
    waiver = gate.get("waiver")
    if waiver:
        who = f" by {one_line(waiver['approved_by'])}" if waiver.get("approved_by") else ""
        until = f" until {one_line(waiver['expires'])}" if waiver.get("expires") else ""
        notes.append(f"waived{who}{until}: {one_line(waiver.get('reason') or 'no reason given')}")
    if gate.get("tokens_to_settle"):
        notes.append(f"about {count(gate['tokens_to_settle'])} tokens would settle it")
    return "; ".join(notes)


def waiver_of(document: Document, finding: Mapping[str, Any]) -> str:
    """Why an error does not stop the release, or nothing.

    Either its own code is waived (gate ``finding:<code>``), or the gate on the number of errors is waived or passes
    although there are some.
    """
    if finding.get("severity") != "error":
        return ""
    for gate in items(document, "gates"):
        if gate.get("name") not in ("findings", f"finding:{finding.get('code')}"):
            continue
        if gate.get("verdict") == "waived":
            return gate_note(gate) or "waived"
        if gate.get("verdict") == "pass":
            return f"accepted: the gate {one_line(gate.get('name'))} {one_line(gate.get('rule'))} passes"
    return ""


def task_values(task: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Reference, candidate, difference and its interval: shares where the metric is one, otherwise numbers."""
    unit = task_unit(task)
    write, change = (percent, points) if unit == "points" else (number, signed)
    interval = span(task.get("interval_95"), unit)
    return write(task.get("reference")), write(task.get("candidate")), change(task.get("difference")), interval or "–"


def task_unit(task: Mapping[str, Any]) -> str:
    """``points`` for accuracies and the like, ``number`` for perplexities and other losses."""
    sides = [number_at(task, key) for key in ("reference", "candidate")]
    is_share = all(side is None or 0 <= side <= 1 for side in sides) and task.get("higher_is_better") is not False
    return "points" if is_share else "number"


def evaluation_line(document: Document) -> str:
    """What was evaluated, in one sentence without its full stop."""
    evaluation = at(document, "fidelity", "evaluation")
    if not evaluation:
        return ""
    text = f"{count(evaluation.get('positions'))} positions"
    if number_at(evaluation, "documents") is not None:
        text += f" from {count(evaluation['documents'])} document" + "s" * (evaluation["documents"] != 1)
    if evaluation.get("source"):
        text += f" of {one_line(evaluation['source'])}"
    if number_at(evaluation, "rows") is not None and number_at(evaluation, "seq_len") is not None:
        text += f" ({count(evaluation['rows'])} rows of {count(evaluation['seq_len'])} tokens)"
    return text


def _flip_count(value: Any) -> str:
    return count(value) if isinstance(value, int) else percent(value)


def statistics(pair: Mapping[str, Any] | None) -> list[Statistic]:
    """Every statistic of a pair, with its interval where it has one."""
    if not pair:
        return []
    kl = "KL(reference || candidate), nats per token"
    rows = [
        Statistic(
            label="KL mean",
            value=number(at(pair, "kl", "mean")),
            interval=span(at(pair, "kl", "interval_95")),
            meaning=kl,
        )
    ]
    quantiles = (
        ("median", "median"),
        ("p90", "p90"),
        ("p95", "p95"),
        ("p99", "p99"),
        ("p99_9", "p99.9"),
        ("max", "max"),
    )
    rows += [
        Statistic(label=f"KL {label}", value=number(at(pair, "kl", key)), interval="", meaning=kl)
        for key, label in quantiles
    ]
    rows.append(
        Statistic(
            label="Reverse KL mean",
            value=number(at(pair, "reverse_kl", "mean")),
            interval=span(at(pair, "reverse_kl", "interval_95")),
            meaning="KL(candidate || reference), nats per token",
        )
    )
    flips = at(pair, "flips")
    shares = (
        ("Top-1 agreement", "top1_agreement", "positions where both prefer the same next token"),
        ("Top-5 agreement", "top5_agreement", "overlap of the five likeliest next tokens"),
        (
            "Flips",
            "flips",
            f"right or wrong about the actual next token: {_flip_count(at(flips, 'correct_to_wrong'))} right to wrong, "
            f"{_flip_count(at(flips, 'wrong_to_correct'))} wrong to right",
        ),
    )
    for label, key, meaning in shares:
        value, interval = percent(at(pair, key, "value")), span(at(pair, key, "interval_95"), "share")
        rows.append(Statistic(label=label, value=value, interval=interval, meaning=meaning))
    for label, key, write in (("mean", "mean", points), ("RMS", "rms", percent)):
        rows.append(
            Statistic(
                label=f"Probability difference, {label}",
                value=write(at(pair, "probability_difference", key)),
                interval="",
                meaning="of the actual next token, candidate minus reference",
            )
        )
    rows.append(
        Statistic(
            label="Perplexity",
            value=number(at(pair, "perplexity"), 4),
            interval="",
            meaning=f"reference {number(at(pair, 'reference_perplexity'), 4)}",
        )
    )
    rows.append(
        Statistic(
            label="Perplexity ratio",
            value=number(at(pair, "perplexity_ratio", "value"), 4),
            interval=span4(at(pair, "perplexity_ratio", "interval_95")),
            meaning="candidate over reference; 1 is no change",
        )
    )
    return rows


def span4(value: Any) -> str:
    """An interval of numbers close to 1, where the fourth digit counts."""
    pair = bounds(value)
    return "" if pair is None else f"{number(pair[0], 4)} to {number(pair[1], 4)}"


def worst_blocks(document: Document, num: int = 5) -> list[Mapping[str, Any]]:
    """Blocks with the largest relative error of the hidden states behind them."""
    measured = [b for b in items(document, "fidelity", "blocks") if number_at(b, "relative_error") is not None]
    return sorted(measured, key=lambda block: -block["relative_error"])[:num]


def top_units(document: Document, kind: str, num: int) -> list[Mapping[str, Any]]:
    """Units of an attribution (``blocks`` or ``linears``) with the largest KL of their own."""
    measured = [u for u in items(document, "fidelity", "attribution", kind) if number_at(u, "kl_mean") is not None]
    return sorted(measured, key=lambda unit: -unit["kl_mean"])[:num]


def attribution_line(attribution: Mapping[str, Any]) -> str:
    return (
        f"Each part alone put into the reference, over {count(attribution.get('positions'))} positions: the parts "
        f"add up to {number(attribution.get('sum_of_parts'))} nats, all together cost "
        f"{number(attribution.get('total_kl'))} (additivity {number(attribution.get('additivity'))})."
    )


def prompts_line(prompts: Mapping[str, Any]) -> str:
    interval = span(prompts.get("identical_interval_95"), "share")
    return (
        f"{count(prompts.get('identical'))} of {count(prompts.get('num_prompts'))} prompts continue identically over "
        f"{count(prompts.get('new_tokens'))} new tokens"
        + (f" (95% interval of the share: {interval})" if interval else "")
        + f". Median first divergence: token {number(prompts.get('median_first_divergence'))}."
    )


def confidence_label(row: Mapping[str, Any]) -> str:
    return f"{percent_edge(row.get('from'))} to {percent_edge(row.get('to'))}"


def percent_edge(value: Any) -> str:
    found = number_at({"v": value}, "v")
    return "?" if found is None else f"{100 * found:.4g}%"


def names(values: Any, num: int = 3) -> str:
    """The first names of a list and how many more there are."""
    shown = [one_line(value) for value in values][:num]
    more = len(values) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
