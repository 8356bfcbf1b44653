"""float8 weights with a scale per block of 128 x 128: the layout of DeepSeek-V3, ``quant_method: fp8``.

Layout source: DeepSeek-V3 technical report (2024), section 3.3.2, and its published checkpoints; transformers 5.23,
`FineGrainedFP8Config` and `integrations/finegrained_fp8.py`; vLLM and SGLang read the same. ``weight``
float8_e4m3fn [N, K], ``weight_scale_inv`` float32 [ceil(N / 128), ceil(K / 128)], which despite its name
multiplies. Activations are quantized at run time to float8 per token and 128 features, and store nothing.

Rounding points: none; scales are float32 and need not be exact in any other dtype. Readers multiply in float32 and
round once to the model's dtype.

Read, but not written, are last blocks that are partial: transformers takes the block's size from the number of
scales, which for N = 192 gives blocks of 96 rows and other weights, and refuses N = 576; vLLM demands whole blocks of
every weight that it fuses or splits between GPUs.

Left out: one scale for a whole tensor, static activation scales, scales stored as powers of two (``ue8m0``), fp4
experts, quantized embeddings.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qconv.convert.format import TensorReader, check_values, shape_of_weight
from qconv.errors import CheckpointError, SchemeError
from qconv.types import QuantizedLinear, Scheme, TensorSpec

SIZES_WRITTEN = (128, 128)  # kernels of serving engines know no other block


@dataclass(frozen=True)
class Fp8Block:
    """float8_e4m3fn weights with one float32 scale per block; activations dynamic per token and 128 features."""

    name = "fp8-block"
    suffixes = (".weight_scale_inv", ".weight")

    def check_scheme(self, scheme: Scheme) -> None:
        blocks = (scheme.block_rows, scheme.group_size)
        if scheme.kind != "float" or blocks != SIZES_WRITTEN or not scheme.dynamic_activations:
            raise SchemeError(
                f"fp8-block holds float8 weights in blocks of {SIZES_WRITTEN} with dynamic activations, got "
                f"{scheme.kind}, blocks of {blocks}, dynamic activations {scheme.dynamic_activations}"
            )

    def check_shapes(self, module: str, n: int, k: int, scheme: Scheme) -> None:
        self.check_scheme(scheme)
        for what, size, unit in (("out_features", n, scheme.block_rows), ("in_features", k, scheme.group_size)):
            if size % unit:
                raise SchemeError(
                    f"{module}: fp8-block needs {what} divisible by {unit}, got {size}, or readers refuse "
                    "or misread the weight; float-quantized (one scale per channel) takes any size"
                )

    def check(self, q: QuantizedLinear, module: str, scale_dtype: torch.dtype) -> None:
        n, k = q.codes_NK.shape
        self.check_shapes(module, n, k, q.scheme)
        check_values(q, module, torch.float32)

    def pack(self, q: QuantizedLinear, module: str, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        return {module + ".weight": q.codes_NK, module + ".weight_scale_inv": q.scales_NG.to(torch.float32)}

    def unpack(
        self, tensors: Mapping[str, Tensor], module: str, scheme: Scheme, location: str = "checkpoint"
    ) -> QuantizedLinear:
        reader = TensorReader(tensors, module, location)
        codes = reader.take(".weight", (torch.float8_e4m3fn,), (None, None))
        n, k = codes.shape
        scales = reader.take_scales(".weight_scale_inv", scheme.scales_shape(n, k))
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
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [scheme.block_rows, scheme.group_size],
            "modules_to_not_convert": list(ignored_modules),
        }

    def scheme_of(self, config: Mapping[str, Any], location: str) -> Scheme:
        where = f"{location}: quantization_config"
        sizes = config.get("weight_block_size")
        if not isinstance(sizes, list) or len(sizes) != 2 or not all(type(s) is int and s > 1 for s in sizes):
            raise CheckpointError(
                f"{where}: of quant_method fp8, read are weights in blocks, with weight_block_size as two whole "
                f"numbers above 1, found {sizes!r}"
            )
        for key, default, accepted in (
            ("activation_scheme", "dynamic", "dynamic"),
            ("fmt", "e4m3", "e4m3"),
            ("scale_fmt", "float", "float"),
            ("expert_dtype", "fp8", "fp8"),
        ):
            found = config.get(key)
            if (default if found is None else found) != accepted:
                raise CheckpointError(f"{where}: of quant_method fp8, read is {key} {accepted!r}, found {found!r}")
        return Scheme(kind="float", bits=8, group_size=sizes[1], block_rows=sizes[0], dynamic_activations=True)

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {}
