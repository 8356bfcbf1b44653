"""Intruder dimensions by block and kind of linear: in the report of a merge that scales them, and as a page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from qconv.report import charts
from qconv.report.content import Document
from qconv.report.markup import Markup, element, join, section, table
from qconv.report.values import at, number, number_at, one_line, percent

Cell = tuple[str, float, str]
"""A linear's name, its value and what it says."""

_BLOCK = re.compile(r"^.*?\.(?P<index>\d+)\.(?P<kind>.+)$")
_MOST_KINDS = 24  # more experts than a map can show


def by_kind(cells: Iterable[Cell]) -> list[tuple[str, list[tuple[int, float, str]]]]:
    """Linears of blocks, grouped by what they are, the largest sums first; empty where no map can show it."""
    kinds: dict[str, list[tuple[int, float, str]]] = {}
    for name, value, title in cells:
        match = _BLOCK.match(name)
        if match:
            kinds.setdefault(match["kind"], []).append((int(match["index"]), value, title))
    short = {kind: kind.rpartition(".")[2] for kind in kinds}
    if len(set(short.values())) < len(short) or len(kinds) > _MOST_KINDS:
        return []  # names that do not tell them apart, or too many
    order = sorted(kinds, key=lambda kind: -sum(value for _, value, _ in kinds[kind]))
    return [(one_line(short[kind])[:14], sorted(kinds[kind])) for kind in order]


def intruders(document: Document) -> Markup:
    """Of a merge that scales them: how many each weight has, and what scaling did to both texts."""
    facts = at(document, "stages", "merge", "intruder dimensions")
    if not isinstance(facts, Mapping):
        return Markup("")
    said = facts.get("by weight") or {}
    cells = [
        (_module(name), float(count), f"{_module(name)}: {count}{_colon(said.get(name))}")
        for name, count in (facts.get("count by weight") or {}).items()
    ]
    found, where, factor = (facts.get(key) for key in ("found", "in weights", "scaled by"))
    lead = f"{found} singular vectors, in {where} weights, scaled by {factor}."
    return section("intruders", "Intruder dimensions", _map("Intruders", cells), _losses(document), lead=lead)


def _losses(document: Document) -> Markup:
    """Of the models before and after, on the task's text and on general text."""
    rows = []
    for name, loss in (at(document, "stages", "held-out loss") or {}).items():
        text, _, model = str(name).rpartition(": ")
        low, high = number_at(loss, "from"), number_at(loss, "to")
        between = "" if low is None else f"{number(low)} to {number(high)}"
        rows.append((one_line(model), one_line(text), number(loss.get("loss")), number(loss.get("change")), between))
    headings = ("model", "text", "mean loss", "change from unmerged", "95% interval")
    return table("Held-out loss", headings, rows, (2, 3, 4)) if rows else Markup("")


def spectrum(facts: Mapping[str, Any]) -> list[Markup]:
    """The sections of a page about an adapter: what `qconv inspect --spectral` found."""
    rows = facts["spectrum"]
    found = [
        (row["module"], float(len(row["intruders"])), f"{row['module']}: {_places(row['intruders']) or 'none'}")
        for row in rows
    ]
    changes = [(row["module"], row["change"], f"{row['module']}: {percent(row['change'])}") for row in rows]
    named = [
        (
            element("code", row["module"]),
            one["place"] + 1,
            number(one["singular_value"]),
            number(one["cosine"], 2),
            percent(row["change"]),
        )
        for row in rows
        for one in row["intruders"]
    ]
    headings = ("weight", "place", "singular value", "nearest cosine", "changed by")
    lead = f"{facts['intruder dimensions']} found; looked at: {facts['looked at']}."
    listed = table("Intruder dimensions", headings, named, (1, 2, 3, 4)) if named else None
    return [
        section("intruders", "Intruder dimensions", _map("Intruders", found), listed, lead=lead),
        section("changes", "Size of the update", _map("Size of the update beside the weight", changes)),
    ]


def _map(what: str, cells: list[Cell]) -> Markup:
    rows = by_kind(cells)
    if not rows:
        return Markup("")
    top = ", ".join(title for _, _, title in sorted(cells, key=lambda cell: -cell[1])[:3])
    label = f"{what} by block and kind of linear; stronger colour is more. Largest: {top}"
    return join([
        element("p", "By block and kind of linear; stronger colour is more.", class_="lead"),
        element("div", charts.heat_map(label, rows), class_="plot named"),
    ])  # fmt: skip


def _places(found: list[Mapping[str, Any]]) -> str:
    return ", ".join(f"place {one['place'] + 1} (cosine {number(one['cosine'], 2)})" for one in found)


def _colon(text: object) -> str:
    return f": {one_line(text)}" if text else ""


def _module(weight: object) -> str:
    return one_line(weight).removesuffix(".weight")
