"""Several sources of text with weights."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qconv.corpus import load_documents, load_tokenizer, pack_rows
from qconv.errors import CalibrationError
from qconv.mixture import load_mixture, pack_mixture, split_weight
from tests.conftest import TINY_LLAMA


def write(folder: Path, name: str, word: str, count: int) -> str:
    (folder / name).write_text("\n".join(json.dumps({"text": f"{word} {n}. " * 8}) for n in range(count)))
    return str(folder / name)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("default", ("default", None)),
        ("default:0.3", ("default", 0.3)),
        ("train.jsonl:7", ("train.jsonl", 7.0)),
        ("org/name:train", ("org/name:train", None)),
        ("org/name:train:1e-1", ("org/name:train", 0.1)),
    ],
)
def test_weights_are_behind_the_last_colon(source: str, expected: tuple[str, float | None]) -> None:
    assert split_weight(source) == expected


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_a_weight_is_positive_and_finite(weight: str) -> None:
    with pytest.raises(CalibrationError, match=f"positive number.*found {weight}"):
        split_weight(f"default:{weight}")


def test_a_path_with_a_colon_is_a_path(tmp_path: Path) -> None:
    source = write(tmp_path, "rows:0.5", "sea", 1)
    assert split_weight(source) == (source, None)
    assert split_weight(source + ":2") == (source, 2.0)


def test_one_source_is_packed_as_ever() -> None:
    tokenizer = load_tokenizer(TINY_LLAMA)
    mixture = load_mixture(["default-prose-eval"])
    documents = load_documents("default-prose-eval")
    rows, expected = pack_mixture(mixture, tokenizer, 6, 64, 5), pack_rows(documents, tokenizer, 6, 64, 5)
    assert torch.equal(rows.ids_TS, expected.ids_TS)
    assert torch.equal(rows.documents_TS, expected.documents_TS)
    assert mixture.sha256 == documents.sha256
    assert mixture.facts() == [{**documents.facts(), "weight": 1.0}]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.2, 5), min_size=2, max_size=2), st.integers(8, 40), st.integers(0, 9))
def test_shares_of_rows_are_the_weights(weights: list[float], num_samples: int, seed: int) -> None:
    tokenizer = load_tokenizer(TINY_LLAMA)
    names = ["default-prose", "default-prose-eval"]
    if min(weights) / sum(weights) * num_samples < 1:
        return
    mixture = load_mixture([f"{name}:{weight!r}" for name, weight in zip(names, weights, strict=True)])
    rows = pack_mixture(mixture, tokenizer, num_samples, 16, seed)
    again = pack_mixture(mixture, tokenizer, num_samples, 16, seed)
    assert torch.equal(rows.ids_TS, again.ids_TS)
    assert rows.ids_TS.shape == (num_samples, 16)
    border = len(mixture.parts[0])
    second_T = rows.documents_TS[:, 0] >= border
    assert torch.equal(second_T, rows.documents_TS[:, -1] >= border)
    for part, own_T, first, weight in zip(mixture.parts, (~second_T, second_T), (0, border), weights, strict=True):
        count = int(own_T.sum())
        assert abs(count - weight / sum(weights) * num_samples) < 1
        alone = pack_rows(part, tokenizer, count, 16, seed)
        assert torch.equal(rows.ids_TS[own_T], alone.ids_TS)
        assert torch.equal(rows.documents_TS[own_T] - first, alone.documents_TS)


def test_rows_of_the_sources_alternate(tmp_path: Path) -> None:
    sources = [write(tmp_path, "a.jsonl", "sea", 40) + ":3", write(tmp_path, "b.jsonl", "land", 40) + ":1"]
    rows = pack_mixture(load_mixture(sources), load_tokenizer(TINY_LLAMA), 16, 16, 0)
    of_b = (rows.documents_TS[:, 0] >= 40).tolist()
    assert [sum(of_b[start : start + 4]) for start in range(0, 16, 4)] == [1, 1, 1, 1]


def test_no_weights_are_equal_shares_and_the_digest_knows_weights(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a.jsonl", "sea", 3), write(tmp_path, "b.jsonl", "land", 3)
    assert load_mixture([a, b]).weights == (0.5, 0.5)
    assert load_mixture([f"{a}:1", f"{b}:1"]).sha256 == load_mixture([a, b]).sha256
    digests = [load_mixture(s).sha256 for s in ([a, b], [b, a], [a], [b], [f"{a}:1", f"{b}:2"])]
    assert len(set(digests)) == 5
    assert "75.0% of the rows" in load_mixture([f"{a}:3", f"{b}:1"]).summary()


def test_fewer_rows_keep_the_shares(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TINY_LLAMA)
    short, long = write(tmp_path, "short.jsonl", "sea", 4), write(tmp_path, "long.jsonl", "land", 400)
    most = len(pack_rows(load_documents(short), tokenizer, 10**6, 16, 0, allow_fewer=True).ids_TS)
    mixture = load_mixture([f"{short}:0.25", f"{long}:0.75"])
    rows = pack_mixture(mixture, tokenizer, 10**5, 16, 0, allow_fewer=True)
    counts = Counter((rows.documents_TS[:, 0] >= 4).tolist())
    assert counts[False] == most
    assert abs(counts[True] - 3 * most) <= 2
    with pytest.raises(CalibrationError, match=r"short\.jsonl: 250 rows of 16 tokens need"):
        pack_mixture(mixture, tokenizer, 1000, 16, 0)


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ([], "at least one"),
        (["default", "default"], "default: named more than once"),
        (["default:1", "default-prose"], "default-prose: has no weight"),
    ],
)
def test_contradicting_mixtures_are_refused(sources: list[str], words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        load_mixture(sources)


def test_a_share_of_no_row_is_refused() -> None:
    mixture = load_mixture(["default-prose:0.99", "default-prose-eval:0.01"])
    with pytest.raises(CalibrationError, match=r"default-prose-eval: its weight, 1\.00% of all, is not one row of 16"):
        pack_mixture(mixture, load_tokenizer(TINY_LLAMA), 16, 16, 0)
