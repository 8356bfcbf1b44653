"""Paired statistics: one score per document under the reference and under the candidate.

Both models answer the same documents, so what is judged is the difference per document; how hard
the documents are cancels out.

* McNemar's exact test (McNemar 1947; exact conditional form, e.g. Fagerland, Lydersen and Laake 2013, "The McNemar
  test for binary matched-pairs data", BMC Med Res Methodol 13:91): of the documents that changed sides, is the split
  further from even than a fair coin explains? Computed in whole numbers, so it is exact however many there are.
* The interval of a difference of accuracies is the adjusted Wald interval of Bonett and Price (2012, "Adjusted Wald
  confidence interval for a difference of binomial proportions based on paired data", J Educ Behav Stat 37:479-488),
  recommended by Fagerland, Lydersen and Laake (2014, Stat Med 33:2850-2875): one pair is added to each kind of flip.
  A bootstrap would return [0, 0] where no document changed sides, although few documents prove little.
* Anything else gets a percentile bootstrap over documents (Efron 1979).

Documents may come in strata (the subtasks of a group): the difference is the weighted sum of the
strata's differences, and resampling stays within each.

Left out: documents that depend on one another (several questions about one text) count as independent.

Dimension legend: R = resamples, D = documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

RESAMPLES = 2000
_Z_95 = 1.959963984540054
_CHUNK = 4_000_000  # elements of a temporary

Interval = tuple[float, float]
UNBOUNDED: Interval = (-math.inf, math.inf)
Aggregate = Callable[[list[Any]], float]


@dataclass(frozen=True, kw_only=True)
class Stratum:
    """Scores of the same documents, in the same order, under the two models.

    Attributes:
        reference, candidate: one item per document; numbers, or whatever the aggregate takes.
        weight: share of this stratum in the whole; the weights of all strata sum to 1.
    """

    reference: Sequence[Any]
    candidate: Sequence[Any]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if len(self.reference) != len(self.candidate) or not self.reference:
            raise ValueError(f"cannot pair {len(self.reference)} documents with {len(self.candidate)}")

    @property
    def is_binary(self) -> bool:
        return all(value in (0, 1) for scores in (self.reference, self.candidate) for value in scores)

    def flips(self) -> tuple[int, int]:
        """How many documents go from 1 to 0, and from 0 to 1."""
        pairs = list(zip(self.reference, self.candidate, strict=True))
        return sum(r > c for r, c in pairs), sum(r < c for r, c in pairs)


def mcnemar_exact(one_to_zero: int, zero_to_one: int) -> float:
    """Two-sided p of McNemar's exact conditional test: 2 P(X <= the rarer flip), X ~ Binomial(flips, 1/2), at most 1.

    No flips at all give 1.
    """
    num_flips, rarer = one_to_zero + zero_to_one, min(one_to_zero, zero_to_one)
    ways = total = 1
    for i in range(rarer):
        ways = ways * (num_flips - i) // (i + 1)
        total += ways
    p: float = 2 * total / (1 << num_flips)
    return min(1.0, p)


def adjusted_wald_interval(strata: Sequence[Stratum]) -> Interval:
    """95% interval of the weighted difference of accuracies, candidate - reference (Bonett and Price 2012).

    Scores must be 0 or 1. Strata are independent: their variances add with the weights squared.
    """
    centre = variance = 0.0
    for stratum in strata:
        one_to_zero, zero_to_one = stratum.flips()
        num = len(stratum.reference) + 2
        lost, won = (one_to_zero + 1) / num, (zero_to_one + 1) / num
        centre += stratum.weight * (won - lost)
        variance += stratum.weight**2 * (lost + won - (won - lost) ** 2) / num
    half = _Z_95 * math.sqrt(variance)
    return max(-1.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(
    strata: Sequence[Stratum], aggregate: Aggregate | None = None, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """95% percentile interval of the weighted difference, candidate - reference, over resampled documents.

    Args:
        aggregate: scores -> value of a model; None = the mean.

    Returns:
        Unbounded when a stratum has one document, or a resample has no defined value.
    """
    if any(len(stratum.reference) < 2 for stratum in strata):
        return UNBOUNDED
    generator = torch.Generator().manual_seed(seed)
    totals = torch.zeros(resamples, dtype=torch.float64)
    for stratum in strata:
        draw = _mean_draw(stratum) if aggregate is None else _aggregate_draw(stratum, aggregate)
        num = len(stratum.reference)
        drawn = [draw(torch.randint(num, (rows, num), generator=generator)) for rows in _batches(resamples, num)]
        totals += stratum.weight * torch.cat(drawn)
    if totals.isnan().any():
        return UNBOUNDED
    return float(torch.quantile(totals, 0.025)), float(torch.quantile(totals, 0.975))


def difference(strata: Sequence[Stratum], aggregate: Aggregate = fmean) -> tuple[float, float, float]:
    """The weighted values of reference and candidate, and candidate - reference."""
    reference = math.fsum(s.weight * aggregate(list(s.reference)) for s in strata)
    candidate = math.fsum(s.weight * aggregate(list(s.candidate)) for s in strata)
    return reference, candidate, candidate - reference


def _batches(resamples: int, num: int) -> list[int]:
    """How many resamples to draw at a time, so that the draws stay small in memory."""
    rows = max(1, min(resamples, _CHUNK // num))
    return [min(rows, resamples - start) for start in range(0, resamples, rows)]


def _mean_draw(stratum: Stratum) -> Callable[[Tensor], Tensor]:
    pairs = zip(stratum.reference, stratum.candidate, strict=True)
    differences_D = torch.tensor([float(c) - float(r) for r, c in pairs], dtype=torch.float64)
    return lambda picks_RD: differences_D[picks_RD].mean(dim=1)


def _aggregate_draw(stratum: Stratum, aggregate: Aggregate) -> Callable[[Tensor], Tensor]:
    def value(scores: Sequence[Any], picks: list[int]) -> float:
        return float(aggregate([scores[i] for i in picks]))

    def draw(picks_RD: Tensor) -> Tensor:
        rows = picks_RD.tolist()
        differences = [value(stratum.candidate, picks) - value(stratum.reference, picks) for picks in rows]
        return torch.tensor(differences, dtype=torch.float64)

    return draw
