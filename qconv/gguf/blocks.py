"""ggml's blocks of 32 weights: how their numbers lie in bytes, and the rule by which llama.cpp chooses them.

Layout source: ggml's ``block_q4_0`` and its kin, of which gguf-py's ``quants.py`` is the published description. A block
is a float16 scale d (and a float16 minimum m for the kinds that end in 1), the fifth bits of its codes for q5, then its
codes: 4-bit ones in 16 bytes, weight i in the low half of byte i and weight 16 + i in its high half. A weight is
``(code - mid) * d``, or ``code * d + m``.

`encode` is llama.cpp's reference rule, bit for bit: the largest magnitude, or minimum and maximum, of each block gives
its scale; no calibration. q4_0 and q5_0 give their extra negative code to the weight of largest magnitude, so that d
has the other sign of it.

Rounding points: codes are chosen against the float32 scale, which is then rounded to float16 (llama.cpp's order).

Left out: K-quants and i-quants (llama-quantize makes them), big-endian files.

Legend: N = rows, K = columns, B = blocks of all rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qconv.errors import NumericsError, SchemeError
from qconv.finite import all_finite

BLOCK = 32
Kind = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"]
PLAIN_KINDS: Mapping[str, torch.dtype] = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class BlockKind:
    """Codes of one width, with a minimum or centred."""

    bits: int
    has_minimum: bool

    @property
    def num_bytes(self) -> int:
        return 2 + 2 * self.has_minimum + BLOCK * self.bits // 8

    @property
    def max_code(self) -> int:
        return int(2**self.bits) - 1

    @property
    def mid_code(self) -> int:
        return int(2 ** (self.bits - 1))


BLOCK_KINDS: Mapping[str, BlockKind] = {
    "q8_0": BlockKind(bits=8, has_minimum=False),
    "q4_0": BlockKind(bits=4, has_minimum=False),
    "q4_1": BlockKind(bits=4, has_minimum=True),
    "q5_0": BlockKind(bits=5, has_minimum=False),
    "q5_1": BlockKind(bits=5, has_minimum=True),
}
KINDS: tuple[Kind, ...] = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")


def row_bytes(kind: str, num_columns: int, name: str) -> int:
    """Bytes of a row of ``num_columns`` weights.

    Raises:
        SchemeError: a row is no whole number of blocks.
    """
    if num_columns % BLOCK:
        raise SchemeError(
            f"{name}: {kind} has blocks of {BLOCK} weights along the input features, got {num_columns}, which is no "
            "multiple; leave this linear in 16 bits with --ignore, or choose gguf-f16"
        )
    return num_columns // BLOCK * BLOCK_KINDS[kind].num_bytes


def encode(w: Tensor, kind: str, name: str) -> Tensor:
    """A tensor as it is stored: float of that dtype, or uint8 ``[N, row_bytes]`` for a matrix ``[N, K]`` in blocks.

    Raises:
        NumericsError: NaN or infinity, or a number that does not fit float16.
        SchemeError: a row is no whole number of blocks.
    """
    if kind in PLAIN_KINDS:
        stored = w.to(PLAIN_KINDS[kind])
        _check_finite(stored, w, kind, name)
        return stored
    num_bytes = row_bytes(kind, w.shape[1], name)
    codes, d, m = _choose(w.float().reshape(-1, BLOCK), BLOCK_KINDS[kind])
    for numbers in (d,) if m is None else (d, m):
        _check_finite(numbers, w, kind, name)
    return pack(codes, d, m, kind).view(-1, num_bytes)


def _choose(w_B32: Tensor, kind: BlockKind) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes uint8 ``[B, 32]``, scales and minima float16 ``[B, 1]``."""
    if kind.has_minimum:
        low, high = w_B32.amin(1, keepdim=True), w_B32.amax(1, keepdim=True)
        d = (high - low) / kind.max_code
        codes = ((w_B32 - low) * _inverse(d) + 0.5).trunc()
        return codes.clamp_(0, kind.max_code).to(torch.uint8), d.half(), low.half()
    magnitude = w_B32.abs()
    if kind.bits == 8:
        d = magnitude.amax(1, keepdim=True) / 127
        scaled = w_B32 * _inverse(d)
        whole = scaled.abs().floor()
        rounded = whole + (2 * (scaled.abs() - whole)).floor()  # half away from zero
        return (scaled.sign() * rounded + 128).to(torch.uint8), d.half(), None
    # The first weight of largest magnitude: of two with different signs it decides.
    place = torch.where(magnitude == magnitude.amax(1, keepdim=True), torch.arange(BLOCK, device=w_B32.device), BLOCK)
    largest = w_B32.gather(1, place.amin(1, keepdim=True).clamp_max(BLOCK - 1))
    d = largest / -kind.mid_code
    codes = (w_B32 * _inverse(d) + (kind.mid_code + 0.5)).trunc()
    return codes.clamp_(0, kind.max_code).to(torch.uint8), d.half(), None


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, 0.0, 1.0 / d)


def _check_finite(numbers: Tensor, w: Tensor, kind: str, name: str) -> None:
    if all_finite(numbers):
        return
    if not all_finite(w):
        raise NumericsError(f"{name}: has NaN or infinity; the file is damaged or training diverged: fetch it again")
    raise NumericsError(
        f"{name}: does not fit {kind}, whose numbers are float16: largest magnitude {float(w.abs().max()):g}; choose "
        "gguf-bf16 or gguf-f32"
    )


def pack(codes: Tensor, d: Tensor, m: Tensor | None, kind: str) -> Tensor:
    """Blocks as bytes, uint8 ``[B, num_bytes]``; runs on meta tensors.

    Args:
        codes: uint8 ``[B, 32]``, unsigned also where they are centred.
        d: float16 ``[B, 1]``.
        m: float16 ``[B, 1]`` for the kinds with a minimum.
    """
    parts = [d.contiguous().view(torch.uint8)]
    if m is not None:
        parts.append(m.contiguous().view(torch.uint8))
    if BLOCK_KINDS[kind].bits == 8:
        return torch.cat([*parts, codes ^ 0x80], dim=1)
    if BLOCK_KINDS[kind].bits == 5:
        weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=codes.device)
        parts.append(((codes >> 4).view(-1, 4, 8) * weights).sum(-1, dtype=torch.uint8))
    low = codes & 0x0F
    parts.append(low[:, :16] | (low[:, 16:] << 4))
    return torch.cat(parts, dim=1)


def unpack(blocks: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inverse of `pack`, from uint8 ``[B, num_bytes]``."""
    own = BLOCK_KINDS[kind]
    head = 2 + 2 * own.has_minimum
    d = blocks[:, :2].contiguous().view(torch.float16)
    m = blocks[:, 2:4].contiguous().view(torch.float16) if own.has_minimum else None
    if own.bits == 8:
        return blocks[:, head:] ^ 0x80, d, m
    codes = blocks[:, -16:]
    codes = torch.cat([codes & 0x0F, codes >> 4], dim=1)
    if own.bits == 5:
        shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
        fifth = (blocks[:, head : head + 4].unsqueeze(-1) >> shifts) & 1
        codes = codes | (fifth.reshape(-1, BLOCK) << 4)
    return codes, d, m
