"""Token-level statistics between two models' logits.

Definitions, per evaluated position with reference distribution p and candidate q:
KL = sum_v p_v (log p_v - log q_v), in nats; top-1 agreement = argmax p equals argmax q;
perplexity = exp(mean of -log probability of the actual next token).
Logits are turned into log-probabilities in float32. A negative KL is rounding (about -1e-7) and
counts as 0.

Dimension legend: T = positions, V = vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qconv.errors import NumericsError


class ReferenceRow:
    """The reference's distribution over one row of positions, kept for every model that is compared with it."""

    def __init__(self, logp_TV: Tensor):
        self.logp_TV = logp_TV
        self.p_TV = logp_TV.exp()
        self.top_T = logp_TV.argmax(-1)


@dataclass
class PairStatistics:
    """Collects reference-against-candidate numbers position by position, by evaluated row."""

    name: str
    kl_rows: list[Tensor] = field(default_factory=list)
    num_agree: int = 0
    num_positions: int = 0
    nll_sum: float = 0.0

    def add(self, reference: ReferenceRow, logp_TV: Tensor, targets_T: Tensor) -> None:
        """Adds one row of positions.

        Args:
            reference: the reference at the same positions.
            logp_TV: this model's float32 log-probabilities.
            targets_T: the actual next tokens, int64.

        Raises:
            NumericsError: a KL is not finite.
        """
        # Subtract first: entropy minus cross-entropy would cancel, and small KLs are what is measured.
        kl_T = (reference.logp_TV - logp_TV).mul_(reference.p_TV).sum(-1).clamp_min(0)
        if not torch.isfinite(kl_T).all():
            raise NumericsError(f"KL of {self.name!r} is not finite at {int((~kl_T.isfinite()).sum())} positions")
        self.kl_rows.append(kl_T.cpu())
        self.num_agree += int((reference.top_T == logp_TV.argmax(-1)).sum())
        self.num_positions += len(targets_T)
        self.nll_sum -= float(logp_TV.gather(1, targets_T[:, None]).sum(dtype=torch.float64))

    @property
    def kl_mean(self) -> float:
        return float(torch.cat(self.kl_rows).double().mean())

    @property
    def kl_row_means(self) -> Tensor:
        return torch.stack([row.double().mean() for row in self.kl_rows])

    @property
    def perplexity(self) -> float:
        return float(torch.tensor(self.nll_sum / self.num_positions, dtype=torch.float64).exp())

    def summary(self) -> dict[str, Any]:
        kl_T = torch.cat(self.kl_rows).double()
        low, high = mean_interval(self.kl_row_means)
        return {
            "kl_mean": self.kl_mean,
            "kl_mean_interval_95": [low, high],
            "kl_median": float(kl_T.median()),
            "kl_p99": float(torch.quantile(kl_T, 0.99)),
            "kl_max": float(kl_T.max()),
            "top1_agreement": self.num_agree / self.num_positions,
            "perplexity": self.perplexity,
        }


def log_probabilities(logits_TV: Tensor, name: str) -> Tensor:
    """Float32 log-softmax.

    Raises:
        NumericsError: a logit is NaN or infinite.
    """
    logp_TV = torch.log_softmax(logits_TV.float(), dim=-1)
    # One NaN or +inf makes its whole position NaN; -inf stays where it is. The sum sees both.
    if not torch.isfinite(logp_TV.sum(-1)).all():
        raise NumericsError(f"the logits of {name} contain NaN or infinity")
    return logp_TV


def mean_interval(values: Tensor, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95% percentile-bootstrap interval of the mean of ``values`` ``[rows]`` (Efron 1979).

    Rows, not tokens, are resampled: neighbouring tokens are not independent.
    """
    if len(values) < 2:
        return float("-inf"), float("inf")
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(values), (resamples, len(values)), generator=generator)
    means = values.double().cpu()[picks].mean(dim=1)
    return float(torch.quantile(means, 0.025)), float(torch.quantile(means, 0.975))


def effect_retained(candidate_rows: Tensor, base_rows: Tensor, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """How much of what the adapter changed survives: 1 - KL(ref||candidate) / KL(ref||base without adapter).

    1 = the candidate behaves like base + adapter, 0 = like the base alone; negative = further away.

    Args:
        candidate_rows, base_rows: mean KL per evaluated row, ``[rows]``, same rows.
    """
    candidate, base = candidate_rows.double().cpu(), base_rows.double().cpu()
    if float(base.mean()) <= 0:
        raise NumericsError("the adapter changes no output: base with and without it agree exactly (was it trained?)")
    value = 1 - float(candidate.mean() / base.mean())
    if len(base) < 2:
        return {"value": value, "interval_95": [float("-inf"), float("inf")]}
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(base), (resamples, len(base)), generator=generator)
    values = 1 - candidate[picks].mean(dim=1) / base[picks].mean(dim=1)
    return {"value": value, "interval_95": [float(torch.quantile(values, q)) for q in (0.025, 0.975)]}
