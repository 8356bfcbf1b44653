"""Confidence intervals by resampling documents.

Tokens of one text are not independent, so whole documents are drawn with replacement (cluster
bootstrap: Efron 1979; Davison and Hinkley 1997, section 3.8). A mean over positions is then a ratio
of two sums over the drawn documents. The percentile interval is too narrow for few documents, so
its levels are widened as for Student's t (Hesterberg 2015, "What Teachers Should Know About the
Bootstrap", section 3.2, "expanded percentile interval").

All resamples of one object share their draws, so quantities measured on the same positions are paired.

Dimension legend: R = resamples, D = documents, P = positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import erf, exp, inf, sqrt

import torch
from torch import Tensor

RESAMPLES = 2000
FEW_DOCUMENTS = 8  # below this, rows of the same document count as documents of their own
_Z_95 = 1.959963984540054
_CHUNK = 4_000_000  # elements of a temporary

Interval = tuple[float, float]
UNBOUNDED: Interval = (-inf, inf)


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """Resampled documents of a set of positions.

    Attributes:
        clusters_P: int64, the cluster of each position, ``0 .. D - 1``.
    """

    clusters_P: Tensor
    resamples: int = RESAMPLES
    seed: int = 0

    @property
    def num_clusters(self) -> int:
        return int(self.clusters_P.max()) + 1 if len(self.clusters_P) else 0

    @cached_property
    def _draw_counts(self) -> Tensor:
        """How often each document is drawn."""
        generator = torch.Generator().manual_seed(self.seed)
        num = self.num_clusters
        picks_RD = torch.randint(num, (self.resamples, num), generator=generator)
        counts_RD = torch.zeros(self.resamples, num, dtype=torch.float64)
        return counts_RD.scatter_add_(1, picks_RD, torch.ones_like(picks_RD, dtype=torch.float64))

    @cached_property
    def _draw_sizes(self) -> Tensor:
        return self._draw_counts @ self._sums(torch.ones(len(self.clusters_P), dtype=torch.float64))

    def _sums(self, values_P: Tensor) -> Tensor:
        sums_D = torch.zeros(self.num_clusters, dtype=torch.float64)
        return sums_D.index_add_(0, self.clusters_P, values_P.double())

    def _means(self, values_P: Tensor) -> Tensor:
        return (self._draw_counts @ self._sums(values_P)) / self._draw_sizes

    def mean(self, values_P: Tensor) -> Interval:
        """95% interval of the mean of ``values_P`` ``[P]``."""
        return UNBOUNDED if self.num_clusters < 2 else self._interval(self._means(values_P))

    def effect(self, values_P: Tensor, baseline_P: Tensor) -> Interval:
        """95% interval of ``1 - mean(values) / mean(baseline)``."""
        if self.num_clusters < 2:
            return UNBOUNDED
        return self._interval(1 - self._means(values_P) / self._means(baseline_P))

    def root_mean(self, values_P: Tensor) -> Interval:
        """95% interval of ``sqrt(mean(values))``, ``values_P`` not negative."""
        low, high = self.mean(values_P)
        return (max(low, 0.0) ** 0.5, high**0.5)

    def quantile(self, values_P: Tensor, q: float) -> Interval:
        """95% interval of the ``q`` quantile: of the drawn positions, the first with a share ``q`` at or below it."""
        if self.num_clusters < 2:
            return UNBOUNDED
        ordered_P, places_P = values_P.double().sort()
        clusters_P = self.clusters_P[places_P]
        found = []
        for counts_rD in torch.split(self._draw_counts.float(), max(1, _CHUNK // len(values_P))):
            weights_rP = counts_rD[:, clusters_P].cumsum(1, dtype=torch.float64)
            wanted_r = (q * weights_rP[:, -1:]).contiguous()
            found.append(ordered_P[torch.searchsorted(weights_rP, wanted_r).squeeze(1).clamp_max(len(values_P) - 1)])
        return self._interval(torch.cat(found))

    def _interval(self, values_R: Tensor) -> Interval:
        if not values_R.isfinite().all():
            return UNBOUNDED
        tail = _expanded_tail(self.num_clusters)
        low, high = (float(torch.quantile(values_R, level)) for level in (tail, 1 - tail))
        return low, high


def clusters(documents_P: Tensor, rows_P: Tensor) -> Tensor:
    """Which positions are drawn together: those of one document, or of one row of it when documents are few.

    Args:
        documents_P, rows_P: int, the document and the evaluated row of each position.

    Returns:
        int64 ``[P]``, numbered from 0.
    """
    keys_P = documents_P.long()
    if len(torch.unique(keys_P)) < FEW_DOCUMENTS:
        keys_P = keys_P * (int(rows_P.max()) + 1) + rows_P.long()
    numbers_P: Tensor = torch.unique(keys_P, return_inverse=True)[1]
    return numbers_P


def _expanded_tail(num: int) -> float:
    """The tail probability to cut on each side for 95%, with ``num`` independent draws."""
    expanded = sqrt(num / (num - 1)) * _student_t_95(num - 1)
    return 0.5 * (1 + erf(-expanded / sqrt(2)))


def _student_t_95(degrees: int) -> float:
    """The 97.5% quantile of Student's t (Abramowitz and Stegun 26.7.5; the exact values below 3 degrees)."""
    if degrees < 3:
        return {1: 12.7062, 2: 4.30265}[degrees]
    z, v = _Z_95, float(degrees)
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )


def ratio_interval(log_interval: Interval) -> Interval:
    """``exp`` of an interval of logarithms."""
    low, high = log_interval
    return exp(low) if low > -700 else 0.0, exp(high) if high < 700 else inf
