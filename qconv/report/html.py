"""The report as one page that needs nothing else: no network, no script, its style inside.

The first screen answers whether the artifact may go out, and why; what was measured follows, and the
record of the run ends it. Built on system fonts and inline SVG, for phones, dark mode, print and screen
readers. A content security policy in the page forbids scripts and every load.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from qconv.report import content, page_measured, page_record, page_spectrum, page_summary
from qconv.report.content import Document
from qconv.report.markup import Markup, element, join
from qconv.report.values import encodable, fact, one_line

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_SECTIONS = (
    ("gates", "Gates", page_summary.gates),
    ("findings", "Findings", page_record.findings),
    ("budgets", "Where the error comes from", page_summary.budgets),
    ("distribution", "Distribution", page_measured.distribution),
    ("depth", "Error by depth", page_measured.depth),
    ("intruders", "Intruder dimensions", page_spectrum.intruders),
    ("confidence", "By confidence", page_measured.confidence),
    ("tokens", "Worst tokens", page_measured.worst_tokens),
    ("prompts", "Generation", page_measured.prompts),
    ("tasks", "Tasks", page_measured.tasks),
    ("statistics", "All statistics", page_measured.statistics),
    ("method", "How it was measured", page_record.method),
    ("stages", "Stages", page_record.stages),
    ("environment", "Environment", page_record.environment),
)


def to_html(document: Document) -> str:
    """One self-contained page; parts that were not measured are left out."""
    sections = [(identity, title, render(document)) for identity, title, render in _SECTIONS]
    shown = [(identity, title, body) for identity, title, body in sections if body]
    word = content.verdict_word(content.verdict(document))
    links = [element("li", element("a", title, href=f"#{identity}")) for identity, title, _ in shown]
    navigation = element("nav", element("ul", links), aria_label="Sections") if len(links) > 2 else None
    body = element(
        "body",
        page_summary.head(document),
        navigation,
        element("main", join(body for _, _, body in shown)) if shown else None,
        element("footer", f"Made with {fact(document.get('tool'))} on {page_record.day(document)}."),
    )
    return _page(f"{word}: qconv report", body)


def spectrum_to_html(adapter: str, facts: Mapping[str, Any]) -> str:
    """What `qconv inspect --spectral` found, as a page of the same kind."""
    heading = element("header", element("h1", "Singular vectors of ", element("code", one_line(adapter))))
    return _page("Intruder dimensions", element("body", heading, element("main", join(page_spectrum.spectrum(facts)))))


def _page(title: str, body: Markup) -> str:
    style = files("qconv.report").joinpath("report.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("link", rel="icon", href="data:,"),
        element("style", Markup(style)),
    )
    return encodable(f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n")
