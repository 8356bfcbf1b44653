"""The best low-rank factors of an update, by singular value decomposition.

Method: the first R singular vectors are the best rank R in the Frobenius norm, with the error of the singular values
left out (Eckart and Young 1936). Beyond `EXACT_SIDE` the range finder of Halko, Martinsson and Tropp 2011 (algorithms
4.4 and 5.1: 16 spare columns, 4 power iterations) replaces the full decomposition; what it captures is measured, not
assumed. The singular values are divided evenly between the factors, so that both keep to the range of 16-bit floats.

Rounding: float32 throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qconv.merge.plain_lora import Factors

EXACT_SIDE = 1024
SPARE_COLUMNS, POWER_ITERATIONS = 16, 4
FIRST_RANK = 32


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """``B @ A`` near an update D.

    Attributes:
        norm: ``||D||`` (Frobenius).
        energy: ``||B @ A||^2 / ||D||^2``, the share of D that is kept; ``||D - B @ A||^2`` is the rest.
    """

    factors: Factors
    norm: float
    energy: float


@torch.no_grad()
def low_rank(d_NK: Tensor, rank: int | None = None, energy: float | None = None) -> LowRank:
    """Factors of an update ``[N, K]`` (float32, any device), on the CPU.

    Args:
        rank: at most so many; fewer when the update has no more.
        energy: or as few as keep this share, in (0, 1].
    """
    norm = float(torch.linalg.vector_norm(d_NK, dtype=torch.float64))
    side = min(d_NK.shape)
    if norm == 0:
        return LowRank(factors=_factors(d_NK, d_NK.new_zeros(0), d_NK, 0), norm=0.0, energy=1.0)
    sought = min(rank if rank is not None else FIRST_RANK, side)
    while True:
        u_NR, s_R, v_KR = _decomposed(d_NK, sought)
        kept_R = (s_R.double().square().cumsum(0) / norm**2).clamp(max=1)
        if energy is None:
            count = sought
        else:
            count = int((kept_R < energy).sum()) + 1
            if count > sought and sought < side:
                sought = min(2 * sought, side)
                continue
        # Beyond the numerical rank there are only rounding errors.
        smallest = s_R[0] * torch.finfo(torch.float32).eps * max(d_NK.shape)
        count = min(count, sought, int((s_R > smallest).sum()))
        return LowRank(factors=_factors(u_NR, s_R, v_KR, count), norm=norm, energy=float(kept_R[count - 1]))


def _decomposed(d_NK: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triplets: ``[N, R]``, ``[R]``, ``[K, R]``, at least ``rank`` of them."""
    side = min(d_NK.shape)
    if side <= EXACT_SIDE or rank + SPARE_COLUMNS > side // 4:
        u_NR, s_R, v_RK = torch.linalg.svd(d_NK, full_matrices=False)
        return u_NR, s_R, v_RK.T
    with torch.random.fork_rng(devices=[d_NK.device] if d_NK.is_cuda else []):
        torch.manual_seed(0)
        found: tuple[Tensor, Tensor, Tensor] = torch.svd_lowrank(d_NK, rank + SPARE_COLUMNS, niter=POWER_ITERATIONS)
    u_NR, s_R, v_KR = found
    return u_NR[:, :rank], s_R[:rank], v_KR[:, :rank]


def _factors(u_NR: Tensor, s_R: Tensor, v_KR: Tensor, count: int) -> Factors:
    if count == 0:
        return Factors(a_RK=torch.zeros(0, u_NR.shape[1]), b_NR=torch.zeros(u_NR.shape[0], 0))
    root_R = s_R[:count].sqrt()
    return Factors(
        a_RK=(v_KR[:, :count] * root_R).T.contiguous().cpu(), b_NR=(u_NR[:, :count] * root_R).contiguous().cpu()
    )
