"""Reads values out of a report document and writes them for people.

Numbers have three significant digits and shares are percentages. What comes from models and users
(tokens, prompts, names) can hold anything, so it is made harmless here before any format escapes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "–"

# Characters that hide, reorder or break text: C0 and C1 controls, surrogates, bidirectional overrides, separators.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_VISIBLE = {"\n": "↵", "\r": "␍", "\t": "⇥"}


def at(value: Any, *path: str) -> Any:
    """The value under ``path``, or None where any part of the way is missing or null."""
    for key in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def items(value: Any, *path: str) -> Sequence[Any]:
    """The list under ``path``; empty where it was not measured."""
    found = at(value, *path)
    return found if isinstance(found, list | tuple) else ()


def number_at(value: Any, *path: str) -> float | None:
    """The finite number under ``path``, or None."""
    return finite_number(at(value, *path))


def finite_number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def bounds(value: Any) -> tuple[float, float] | None:
    """A 95% interval, or None when either side is unknown (one document cannot bound a mean)."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    low, high = finite_number(value[0]), finite_number(value[1])
    return None if low is None or high is None else (low, high)


def number(value: Any, digits: int = 3) -> str:
    """``digits`` significant digits, whole numbers in full: 0.00158, 52.6, 1,234, 1.23e-7."""
    found = finite_number(value)
    if found is None:
        return MISSING
    if found == 0:
        return "0"
    if isinstance(found, int):
        return f"{found:,}"
    exponent = math.floor(math.log10(abs(found)))
    if exponent < -4:
        mantissa, power = f"{found:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(power)}"
    if abs(found) >= 10**digits:
        return f"{found:,.0f}"
    rounded = float(f"{found:.{digits}g}")
    return f"{rounded:,.{max(0, digits - 1 - math.floor(math.log10(abs(rounded))))}f}"


def percent(value: Any) -> str:
    """A share as a percentage. 100% and 0% mean exactly that, so 0.99996 is 99.996%."""
    found = finite_number(value)
    if found is None:
        return MISSING
    decimals = 1
    while decimals < 4 and found not in (0, 1) and round(100 * found, decimals) in (0, 100):
        decimals += 1
    text = f"{100 * found:.{decimals}f}"
    return f"{'0.0' if float(text) == 0 else text}%" if found not in (0, 1) else f"{100 * found:.0f}%"


def points(value: Any) -> str:
    """A difference of two shares, in percentage points with its sign."""
    found = finite_number(value)
    return MISSING if found is None else f"{100 * found:+.2f} pp"


def signed(value: Any) -> str:
    found = finite_number(value)
    return MISSING if found is None else ("+" if found > 0 else "") + number(found)


def count(value: Any) -> str:
    found = finite_number(value)
    return MISSING if found is None else f"{found:,.0f}"


def span(value: Any, unit: str = "number") -> str:
    """An interval as ``low to high`` in ``number``, ``share``, ``points`` or ``count``; empty when unknown."""
    pair = bounds(value)
    if pair is None:
        return ""
    write = {"number": number, "share": percent, "points": points, "count": count}[unit]
    return f"{write(pair[0])} to {write(pair[1])}"


def fact(value: Any) -> str:
    """Any fact of a stage or of the environment in one line."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, int):
        return str(value) if abs(value) < 10_000 else f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{one_line(key)} {fact(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return "; ".join(fact(item) for item in value) or "none"
    return one_line(value)


def rows_of(value: Any) -> tuple[tuple[str, ...], list[tuple[str, ...]]] | None:
    """Headings and rows, where a fact is several things, each with the same facts; otherwise None."""
    if not isinstance(value, Mapping) or len(value) < 2:
        return None
    records = list(value.values())
    if not all(isinstance(record, Mapping) and record and record.keys() == records[0].keys() for record in records):
        return None
    headings = tuple(one_line(key) for key in records[0])
    return headings, [(one_line(name), *(fact(record[key]) for key in records[0])) for name, record in value.items()]


def one_line(text: Any) -> str:
    """Text for one line of prose: whitespace collapses, and what could steer a terminal or hide text becomes �."""
    return _UNSAFE.sub("\ufffd", " ".join(str(text).split()))


def visible(text: Any) -> str:
    """Text of tokens, every character to be seen: newlines as ↵, tabs as ⇥, other controls as their pictures."""

    def picture(match: re.Match[str]) -> str:
        character = match.group()
        if character in _VISIBLE:
            return _VISIBLE[character]
        return chr(0x2400 + ord(character)) if ord(character) < 0x20 else "\ufffd"

    return _UNSAFE.sub(picture, str(text))


def shorten(text: str, limit: int) -> str:
    """At most ``limit`` characters, cut in the middle of nothing: the end says that it was cut."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def encodable(text: str) -> str:
    """Text that UTF-8 can hold: lone surrogates, which a broken prompt file can bring, become �."""
    return _SURROGATE.sub("\ufffd", text)
