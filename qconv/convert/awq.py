"""The AWQ ``gemm`` layout of AutoAWQ, vLLM and SGLang: ``qweight``, ``qzeros``, ``scales``.

Method: Lin et al. 2023, "AWQ"; the layout is that of AutoAWQ's ``WQLinear_GEMM``. For a weight [N, K]
in G groups: ``qweight`` int32 [K, N/8] and ``qzeros`` int32 [G, N/8] hold eight 4-bit values of
neighbouring columns a word, nibble i that of column ``COLUMN_OF_NIBBLE[i]``; ``scales`` float16
[G, N]. Zero points are stored as they are; symmetric schemes store 8.

Rounding points: none; scales must be exact in float16. Left out: the ``gemv`` and ``marlin`` layouts.
AWQ's channel scaling is folded into the neighbouring weights by the algorithm and leaves no trace here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qconv.convert.bitpack import pack_last, unpack_last
from qconv.convert.format import TensorReader, check_divisible, check_group_size, check_values
from qconv.errors import CheckpointError, SchemeError
from qconv.types import QuantizedLinear, Scheme, TensorSpec

COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)
NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class Awq:
    """AWQ gemm layout, 4 bits."""

    name = "awq"
    suffixes = (".qweight", ".qzeros", ".scales")

    def check_scheme(self, scheme: Scheme) -> None:
        if scheme.kind != "int" or scheme.bits != 4:
            raise SchemeError(f"awq holds 4-bit integer codes only, got {scheme.bits}-bit {scheme.kind}")

    def check_shapes(self, module: str, n: int, k: int, scheme: Scheme) -> None:
        self.check_scheme(scheme)
        check_divisible(self.name, module, "out_features", n, 8)
        check_group_size(self.name, module, k, scheme)

    def check(self, q: QuantizedLinear, module: str, scale_dtype: torch.dtype) -> None:
        n, k = q.codes_NK.shape
        self.check_shapes(module, n, k, q.scheme)
        check_values(q, module, torch.float16)
        if q.group_index_K is not None:
            raise SchemeError(f"{module}: awq has no group index; use static groups, or gptq or pack-quantized")

    def pack(self, q: QuantizedLinear, module: str, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        zeros = q.zeros_NG
        if zeros is None:
            zeros = torch.full_like(q.scales_NG, q.scheme.mid_code, dtype=torch.uint8)
        return {
            module + ".qweight": pack_last(_reorder(q.codes_NK.T, COLUMN_OF_NIBBLE), 4),
            module + ".qzeros": pack_last(_reorder(zeros.T, COLUMN_OF_NIBBLE), 4),
            module + ".scales": q.scales_NG.T.to(torch.float16).contiguous(),
        }

    def unpack(
        self, tensors: Mapping[str, Tensor], module: str, scheme: Scheme, location: str = "checkpoint"
    ) -> QuantizedLinear:
        reader = TensorReader(tensors, module, location)
        qweight = reader.take(".qweight", (torch.int32,), (None, None))
        k, n = qweight.shape[0], qweight.shape[1] * 8
        if scheme.group_size != -1 and k % scheme.group_size:
            raise reader.error(".qweight", f"has {k} rows, no multiple of the group size {scheme.group_size}")
        groups = scheme.num_groups(k)
        scales = reader.take_scales(".scales", (groups, n))
        qzeros = reader.take(".qzeros", (torch.int32,), (groups, n // 8))
        zeros = _reorder(unpack_last(qzeros, 4, n), NIBBLE_OF_COLUMN)
        if scheme.symmetric and bool((zeros != scheme.mid_code).any()):
            raise reader.error(
                ".qzeros",
                f"has zero points other than {scheme.mid_code} though the configuration says zero_point: false",
            )
        return QuantizedLinear(
            codes_NK=_reorder(unpack_last(qweight, 4, n), NIBBLE_OF_COLUMN).T.contiguous(),
            scales_NG=scales.T.contiguous(),
            zeros_NG=None if scheme.symmetric else zeros.T.contiguous(),
            group_index_K=None,
            scheme=scheme,
        )

    def logical_shape(self, specs: Mapping[str, TensorSpec], module: str, scheme: Scheme) -> tuple[int, int] | None:
        shape = specs[module + ".qweight"].shape
        return (shape[1] * 8, shape[0]) if len(shape) == 2 else None

    def quantization_config(
        self,
        scheme: Scheme,
        quantized_modules: Collection[str],
        ignored_modules: Collection[str],
        has_group_index: bool = False,
    ) -> dict[str, Any]:
        self.check_scheme(scheme)
        if has_group_index:
            raise SchemeError("awq has no group index; use static groups, or gptq or pack-quantized")
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": scheme.group_size,
            # Readers take qzeros either way; a symmetric scheme stores 8 in all of them.
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(ignored_modules) or None,
        }

    def scheme_of(self, config: Mapping[str, Any], location: str) -> Scheme:
        where = f"{location}: quantization_config"
        version = str(
            config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm"
        ).lower()
        bits = config.get("bits", config.get("w_bit"))
        group_size = config.get("group_size", config.get("q_group_size", 128))
        if version != "gemm" or bits != 4 or type(group_size) is not int:
            raise CheckpointError(
                f"{where}: AWQ version {version!r}, bits {bits!r}, group_size {group_size!r}; read is 4-bit 'gemm'. "
                "For another version take the gemm folder of the same model, or the 16-bit one"
            )
        return Scheme(bits=4, group_size=group_size, symmetric=not config.get("zero_point", True))

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {}


def _reorder(columns: Tensor, order: tuple[int, ...]) -> Tensor:
    """Permutes every eight neighbouring elements of the last axis."""
    groups = columns.reshape(*columns.shape[:-1], -1, 8)
    return torch.stack([groups[..., i] for i in order], dim=-1).flatten(-2)
