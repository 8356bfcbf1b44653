"""Intruder dimensions: singular vectors of W + dW that W does not have.

Method: Shuttleworth et al. 2024 (section 3): a left singular vector of the merged weight, among those of its largest
singular values, is an intruder when its cosine with every left singular vector of W stays below a threshold. Full
fine-tuning makes almost none; LoRA makes some, and models with more of them forget more.

Rounding: float32; the weight is the base as training saw it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qconv.merge.delta import merged_weight
from qconv.types import Adapter, Checkpoint

THRESHOLD = 0.5
LOOKED_AT = 10  # as in the paper


@dataclass(frozen=True, kw_only=True)
class Intruder:
    """One foreign direction: its place among the singular values of W + dW (0 = largest), and the nearest of W's."""

    place: int
    singular_value: float
    cosine: float


@dataclass(frozen=True, kw_only=True)
class SpectrumChange:
    """One weight.

    Attributes:
        change: ``||dW|| / ||W||`` (Frobenius).
        largest_before, largest_after: the largest singular values of W and of W + dW.
        intruders: by place.
    """

    module: str
    change: float
    largest_before: float
    largest_after: float
    intruders: tuple[Intruder, ...]


def find_intruders(w_NK: Tensor, merged_NK: Tensor, looked_at: int = LOOKED_AT) -> list[Intruder]:
    """Among the ``looked_at`` leading left singular vectors of ``merged_NK``, those that ``w_NK`` has not."""
    return intruding_components(w_NK, merged_NK, looked_at)[0]


@torch.no_grad()
def intruding_components(
    w_NK: Tensor, merged_NK: Tensor, looked_at: int = LOOKED_AT
) -> tuple[list[Intruder], Tensor, Tensor]:
    """As `find_intruders`, with their left ``[N, I]`` and right ``[I, K]`` singular vectors."""
    u_NR = torch.linalg.svd(w_NK, full_matrices=False)[0]
    v_NR, s_R, right_RK = torch.linalg.svd(merged_NK, full_matrices=False)
    nearest_R = (u_NR.T @ v_NR[:, :looked_at]).abs().amax(dim=0)
    found = [
        Intruder(place=place, singular_value=float(s_R[place]), cosine=cosine)
        for place, cosine in enumerate(nearest_R.tolist())
        if cosine < THRESHOLD
    ]
    places = [one.place for one in found]
    return found, v_NR[:, places], right_RK[places]


def spectrum_changes(base: Checkpoint, adapter: Adapter, device: str = "cpu") -> Iterator[SpectrumChange]:
    """One for each weight with a low-rank update, in the adapter's order; a head tied to the embedding is left out.

    Raises:
        CheckpointError: a tensor cannot be read.
        NumericsError: NaN or infinity in a merged weight.
    """
    for delta in adapter.deltas.values():
        if delta.weight not in base.specs():
            continue  # a LoRA on a head that is the embedding
        w = base.read(delta.weight, device).float()
        merged = merged_weight(w, adapter, delta)
        w_NK, merged_NK = (w.T, merged.T) if delta.transposed else (w, merged)
        yield SpectrumChange(
            module=delta.module,
            change=float(torch.linalg.vector_norm(merged - w) / torch.linalg.vector_norm(w)),
            largest_before=float(torch.linalg.matrix_norm(w_NK, 2)),
            largest_after=float(torch.linalg.matrix_norm(merged_NK, 2)),
            intruders=tuple(find_intruders(w_NK, merged_NK)),
        )
