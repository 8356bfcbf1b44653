"""Random linears of 4-bit floats, and compressed-tensors' own decoding of what is stored for them."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor

from qconv.convert import FORMATS
from qconv.types import QuantizedLinear, Scheme

NVFP4A16 = Scheme(kind="float", bits=4, group_size=16, scale_format="e4m3")
NVFP4 = replace(NVFP4A16, dynamic_activations=True)
MXFP4A16 = Scheme(kind="float", bits=4, group_size=32, scale_format="e8m0")
MXFP4 = replace(MXFP4A16, dynamic_activations=True)
LAYOUTS = {"nvfp4-pack-quantized": (NVFP4A16, NVFP4), "mxfp4-pack-quantized": (MXFP4A16, MXFP4)}


def random_linear(scheme: Scheme, n: int, k: int, seed: int, global_scale: float = 64.0) -> QuantizedLinear:
    """All codes, negative zero among them, and all positive scales that the layout can store."""
    generator = torch.Generator().manual_seed(seed)
    shape = scheme.scales_shape(n, k)
    if scheme.has_global_scale:
        stored = torch.randint(1, 127, shape, generator=generator, dtype=torch.uint8).view(torch.float8_e4m3fn)
        scales = stored.float() / global_scale
    else:
        scales = 2.0 ** torch.randint(-20, 20, shape, generator=generator)
    return QuantizedLinear(
        codes_NK=torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8),
        scales_NG=scales,
        zeros_NG=None,
        group_index_K=None,
        scheme=scheme,
        input_scale=torch.tensor([global_scale * 3]) if scheme.stores_input_scale else None,
        global_scale=torch.tensor([global_scale]) if scheme.has_global_scale else None,
    )


def scheme_of_the_package(name: str, scheme: Scheme) -> QuantizationScheme:
    config: dict[str, Any] = FORMATS[name].quantization_config(scheme, ["layer"], [])
    return QuantizationScheme(**config["config_groups"]["group_0"])


def decompressed(name: str, tensors: dict[str, Tensor], scheme: Scheme) -> Tensor:
    """By the package, bfloat16."""
    package = BaseCompressor.get_value_from_registry(name)
    local = {key.removeprefix("layer."): tensor for key, tensor in tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight: Tensor = package.decompress(local, scheme_of_the_package(name, scheme))["weight"]
    return weight
