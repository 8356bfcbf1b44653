"""Two tokenizers are compared by their files and by what they make of texts; transformers is the judge of both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qconv import corpus
from qconv.validate.tokenizers import compare_tokenizers
from tests.conftest import TINY_LLAMA

Finding = dict[str, Any]
TEXTS = ["Call me Ishmael. Some years ago", "The  state of the Union,\n in 1950: 42% — naïve?"]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


def copy(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copyfile(TINY_LLAMA / name, folder / name)
    return folder


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return copy(tmp_path / "reference")


@pytest.fixture
def candidate(tmp_path: Path) -> Path:
    return copy(tmp_path / "candidate")


def edit(folder: Path, change: Callable[[dict[str, Any]], None], name: str = "tokenizer.json") -> None:
    file = folder / name
    content = json.loads(file.read_text()) if file.exists() else {}
    change(content)
    file.write_text(json.dumps(content))


def codes(found: list[Finding], severity: str = "error") -> list[str]:
    return [f["code"] for f in found if f["severity"] == severity]


def by_code(found: list[Finding], code: str) -> Finding:
    matching = [f for f in found if f["code"] == code]
    assert len(matching) == 1, found
    return matching[0]


def test_the_same_files(reference: Path, candidate: Path) -> None:
    assert compare_tokenizers(reference, candidate, TEXTS) == []
    assert compare_tokenizers(str(reference), str(candidate), []) == []


def test_what_is_harmless_raises_nothing(reference: Path, candidate: Path) -> None:
    """Truncation and padding of a calibration run, the other spelling of merges, the order of keys, defaults."""

    def rewrite(t: dict[str, Any]) -> None:
        t["truncation"] = {"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0}
        t["padding"] = {
            "strategy": {"Fixed": 512},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 1,
            "pad_type_id": 0,
            "pad_token": "</s>",
        }
        merges = t["model"]["merges"]
        assert merges
        t["model"]["merges"] = [m.split(" ", 1) if isinstance(m, str) else " ".join(m) for m in merges]
        t["model"] = dict(reversed(t["model"].items()))
        t["model"].pop("ignore_merges", None)
        t["model"]["dropout"] = None

    edit(candidate, rewrite)
    assert (candidate / "tokenizer.json").read_bytes() != (reference / "tokenizer.json").read_bytes()
    assert compare_tokenizers(reference, candidate, []) == []


def test_a_changed_merge(reference: Path, candidate: Path) -> None:
    first: list[Any] = []

    def swap(t: dict[str, Any]) -> None:
        merges = t["model"]["merges"]
        first.extend(merges[5:7])
        merges[5], merges[6] = merges[6], merges[5]

    edit(candidate, swap)
    finding = by_code(compare_tokenizers(reference, candidate, []), "vocabulary-differs")
    assert finding["severity"] == "error"
    pairs = [json.dumps(m.split(" ", 1) if isinstance(m, str) else m, ensure_ascii=False) for m in first]
    assert f"merge 5 is {pairs[1]}, in the reference {pairs[0]}" in finding["message"]


def test_fewer_merges_are_counted(reference: Path, candidate: Path) -> None:
    total = len(json.loads((candidate / "tokenizer.json").read_text())["model"]["merges"])
    edit(candidate, lambda t: t["model"]["merges"].pop())
    message = by_code(compare_tokenizers(reference, candidate, []), "vocabulary-differs")["message"]
    assert f"{total - 1} entries, the reference has {total}" in message
    assert f"merge {total - 1} is not there" in message


def test_swapped_ids_are_seen_in_files_and_texts(reference: Path, candidate: Path) -> None:
    def swap(t: dict[str, Any]) -> None:
        vocabulary = t["model"]["vocab"]
        vocabulary["I"], vocabulary["C"] = vocabulary["C"], vocabulary["I"]

    edit(candidate, swap)
    found = compare_tokenizers(reference, candidate, ["nothing of the kind", *TEXTS])
    assert codes(found) == ["tokenization-differs", "vocabulary-differs"]
    message = by_code(found, "tokenization-differs")["message"]
    assert message.startswith("1 of 3 texts")
    assert "First in text 2" in message
    assert "Call me Ishmael" in message
    tokenizer = corpus.load_tokenizer(reference)
    ours, theirs = tokenizer.convert_tokens_to_ids("C"), tokenizer.convert_tokens_to_ids("I")
    assert f"is {theirs} 'C', in the reference {ours} 'C'" in message


def test_snippet_is_where_the_difference_is(reference: Path, candidate: Path) -> None:
    def swap(t: dict[str, Any]) -> None:
        vocabulary = t["model"]["vocab"]
        vocabulary["@"], vocabulary["#"] = vocabulary["#"], vocabulary["@"]

    edit(candidate, swap)
    text = "begin " + "word " * 100 + "here @ it is " + "word " * 100
    message = by_code(compare_tokenizers(reference, candidate, [text]), "tokenization-differs")["message"]
    snippet = message.split('near "')[1].split('"')[0]
    assert "here" in snippet
    assert "begin" not in snippet


def test_a_setting_that_changes_ids_is_an_error(reference: Path, candidate: Path) -> None:
    edit(candidate, lambda t: t["pre_tokenizer"].update(add_prefix_space=True))
    found = compare_tokenizers(reference, candidate, TEXTS)
    assert codes(found) == ["tokenization-differs", "tokenizer-settings-differ"]
    assert "the pre_tokenizer differs" in by_code(found, "tokenizer-settings-differ")["title"]
    # Without texts nobody knows.
    assert codes(compare_tokenizers(reference, candidate, [])) == ["tokenizer-settings-differ"]


def test_a_setting_that_the_texts_do_not_show_is_a_warning(reference: Path, candidate: Path) -> None:
    edit(candidate, lambda t: t.update(normalizer={"type": "Replace", "pattern": {"String": "ß"}, "content": "ss"}))
    found = compare_tokenizers(reference, candidate, TEXTS)
    assert (codes(found), codes(found, "warning")) == ([], ["tokenizer-settings-differ"])
    assert codes(compare_tokenizers(reference, candidate, [*TEXTS, "Straße"]))[0] == "tokenization-differs"


def test_a_post_processor_that_adds_a_token(reference: Path, candidate: Path) -> None:
    def add_bos(t: dict[str, Any]) -> None:
        t["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        }

    had = json.loads((candidate / "tokenizer.json").read_text())["post_processor"]
    assert "<s>" not in json.dumps(had)
    edit(candidate, add_bos)
    found = compare_tokenizers(reference, candidate, TEXTS)
    assert codes(found) == ["tokenization-differs", "tokenizer-settings-differ"]
    assert "2 of 2 texts" in by_code(found, "tokenization-differs")["message"]


def test_added_tokens(reference: Path, candidate: Path) -> None:
    def add(t: dict[str, Any]) -> None:
        t["added_tokens"].append({**t["added_tokens"][0], "id": 2048, "content": "<|tool|>"})

    edit(candidate, add)
    finding = by_code(compare_tokenizers(reference, candidate, TEXTS), "vocabulary-differs")
    assert "'<|tool|>' is" in finding["message"]
    assert "the reference has not there" in finding["message"]


def test_another_kind_of_model(reference: Path, candidate: Path) -> None:
    def unigram(t: dict[str, Any]) -> None:
        t["model"] = {"type": "WordLevel", "vocab": t["model"]["vocab"], "unk_token": "<s>"}

    edit(candidate, unigram)
    assert "'WordLevel'" in by_code(compare_tokenizers(reference, candidate, []), "vocabulary-differs")["message"]


@pytest.mark.parametrize(("role", "severity"), [("eos_token", "error"), ("pad_token", "note")])
def test_special_tokens(role: str, severity: str, reference: Path, candidate: Path) -> None:
    edit(candidate, lambda c: c.update({role: {"content": "<s>"}}), "tokenizer_config.json")
    finding = by_code(compare_tokenizers(reference, candidate, []), "special-tokens-differ")
    assert (finding["severity"], finding["title"]) == (severity, f"{role} differs")
    assert '"<s>"' in finding["message"]


def test_special_tokens_may_lie_in_the_map(reference: Path, candidate: Path) -> None:
    """Older versions write them to another file, and as objects."""

    def take(config: dict[str, Any]) -> None:
        moved = {role: {"content": config.pop(role)} for role in ("bos_token", "eos_token")}
        (candidate / "special_tokens_map.json").write_text(json.dumps(moved))

    edit(candidate, take, "tokenizer_config.json")
    assert compare_tokenizers(reference, candidate, []) == []


def test_generation_end(reference: Path, candidate: Path) -> None:
    (reference / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    (candidate / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 1]}))
    assert compare_tokenizers(reference, candidate, []) == []
    (candidate / "generation_config.json").unlink()  # config.json says 1 then
    finding = by_code(compare_tokenizers(reference, candidate, []), "special-tokens-differ")
    assert finding["severity"] == "error"
    assert "ends at [1], in the reference at [1, 7]" in finding["message"]


def write_template(folder: Path, place: str, text: str) -> None:
    if place == "chat_template.jinja":
        (folder / place).write_text(text)
    elif place == "named":
        templates = [{"name": "default", "template": text}]
        edit(folder, lambda c: c.update(chat_template=templates), "tokenizer_config.json")
    else:
        edit(folder, lambda c: c.update(chat_template=text), place)


PLACES = ["chat_template.jinja", "chat_template.json", "tokenizer_config.json", "named"]


@pytest.mark.parametrize("place", PLACES)
def test_a_template_is_the_same_wherever_it_lies(place: str, reference: Path, candidate: Path) -> None:
    write_template(reference, "chat_template.jinja", TEMPLATE + "\n")
    write_template(candidate, place, TEMPLATE)
    assert compare_tokenizers(reference, candidate, TEXTS) == []
    if place != "chat_template.json":  # transformers reads that file for processors alone
        loaded = corpus.load_tokenizer(candidate).chat_template
        assert (loaded["default"] if isinstance(loaded, dict) else loaded) == TEMPLATE


@pytest.mark.parametrize("place", PLACES)
def test_another_template(place: str, reference: Path, candidate: Path) -> None:
    write_template(reference, "tokenizer_config.json", TEMPLATE)
    write_template(candidate, place, TEMPLATE.replace("<|", "[|"))
    finding = by_code(compare_tokenizers(reference, candidate, []), "chat-template-differs")
    assert finding["severity"] == "error"
    assert f"from character {TEMPLATE.index('<|')} on" in finding["message"]


def test_a_file_of_its_own_goes_before_the_config(reference: Path, candidate: Path) -> None:
    """As transformers reads it."""
    write_template(reference, "chat_template.jinja", TEMPLATE)
    write_template(candidate, "chat_template.jinja", "other")
    write_template(candidate, "tokenizer_config.json", TEMPLATE)
    assert corpus.load_tokenizer(candidate).chat_template == "other"
    assert codes(compare_tokenizers(reference, candidate, [])) == ["chat-template-differs"]


def test_a_template_on_one_side(reference: Path, candidate: Path) -> None:
    write_template(reference, "chat_template.jinja", TEMPLATE)
    lost = by_code(compare_tokenizers(reference, candidate, []), "chat-template-differs")
    added = by_code(compare_tokenizers(candidate, reference, []), "chat-template-differs")
    assert (lost["severity"], added["severity"]) == ("error", "note")


def test_a_tokenizer_on_one_side(reference: Path, candidate: Path) -> None:
    (candidate / "tokenizer.json").unlink()
    lost = compare_tokenizers(reference, candidate, TEXTS)
    assert [(f["severity"], f["code"]) for f in lost] == [("error", "tokenizer-missing")]
    nothing_to_compare = compare_tokenizers(candidate, reference, TEXTS)
    assert [(f["severity"], f["code"]) for f in nothing_to_compare] == [("note", "tokenizer-missing")]
    (reference / "tokenizer.json").unlink()
    assert codes(compare_tokenizers(reference, candidate, TEXTS)) == []


def test_a_damaged_file(reference: Path, candidate: Path) -> None:
    (candidate / "tokenizer.json").write_text('{"version": ')
    found = compare_tokenizers(reference, candidate, [])
    assert "tokenizer-unreadable" in codes(found)
    assert "tokenizer-unreadable" in codes(compare_tokenizers(reference, candidate, TEXTS))
    (candidate / "tokenizer_config.json").write_text("[")
    assert "tokenizer-unreadable" in codes(compare_tokenizers(reference, candidate, []))


def test_sentencepiece_files_are_compared_as_bytes(reference: Path, candidate: Path) -> None:
    for folder in (reference, candidate):
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(b"\x0a\x05model")
    assert compare_tokenizers(reference, candidate, []) == []
    (candidate / "tokenizer.model").write_bytes(b"\x0a\x05other")
    finding = by_code(compare_tokenizers(reference, candidate, []), "vocabulary-differs")
    assert finding["files"] == ["tokenizer.model"]


def test_findings_are_the_reports_own_kind(reference: Path, candidate: Path) -> None:
    (candidate / "tokenizer.json").unlink()
    (finding,) = compare_tokenizers(reference, candidate, TEXTS)
    assert finding.keys() == {"severity", "code", "title", "message", "tensors", "files"}
    json.dumps(finding, allow_nan=False)
