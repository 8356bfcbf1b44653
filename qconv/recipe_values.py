"""The kinds of values in a recipe: each reads one from its place, and says in JSON schema what it reads.

What is written is read as YAML 1.2 would: ``1e-4`` is a number, ``010`` and ``yes`` are refused where YAML 1.1 reads 8
and true. A relative path counts from the recipe's folder, and a file that is named must be there, so that nothing is
found missing after hours of training. Environment variables are not expanded; a leading ``~`` is.

Imports no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconv.config import HUB_ID, parse_size
from qconv.mixture import split_weight
from qconv.nodes import Node
from qconv.overrides import check_pattern
from qconv.quantization_config import parse_budget
from qconv.suggest import did_you_mean, did_you_mean_path
from qconv.targets import MIXED_TARGETS
from qconv.text_sources import EMBEDDED, SUFFIXES

_WHOLE = re.compile(r"[+-]?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_TRUE_AND_FALSE = ("true", "false")


@dataclass(frozen=True)
class Kind:
    """How a value is read, and the JSON schema of what can be."""

    read: Callable[[Node], Any]
    schema: Mapping[str, Any]


def choice(words: Iterable[str | int]) -> Kind:
    """One of a few words."""
    known = {str(word): word for word in words}

    def read(node: Node) -> Any:
        if node.text() not in known:
            hint = did_you_mean(node.text(), known) or f"; expected {', '.join(known)}"
            raise node.error(f"no such choice: {node.text()!r}{hint}")
        return known[node.text()]

    return Kind(read, {"enum": list(known.values())})


def _whole(node: Node) -> int:
    return int(_numeral(node, _WHOLE, "a whole number"))


def _rank(node: Node) -> int | str:
    return "auto" if node.content == "auto" else _whole(node)


def _width(node: Node) -> int | str:
    return str(node.content) if node.content in MIXED_TARGETS else _whole(node)


def _budget(node: Node) -> float:
    if isinstance(node.content, str) and node.content.endswith("bpw"):
        with node.blamed():
            return parse_budget(node.content)
    return _number(node)


def _number(node: Node) -> float:
    text = _numeral(node, _NUMBER, "a number")
    return int(text) if _WHOLE.fullmatch(text) else float(text)


def _numeral(node: Node, pattern: re.Pattern[str], expected: str) -> str:
    if not isinstance(node.content, str) or node.quoted or not pattern.fullmatch(node.content):
        raise node.error(f"expected {expected}, got {node.kind}{' in quotes' if node.quoted else ''}")
    return node.content


def _switch(node: Node) -> bool:
    value = node.switch()
    if node.word.lower() not in _TRUE_AND_FALSE:  # what reads YAML 1.2, as editors do, takes it for text
        raise node.error(f"write {str(value).lower()}; YAML readers disagree on what {node.word} means")
    return value


def _size(node: Node) -> int:
    with node.blamed():
        return parse_size(node.text())


def _located(node: Node) -> str:
    """The text as a path; beside the recipe, unless it is absolute."""
    text = os.path.expanduser(node.text())
    if not text:
        raise node.error("expected a path, got empty text")
    return text if node.folder == Path() or os.path.isabs(text) else os.path.normpath(node.folder / text)


def _says_path(text: str) -> bool:
    return text.startswith(("/", "./", "../", "~")) or text in (".", "..")


def _existing(node: Node, what: str) -> str:
    path = _located(node)
    if not (os.path.isdir(path) if what == "folder" else os.path.isfile(path)):
        raise node.error(f"{path}: there is no such {what}{did_you_mean_path(Path(path))}")
    return path


def _model(node: Node) -> str:
    """A folder, where there is one; otherwise a hub id."""
    text = node.text()
    if os.path.exists(_located(node)) or _says_path(text) or not HUB_ID.fullmatch(text):
        return _existing(node, "folder")
    return text


def _source(node: Node) -> str:
    """Text, as `text_sources.load_documents` takes it."""
    text = node.text()
    if text in EMBEDDED:
        return text
    if os.path.exists(_located(node)) or _says_path(text) or text.endswith(SUFFIXES) or "/" not in text:
        path = _located(node)
        if not os.path.exists(path):
            hint = did_you_mean(text, EMBEDDED) or did_you_mean_path(Path(path))
            raise node.error(f"{path}: there is no such file, embedded text ({', '.join(EMBEDDED)}) or data set{hint}")
        return path
    return text


def _weighted_source(node: Node) -> str:
    with node.blamed():
        name, weight = split_weight(node.text())
    if os.path.exists(_located(node)):
        return _located(node)
    found = _source(node.having(name))
    return found if weight is None else f"{found}{node.text().removeprefix(name)}"


def _prompts(node: Node) -> str:
    return "default" if node.text() == "default" else _existing(node, "file")


def _task(node: Node) -> str:
    return _existing(node, "file") if node.text().endswith((".yaml", ".yml")) else node.text()


def _text(node: Node) -> str:
    if node.text() == "":
        raise node.error("expected text, got none")
    return node.text()


def _pattern(node: Node) -> str:
    text = _text(node)
    with node.blamed():
        check_pattern(text)
    return text


_STRING = {"type": "string", "minLength": 1}

TEXT = Kind(_text, _STRING)
WHOLE = Kind(_whole, {"type": "integer"})
RANK = Kind(_rank, {"type": ["integer", "string"], "pattern": "^auto$"})
WIDTH = Kind(_width, {"anyOf": [{"type": "integer"}, {"enum": list(MIXED_TARGETS)}]})
NUMBER = Kind(_number, {"type": "number"})
BUDGET = Kind(_budget, {"type": ["number", "string"], "pattern": r"^\d+(\.\d*)?\s*bpw$"})
SWITCH = Kind(_switch, {"type": "boolean"})
SIZE = Kind(
    _size,
    {"type": ["integer", "string"], "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*([kKmMgG][iI]?|[tT])?[bB]?\s*$", "minimum": 0},
)
PATH = Kind(lambda node: Path(_located(node)), _STRING)
FOLDER = Kind(lambda node: Path(_existing(node, "folder")), _STRING)
FILE = Kind(lambda node: Path(_existing(node, "file")), _STRING)
MODEL = Kind(_model, _STRING)
SOURCE = Kind(_source, _STRING)
WEIGHTED_SOURCE = Kind(_weighted_source, _STRING)
PROMPTS = Kind(_prompts, _STRING)
TASK = Kind(_task, _STRING)
PATTERN = Kind(_pattern, _STRING)
