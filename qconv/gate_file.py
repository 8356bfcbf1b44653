"""Reads a policy file, YAML or JSON, as plain text, lists and keyed values, and refuses everything cleverer.

Numbers and dates stay text, so that a file and the command line are read by the same rules. Duplicate keys, which YAML
and JSON readers drop silently, are errors: one of two limits would be lost.

Imports no torch. Left out: YAML's anchors, aliases, merge keys, tags and several documents in one file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qconv.errors import UsageError

MAX_BYTES = 64 * 1024


def read_document(path: Path) -> Any:
    """What the file holds: dicts with text keys, lists, text, booleans, None. JSON where the name ends in .json.

    Raises:
        UsageError: missing, larger than `MAX_BYTES`, not UTF-8, malformed, duplicate keys, anchors, tags. The
            message has the line where there is one, but not the file's name.
    """
    text = _read_text(path)
    return _parse_json(text) if path.suffix.lower() == ".json" else _parse_yaml(text)


def _read_text(path: Path) -> str:
    try:
        if not path.is_file():
            raise UsageError(f"{'not a file' if path.exists() else 'there is no such policy file'}")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise UsageError(f"larger than {MAX_BYTES // 1024} KiB; a policy has a few lines")
        return raw.decode("utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path with a null character
        raise UsageError(f"cannot be read as UTF-8 text ({error})") from None


def _parse_json(text: str) -> Any:
    """Numbers stay text, to be read by the same rules as the command line's."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise UsageError(f"the key {key!r} stands there twice")
            result[key] = value
        return result

    try:
        return json.loads(text, object_pairs_hook=unique, parse_float=str, parse_int=str, parse_constant=str)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not JSON ({error})") from None


def _parse_yaml(text: str) -> Any:
    """YAML without aliases, tags and duplicate keys; numbers and dates stay text.

    YAML 1.1 would read ``1e-3`` as text, ``010`` as 8 and ``1:30`` as 90; the command line's rules read the text.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()  # type: ignore[no-untyped-call]
            line = event.start_mark.line + 1
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise UsageError(f"line {line}: anchors and aliases (& and *) are not read here; write it out")
            if getattr(event, "tag", None):
                raise UsageError(f"line {line}: tags such as {event.tag} are not read here")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                line = key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode):
                    raise UsageError(f"line {line}: a key must be a word")
                if key.value in seen:
                    raise UsageError(f"line {line}: the key {key.value!r} stands there twice")
                seen.add(key.value)
            return super().construct_mapping(node, deep=deep)

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":bool", ":null"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    try:
        return yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"not YAML ({' '.join(str(error).split())})") from None
