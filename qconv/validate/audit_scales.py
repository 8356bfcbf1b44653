"""Channel scales with their errors, and whether one set of scales follows another.

All in logarithms, where a fold is a difference. Weighted by the inverse variance of each channel: quantization
noise is as large in a channel of small weights as in its neighbours, and hides its scale.

Dimension legend: K = channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

LEAST_ERROR = 1e-3  # bfloat16 weights; and a norm that was rounded to bfloat16 after it was divided
UNKNOWN = 1e3  # error of a scale that is no positive number, or hidden in noise
MIN_ERRORS = 5.0  # that scales as a whole must stand out of the noise by to be matched or refuted
LEADER_ERRORS = 3.0  # that scales must have on average to be compared with: noisy ones give too small a slope
STRONG_ERRORS = 15.0  # of a single channel, to be judged by itself
MOST_OFF = 0.3  # of the slope between two sets of scales, from 1
# Scales weaker than the steps of a 4-bit grid move the weights of a base that lies on such a grid itself all at once,
# or not at all: at spreads of 0.3% to 0.6% slopes of 0.62 to 1.36 were seen, at 1% up to 1.18.
WEAK_SPREAD, MOST_OFF_WEAK = 0.01, 0.7
STRAY = 0.35  # of a strong channel's scale: five errors of one that is just strong enough
# Rounding shrinks the channels that are small in their group, and AWQ clips others: 38% of 13 strong ones strayed.
MOST_STRAYS = 0.5
LEAST_CHANNELS = 8
EVEN_FACTOR = 0.02  # of a whole weight; GPTQ moved scales by up to 0.8%


@dataclass(frozen=True, eq=False)
class Scales:
    """``log_K`` and the standard error of each, float64."""

    log_K: Tensor
    error_K: Tensor
    known_order_K: Tensor | None = None  # indices that sort ``log_K``, where somebody has sorted it already

    @classmethod
    def of(cls, scale_K: Tensor, error_K: Tensor | None = None) -> Scales:
        """From positive scales and their errors (None: known)."""
        scale_K = scale_K.double()
        error_K = torch.zeros_like(scale_K) if error_K is None else error_K.double()
        relative_K = (error_K / scale_K).nan_to_num(UNKNOWN, UNKNOWN, UNKNOWN)
        is_known_K = scale_K.isfinite() & (scale_K > 0) & (relative_K < 0.5)
        log_K = torch.where(is_known_K, scale_K, 1.0).log()
        return cls(log_K, torch.where(is_known_K, relative_K.clamp_min(LEAST_ERROR), UNKNOWN))

    def __len__(self) -> int:
        return len(self.log_K)

    def __neg__(self) -> Scales:
        return Scales(-self.log_K, self.error_K)

    def __add__(self, other: Scales) -> Scales:
        return Scales(self.log_K + other.log_K, (self.error_K.square() + other.error_K.square()).sqrt())

    def __sub__(self, other: Scales) -> Scales:
        return self + -other

    def shifted(self, by: float) -> Scales:
        """Times a common factor, given as its logarithm."""
        return Scales(self.log_K + by, self.error_K)

    def weighted(self, error_K: Tensor) -> Scales:
        """The same scales with other errors."""
        return Scales(self.log_K, error_K, self._order)

    def __getitem__(self, channels: slice | Tensor) -> Scales:
        return Scales(self.log_K[channels], self.error_K[channels])

    def middle(self) -> float:
        """The weighted median: half of the weight lies on either side."""
        return self._middle

    @cached_property
    def _middle(self) -> float:  # asked for again and again
        if not len(self):
            return 0.0
        order = self._order
        weight_K = self.error_K[order].pow(-2).cumsum(0)
        return float(self.log_K[order][int(torch.searchsorted(weight_K, weight_K[-1:] / 2).clamp_max(len(self) - 1))])

    @cached_property
    def _order(self) -> Tensor:  # sorting is nearly all that judging scales costs
        # numpy sorts several times faster than torch where the processor has wide instructions for it.
        return torch.from_numpy(self.log_K.numpy().argsort()) if self.known_order_K is None else self.known_order_K

    def factor(self) -> float:
        """The common factor, as a number."""
        return float(torch.tensor(self.middle(), dtype=torch.float64).exp())

    @property
    def is_factor(self) -> bool:
        """Whether most channels are scaled by much the same."""
        return abs(self.factor() - 1) > EVEN_FACTOR

    def spread(self) -> float:
        """Weighted root mean square around the middle."""
        if not len(self):
            return 0.0
        weight_K = self.error_K.pow(-2)
        return float((((self.log_K - self.middle()).square() * weight_K).sum() / weight_K.sum()).sqrt())

    def errors(self) -> float:
        """Root mean square around the middle in standard errors: 1 for noise alone."""
        return float(((self.log_K - self.middle()) / self.error_K).square().mean().sqrt()) if len(self) else 0.0


def is_hidden(wanted: Scales, own: Scales, half_step: float = 0.0) -> bool:
    """Whether the wanted scales cannot be refuted: too weak around their middle to be seen among the own ones.

    Their middle is a factor of the whole weight, which shows however noisy single channels are.

    Args:
        half_step: of the grid that the weight with the own scales is stored on, relative to its largest value. Scales
            that move no value by more may be lost in its codes, all of them where the base lies on a grid itself.
    """
    if len(own) != len(wanted):
        return False
    away_K = wanted.log_K - wanted.middle()
    x_K = away_K / (wanted + own).error_K
    if float(x_K.square().sum().sqrt()) >= MIN_ERRORS and float(away_K.abs().max()) > half_step:
        return False
    return not wanted.is_factor or abs(own.middle() - wanted.middle()) < abs(wanted.middle()) / 2


def follows(own: Scales, wanted: Scales) -> bool:
    """Whether scales are the wanted ones up to a common factor: as a whole, and in most strong channels."""
    if len(own) != len(wanted) or len(own) < LEAST_CHANNELS or wanted.errors() < LEADER_ERRORS:
        return False
    difference = own - wanted
    error_K = difference.error_K
    x_K = (wanted.log_K - wanted.weighted(error_K).middle()) / error_K
    y_K = (own.log_K - own.weighted(error_K).middle()) / error_K
    power = float(x_K.square().sum())
    most_off = MOST_OFF if wanted.spread() > WEAK_SPREAD else MOST_OFF_WEAK
    if power**0.5 < MIN_ERRORS or abs(float((x_K * y_K).sum()) / power - 1) > most_off:
        return False
    if difference.errors() > max(LEADER_ERRORS, 0.5 * float(y_K.square().mean().sqrt())):
        return False
    is_strong_K = x_K.abs() > STRONG_ERRORS
    if not bool(is_strong_K.any()):
        return True
    is_stray_K = (difference.log_K - difference.middle()).abs() / error_K > STRAY * x_K.abs()
    return float(is_stray_K[is_strong_K].double().mean()) < MOST_STRAYS
