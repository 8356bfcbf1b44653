"""Two reports side by side: what became better or worse, and whether the two can be compared at all.

A change counts as clear only where the two 95% intervals do not overlap; overlapping intervals can
still hide a real change, so the word is "no clear change" and not "no change".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qconv.report import content
from qconv.report.content import Document
from qconv.report.markdown_text import code, escape, table
from qconv.report.values import (
    MISSING,
    at,
    bounds,
    fact,
    items,
    number,
    number_at,
    one_line,
    percent,
    points,
    signed,
    span,
)

# Path in the document, label, unit, and which way is better (+1 larger, -1 smaller, 0 neither).
_PAIRS = (("total", ""), ("merge", "merge: "), ("requantization", "requantization: "))
_STATISTICS: tuple[tuple[tuple[str, ...], str, str, int], ...] = (
    (("kl", "mean"), "KL mean (nats per token)", "number", -1),
    (("kl", "p99"), "KL p99 (nats)", "number", -1),
    (("kl", "max"), "KL max (nats)", "number", -1),
    (("reverse_kl", "mean"), "reverse KL mean (nats per token)", "number", -1),
    (("top1_agreement", "value"), "top-1 agreement", "share", 1),
    (("top5_agreement", "value"), "top-5 agreement", "share", 1),
    (("flips", "value"), "flips", "share", -1),
    (("perplexity",), "perplexity", "ratio", 0),
    (("perplexity_ratio", "value"), "perplexity ratio", "ratio", 0),
)


def compare_reports(a: Document, b: Document) -> dict[str, Any]:
    """What changed from report ``a`` to report ``b``.

    Returns:
        - ``verdicts``, ``subjects`` and ``created``: ``[a, b]`` each.
        - ``is_comparable`` and ``why_not``: whether distances can be compared, and every reason why they cannot;
          ``cautions``: what else differs in what they are measured against.
        - ``rows``: name, unit, a, b, change, interval_a, interval_b and conclusion (``"better"``, ``"worse"``,
          ``"changed"``, ``"no clear change"``, ``"no interval"``, ``"not measured"`` or ``"not comparable"``).
        - ``gates``: name, a and b of those whose rule or verdict differs, each side None or verdict, rule and value.
        - ``findings``: ``new``, ``gone`` and ``changed``, each severity, code and title.
        - ``environment``: name, a and b, where they differ.
    """
    why_not = list(_obstacles(a, b))
    return {
        "verdicts": [content.verdict(a), content.verdict(b)],
        "subjects": [dict(a.get("subject") or {}), dict(b.get("subject") or {})],
        "created": [a.get("created"), b.get("created")],
        "is_comparable": not why_not,
        "why_not": why_not,
        "cautions": list(_cautions(a, b)),
        "rows": list(_rows(a, b, is_comparable=not why_not)),
        "gates": _gates(a, b),
        "findings": _findings(a, b),
        "environment": _environment(a, b),
    }


def difference_text(diff: Mapping[str, Any]) -> str:
    """The comparison for the terminal."""
    before, after = diff["verdicts"]
    lines = [f"verdict     {content.verdict_word(before)} -> {content.verdict_word(after)}"]
    lines += [f"{'WARNING' if not index else '':<11} {line}" for index, line in enumerate(_warning(diff))]
    lines += [f"note        {line}" for line in diff["cautions"]]
    cells = [("", "A", "B", "change", "")]
    cells += [(row["name"], *_values(row), row["conclusion"]) for row in diff["rows"]]
    widths = [max(len(row[column]) for row in cells) for column in range(5)]
    if len(cells) > 1:
        for name, left, right, change, conclusion in cells:
            line = (
                f"{name:<{widths[0]}}  {left:>{widths[1]}}  {right:>{widths[2]}}  {change:>{widths[3]}}  {conclusion}"
            )
            lines.append(line.rstrip())
    for gate in diff["gates"]:
        lines.append(f"gate        {gate['name']}: {_side(gate['a'])} -> {_side(gate['b'])}")
    for key in ("new", "gone", "changed"):
        for finding in diff["findings"][key]:
            title = one_line(finding["title"])
            lines.append(f"{key + ' ' + finding['severity']:<15} {title} ({one_line(finding['code'])})")
    for row in diff["environment"]:
        lines.append(f"environment {row['name']}: {fact(row['a'])} -> {fact(row['b'])}")
    return "\n".join(lines)


def difference_markdown(diff: Mapping[str, Any]) -> str:
    """The comparison in GitHub-flavoured Markdown."""
    before, after = diff["verdicts"]
    lines = [f"# qconv: {content.verdict_word(before)} → {content.verdict_word(after)}", ""]
    warning = list(_warning(diff))
    if warning:
        lines += ["> [!WARNING]", *(f"> {escape(line)}" for line in warning), ""]
    if diff["cautions"]:
        lines += ["> [!NOTE]", *(f"> {escape(line)}" for line in diff["cautions"]), ""]
    keys = list(dict.fromkeys(key for subject in diff["subjects"] for key in subject))
    rows = [(escape(key.replace("_", " ")), *(_code(subject.get(key)) for subject in diff["subjects"])) for key in keys]
    rows.append(("created", *(escape(fact(day)) for day in diff["created"])))
    lines += [*table(("", "A", "B"), rows), ""]
    if diff["rows"]:
        measured = [
            (
                escape(row["name"]),
                *_values(row),
                _interval(row, "interval_a"),
                _interval(row, "interval_b"),
                row["conclusion"],
            )
            for row in diff["rows"]
        ]
        headings = ("", "A", "B", "change", "95% interval of A", "of B", "conclusion")
        lines += ["## Measured", "", *table(headings, measured, range(1, 6)), ""]
        lines += [
            '"No clear change": the two 95% intervals overlap. "No interval": how sure the change is cannot be said.',
            "",
        ]
    if diff["gates"]:
        gates = [(code(gate["name"]), escape(_side(gate["a"])), escape(_side(gate["b"]))) for gate in diff["gates"]]
        lines += ["## Gates that changed", "", *table(("gate", "A", "B"), gates), ""]
    found = [(key, finding) for key in ("new", "gone", "changed") for finding in diff["findings"][key]]
    if found:
        findings = [(key, escape(f["severity"]), escape(f["title"]), code(f["code"])) for key, f in found]
        lines += ["## Findings that changed", "", *table(("", "severity", "title", "code"), findings), ""]
    if diff["environment"]:
        versions = [
            (escape(row["name"]), escape(fact(row["a"])), escape(fact(row["b"]))) for row in diff["environment"]
        ]
        lines += ["## Environment", "", *table(("", "A", "B"), versions), ""]
    return "\n".join(lines)


def _obstacles(a: Document, b: Document) -> Iterator[str]:
    left, right = at(a, "fidelity", "evaluation"), at(b, "fidelity", "evaluation")
    for name, side in (("A", left), ("B", right)):
        if not side:
            yield f"{name} measured no fidelity"
    if not left or not right:
        return
    if left.get("sha256") is None or left.get("sha256") != right.get("sha256"):
        sources = " and ".join(dict.fromkeys(one_line(side.get("source")) for side in (left, right)))
        yield f"they evaluated different tokens (sha256 differs; {sources})"
    if left.get("seq_len") != right.get("seq_len"):
        yield f"their rows differ in length ({fact(left.get('seq_len'))} and {fact(right.get('seq_len'))} tokens)"


def _cautions(a: Document, b: Document) -> Iterator[str]:
    for role in ("reference", "adapter"):
        left, right = (at(document, "provenance", role) or {} for document in (a, b))
        changed = [name for name in left if name in right and left[name] != right[name]]
        if changed:
            yield f"the {role}s differ ({content.names(changed)}): each distance is to a reference of its own"
    left, right = (at(document, "fidelity", "reference", "runs") for document in (a, b))
    if left and right and left != right:
        yield f"the references were computed in different ways (A: {one_line(left)}; B: {one_line(right)})"


def _warning(diff: Mapping[str, Any]) -> Iterator[str]:
    if not diff["is_comparable"]:
        yield "NOT COMPARABLE: the KLs and agreements of these two reports cannot be compared."
        yield from (f"{reason[0].upper()}{reason[1:]}." for reason in diff["why_not"])


def _rows(a: Document, b: Document, *, is_comparable: bool) -> Iterator[dict[str, Any]]:
    for pair, prefix in _PAIRS:
        sides = at(a, "fidelity", pair), at(b, "fidelity", pair)
        for path, label, unit, better in _STATISTICS if pair == "total" else _STATISTICS[:1]:
            yield from _row(prefix + label, unit, better, [_measured(side, path) for side in sides], is_comparable)
    effects = [at(document, "fidelity", "adapter_effect_retained") for document in (a, b)]
    both = [_measured(effect, ("value",)) for effect in effects]
    yield from _row("adapter effect retained", "share", 1, both, is_comparable)
    yield from _task_rows(a, b)


def _task_rows(a: Document, b: Document) -> Iterator[dict[str, Any]]:
    """Tasks bring their own questions, so another evaluation text does not matter; their number does."""
    known = [{(t.get("name"), t.get("metric")): t for t in items(document, "tasks")} for document in (a, b)]
    for key in known[0]:
        if key not in known[1]:
            continue
        left, right = known[0][key], known[1][key]
        unit, better = content.task_unit(left), -1 if left.get("higher_is_better") is False else 1
        alike = left.get("num_samples") == right.get("num_samples")
        both = [(number_at(task, "difference"), task.get("interval_95")) for task in (left, right)]
        yield from _row(f"task {one_line(key[0])}: {one_line(key[1])}, change to reference", unit, better, both, alike)


def _measured(value: Any, path: tuple[str, ...]) -> tuple[float | None, Any]:
    found = at(value, *path[:-1])
    return number_at(found, path[-1]), at(found, "interval_95") if path[-1] in ("mean", "value") else None


def _row(
    name: str, unit: str, better: int, sides: list[tuple[float | None, Any]], is_comparable: bool
) -> Iterator[dict[str, Any]]:
    (left, low_high_a), (right, low_high_b) = sides
    if left is None and right is None:
        return
    change = None if left is None or right is None else right - left
    interval_a, interval_b = bounds(low_high_a), bounds(low_high_b)
    yield {
        "name": name,
        "unit": unit,
        "a": left,
        "b": right,
        "change": change,
        "interval_a": None if interval_a is None else list(interval_a),
        "interval_b": None if interval_b is None else list(interval_b),
        "conclusion": _conclusion(change, interval_a, interval_b, better, is_comparable),
    }


def _conclusion(
    change: float | None,
    a: tuple[float, float] | None,
    b: tuple[float, float] | None,
    better: int,
    is_comparable: bool,
) -> str:
    if change is None:
        return "not measured"
    if not is_comparable:
        return "not comparable"
    if change == 0:
        return "no clear change"
    if a is None or b is None:
        return "no interval"
    if a[0] <= b[1] and b[0] <= a[1]:
        return "no clear change"
    if not better:
        return "changed"
    return "better" if change * better > 0 else "worse"


def _gates(a: Document, b: Document) -> list[dict[str, Any]]:
    sides = [{gate.get("name"): gate for gate in items(document, "gates")} for document in (a, b)]
    changed = []
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        left, right = (_gate_side(side.get(name)) for side in sides)
        if left is None or right is None or (left["verdict"], left["rule"]) != (right["verdict"], right["rule"]):
            changed.append({"name": one_line(name), "a": left, "b": right})
    return changed


def _gate_side(gate: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if gate is None else {key: gate.get(key) for key in ("verdict", "rule", "value")}


def _side(side: Mapping[str, Any] | None) -> str:
    if side is None:
        return "not set"
    return f"{content.verdict_word(side['verdict'])} ({content.plain_number(side['value'])} {one_line(side['rule'])})"


def _findings(a: Document, b: Document) -> dict[str, list[dict[str, Any]]]:
    sides = [{(f.get("code"), f.get("title")): f for f in content.findings(document)} for document in (a, b)]

    def brief(finding: Mapping[str, Any]) -> dict[str, Any]:
        return {key: str(finding.get(key)) for key in ("severity", "code", "title")}

    keys = ("severity", "message", "tensors", "files")
    both = [key for key in sides[1] if key in sides[0]]
    return {
        "new": [brief(finding) for key, finding in sides[1].items() if key not in sides[0]],
        "gone": [brief(finding) for key, finding in sides[0].items() if key not in sides[1]],
        "changed": [brief(sides[1][k]) for k in both if any(sides[0][k].get(e) != sides[1][k].get(e) for e in keys)],
    }


def _environment(a: Document, b: Document) -> list[dict[str, Any]]:
    left, right = (dict(document.get("environment") or {}) for document in (a, b))
    names = dict.fromkeys([*left, *right])
    return [
        {"name": one_line(name), "a": left.get(name), "b": right.get(name)}
        for name in names
        if left.get(name) != right.get(name)
    ]


def _values(row: Mapping[str, Any]) -> tuple[str, str, str]:
    write = {"share": percent, "points": points, "number": number, "ratio": content.plain_number}[row["unit"]]
    change = row["change"]
    if change is None:
        return write(row["a"]), write(row["b"]), MISSING
    text = points(change) if row["unit"] in ("share", "points") else signed(change)
    return write(row["a"]), write(row["b"]), text


def _interval(row: Mapping[str, Any], side: str) -> str:
    found = content.span4(row[side]) if row["unit"] == "ratio" else span(row[side], row["unit"])
    return found or MISSING


def _code(value: Any) -> str:
    return MISSING if value is None else code(value)
