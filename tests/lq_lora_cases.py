"""What LQ-LoRA pickles, made here: classes of its names and fields, and codes packed as integers."""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import make_dataclass
from math import prod
from statistics import NormalDist
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

OFFSET = 0.9677083
CONTAINERS = {
    "PackedQuantizedTensorContainer": ("ptensor", "padding_length", "shape", "num_bits", "dtype"),
    "FloatTensorContainer": ("qtensor", "qdtype", "dtype", "num_bits"),
    "UIntQuantizedTensorContainer": ("ctensor", "cscales", "num_bits"),
    "NFDoubleQuantizedTensorContainer": ("ctensor", "cscales", "offset", "num_bits", "qscheme", "median_shape"),
    "NFDoubleQuantizedTensorContainer2": (
        *("block_sizes", "qscales_packed", "qscales_offset", "qscales_qscales", "qscales_num_bits"),
        *("qtensor_map", "qtensor_shape", "qtensor_packed", "qtensor_num_bits"),
    ),
}


class QuantScheme(NamedTuple):
    values: Tensor
    boundaries: Tensor


class NumBits(enum.Enum):
    NUM_BITS_2 = 2
    NUM_BITS_3 = 3
    NUM_BITS_4 = 4
    NUM_BITS_8 = 8


class QuantizedTensor(torch.Tensor):
    """A tensor of a shape, without storage."""

    @staticmethod
    def __new__(cls, container: Any, shape: tuple[int, ...]) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)

    def __init__(self, container: Any, shape: tuple[int, ...]):
        self._container, self._transpose, self._compute_dtype = container, False, None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


@contextmanager
def its_modules() -> Iterator[ModuleType]:
    """``models.quantization_utils_2`` and the like while they are needed; gives that one."""
    modules = {name: ModuleType(name) for name in ("models", *(f"models.{end}" for end in _CLASSES))}
    for end, classes in _CLASSES.items():
        for made in classes:
            made.__module__ = f"models.{end}"
            setattr(modules[f"models.{end}"], made.__name__, made)
    sys.modules.update(modules)
    try:
        yield modules["models.quantization_utils_2"]
    finally:
        for name in modules:
            del sys.modules[name]


_CLASSES: dict[str, list[type]] = {
    "tensor_container_utils": [QuantizedTensor],
    "quantization_utils": [QuantScheme],
    "quantization_utils_2": [NumBits, *(make_dataclass(name, fields) for name, fields in CONTAINERS.items())],
}


def normal_float(bits: int) -> list[float]:
    """Quantiles of a normal distribution, the outermost one at 1: one more above zero than below."""
    half = 2 ** (bits - 1)
    below = [(1 - OFFSET) + (OFFSET - 0.5) * i / (half - 1) for i in range(half - 1)]
    above = [0.5 + (OFFSET - 0.5) * i / half for i in range(half + 1)]
    normal = NormalDist()
    return [normal.inv_cdf(share) / normal.inv_cdf(OFFSET) for share in (*below, *above)]


def weight(
    modules: ModuleType, shape: tuple[int, int], bits: int, scale_bits: int, sizes: tuple[int, int], words: bool,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[QuantizedTensor, Tensor]:  # fmt: skip
    """A weight as it is pickled, of random codes, and its values in float64."""
    elements, blocks = sizes
    runs = prod(shape) // (elements * blocks)
    codes = torch.randint(2**bits, (runs, blocks, elements))
    scale_codes = torch.randint(2**scale_bits, (runs, blocks, 1))
    largest = (torch.rand(runs, 1, 1) * 0.1 + 0.05).to(scale_dtype)
    offset, book = torch.tensor(0.02), torch.tensor(normal_float(bits), dtype=torch.float32)
    scales = offset.double() + scale_codes * largest.double() / (2**scale_bits - 1)
    values = (book.double()[codes] * scales).view(shape)
    if words:
        container = modules.NFDoubleQuantizedTensorContainer2(
            block_sizes=(runs, blocks, elements),
            qscales_packed=_in_words(scale_codes, scale_bits),
            qscales_offset=offset,
            qscales_qscales=largest,
            qscales_num_bits=NumBits(scale_bits),
            qtensor_map=book,
            qtensor_shape=torch.Size(shape),
            qtensor_packed=_in_words(codes, bits),
            qtensor_num_bits=NumBits(bits),
        )
    else:
        container = modules.NFDoubleQuantizedTensorContainer(
            ctensor=_in_bytes(modules, codes, torch.Size(shape), bits, torch.int64),
            cscales=modules.UIntQuantizedTensorContainer(
                ctensor=_in_bytes(modules, scale_codes, scale_codes.shape, scale_bits, torch.float32),
                cscales=modules.FloatTensorContainer(largest, scale_dtype, torch.float32, "as its dtype"),
                num_bits=scale_bits,
            ),
            offset=offset,
            num_bits=bits,
            qscheme=QuantScheme(book, torch.zeros(2**bits + 1)),
            median_shape=torch.Size((runs, blocks, elements)),
        )
    return QuantizedTensor(container, shape), values


def _in_bytes(modules: ModuleType, codes: Tensor, shape: torch.Size, bits: int, dtype: torch.dtype) -> Any:
    """One code after the other from its highest bit; the first bit of the stream is the lowest of the first byte."""
    stream = "".join(f"{code:0{bits}b}" for code in codes.flatten().tolist())
    stream += "0" * (padding := -len(stream) % 8)
    data = [int(stream[i : i + 8][::-1], 2) for i in range(0, len(stream), 8)]
    return modules.PackedQuantizedTensorContainer(torch.tensor(data, dtype=torch.uint8), padding, shape, bits, dtype)


def _in_words(codes: Tensor, bits: int) -> Tensor:
    """Shifted into 32-bit integers; of 3 bits each bit of 32 codes has a word of its own."""
    flat, words = codes.flatten().tolist(), []
    if bits == 3:
        for i in range(0, len(flat), 32):
            words += [sum((code >> bit & 1) << j for j, code in enumerate(flat[i : i + 32])) for bit in range(3)]
    else:
        each = 32 // bits
        words = [sum(code << bits * j for j, code in enumerate(flat[i : i + each])) for i in range(0, len(flat), each)]
    return torch.tensor([word - 2**32 if word >= 2**31 else word for word in words], dtype=torch.int32)
