"""The arithmetic of bitsandbytes 4-bit blocks: codes to numbers and numbers to codes.

Method: every block of the flattened tensor is divided by its absolute maximum and rounded to the
nearest of 16 values (Dettmers et al. 2023, "QLoRA", section 3). With double quantization the maxima,
less their mean, go through an 8-bit dynamic map in blocks of 256 (same section; the map: Dettmers et
al. 2022, "8-bit Optimizers via Block-wise Quantization", section 2). Plain torch operations on any
device; bitsandbytes is not needed.

Rounding points of decoding: table value * absmax in float32, then one rounding to the weight's dtype.
A nested absmax is map value * nested absmax + offset, product and sum each rounded in float32.

Rounding points of encoding follow the library, whose CPU and CUDA kernels differ (read in version
0.50, `csrc/cpu_ops.cpp`, `csrc/kernels.cu`, `backends/default/ops.py`), hence `BnbBackend`:

- NF4 thresholds are the same floats on both. CUDA is compiled with an approximate reciprocal (1 ulp),
  but no quotient of two bfloat16 numbers lies within 19 * 2**-24 (relative) of a threshold, so NF4
  codes of bfloat16 weights are the same everywhere; of float16 and float32 weights single codes may not be.
- FP4 thresholds differ by up to 14 ulp, and ties of negative values round to the larger magnitude on
  the CPU, to the smaller one on CUDA. Such ties are common among bfloat16 weights, and there the
  approximate reciprocal decides, which torch cannot repeat.
- A block of zeros gets the code of zero on the CPU. On CUDA it gets code 0, which for NF4 means -1: with
  double quantization, whose absmax of that block is only nearly zero, it decodes to small negatives.
- A last, partial block is divided by its absmax on the CPU, multiplied by the reciprocal on CUDA.
- The absmax offset of double quantization is a float32 mean, whose summation order is the device's.
- The 8-bit codes of double quantization go through a 65,536-entry table on the CPU (coarser near
  zero) and through a binary search on CUDA.

Measured on an H100 against the library's CUDA kernels, 16.8M and 45.1M normal weights with one row of
zeros: under the CUDA rules all NF4 values are equal for bfloat16 and float16, and 3 (62 with double
quantization) of 45.1M differ for float32; of FP4 values 7e-5 differ for bfloat16, 1.5e-5 for float16.
The CUDA rules run on a CPU differ in the offset's mean alone, at most 1.3e-4 of the values.
Under the CPU rules 7e-4 to 1.8e-3 of the NF4 values with double quantization differ (relative norm of
the difference 3e-4), none without it but for float32, and 6e-4 of bfloat16 FP4 values (1e-2).

Left out: fused layouts that live in memory only, stochastic rounding.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from qconv.errors import NumericsError, SchemeError
from qconv.types import BnbBackend, BnbKind

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SLICE_ELEMENTS = 1 << 23  # elements encoded at once: bounds the temporaries to about 300 MB
# Elements decoded at once: on a CPU as many as the caches of its cores hold, on a GPU 400 MB of temporaries.
CPU_SLICE_PER_THREAD, GPU_SLICE = 1 << 18, 1 << 26

NF4_TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4_TABLE_TIMES_12 = (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)
# Magnitude thresholds of the CUDA kernel, spelled with the digits it has: they are not the midpoints.
FP4_CUDA_THRESHOLDS = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)
FP4_CUDA_CODES = (0, 1, 6, 7, 4, 5, 2, 3)


def decode_absmax(
    codes: Tensor, nested_map: Tensor, nested_absmax: Tensor, offset: float | Tensor, block_size: int
) -> Tensor:
    """Undoes double quantization: uint8 ``codes`` [blocks] -> float32 absmax [blocks]."""
    values = torch.index_select(nested_map, 0, codes.int())
    _scale_blocks(values, nested_absmax, block_size)
    return values.add_(offset)


def decode_codes(
    packed: Tensor, absmax: Tensor, table: Tensor, block_size: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """uint8 ``packed`` [ceil(numel / 2)] and float32 ``absmax`` [blocks] -> ``shape`` in ``dtype``."""
    numel, device = math.prod(shape), packed.device
    # One lookup gives both elements of a byte, and is fastest as one of 8-byte numbers.
    pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), dim=1).view(torch.int64).view(-1)
    out = torch.empty(numel, dtype=dtype, device=device)
    step = min(numel + numel % 2, GPU_SLICE if packed.is_cuda else CPU_SLICE_PER_THREAD * torch.get_num_threads())
    indices = torch.empty(step // 2, dtype=torch.int32, device=device)
    found = torch.empty(step // 2, dtype=torch.int64, device=device)
    for begin in range(0, numel, step):
        end = min(begin + step, numel)
        count = -(-(end - begin) // 2)
        indices[:count].copy_(packed[begin // 2 : begin // 2 + count])
        torch.index_select(pairs, 0, indices[:count], out=found[:count])
        values = found.view(torch.float32)[: end - begin]
        _scale_blocks(values, absmax[begin // block_size : -(-end // block_size)], block_size)
        out[begin:end] = values
    return out.view(shape)


def _scale_blocks(values: Tensor, scales: Tensor, block_size: int) -> None:
    """Multiplies each block of float32 ``values`` [n] with its scale, in place; the last block may be partial."""
    whole = values.numel() // block_size * block_size
    if whole:
        values[:whole].view(-1, block_size).mul_(scales[: whole // block_size, None])
    if whole < values.numel():
        values[whole:].mul_(scales[-1])


def encode(
    weight: Tensor,
    kind: BnbKind,
    block_size: int = 64,
    backend: BnbBackend | None = None,
    name: str = "weight",
) -> dict[str, Tensor]:
    """Quantizes as ``load_in_4bit`` does, bit for bit.

    Args:
        weight: float16, bfloat16 or float32, any shape.
        kind: ``nf4``, ``nf4-dq``, ``fp4`` or ``fp4-dq``.
        block_size: elements that share an absmax.
        backend: whose kernels to follow (see the module's text); by default those of the weight's device.
        name: of the weight, for messages.

    Returns:
        ``codes`` uint8 [ceil(numel / 2), 1], ``absmax`` [blocks] (float32, or uint8 when nested),
        ``quant_map`` float32 [16], and when nested ``nested_absmax`` float32 [ceil(blocks / 256)],
        ``nested_quant_map`` float32 [256], ``nested_offset`` float32 [].

    Raises:
        SchemeError: an unknown kind or block size, or a weight dtype that bitsandbytes refuses.
        NumericsError: the weight holds NaN or infinity.
    """
    quant_type = kind.removesuffix("-dq")
    if quant_type not in ("nf4", "fp4") or block_size not in BLOCK_SIZES:
        raise SchemeError(f"{name}: bitsandbytes has no 4-bit kind {kind!r} with blocks of {block_size}")
    if weight.dtype not in DTYPES.values():
        raise SchemeError(f"{name}: bitsandbytes quantizes float16, bfloat16 and float32, found {weight.dtype}")
    if backend is None:
        backend = "cuda" if weight.is_cuda else "cpu"
    flat = weight.detach().reshape(-1)
    numel = flat.numel()
    codes = torch.empty(-(-numel // 2), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-numel // block_size), dtype=torch.float32, device=flat.device)
    for begin in range(0, numel, SLICE_ELEMENTS):
        end = min(begin + SLICE_ELEMENTS, numel)
        scaled, maxima = _normalise(flat[begin:end].to(torch.float32, copy=True), block_size, backend)
        padded = torch.nn.functional.pad(scaled, (0, (end - begin) % 2))
        indices = _round_to_table(padded, quant_type, backend)
        if backend == "cuda":  # 0 * inf is NaN there, which fails every comparison and ends at code 0
            whole = (end - begin) // block_size * block_size
            indices[:whole].view(-1, block_size).masked_fill_((maxima[: whole // block_size] == 0)[:, None], 0)
            indices[whole:].masked_fill_(maxima[-1] == 0, 0)
        codes[begin // 2 : -(-end // 2)] = (indices[::2] << 4) | indices[1::2]
        absmax[begin // block_size : -(-end // block_size)] = maxima
    if not bool(torch.isfinite(absmax).all()):
        raise NumericsError(f"{name}: holds NaN or infinity, which 4-bit blocks cannot represent")
    result = {"codes": codes[:, None], "absmax": absmax, "quant_map": quant_map(quant_type, flat.device)}
    if kind.endswith("-dq"):
        offset = absmax.mean()
        nested_map = dynamic_map(flat.device)
        quantized, nested_absmax = _encode_absmax(absmax - offset, nested_map, backend)
        result |= {"absmax": quantized, "nested_absmax": nested_absmax}
        result |= {"nested_quant_map": nested_map, "nested_offset": offset}
    return result


def simulate(weight: Tensor, kind: BnbKind, backend: BnbBackend | None = None, name: str = "weight") -> Tensor:
    """What training multiplied with: ``weight`` through `encode` and back, same shape and dtype.

    ``kind="16bit"`` returns the weight itself. Raises what `encode` raises.
    """
    if kind == "16bit":
        return weight
    parts = encode(weight, kind, backend=backend, name=name)
    absmax = parts["absmax"]
    if "nested_offset" in parts:
        absmax = decode_absmax(
            absmax, parts["nested_quant_map"], parts["nested_absmax"], parts["nested_offset"], NESTED_BLOCK_SIZE
        )
    return decode_codes(parts["codes"].view(-1), absmax, parts["quant_map"], 64, tuple(weight.shape), weight.dtype)


def quant_map(quant_type: str, device: torch.device | str) -> Tensor:
    """The 16 values of a 4-bit type, float32, in the order of the codes."""
    if quant_type == "nf4":
        return torch.tensor(NF4_TABLE, dtype=torch.float32, device=device)
    return (torch.tensor(FP4_TABLE_TIMES_12, dtype=torch.float32) / 12).to(device)


def dynamic_map(device: torch.device | str) -> Tensor:
    """The signed 8-bit dynamic map, float32 [256], ascending (Dettmers et al. 2022, section 2.1).

    Seven decades 10^-6 .. 10^0; decade i holds the 2^i midpoints of a uniform split of [0.1, 1], both
    signs; zero and one complete it.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        positive = (10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
        values += positive + [-value for value in positive]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def _normalise(values: Tensor, block_size: int, backend: BnbBackend) -> tuple[Tensor, Tensor]:
    """Scales every block of float32 ``values`` [n] to [-1, 1] in place; also gives the absmax [blocks]."""
    whole = values.numel() // block_size * block_size
    blocks, rest = values[:whole].view(-1, block_size), values[whole:]
    maxima = blocks.abs().amax(dim=1) if whole else values.new_empty(0)
    blocks.mul_(maxima.clamp(min=1e-38).reciprocal_()[:, None])
    if rest.numel():
        last = rest.abs().amax().clamp(min=1e-38 if backend == "cpu" else 0.0)
        floor = last.clamp(min=1e-38)
        rest.copy_(rest / floor if backend == "cpu" else rest * floor.reciprocal())
        maxima = torch.cat((maxima, last[None]))
    return values.clamp_(-1, 1), maxima


def _round_to_table(scaled: Tensor, quant_type: str, backend: BnbBackend) -> Tensor:
    """4-bit codes, uint8 [n], of float32 values in [-1, 1]."""
    if quant_type == "fp4" and backend == "cuda":
        thresholds = torch.tensor(FP4_CUDA_THRESHOLDS, dtype=torch.float32, device=scaled.device)
        order = torch.tensor(FP4_CUDA_CODES, dtype=torch.uint8, device=scaled.device)
        magnitude = order[torch.bucketize(scaled.abs(), thresholds, out_int32=True)]
        return magnitude + (scaled < 0).to(torch.uint8) * 8
    table = quant_map(quant_type, "cpu")
    ascending = torch.argsort(table, stable=True)
    thresholds = ((table[ascending[:-1]] + table[ascending[1:]]) / 2).to(scaled.device)
    indices = torch.bucketize(scaled, thresholds, out_int32=True)
    return indices.to(torch.uint8) if quant_type == "nf4" else ascending.to(scaled.device, torch.uint8)[indices]


def _encode_absmax(values: Tensor, nested_map: Tensor, backend: BnbBackend) -> tuple[Tensor, Tensor]:
    """Double quantization of float32 ``values`` [blocks]: uint8 codes and float32 absmax per 256."""
    count = values.numel()
    padded = torch.nn.functional.pad(values, (0, -count % NESTED_BLOCK_SIZE)).view(-1, NESTED_BLOCK_SIZE)
    nested_absmax = padded.abs().amax(dim=1)
    scaled = (padded * nested_absmax.reciprocal()[:, None]).nan_to_num_(nan=0.0).view(-1)[:count]
    if backend == "cuda":
        codes = torch.bucketize(scaled, _midpoints(nested_map), out_int32=True).to(torch.uint8)
    else:
        # Fused multiply-add, as the CPU library is compiled: exact in float64, then one rounding.
        steps = ((scaled.clamp(-1, 1) + 1.0) * 0.5).double() * 65535 + 0.5
        codes = _cpu_codes().to(values.device)[steps.float().long()]
    empty = nested_absmax.repeat_interleave(NESTED_BLOCK_SIZE)[:count] == 0
    return codes.masked_fill_(empty, 0), nested_absmax


def _midpoints(ascending: Tensor) -> Tensor:
    return (ascending[:-1] + ascending[1:]) * 0.5


@cache
def _cpu_codes() -> Tensor:
    """8-bit code of each of the 65,536 grid points on [-1, 1] that the CPU library rounds to first."""
    grid = -1.0 + torch.arange(65536, dtype=torch.float32) * 2.0 / 65535
    return torch.bucketize(grid, _midpoints(dynamic_map("cpu")), out_int32=True).to(torch.uint8)
