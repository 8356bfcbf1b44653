"""MXFP4 as gpt-oss was published: experts alone, ``quant_method: mxfp4``.

Layout source: the published checkpoints; transformers 5.23, `integrations/mxfp4.py`; vLLM and SGLang read the same. Of
one linear, ``weight_blocks`` uint8 [N, K / 32, 16] and ``weight_scales`` uint8 [N, K / 32] hold what ``weight_packed``
and ``weight_scale`` of `fp4.py` hold, in other shapes. In files the linears of all experts are fused, see
`fused_experts.py`; biases lie beside them.

Rounding points: none. Every value is exact in bfloat16.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qconv.convert.format import TensorReader
from qconv.convert.fp4 import MXFP4, PACKED, SCALE
from qconv.types import QuantizedLinear, Scheme, TensorSpec

BYTES = 16  # of a block
# As the published checkpoints say it: everything but the experts.
_NOT_CONVERTED = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")


@dataclass(frozen=True)
class GptOssMxfp4:
    """4-bit floats in groups of 32, each with a power of two."""

    name = "gpt-oss-mxfp4"
    suffixes = (".weight_blocks", ".weight_scales")

    def check_scheme(self, scheme: Scheme) -> None:
        MXFP4.check_scheme(scheme)

    def check_shapes(self, module: str, n: int, k: int, scheme: Scheme) -> None:
        MXFP4.check_shapes(module, n, k, scheme)

    def check(self, q: QuantizedLinear, module: str, scale_dtype: torch.dtype) -> None:
        MXFP4.check(q, module, scale_dtype)

    def pack(self, q: QuantizedLinear, module: str, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        packed = MXFP4.pack(q, module, scale_dtype)
        blocks, scales = (module + suffix for suffix in self.suffixes)
        return {
            blocks: packed[module + PACKED].reshape(len(q.codes_NK), -1, BYTES),
            scales: packed[module + SCALE],
        }

    def unpack(
        self, tensors: Mapping[str, Tensor], module: str, scheme: Scheme, location: str = "checkpoint"
    ) -> QuantizedLinear:
        reader = TensorReader(tensors, module, location)
        blocks = reader.take(".weight_blocks", (torch.uint8,), (None, None, BYTES))
        scales = reader.take(".weight_scales", (torch.uint8,), tuple(blocks.shape[:2]))
        return MXFP4.unpack({module + PACKED: blocks.flatten(1), module + SCALE: scales}, module, scheme, location)

    def logical_shape(self, specs: Mapping[str, TensorSpec], module: str, scheme: Scheme) -> tuple[int, int] | None:
        shape = specs[module + ".weight_blocks"].shape
        return (shape[0], shape[1] * shape[2] * 2)

    def quantization_config(
        self,
        scheme: Scheme,
        quantized_modules: Collection[str],
        ignored_modules: Collection[str],
        has_group_index: bool = False,
    ) -> dict[str, Any]:
        self.check_scheme(scheme)
        return {"quant_method": "mxfp4", "modules_to_not_convert": list(_NOT_CONVERTED)}

    def scheme_of(self, config: Mapping[str, Any], location: str) -> Scheme:
        return MXFP4.scheme

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {}
