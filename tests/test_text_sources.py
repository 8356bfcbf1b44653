"""Where text comes from: embedded, files and data sets; the shapes of rows; what is refused."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qconv.corpus import calibration_digest, load_documents, load_tokenizer
from qconv.errors import CalibrationError
from qconv.text_rows import BadRowError, common_shape, read_row
from qconv.text_sources import EMBEDDED
from tests.conftest import TINY_LLAMA

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT_TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}"
    "{% if message['role'] == 'critic' %}{{ raise_exception('no critics') }}{% endif %}"
    "<{{ message['role'] }} {{ message | length }}>{{ message['content'] or '' }}"
    "{{ message.tool_calls | tojson if message.tool_calls }}{{ eos_token }}\n{% endfor %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who sails?"},
    {"role": "assistant", "content": "Ishmael {does}."},
]
SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "Who sails?"},
    {"from": "gpt", "value": "Ishmael {does}."},
]
WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
Name {it}.

### Input:
a {input} whale

### Response:Moby"""
WITHOUT_INPUT = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
Name {it}.

### Response:Moby"""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(TINY_LLAMA)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_lines(file: Path, rows: list[Any]) -> str:
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return str(file)


def write_any(file: Path, rows: list[Any]) -> str:
    """The rows in the format of the file's suffix, by its own library."""
    if file.suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow", reason="pyarrow writes the Parquet files of these tests")
        pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows), file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows, indent=1))
    else:
        write_lines(file, rows)
    return str(file)


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
    prose = load_documents("default-prose")
    assert load_documents("default")[: len(prose)].texts == prose.texts
    assert "CHAPTER 86. " in load_documents("default-prose-eval")[0]


def test_txt_paragraphs_are_merged_up_to_4000_characters(tmp_path: Path) -> None:
    paragraphs = ["a" * 1500, "b" * 1500, "c" * 1500, "d" * 5000, "e"]
    file = tmp_path / "text.txt"
    file.write_text("\n\n \n".join(paragraphs) + "\r\n")
    a, b, c, d, e = paragraphs
    documents = load_documents(str(file))
    assert documents.texts == (a + "\n\n" + b, c, d, e)
    assert (documents.shape, documents.rendered, documents.bad_rows) == ("paragraphs", False, {})


def test_jsonl_gives_each_text_as_it_stands(tmp_path: Path) -> None:
    texts = ["one\n\ntwo", " three ", "a line separator \u2028 inside"]
    source = write_lines(tmp_path / "rows.jsonl", [{"text": text, "id": 1} for text in [*texts, "  "]])
    Path(source).write_text("\n" + Path(source).read_text() + "\n \n")  # blank lines are no rows
    documents = load_documents(source)
    assert documents.texts == documents.bodies == tuple(texts)
    assert documents.bad_rows == {"empty field": 1}
    assert documents.sha256 == calibration_digest(texts)
    assert documents.facts() == {
        "source": source,
        "shape": "text",
        "documents": 3,
        "bad_rows": {"empty field": 1},
        "sha256": calibration_digest(texts),
    }
    assert documents.summary() == f"{source}: 3 documents, read as text; passed over 1 x empty field"


SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("messages", {"messages": CHAT, "prompt": "unused", "text": "unused"}),
    ("conversations", {"conversations": SHAREGPT, "text": "unused"}),
    ("prompt and completion (messages)", {"prompt": CHAT[:2], "completion": CHAT[2:], "text": "unused"}),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize(("shape", "row"), SHAPES)
def test_conversations_are_what_the_tokenizer_renders(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, suffix: str, shape: str, row: dict[str, Any]
) -> None:
    documents = load_documents(write_any(tmp_path / f"rows{suffix}", [row, row]), tokenizer)
    expected = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert documents.texts == (expected, expected)
    assert documents.bodies[0] == "Who sails?\n\nIshmael {does}."
    assert (documents.shape, documents.rendered, documents.bad_rows) == (shape, True, {})


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize(
    ("shape", "row", "text"),
    [
        ("text", {"text": "The sea.", "instruction": "i", "output": "o"}, "The sea."),
        ("prompt and completion", {"prompt": "The sky is", "completion": " blue.", "text": "t"}, "The sky is blue."),
        (
            "instruction and output",
            {"instruction": "Name {it}.", "input": "a {input} whale", "output": "Moby"},
            WITH_INPUT,
        ),
        ("instruction and output", {"instruction": "Name {it}.", "input": "", "output": "Moby"}, WITHOUT_INPUT),
        ("instruction and output", {"instruction": "Name {it}.", "input": " \n", "output": "Moby"}, WITHOUT_INPUT),
        ("instruction and output", {"instruction": "Name {it}.", "output": "Moby"}, WITHOUT_INPUT),
    ],
)
def test_plain_rows_need_no_tokenizer(tmp_path: Path, suffix: str, shape: str, row: dict[str, Any], text: str) -> None:
    documents = load_documents(write_any(tmp_path / f"rows{suffix}", [row]))
    assert documents.texts == (text,)
    assert (documents.shape, documents.rendered) == (shape, False)


def test_tools_and_calls_reach_the_template_without_the_nulls_of_tables(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    sail = {"name": "sail", "parameters": {"type": "object"}}
    tools = [{"type": "function", "function": function} for function in (sail, {"name": "rest", "strict": True})]
    call = {"type": "function", "function": {"name": "sail", "arguments": {"to": "Nantucket"}}}
    chat = [{**CHAT[1], "name": "Ahab"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    expected = tokenizer.apply_chat_template(chat, tools=tools, tokenize=False)
    assert "Nantucket" in expected
    rows = [{"messages": chat, "tools": tools}, {"messages": chat, "tools": json.dumps(tools)}]
    for number, row in enumerate(rows):  # Arrow fills the fields that a message lacks with nulls
        assert load_documents(write_any(tmp_path / f"{number}.parquet", [row]), tokenizer).texts == (expected,)
        assert load_documents(write_any(tmp_path / f"{number}.json", [row]), tokenizer).texts == (expected,)


@pytest.mark.parametrize(
    ("line", "reason", "words"),
    [
        ('{"text": "cut', "invalid JSON", "broken JSON"),
        ("[" * 100_000, "invalid JSON", "broken JSON"),
        ("[1, 2]", "not an object", "an object, found list"),
        ('{"content": "x"}', "missing field", "found none"),
        ('{"text": 7}', "wrong type", "found int"),
        ('{"text": null}', "missing field", "found null"),
        ('{"text": NaN}', "NaN", "found NaN"),
        ('{"text": ""}', "empty field", "white space"),
        ('{"text": "\\ud800"}', "half of a surrogate pair", "surrogate"),
    ],
)
def test_bad_rows_are_counted_and_most_of_them_refused(tmp_path: Path, line: str, reason: str, words: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "good"}\n' + line + "\n")
    documents = load_documents(str(file))
    assert (documents.texts, documents.bad_rows) == (("good",), {reason: 1})
    file.write_text('{"text": "good"}\n\n' + (line + "\n") * 2)
    with pytest.raises(CalibrationError, match=words) as caught:
        load_documents(str(file))
    assert f"{file}, line 3: " in str(caught.value)
    assert f"2 of 3 rows are bad (2 x {reason})" in str(caught.value)
    file.write_text(line)
    with pytest.raises(CalibrationError, match=rf"line 1: .*1 of 1 rows are bad \(1 x {reason}\)"):
        load_documents(str(file))


@pytest.mark.parametrize(
    ("messages", "reason", "where"),
    [
        ("Who sails?", "wrong type", "messages: .*found str"),
        ([], "empty field", "messages: .*empty list"),
        (["Who sails?"], "wrong type", r"messages\[0\]: .*found str"),
        ([CHAT[0], {"content": "x"}], "missing field", r"messages\[1\].role"),
        ([{"role": "user"}], "missing field", r"messages\[0\].content"),
        ([{"role": "user", "content": " "}], "empty field", r"messages\[0\].content"),
        ([{"role": "user", "content": math.nan}], "NaN", r"messages\[0\].content"),
        ([{"role": "user", "content": [{"type": "image"}]}], "wrong type", "found list"),
        ([{"from": "narrator", "value": "x"}], "unknown role", "narrator"),
        ([{"role": "critic", "content": "x"}], "refused by the chat template", "no critics"),
        ([{"role": "user", "content": "\ud800"}], "half of a surrogate pair", "surrogate"),
    ],
)
def test_bad_conversations_are_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, messages: Any, reason: str, where: str
) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"messages": CHAT}, {"messages": messages}]))
    assert load_documents(str(file), tokenizer).bad_rows == {reason: 1}
    file.write_text(json.dumps([{"messages": CHAT}, {"messages": messages}, {"messages": messages}]))
    with pytest.raises(CalibrationError, match=where) as caught:
        load_documents(str(file), tokenizer)
    assert f"{file}, row 2: " in str(caught.value)


def test_a_part_of_rendered_documents_is_rendered(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": w}]} for w in "abc"])
    whole = load_documents(source, tokenizer)
    part = whole[1:]
    assert (part.rendered, part.texts, part.bodies) == (True, whole.texts[1:], ("b", "c"))
    assert part.sha256 == calibration_digest(whole.texts[1:]) != whole.sha256


def test_rows_of_another_shape_than_most_are_bad(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows: list[Any] = [{"text": "one"}, {"messages": CHAT}, {"messages": CHAT}, {"messages": None, "text": "two"}]
    source = write_lines(tmp_path / "rows.jsonl", [*rows, {"messages": CHAT}])
    documents = load_documents(source, tokenizer)
    assert (documents.shape, documents.bad_rows, len(documents)) == ("messages", {"missing field": 2}, 3)


def test_conversations_without_a_chat_template_name_the_tokenizer(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [{"messages": CHAT}])
    with pytest.raises(CalibrationError, match="none was given"):
        load_documents(source)
    with pytest.raises(CalibrationError, match="has none") as caught:
        load_documents(source, load_tokenizer(TINY_LLAMA))
    assert str(TINY_LLAMA) in str(caught.value)
    assert source in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b" \n\n", "no text"),
        ("empty.jsonl", b"", "no text"),
        ("empty.json", b" ", "no text"),
        ("none.json", b"[]", "no text"),
        ("object.json", b'{"text": "x"}', "array of objects, found dict"),
        ("lines.json", b'{"text": "x"}\n{"text": "y"}', "broken JSON.*jsonl"),
        ("latin.txt", "caf\xe9 au lait".encode("latin-1"), "UTF-8.*byte 3"),
        ("latin.json", b'["caf\xe9"]', "UTF-8.*byte 5"),
        ("text.csv", b"a,b", "unknown text source"),
        ("missing.txt", None, "no such file"),
        ("missing.parquet", None, "no such file"),
        ("other.jsonl", b'{"words": "x"}', "line 1: expected columns text; messages.*found words"),
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


@pytest.mark.parametrize("source", ["data/rows.csv", "data/none", "data/rows.jsonl:0.5", "elsewhere/rows.txt:x", "sea"])
def test_a_misspelt_path_is_not_asked_of_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it would raise another error
    with pytest.raises(CalibrationError, match="unknown text source"):
        load_documents(source)


def test_parquet_is_read_through_pyarrow_in_order(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"ship {number}" if number % 10 else None for number in range(1000)]
    table = arrow.table({"id": range(1000), "text": arrow.array(texts).dictionary_encode()})
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=64, compression="gzip")
    documents = load_documents(str(tmp_path / "rows.parquet"))
    assert list(documents) == [text for text in texts if text]
    assert documents.bad_rows == {"missing field": 100}


def test_broken_parquet_is_refused(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "rows.parquet"
    file.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(CalibrationError, match="cannot read this as Parquet"):
        load_documents(str(file))
    parquet.write_table(arrow.table({"words": ["x"]}), file)
    with pytest.raises(CalibrationError, match=r"rows\.parquet: expected columns.*found words"):
        load_documents(str(file))
    invalid = arrow.Array.from_buffers(arrow.string(), 1, arrow.array([b"caf\xe9"]).buffers())
    parquet.write_table(arrow.table({"text": invalid}), file)
    with pytest.raises(CalibrationError, match=r"cannot read this as Parquet.*utf-8"):
        load_documents(str(file))


def test_missing_readers_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"")
    for name in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(CalibrationError, match=r'takes pyarrow: pip install "qconv\[datasets\]"'):
        load_documents(str(tmp_path / "rows.parquet"))
    with pytest.raises(CalibrationError, match=r'takes datasets: pip install "qconv\[datasets\]"'):
        load_documents("acme/sea")


@pytest.fixture
def cached_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set in the cache of datasets, as that library left it there after a download."""
    datasets = pytest.importorskip("datasets", reason="datasets writes its own cache")
    rows = {split: write_lines(tmp_path / split, [{"text": f"{split} {n}", "id": n} for n in range(4)])
            for split in ("train", "test")}  # fmt: skip
    datasets.load_dataset("json", data_files=rows, cache_dir=str(tmp_path / "made"))
    made = next(path.parent for path in (tmp_path / "made").rglob("json-train.arrow"))
    for file in made.glob("json-*.arrow"):
        file.rename(file.with_name(file.name.replace("json-", "sea-")))
    place = tmp_path / "cache" / "acme___sea" / "default" / "0.0.0"
    place.mkdir(parents=True)
    made.rename(place / made.name)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return "acme/sea"


def test_data_sets_come_from_the_cache_when_offline(cached_data_set: str) -> None:
    assert list(load_documents(cached_data_set)) == [f"train {number}" for number in range(4)]
    assert list(load_documents(f"{cached_data_set}:test")) == [f"test {number}" for number in range(4)]
    documents = load_documents(f"{cached_data_set}/default:test[:2]")
    assert (list(documents), documents.shape) == (["test 0", "test 1"], "text")
    for source in ("acme/none", f"{cached_data_set}:validation", f"{cached_data_set}/poems"):
        with pytest.raises(CalibrationError, match=r"datasets cannot load this: .*org/name:split") as caught:
            load_documents(source)
        assert str(caught.value).startswith(source)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "tool_calls"]), inner, max_size=4)
    ),
    max_leaves=8,
)
COLUMNS = st.sampled_from(
    ["messages", "conversations", "prompt", "completion", "text", "instruction", "output", "tools"]
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(COLUMNS, JSON, max_size=5) | JSON)
def test_any_row_is_read_or_bad(tokenizer: PreTrainedTokenizerBase, row: Any) -> None:
    try:
        document = read_row(row, common_shape([row]), tokenizer)
    except BadRowError:
        return
    assert document.text.strip()
    assert document.body.strip() or "tool_calls" in str(row)
    assert document.text.encode().decode() == document.text
