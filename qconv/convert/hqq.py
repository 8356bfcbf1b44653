"""The layout of HQQ's linears in safetensors, as transformers 4 saves them: ``W_q``, ``scale``, ``zero`` and settings.

Method: Badri and Shaji 2023, "Half-Quadratic Quantization"; the layout is hqq's (``HQQLinear.state_dict``, 0.2). For a
weight [N, K] of b bits in groups of g neighbouring inputs (its axis 1) codes are ``[N K / g, g]``, packed along their
first dimension: ``W_q`` uint8 of 8, 4 or 2 bits, where the first half (quarter) of rows has the highest bits, and of 3
bits int32 with ten rows in a word; 5 and 6 bits lie in bytes. ``scale`` and ``zero``, ``[N K / g, 1]``, are floats: the
weight is ``(code - zero) * scale``, computed in ``compute_dtype``, which is that of the two as well. Further tensors
hold one setting each, words as their letters.

Rounding points: those of hqq itself, the difference and the product, in ``compute_dtype``. Groups along the other axis
(0) take every (N K / g)-th element; they are read with a scale for every element, and not written.
Left out: 1 bit, quantized scales and zero points (which hqq no longer makes), scales moved to the CPU.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qconv.convert.format import TensorReader, check_group_size
from qconv.errors import CheckpointError, NumericsError, SchemeError
from qconv.types import QuantizedLinear, Scheme, TensorSpec

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BITS = (8, 6, 5, 4, 3, 2)
PACKING = {8: "8bit_u8", 6: "8bit_u8", 5: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8"}
_ROWS_IN_WORD = {"8bit_u8": 1, "4bit_u8": 2, "3bit_32": 10, "2bit_u8": 4}
_FLAGS = (".quant_scale", ".quant_zero", ".offload_meta", ".round_zero", ".view_as_float")
_SET = (".encoded_state_dict", ".stores_quant_config", ".channel_wise", ".optimize")
_NUMBERS = (".nbits", ".group_size", ".axis")
_WORDS = (".packing", ".unpack_view_dtype", ".compute_dtype")


@dataclass(frozen=True)
class Hqq:
    """HQQ's layout."""

    name = "hqq"
    suffixes = (".W_q", ".scale", ".zero", ".shape", *_NUMBERS, *_WORDS, *_FLAGS, *_SET)

    def check_scheme(self, scheme: Scheme) -> None:
        if scheme.kind != "int" or scheme.rounds_activations or scheme.symmetric:
            raise SchemeError("hqq holds integer codes with zero points, and no rounded inputs")
        if scheme.group_size == 1:
            raise SchemeError("hqq: groups of one input are those of axis 0, which is read and not written")

    def check_shapes(self, module: str, n: int, k: int, scheme: Scheme) -> None:
        self.check_scheme(scheme)
        check_group_size(self.name, module, k, scheme)
        rows, unit = n * scheme.num_groups(k), _ROWS_IN_WORD[PACKING[scheme.bits]]
        if scheme.bits != 3 and rows % unit:
            raise SchemeError(f"{module}: hqq packs {unit} groups into one, and {rows} are no multiple")

    def check(self, q: QuantizedLinear, module: str, scale_dtype: torch.dtype) -> None:
        n, k = q.codes_NK.shape
        self.check_shapes(module, n, k, q.scheme)
        for what, values in (("scale", q.scales_NG), ("zero point", q.zeros_NG)):
            if values is None or not bool(values.isfinite().all()):
                raise NumericsError(f"{module}: a {what} is missing, NaN or infinite")
            if not torch.equal(values.to(scale_dtype).float(), values.float()):
                raise NumericsError(
                    f"{module}: a {what} is not exact in {scale_dtype}, which hqq would compute with; take the dtype "
                    f"of the base's scales ({str(q.computed_in).removeprefix('torch.')}), as --dtype"
                )

    def pack(self, q: QuantizedLinear, module: str, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        assert q.zeros_NG is not None
        n, k = q.codes_NK.shape
        bits, size = q.scheme.bits, k // q.scales_NG.shape[1]
        packing, device = PACKING[bits], q.codes_NK.device
        settings = {
            ".shape": torch.tensor([n, k], dtype=torch.int64),
            **{
                name: torch.tensor(value, dtype=torch.int32)
                for name, value in zip(_NUMBERS, (bits, size, 1), strict=True)
            },
            ".packing": _letters(packing),
            ".unpack_view_dtype": _letters(str(_word_dtype(packing))),
            ".compute_dtype": _letters(str(scale_dtype)),
            **{name: torch.tensor(0, dtype=torch.uint8) for name in _FLAGS},
            **{name: torch.tensor(1, dtype=torch.uint8) for name in _SET},
        }
        tensors = {
            ".W_q": _pack(q.codes_NK.reshape(-1, size), packing),
            ".scale": q.scales_NG.reshape(-1, 1).to(scale_dtype),
            ".zero": q.zeros_NG.reshape(-1, 1).to(scale_dtype),
        }
        return {module + name: tensor.to(device) for name, tensor in (tensors | settings).items()}

    def unpack(
        self, tensors: Mapping[str, Tensor], module: str, scheme: Scheme, location: str = "checkpoint"
    ) -> QuantizedLinear:
        reader = TensorReader(tensors, module, location)
        flags = {flag: bool(reader.take(flag, (torch.uint8,), ())) for flag in (*_FLAGS, *_SET)}
        for flag in (".quant_scale", ".quant_zero"):
            if flags[flag]:
                raise reader.error(flag, "says that scales or zero points are quantized, which is not read")
        n, k = (int(size) for size in reader.take(".shape", (torch.int64,), (2,)))
        bits, size, axis = (int(reader.take(name, (torch.int32,), ())) for name in _NUMBERS)
        packing, word, dtype = _word(reader, ".packing"), _word(reader, ".unpack_view_dtype"), _dtype(reader)
        groups_along_k = axis == 1 and scheme.group_size != 1
        expected = k if scheme.group_size == -1 else size if scheme.group_size == 1 else scheme.group_size
        if bits != scheme.bits or axis not in (0, 1) or size != expected or packing != PACKING[bits]:
            raise reader.error(
                ".nbits",
                f"and its like say {bits} bits, groups of {size} on axis {axis}, packed as {packing!r}, and "
                f"quantization_config {scheme.bits} bits and groups of {expected}",
            )
        if word != str(_word_dtype(packing)):
            raise reader.error(".unpack_view_dtype", f"says {word!r} of codes packed as {packing!r}")
        if min(n, k, size) < 1 or n * k % size or (groups_along_k and k % size):
            raise reader.error(".shape", f"says {n} x {k}, which groups of {size} do not fill")
        rows, columns = (n * k // size, size) if axis == 1 else (size, n * k // size)
        codes = _unpack(reader, packing, rows, columns)
        largest = int(codes.max()) if packing == "8bit_u8" and bits < 8 else 0  # there is room for more than codes
        if largest > scheme.max_code:
            raise reader.error(
                ".W_q",
                f"holds a code {largest}, and {scheme.max_code} is the largest of {bits} bits; the file is damaged: "
                "save or fetch it again",
            )
        scales = reader.take(".scale", DTYPES, (rows, 1) if axis == 1 else (1, columns)).float()
        reader.check_scales(scales)
        zeros = reader.take(".zero", DTYPES, tuple(scales.shape)).float()
        reader.check_scales(zeros)
        shape = (n, k // size) if groups_along_k else (n, k)
        if not groups_along_k:
            scales, zeros = scales.expand(rows, columns), zeros.expand(rows, columns)
        return QuantizedLinear(
            codes_NK=codes.reshape(n, k),
            scales_NG=scales.reshape(shape).contiguous(),
            zeros_NG=zeros.reshape(shape).contiguous(),
            group_index_K=None,
            scheme=scheme,
            computed_in=dtype,
        )

    def logical_shape(self, specs: Mapping[str, TensorSpec], module: str, scheme: Scheme) -> tuple[int, int] | None:
        return None  # N and K lie in a tensor

    def quantization_config(
        self,
        scheme: Scheme,
        quantized_modules: Collection[str],
        ignored_modules: Collection[str],
        has_group_index: bool = False,
    ) -> dict[str, Any]:
        self.check_scheme(scheme)
        return {
            "quant_method": "hqq",
            "quant_config": settings_of(scheme),
            "skip_modules": sorted({"lm_head", *ignored_modules}),
        }

    def scheme_of(self, config: Mapping[str, Any], location: str) -> Scheme:
        """Of the configuration of one kind of linears, see `module_config`."""
        weights = (config.get("quant_config") or {}).get("weight_quant_params")
        if not isinstance(weights, dict):
            raise CheckpointError(f"{location}: quantization_config: expected weight_quant_params under 'quant_config'")
        bits, size, axis = weights.get("nbits"), weights.get("group_size"), weights.get("axis")
        if bits not in BITS or axis not in (0, 1) or not (size is None or (type(size) is int and size > 1)):
            raise CheckpointError(
                f"{location}: quantization_config: HQQ of nbits {bits!r}, group_size {size!r}, axis {axis!r}; read are "
                f"{', '.join(map(str, sorted(BITS)))} bits on axis 0 or 1"
            )
        return Scheme(bits=bits, group_size=1 if axis == 0 else -1 if size is None else size, symmetric=False)

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {}


def settings_of(scheme: Scheme) -> dict[str, Any]:
    """hqq's ``BaseQuantizeConfig`` of linears with this scheme."""
    return {
        "weight_quant_params": {
            "nbits": scheme.bits,
            "channel_wise": True,
            "group_size": None if scheme.group_size == -1 else scheme.group_size,
            "optimize": True,
            "round_zero": False,
            "axis": 1,
            "view_as_float": False,
        },
        "scale_quant_params": None,
        "zero_quant_params": None,
        "offload_meta": False,
    }


def tag_of(module: str) -> str:
    """What transformers calls a linear of any block: ``self_attn.q_proj``."""
    return ".".join(part for part in module.split(".") if part not in ("model", "layers") and not part.isdecimal())


def _pack(codes: Tensor, packing: str) -> Tensor:
    count = _ROWS_IN_WORD[packing]
    rows = -(-len(codes) // count)
    if packing == "3bit_32":
        codes = torch.nn.functional.pad(codes.to(torch.int32), (0, 0, 0, rows * count - len(codes)))
    bits = 3 if packing == "3bit_32" else 8 // count
    packed = torch.zeros_like(codes[:rows])
    for number in range(count):
        packed |= codes[number * rows : (number + 1) * rows] << bits * (count - 1 - number)
    return packed


def _unpack(reader: TensorReader, packing: str, rows: int, columns: int) -> Tensor:
    """Codes ``[rows, columns]`` in uint8."""
    count = _ROWS_IN_WORD[packing]
    word = _word_dtype(packing)
    stored = reader.take(".W_q", (word, *DTYPES), (None, None))
    packed = stored if stored.dtype == word else stored.contiguous().view(word)  # view_as_float
    if packed.shape != (-(-rows // count), columns) or (packing != "3bit_32" and rows % count):
        raise reader.error(".W_q", f"has shape {tuple(stored.shape)} for {rows} x {columns} codes packed as {packing}")
    bits = 3 if packing == "3bit_32" else 8 // count
    parts = [packed >> bits * (count - 1 - number) & (2**bits - 1) for number in range(count)]
    return torch.cat(parts)[:rows].to(torch.uint8)


def _word_dtype(packing: str) -> torch.dtype:
    return torch.int32 if packing == "3bit_32" else torch.uint8


def _letters(word: str) -> Tensor:
    return torch.tensor(list(word.encode()), dtype=torch.uint8)


def _word(reader: TensorReader, suffix: str) -> str:
    return bytes(reader.take(suffix, (torch.uint8,), (None,)).tolist()).decode(errors="replace")


def _dtype(reader: TensorReader) -> torch.dtype:
    word = _word(reader, ".compute_dtype")
    found = next((dtype for dtype in DTYPES if str(dtype) == word), None)
    if found is None:
        raise reader.error(".compute_dtype", f"says {word!r}; expected {', '.join(map(str, DTYPES))}")
    return found
