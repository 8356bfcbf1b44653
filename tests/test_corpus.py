"""Text sources, the split between calibration and evaluation, and packing into token rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qconv.corpus import (
    EMBEDDED,
    calibration_digest,
    check_disjoint,
    load_documents,
    load_tokenizer,
    pack_tokens,
)
from qconv.errors import CalibrationError, CheckpointError
from qconv.side_files import tokenizer_files
from tests.conftest import TINY_LLAMA


def test_default_split_shares_no_text() -> None:
    check_disjoint(load_documents("default"), load_documents("default-eval"))


def test_default_has_prose_and_speeches_and_evaluation_has_the_later_chapters() -> None:
    text = "\n".join(load_documents("default"))
    held_out = "\n".join(load_documents("default-eval"))
    assert "Call me Ishmael" in text
    assert "Fellow-Citizens of the Senate and House of Representatives" in text
    for number in range(1, 101):
        assert (f"CHAPTER {number}. " in text) == (number <= 85)
        assert (f"CHAPTER {number}. " in held_out) == (number > 85)
    assert len(text) > 2_900_000
    assert len(held_out) > 400_000


@pytest.mark.parametrize("source", EMBEDDED)
def test_embedded_documents_are_never_empty_nor_long(source: str) -> None:
    lengths = [len(document) for document in load_documents(source)]
    assert min(lengths) > 0
    assert max(lengths) <= 4000


def test_prose_sources_are_the_prose_part_of_the_default() -> None:
    assert load_documents("default")[: len(load_documents("default-prose"))] == load_documents("default-prose")
    assert "CHAPTER 86. " in load_documents("default-prose-eval")[0]


def test_txt_paragraphs_are_merged_up_to_4000_characters(tmp_path: Path) -> None:
    paragraphs = ["a" * 1500, "b" * 1500, "c" * 1500, "d" * 5000, "e"]
    file = tmp_path / "text.txt"
    file.write_text("\n\n \n".join(paragraphs) + "\r\n")
    a, b, c, d, e = paragraphs
    assert load_documents(str(file)) == [a + "\n\n" + b, c, d, e]


def test_jsonl_gives_each_text_as_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    texts = ["one\n\ntwo", " three ", "a line separator \u2028 inside"]
    file.write_text("\n".join(json.dumps({"text": t, "id": 1}, ensure_ascii=False) for t in [*texts, "  "]) + "\n\n")
    assert load_documents(str(file)) == texts


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "cut', "broken JSON"),
        ("[1, 2]", "an object"),
        ('{"content": "x"}', "found none"),
        ('{"text": 7}', "found int"),
        ('{"text": null}', "found NoneType"),
        ('{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_bad_jsonl_row_is_named(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(CalibrationError, match=words) as caught:
        load_documents(str(file))
    assert f"{file}, line 2" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b" \n\n", "no text"),
        ("empty.jsonl", b"", "no text"),
        ("latin.txt", "caf\xe9 au lait".encode("latin-1"), "UTF-8.*byte 3"),
        ("text.csv", b"a,b", "unknown text source"),
        ("missing.txt", None, "no such file"),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CalibrationError, match=words) as caught:
        load_documents(str(file))
    assert str(file) in str(caught.value)


def test_a_folder_is_not_a_text(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(CalibrationError, match="cannot be read"):
        load_documents(str(tmp_path / "folder.txt"))


def test_packing_one_document_is_tokenizing_it() -> None:
    tokenizer = load_tokenizer(TINY_LLAMA)
    text = load_documents("default")[0]
    rows = pack_tokens([text], tokenizer, 2, 100, seed=0)
    assert rows.dtype == torch.int64
    assert rows.flatten().tolist() == tokenizer(text)["input_ids"][:200]


def test_packing_uses_each_document_once_and_ends_it_with_eos() -> None:
    tokenizer = load_tokenizer(TINY_LLAMA)
    documents = [f"The ship number {number} went to sea." for number in range(20)]
    expected = sorted(tuple(tokenizer(document)["input_ids"]) for document in documents)
    total = sum(len(ids) + 1 for ids in expected)
    stream = pack_tokens(documents, tokenizer, 1, total, seed=3).flatten().tolist()
    found, current = [], []
    for token in stream:
        if token == tokenizer.eos_token_id:
            found.append(tuple(current))
            current = []
        else:
            current.append(token)
    assert current == []
    assert sorted(found) == expected


def test_packing_adds_bos_where_the_tokenizer_does() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(TINY_LLAMA)
    plain = pack_tokens(["one", "two"], tokenizer, 1, 4, seed=0).flatten().tolist()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    first = pack_tokens(["one", "two"], tokenizer, 1, 6, seed=0).flatten().tolist()
    assert tokenizer.bos_token_id not in plain
    assert [first[0], first.count(tokenizer.bos_token_id)] == [tokenizer.bos_token_id, 2]


def test_packing_leaves_the_tokenizer_as_it_is(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TINY_LLAMA)
    tokenizer.backend_tokenizer.enable_truncation(max_length=16)
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(tmp_path / "before")
    text = load_documents("default")[0]
    rows = pack_tokens([text], tokenizer, 1, 64, seed=0)  # more than the truncation would have let through
    tokenizer.save_pretrained(tmp_path / "after")
    assert rows.shape == (1, 64)
    for file in sorted((tmp_path / "before").iterdir()):
        assert (tmp_path / "after" / file.name).read_bytes() == file.read_bytes()
    assert '"max_length": 16' in (tmp_path / "after" / "tokenizer.json").read_text()


def test_the_seed_decides_the_rows() -> None:
    tokenizer = load_tokenizer(TINY_LLAMA)
    documents = load_documents("default-prose-eval")
    first, again, other = (pack_tokens(documents, tokenizer, 4, 64, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("seed", range(20))
def test_a_small_sample_of_the_default_has_prose_and_speeches(seed: int) -> None:
    documents = load_documents("default")
    num_prose = len(load_documents("default-prose"))
    marked = ["a" if index < num_prose else "b" for index in range(len(documents))]
    tokenizer = load_tokenizer(TINY_LLAMA)
    sample = pack_tokens(marked, tokenizer, 1, 16, seed).flatten().tolist()  # eight documents, each with its EOS
    share = sample[::2].count(tokenizer("a")["input_ids"][0]) / 8
    assert 0.125 <= share <= 0.5  # of all documents 30 % are prose


def test_too_little_text_names_both_counts() -> None:
    tokenizer = load_tokenizer(TINY_LLAMA)
    num_tokens = len(tokenizer("A short text.")["input_ids"]) + 1
    with pytest.raises(CalibrationError, match=f"need 512 tokens, the text has {num_tokens}"):
        pack_tokens(["A short text."], tokenizer, 4, 128, seed=0)


def test_fewer_rows_are_given_only_where_allowed() -> None:
    tokenizer = load_tokenizer(TINY_LLAMA)
    documents = ["The sea, the sea. " * 20]
    rows = pack_tokens(documents, tokenizer, 1000, 16, seed=0, allow_fewer=True)
    assert rows.numel() == (len(tokenizer(documents[0])["input_ids"]) + 1) // 16 * 16
    with pytest.raises(CalibrationError, match="ask for at most 0 rows"):
        pack_tokens(["x"], tokenizer, 1000, 16, seed=0, allow_fewer=True)


def test_digests_tell_content_and_boundaries_apart() -> None:
    rows = torch.arange(12).reshape(3, 4)
    contents = [["ab", "c"], ["a", "bc"], ["abc"], rows, rows.reshape(4, 3), rows + 1]
    digests = {calibration_digest(content) for content in contents}
    assert len(digests) == len(contents)
    assert calibration_digest(rows.clone()) == calibration_digest(rows)
    assert all(len(digest) == 64 for digest in digests)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(159, 400))
def test_a_copied_run_is_found_wherever_it_lies(start: int, place: int, length: int) -> None:
    source = load_documents("default-prose")[5]
    run = source[min(start, len(source) - length) :][:length]
    held_out = load_documents("default-prose-eval")[5]
    place = min(place, len(held_out))
    collapsed = " ".join(run.split())
    if len(collapsed) < 159:
        return
    with pytest.raises(CalibrationError, match="share text"):
        check_disjoint([source], [held_out[:place] + run.replace(" ", "\n") + held_out[place:]])


def test_common_phrases_are_not_shared_text() -> None:
    phrase = load_documents("default-prose")[5][:100]
    check_disjoint([phrase + " left and more."], ["Before it: " + phrase])


def test_a_short_document_in_both_is_found() -> None:
    with pytest.raises(CalibrationError, match="Same words"):
        check_disjoint(["Other.", "Same  words."], ["Same words."])


def test_nothing_to_compare_is_disjoint() -> None:
    check_disjoint([], [])
    check_disjoint(["a" * 500], [""])


def test_missing_tokenizer_names_folder_and_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((TINY_LLAMA / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"has no tokenizer.*tokenizer\.json") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_broken_tokenizer_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    with pytest.raises(CheckpointError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path)


def test_tokenizer_files_are_those_of_the_tokenizer() -> None:
    assert {file.name for file in tokenizer_files(TINY_LLAMA)} == {"tokenizer.json", "tokenizer_config.json"}
