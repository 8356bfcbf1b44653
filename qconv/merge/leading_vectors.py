"""The leading singular vectors of a weight, and how near given vectors come to its own, without decomposing all of it.

Method: block Krylov subspaces of W W^T (Golub and Underwood 1977; Musco and Musco 2015), every block made orthogonal to
all before it, twice. A pair (s, u) of a subspace is taken once ``||W W^T u - s^2 u||`` is below `TOLERANCE` of ``s^2``,
which the next block tells for nothing. What a subspace leaves undecided is decomposed whole, by the smaller Gram matrix
in float64: so every answer is verified or exact.

Rounding: products in float32, small matrices and whole decompositions in float64.

Legend: N, K = sides of the weight, C = vectors asked for or about, B = columns of a block, R = pairs of a subspace.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-5
MARGIN = 0.02  # of a cosine: what a tolerated pair may be off, where its neighbours are near
SMALL = 256  # sides up to here are decomposed whole at once
_BLOCK = 16


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Singular values ``[R]`` in descending order, left vectors ``[N, R]``, and which of them are verified."""

    s_R: Tensor
    u_NR: Tensor
    is_good_R: Tensor


@torch.no_grad()
def leading_vectors(w_NK: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` largest components: left ``[N, C]``, singular values ``[C]``, right ``[C, K]``; float32."""
    made = torch.Generator().manual_seed(0)
    start_NB = torch.randn(len(w_NK), _BLOCK, generator=made).to(w_NK.device)
    found = next((pairs for pairs in _subspaces(w_NK, start_NB) if bool(pairs.is_good_R[:count].all())), None)
    u_NC = (_whole(w_NK) if found is None else found).u_NR[:, :count]
    right_CK = u_NC.T @ w_NK
    s_C = right_CK.norm(dim=1)
    return u_NC, s_C, right_CK / s_C.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)


@torch.no_grad()
def nearest_cosines(w_NK: Tensor, v_NC: Tensor, near: float) -> tuple[Tensor, float]:
    """Of each of ``v_NC`` the cosine with the nearest left singular vector of the weight; its largest singular value.

    A cosine clearly above ``near`` may be less than that with the very nearest.

    Args:
        v_NC: orthonormal columns.
    """
    for pairs in _subspaces(w_NK, v_NC):
        squares_RC = (pairs.u_NR.T @ v_NC).square() * pairs.is_good_R.unsqueeze(1)
        best_C = squares_RC.amax(dim=0)
        # What lies in no pair yet lies in others, of which one alone may have all of it.
        is_decided_C = (best_C > (near + MARGIN) ** 2) | (best_C >= 1 - squares_RC.sum(dim=0))
        if bool(pairs.is_good_R[0]) and bool(is_decided_C.all()):
            return best_C.sqrt(), float(pairs.s_R[0])
    pairs = _whole(w_NK)
    return (pairs.u_NR.T @ v_NC).abs().amax(dim=0), float(pairs.s_R[0])


def _subspaces(w_NK: Tensor, start_NB: Tensor) -> Iterator[Pairs]:
    """Pairs of subspaces that grow by a block at a time, up to half of the smaller side; none of a small weight."""
    side = min(w_NK.shape)
    if side <= SMALL:
        return
    blocks, images = [torch.linalg.qr(start_NB)[0]], []
    while len(blocks) * start_NB.shape[1] <= side // 2:
        images.append(w_NK.T @ blocks[-1])
        q_NR, t_KR = torch.cat(blocks, dim=1), torch.cat(images, dim=1)
        next_NB = w_NK @ images[-1]
        for _ in range(2):
            next_NB -= q_NR @ (q_NR.T @ next_NB)
        next_NB, left_over_BB = torch.linalg.qr(next_NB)
        squares_R, y_RR = torch.linalg.eigh((t_KR.T @ t_KR).double())
        squares_R, y_RR = squares_R.flip(0).clamp(min=0), y_RR.flip(1)
        residual_R = (left_over_BB.double() @ y_RR[-start_NB.shape[1] :]).norm(dim=0)
        yield Pairs(s_R=squares_R.sqrt(), u_NR=q_NR @ y_RR.float(), is_good_R=residual_R <= TOLERANCE * squares_R)
        blocks.append(next_NB - q_NR @ (q_NR.T @ next_NB))


def _whole(w_NK: Tensor) -> Pairs:
    """All pairs but those of singular values that are zero."""
    w_NK = w_NK.double()
    if len(w_NK) <= w_NK.shape[1]:
        squares_R, u_NR = torch.linalg.eigh(w_NK @ w_NK.T)
        s_R, u_NR = squares_R.flip(0).clamp(min=0).sqrt(), u_NR.flip(1)
    else:
        squares_R, v_KR = torch.linalg.eigh(w_NK.T @ w_NK)
        s_R = squares_R.flip(0).clamp(min=0).sqrt()
        u_NR = w_NK @ (v_KR.flip(1) / s_R.clamp(min=torch.finfo(torch.float32).tiny))
    is_good_R = s_R > 1e-7 * s_R[0]
    return Pairs(s_R=s_R[is_good_R], u_NR=u_NR[:, is_good_R].float(), is_good_R=is_good_R[is_good_R])
