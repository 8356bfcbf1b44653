"""What the side files of a tokenizer say, whichever of the places that transformers knows they say it in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qconv.checkpoint import read_json
from qconv.errors import CheckpointError

DEFAULT_TEMPLATE = "default"


def read_object(file: Path, missing_ok: bool = False) -> Mapping[str, Any]:
    """A JSON object; with ``missing_ok`` an empty one for a file that is not there.

    Raises:
        CheckpointError: missing, or not a JSON object.
    """
    if missing_ok and not file.is_file():
        return {}
    return read_json(file, "a tokenizer needs it")


def special_tokens(folder: Path) -> dict[str, Any]:
    """``eos_token`` etc. -> text, from ``special_tokens_map.json`` and, before it, ``tokenizer_config.json``."""
    merged: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in read_object(folder / name, missing_ok=True).items():
            if key.endswith("_token") and not isinstance(value, bool) and value is not None:
                merged[key] = _content(value)
            elif key in ("additional_special_tokens", "extra_special_tokens") and value:
                listed = value.values() if isinstance(value, dict) else value
                merged["additional_special_tokens"] = sorted(str(_content(token)) for token in listed)
    return merged


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def end_tokens(folder: Path) -> frozenset[int]:
    """Ids at which generation stops, as ``generate`` takes them; empty when nothing says."""
    for name in ("generation_config.json", "config.json"):
        value = read_object(folder / name, missing_ok=True).get("eos_token_id")
        if value is not None:
            return frozenset(value if isinstance(value, list) else [value])
    return frozenset()


def chat_templates(folder: Path) -> dict[str, str]:
    """Name -> text without trailing blanks; files of their own go before ``tokenizer_config.json``.

    Raises:
        CheckpointError: a file that cannot be read.
    """
    found: dict[str, str] = {}
    inside = read_object(folder / "tokenizer_config.json", missing_ok=True).get("chat_template")
    boxed = read_object(folder / "chat_template.json", missing_ok=True).get("chat_template")
    for template in (inside, boxed):
        if isinstance(template, str):
            found[DEFAULT_TEMPLATE] = template
        elif isinstance(template, list):
            found |= {str(entry.get("name")): str(entry.get("template")) for entry in template}
        elif isinstance(template, dict):
            found |= {str(name): str(text) for name, text in template.items()}
    files = {DEFAULT_TEMPLATE: folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    for name, file in files.items():
        if file.is_file():
            try:
                found[name] = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{file}: cannot be read as text ({error})") from error
    return {name: text.rstrip() for name, text in found.items()}
