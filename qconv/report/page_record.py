"""The record of the run: findings, how it was measured, stages, environment, provenance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qconv.report import content
from qconv.report.content import Document
from qconv.report.markup import Markup, badge, element, folded, section, table
from qconv.report.values import at, fact, items, one_line, rows_of


def findings(document: Document) -> Markup:
    rows = [_finding(document, finding) for finding in content.findings(document)]
    if not rows:
        return Markup("")
    return section("findings", "Findings", element("ul", rows, class_="rows findings"))


def _finding(document: Document, finding: Mapping[str, Any]) -> Markup:
    severity = str(finding.get("severity"))
    lists = []
    for label, key in (("Tensors", "tensors"), ("Files", "files")):
        names = [element("li", element("code", one_line(name))) for name in finding.get(key) or ()]
        if names:
            lists.append(
                element("div", element("span", f"{label}:", class_="note"), element("ul", names, class_="names"))
            )
    waived = content.waiver_of(document, finding)
    text = element(
        "div",
        element("h3", one_line(finding.get("title")), " ", element("code", one_line(finding.get("code")))),
        element("p", one_line(finding.get("message"))),
        element("p", waived, class_="note strong") if waived else None,
        lists,
        class_="what",
    )
    state = [badge(severity, severity.upper()), " ", badge("waived", "WAIVED") if waived else None]
    return element("li", element("div", state, class_="state"), text)


def method(document: Document) -> Markup:
    fidelity = document.get("fidelity")
    rows = [(key, one_line(text)) for key in ("reference", "candidate") if (text := at(fidelity, key, "runs"))]
    cache = at(fidelity, "reference", "cache")
    if cache:
        rows.append(("reference cache", fact(cache)))
    evaluation = at(fidelity, "evaluation") or {}
    rows += [(_label(key), fact(value)) for key, value in evaluation.items()]
    notes = [element("li", one_line(note)) for note in items(fidelity, "notes")]
    return section(
        "method",
        "How it was measured",
        _facts("How it was measured", rows),
        element("ul", notes, class_="notes") if notes else None,
    )


def stages(document: Document) -> Markup:
    parts = []
    for name, facts in (document.get("stages") or {}).items():
        shown = {key: value for key, value in (facts or {}).items() if key != "intruder dimensions"}  # have a section
        title, rows, tables = _label(name).capitalize(), [], []
        for key, value in shown.items():
            found = rows_of(value)
            if found is None:
                rows.append((_label(key), fact(value)))
            else:
                headings, records = found
                tables.append(table(f"{title}: {_label(key)}", (_label(key), *headings), records))
        parts.append(folded(title, _facts(title, rows), *tables))
    return section("stages", "What each stage did", *parts)


def environment(document: Document) -> Markup:
    rows = [(one_line(key), fact(value)) for key, value in (document.get("environment") or {}).items()]
    digests = [
        (one_line(role).replace("_", " "), element("code", one_line(name)), element("code", one_line(digest)))
        for role, known in (document.get("provenance") or {}).items()
        for name, digest in (known or {}).items()
    ]
    return section(
        "environment",
        "Environment and provenance",
        _facts("Environment", rows),
        folded("SHA-256 of the files", table("SHA-256 of the files", ("of", "file", "sha256"), digests)),
    )


def day(document: Document) -> str:
    return one_line(document.get("created") or "an unknown day")


def _label(key: Any) -> str:
    return one_line(key).replace("_", " ")


def _facts(title: str, rows: list[tuple[str, str]]) -> Markup:
    pairs = [element("div", element("dt", key), element("dd", value)) for key, value in rows]
    return element("dl", pairs, class_="facts", aria_label=title) if pairs else Markup("")
