"""Linears in ggml's blocks of 32 weights whose codes were chosen by calibration: q4_0, q4_1 and q8_0 of a GGUF file.

Layout: see `qconv.gguf.blocks`. ``(code - 8) * d`` and ``(code - 128) * d`` are what a `QuantizedLinear` says; q4_1 has
``code * d + m``, so that m = -zero * d.

Rounding points: d is exact in float16 as all scales are. m is rounded to float16, by at most 2^-11 of itself, which is
0.008 of a step: codes were chosen before, and validation measures what is stored. A reader gets the zero point back.

Left out: the fifth bit (llama.cpp's rule alone chooses such codes), group indices (the format has no place for one),
reading (the view decodes every kind with the gguf package).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qconv.convert.format import check_values
from qconv.errors import CheckpointError, NumericsError, SchemeError
from qconv.gguf import BLOCK, BLOCK_KINDS, pack, unpack
from qconv.gguf.blocks import row_bytes
from qconv.types import QuantizedLinear, Scheme


@dataclass(frozen=True)
class GgmlBlocks:
    """Blocks of one kind, ``NAME.weight.KIND``: uint8 [N, bytes of a row]."""

    kind: str

    @property
    def name(self) -> str:
        return f"gguf-{self.kind}"

    @property
    def suffix(self) -> str:
        return f".weight.{self.kind}"

    @property
    def scheme(self) -> Scheme:
        own = BLOCK_KINDS[self.kind]
        return Scheme(bits=own.bits, group_size=BLOCK, symmetric=not own.has_minimum)

    def check(self, q: QuantizedLinear, module: str, scale_dtype: torch.dtype) -> None:
        """Raises `NumericsError` or `SchemeError` when values would not survive `pack`."""
        if replace(q.scheme, activation_order=False) != self.scheme:
            raise SchemeError(f"{module}: {self.name} holds {self.scheme}, got {q.scheme}")
        if q.group_index_K is not None:
            raise SchemeError(f"{module}: {self.name} has blocks of neighbours and stores no group index")
        # A zero point of this layout need not be a code: what is stored is the minimum.
        floats = q.zeros_NG is not None and q.zeros_NG.is_floating_point()
        check_values(replace(q, zeros_NG=None) if floats else q, module, torch.float16)
        minima = self._minima(q)
        if minima is not None and not bool(torch.isfinite(minima).all()):
            raise NumericsError(f"{module}: a minimum does not fit float16; leave this linear out with --ignore")

    def _minima(self, q: QuantizedLinear) -> Tensor | None:
        return None if q.zeros_NG is None else (-q.zeros_NG.float() * q.scales_NG).half()

    def pack(self, q: QuantizedLinear, module: str, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        n, k = q.codes_NK.shape
        minima = self._minima(q)
        blocks = pack(
            q.codes_NK.reshape(-1, BLOCK),
            q.scales_NG.half().reshape(-1, 1),
            None if minima is None else minima.reshape(-1, 1),
            self.kind,
        )
        return {module + self.suffix: blocks.view(n, row_bytes(self.kind, k, module))}

    def unpack(
        self, tensors: Mapping[str, Tensor], module: str, scheme: Scheme, location: str = "checkpoint"
    ) -> QuantizedLinear:
        """Of q4_1 only what `pack` has written: a minimum that is a whole number of steps."""
        stored = tensors[module + self.suffix]
        codes, d, m = unpack(stored.reshape(-1, BLOCK_KINDS[self.kind].num_bytes), self.kind)
        n = len(stored)
        scales = d.float().view(n, -1)
        if not bool(torch.isfinite(scales).all()):
            raise NumericsError(f"{location}: a scale of module {module!r} is NaN or infinite")
        zeros = None
        if m is not None:
            steps = torch.where(scales == 0, 0.0, -m.float().view(n, -1) / scales)
            if bool(((steps - steps.round()).abs() > 0.01).any()) or bool((steps.round() > scheme.max_code).any()):
                raise CheckpointError(f"{location}: the minima of module {module!r} are no whole number of steps")
            zeros = steps.round().to(torch.uint8)
        return QuantizedLinear(
            codes_NK=codes.reshape(n, -1), scales_NG=scales, zeros_NG=zeros, group_index_K=None, scheme=scheme
        )


GGML_FORMATS: Mapping[str, GgmlBlocks] = {fmt.name: fmt for fmt in map(GgmlBlocks, ("q4_0", "q4_1", "q8_0"))}
