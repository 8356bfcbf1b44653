"""The inner loops of GPTQ and of coordinate descent, in plain PyTorch; `Kernels` chooses between these and `fused.py`.

Legend: N = out features, K = in features (of `sweep`: in the order of processing), B = columns of a block, G = groups,
g = features of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qconv.quantize import fused, grid
from qconv.quantize.grid import Grid, decode, encode, groups_of
from qconv.triton_support import available
from qconv.types import Scheme

BLOCK_COLUMNS = 128


@dataclass(frozen=True)
class Kernels:
    """What computes the inner loops.

    Attributes:
        is_fused: Triton kernels where they fit (of integer codes), and TF32 in the products between blocks.
    """

    is_fused: bool

    @staticmethod
    def of(w_NK: Tensor, fuse: bool) -> Kernels:
        """Fused where the weight's device has them and ``fuse`` allows it."""
        return Kernels(fuse and available(w_NK))

    def sweep(
        self,
        start_KN: Tensor,
        pull_KN: Tensor,
        coupling_KK: Tensor,
        power_K: Tensor,
        group_K: Tensor,
        grid_GN: Grid,
        scheme: Scheme,
    ) -> Tensor:
        """See `sweep`."""
        arguments = (start_KN, pull_KN, coupling_KK, power_K, group_K, grid_GN.scale, grid_GN.zero, scheme)
        return fused.sweep(*arguments, tf32=True) if self.is_fused and scheme.kind == "int" else sweep(*arguments)

    def search_grid(self, w_NK: Tensor, scheme: Scheme, importance_K: Tensor, signed: bool) -> Grid:
        """`grid.search_grid` on the columns of a weight ``[N, K]``."""
        if self.is_fused and scheme.kind == "int" and fused.fits(w_NK, scheme, with_gram=False):
            return fused.search_grid(w_NK, scheme, importance_K=importance_K, signed=signed)
        importance_Gg = groups_of(importance_K, scheme.group_size)
        return grid.search_grid(groups_of(w_NK, scheme.group_size), scheme, importance_Gg, signed)

    def normal_equations(self, centred_NK: Tensor, gram_KK: Tensor, shift: Tensor, scheme: Scheme) -> Tensor:
        """See `normal_equations`."""
        if self.is_fused and scheme.kind == "int" and fused.fits(centred_NK, scheme):
            whole_NK = centred_NK.to(torch.int8 if scheme.bits < 8 else torch.int16)
            return fused.normal_equations(whole_NK, gram_KK, shift, scheme.group_size)
        return normal_equations(centred_NK, gram_KK, shift, scheme)


def sweep(
    start_KN: Tensor,
    pull_KN: Tensor,
    coupling_KK: Tensor,
    power_K: Tensor,
    group_K: Tensor,
    scale_GN: Tensor,
    zero_GN: Tensor,
    scheme: Scheme,
) -> Tensor:
    """Chooses codes column by column, each moved by the errors of the columns before it.

    Column k goes to the code nearest to ``start_k + pull_k / power_k``, where every earlier column j has added
    ``(start_j - q_j) * coupling_jk`` to ``pull_k``. Inside a block a column subtracts all earlier errors of its block
    when its turn comes (one matrix-vector product); the columns after a block get its errors in one matrix product.

    Args:
        start_KN: float32 ``[K, N]``, one column of the weight per row, in the order of processing.
        pull_KN: float32 ``[K, N]``; overwritten.
        coupling_KK: float32 ``[K, K]``; only entries above the diagonal are read.
        power_K: float32 ``[K]``, positive.
        group_K: int32 ``[K]``, the group of each column.
        scale_GN, zero_GN: float32 ``[G, N]``.

    Returns:
        Codes ``[K, N]``, uint8.
    """
    num_columns = len(start_KN)
    codes_KN = torch.empty_like(start_KN, dtype=torch.uint8)
    power, group = power_K.tolist(), group_K.tolist()
    for start in range(0, num_columns, BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, num_columns)
        error_BN = torch.empty_like(start_KN[start:end])
        for k in range(start, end):
            scale_N, zero_N = scale_GN[group[k]], zero_GN[group[k]]
            pull_N = torch.addmv(pull_KN[k], error_BN[: k - start].t(), coupling_KK[start:k, k])
            code_N = encode(pull_N.div_(power[k]).add_(start_KN[k]), scale_N, zero_N, scheme)
            codes_KN[k] = code_N
            error_BN[k - start] = start_KN[k] - decode(code_N, zero_N, scheme) * scale_N
        pull_KN[end:].addmm_(coupling_KK[start:end, end:].t(), error_BN)
    return codes_KN


def normal_equations(centred_NK: Tensor, gram_KK: Tensor, shift: Tensor, scheme: Scheme) -> Tensor:
    """``C^T (gram + shift * I) C`` per row, ``[N, G, G]``; C holds the row's centred codes, one column per group."""
    num_columns = centred_NK.shape[1]
    size = num_columns if scheme.group_size == -1 else scheme.group_size
    groups = []
    for start in range(0, num_columns, size):
        part_Ng = centred_NK[:, start : start + size]
        product_NK = part_Ng @ gram_KK[start : start + size]
        product_NK[:, start : start + size].addcmul_(part_Ng, shift)
        groups.append(groups_of(product_NK * centred_NK, scheme.group_size).sum(-1))
    return torch.stack(groups, dim=1)
