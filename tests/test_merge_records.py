"""qconv's own note of how training saw the base: written, read back, and refused when damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from qconv.errors import AdapterError
from qconv.merge import load_adapter
from qconv.records import TRAIN_RECORD_NAME, TrainRecord, read_train_record, write_train_record
from qconv.types import BnbBackend, BnbKind
from tests.merge_cases import toy_base, write_adapter


@pytest.mark.parametrize("backend", get_args(BnbBackend))
@pytest.mark.parametrize("kind", get_args(BnbKind))
def test_what_is_written_is_read(kind: BnbKind, backend: BnbBackend, tmp_path: Path) -> None:
    write_train_record(tmp_path, kind, "org/name", backend, {"device": "any"})
    assert read_train_record(tmp_path) == TrainRecord(trained_on=kind, base="org/name", backend=backend)
    assert json.loads((tmp_path / "qconv-train.json").read_text()) == {
        "format": 1,
        "trained_on": kind,
        "base": "org/name",
        "backend": backend,
        "device": "any",
    }
    assert [file.name for file in tmp_path.iterdir()] == ["qconv-train.json"]
    adapter = load_adapter(write_adapter(tmp_path), toy_base())
    assert (adapter.trained_on, adapter.backend) == (kind, backend)


def test_no_record(tmp_path: Path) -> None:
    assert read_train_record(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "not a readable JSON file"),
        ("{", "not a readable JSON file"),
        ("[" * 100_000, "not a readable JSON file"),
        ("[]", "expected a JSON object, found list"),
        ("{}", 'expected "format": 1, found None'),
        ('{"format": 2, "trained_on": "nf4"}', "newer qconv"),
        ('{"format": true, "trained_on": "nf4"}', 'expected "format": 1, found True'),
        ('{"format": 1}', "nf4-dq"),
        ('{"format": 1, "trained_on": "int8"}', "found 'int8'"),
        ('{"format": 1, "trained_on": ["nf4"]}', "found ['nf4']"),
        ('{"format": 1, "trained_on": "nf4", "base": 5}', 'expected "base" to be a string, found 5'),
    ],
)
def test_damaged_records(text: str, word: str, tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / TRAIN_RECORD_NAME).write_text(text)
    with pytest.raises(AdapterError) as caught:
        load_adapter(tmp_path, toy_base())
    assert word in str(caught.value)
    assert TRAIN_RECORD_NAME in str(caught.value)


def test_record_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / TRAIN_RECORD_NAME).write_bytes(b"\xff\xfe{}")
    with pytest.raises(AdapterError, match="not a readable JSON file"):
        read_train_record(tmp_path)


def test_written_over_an_older_record(tmp_path: Path) -> None:
    first: Any = "nf4"
    write_train_record(tmp_path, first, "a")
    write_train_record(tmp_path, "16bit", "b")
    assert read_train_record(tmp_path) == TrainRecord(trained_on="16bit", base="b")
