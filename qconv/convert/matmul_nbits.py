"""Linears in ONNX Runtime's ``MatMulNBits``: codes of 4 or 8 bits in blocks along the input features, decoded.

Layout (ONNX Runtime, docs/ContribOperators.md, ``com.microsoft.MatMulNBits``), for a weight [N, K] in G blocks:
``qweight`` uint8 [N, G, block size * bits / 8], the lower bits first; ``scales`` [N, G]; ``qzeros`` uint8
[N, ceil(G * bits / 8)], packed alike, or none for symmetric codes, whose zero point is ``2**(bits - 1)``.

Rounding points: none. Left out: writing (the model builder of ONNX Runtime GenAI does), 2 bits, zero points that are
floating-point numbers, a stored group index, blocks that reach beyond K.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qconv.convert.format import TensorReader
from qconv.errors import CheckpointError, SchemeError
from qconv.types import QuantizedLinear, Scheme, TensorSpec


@dataclass(frozen=True)
class MatMulNBits:
    """The tensors ``MODULE.MatMulNBits.*`` that `OnnxCheckpoint` has."""

    suffixes = (".MatMulNBits.qweight", ".MatMulNBits.scales", ".MatMulNBits.qzeros")

    @property
    def name(self) -> str:
        return "matmul-nbits"

    def scheme_of(self, node: Mapping[str, Any], location: str) -> Scheme:
        """The scheme of a node, from its attributes.

        Raises:
            CheckpointError: bits or blocks that are not read.
        """
        bits, size, k = node["bits"], node["group_size"], node["in_features"]
        if bits not in (4, 8) or size < 1 or k % size:
            raise CheckpointError(
                f"{location}: MatMulNBits with {bits} bits and blocks of {size} of {k} input features is not read; "
                "read are 4 and 8 bits in whole blocks"
            )
        try:
            return Scheme(bits=bits, group_size=size, symmetric=node["symmetric"])
        except SchemeError as error:
            raise CheckpointError(f"{location}: {error}") from error

    def unpack(
        self, tensors: Mapping[str, Tensor], module: str, scheme: Scheme, location: str = "checkpoint"
    ) -> QuantizedLinear:
        """Codes, scales and zero points of a module.

        Raises:
            CheckpointError: a tensor is missing, or its dtype or shape cannot be.
            NumericsError: a scale is NaN or infinite.
        """
        reader = TensorReader(tensors, module, location)
        block_bytes = scheme.group_size * scheme.bits // 8
        stored = reader.take(self.suffixes[0], (torch.uint8,), (None, None, block_bytes))
        n, groups, _ = stored.shape
        zeros = None
        if not scheme.symmetric:
            packed = reader.take(self.suffixes[2], (torch.uint8,), (n, -(-groups * scheme.bits // 8)))
            zeros = _unpacked(packed, scheme.bits)[:, :groups].contiguous()
        return QuantizedLinear(
            codes_NK=_unpacked(stored.reshape(n, -1), scheme.bits),
            scales_NG=reader.take_scales(self.suffixes[1], (n, groups)),
            zeros_NG=zeros,
            group_index_K=None,
            scheme=scheme,
        )

    def logical_shape(self, specs: Mapping[str, TensorSpec], module: str, scheme: Scheme) -> tuple[int, int]:
        """[N, K] of a stored module."""
        n, groups, _ = specs[module + self.suffixes[0]].shape
        return n, groups * scheme.group_size


def _unpacked(stored: Tensor, bits: int) -> Tensor:
    """Of uint8 rows, the lower bits first."""
    return stored if bits == 8 else torch.stack((stored & 15, stored >> 4), dim=-1).flatten(1)
