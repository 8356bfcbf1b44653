"""The table of outputs: what `--requant` and `quantize --to` can make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from qconv.types import Scheme

PLAIN_DTYPES = ("bf16", "fp16", "fp32")
Algorithm = Literal[
    "rtn",
    "gptq",
    "awq",
    "awq+gptq",
    "fp8",
    "smoothquant",
    "smoothquant+gptq",
    "int8",
    "bnb",
    "ggml",
    "plain",
    "zeros",
]

_CODES: tuple[Algorithm, ...] = ("gptq", "awq+gptq", "awq", "rtn")  # choose codes for any grid


CACHE_SCALE_FORMATS = (
    "pack-quantized",
    "float-quantized",
    "int-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "fp8-block",
)


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
    activations: Literal["int8", "float8"] | None = None  # what inputs are rounded to, where `scheme` does not say it
    mixed_bits: tuple[int, ...] = ()  # of single linears, the output head among them; () = one scheme for all
    mixed_targets: tuple[str, ...] = ()  # whose scheme single linears of the blocks may have, each in its own layout

    @property
    def has_float_zeros(self) -> bool:
        """Whether a group's zero point may be any number, and no code alone."""
        return self.format in ("gguf-q4_1", "hqq")

    @property
    def gguf_kind(self) -> str | None:
        """Of ggml's kinds of tensors, for a GGUF file."""
        return self.format.removeprefix("gguf-") if self.format.startswith("gguf-") else None

    @property
    def holds_cache_scales(self) -> bool:
        """Whether engines read scales of an FP8 cache of keys and values from such a folder."""
        return self.format in CACHE_SCALE_FORMATS

    @property
    def is_onnx(self) -> bool:
        """A folder of ONNX Runtime GenAI."""
        return self.format in ("onnx", "matmul-nbits")


MIXED_TARGETS = ("nvfp4a16", "mxfp4a16")
"""4-bit floats of 16-bit activations, which readers of compressed-tensors take beside integers."""
_GGUF_BITS = {"q4_0": 4, "q4_1": 4, "q8_0": 8, "q5_0": 5, "q5_1": 5, "f16": 16, "bf16": 16, "f32": 32}
GGUF_READERS = "llama.cpp, Ollama, LM Studio, transformers (decoded while loading)"


def _gguf(kind: str, bits: int) -> Target:
    """One file in blocks of 32 weights, or without blocks. Codes of 5 bits are chosen by llama.cpp's rule alone."""
    is_solved = bits in (4, 8)
    chosen: tuple[Algorithm, ...] = ("gptq", "awq+gptq", "awq", "ggml") if is_solved else ("ggml",)
    return Target(
        name=f"gguf-{kind}",
        format=f"gguf-{kind}",
        algorithms=(*chosen, "zeros") if kind == "q4_1" else chosen,
        bits=(bits,),
        symmetric=None,
        readers=GGUF_READERS,
        scheme=Scheme(bits=bits, group_size=32, symmetric=not kind.endswith("_1")) if is_solved else None,
    )


ONNX_READERS = "ONNX Runtime GenAI, ONNX Runtime, OpenVINO"
ONNX_BLOCKS = (128, 64, 32, 16)  # block sizes that MatMulNBits has and models' widths are multiples of


def _onnx(bits: int) -> Target:
    """Linears in blocks of codes; what is not quantized in float32, unless --dtype says otherwise."""
    return Target(
        name=f"onnx-int{bits}",
        format="matmul-nbits",
        algorithms=_CODES,
        bits=(bits,),
        symmetric=True,
        readers=ONNX_READERS,
    )


TARGETS: Mapping[str, Target] = {
    "gptq": Target(
        name="gptq",
        format="gptq",
        algorithms=(*_CODES, "zeros"),
        bits=(4, 2, 3, 8),
        symmetric=True,
        readers="vLLM, SGLang, transformers + gptqmodel",
        mixed_bits=(2, 3, 4, 8),
    ),
    "gptq_v2": Target(
        name="gptq_v2",
        format="gptq_v2",
        algorithms=(*_CODES, "zeros"),
        bits=(4, 2, 3, 8),
        symmetric=True,
        readers="transformers + gptqmodel, vLLM",
        mixed_bits=(2, 3, 4, 8),
    ),
    "awq": Target(
        name="awq",
        format="awq",
        algorithms=("awq", "awq+gptq", "gptq", "rtn", "zeros"),
        bits=(4,),
        symmetric=False,
        readers="vLLM, SGLang, transformers + gptqmodel",
    ),
    "hqq": Target(
        name="hqq",
        format="hqq",
        algorithms=("zeros",),
        bits=(4, 2, 3, 5, 6, 8),
        symmetric=None,
        readers="transformers 4 + hqq, vLLM (before 0.15: 4 bits, groups of 64)",
    ),
    "w4a16": Target(
        name="w4a16",
        format="pack-quantized",
        algorithms=(*_CODES, "zeros"),
        bits=(4,),
        symmetric=True,
        readers="vLLM, SGLang, transformers + compressed-tensors",
        mixed_bits=(3, 4, 5, 6, 8),
        mixed_targets=MIXED_TARGETS,
    ),
    "w8a16": Target(
        name="w8a16",
        format="pack-quantized",
        algorithms=(*_CODES, "zeros"),
        bits=(8,),
        symmetric=True,
        readers="vLLM, SGLang, transformers + compressed-tensors",
        mixed_bits=(3, 4, 5, 6, 8),
        mixed_targets=MIXED_TARGETS,
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
    "w4a8": Target(
        name="w4a8",
        format="pack-quantized",
        algorithms=_CODES,
        bits=(4,),
        symmetric=True,
        readers="vLLM, transformers + compressed-tensors",
        activations="int8",
    ),
    "w4a8-fp8": Target(
        name="w4a8-fp8",
        format="pack-quantized",
        algorithms=_CODES,
        bits=(4,),
        symmetric=True,
        readers="vLLM, transformers + compressed-tensors",
        activations="float8",
    ),
    "nvfp4": Target(
        name="nvfp4",
        format="nvfp4-pack-quantized",
        algorithms=_CODES,
        bits=(4,),
        symmetric=None,
        readers="vLLM, SGLang, transformers + compressed-tensors",
        scheme=Scheme(kind="float", bits=4, group_size=16, scale_format="e4m3", dynamic_activations=True),
    ),
    "nvfp4a16": Target(
        name="nvfp4a16",
        format="nvfp4-pack-quantized",
        algorithms=_CODES,
        bits=(4,),
        symmetric=None,
        readers="vLLM, transformers + compressed-tensors",
        scheme=Scheme(kind="float", bits=4, group_size=16, scale_format="e4m3"),
    ),
    "mxfp4": Target(
        name="mxfp4",
        format="mxfp4-pack-quantized",
        algorithms=_CODES,
        bits=(4,),
        symmetric=None,
        readers="vLLM, transformers + compressed-tensors",
        scheme=Scheme(kind="float", bits=4, group_size=32, scale_format="e8m0", dynamic_activations=True),
    ),
    "mxfp4a16": Target(
        name="mxfp4a16",
        format="mxfp4-pack-quantized",
        algorithms=_CODES,
        bits=(4,),
        symmetric=None,
        readers="vLLM, transformers + compressed-tensors",
        scheme=Scheme(kind="float", bits=4, group_size=32, scale_format="e8m0"),
    ),
    "gpt-oss-mxfp4": Target(
        name="gpt-oss-mxfp4",
        format="gpt-oss-mxfp4",
        algorithms=_CODES,
        bits=(4,),
        symmetric=None,
        readers="vLLM, SGLang, transformers",
        scheme=Scheme(kind="float", bits=4, group_size=32, scale_format="e8m0"),
    ),
    "nf4": Target(
        name="nf4",
        format="bnb-nf4-dq",
        algorithms=("bnb",),
        bits=(4,),
        symmetric=None,
        readers="transformers + bitsandbytes, vLLM (before 0.32)",
    ),
    "onnx": Target(name="onnx", format="onnx", algorithms=("plain",), bits=(16,), symmetric=None, readers=ONNX_READERS),
    "onnx-int4": _onnx(4),
    "onnx-int8": _onnx(8),
    **{f"gguf-{kind}": _gguf(kind, bits) for kind, bits in _GGUF_BITS.items()},
}


def target_scheme(name: str) -> Scheme:
    """The only scheme of a target that has one alone."""
    scheme = TARGETS[name].scheme
    assert scheme is not None  # the caller's, by `mixed_targets`
    return scheme


def mixed_target(scheme: Scheme) -> str | None:
    """The target that gives a linear among others its 4-bit floats; None for integers."""
    plain = replace(scheme, activation_order=False)
    return next((name for name in MIXED_TARGETS if TARGETS[name].scheme == plain), None)


ONNX_PLAIN = ("onnx",)  # without codes: what convert makes
GGUF_TARGETS = tuple(target.name for target in TARGETS.values() if target.gguf_kind is not None)


def gguf_file_name(kind: str) -> str:
    """In the folder of an output."""
    return f"model-{kind.upper()}.gguf"
