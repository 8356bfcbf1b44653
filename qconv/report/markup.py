"""HTML and SVG built so that nothing unescaped can get in: text is escaped unless it is `Markup`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from qconv.report.values import one_line

_VOID = frozenset({"meta", "link", "br", "rect", "line", "circle", "path"})


class Markup(str):
    """HTML that is already escaped."""

    __slots__ = ()


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element. ``class_`` gives class, ``aria_label`` aria-label; None and False leave an attribute out."""
    written = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        written.append(key if value is True else f'{key}="{escape(one_line(value))}"')
    opening = f"<{' '.join(written)}"
    inside = join(children)
    if name in _VOID and not inside:
        return Markup(f"{opening}>" if name in ("meta", "link", "br") else f"{opening}/>")
    return Markup(f"{opening}>{inside}</{name}>")


def join(children: Iterable[object]) -> Markup:
    """Children one after the other; None is nothing, lists are joined, text is escaped."""
    parts = []
    for child in children:
        if isinstance(child, Markup):
            parts.append(str(child))
        elif isinstance(child, list | tuple):
            parts.append(join(child))
        elif child is not None:
            parts.append(escape(str(child)))
    return Markup("".join(parts))


def table(
    caption: str, headings: Sequence[object], rows: Iterable[Sequence[object]], numeric: Iterable[int] = ()
) -> Markup:
    """A table in a box of its own that scrolls where the page is narrow; the first cell heads its row."""
    right = set(numeric)

    def cell(column: int, child: object) -> Markup:
        kind = "num" if column in right else None
        if column == 0:
            return element("th", child, scope="row", class_=kind)
        return element("td", child, class_=kind)

    head = [element("th", child, scope="col", class_="num" if i in right else None) for i, child in enumerate(headings)]
    body = [element("tr", [cell(i, child) for i, child in enumerate(row)]) for row in rows]
    if not body:
        return Markup("")
    content = element(
        "table",
        element("caption", caption, class_="unseen"),
        element("thead", element("tr", head)),
        element("tbody", body),
    )
    return element("div", content, class_="scroll", tabindex="0", role="region", aria_label=caption)


def section(identity: str, title: str, *children: object, lead: object = None) -> Markup:
    """A card with a heading of level 2; nothing where it would be empty."""
    inside = join(children)
    if not inside:
        return Markup("")
    heading = element("h2", title, id=f"{identity}-title")
    text = element("p", lead, class_="lead") if lead else None
    return element("section", heading, text, inside, id=identity, class_="card", aria_labelledby=f"{identity}-title")


def folded(title: object, *children: object) -> Markup:
    inside = join(children)
    return element("details", element("summary", title), inside) if inside else Markup("")


def badge(kind: str, word: str) -> Markup:
    """A coloured word; the symbol says the same for those who do not see the colour."""
    symbols = {"pass": "✓", "fail": "✕", "error": "✕", "inconclusive": "?", "warning": "!", "waived": "‖", "note": "i"}
    symbol = element("span", symbols.get(kind, "–"), aria_hidden="true")
    return element("span", symbol, " ", word, class_=f"badge {tone(kind)}")


def tone(kind: str) -> str:
    """The class of the colour of a verdict or severity."""
    tones = {"pass": "good", "fail": "bad", "error": "bad", "inconclusive": "doubt", "warning": "doubt"}
    return tones.get(kind, "plain")
