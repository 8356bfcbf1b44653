"""Round to nearest: each weight to the nearest code of its group's grid.

Method: min-max grids are the field's baseline. With ``mse`` the grid is searched (see `grid.py`), optionally with
the diagonal of the Gram matrix as importance of the columns; with ``clip`` the caller gives the ranges (AWQ,
Lin et al. 2023, section 3.2).

Rounding points: scale once, then codes (see `grid.py`).

Left out: error feedback between columns (that is `gptq.py`).

Legend: N = out features, K = in features, G = groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qconv.errors import SchemeError
from qconv.quantize.grid import (
    Grid,
    check_finite,
    check_scale,
    encode,
    grid_of_range,
    groups_of,
    range_of,
    row_chunks,
    search_grid,
    ungroup,
)
from qconv.types import QuantizedLinear, Scheme


def rtn(
    w_NK: Tensor,
    scheme: Scheme,
    name: str,
    *,
    mse: bool = False,
    column_importance_K: Tensor | None = None,
    grid: Grid | None = None,
    signed_scales: bool = True,
) -> QuantizedLinear:
    """Round-to-nearest codes of a weight ``[N, K]`` (float32).

    Args:
        scheme: of integers, or of 4-bit floats.
        name: the weight, for messages.
        mse: search each group's grid for the smallest squared error instead of covering its range.
        column_importance_K: ``[K]`` non-negative weights of that squared error; needs ``mse``.
        grid: grids ``[N, G]`` to use as they are; excludes ``mse``.
        signed_scales: let the search of a symmetric scheme use negative scales.

    Raises:
        NumericsError: NaN or infinity in the weights, or weights too large for a float16 scale.
        SchemeError: a float8 scheme.
    """
    check_grid(scheme, name)
    check_finite(w_NK, name)
    if mse and grid is not None:
        raise ValueError("a grid is searched (mse) or given (grid), not both")
    w_NGg = groups_of(w_NK.float(), scheme.group_size)
    if mse:
        importance = None if column_importance_K is None else groups_of(column_importance_K, scheme.group_size)
        grid = search_grid(w_NGg, scheme, importance, signed_scales)
    elif grid is None:
        grid = grid_of_range(*range_of(w_NGg), scheme)
    check_scale(grid.scale, name)
    return encode_linear(w_NK, grid, scheme)


def encode_linear(w_NK: Tensor, grid: Grid, scheme: Scheme) -> QuantizedLinear:
    """The nearest codes of every weight on given grids ``[N, G]``."""
    codes_NK = torch.empty_like(w_NK, dtype=torch.uint8)
    for rows in row_chunks(w_NK):
        w_nGg = groups_of(w_NK[rows].float(), scheme.group_size)
        codes = encode(w_nGg, grid.scale[rows].unsqueeze(-1), grid.zero[rows].unsqueeze(-1), scheme)
        codes_NK[rows] = ungroup(codes, w_NK.shape[1]).to(torch.uint8)
    return as_linear(codes_NK, grid, scheme)


def as_linear(codes_NK: Tensor, grid: Grid, scheme: Scheme) -> QuantizedLinear:
    """Codes ``[N, K]`` and their grids as the record that formats pack."""
    return QuantizedLinear(
        codes_NK=codes_NK.to(torch.uint8).contiguous(),
        scales_NG=grid.scale.contiguous(),
        zeros_NG=None if scheme.symmetric else grid.zero.to(torch.uint8).contiguous(),
        group_index_K=None,
        scheme=scheme,
    )


def check_grid(scheme: Scheme, name: str) -> None:
    """Raises SchemeError unless the scheme has integer codes, or 4-bit floats."""
    if scheme.kind != "int" and not scheme.is_fp4:
        raise SchemeError(
            f"{name}: expected integers or 4-bit floats, got {scheme.kind!r}; use the fp8 algorithm for it"
        )
