"""Scales of an FP8 cache of keys and values, one of each for an attention, and what rounding to it does.

Method: the largest magnitude that calibration sees / 448 (FP8 Formats for Deep Learning, Micikevicius et al. 2022,
section 3; what llm-compressor's recipes for vLLM do). Keys are those after rotary embedding, as they are cached.
float8's precision is relative, so a smaller scale would only clip.

What is looked at is made by the weights as they will be stored, folds included: AWQ's scales between value and output
projection change what is cached.

Rounding points: the scale once, to a number that bfloat16 and float16 both hold. A key or value is divided in float32,
rounded to nearest even, saturated at 448, and multiplied in float32; the product is rounded to the model's dtype.

Left out: scales for each head; queries and attention weights, which attention kernels that compute in float8 round,
too.

Dimension legend: B = rows, S = tokens, D = features of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor, nn

from qconv.errors import CalibrationError, NumericsError
from qconv.finite import put_off
from qconv.key_values import HANDS_NONE, cached_attentions, exchanging
from qconv.quantize.fp8 import FP8_MAX, to_fp8
from qconv.quantize.grid import round_scale

PARTS = ("keys", "values")
BEYOND = 464.0
"""What is not below it would round to more than 448, float8's largest number, if there were more."""


class _SeenAllError(Exception):
    """Ends a forward pass of which nothing more is wanted."""


class CacheRanges:
    """The largest magnitudes of the keys and values of one block's attentions.

    Args:
        block: to listen to.
        prefix: of its name.
        ends_early: nothing more is wanted of a forward pass once all attentions have been heard.
    """

    def __init__(self, block: nn.Module, prefix: str, *, ends_early: bool):
        self._attentions = cached_attentions(block)
        self._prefix = prefix
        self._ends_early = ends_early
        self._left = 0
        self._largest: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def wants_nothing(self) -> bool:
        """Whether no pass is needed: the block has no attention to hear."""
        return self._ends_early and not self._attentions

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within this context passes of the block are heard."""
        handles = [exchanging(module, partial(self._hear, name)) for name, module in self._attentions.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Within this context one batch runs, and ends where nothing more is wanted of it."""
        self._left = len(self._attentions)
        with suppress(_SeenAllError):
            yield

    def _hear(self, name: str, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        seen = keys.abs().amax().float(), values.abs().amax().float()
        known = self._largest.get(name, seen)
        # The larger of NaN and a number is NaN: what is not finite stays so.
        self._largest[name] = torch.maximum(known[0], seen[0]), torch.maximum(known[1], seen[1])
        self._left -= 1
        if self._ends_early and self._left == 0:
            raise _SeenAllError
        return keys, values

    def scales(self) -> dict[str, tuple[Tensor, Tensor]]:
        """``[1]`` float32 each, of keys and of values, by the attention's full name.

        Raises:
            CalibrationError: an attention that keeps no keys and values of its own.
            NumericsError: NaN or infinity in keys or values; names the attention.
        """
        return {self._prefix + name: self._scales_of(name) for name in self._attentions}

    def _scales_of(self, name: str) -> tuple[Tensor, Tensor]:
        if name not in self._largest:
            raise CalibrationError(f"{self._prefix}{name}: {HANDS_NONE}")
        keys, values = (self._scale(name, what, x) for what, x in zip(PARTS, self._largest[name], strict=True))
        return keys, values

    def _scale(self, name: str, what: str, largest: Tensor) -> Tensor:
        if not bool(torch.isfinite(largest)):
            raise NumericsError(f"{self._prefix}{name}: {what} hold NaN or infinity on the calibration text")
        scale = round_scale(largest / FP8_MAX) if largest > 0 else torch.ones_like(largest)
        return scale.reshape(1)


def fake_quantize_cached(x_BHSD: Tensor, scale: Tensor) -> Tensor:
    """Keys or values as they come back from an FP8 cache: the same shape and dtype.

    Args:
        scale: float32, ``[1]`` or anything that broadcasts, such as ``[heads, 1, 1]``.
    """
    return to_fp8(x_BHSD.float(), scale).float().mul_(scale).to(x_BHSD.dtype)


@dataclass(kw_only=True)
class CacheRounding:
    """Rounds keys and values as an FP8 cache does, and counts what lies beyond its range.

    Attributes:
        scales: of keys and values by the attention's full name, float32.
    """

    scales: Mapping[str, tuple[Tensor, Tensor]]
    _beyond: dict[str, Tensor] = field(default_factory=dict)  # of keys and values, by attention
    _seen: dict[str, list[int]] = field(default_factory=dict)

    def decorate(self, prefix: str, block: nn.Module) -> None:
        """See `streaming.Decorate`."""
        for name, module in cached_attentions(block).items():
            if prefix and prefix + name in self.scales:
                exchanging(module, partial(self._exchange, prefix + name))

    def _exchange(self, name: str, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        scales = [scale.to(keys.device) for scale in self.scales[name]]
        both = keys, values
        for what, x in zip(PARTS, both, strict=True):
            _check_finite(x, f"{name}: {what}")
        beyond = torch.stack(
            [(x.abs() >= BEYOND * scale).sum() for x, scale in zip(both, scales, strict=True)]
        )  # no answer is waited for
        if name in self._beyond:
            beyond += self._beyond[name]
        self._beyond[name] = beyond
        self._seen[name] = [n + x.numel() for n, x in zip(self._seen.get(name, [0, 0]), both, strict=True)]
        return fake_quantize_cached(keys, scales[0]), fake_quantize_cached(values, scales[1])

    def clipped(self) -> dict[str, tuple[float, str]]:
        """The share of keys, and of values, beyond the range so far, and the attention with the largest share."""
        result = {}
        for part, what in enumerate(PARTS):
            counts = {name: int(beyond[part]) for name, beyond in self._beyond.items()}
            if counts:
                worst = max(counts, key=lambda name: counts[name] / self._seen[name][part])
                total = sum(self._seen[name][part] for name in counts)
                result[what] = sum(counts.values()) / total, worst
        return result


def _check_finite(x: Tensor, name: str) -> None:
    """Rounding would make the largest number of an infinity (within `finite.putting_off`, maybe told later)."""
    are_finite = torch.isfinite(x).all()
    refuse = partial(_refuse, name)
    if not put_off(are_finite, refuse) and not are_finite:
        refuse()


def _refuse(name: str) -> NoReturn:
    raise NumericsError(f"{name} hold NaN or infinity; the model they come from is damaged, or its training diverged")
