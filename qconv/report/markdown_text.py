"""Text, code spans and tables in GitHub-flavoured Markdown, safe whatever the text holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from qconv.report.values import one_line, visible

_SPECIAL = re.compile(r"[\\`*{}\[\]<>#|~&@$!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def escape(text: Any) -> str:
    """Text in which nothing is Markdown or HTML; entities, because tables do not honour every backslash."""
    return _SPECIAL.sub(lambda match: f"&#{ord(match.group())};", one_line(text))


def code(text: Any) -> str:
    """A code span for names and tokens, safe inside a table."""
    shown = visible(text)
    if shown.strip() == shown and shown and not set(shown) & set("`|"):
        return f"`{shown}`"
    return f"<code>{_SPECIAL.sub(lambda match: f'&#{ord(match.group())};', shown.replace(' ', '␣'))}</code>"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], numeric: Iterable[int] = ()) -> list[str]:
    """A table of cells that are already escaped; columns in ``numeric`` are aligned right."""
    right = set(numeric)
    rule = ["---:" if column in right else "---" for column in range(len(headings))]
    return [f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows)]


def folded(title: str, lines: Iterable[str]) -> list[str]:
    body = list(lines)
    return [f"<details><summary>{title}</summary>", "", *body, "", "</details>"] if body else []
