"""Reads YAML or JSON as text, lists and keyed values that know where they stand, and refuses everything cleverer.

Numbers and dates stay text, for whoever expects one to read: YAML 1.1 would read ``1e-3`` as text, ``010`` as 8 and
``1:30`` as 90. Duplicate keys, which YAML and JSON readers drop silently, are errors: one of two values would be lost.

Imports no torch. Left out: tags, merge keys and several documents in one file; aliases where they are not asked for;
lines of JSON files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

from qconv.errors import QconvError
from qconv.suggest import did_you_mean, did_you_mean_path

MAX_BYTES = 64 * 1024
_MAX_NODES = 10_000  # aliases of aliases multiply

Content: TypeAlias = "dict[str, Node] | list[Node] | str | bool | None"


class PlaceError(QconvError):
    """Something is wrong at a place of a file. Whoever reads the file turns it into an error of its own kind."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A value and where it stands.

    Attributes:
        content: keyed values, a list, text, true or false, or nothing.
        where: the file and, where it is known, the line: ``recipe.yaml:12``.
        path: of keys, ``outputs[0].target``; empty at the top.
        quoted: text that was written in quotes, or as a block.
        word: how a value that is true, false or nothing was written.
        folder: what relative paths in it count from.
    """

    content: Content
    where: str
    path: str = ""
    quoted: bool = False
    word: str = ""
    folder: Path = Path()

    def error(self, message: str) -> PlaceError:
        return PlaceError(f"{self.where}: {self.path or 'the file'}: {message}")

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Errors within get this place, unless they have one."""
        try:
            yield
        except PlaceError:
            raise
        except QconvError as error:
            raise self.error(str(error)) from None

    @property
    def kind(self) -> str:
        """What it is, in words, with the beginning of it."""
        if self.content is None:
            return "nothing"
        names: dict[type, str] = {dict: "keys with values", list: "a list", bool: "true or false", str: "text"}
        shown = self.word or repr(self.plain())
        return f"{names[type(self.content)]} ({shown:.60})"

    def plain(self) -> Any:
        """Without places."""
        if isinstance(self.content, dict):
            return {key: child.plain() for key, child in self.content.items()}
        return [child.plain() for child in self.content] if isinstance(self.content, list) else self.content

    def keys(self, known: tuple[str, ...] | None = None) -> dict[str, Node]:
        """Its keyed values, none but ``known`` ones."""
        if not isinstance(self.content, dict):
            raise self.error(f"expected keys with values, got {self.kind}")
        for key, child in self.content.items():
            if known is not None and key not in known:
                hint = did_you_mean(key, known) or f"; expected {', '.join(sorted(known))}"
                raise child.error(f"unknown key{hint}")
        return self.content

    def having(self, content: Content) -> Node:
        """Another value at the same place."""
        return replace(self, content=content)

    def items(self) -> list[Node]:
        if not isinstance(self.content, list):
            raise self.error(f"expected a list, got {self.kind}")
        return self.content

    def child(self, name: str) -> Node | None:
        """What stands at a key, or at a number of a list; None where nothing does."""
        if isinstance(self.content, dict):
            return self.content.get(name)
        if isinstance(self.content, list) and name.isdecimal() and int(name) < len(self.content):
            return self.content[int(name)]
        return None

    def text(self) -> str:
        if not isinstance(self.content, str):
            hint = f"; put {self.word} in quotes if it is meant as text" if isinstance(self.content, bool) else ""
            raise self.error(f"expected text, got {self.kind}{hint}")
        return self.content

    def switch(self) -> bool:
        if not isinstance(self.content, bool):
            raise self.error(f"expected true or false, got {self.kind}")
        return self.content

    def with_value(self, parts: list[str], value: Node) -> Node:
        """A copy in which ``value`` stands at the path of ``parts``; keys on the way that are missing are made.

        Raises:
            PlaceError: there is no such item of a list, or a value on the way has no keys.
        """
        if not parts:
            return value
        name, rest = parts[0], parts[1:]
        if isinstance(self.content, list):
            if not name.isdigit() or int(name) >= len(self.content):
                raise value.error(f"{self.path} has items 0 to {len(self.content) - 1}, no {name!r}")
            items = list(self.content)
            items[int(name)] = items[int(name)].with_value(rest, value)
            return replace(self, content=items)
        if self.content is not None and not isinstance(self.content, dict):
            raise value.error(f"{self.path} is {self.kind}, which has no {name!r}")
        keyed = dict(self.content or {})
        path = f"{self.path}.{name}" if self.path else name
        empty = Node(content=None, where=value.where, path=path, folder=self.folder)
        keyed[name] = keyed.get(name, empty).with_value(rest, value)
        return replace(self, content=keyed)


def read_nodes(path: Path, what: str, aliases: bool = False) -> Node:
    """What a file holds. JSON where its name ends in .json.

    Args:
        what: the file is, for messages: ``"policy"``.
        aliases: values may be named (``&``) and repeated (``*``).

    Raises:
        PlaceError: missing, larger than `MAX_BYTES`, not UTF-8, malformed, duplicate keys, aliases, tags.
    """
    text = _read_text(path, what)
    if path.suffix.lower() == ".json":
        return _from_plain(_parse_json(text, str(path)), str(path), "", path.parent)
    return parse_yaml(text, str(path), path.parent, aliases=aliases)


def parse_yaml(
    text: str, name: str, folder: Path, *, path: str = "", lines: bool = True, aliases: bool = False
) -> Node:
    """The value of a YAML text, which stands at ``path``; ``lines``: places have the line."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()  # type: ignore[no-untyped-call]
            place = f"{name}:{event.start_mark.line + 1}" if lines else name
            if not aliases and (isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None)):
                raise PlaceError(f"{place}: anchors and aliases (& and *) are not read here; write it out")
            if getattr(event, "tag", None):
                raise PlaceError(f"{place}: tags such as {event.tag} are not read here")
            return super().compose_node(parent, index)

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":bool", ":null"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    try:
        top = yaml.compose(text, Loader=Loader)
        return _FromYaml(name, folder, lines).node(top, path, 1)
    except (yaml.YAMLError, ValueError) as error:
        hint = "; a value that begins with * stands in quotes" if "while scanning an alias" in str(error) else ""
        raise PlaceError(f"{name}: not YAML ({' '.join(str(error).split())}){hint}") from None
    except RecursionError:
        raise PlaceError(f"{name}: not YAML that is read here: nested too deep, or within itself") from None


class _FromYaml:
    """From nodes of PyYAML."""

    def __init__(self, name: str, folder: Path, lines: bool):
        self._name, self._folder, self._lines = name, folder, lines
        self._count = count(1)

    def node(self, node: Any, path: str, line: int) -> Node:
        import yaml

        where = self._where(line)
        if next(self._count) > _MAX_NODES:
            raise PlaceError(f"{where}: more than {_MAX_NODES} values, with those that aliases repeat")
        content: Content
        word, quoted = "", False
        if node is None:
            content = None
        elif isinstance(node, yaml.MappingNode):
            content = self._keyed(node, path)
        elif isinstance(node, yaml.SequenceNode):
            content = [
                self.node(item, f"{path}[{index}]", item.start_mark.line + 1) for index, item in enumerate(node.value)
            ]
        elif node.tag.endswith(":null"):
            content, word = None, node.value
        elif node.tag.endswith(":bool"):
            content, word = yaml.SafeLoader.bool_values[node.value.lower()], node.value
        else:
            content, quoted = node.value, node.style is not None
        return Node(content=content, where=where, path=path, quoted=quoted, word=word, folder=self._folder)

    def _keyed(self, mapping: Any, path: str) -> dict[str, Node]:
        import yaml

        keyed: dict[str, Node] = {}
        for key, value in mapping.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise PlaceError(f"{self._where(line)}: a key must be a word")
            if key.value in keyed:
                raise PlaceError(f"{self._where(line)}: the key {key.value!r} stands there twice")
            keyed[key.value] = self.node(value, f"{path}.{key.value}" if path else key.value, line)
        return keyed

    def _where(self, line: int) -> str:
        return f"{self._name}:{line}" if self._lines else self._name


def _read_text(path: Path, what: str) -> str:
    try:
        if not path.is_file():
            missing = f"there is no such {what} file{did_you_mean_path(path)}"
            raise PlaceError(f"{path}: {'not a file' if path.exists() else missing}")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise PlaceError(f"{path}: larger than {MAX_BYTES // 1024} KiB; a {what} has a few lines")
        return raw.decode("utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path with a null character
        raise PlaceError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def _parse_json(text: str, name: str) -> Any:
    """Numbers stay text, as in YAML."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise PlaceError(f"{name}: the key {key!r} stands there twice")
            result[key] = value
        return result

    try:
        return json.loads(text, object_pairs_hook=unique, parse_float=str, parse_int=str, parse_constant=str)
    except (ValueError, RecursionError) as error:
        raise PlaceError(f"{name}: not JSON ({error})") from None


def _from_plain(value: Any, where: str, path: str, folder: Path) -> Node:
    if isinstance(value, dict):
        value = {
            key: _from_plain(child, where, f"{path}.{key}" if path else key, folder) for key, child in value.items()
        }
    elif isinstance(value, list):
        value = [_from_plain(child, where, f"{path}[{index}]", folder) for index, child in enumerate(value)]
    return Node(content=value, where=where, path=path, folder=folder)
