"""Values of ``adapter_config.json``, each read with the type that it must have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from qconv.errors import AdapterError

MAX_RANK, MIN_ALPHA, MAX_ALPHA = 1 << 20, 1e-9, 1e9  # keep alpha / r finite and above zero


class ConfigReader:
    """Reads keys of an adapter's config; ``where`` is the file, for messages.

    Every method raises `AdapterError` for a value of another type.
    """

    def __init__(self, config: Mapping[str, Any], where: str):
        self.config = config
        self.where = where

    def refuse(self, key: str, expected: str) -> NoReturn:
        raise AdapterError(f"{self.where}: expected {key} to be {expected}, found {short(self.config.get(key))}")

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.config.get(key)
        if value is not None and not isinstance(value, bool):
            self.refuse(key, "true or false")
        return default if value is None else value

    def table(self, key: str) -> list[tuple[str, Any]]:
        value = self.config.get(key)
        if value is not None and not isinstance(value, dict):
            self.refuse(key, "an object")
        return list((value or {}).items())

    def names(self, key: str) -> tuple[str, ...]:
        value = self.config.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(v, str) and v for v in value)):
            self.refuse(key, "a list of module names")
        return tuple(value or ())

    def whole(self, key: str, least: int = 0) -> int:
        value = self.config.get(key)
        if type(value) is not int or not least <= value < 1 << 63:
            self.refuse(key, f"an integer of at least {least}")
        return value

    def one_of(self, key: str, *choices: Any) -> Any:
        value = self.config.get(key)
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            self.refuse(key, " or ".join(map(repr, choices)))
        return value

    def share(self, key: str) -> float:
        value = self.config.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
            self.refuse(key, "a number of 0 to 1")
        return float(value)

    def number(self, key: str) -> float:
        return alpha_value(self.config.get(key), key, self.where)

    def rank(self, key: str) -> int:
        return rank_value(self.config.get(key), key, self.where)


def rank_value(value: Any, key: str, where: str) -> int:
    if type(value) is not int or not 0 < value <= MAX_RANK:
        raise AdapterError(f"{where}: expected {key} to be a positive integer, found {short(value)}")
    return value


def alpha_value(value: Any, key: str, where: str) -> float:
    """A factor of the whole update: any finite number but zero."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value == 0:
            raise AdapterError(f"{where}: {key} is 0, so the adapter changes nothing; was the config edited?")
        if MIN_ALPHA <= abs(value) <= MAX_ALPHA:
            return float(value)
    raise AdapterError(f"{where}: expected {key} to be a number, found {short(value)}")


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
