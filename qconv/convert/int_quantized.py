"""The ``int-quantized`` layout of the compressed-tensors package: 8-bit integer weights and activations (W8A8).

Layout source: compressed-tensors 0.20, `compressors/naive_quantized`; vLLM's `CompressedTensorsW8A8Int8` reads it.
``weight`` int8 [N, K], ``weight_scale`` [N, 1] in the model's dtype. Symmetric: no zero point is stored, and the
stored value is our unsigned code - 128. Activations are quantized to int8 per token at run time and store nothing.

Rounding points: none; scales must be exact in the model's dtype. Readers that decode to 16 bits multiply in that
dtype, which rounds once more; kernels that stay in integers multiply sums of products, in float32.

Read, but not written, are 4-bit codes in groups or rows, one to a byte: what llm-compressor makes of W4A8. Written they
are pack-quantized, in half the bytes.

Left out: zero points of weights or activations, static activation scales, one scale for a whole tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qconv.convert.compressed_tensors import config_of, only_group, per_token, weight_args
from qconv.convert.format import TensorReader, check_values, shape_of_weight
from qconv.errors import CheckpointError, SchemeError
from qconv.types import QuantizedLinear, Scheme, TensorSpec

SIGN_BIT = 128  # flipped, it turns code into code - 128 in two's complement
SCHEME = Scheme(bits=8, group_size=-1, dynamic_activations=True)


@dataclass(frozen=True)
class IntQuantized:
    """int8 weights with one scale per output channel; activations dynamic per token."""

    name = "int-quantized"
    suffixes = (".weight_scale", ".weight")

    def check_scheme(self, scheme: Scheme) -> None:
        found = (scheme.kind, scheme.bits, scheme.group_size, scheme.symmetric, scheme.dynamic_activations)
        if found != ("int", 8, -1, True, True):
            raise SchemeError(
                "int-quantized holds symmetric 8-bit integer weights with one scale per channel (group size -1) and "
                f"dynamic activations, got {scheme.bits}-bit {scheme.kind}, group size {scheme.group_size}, "
                f"symmetric {scheme.symmetric}, dynamic activations {scheme.dynamic_activations}; "
                "pack-quantized holds integer weights of 16-bit activations"
            )

    def check_shapes(self, module: str, n: int, k: int, scheme: Scheme) -> None:
        self.check_scheme(scheme)

    def check(self, q: QuantizedLinear, module: str, scale_dtype: torch.dtype) -> None:
        self.check_scheme(q.scheme)
        if q.group_index_K is not None:
            raise SchemeError(f"{module}: int-quantized has one group per row and stores no group index")
        check_values(q, module, scale_dtype)

    def pack(self, q: QuantizedLinear, module: str, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        return {
            module + ".weight": q.codes_NK.bitwise_xor(SIGN_BIT).view(torch.int8),
            module + ".weight_scale": q.scales_NG.to(scale_dtype),
        }

    def unpack(
        self, tensors: Mapping[str, Tensor], module: str, scheme: Scheme, location: str = "checkpoint"
    ) -> QuantizedLinear:
        reader = TensorReader(tensors, module, location)
        signed = reader.take(".weight", (torch.int8,), (None, None))
        scales = reader.take_scales(".weight_scale", scheme.scales_shape(*signed.shape))
        codes = signed.view(torch.uint8).bitwise_xor(SIGN_BIT) - (SIGN_BIT - scheme.mid_code)
        if codes.numel() and int(codes.max()) > scheme.max_code:  # below the smallest they wrap around
            raise reader.error(".weight", f"holds a code outside of {scheme.bits} bits")
        return QuantizedLinear(codes_NK=codes, scales_NG=scales, zeros_NG=None, group_index_K=None, scheme=scheme)

    def logical_shape(self, specs: Mapping[str, TensorSpec], module: str, scheme: Scheme) -> tuple[int, int] | None:
        return shape_of_weight(specs, module)

    def quantization_config(
        self,
        scheme: Scheme,
        quantized_modules: Collection[str],
        ignored_modules: Collection[str],
        has_group_index: bool = False,
    ) -> dict[str, Any]:
        self.check_scheme(scheme)
        return config_of(self.name, weight_args(scheme), per_token("int"), ignored_modules)

    def scheme_of(self, config: Mapping[str, Any], location: str) -> Scheme:
        weights, activations = only_group(config, location)
        activations = activations or {}
        known = [("int", bits, by, True) for bits, by in ((8, "channel"), (4, "channel"), (4, "group"))]
        if _described(weights) not in known or _described(activations) != ("int", 8, "token", True):
            raise CheckpointError(
                f"{location}: quantization_config: of int-quantized, read are symmetric integer weights, 8-bit by "
                "channel and 4-bit by channel or group, with symmetric 8-bit integer activations by token, found "
                f"(type, bits, strategy, symmetric) {_described(weights)} and {_described(activations)}"
            )
        if activations.get("dynamic") is not True:
            raise CheckpointError(
                f"{location}: quantization_config: read are dynamic activations, found dynamic: "
                f"{activations.get('dynamic')!r}; static input scales are not read"
            )
        size = weights.get("group_size") if weights["strategy"] == "group" else -1
        if type(size) is not int:
            raise CheckpointError(f"{location}: quantization_config: group_size is {size!r}")
        return replace(SCHEME, bits=weights.get("num_bits", 8), group_size=size)

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {}


def _described(args: Mapping[str, Any]) -> tuple[Any, ...]:
    """With the package's defaults for what is not said, but for the strategy."""
    return args.get("type", "int"), args.get("num_bits", 8), args.get("strategy"), args.get("symmetric", True)
