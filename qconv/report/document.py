"""The report document on disk: written in four forms, read back from one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from qconv.errors import CheckpointError
from qconv.report.html import to_html
from qconv.report.junit import to_junit
from qconv.report.markdown import to_markdown
from qconv.report.values import encodable

REPORT_FORMAT = 2
JSON_NAME = "qconv-report.json"
MARKDOWN_NAME = "qconv-report.md"
JUNIT_NAME = "qconv-report.xml"
HTML_NAME = "qconv-report.html"
ALL_NAMES = (JSON_NAME, MARKDOWN_NAME, JUNIT_NAME, HTML_NAME)

_OBJECTS = ("subject", "environment", "provenance", "stages")
_LISTS = ("findings", "tasks", "gates", "reasons")
_VERDICTS = ("pass", "fail", "inconclusive", "not gated")


def to_json(document: Mapping[str, Any]) -> str:
    """The document as JSON that every parser reads: no NaN or infinity, UTF-8, one newline at the end."""
    return json.dumps(finite(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """A copy in which infinities and NaN (an interval that one row cannot bound) are null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, Mapping):
        return {encodable(str(key)): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def write_reports(folder: str | Path, document: Mapping[str, Any], names: Collection[str] = ALL_NAMES) -> list[Path]:
    """Writes the named forms of a document into an existing folder, each in one step.

    Raises:
        ValueError: a name that is not one of the four.
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    document = finite(document)
    renderers: dict[str, Callable[[Mapping[str, Any]], str]] = {
        JSON_NAME: to_json,
        MARKDOWN_NAME: to_markdown,
        JUNIT_NAME: to_junit,
        HTML_NAME: to_html,
    }
    if unknown := [name for name in names if name not in renderers]:
        raise ValueError(f"no report is called {unknown[0]!r}; known: {', '.join(renderers)}")
    written = []
    for name in names:
        path = Path(folder) / name
        partial = path.with_name(name + ".partial")
        text = encodable(renderers[name](document))
        try:
            partial.write_text(text, encoding="utf-8", newline="\n")
            os.replace(partial, path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise CheckpointError(f"{path}: the report cannot be written ({error.strerror})") from error
        written.append(path)
    return written


def load_report(path: str | Path) -> dict[str, Any]:
    """Reads a report, given as its JSON file or as the folder that holds it.

    Raises:
        CheckpointError: missing, not JSON, of another format, or without the keys that the renderers need.
    """
    file = Path(path)
    if file.is_dir():
        file = file / JSON_NAME
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(
            f"{file}: no report there. Give a {JSON_NAME} or a folder that holds one; "
            "'qconv merge', 'quantize' and 'validate' write it"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read as a report: {error}") from error
    try:
        document = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: not valid JSON ({error}); was it cut short? Run the validation again"
        ) from error
    _check(file, document)
    return cast("dict[str, Any]", document)


def load_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the document."""
    text = files("qconv.report").joinpath("report.schema.json").read_text(encoding="utf-8")
    return cast("dict[str, Any]", json.loads(text))


def _check(file: Path, document: Any) -> None:
    if not isinstance(document, dict) or "format" not in document or "verdict" not in document:
        raise CheckpointError(f"{file}: JSON, but not a qconv report: expected an object with 'format' and 'verdict'")
    found = document["format"]
    if found != REPORT_FORMAT:
        newer = isinstance(found, int) and found > REPORT_FORMAT
        advice = "upgrade qconv to read it" if newer else "run 'qconv validate' again to write a current one"
        raise CheckpointError(f"{file}: report format {found!r}, this version reads format {REPORT_FORMAT}; {advice}")
    if document["verdict"] not in _VERDICTS:
        raise CheckpointError(f"{file}: verdict {document['verdict']!r}, expected one of {', '.join(_VERDICTS)}")
    for keys, kind, word in ((_OBJECTS, dict, "an object"), (_LISTS, list, "a list")):
        for key in keys:
            if not isinstance(document.get(key), kind):
                state = f"found {type(document[key]).__name__}" if key in document else "it is missing"
                raise CheckpointError(
                    f"{file}: expected {word} under {key!r}, {state}; was the file changed? Run the validation again"
                )
    fidelity = document.get("fidelity")
    if fidelity is not None and (not isinstance(fidelity, dict) or not isinstance(fidelity.get("evaluation"), dict)):
        raise CheckpointError(
            f"{file}: 'fidelity' holds no 'evaluation'; the file was changed, run the validation again"
        )
    for key in ("findings", "tasks", "gates"):
        if not all(isinstance(entry, dict) for entry in document[key]):
            raise CheckpointError(f"{file}: every entry of {key!r} should be an object; the file was changed")
