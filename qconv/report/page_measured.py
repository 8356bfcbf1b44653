"""What was measured, in charts and tables: distribution, depth, confidence, tokens, prompts, tasks."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qconv.report import charts, content, page_spectrum
from qconv.report.content import Document
from qconv.report.markup import Markup, badge, element, folded, join, section, table
from qconv.report.values import at, count, items, number, number_at, one_line, percent, visible

_SHOWN = 6  # worst tokens before the fold
_BLOCK = re.compile(r"^(?P<prefix>.*?)\.(?P<index>\d+)(?:\.(?P<kind>.+))?$")


def distribution(document: Document) -> Markup:
    total = at(document, "fidelity", "total")
    edges, counts = items(total, "histogram", "log10_edges"), items(total, "histogram", "counts")
    if len(edges) != len(counts) + 1 or not sum(counts):
        return Markup("")
    marked = []
    for key, name in (("median", "median"), ("mean", "mean"), ("p99", "p99"), ("max", "max")):
        value = number_at(total, "kl", key)
        if value is not None and value > 0:
            marked.append((name, math.log10(value), number(value)))
    words = ", ".join(f"{name} {text}" for name, _, text in marked)
    label = f"Histogram of the KL of {count(sum(counts))} positions: {words or 'all zero'}"
    lead = (
        "KL per position in nats, logarithmic scale; height is the share of positions. The first bin holds all below."
    )
    chart = element("div", charts.histogram(label, edges, counts, marked), class_="plot padded")
    return section("distribution", "Distribution of the KL over positions", chart, lead=lead)


def depth(document: Document) -> Markup:
    parts: list[Markup] = []
    measured = [
        (int(block["block"]), float(block["relative_error"]), _block_title(block))
        for block in items(document, "fidelity", "blocks")
        if number_at(block, "relative_error") is not None
    ]
    if measured:
        worst = ", ".join(f"{b['block']} ({number(b['relative_error'])})" for b in content.worst_blocks(document, 3))
        last = items(document, "fidelity", "blocks")[-1]
        lead = f"Largest at blocks {worst}. After the last block: SQNR {number(last.get('sqnr_db'))} dB."
        label = f"Relative error of the hidden states after each of {len(measured)} blocks. {lead}"
        parts += [
            element("h3", "Accumulated: relative error of the hidden states after each block"),
            element("p", lead, class_="lead"),
            element("div", charts.depth_line(label, measured), class_="plot padded"),
        ]
    return section("depth", "Error by depth", *parts, _attribution(document))


def _block_title(block: Mapping[str, Any]) -> str:
    return (
        f"block {block['block']}: relative error {number(block['relative_error'])}, "
        f"SQNR {number(block.get('sqnr_db'))} dB, cosine {number(block.get('cosine'), 5)}"
    )


def _attribution(document: Document) -> Markup:
    attribution = at(document, "fidelity", "attribution")
    if not attribution:
        return Markup("")
    parts: list[Markup] = [element("h3", "Attribution: the KL that each part causes alone")]
    parts.append(element("p", content.attribution_line(attribution), class_="lead"))
    bars = _by_block(items(attribution, "blocks"))
    if bars:
        top = ", ".join(
            f"{one_line(u['name'])} {percent(u.get('share'))}" for u in content.top_units(document, "blocks", 3)
        )
        label = f"KL caused by each block alone, in nats per token. Largest: {top}"
        parts.append(element("div", charts.depth_bars(label, bars), class_="plot padded"))
    rows = _by_kind(items(attribution, "linears"))
    if rows:
        top = ", ".join(
            f"{one_line(u['name'])} {percent(u.get('share'))}" for u in content.top_units(document, "linears", 3)
        )
        label = f"KL caused by each linear alone, by block and kind; stronger colour is more. Largest: {top}"
        parts.append(element("h4", "By linear and block; stronger colour is more"))
        parts.append(element("div", charts.heat_map(label, rows), class_="plot named"))
    tables = [
        table(
            f"{heading} with the largest KL of their own",
            (heading, "KL (nats)", "share"),
            ((element("code", one_line(u["name"])), number(u["kl_mean"]), percent(u.get("share"))) for u in units),
            (1, 2),
        )
        for heading, kind in (("Parts", "blocks"), ("Linears", "linears"))
        if (units := content.top_units(document, kind, 8))
    ]
    parts.append(element("div", tables, class_="pairs"))
    return join(parts)


def _by_block(units: Sequence[Mapping[str, Any]]) -> list[tuple[int, float, str]]:
    """Units that are one block of a stack, in its order."""
    found = []
    for unit in units:
        match = _BLOCK.match(str(unit.get("name")))
        kl = number_at(unit, "kl_mean")
        if match and match["kind"] is None and kl is not None:
            index = int(match["index"])
            found.append((index, kl, f"block {index}: {number(kl)} nats, {percent(unit.get('share'))}"))
    return sorted(found)


def _by_kind(units: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[tuple[int, float, str]]]]:
    """Linears of blocks, grouped by what they are: ``mlp.down_proj`` and the like."""
    return page_spectrum.by_kind(
        (str(unit["name"]), kl, f"{one_line(unit['name'])}: {number(kl)} nats, {percent(unit.get('share'))}")
        for unit in units
        if (kl := number_at(unit, "kl_mean")) is not None
    )


def confidence(document: Document) -> Markup:
    rows = (
        (
            content.confidence_label(row),
            count(row.get("positions")),
            number(row.get("kl_mean")),
            percent(row.get("top1_agreement")),
        )
        for row in items(document, "fidelity", "total", "by_confidence")
    )
    lead = "Disagreement where the reference is sure matters more than where it guesses."
    title = "By confidence of the reference"
    headings = ("probability of its first choice", "positions", "KL mean", "top-1")
    return section("confidence", title, table(title, headings, rows, (1, 2, 3)), lead=lead)


def worst_tokens(document: Document) -> Markup:
    cards = [_token_card(token) for token in items(document, "fidelity", "worst_tokens")]
    if not cards:
        return Markup("")
    lead = "The positions with the largest KL. Marked: the token that the text has next. ↵ is a new line, ␣ a space."
    rest = cards[_SHOWN:]
    more = folded(f"{len(rest)} more", element("ol", rest, class_="tokens", start=_SHOWN + 1)) if rest else None
    return section("tokens", "Worst tokens in context", element("ol", cards[:_SHOWN], class_="tokens"), more, lead=lead)


def _token_card(token: Mapping[str, Any]) -> Markup:
    target = str(token.get("target") or "")
    context = visible(token.get("context") or "").lstrip(" ")
    where = ", ".join(f"{key} {count(token.get(key))}" for key in ("document", "row", "position"))
    head = element(
        "p",
        element("strong", f"{number(token.get('kl'))} nats"),
        " ",
        element("span", where, class_="note inline"),
    )
    text = element("p", context, element("mark", token_text(target)), class_="context")
    lists = [
        element(
            "div",
            element("h3", name),
            element("ul", [_choice(pair, target) for pair in token.get(key) or ()]),
        )
        for name, key in (("Reference", "reference_top"), ("Candidate", "candidate_top"))
    ]
    return element("li", head, text, element("div", lists, class_="choices"))


_CHOSEN = join(
    [
        element("span", "✓", class_="actual", aria_hidden="true"),
        element("span", "the actual next token", class_="unseen"),
    ]
)


def _choice(pair: Sequence[Any], target: str) -> Markup:
    text, probability = str(pair[0]), number_at({"p": pair[1]}, "p")
    is_target = text == target
    return element(
        "li",
        element("code", token_text(text)),
        _CHOSEN if is_target else None,
        element("span", percent(probability), class_="share"),
        charts.probability_bar(min(1.0, max(0.0, probability or 0.0))),
        class_="target" if is_target else None,
    )


def token_text(text: str) -> str:
    """A token with the spaces at its ends to be seen."""
    shown = visible(text)
    inside = shown.strip(" ")
    if not inside:
        return "␣" * len(shown) or "(empty)"
    left = len(shown) - len(shown.lstrip(" "))
    right = len(shown) - len(shown.rstrip(" "))
    return "␣" * left + inside + "␣" * right


def prompts(document: Document) -> Markup:
    measured = at(document, "fidelity", "prompts")
    if not measured:
        return Markup("")
    lead = content.prompts_line(measured)
    cards = [_example(example) for example in items(measured, "examples")]
    listed = element("ol", cards, class_="examples") if cards else element("p", "No examples were kept.")
    return section("prompts", "Greedy generation from prompts", listed, lead=lead)


def _example(example: Mapping[str, Any]) -> Markup:
    reference, candidate = visible(example.get("reference") or ""), visible(example.get("candidate") or "")
    divergence = example.get("first_divergence")
    prompt = element("p", visible(example.get("prompt") or ""), class_="prompt")
    if divergence is None:
        return element("li", prompt, element("p", badge("pass", "identical")), element("p", reference, class_="said"))
    shared = _shared(reference, candidate)
    said = [
        element(
            "div",
            element("h3", name),
            element("p", text[:shared], element("mark", text[shared:] or "(ends)"), class_="said"),
        )
        for name, text in (("Reference", reference), ("Candidate", candidate))
    ]
    word = badge("note", f"diverges at token {count(divergence)}")
    return element("li", prompt, element("p", word), element("div", said, class_="pairs"))


def _shared(left: str, right: str) -> int:
    """Characters that two texts begin with in common."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def tasks(document: Document) -> Markup:
    rows = (
        (
            one_line(task.get("name")),
            one_line(task.get("metric")),
            count(task.get("num_samples")),
            *content.task_values(task),
            f"{count(task.get('better_to_worse'))} / {count(task.get('worse_to_better'))}",
            number(task.get("mcnemar_p")),
        )
        for task in items(document, "tasks")
    )
    headings = ("task", "metric", "samples", "reference", "candidate", "difference", "95% interval")
    content_table = table("Tasks", (*headings, "worse / better", "McNemar p"), rows, range(2, 9))
    lead = "The same questions to both models; pp are percentage points."
    return section("tasks", "Tasks", content_table, lead=lead)


def statistics(document: Document) -> Markup:
    parts = []
    for budget in content.budgets(document):
        rows = [(row.label, row.value, row.interval or "–", row.meaning) for row in content.statistics(budget.pair)]
        title = f"{budget.label}: {budget.meaning}"
        parts.append(folded(title, table(title, ("statistic", "value", "95% interval", "meaning"), rows, (1, 2))))
    return section("statistics", "All statistics", *parts)
