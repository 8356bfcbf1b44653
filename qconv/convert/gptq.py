"""The GPTQ layout of AutoGPTQ, GPTQModel, vLLM and SGLang: ``qweight``, ``qzeros``, ``scales``, ``g_idx``.

Method: Frantar et al. 2022, "GPTQ", appendix; the layout is that of AutoGPTQ. For a weight [N, K] of
b bits in G groups: ``qweight`` int32 [K*b/32, N] packed along K, ``qzeros`` int32 [G, N*b/32] packed
along N, ``scales`` float16 [G, N], ``g_idx`` int32 [K] always. The weight is
``(code - zero) * scale`` of the column's group. Symmetric schemes store the middle code as zero point.

``gptq`` (version 1) stores ``zero - 1``, ``gptq_v2`` stores ``zero``. A zero point of 0 has no safe
spelling in version 1: readers disagree on the wrapped value (vLLM's kernels add 1 without a mask and
get 2**bits, GPTQModel adds to whole words and carries into the neighbour), so `check` refuses it
before packing and `unpack` refuses it in files.

Rounding points: none; scales must be exact in float16. Left out: 5 to 7 bits and planar words
(``gptq_p``), pack dtypes other than int32. Rules for single modules are in `mixed.py` and `module_config.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qconv.convert.bitpack import elements_per_unit, num_words, pack_last, unpack_last
from qconv.convert.format import (
    TensorReader,
    check_divisible,
    check_group_size,
    check_values,
    trivial_group_index,
)
from qconv.errors import CheckpointError, SchemeError
from qconv.types import QuantizedLinear, Scheme, TensorSpec


@dataclass(frozen=True)
class Gptq:
    """GPTQ layout; ``version`` 1 stores zero points minus one."""

    version: Literal[1, 2]

    suffixes = (".qweight", ".qzeros", ".scales", ".g_idx")

    @property
    def name(self) -> str:
        return "gptq" if self.version == 1 else "gptq_v2"

    def check_scheme(self, scheme: Scheme) -> None:
        if scheme.kind != "int":
            raise SchemeError(f"{self.name} holds integer codes only; float8 weights fit float-quantized")
        if scheme.bits not in (2, 3, 4, 8):
            raise SchemeError(f"{self.name} holds codes of 2, 3, 4 or 8 bits, got {scheme.bits}; w4a16 holds others")

    def check_shapes(self, module: str, n: int, k: int, scheme: Scheme) -> None:
        self.check_scheme(scheme)
        unit = elements_per_unit(scheme.bits)
        check_divisible(self.name, module, "out_features", n, unit)
        check_divisible(self.name, module, "in_features", k, unit)
        check_group_size(self.name, module, k, scheme)

    def check(self, q: QuantizedLinear, module: str, scale_dtype: torch.dtype) -> None:
        n, k = q.codes_NK.shape
        self.check_shapes(module, n, k, q.scheme)
        check_values(q, module, torch.float16)
        if self.version == 1 and q.zeros_NG is not None and bool((q.zeros_NG == 0).any()):
            raise SchemeError(
                f"{module}: {int((q.zeros_NG == 0).sum())} groups have zero point 0, which the gptq format (zero - 1) "
                "cannot store so that all readers agree; use gptq_v2, awq or pack-quantized, or a symmetric scheme"
            )

    def pack(self, q: QuantizedLinear, module: str, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        scheme, codes = q.scheme, q.codes_NK
        k = codes.shape[1]
        zeros = q.zeros_NG
        if zeros is None:
            zeros = torch.full_like(q.scales_NG, scheme.mid_code, dtype=torch.uint8)
        if self.version == 1:
            zeros = (zeros - 1) & scheme.max_code
        index = trivial_group_index(k, scheme, codes.device) if q.group_index_K is None else q.group_index_K
        return {
            module + ".qweight": pack_last(codes, scheme.bits).T.contiguous(),
            module + ".qzeros": pack_last(zeros.T, scheme.bits),
            module + ".scales": q.scales_NG.T.to(torch.float16).contiguous(),
            module + ".g_idx": index.to(torch.int32),
        }

    def unpack(
        self, tensors: Mapping[str, Tensor], module: str, scheme: Scheme, location: str = "checkpoint"
    ) -> QuantizedLinear:
        reader = TensorReader(tensors, module, location)
        qweight = reader.take(".qweight", (torch.int32,), (None, None))
        n, k = qweight.shape[1], qweight.shape[0] * 32 // scheme.bits
        groups = scheme.num_groups(k)
        scales = reader.take_scales(".scales", (groups, n))
        qzeros = reader.take(".qzeros", (torch.int32,), (groups, num_words(n, scheme.bits)))
        zeros = unpack_last(qzeros, scheme.bits, n)
        if self.version == 1:
            if bool((zeros == scheme.max_code).any()):
                raise reader.error(
                    ".qzeros",
                    f"stores {scheme.max_code}, which readers of the gptq format take for zero point 0 or for "
                    f"{scheme.max_code + 1}; quantize again as gptq_v2",
                )
            zeros = zeros + 1
        if scheme.symmetric and bool((zeros != scheme.mid_code).any()):
            raise reader.error(
                ".qzeros",
                f"has zero points other than {scheme.mid_code} though the configuration says sym; "
                "its 'sym' or 'checkpoint_format' (gptq or gptq_v2) does not fit the tensors",
            )
        return QuantizedLinear(
            codes_NK=unpack_last(qweight.T, scheme.bits, k),
            scales_NG=scales.T.contiguous(),
            zeros_NG=None if scheme.symmetric else zeros.T.contiguous(),
            group_index_K=reader.take_group_index(".g_idx", k, groups, scheme),
            scheme=scheme,
        )

    def logical_shape(self, specs: Mapping[str, TensorSpec], module: str, scheme: Scheme) -> tuple[int, int] | None:
        shape = specs[module + ".qweight"].shape
        return (shape[1], shape[0] * 32 // scheme.bits) if len(shape) == 2 else None

    def quantization_config(
        self,
        scheme: Scheme,
        quantized_modules: Collection[str],
        ignored_modules: Collection[str],
        has_group_index: bool = False,
    ) -> dict[str, Any]:
        self.check_scheme(scheme)
        return {
            "quant_method": "gptq",
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            # Static activation order needs no index at run time, so readers may take their fast path.
            "desc_act": has_group_index,
            "sym": scheme.symmetric,
            "lm_head": "lm_head" in quantized_modules,
            "true_sequential": False,
            "pack_dtype": "int32",
            "checkpoint_format": self.name,
        }

    def scheme_of(self, config: Mapping[str, Any], location: str) -> Scheme:
        where = f"{location}: quantization_config"
        overrides = [rule for rule in config.get("dynamic") or {} if not rule.startswith("-:")]
        if overrides:
            raise CheckpointError(f"{where}: per-module GPTQ settings ({overrides[0]!r}) are not read")
        if config.get("pack_dtype", "int32") != "int32":
            raise CheckpointError(f"{where}: GPTQ words of {config['pack_dtype']!r} are not read, only int32")
        bits, group_size = config.get("bits"), config.get("group_size", 128)
        if bits not in (2, 3, 4, 8) or type(group_size) is not int:
            raise CheckpointError(f"{where}: bits {bits!r}, group_size {group_size!r}; read are 2, 3, 4 and 8 bits")
        return Scheme(
            bits=bits,
            group_size=group_size,
            symmetric=bool(config.get("sym", True)),
            activation_order=bool(config.get("desc_act", False)),
        )

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {"quantize_config.json": dict(config)}
