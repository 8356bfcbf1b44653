"""Where values stand on a chart, in percent of its width, and which round values to write under it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Maps values to percent of the width, linearly or by logarithm."""

    low: float
    high: float
    is_log: bool

    def percent(self, value: float) -> float:
        """Position of a value, 0 to 100; values outside stop at the edge."""
        if self.is_log:
            if value <= 0:
                return 0.0
            value, low, high = math.log10(value), math.log10(self.low), math.log10(self.high)
        else:
            low, high = self.low, self.high
        return min(100.0, max(0.0, 100 * (value - low) / (high - low))) if high > low else 50.0

    def ticks(self) -> list[float]:
        if self.is_log:
            exponents = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            step = max(1, math.ceil(len(exponents) / 7))
            return [10.0**exponent for exponent in exponents[::step]]
        return linear_ticks(self.low, self.high)


def linear_ticks(low: float, high: float, num: int = 4) -> list[float]:
    """About ``num`` round values between ``low`` and ``high``."""
    if not high > low:
        return [low]
    rough = (high - low) / num
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.75)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def decade_scale(values: Iterable[float]) -> Scale:
    """A scale from zero, or by decades where the values differ too much for that."""
    known = [value for value in values if value > 0]
    if not known:
        return Scale(low=0, high=1, is_log=False)
    if max(known) / min(known) <= 20:
        return Scale(low=0, high=max(known) * 1.05, is_log=False)
    low, high = math.log10(min(known)), math.log10(max(known))
    return Scale(low=10.0 ** math.floor(low - 0.3), high=10.0 ** math.ceil(high), is_log=True)


def tick_text(value: float) -> str:
    exponent = math.log10(value) if value > 0 else 0.5
    if exponent == round(exponent) and abs(exponent) > 2:
        return power_text(round(exponent))
    return f"{value:g}"


def power_text(exponent: int) -> str:
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}" if abs(exponent) > 2 else f"{10.0**exponent:g}"
