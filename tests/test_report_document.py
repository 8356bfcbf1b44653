"""The document on disk: schema against the jsonschema package, loading, writing, numbers for people."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from qconv import report
from qconv.errors import CheckpointError
from qconv.report.content import evaluation_line
from qconv.report.document import (
    ALL_NAMES,
    HTML_NAME,
    JSON_NAME,
    MARKDOWN_NAME,
    finite,
    load_report,
    load_schema,
    to_json,
    write_reports,
)
from qconv.report.values import fact, number, one_line, percent, points, span, visible
from tests import report_cases
from tests.report_cases import CASES

VALIDATOR = jsonschema.Draft202012Validator(load_schema(), format_checker=jsonschema.FormatChecker())


@pytest.mark.parametrize("name", CASES)
def test_schema_accepts_every_variant(name):
    VALIDATOR.check_schema(VALIDATOR.schema)
    document = json.loads(to_json(CASES[name]()))
    assert [f"{list(error.absolute_path)}: {error.message}" for error in VALIDATOR.iter_errors(document)] == []


def _required(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of every key of a document but those of its free parts, and of one entry of every list."""
    found: list[tuple[Any, ...]] = []
    if path[:1] in {("stages",), ("provenance",)} or path[-1:] == ("cache",):
        return found
    if isinstance(value, dict):
        for key, item in value.items():
            found += [(*path, key), *_required(item, (*path, key))]
    elif isinstance(value, list) and value:
        found += _required(value[0], (*path, 0))
    return found


def _parent(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        document = document[key]
    return document


def test_schema_refuses_each_key_missing_and_each_of_another_type():
    """Not a sample: every key of the full document is taken away once, and holds something absurd once."""
    document = finite(report_cases.full(num_blocks=1))
    document["gates"] = [document["gates"][3]]  # the waived one: its waiver is looked into
    for pair in ("merge", "requantization", "base_without_adapter", "floor"):
        document["fidelity"][pair] = None  # of the same shape as the total
    paths = _required(document)
    assert len(paths) > 150
    assert VALIDATOR.is_valid(document)
    for path in paths:
        parent, key = _parent(document, path), path[-1]
        kept = dict(parent)
        del parent[key]
        assert not VALIDATOR.is_valid(document), f"accepted without {path}"
        wrong = "text" if isinstance(kept[key], dict) else {"not": ["what", "is", "expected"]}
        parent[key] = wrong
        assert not VALIDATOR.is_valid(document), f"accepted {wrong} under {path}"
        parent |= kept


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), 1),
        (("verdict",), "passed"),
        (("surprise",), 1),
        (("fidelity", "total", "top1_agreement", "value"), 1.2),
        (("fidelity", "total", "kl", "interval_95"), [0.1]),
        (("fidelity", "total", "kl", "interval_95"), [0.1, 0.2, 0.3]),
        (("fidelity", "total", "kl", "mean"), "0.1"),
        (("fidelity", "total", "kl", "mean"), -1.0),
        (("fidelity", "total", "positions"), 3.5),
        (("fidelity", "worst_tokens", 0, "reference_top"), [["a"]]),
        (("findings", 0, "severity"), "fatal"),
        (("findings", 0, "tensors"), ["t"] * 21),
        (("gates", 0, "origin"), "nobody"),
        (("gates", 0, "verdict"), "not gated"),
        (("provenance", "reference", "config.json"), "abc"),
        (("environment", "torch"), 2),
    ],
)
def test_schema_refuses_planted_mistakes(path, value):
    document = finite(report_cases.full())
    _parent(document, path)[path[-1]] = value
    assert not VALIDATOR.is_valid(document)


def test_json_has_no_infinities_and_survives_every_text():
    document = report_cases.nasty()
    document["fidelity"]["total"]["kl"]["interval_95"] = [-math.inf, math.inf]
    document["fidelity"]["total"]["kl"]["max"] = math.nan
    text = to_json(document)
    assert text.endswith("}\n")
    text.encode("utf-8")
    read = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert read["fidelity"]["total"]["kl"]["interval_95"] == [None, None]
    assert read["fidelity"]["total"]["kl"]["max"] is None
    assert "日本語" in text  # not escaped to ASCII


@pytest.mark.parametrize("name", CASES)
def test_reports_are_written_and_read_back(name, tmp_path):
    document = CASES[name]()
    written = write_reports(tmp_path, document)
    assert {path.name for path in written} == set(ALL_NAMES) == {path.name for path in tmp_path.iterdir()}
    assert load_report(tmp_path) == load_report(tmp_path / JSON_NAME) == finite(document)
    for path in written:
        assert path.read_bytes().decode("utf-8").endswith("\n")
        assert b"\r" not in path.read_bytes()


def test_only_the_named_reports_are_written(tmp_path):
    write_reports(tmp_path, report_cases.minimal(), [MARKDOWN_NAME, HTML_NAME])
    assert {path.name for path in tmp_path.iterdir()} == {MARKDOWN_NAME, HTML_NAME}
    with pytest.raises(ValueError, match=r"report\.pdf"):
        write_reports(tmp_path, report_cases.minimal(), ["report.pdf"])


@pytest.mark.parametrize("call", ["write_text", "replace"])
def test_a_full_disk_is_an_error_for_users_and_leaves_no_half_report(call, tmp_path, monkeypatch):
    real = Path.write_text

    def full(path: Path, text: str, **options: Any) -> int:
        real(path, text[: len(text) // 2], **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    def refuse(source: Path, to: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    if call == "write_text":
        monkeypatch.setattr(Path, "write_text", full)
    else:
        monkeypatch.setattr(os, "replace", refuse)
    says = {"write_text": "No space left on device", "replace": "Read-only file system"}[call]
    with pytest.raises(CheckpointError, match=rf"{JSON_NAME}: the report cannot be written \({says}\)"):
        write_reports(tmp_path, report_cases.minimal())
    assert list(tmp_path.iterdir()) == []


def _broken(**changes: Any) -> str:
    document = finite(report_cases.full()) | changes
    return json.dumps({key: value for key, value in document.items() if value is not ...})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, r"no report there.*qconv validate|no report there"),
        ("{", "not valid JSON.*Run the validation again"),
        ("[]", "not a qconv report"),
        ('{"model": 1}', "not a qconv report"),
        (_broken(format=1), "report format 1, this version reads format 2.*qconv validate"),
        (_broken(format=3), "report format 3.*upgrade qconv"),
        (_broken(verdict="fine"), "verdict 'fine'"),
        (_broken(gates=...), "expected a list under 'gates', it is missing"),
        (_broken(subject="x"), "expected an object under 'subject', found str"),
        (_broken(gates=["x"]), "every entry of 'gates'"),
        (_broken(fidelity={}), "'fidelity' holds no 'evaluation'"),
    ],
)
def test_what_is_no_report_is_refused_with_advice(text, says, tmp_path):
    if text is not None:
        (tmp_path / JSON_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=f"(?s){JSON_NAME}.*{says}"):
        load_report(tmp_path)


def test_report_package_imports_neither_torch_nor_numpy():
    paths = Path(report.__file__).parent.glob("*.py")
    names = [f"qconv.report.{path.stem}" for path in paths if path.stem != "__init__"]
    assert "qconv.report.html" in names
    program = (
        f"import sys, {', '.join(names)}; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0015849, "0.00158"),
        (52.557, "52.6"),
        (1234.5, "1,234"),
        (999.7, "1,000"),
        (0.09999, "0.100"),
        (0.0, "0"),
        (1.2345e-7, "1.23e-7"),
        (-0.0302, "-0.0302"),
        (16352, "16,352"),
        (None, "–"),
        (math.inf, "–"),
        (True, "–"),
    ],
)
def test_numbers_have_three_significant_digits(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.9731, "97.3%"),
        (1.0, "100%"),
        (0.99996, "99.996%"),
        (0.9996, "99.96%"),
        (0.0, "0%"),
        (0.00004, "0.004%"),
        (-0.125, "-12.5%"),
        (None, "–"),
    ],
)
def test_percentages_reach_100_only_when_they_are_100(value, text):
    assert percent(value) == text


def test_texts_for_people():
    assert points(-0.0125) == "-1.25 pp"
    assert points(0.03) == "+3.00 pp"
    assert span([0.1, 0.25], "share") == "10.0% to 25.0%"
    assert span([None, 0.25]) == span(None) == ""
    assert fact({"a": [1, 2.5, None], "b": True, "c": 123456}) == "a 1; 2.50; –, b yes, c 123,456"
    assert one_line("a\n\tb \x1b[31m\u202ec") == "a b \ufffd[31m\ufffdc"
    assert visible("a\n\tb\x00\x1b") == "a↵⇥b␀␛"


def test_what_was_evaluated_is_a_sentence():
    document = CASES["full"]()
    assert "positions from 24 documents of" in evaluation_line(document)
    document["fidelity"]["evaluation"]["documents"] = 1
    assert "positions from 1 document of" in evaluation_line(document)
