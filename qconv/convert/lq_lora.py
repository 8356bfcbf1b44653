"""LQ-LoRA's weights as its code pickles them: NormalFloat codes of 2, 3, 4 or 8 bits, scales quantized once more.

Method: Guo et al. 2024, "LQ-LoRA" (arXiv 2311.12023), section 3 and appendix; the layout is that of its repository
(``models/quantization_utils_2.py``). A weight's elements lie in blocks, each with a scale: an unsigned code times the
largest scale of its run of blocks over the largest code, plus the smallest scale of the whole weight. Bits and sizes of
blocks are each weight's own. Codes lie in two ways:

- `Weight` (its first container, that of the published checkpoints): bits of a code from the highest, in bytes that are
  filled from the lowest, zeros at the end;
- `Weight32` (what its last version saves): bits of a code from the lowest, in 32-bit words; of 3 bits first the lowest
  bits of 32 codes.

The classes here are what a pickle's objects become: fields under their names in its code, and no behaviour; values come
from a file and are checked in `decode`.

Rounding points: none; float32 as in its code (whose kernels may differ in a scale's last bit). The code book is the one
that is stored. Left out: its fake quantization, which saves plain tensors.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qconv.errors import CheckpointError

BITS = (2, 3, 4, 8)
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class QuantizedTensor(torch.Tensor):
    """Stands for a weight of its shape without data; ``_container`` is what to decode."""

    _container: object
    _transpose: object = False

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise CheckpointError(f"a weight of LQ-LoRA is decoded before it is used (asked for {func})")


class NumBits(enum.Enum):
    NUM_BITS_2 = 2
    NUM_BITS_3 = 3
    NUM_BITS_4 = 4
    NUM_BITS_8 = 8


class CodeBook(NamedTuple):
    """``QuantScheme``: values ``[2**bits]`` in increasing order."""

    values: Tensor
    boundaries: Tensor


@dataclass
class Packed:
    """``PackedQuantizedTensorContainer``: codes of ``shape`` in uint8."""

    ptensor: Tensor
    padding_length: int
    shape: tuple[int, ...]
    num_bits: int
    dtype: torch.dtype


@dataclass
class Float:
    """``FloatTensorContainer``: the largest scales ``[runs, 1, 1]``."""

    qtensor: Tensor
    qdtype: torch.dtype
    dtype: torch.dtype
    num_bits: str


@dataclass
class Scales:
    """``UIntQuantizedTensorContainer``: codes of scales ``[runs, blocks, 1]``."""

    ctensor: Packed
    cscales: Float
    num_bits: int


@dataclass
class Weight:
    """``NFDoubleQuantizedTensorContainer``; ``median_shape`` is ``[runs, blocks, elements]``."""

    ctensor: Packed
    cscales: Scales
    offset: Tensor
    num_bits: int
    qscheme: CodeBook
    median_shape: tuple[int, ...]


@dataclass
class Weight32:
    """``NFDoubleQuantizedTensorContainer2``, with codes in int32; ``block_sizes`` is ``[runs, blocks, elements]``."""

    block_sizes: tuple[int, ...]
    qscales_packed: Tensor
    qscales_offset: Tensor
    qscales_qscales: Tensor
    qscales_num_bits: NumBits
    qtensor_map: Tensor
    qtensor_shape: tuple[int, ...]
    qtensor_packed: Tensor
    qtensor_num_bits: NumBits


_QUANTIZATION = "models.quantization_utils_2"
CLASSES: dict[str, Any] = {
    "models.tensor_container_utils.QuantizedTensor": QuantizedTensor,
    "models.quantization_utils.QuantScheme": CodeBook,
    f"{_QUANTIZATION}.PackedQuantizedTensorContainer": Packed,
    f"{_QUANTIZATION}.FloatTensorContainer": Float,
    f"{_QUANTIZATION}.UIntQuantizedTensorContainer": Scales,
    f"{_QUANTIZATION}.NFDoubleQuantizedTensorContainer": Weight,
    f"{_QUANTIZATION}.NFDoubleQuantizedTensorContainer2": Weight32,
    f"{_QUANTIZATION}.NumBits": NumBits,
}
"""What its names become."""


def decode(weight: QuantizedTensor) -> Tensor:
    """The weight ``[N, K]`` in float32.

    Raises:
        CheckpointError: fields that are missing, or do not fit one another.
    """
    try:
        container = weight._container
        if weight._transpose is not False:
            raise CheckpointError("is transposed")
        if isinstance(container, Weight):
            decoded = _decode_bytes(container)
        elif isinstance(container, Weight32):
            decoded = _decode_words(container)
        else:
            raise CheckpointError(f"expected a double-quantized weight, found {type(container).__name__}")
    except (
        AttributeError,
        TypeError,
        ValueError,
        IndexError,
        OverflowError,
        MemoryError,
        RuntimeError,
    ) as error:  # a field that is missing, or of another type
        raise CheckpointError(f"damaged ({error})") from error
    if decoded.shape != weight.shape:
        raise CheckpointError(f"of shape {tuple(weight.shape)} holds {tuple(decoded.shape)}")
    return decoded


def bits_of(weight: QuantizedTensor) -> int:
    """Of a code of a weight that `decode` takes."""
    container = weight._container
    if isinstance(container, Weight32):
        return int(container.qtensor_num_bits.value)
    assert isinstance(container, Weight)
    return container.ctensor.num_bits


def _decode_bytes(weight: Weight) -> Tensor:
    runs, blocks, elements = _blocks(weight.median_shape)
    scales = weight.cscales
    if tuple(scales.ctensor.shape) != (runs, blocks, 1):
        raise CheckpointError(
            f"has scales of shape {tuple(scales.ctensor.shape)} for {(runs, blocks, elements)} blocks"
        )
    codes = _from_bytes(scales.ctensor).to(torch.float32).view(runs, blocks, 1)
    largest = _scales(scales.cscales.qtensor, runs)
    steps = torch.tensor(float(2**scales.ctensor.num_bits - 1)) / largest  # to the largest scale, as its code has it
    scale = codes / steps + _offset(weight.offset)
    return _times(_from_bytes(weight.ctensor), weight.qscheme.values, weight.ctensor.num_bits, scale, elements).view(
        *_shape(weight.ctensor.shape)
    )


def _decode_words(weight: Weight32) -> Tensor:
    runs, blocks, elements = _blocks(weight.block_sizes)
    scale_bits, bits = _bits(weight.qscales_num_bits.value), _bits(weight.qtensor_num_bits.value)
    codes = _from_words(weight.qscales_packed, runs * blocks, scale_bits).to(torch.float32).view(runs, blocks, 1)
    largest = _scales(weight.qscales_qscales, runs).expand(codes.shape)
    step = float(1.0 / torch.tensor(float(2**scale_bits - 1)))
    scale = torch.addcmul(_offset(weight.qscales_offset), codes, largest, value=step)
    packed = _from_words(weight.qtensor_packed, runs * blocks * elements, bits)
    return _times(packed, weight.qtensor_map, bits, scale, elements).view(*_shape(weight.qtensor_shape))


def _times(codes: Tensor, values: Tensor, bits: int, scale: Tensor, elements: int) -> Tensor:
    if values.dtype != torch.float32 or values.shape != (2**bits,) or not bool(values.isfinite().all()):
        raise CheckpointError(
            f"has a code book of {values.dtype} {tuple(values.shape)}; expected {2**bits} float32 values"
        )
    if codes.numel() != scale.numel() * elements:
        raise CheckpointError(f"has {codes.numel()} codes for {scale.numel()} blocks of {elements}")
    w = values[codes.reshape(-1).int()].view(*scale.shape[:2], elements)
    w *= scale
    return w


def _from_bytes(packed: Packed) -> Tensor:
    """Codes, uint8, in a row."""
    data, bits, count = packed.ptensor, _bits(packed.num_bits), prod(_shape(packed.shape))
    if data.dtype != torch.uint8 or data.shape != (-(-count * bits // 8),):
        raise CheckpointError(f"has {data.dtype} {tuple(data.shape)} for {count} codes of {bits} bits")
    stream = np.unpackbits(data.numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    return torch.from_numpy(np.packbits(stream, axis=1, bitorder="big")[:, 0] >> (8 - bits))


def _from_words(data: Tensor, count: int, bits: int) -> Tensor:
    """Codes, uint8, in a row."""
    bits = _bits(bits)
    if data.dtype != torch.int32 or data.shape != (count * bits // 32,) or count * bits % 32:
        raise CheckpointError(f"has {data.dtype} {tuple(data.shape)} for {count} codes of {bits} bits")
    stream = np.unpackbits(data.contiguous().numpy().astype("<i4", copy=False).view(np.uint8), bitorder="little")
    by_code = (stream.reshape(-1, 3, 32).transpose(0, 2, 1) if bits == 3 else stream).reshape(count, bits)
    return torch.from_numpy(np.packbits(by_code, axis=1, bitorder="little")[:, 0])


def _bits(bits: int) -> int:
    if bits not in BITS:
        raise CheckpointError(f"has codes of {bits!r} bits; expected {', '.join(map(str, BITS))}")
    return bits


def _blocks(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(_shape(shape)) != 3:
        raise CheckpointError(f"has blocks {tuple(shape)}; expected [runs, blocks, elements]")
    return shape[0], shape[1], shape[2]


def _shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    if not all(type(size) is int and size > 0 for size in shape):
        raise CheckpointError(f"has a shape {shape!r}")
    return shape


def _scales(largest: Tensor, runs: int) -> Tensor:
    if largest.dtype not in SCALE_DTYPES or largest.shape != (runs, 1, 1):
        raise CheckpointError(f"has largest scales of {largest.dtype} {tuple(largest.shape)} for {runs} runs")
    return largest.to(torch.float32)


def _offset(offset: Tensor) -> Tensor:
    if offset.dtype != torch.float32 or offset.numel() != 1:
        raise CheckpointError(
            f"has smallest scales of {offset.dtype} {tuple(offset.shape)}; expected one float32 number"
        )
    return offset.reshape(())
