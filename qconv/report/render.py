"""Stored reports in another form, or two of them side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from qconv.errors import UsageError
from qconv.report.difference import compare_reports, difference_markdown, difference_text
from qconv.report.document import load_report, to_json
from qconv.report.html import to_html
from qconv.report.junit import to_junit
from qconv.report.markdown import to_markdown
from qconv.report.terminal import summary

_ONE = {"text": summary, "markdown": to_markdown, "html": to_html, "junit": to_junit, "json": to_json}


def render(paths: Sequence[Path], form: str) -> str:
    """One report in ``form`` (text, markdown, html, junit, json), or the difference of two (text, markdown, json).

    Raises:
        CheckpointError: no report of this format there.
        UsageError: more than two, or a form that a difference does not have.
    """
    documents = [load_report(path) for path in paths]
    if len(documents) == 1:
        return _ONE[form](documents[0])
    if len(documents) > 2:
        raise UsageError(f"qconv report shows one report or compares two, got {len(documents)}")
    difference = compare_reports(*documents)
    if form == "json":
        return json.dumps(difference, indent=2, ensure_ascii=False)
    if form not in ("text", "markdown"):
        raise UsageError(f"two reports are compared as text, markdown or json, not as {form}")
    return difference_markdown(difference) if form == "markdown" else difference_text(difference)
