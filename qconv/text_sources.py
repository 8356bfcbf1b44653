"""Text from wherever it lies: embedded, files, and data sets of a hub.

The embedded text is in the public domain: Moby-Dick (1851), chapters 1 to 100, and addresses of
United States presidents to Congress. Chapters 86 to 100 and the last three addresses evaluate; the
rest calibrates and trains, less the paragraphs of older addresses that the last three quote.

Rows (`text_rows`) come from JSON lines, JSON arrays, Parquet (read by pyarrow) and data sets (read by
datasets, which keeps to its cache where HF_HUB_OFFLINE is set); both libraries are in the extra ``datasets``.
A source has one shape of rows, that of most of them. Rows that cannot be used are counted by reason; where
they are more than half, the source is not what it was taken for, and is refused.

Left out: data larger than memory, folders and patterns of files, compressed files.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import lzma
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from qconv.errors import CalibrationError
from qconv.text_rows import CHATS, COLUMNS, EXPECTED, BadRowError, Document, common_shape, one_line, read_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENT_CHARACTERS = 4000  # paragraphs are merged up to this: about a thousand tokens
EMBEDDED: dict[str, tuple[str, ...]] = {
    "default": ("prose-calibration", "speeches-calibration"),
    "default-eval": ("prose-evaluation", "speeches-evaluation"),
    "default-prose": ("prose-calibration",),
    "default-prose-eval": ("prose-evaluation",),
}
PARAGRAPHS = "paragraphs"
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
INSTALL = 'pip install "qconv[datasets]"'
_DATA_SET = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:/(?P<subset>[\w.+-]+))?(?::(?P<split>[\w.+%\[\]:-]+))?")
_SOURCES = f"{', '.join(EMBEDDED)}, a file ({', '.join(SUFFIXES)}), or a data set (org/name or org/name:split)"


@dataclass(frozen=True, eq=False)
class Documents(Sequence[str]):
    """The documents of one source, in its own order; none is empty.

    Attributes:
        source: as it was asked for.
        texts: what a model is shown.
        bodies: the same without the words of chat templates, fixed prompts and system messages.
        shape: ``"paragraphs"``, or the shape of rows (`text_rows`).
        rendered: a chat template wrote the texts, special tokens included: none is to be added.
        bad_rows: rows that were passed over, by reason; the most frequent first.
        sha256: of ``texts`` with their boundaries (hex).
    """

    source: str
    texts: tuple[str, ...]
    bodies: tuple[str, ...]
    shape: str
    rendered: bool
    bad_rows: dict[str, int]
    sha256: str

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Documents: ...
    def __getitem__(self, index: int | slice) -> str | Documents:
        if isinstance(index, int):
            return self.texts[index]
        texts = self.texts[index]  # a part of rendered documents is rendered
        return replace(self, texts=texts, bodies=self.bodies[index], sha256=digest_texts(texts))

    def __len__(self) -> int:
        return len(self.texts)

    def facts(self) -> dict[str, Any]:
        """What a report says of the source; plain values."""
        return {
            "source": self.source,
            "shape": self.shape,
            "documents": len(self.texts),
            "bad_rows": dict(self.bad_rows),
            "sha256": self.sha256,
        }

    def summary(self) -> str:
        """The same in words, one line."""
        passed = f"; passed over {_tally(self.bad_rows)}" if self.bad_rows else ""
        count = f"{len(self.texts)} document{'' if len(self.texts) == 1 else 's'}"
        return f"{self.source}: {count}, read as {self.shape}{passed}"


def load_documents(source: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Documents:
    """The documents of a source.

    Args:
        source: ``"default"`` or ``"default-prose"`` (calibration and training), ``"default-eval"`` or
            ``"default-prose-eval"`` (evaluation), a path, or a data set. In a ``.txt`` file blank lines
            separate paragraphs, and following paragraphs are merged while the document stays within 4000
            characters (a longer paragraph is a document of its own). ``.jsonl`` has an object in a line,
            ``.json`` is an array of objects, ``.parquet`` has a row for each. A data set is ``org/name`` (its
            train split), ``org/name:split``, or ``org/name/subset:split``. What exists as a path is one.
        tokenizer: needed by conversations alone: its chat template renders them.

    Raises:
        CalibrationError: an unknown source; a file that is missing, not UTF-8, malformed, empty or mostly of
            bad rows; a reader that is not installed; conversations without a chat template.
    """
    if source in EMBEDDED:
        texts = [document for name in EMBEDDED[source] for document in _read_embedded(name)]
        return _plain(source, texts)
    file = Path(source)
    if file.suffix == ".txt":
        return _plain(source, list(_merge_paragraphs(_read_text(source))))
    if file.suffix == ".jsonl":
        return _documents(source, "line", list(_json_lines(_read_text(source))), tokenizer)
    if file.suffix == ".json":
        return _documents(source, "row", list(enumerate(_json_array(_read_text(source), source), start=1)), tokenizer)
    if file.suffix == ".parquet":
        return _documents(source, "row", list(enumerate(_parquet_rows(source), start=1)), tokenizer)
    match = _DATA_SET.fullmatch(source)
    if match is None or _names_a_path(match["id"]) or os.path.exists(source):
        raise CalibrationError(f"{source}: unknown text source; expected {_SOURCES}")
    rows = _data_set_rows(source, match["id"], match["subset"], match["split"] or "train")
    return _documents(source, "row", list(enumerate(rows, start=1)), tokenizer)


def _names_a_path(name: str) -> bool:
    """Whether org/name is rather a file: the hub is not asked for a misspelt path."""
    return name.endswith(SUFFIXES) or os.path.isdir(os.path.dirname(name))


def digest_texts(texts: Sequence[str]) -> str:
    """SHA-256 (hex) of texts, each with its length in front, so that boundaries count."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(f"{len(data)}:".encode() + data)
    return digest.hexdigest()


def _plain(source: str, texts: list[str]) -> Documents:
    if not texts:
        raise CalibrationError(f"{source}: has no text; expected {_SOURCES}")
    own = tuple(texts)
    return Documents(source, own, own, PARAGRAPHS, rendered=False, bad_rows={}, sha256=digest_texts(own))


def _documents(
    source: str, unit: str, rows: list[tuple[int, Any]], tokenizer: PreTrainedTokenizerBase | None
) -> Documents:
    """Documents of numbered rows; ``unit`` is what the numbers count."""
    if not rows:
        raise CalibrationError(f"{source}: has no text; expected {_SOURCES}")
    shape = common_shape(row for _, row in rows)
    if shape in CHATS:
        _require_template(source, shape, tokenizer)
    good: list[Document] = []
    bad: list[tuple[int, BadRowError]] = []
    for number, row in rows:
        try:
            good.append(read_row(row, shape, tokenizer))
        except BadRowError as found:
            bad.append((number, found))
    counts = dict(Counter(found.reason for _, found in bad).most_common())
    if not good or 2 * len(bad) > len(rows):
        number, first = bad[0]
        raise CalibrationError(
            f"{source}, {unit} {number}: {first.detail}; {len(bad)} of {len(rows)} rows are bad ({_tally(counts)}): "
            f"expected rows of {shape or EXPECTED}; mend the file, or name another"
        )
    texts = tuple(document.text for document in good)
    return Documents(
        source=source,
        texts=texts,
        bodies=tuple(document.body for document in good),
        shape=shape or "",
        rendered=shape in CHATS,
        bad_rows=counts,
        sha256=digest_texts(texts),
    )


def _require_template(source: str, shape: str | None, tokenizer: PreTrainedTokenizerBase | None) -> None:
    if tokenizer is None:
        raise CalibrationError(f"{source}: has {shape}, which the chat template of a tokenizer renders; none was given")
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            f"{source}: has {shape}, which need a chat template, and the tokenizer in {tokenizer.name_or_path} has "
            "none; put the chat_template.jinja of the model that was trained there, or give rows of text"
        )


def _tally(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in counts.items())


def _read_text(source: str) -> str:
    try:
        return Path(source).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise CalibrationError(f"{source}: no such file; expected {_SOURCES}") from None
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{source}: expected UTF-8 text, found {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise CalibrationError(f"{source}: cannot be read ({error.strerror})") from error


def _json_lines(content: str) -> Iterator[tuple[int, Any]]:
    """Line numbers and values; a line that is not JSON is a `BadRowError`, a blank one no row at all."""
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, BadRowError("invalid JSON", f"expected a JSON object, found broken JSON ({error})")


def _json_array(content: str, source: str) -> list[Any]:
    try:
        value = json.loads(content) if content.strip() else []
    except (ValueError, RecursionError) as error:
        hint = "; an object in each line is a .jsonl file: rename it" if content.lstrip().startswith("{") else ""
        raise CalibrationError(f"{source}: expected a JSON array, found broken JSON ({error}){hint}") from error
    if not isinstance(value, list):
        raise CalibrationError(f"{source}: expected a JSON array of objects, found {type(value).__name__}")
    return value


def _parquet_rows(source: str) -> Iterator[Any]:
    if not os.path.exists(source):
        raise CalibrationError(f"{source}: no such file; expected {_SOURCES}")
    parquet = _installed("pyarrow.parquet", "pyarrow", source)
    try:
        with parquet.ParquetFile(source) as table:
            columns = _known_columns(source, table.schema_arrow.names)
            for batch in table.iter_batches(columns=columns):
                yield from batch.to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's errors, and text that is not UTF-8, are among these
        raise CalibrationError(f"{source}: pyarrow cannot read this as Parquet ({one_line(error)})") from error


def _data_set_rows(source: str, name: str, subset: str | None, split: str) -> Iterator[Any]:
    library = _installed("datasets", "datasets", source)
    try:
        data = library.load_dataset(name, subset, split=split)
    except Exception as error:  # the hub, the cache, the card and the files each have errors of their own
        raise CalibrationError(
            f"{source}: no such file, and datasets cannot load this: {one_line(error)}; "
            "expected org/name, org/name:split or org/name/subset:split, in the cache where HF_HUB_OFFLINE is set"
        ) from error
    yield from data.select_columns(_known_columns(source, data.column_names))


def _installed(module: str, package: str, source: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CalibrationError(f"{source}: reading this takes {package}: {INSTALL} ({error})") from error


def _known_columns(source: str, names: Sequence[str]) -> list[str]:
    known = [name for name in COLUMNS if name in names]
    if not known:
        raise CalibrationError(f"{source}: expected columns {EXPECTED}; found {', '.join(names) or 'none'}")
    return known


def _read_embedded(name: str) -> Iterator[str]:
    data = files("qconv").joinpath("data", f"{name}.txt.xz").read_bytes()
    for chapter in lzma.decompress(data).decode("utf-8").split("\n\n\n"):
        yield from _merge_paragraphs(chapter)


def _merge_paragraphs(text: str) -> Iterator[str]:
    document = ""
    for paragraph in _paragraphs(text):
        if document and len(document) + 2 + len(paragraph) > DOCUMENT_CHARACTERS:
            yield document
            document = ""
        document += ("\n\n" if document else "") + paragraph
    if document:
        yield document


def _paragraphs(text: str) -> Iterator[str]:
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.strip():
            lines.append(line.rstrip())
        elif lines:
            yield "\n".join(lines)
            lines = []
