"""From a group of weights to its grid (scale and zero point), and from weights to codes.

Method: affine uniform quantization, ``w ~ (code - zero) * scale``. Symmetric: scale = absmax / ((2^b - 1) / 2),
codes centred on 2^(b-1) (the compressed-tensors convention). Asymmetric: min-max with zero inside the range.
Optionally the grid is searched for the smallest weighted squared error (as OMSE, Choukroun et al. 2019, with the
importance of each column as its weight). A searched symmetric scale may be negative: codes run from -2^(b-1) to
2^(b-1) - 1, so the sign decides which side of zero gets the extra code, and readers only multiply by it (the
reference quantizer of llama.cpp's q4_0 and AutoRound's full-range mode use this).

4-bit floats (`e2m1.py`) take the same way: their grid is not uniform, scale = absmax / 6, and there is no sign to
choose.

Rounding points: the scale is rounded once, to a number that bfloat16 and float16 both hold exactly, so that no
reader's cast changes it, or to one that the format's scales can be (float8, powers of two); codes are chosen after
that, against the rounded scale.

Left out: scales shared between groups (double quantization). The global scale of NVFP4 is taken out of the weights
before (`global_scale.py`).

Legend: N = out features, K = in features, G = groups, g = features of a group (the last axis, padded with zeros).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qconv import e2m1
from qconv.errors import NumericsError
from qconv.types import Scheme

MIN_SCALE = 2.0**-24  # smallest positive float16
MAX_SCALE = 65280.0  # largest number that float16 and bfloat16 both hold
MIN_E4M3, MAX_E4M3 = 2.0**-9, 448.0
MAX_E8M0 = 2.0**126  # one less than the format has, and its reciprocal, are normal numbers
E8M0_BORDER = 7 / 6  # relative to a power of two; from it on the next: a group's largest weight is 3.5 to 7 scales

# Range factors that the search tries. 1.0 comes first: a group without any importance keeps it. Factors above 1 pay
# for symmetric grids, whose positive side ends at 7/7.5 of the largest weight.
SHRINK_FACTORS = (1.0, *(1.1 - 0.5 * i / 19 for i in range(20)))
SIDE_FACTORS = tuple(1.0 - 0.05 * i for i in range(1, 7))  # then one end of an asymmetric range alone
FP4_FACTORS = (1.0, *(1.6 - 0.8 * i / 19 for i in range(20)))  # up to where the largest weight becomes 4 instead of 6
E8M0_FACTORS = (1.0, 0.5, 2.0)
CPU_CHUNK = 1 << 18  # elements worked on at a time: stays in the cache of a CPU core
GPU_CHUNK = 1 << 26
MIN_CHUNK_ROWS = 256


class Grid(NamedTuple):
    """Scale and zero point per group; the zero of a symmetric scheme is its middle code.

    Attributes:
        scale: float32 ``[..., G]``, never zero; see `round_scale`.
        zero: float32 ``[..., G]``, whole numbers in ``0 .. 2**bits - 1``; 0 for floats.
    """

    scale: Tensor
    zero: Tensor


class Range(NamedTuple):
    """The range that a grid covers, per group: ``low <= 0 <= high``, float32 ``[N, G]``."""

    low: Tensor
    high: Tensor


def check_finite(tensor: Tensor, name: str) -> None:
    """Raises NumericsError, naming ``name``, if the tensor holds NaN or infinity."""
    if not bool(torch.isfinite(tensor.sum(dtype=torch.float64))) and not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise NumericsError(
            f"{name}: expected finite numbers, found {bad} of {tensor.numel()} that are NaN or infinite; "
            "the checkpoint or adapter that it comes from is damaged, or its training diverged"
        )


def round_scale(scale: Tensor, scheme: Scheme | None = None) -> Tensor:
    """Rounds scales to numbers that the scheme's format holds exactly.

    Plain scales (``scheme`` None): to numbers that bfloat16 and float16 both hold, first to bfloat16, then to float16:
    the second step only drops low bits (float16 subnormals), so the result still fits bfloat16. The sign is kept;
    magnitudes under 2^-24 become 2^-24. Overflow becomes infinity, which `check_scale` reports.

    ``e4m3``: the nearest positive float8, 448 at most. ``e8m0``: a power of two.
    """
    if scheme is not None and scheme.scale_format == "e4m3":
        return scale.clamp(MIN_E4M3, MAX_E4M3).to(torch.float8_e4m3fn).float()
    if scheme is not None and scheme.scale_format == "e8m0":
        mantissa, exponent = torch.frexp(scale.clamp(1 / MAX_E8M0, MAX_E8M0))  # mantissa in [0.5, 1)
        return torch.ldexp(torch.ones_like(scale), exponent - (2 * mantissa < E8M0_BORDER).to(exponent.dtype))
    magnitude = scale.abs().bfloat16().half().float().clamp_min(MIN_SCALE)
    return torch.where(scale < 0, -magnitude, magnitude)


def check_scale(scale: Tensor, name: str) -> None:
    """Raises NumericsError, naming ``name``, if a rounded scale does not fit float16."""
    if not bool(torch.isfinite(scale).all()):
        raise NumericsError(
            f"{name}: the weights are too large for a float16 scale (largest possible {MAX_SCALE:g}); "
            "leave this layer unquantized"
        )


def groups_of(w_NK: Tensor, group_size: int) -> Tensor:
    """View ``[N, G, g]`` of the columns; a short last group is padded with zeros (neutral to every grid here)."""
    if group_size == -1 or group_size >= w_NK.shape[-1]:
        return w_NK.unsqueeze(-2)
    pad = -w_NK.shape[-1] % group_size
    if pad:
        w_NK = torch.nn.functional.pad(w_NK, (0, pad))
    return w_NK.reshape(*w_NK.shape[:-1], -1, group_size)


def ungroup(w_NGg: Tensor, in_features: int) -> Tensor:
    """Inverse of `groups_of`."""
    return w_NGg.flatten(-2)[..., :in_features]


def range_of(w_NGg: Tensor) -> Range:
    """Smallest and largest weight of each group, widened to include zero, ``[N, G]``."""
    low, high = torch.aminmax(w_NGg, dim=-1)
    return Range(low.clamp_max(0.0), high.clamp_min(0.0))


def grid_of_range(low: Tensor, high: Tensor, scheme: Scheme) -> Grid:
    """The grid that covers ``low <= 0 <= high`` (any shape, float32). A range of zero width gets scale 1."""
    if scheme.kind == "float":
        scale = torch.maximum(-low, high) / e2m1.MAX
        scale = torch.where(scale == 0, 1.0, round_scale(scale, scheme))
        return Grid(scale, torch.zeros_like(scale))
    if scheme.symmetric:
        scale = torch.maximum(-low, high) / (scheme.max_code / 2)
        scale = torch.where(scale == 0, 1.0, round_scale(scale))
        return Grid(scale, torch.full_like(scale, scheme.mid_code))
    if scheme.min_zero:  # room below zero for the codes that no weight needs
        low = torch.minimum(low, -high / (scheme.max_code - 1))
    scale = (high - low) / scheme.max_code
    scale = torch.where(scale == 0, 1.0, round_scale(scale))
    zero = torch.round(-low / scale).clamp_(scheme.min_zero, scheme.max_code)
    return Grid(scale, zero)


def encode(w: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """Nearest codes as whole float32 numbers in ``0 .. 2**bits - 1``; ``scale`` and ``zero`` broadcast."""
    if scheme.kind == "float":
        return e2m1.encode(w.div(scale))
    return w.div(scale).round_().add_(zero).clamp_(0, scheme.max_code)


def decode(codes: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """What codes (whole float32 numbers) multiply their scale by, a new tensor."""
    return e2m1.decode(codes) if scheme.kind == "float" else codes - zero


def quantize_dequantize(w: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """What a reader gets back after `encode`."""
    if scheme.kind == "float":
        return e2m1.nearest(w.div(scale)).mul_(scale)
    return encode(w, scale, zero, scheme).sub_(zero).mul_(scale)


def search_grid(w_NGg: Tensor, scheme: Scheme, importance_Gg: Tensor | None = None, signed: bool = True) -> Grid:
    """The grid per group with the smallest ``sum(importance * (w - q)^2)`` among shrunk ranges.

    Never worse, in that error, than `grid_of_range` on the group's own range.

    Args:
        w_NGg: ``[N, G, g]`` float32, as `groups_of` gives it.
        importance_Gg: ``[G, g]`` non-negative weights, the same for all rows; None = all equal.
        signed: also try negative scales for a symmetric scheme.

    Returns:
        Grid of ``[N, G]``.
    """

    def loss(error_NGg: Tensor) -> Tensor:
        squared_NGg = error_NGg.square_()
        return (squared_NGg if importance_Gg is None else squared_NGg.mul_(importance_Gg)).sum(-1)

    return search_grid_by(w_NGg, scheme, loss, signed)


def search_grid_by(w_NGg: Tensor, scheme: Scheme, loss: Callable[[Tensor], Tensor], signed: bool = True) -> Grid:
    """As `search_grid` for any loss: a function from the errors ``[n, G, g]`` of some rows to ``[n, G]``.

    The loss may overwrite the errors; it sees all rows, in chunks.
    """
    parts = [_search_rows(w_NGg[rows], scheme, loss, signed) for rows in row_chunks(w_NGg)]
    return Grid(torch.cat([part.scale for part in parts]), torch.cat([part.zero for part in parts]))


def _search_rows(w_NGg: Tensor, scheme: Scheme, loss_of: Callable[[Tensor], Tensor], signed: bool) -> Grid:
    low, high = range_of(w_NGg)
    # The end of the range that is farther from zero is given the extra (negative) code.
    has_sign = signed and scheme.symmetric and scheme.kind == "int"
    sign = torch.where(high > -low, -1.0, 1.0) if has_sign else None
    best = grid_of_range(low, high, scheme)
    best_low, best_high = low, high
    loss = loss_of(_grid_error(w_NGg, best, scheme))

    def consider(new_low: Tensor, new_high: Tensor) -> None:
        nonlocal best, best_low, best_high, loss
        grid = grid_of_range(new_low, new_high, scheme)
        if sign is not None:
            grid = Grid(grid.scale * sign, grid.zero)
        new_loss = loss_of(_grid_error(w_NGg, grid, scheme))
        better = new_loss < loss
        best = Grid(torch.where(better, grid.scale, best.scale), torch.where(better, grid.zero, best.zero))
        best_low, best_high = torch.where(better, new_low, best_low), torch.where(better, new_high, best_high)
        loss = torch.where(better, new_loss, loss)

    for factor in factors_of(scheme):
        consider(low * factor, high * factor)
    if not scheme.symmetric:
        base_low, base_high = best_low, best_high
        for factor in SIDE_FACTORS:
            consider(base_low * factor, base_high)
            consider(base_low, base_high * factor)
    return best


def factors_of(scheme: Scheme) -> tuple[float, ...]:
    """What the search multiplies ranges by."""
    if not scheme.is_fp4:
        return SHRINK_FACTORS
    return E8M0_FACTORS if scheme.scale_format == "e8m0" else FP4_FACTORS


def _grid_error(w_NGg: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    return quantize_dequantize(w_NGg, grid.scale.unsqueeze(-1), grid.zero.unsqueeze(-1), scheme).sub_(w_NGg)


def row_chunks(tensor: Tensor) -> Iterator[slice]:
    """Slices of the first axis that bound the memory of temporaries; enough rows each to multiply efficiently."""
    limit = GPU_CHUNK if tensor.is_cuda else CPU_CHUNK
    step = max(MIN_CHUNK_ROWS, limit // max(1, tensor[:1].numel()))
    for start in range(0, tensor.shape[0], step):
        yield slice(start, start + step)
