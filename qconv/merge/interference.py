"""How much adapters get in one another's way: their updates of one weight, two by two.

Cosine of the two updates as vectors (near 0: they change other directions; near -1: they undo one another), the share
of elements that both change and whose signs disagree (0.5 for unrelated updates; what TIES resolves, Yadav et al. 2023,
section 3), and the ratio of their norms. Updates are taken with the weights that they are combined with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from qconv.merge.combine import Part
from qconv.merge.delta import delta_weight
from qconv.types import Adapter


@dataclass(frozen=True, kw_only=True)
class Interference:
    """Two updates of one weight, or of all weights that both change (``weight`` = "all").

    Attributes:
        first, second: numbers of the adapters, from 1.
        norm_ratio: of the first's to the second's.
    """

    weight: str
    first: int
    second: int
    cosine: float
    sign_conflicts: float
    norm_ratio: float


@dataclass(kw_only=True)
class _Sums:
    product: float = 0.0
    first: float = 0.0
    second: float = 0.0
    conflicts: int = 0
    elements: int = 0

    def __iadd__(self, other: _Sums) -> _Sums:
        for name in ("product", "first", "second", "conflicts", "elements"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    def result(self, weight: str, pair: tuple[int, int]) -> Interference:
        norms = math.sqrt(self.first * self.second)
        return Interference(
            weight=weight,
            first=pair[0],
            second=pair[1],
            cosine=self.product / norms if norms else 0.0,
            sign_conflicts=self.conflicts / self.elements if self.elements else 0.0,
            norm_ratio=math.sqrt(self.first / self.second) if self.second else math.inf,
        )


@torch.no_grad()
def measure_interference(
    adapters: Sequence[Adapter], parts: Mapping[str, list[Part]], device: str
) -> tuple[list[Interference], list[Interference]]:
    """For each pair of adapters over all weights, and for each weight and pair."""
    numbers = {id(adapter): number for number, adapter in enumerate(adapters, start=1)}
    totals: dict[tuple[int, int], _Sums] = {}
    details = []
    for weight, found in parts.items():
        updates = [(numbers[id(a)], delta_weight(a, delta, device) * share) for a, delta, share in found]
        for (one, d_one), (other, d_other) in combinations(updates, 2):
            sums = _Sums(
                product=float((d_one * d_other).sum(dtype=torch.float64)),
                first=float(d_one.square().sum(dtype=torch.float64)),
                second=float(d_other.square().sum(dtype=torch.float64)),
                conflicts=int((d_one.sign() * d_other.sign() < 0).sum()),
                elements=int(((d_one != 0) & (d_other != 0)).sum()),
            )
            details.append(sums.result(weight, (one, other)))
            total = totals.setdefault((one, other), _Sums())
            total += sums
    return [sums.result("all", pair) for pair, sums in totals.items()], details
