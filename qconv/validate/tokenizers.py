"""Whether a candidate turns text into the token ids that its model was trained on.

``tokenizer.json`` is compared part by part, and then both tokenizers read the same texts. What cannot change ids
is passed over: truncation and padding (calibration tools leave theirs behind), the order of keys, the two
spellings of BPE merges (``"a b"`` and ``["a", "b"]``), options at their default.

Severity: error for what changes ids, ends of text, or prompts (vocabulary, merges, added and special tokens,
texts that read differently, the chat template); warning for settings that differ while the texts read the same;
note for what only concerns other uses.

Left out: tokenizers that bring code of their own, and a proof that two differently written normalizers are equal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qconv.corpus import load_tokenizer
from qconv.errors import CheckpointError
from qconv.side_files import VOCABULARY_FILES
from qconv.validate.tokenizer_files import (
    chat_templates,
    end_tokens,
    read_object,
    special_tokens,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Finding = dict[str, Any]
Severity = Literal["error", "warning", "note"]

SETTINGS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
CONFIG_SETTINGS = ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "split_special_tokens")
CONTEXT = 40  # characters of a snippet on either side
_MERGED_INTO_MODEL = ("vocab", "merges", "type")


def compare_tokenizers(
    reference_folder: str | Path, candidate_folder: str | Path, texts: Sequence[str]
) -> list[Finding]:
    """What differs between the tokenizers and chat templates of two model folders, errors first; empty when nothing.

    Args:
        reference_folder: the folder whose tokenizer training used.
        candidate_folder: the folder to judge.
        texts: read with both; the more and the more varied, the surer. May be empty.
    """
    reference, candidate = Path(reference_folder), Path(candidate_folder)
    has = [any((folder / name).is_file() for name in VOCABULARY_FILES) for folder in (reference, candidate)]
    if not has[1]:
        if not has[0]:
            return [
                _finding("note", "tokenizer-missing", "no tokenizer", f"neither {reference} nor {candidate} has one")
            ]
        message = f"{candidate} has no tokenizer ({', '.join(VOCABULARY_FILES[:2])}): copy the one of {reference}"
        return [_finding("error", "tokenizer-missing", "the candidate has no tokenizer", message)]
    try:
        found = _compare(reference, candidate, texts, has[0])
    except CheckpointError as error:
        found = [_finding("error", "tokenizer-unreadable", "a tokenizer cannot be read", str(error))]
    order = {"error": 0, "warning": 1, "note": 2}
    return sorted(found, key=lambda f: order[f["severity"]])


def _compare(reference: Path, candidate: Path, texts: Sequence[str], is_complete: bool) -> list[Finding]:
    """Raises CheckpointError: a file that cannot be read."""
    found = _compare_templates(reference, candidate)
    if not is_complete:
        message = f"{reference} has no tokenizer, so the candidate's could not be compared with it"
        return [*found, _finding("note", "tokenizer-missing", "no tokenizer to compare with", message)]
    reading = _compare_reading(reference, candidate, texts)
    # Settings that differ are an error unless texts were read, and read the same.
    severity: Severity = "warning" if texts and not reading else "error"
    found += reading + _compare_files(reference, candidate, severity)
    return found + _compare_special_tokens(reference, candidate)


def _finding(severity: Severity, code: str, title: str, message: str, files: Sequence[str] = ()) -> Finding:
    return {
        "severity": severity,
        "code": code,
        "title": title,
        "message": message,
        "tensors": [],
        "files": list(files),
    }


def _compare_files(reference: Path, candidate: Path, severity: Severity) -> list[Finding]:
    name = "tokenizer.json"
    paths = [reference / name, candidate / name]
    if not all(path.is_file() for path in paths):
        return _compare_slow_files(reference, candidate)
    if paths[0].read_bytes() == paths[1].read_bytes():
        return []
    old, new = (read_object(path) for path in paths)
    found = [
        _finding("error", "vocabulary-differs", title, message, [name]) for title, message in _vocabulary(old, new)
    ]
    for title, message in _settings(old, new):
        found.append(_finding(severity, "tokenizer-settings-differ", title, f"{message}{_ADVICE}", [name]))
    return found


_ADVICE = "; copy the tokenizer files of the reference, unless the model was trained with these"


def _compare_slow_files(reference: Path, candidate: Path) -> list[Finding]:
    """Vocabularies of other kinds, byte for byte."""
    names = [name for name in (*VOCABULARY_FILES, "merges.txt") if name != "tokenizer.json"]
    found = []
    compared = False
    for name in names:
        paths = [reference / name, candidate / name]
        if not all(path.is_file() for path in paths):
            continue
        compared = True
        if not _same_content(*paths):
            message = f"{name} is another one than in {reference}{_ADVICE}"
            found.append(_finding("error", "vocabulary-differs", f"{name} differs", message, [name]))
    if not compared:
        message = "the two folders keep their tokenizers in different kinds of files; only the texts were compared"
        found.append(_finding("note", "tokenizer-files-differ", "tokenizers are stored differently", message))
    return found


def _same_content(old: Path, new: Path) -> bool:
    contents = old.read_bytes(), new.read_bytes()
    if contents[0] == contents[1]:
        return True
    if old.suffix != ".json":
        return False
    try:
        return bool(json.loads(contents[0]) == json.loads(contents[1]))
    except ValueError:
        return False


def _vocabulary(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Title and message of each difference in model type, vocabulary, merges and added tokens."""
    found = []
    models = [dict(file.get("model") or {}) for file in (old, new)]
    types = [model.get("type") for model in models]
    if types[0] != types[1]:
        return [("another kind of tokenizer", f"model type is {types[1]!r}, the reference has {types[0]!r}{_ADVICE}")]
    words = [_ids(model.get("vocab")) for model in models]
    if words[0] != words[1]:
        found.append(("the vocabulary differs", _first_word(words[0], words[1]) + _ADVICE))
    merges = [_merges(model.get("merges")) for model in models]
    if merges[0] != merges[1]:
        found.append(("the merges differ", _first_item("merge", merges[0], merges[1]) + _ADVICE))
    added = [{str(t.get("content")): _flags(t) for t in file.get("added_tokens") or []} for file in (old, new)]
    if added[0] != added[1]:
        name = next(n for n in (*added[0], *added[1]) if added[0].get(n) != added[1].get(n))
        message = f"{name!r} is {_shown(added[1].get(name))}, the reference has {_shown(added[0].get(name))}{_ADVICE}"
        found.append(("the added tokens differ", message))
    return found


def _settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Title and message of each part that may change how text is cut up."""
    found = []
    for part in SETTINGS:
        values = [_without_defaults(file.get(part)) for file in (old, new)]
        if values[0] != values[1]:
            found.append(
                (f"the {part} differs", f"{part} is {_shown(values[1])}, the reference has {_shown(values[0])}")
            )
    options = [
        {k: v for k, v in dict(file.get("model") or {}).items() if k not in _MERGED_INTO_MODEL} for file in (old, new)
    ]
    plain = [_without_defaults(value) for value in options]
    if plain[0] != plain[1]:
        found.append(
            ("options of the model differ", f"they are {_shown(plain[1])}, the reference has {_shown(plain[0])}")
        )
    return found


def _ids(vocabulary: Any) -> dict[str, Any]:
    """Token -> id; Unigram models list (token, score) pairs by id."""
    if isinstance(vocabulary, list):
        return {str(entry[0]): (index, *entry[1:]) for index, entry in enumerate(vocabulary)}
    return dict(vocabulary or {})


def _merges(merges: Any) -> list[tuple[str, ...]]:
    return [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in merges or []]


def _flags(token: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in token.items() if value is not False and key != "content"}


def _without_defaults(value: Any) -> Any:
    """Nothing, false and empty are what an option that is not there means."""
    if isinstance(value, dict):
        kept = {key: _without_defaults(item) for key, item in value.items()}
        return {key: item for key, item in sorted(kept.items()) if item not in (None, False, "", [], {})}
    return [_without_defaults(item) for item in value] if isinstance(value, list) else value


def _first_word(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    size = "" if len(old) == len(new) else f"{len(new)} entries, the reference has {len(old)}; "
    word = next(w for w in (*old, *new) if old.get(w) != new.get(w))
    return f"{size}{word!r} has id {_shown(new.get(word))}, in the reference {_shown(old.get(word))}"


def _first_item(what: str, old: Sequence[Any], new: Sequence[Any]) -> str:
    size = "" if len(old) == len(new) else f"{len(new)} entries, the reference has {len(old)}; "
    index = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    values = [_shown(list(items[index]) if index < len(items) else None) for items in (new, old)]
    return f"{size}{what} {index} is {values[0]}, in the reference {values[1]}"


def _shown(value: Any) -> str:
    if value is None:
        return "not there"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else text[:157] + "..."


def _compare_special_tokens(reference: Path, candidate: Path) -> list[Finding]:
    found = []
    old, new = special_tokens(reference), special_tokens(candidate)
    for role in sorted(old.keys() | new.keys()):
        if old.get(role) == new.get(role):
            continue
        # Padding and the names of further tokens do not enter the ids of a text that is alone in its row.
        severity: Severity = "error" if role in ("bos_token", "eos_token", "unk_token") else "note"
        message = f"{role} is {_shown(new.get(role))}, the reference has {_shown(old.get(role))}"
        found.append(_finding(severity, "special-tokens-differ", f"{role} differs", message, ["tokenizer_config.json"]))
    ends = [end_tokens(folder) for folder in (reference, candidate)]
    if all(ends) and ends[0] != ends[1]:
        message = (
            f"generation ends at {sorted(ends[1])}, in the reference at {sorted(ends[0])} (eos_token_id in "
            "generation_config.json, or else config.json): answers would run on or be cut; copy it from the reference"
        )
        found.append(
            _finding(
                "error", "special-tokens-differ", "text ends at another token", message, ["generation_config.json"]
            )
        )
    configs = [read_object(folder / "tokenizer_config.json", missing_ok=True) for folder in (reference, candidate)]
    for key in CONFIG_SETTINGS:
        values = [config.get(key) for config in configs]
        if (values[0] or False) != (values[1] or False):
            message = f"{key} is {_shown(values[1])}, the reference has {_shown(values[0])}"
            found.append(
                _finding("note", "tokenizer-settings-differ", f"{key} differs", message, ["tokenizer_config.json"])
            )
    return found


def _compare_templates(reference: Path, candidate: Path) -> list[Finding]:
    old, new = chat_templates(reference), chat_templates(candidate)
    if old == new:
        return []
    if not old:
        message = f"{candidate} has a chat template, {reference} has none"
        return [_finding("note", "chat-template-differs", "a chat template was added", message)]
    if not new:
        message = f"{candidate} has no chat template: chat prompts fail or fall back to another format; copy it"
        return [_finding("error", "chat-template-differs", "the chat template is missing", message)]
    name = next(n for n in (*old, *new) if old.get(n) != new.get(n))
    a, b = old.get(name, ""), new.get(name, "")
    index = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    parts = [json.dumps(t[max(0, index - CONTEXT) : index + CONTEXT], ensure_ascii=False) for t in (b, a)]
    message = (
        f"template {name!r} differs from character {index} on: {parts[0]}, in the reference {parts[1]}; prompts would "
        "not be those of training: copy the template of the reference"
    )
    return [_finding("error", "chat-template-differs", "the chat template differs", message)]


def _compare_reading(reference: Path, candidate: Path, texts: Sequence[str]) -> list[Finding]:
    """The first text that the two read differently."""
    if not texts:
        return []
    old, new = load_tokenizer(reference), load_tokenizer(candidate)
    differing = 0
    first = ""
    for number, text in enumerate(texts):
        ids = [_read(tokenizer, text) for tokenizer in (old, new)]
        if ids[0] == ids[1]:
            continue
        differing += 1
        first = first or _first_token(number, text, ids, (old, new))
    if not differing:
        return []
    message = f"{differing} of {len(texts)} texts get other token ids. {first}{_ADVICE}"
    return [_finding("error", "tokenization-differs", "the same text gives other token ids", message)]


def _read(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return [int(i) for i in tokenizer(text, verbose=False)["input_ids"]]


def _first_token(
    number: int, text: str, ids: Sequence[list[int]], tokenizers: Sequence[PreTrainedTokenizerBase]
) -> str:
    index = next((i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), min(map(len, ids)))
    shown = []
    for tokens, tokenizer in zip(ids, tokenizers, strict=True):
        token = tokens[index] if index < len(tokens) else None
        shown.append("the end" if token is None else f"{token} {tokenizer.convert_ids_to_tokens(token)!r}")
    before = tokenizers[0].decode(ids[0][:index], skip_special_tokens=True)
    place = len(before) if text.startswith(before) else max(0, text.find(before[-CONTEXT:]) + len(before[-CONTEXT:]))
    snippet = json.dumps(text[max(0, place - CONTEXT) : place + CONTEXT], ensure_ascii=False)
    return f"First in text {number + 1}, near {snippet}: token {index} is {shown[1]}, in the reference {shown[0]}"
