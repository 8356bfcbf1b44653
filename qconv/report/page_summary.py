"""The first screen of the page: verdict, figures, gates, and where the error comes from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qconv.report import charts, content, scales
from qconv.report.content import Budget, Document
from qconv.report.markup import Markup, badge, element, join, section, tone
from qconv.report.values import at, bounds, finite_number, number, number_at, one_line, percent, span

_LIMIT = re.compile(r"(<=|>=)(?:.*=)?\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(%?)\s*$")
_ICONS = {
    "pass": "M5 12.5l4.5 4.5L19 7.5",
    "fail": "M6 6l12 12M18 6L6 18",
    "inconclusive": "M8.5 9a3.5 3.5 0 1 1 5.2 3c-1.2.7-1.7 1.3-1.7 2.5M12 18v.5",
}


def head(document: Document) -> Markup:
    verdict = content.verdict(document)
    word = content.verdict_word(verdict)
    path = element("path", d=_ICONS.get(verdict, "M6 12h12"))
    icon = element("svg", path, viewBox="0 0 24 24", width=36, height=36, aria_hidden="true", class_="icon")
    reasons = [element("li", one_line(reason)) for reason in document.get("reasons") or ()]
    title = element(
        "div",
        icon,
        element("div", element("p", "qconv report", class_="over"), element("h1", word, id="verdict")),
        class_="verdict-line",
    )
    listed = element("ul", reasons, class_="reasons") if reasons else element("p", _UNGATED, class_="reasons")
    top = element("div", title, listed, class_=f"verdict {tone(verdict)}")
    return element("header", top, _figures(document), _subject(document), class_="card first")


_UNGATED = "No limit was set, so nothing was decided."


def _subject(document: Document) -> Markup:
    rows = []
    for key, value in (document.get("subject") or {}).items():
        if value:
            shown = element("dd", element("code", one_line(value)))
            rows.append(element("div", element("dt", str(key).replace("_", " ")), shown))
    line = content.evaluation_line(document)
    if line:
        rows.append(element("div", element("dt", "evaluated on"), element("dd", line), class_="wide"))
    return element("dl", rows, class_="subject") if rows else Markup("")


def _figures(document: Document) -> Markup:
    total = at(document, "fidelity", "total")
    if not total:
        return Markup("")
    kl, top1, ratio = at(total, "kl"), at(total, "top1_agreement"), at(total, "perplexity_ratio")
    tiles = [
        _figure("KL mean", number(at(kl, "mean")), span(at(kl, "interval_95")) or "no interval", "nats per token"),
        _figure(
            "Top-1 agreement", percent(at(top1, "value")), span(at(top1, "interval_95"), "share"), "same next token"
        ),
        _figure(
            "Perplexity",
            number(at(total, "perplexity"), 4),
            f"reference {number(at(total, 'reference_perplexity'), 4)}",
            f"ratio {number(at(ratio, 'value'), 4)}",
        ),
    ]
    effect = at(document, "fidelity", "adapter_effect_retained")
    if number_at(effect, "value") is not None:
        interval = span(at(effect, "interval_95"), "share")
        tiles.append(
            _figure("Adapter effect retained", percent(effect["value"]), interval, "100% is the trained model")
        )
    return element("div", tiles, class_="figures")


def _figure(label: str, value: str, *notes: str) -> Markup:
    lines = [element("span", note, class_="note") for note in notes if note]
    return element(
        "div", element("span", label, class_="label"), element("span", value, class_="value"), lines, class_="figure"
    )


def gates(document: Document) -> Markup:
    rows = [_gate(gate) for gate in content.gates(document)]
    if not rows:
        return Markup("")
    lead = "Dot: measured. Whisker: 95% interval. Shaded: the side of the limit that passes."
    return section("gates", "Gates", element("ul", rows, class_="rows gates"), lead=lead)


def _gate(gate: Mapping[str, Any]) -> Markup:
    verdict = str(gate.get("verdict"))
    interval = content.gate_interval(gate)
    note = content.gate_note(gate)
    name = element(
        "div",
        element("code", one_line(gate.get("name"))),
        " ",
        element("span", one_line(gate.get("rule")), class_="rule"),
        element("span", f"set by {one_line(gate.get('origin'))}", class_="note") if gate.get("origin") else None,
        element("span", note, class_="note strong") if note else None,
        class_="what",
    )
    value = element(
        "div",
        element("span", content.gate_value(gate), class_="value"),
        element("span", interval or ("exact" if bounds(gate.get("interval_95")) else "no interval"), class_="note"),
        class_="measured",
    )
    word = element("div", badge(verdict, content.verdict_word(verdict)), class_="state")
    return element("li", word, name, value, element("div", _gate_chart(gate), class_="plot"))


def _gate_chart(gate: Mapping[str, Any]) -> Markup | None:
    limit, value = gate_limit(gate), finite_number(gate.get("value"))
    interval = bounds(gate.get("interval_95"))
    if limit is None or value is None or (interval is not None and interval[0] == interval[1]):
        return None  # an exact count needs no picture
    label = f"{one_line(gate.get('name'))}: {content.gate_value(gate)} against {one_line(gate.get('rule'))}"
    upper = "<=" in str(gate.get("rule"))
    return charts.gate_bar(label, value, interval, limit, upper=upper)


def gate_limit(gate: Mapping[str, Any]) -> float | None:
    """The number at the end of a rule such as ``<= 3 x floor = 0.0012`` or ``>= 90%``."""
    found = _LIMIT.search(str(gate.get("rule")))
    if found is None:
        return None
    return float(found[2]) / (100 if found[3] else 1)


def budgets(document: Document) -> Markup:
    found = content.budgets(document)
    if not found:
        return Markup("")
    ends = [value for budget in found for value in (budget.kl, budget.low, budget.high) if value is not None]
    scale = scales.decade_scale(ends)
    rows = [_budget(budget, scale) for budget in found]
    rows.append(element("li", element("div", charts.axis(scale), class_="plot"), class_="axis", aria_hidden="true"))
    kind = "logarithmic scale, each step is ten times the one before" if scale.is_log else "linear scale from zero"
    lead = f"Mean KL in nats per token, {kind}. Whisker: 95% interval. Pale bars are for comparison."
    return section(
        "budgets",
        "Where the error comes from",
        element("ul", rows, class_="rows budgets"),
        _effect(document),
        lead=lead,
    )


def _budget(budget: Budget, scale: scales.Scale) -> Markup:
    interval = None if budget.low is None or budget.high is None else (budget.low, budget.high)
    shown = span(interval)
    label = f"{budget.label}: {number(budget.kl)} nats per token" + (f", 95% interval {shown}" if shown else "")
    bar = charts.budget_bar(label, budget.kl, interval, scale, is_context=budget.is_context)
    what = element(
        "div", element("strong", budget.label), element("span", budget.meaning, class_="note"), class_="what"
    )
    value = element(
        "div",
        element("span", number(budget.kl), class_="value"),
        element("span", shown or "no interval", class_="note"),
        class_="measured",
    )
    return element("li", what, value, element("div", bar, class_="plot"))


def _effect(document: Document) -> Markup:
    effect = at(document, "fidelity", "adapter_effect_retained")
    value = number_at(effect, "value")
    if value is None:
        return Markup("")
    limits = [gate_limit(g) for g in content.gates(document) if g.get("name") == "adapter_effect_retained"]
    limit = limits[0] if limits else None
    interval = span(at(effect, "interval_95"), "share")
    text = percent(value) + (f", 95% interval {interval}" if interval else "")
    return join(
        [
            element("h3", "Adapter effect retained"),
            element(
                "p",
                element("strong", text),
                ". 100% behaves like base and adapter, 0% like the base alone"
                + (f"; the line is the limit {percent(limit)}." if limit is not None else "."),
                class_="lead",
            ),
            element(
                "div",
                charts.meter(f"Adapter effect retained: {text}", value, bounds(at(effect, "interval_95")), limit),
                class_="plot meter",
            ),
        ]
    )
