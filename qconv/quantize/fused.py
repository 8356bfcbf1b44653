"""The inner loops of quantization as fused Triton kernels: the sweep over columns, grid search, normal equations.

Method: those of `sweep.py` and `grid.py`, which stay the reference; the kernels only keep in registers what PyTorch
would send through memory after every operation. They run on CUDA and, with ``TRITON_INTERPRET=1``, interpreted on a
CPU, which is for tests. Triton is imported at the first call.

Rounding points: see `kernels.py`. Grids and codes are those of the reference but where sums taken in another order, or
in TF32, decide between candidates that are equal to within that rounding.

Left out: floats of 4 or 8 bits; group sizes other than `GROUP_SIZES` in `search_grid` and `normal_equations`.

Legend: N = out features, K = in features (of `sweep`: in the order of processing), G = groups, g = features of a group.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qconv.quantize import precision
from qconv.quantize.grid import SHRINK_FACTORS, SIDE_FACTORS, Grid
from qconv.types import Scheme

GROUP_SIZES = (16, 32, 64, 128)
BLOCK_COLUMNS = 128
SPAN_COLUMNS = 512  # a multiple of BLOCK_COLUMNS; see `sweep`
SWEEP_COLUMNS = 16  # a power of two, at least 16
SWEEP_ROWS = 32  # per program; one lane each, so SWEEP_WARPS * 32
SWEEP_WARPS = 1
SEARCH_ELEMENTS = 4096  # weights per program: 32 registers a lane for them
SEARCH_WARPS = 4
GRAM_SEARCH_ROWS = 64
GRAM_SEARCH_WARPS = 8
NORMAL_ROWS = 64
NORMAL_TILES = 4  # tiles of rows per program, which share a block of the Gram matrix
NORMAL_WARPS = 8


def fits(w_NK: Tensor, scheme: Scheme, *, with_gram: bool = True) -> bool:
    """Whether `search_grid` (with a Gram matrix, if ``with_gram``) and `normal_equations` take this weight's groups.

    Their size is one of `GROUP_SIZES`, not above K. Kernels that multiply by blocks of a Gram matrix keep one in shared
    memory, as two TF32 numbers per element: for groups of 128 that takes a data centre GPU since Hopper.
    """
    size = scheme.group_size
    if size not in GROUP_SIZES or size > w_NK.shape[1]:
        return False
    if not with_gram or not w_NK.is_cuda:
        return True
    num_bytes = 8 * size * (size + max(GRAM_SEARCH_ROWS, NORMAL_ROWS)) + 1024
    properties: Any = torch.cuda.get_device_properties(w_NK.device)  # its type lacks the attribute
    return bool(num_bytes <= properties.shared_memory_per_block_optin)


def sweep(
    start_KN: Tensor,
    pull_KN: Tensor,
    coupling_KK: Tensor,
    power_K: Tensor,
    group_K: Tensor,
    scale_GN: Tensor,
    zero_GN: Tensor,
    scheme: Scheme,
    *,
    tf32: bool = False,
) -> Tensor:
    """`sweep.sweep`, which says what is computed and from what.

    One kernel does a block of `BLOCK_COLUMNS`, in float32. The columns after it get its errors in matrix products:
    those of the same span after each block, all others after a span, since adding to all of them costs more memory
    traffic than the product costs arithmetic. Start, pull, scales and zeros are contiguous, scales exact in bfloat16;
    the coupling is copied unless its last axis is dense.

    Args:
        tf32: let the matrix products between blocks round their factors to TF32.

    Raises:
        ValueError: an argument's shape, dtype or layout is not the above.
    """
    num_columns, num_rows = start_KN.shape
    _check(start_KN, "start_KN", (num_columns, num_rows))
    _check(pull_KN, "pull_KN", (num_columns, num_rows))
    _check(coupling_KK, "coupling_KK", (num_columns, num_columns), dense=False)
    _check(power_K, "power_K", (num_columns,), dense=False)
    _check(group_K, "group_K", (num_columns,), torch.int32)
    _check(scale_GN, "scale_GN", (len(scale_GN), num_rows))
    _check(zero_GN, "zero_GN", (len(scale_GN), num_rows))
    _check_integer(scheme)
    kernels, triton = _modules()
    codes_KN = torch.empty_like(start_KN, dtype=torch.uint8)
    if codes_KN.numel() == 0:
        return codes_KN
    if coupling_KK.stride(1) != 1:
        coupling_KK = coupling_KK.contiguous()
    change_SN = start_KN.new_empty(min(SPAN_COLUMNS, num_columns), num_rows)
    inverse_power_K, inverse_scale_GN = power_K.reciprocal().contiguous(), scale_GN.reciprocal()
    tensors = (start_KN, pull_KN, coupling_KK, inverse_power_K, group_K, scale_GN, inverse_scale_GN, zero_GN, codes_KN)
    launch = kernels.sweep_block[(triton.cdiv(num_rows, SWEEP_ROWS),)]
    with _device_of(start_KN), precision.tf32(tf32):
        for begin in range(0, num_columns, SPAN_COLUMNS):
            stop = min(begin + SPAN_COLUMNS, num_columns)
            for first in range(begin, stop, BLOCK_COLUMNS):
                end = min(first + BLOCK_COLUMNS, stop)
                change_BN = change_SN[first - begin : end - begin]
                launch(
                    *tensors,
                    change_BN,
                    first,
                    num_columns,
                    num_rows,
                    coupling_KK.stride(0),
                    MAX_CODE=scheme.max_code,
                    BLOCK_K=BLOCK_COLUMNS,
                    SUB_K=SWEEP_COLUMNS,
                    BLOCK_N=SWEEP_ROWS,
                    num_warps=SWEEP_WARPS,
                    num_stages=1,
                    enable_fp_fusion=True,
                )
                if end < stop:
                    pull_KN[end:stop].addmm_(coupling_KK[first:end, end:stop].t(), change_BN)
            if stop < num_columns:
                pull_KN[stop:].addmm_(coupling_KK[begin:stop, stop:].t(), change_SN[: stop - begin])
    return codes_KN


def search_grid(
    w_NK: Tensor,
    scheme: Scheme,
    importance_K: Tensor | None = None,
    gram_Ggg: Tensor | None = None,
    signed: bool = True,
) -> Grid:
    """The grid per group with the smallest error among the candidates of `grid.search_grid`.

    Args:
        w_NK: float32 ``[N, K]``, any strides; a short last group is taken as padded with zeros.
        importance_K: float32 ``[K]``, non-negative: the error is ``sum(importance * e^2)``; None = all equal.
        gram_Ggg: float32 ``[G, g, g]``: the error is ``e G e^T`` instead, in three TF32 products per product.
        signed: also try negative scales for a symmetric scheme.

    Returns:
        Grid of ``[N, G]``.

    Raises:
        ValueError: an argument's shape, dtype or layout is not the above, both weightings are given, or the scheme's
            group size does not fit (see `fits`).
    """
    num_rows, num_columns = w_NK.shape
    num_groups = scheme.num_groups(num_columns)
    _check(w_NK, "w_NK", (num_rows, num_columns), dense=False)
    _check_integer(scheme)
    _check_fits(w_NK, scheme, with_gram=gram_Ggg is not None)
    if importance_K is not None and gram_Ggg is not None:
        raise ValueError("the error is weighted by importance_K or by gram_Ggg, not by both")
    kernels, triton = _modules()
    loss, weight = kernels.PLAIN.value, w_NK
    num_tile_rows, num_warps = SEARCH_ELEMENTS // scheme.group_size, SEARCH_WARPS
    if importance_K is not None:
        _check(importance_K, "importance_K", (num_columns,), dense=False)
        loss, weight = kernels.IMPORTANCE.value, importance_K.contiguous()
    elif gram_Ggg is not None:
        _check(gram_Ggg, "gram_Ggg", (num_groups, scheme.group_size, scheme.group_size))
        loss, weight = kernels.GRAM.value, gram_Ggg
        num_tile_rows, num_warps = GRAM_SEARCH_ROWS, GRAM_SEARCH_WARPS
    grid = Grid(w_NK.new_empty(num_rows, num_groups), w_NK.new_empty(num_rows, num_groups))
    if num_rows == 0:
        return grid
    factors_C2 = _factors(scheme.symmetric, w_NK.device)
    with _device_of(w_NK):
        kernels.search_grid[(triton.cdiv(num_rows, num_tile_rows), num_groups)](
            w_NK,
            weight,
            factors_C2,
            grid.scale,
            grid.zero,
            num_rows,
            num_columns,
            num_groups,
            w_NK.stride(0),
            w_NK.stride(1),
            SYMMETRIC=scheme.symmetric,
            SIGNED=signed,
            MAX_CODE=scheme.max_code,
            MIN_ZERO=scheme.min_zero,
            LOSS=loss,
            NUM_CANDIDATES=len(factors_C2),
            FIRST_SIDE=1 + len(SHRINK_FACTORS),
            BY_RECIPROCAL=w_NK.is_cuda,
            GROUP=scheme.group_size,
            BLOCK_N=num_tile_rows,
            num_warps=num_warps,
            enable_fp_fusion=False,
        )
    return grid


def normal_equations(centred_NK: Tensor, gram_KK: Tensor, shift: Tensor | float, group_size: int) -> Tensor:
    """``C^T (gram + shift * I) C`` per row; C holds the row's centred codes, one column per group.

    Products are exact to about 2^-21: the Gram matrix is split into two TF32 numbers, sums are float32.

    Args:
        centred_NK: ``[N, K]``, whole numbers below 2^9 in magnitude; int8, int16 or float32; last axis dense.
        gram_KK: float32 ``[K, K]``, contiguous, symmetric: only one of its triangles is read.
        shift: float32 scalar.
        group_size: one of `GROUP_SIZES`.

    Returns:
        float32 ``[N, G, G]``, symmetric.

    Raises:
        ValueError: an argument's shape, dtype or layout is not the above.
    """
    num_rows, num_columns = centred_NK.shape
    if centred_NK.dtype not in (torch.int8, torch.int16, torch.float32) or centred_NK.stride(1) != 1:
        raise ValueError(
            "centred_NK: expected int8, int16 or float32 with its last axis dense, "
            f"found {centred_NK.dtype} with strides {centred_NK.stride()}"
        )
    _check(gram_KK, "gram_KK", (num_columns, num_columns))
    scheme = Scheme(group_size=group_size)
    _check_fits(centred_NK, scheme, with_gram=True)
    kernels, triton = _modules()
    num_groups = scheme.num_groups(num_columns)
    normal_NGG = gram_KK.new_empty(num_rows, num_groups, num_groups)
    if num_rows == 0:
        return normal_NGG
    with _device_of(gram_KK):
        kernels.normal_equations[(triton.cdiv(num_rows, NORMAL_ROWS * NORMAL_TILES), num_groups, num_groups)](
            centred_NK,
            gram_KK,
            torch.as_tensor(shift, dtype=torch.float32, device=gram_KK.device).reshape(1),
            normal_NGG,
            num_rows,
            num_columns,
            num_groups,
            centred_NK.stride(0),
            GROUP=group_size,
            BLOCK_N=NORMAL_ROWS,
            NUM_TILES=NORMAL_TILES,
            num_warps=NORMAL_WARPS,
            num_stages=1,  # more would not fit the shared memory
            enable_fp_fusion=True,
        )
    return normal_NGG


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _modules() -> tuple[ModuleType, ModuleType]:
    import triton

    from qconv.quantize import kernels

    return kernels, triton


@cache
def _factors(symmetric: bool, device: torch.device) -> Tensor:
    """``[C, 2]``: what each candidate of `grid.search_grid` multiplies the low and the high end of the range by."""
    factors = [(1.0, 1.0), *((factor, factor) for factor in SHRINK_FACTORS)]
    if not symmetric:
        factors += [ends for factor in SIDE_FACTORS for ends in ((factor, 1.0), (1.0, factor))]
    return torch.tensor(factors, device=device)


def _check(
    tensor: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, dense: bool = True
) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or (dense and not tensor.is_contiguous()):
        raise ValueError(
            f"{name}: expected {dtype} {list(shape)}{', contiguous' if dense else ''}, "
            f"found {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
        )


def _check_integer(scheme: Scheme) -> None:
    if scheme.kind != "int":
        raise ValueError(f"scheme: expected integer codes, found kind {scheme.kind!r}")


def _check_fits(w_NK: Tensor, scheme: Scheme, with_gram: bool) -> None:
    if not fits(w_NK, scheme, with_gram=with_gram):
        raise ValueError(
            f"expected a group size among {GROUP_SIZES}, at most {w_NK.shape[1]} (K), for which the GPU has the shared "
            f"memory; found {scheme.group_size}"
        )
