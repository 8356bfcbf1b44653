"""Intruder dimensions: singular vectors of W + dW that W does not have.

Method: Shuttleworth et al. 2024 (section 3): a left singular vector of the merged weight, among those of its largest
singular values, is an intruder when its cosine with every left singular vector of W stays below a threshold. Full
fine-tuning makes almost none; LoRA makes some, and models with more of them forget more.

Rounding: as in `leading_vectors`; the weight is the base as training saw it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qconv.merge.delta import merged_weight
from qconv.merge.leading_vectors import leading_vectors, nearest_cosines
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
    found, (u_NC, _, right_CK), _ = _compared(w_NK, merged_NK, looked_at)
    places = [one.place for one in found]
    return found, u_NC[:, places], right_CK[places]


def _compared(
    w_NK: Tensor, merged_NK: Tensor, looked_at: int
) -> tuple[list[Intruder], tuple[Tensor, Tensor, Tensor], float]:
    """Intruders, the components that were looked at, and the largest singular value of ``w_NK``."""
    components = leading_vectors(merged_NK, looked_at)
    nearest_C, largest = nearest_cosines(w_NK, components[0], THRESHOLD)
    found = [
        Intruder(place=place, singular_value=float(components[1][place]), cosine=cosine)
        for place, cosine in enumerate(nearest_C.tolist())
        if cosine < THRESHOLD
    ]
    return found, components, largest


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
        found, (_, sizes_C, _), largest = _compared(w_NK, merged_NK, LOOKED_AT)
        yield SpectrumChange(
            module=delta.module,
            change=float(torch.linalg.vector_norm(merged - w) / torch.linalg.vector_norm(w)),
            largest_before=largest,
            largest_after=float(sizes_C[0]),
            intruders=tuple(found),
        )
