"""Writing bitsandbytes 4-bit weights (NF4, FP4, with or without double quantization) as transformers saves them.

Method and arithmetic: `bnb_kernels.py`; layout and reading: `bnb.py`. `encode_linear` chooses codes as
``load_in_4bit`` does, `Bnb4bit` lays them out; bitsandbytes is not needed for either.

The JSON of a weight's quantization state holds the offset of double quantization in as many digits as it takes, so
its length depends on the data. Layouts are planned before any weight is read, hence it is padded with blanks, which
JSON allows after its value, to the length of the longest offset.

Rounding points: absmax and codes are chosen from the weight as it is given, float32 included; what is decoded is
rounded once to ``dtype``. Left out: storing codes in other dtypes than uint8.

Legend: N = out features, K = in features, B = blocks of the flattened weight.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qconv.convert.bnb import STATE_INFIX, BnbState, read_state
from qconv.convert.bnb_kernels import (
    DTYPES,
    NESTED_BLOCK_SIZE,
    decode_absmax,
    decode_codes,
    encode,
    quant_map,
)
from qconv.errors import CheckpointError, NumericsError, SchemeError
from qconv.types import BnbBackend, BnbKind, Checkpoint

BLOCK_SIZE = 64
LONGEST_OFFSET = 25  # characters of a float64, such as -2.2250738585072014e-308, and one more
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class BnbLinear:
    """One 4-bit weight, in the parts that are stored.

    Attributes:
        codes: uint8 ``[N * K / 2, 1]``, element 2i in the high nibble.
        absmax_B: float32, or uint8 with double quantization.
        quant_map: float32 ``[16]``.
        nested_absmax: float32 ``[ceil(B / 256)]``, or None without double quantization; so are the next two.
        nested_quant_map: float32 ``[256]``.
        nested_offset: float32 ``[]``.
        kind: of the numbers.
        shape: ``(N, K)``.
        dtype: that the weight is decoded to.
    """

    codes: Tensor
    absmax_B: Tensor
    quant_map: Tensor
    nested_absmax: Tensor | None
    nested_quant_map: Tensor | None
    nested_offset: Tensor | None
    kind: BnbKind
    shape: tuple[int, int]
    dtype: torch.dtype

    def dequantize(self) -> Tensor:
        """The weight ``[N, K]`` in ``dtype``, as bitsandbytes decodes it."""
        absmax_B = self.absmax_B
        if self.nested_offset is not None:
            assert self.nested_quant_map is not None
            assert self.nested_absmax is not None
            absmax_B = decode_absmax(
                absmax_B, self.nested_quant_map, self.nested_absmax, self.nested_offset, NESTED_BLOCK_SIZE
            )
        return decode_codes(self.codes.view(-1), absmax_B, self.quant_map, BLOCK_SIZE, self.shape, self.dtype)


def encode_linear(
    w_NK: Tensor, kind: BnbKind, dtype: torch.dtype, name: str, backend: BnbBackend | None = None
) -> BnbLinear:
    """Quantizes a weight ``[N, K]`` (float16, bfloat16 or float32) as ``load_in_4bit`` does.

    Args:
        kind: ``nf4``, ``nf4-dq``, ``fp4`` or ``fp4-dq``.
        dtype: that readers decode to; the model's.
        name: the weight, for messages.
        backend: see `bnb_kernels.encode`.

    Raises:
        SchemeError: an unknown kind, or a dtype that bitsandbytes does not have.
        NumericsError: the weight holds NaN or infinity.
    """
    n, k = w_NK.shape
    parts = encode(w_NK, kind, BLOCK_SIZE, backend, name)
    return BnbLinear(
        codes=parts["codes"],
        absmax_B=parts["absmax"],
        quant_map=parts["quant_map"],
        nested_absmax=parts.get("nested_absmax"),
        nested_quant_map=parts.get("nested_quant_map"),
        nested_offset=parts.get("nested_offset"),
        kind=kind,
        shape=(n, k),
        dtype=dtype,
    )


def meta_linear(n: int, k: int, kind: BnbKind, dtype: torch.dtype) -> BnbLinear:
    """What `encode_linear` would give, without data: `Bnb4bit.pack` of it tells names, shapes and dtypes."""
    num_blocks = -(-n * k // BLOCK_SIZE)
    nested = kind.endswith("-dq")
    with torch.device("meta"):
        return BnbLinear(
            codes=torch.empty(-(-n * k // 2), 1, dtype=torch.uint8),
            absmax_B=torch.empty(num_blocks, dtype=torch.uint8 if nested else torch.float32),
            quant_map=torch.empty(16),
            nested_absmax=torch.empty(-(-num_blocks // NESTED_BLOCK_SIZE)) if nested else None,
            nested_quant_map=torch.empty(256) if nested else None,
            nested_offset=torch.empty(()) if nested else None,
            kind=kind,
            shape=(n, k),
            dtype=dtype,
        )


@dataclass(frozen=True)
class Bnb4bit:
    """The layout of one kind. Reading is `dequantize`'s, which knows bitsandbytes by its tensors."""

    kind: BnbKind

    @property
    def name(self) -> str:
        """What `DequantizedCheckpoint.kind` says of such a checkpoint."""
        return "bnb-" + self.kind

    @property
    def quant_type(self) -> str:
        return self.kind.removesuffix("-dq")

    @property
    def suffixes(self) -> tuple[str, ...]:
        """All tensor suffixes of a module; the first marks a quantized module."""
        nested = (".weight.nested_absmax", ".weight.nested_quant_map") if self.kind.endswith("-dq") else ()
        state = f".weight{STATE_INFIX}{self.quant_type}"
        return (state, ".weight", ".weight.absmax", ".weight.quant_map", *nested)

    def check_shapes(self, module: str, n: int, k: int) -> None:
        """Raises SchemeError for rows that end inside a block, which bitsandbytes misreads on some CPUs (see `bnb`)."""
        if k % BLOCK_SIZE:
            raise SchemeError(
                f"{module}: {self.name} needs in_features divisible by its blocks of {BLOCK_SIZE}, got {k}: "
                "leave this module unquantized"
            )

    def check(self, q: BnbLinear, module: str) -> None:
        """Raises SchemeError or NumericsError when ``pack`` would store what readers refuse or misread."""
        self.check_shapes(module, *q.shape)
        if q.kind != self.kind or q.dtype not in DTYPE_NAMES:
            raise SchemeError(
                f"{module}: expected {self.kind} for float16, bfloat16 or float32, got {q.kind} {q.dtype}"
            )
        table = quant_map(self.quant_type, q.quant_map.device)
        if not torch.equal(q.quant_map, table):
            raise SchemeError(
                f"{module}: the table of values is not that of {self.quant_type}, which readers have built in"
            )
        scales = (q.absmax_B, q.nested_absmax, q.nested_quant_map, q.nested_offset)
        if not all(bool(torch.isfinite(part).all()) for part in scales if part is not None):
            raise NumericsError(f"{module}: a quantization scale is NaN or infinite")

    def pack(self, q: BnbLinear, module: str) -> dict[str, Tensor]:
        """The tensors to store, by full name. Runs on meta tensors."""
        weight = module + ".weight"
        tensors = {weight: q.codes, weight + ".absmax": q.absmax_B, weight + ".quant_map": q.quant_map}
        if q.nested_absmax is not None and q.nested_quant_map is not None:
            tensors[weight + ".nested_absmax"] = q.nested_absmax
            tensors[weight + ".nested_quant_map"] = q.nested_quant_map
        tensors[weight + STATE_INFIX + self.quant_type] = _state_tensor(q)
        return tensors

    def quantization_config(self, dtype: torch.dtype, ignored_modules: Collection[str]) -> dict[str, Any]:
        """The ``quantization_config`` of ``config.json``, as transformers' `BitsAndBytesConfig` writes it.

        ``ignored_modules`` are the linears that stay unquantized; kernels compute in ``dtype``.
        """
        return {
            "quant_method": "bitsandbytes",
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_compute_dtype": DTYPE_NAMES[dtype],
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": self.kind.endswith("-dq"),
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": list(ignored_modules),
            "llm_int8_threshold": 6.0,
        }


def read_linear(checkpoint: Checkpoint, module: str, kind: BnbKind, device: str = "cpu") -> BnbLinear:
    """The stored parts of one 4-bit weight: inverse of ``pack``, bit for bit.

    Raises:
        CheckpointError: a tensor is missing, damaged, or of another kind or block size.
    """
    weight, format_ = module + ".weight", Bnb4bit(kind)
    state = read_state(checkpoint, weight, module + format_.suffixes[0])
    _check_state(checkpoint, state, kind)

    def read(suffix: str) -> Tensor:
        return checkpoint.read(weight + suffix, device)

    nested = state.nested_block_size is not None
    offset = torch.tensor(state.nested_offset, dtype=torch.float32, device=device)
    return BnbLinear(
        codes=read("").view(torch.uint8).reshape(-1, 1),
        absmax_B=read(".absmax"),
        quant_map=read(".quant_map"),
        nested_absmax=read(".nested_absmax") if nested else None,
        nested_quant_map=read(".nested_quant_map") if nested else None,
        nested_offset=offset if nested else None,
        kind=kind,
        shape=(state.shape[0], state.shape[1]),
        dtype=state.dtype,
    )


def _check_state(checkpoint: Checkpoint, state: BnbState, kind: BnbKind) -> None:
    found = (state.kind, state.block_size, len(state.shape), state.nested_block_size or NESTED_BLOCK_SIZE)
    if found != (kind, BLOCK_SIZE, 2, NESTED_BLOCK_SIZE):
        raise CheckpointError(
            f"{checkpoint.location}: tensor {state.name!r}: expected a matrix of {kind} in blocks of {BLOCK_SIZE} "
            f"(nested {NESTED_BLOCK_SIZE}), found {state}"
        )


def _state_tensor(q: BnbLinear) -> Tensor:
    """The JSON that `BnbState` is read from, with bitsandbytes' keys in its order; uint8, of a length known before."""
    fields: dict[str, Any] = {
        "quant_type": q.kind.removesuffix("-dq"),
        "blocksize": BLOCK_SIZE,
        "dtype": DTYPE_NAMES[q.dtype],
        "shape": list(q.shape),
    }
    if q.nested_offset is None:
        return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8, device=q.codes.device)
    fields |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32", "nested_offset": 0}
    length = len(json.dumps(fields)) - 1 + LONGEST_OFFSET
    if q.nested_offset.is_meta:
        return torch.empty(length, dtype=torch.uint8, device="meta")
    text = json.dumps(fields | {"nested_offset": q.nested_offset.item()}).ljust(length)
    return torch.tensor(list(text.encode()), dtype=torch.uint8, device=q.codes.device)
