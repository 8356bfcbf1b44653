"""The table of outputs: what `--requant` and `quantize --to` can make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Algorithm = Literal["rtn", "gptq", "awq", "fp8"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One row of the table of outputs: an on-disk format and what may be put into it."""

    name: str
    format: str
    algorithms: tuple[Algorithm, ...]
    bits: tuple[int, ...]
    symmetric: bool | None  # the default; None where the choice does not exist
    readers: str

    @property
    def is_float(self) -> bool:
        return self.algorithms == ("fp8",)


TARGETS: Mapping[str, Target] = {
    "gptq": Target(
        name="gptq",
        format="gptq",
        algorithms=("gptq", "awq", "rtn"),
        bits=(4, 8),
        symmetric=True,
        readers="vLLM, SGLang, transformers + gptqmodel",
    ),
    "awq": Target(
        name="awq",
        format="awq",
        algorithms=("awq", "gptq", "rtn"),
        bits=(4,),
        symmetric=False,
        readers="vLLM, SGLang, transformers + gptqmodel",
    ),
    "w4a16": Target(
        name="w4a16",
        format="pack-quantized",
        algorithms=("gptq", "awq", "rtn"),
        bits=(4, 8),
        symmetric=True,
        readers="vLLM, SGLang, transformers + compressed-tensors",
    ),
    "fp8": Target(
        name="fp8",
        format="float-quantized",
        algorithms=("fp8",),
        bits=(8,),
        symmetric=None,
        readers="vLLM, SGLang, transformers + compressed-tensors",
    ),
}
