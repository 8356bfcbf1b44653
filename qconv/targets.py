"""The table of outputs: what `--requant` and `quantize --to` can make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qconv.types import Scheme

PLAIN_DTYPES = ("bf16", "fp16", "fp32")
Algorithm = Literal["rtn", "gptq", "awq", "awq+gptq", "fp8", "smoothquant", "smoothquant+gptq", "int8", "bnb"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One row of the table of outputs: an on-disk format and what may be put into it."""

    name: str
    format: str
    algorithms: tuple[Algorithm, ...]
    bits: tuple[int, ...]  # the default first
    symmetric: bool | None  # the default; None where the choice does not exist
    readers: str
    scheme: Scheme | None = None  # the only one that the format holds
    mixed_bits: tuple[int, ...] = ()  # of single linears, the output head among them; () = one scheme for all


TARGETS: Mapping[str, Target] = {
    "gptq": Target(
        name="gptq",
        format="gptq",
        algorithms=("gptq", "awq+gptq", "awq", "rtn"),
        bits=(4, 2, 3, 8),
        symmetric=True,
        readers="vLLM, SGLang, transformers + gptqmodel",
        mixed_bits=(2, 3, 4, 8),
    ),
    "gptq_v2": Target(
        name="gptq_v2",
        format="gptq_v2",
        algorithms=("gptq", "awq+gptq", "awq", "rtn"),
        bits=(4, 2, 3, 8),
        symmetric=True,
        readers="transformers + gptqmodel, vLLM",
        mixed_bits=(2, 3, 4, 8),
    ),
    "awq": Target(
        name="awq",
        format="awq",
        algorithms=("awq", "awq+gptq", "gptq", "rtn"),
        bits=(4,),
        symmetric=False,
        readers="vLLM, SGLang, transformers + gptqmodel",
    ),
    "w4a16": Target(
        name="w4a16",
        format="pack-quantized",
        algorithms=("gptq", "awq+gptq", "awq", "rtn"),
        bits=(4,),
        symmetric=True,
        readers="vLLM, SGLang, transformers + compressed-tensors",
        mixed_bits=(4, 8),
    ),
    "w8a16": Target(
        name="w8a16",
        format="pack-quantized",
        algorithms=("gptq", "awq+gptq", "awq", "rtn"),
        bits=(8,),
        symmetric=True,
        readers="vLLM, SGLang, transformers + compressed-tensors",
        mixed_bits=(4, 8),
    ),
    "fp8": Target(
        name="fp8",
        format="float-quantized",
        algorithms=("fp8",),
        bits=(8,),
        symmetric=None,
        readers="vLLM, SGLang, transformers + compressed-tensors",
        scheme=Scheme(kind="float", bits=8, group_size=-1, dynamic_activations=True),
    ),
    "fp8-block": Target(
        name="fp8-block",
        format="fp8-block",
        algorithms=("fp8",),
        bits=(8,),
        symmetric=None,
        readers="vLLM, SGLang, transformers (a GPU, or decoded while loading)",
        scheme=Scheme(kind="float", bits=8, group_size=128, block_rows=128, dynamic_activations=True),
    ),
    "int8": Target(
        name="int8",
        format="int-quantized",
        algorithms=("smoothquant+gptq", "smoothquant", "gptq", "int8"),
        bits=(8,),
        symmetric=None,
        readers="vLLM, SGLang, transformers + compressed-tensors",
        scheme=Scheme(bits=8, group_size=-1, dynamic_activations=True),
    ),
    "nf4": Target(
        name="nf4",
        format="bnb-nf4-dq",
        algorithms=("bnb",),
        bits=(4,),
        symmetric=None,
        readers="transformers + bitsandbytes, vLLM",
    ),
}
