"""The split between calibration and evaluation, and packing into token rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qconv.corpus import (
    Documents,
    calibration_digest,
    check_disjoint,
    load_documents,
    load_tokenizer,
    pack_rows,
    pack_tokens,
)
from qconv.errors import CalibrationError, CheckpointError
from qconv.side_files import tokenizer_files
from tests.conftest import TINY_LLAMA

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}"
)


def test_default_split_shares_no_text() -> None:
    check_disjoint(load_documents("default"), load_documents("default-eval"))


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


def _bos_tokenizer() -> PreTrainedTokenizerBase:
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(TINY_LLAMA)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def test_packing_adds_bos_where_the_tokenizer_does() -> None:
    plain = pack_tokens(["one", "two"], load_tokenizer(TINY_LLAMA), 1, 4, seed=0).flatten().tolist()
    tokenizer = _bos_tokenizer()
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


def test_what_a_template_rendered_gets_no_special_tokens(tmp_path: Path) -> None:
    tokenizer = _bos_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    chats = [[{"role": "user", "content": f"Who sails ship {n}?"}] for n in range(5)]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    expected = [tokenizer.apply_chat_template(chat)["input_ids"] for chat in chats]
    rows = pack_rows(load_documents(str(file), tokenizer), tokenizer, 1, sum(map(len, expected)), seed=4)
    ids, origins = rows.ids_TS[0], rows.documents_TS[0]
    assert [ids[origins == index].tolist() for index in range(5)] == expected
    assert ids.tolist().count(tokenizer.bos_token_id) == 5


def test_text_with_its_own_bos_gets_no_second() -> None:
    tokenizer = _bos_tokenizer()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    word = tokenizer("sea", add_special_tokens=False)["input_ids"]
    for text in ("sea", "<s>sea", "sea</s>", "<s>sea</s>"):
        row = pack_tokens([text], tokenizer, 1, len(word) + 2, seed=0)
        assert row.flatten().tolist() == [bos, *word, eos]


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
    with pytest.raises(CalibrationError, match="ask for shorter rows, or give more text"):
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


@pytest.mark.parametrize("shape", ["chat", "alpaca"])
def test_templates_and_fixed_prompts_are_not_shared_text(tmp_path: Path, shape: str) -> None:
    tokenizer = load_tokenizer(TINY_LLAMA)
    tokenizer.chat_template = "Instructions that are the same for all. " * 8 + CHAT_TEMPLATE
    shared = "One run of words that is long enough to be found by its windows. " * 4

    def source(name: str, *texts: str) -> Documents:
        rows = [
            {"messages": [{"role": "system", "content": "Be kind. " * 40}, {"role": "user", "content": text}]}
            if shape == "chat"
            else {"instruction": text, "input": "the sea", "output": "It is so."}
            for text in texts
        ]
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return load_documents(str(tmp_path / name), tokenizer)

    left, right = source("left.jsonl", "Who sails?", shared), source("right.jsonl", "Who swims?")
    check_disjoint(left, right)
    with pytest.raises(CalibrationError, match="share text"):
        check_disjoint(left.texts, right.texts)
    with pytest.raises(CalibrationError, match="share text"):
        check_disjoint(left, source("copied.jsonl", "Who swims? " + shared))


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
