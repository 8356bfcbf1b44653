"""What a reference cache keeps of a next-token distribution, and statistics of a candidate against it.

Kept of the reference p at each position: the K most probable tokens with their log-probabilities, the
logarithm of the mass P of all others (the tail), M tokens drawn with replacement from the tail's conditional
distribution with their log-probabilities, and the log-probability of the actual next token. The candidate q is
there whole, so its tail mass Q is exact. Then, by the chain rule of relative entropy (Cover and Thomas 2006,
Elements of Information Theory, theorem 2.5.3),

    KL(p || q) = sum_top p log(p/q) + P log(P/Q) + P KL(p_tail || q_tail).

The first two terms are exact. Without the third they are a lower bound: the tail as one outcome (data processing
inequality). The third is the mean over the drawn tokens of x - 1 - log x with x = q_tail / p_tail: -log x with the
control variate x - 1, whose expectation is 0 (Schulman 2020, "Approximating KL Divergence", estimator k3). It is
unbiased and never negative, so no estimate lies below its lower bound. Plain -log x swings around 0 and, where
candidate and reference are close, exceeds the KL itself: on SmolLM2-135M with K = 64 and M = 32 its error at one
position is about twice as large for a 4-bit candidate and 6 times for an FP8 one, whose mean then comes out 3% and 99th
percentile 4% too large, because estimates below 0 have to count as 0. Where the two are far apart plain is the better
one (0.13 against 0.19 of the mean KL at KL 0.41). KL(q || p) follows in the same way, with importance weights: Q times
the mean of x log x - x + 1; its errors are larger, as tokens that q prefers are drawn as seldom as p has them.

Rounding points: log-probabilities are float32 as they came; masses are summed and estimates formed in float64.
Left out: tokens of probability 0 (a logit of minus infinity), which have no finite KL.

Dimension legend: T = positions, V = vocabulary, K = top tokens kept, M = tail tokens drawn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from qconv.errors import CheckpointError, NumericsError

TOP = 5  # tokens whose overlap is the top-5 agreement
SHOWN = 3  # most probable tokens that are handed on for display
_CHUNK_ELEMENTS = 1 << 23  # of [T, V]; temporary tensors are float64
MASS_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class CachedRow:
    """The reference's distributions over some positions, as far as they are kept.

    Attributes:
        vocab_size: V.
        targets_T: the actual next tokens, int64.
        target_logp_T: their log-probabilities, float32, nats.
        top_ids_TK: int64, in falling order of probability, equals in rising order of id.
        top_logp_TK: float32.
        log_tail_T: logarithm of the mass of all other tokens, float64; minus infinity when K = V.
        sample_ids_TM: tokens drawn from the tail, int64; M = 0 when the tail is empty or none were asked for.
        sample_logp_TM: float32, of the whole distribution (not conditional on the tail).
    """

    vocab_size: int
    targets_T: Tensor
    target_logp_T: Tensor
    top_ids_TK: Tensor
    top_logp_TK: Tensor
    log_tail_T: Tensor
    sample_ids_TM: Tensor
    sample_logp_TM: Tensor

    def __len__(self) -> int:
        return len(self.targets_T)

    def __getitem__(self, part: slice) -> CachedRow:
        """Some of the positions."""
        tensors = {name: value[part] for name, value in self._tensors().items()}
        return dataclasses.replace(self, **tensors)

    def to(self, device: torch.device | str) -> CachedRow:
        return dataclasses.replace(self, **{name: value.to(device) for name, value in self._tensors().items()})

    def _tensors(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    @property
    def is_lower_bound(self) -> bool:
        """Whether the tail is not empty and has no samples: KLs are then the lower bounds."""
        return self.top_ids_TK.shape[1] < self.vocab_size and self.sample_ids_TM.shape[1] == 0

    def statistics(self, logp_TV: Tensor) -> dict[str, Tensor]:
        """Columns for each position, named as in `statistics.pair_columns`, on the candidate's device.

        Args:
            logp_TV: the candidate's log-probabilities at the same positions, float32.

        Returns:
            Exact: ``top1`` and ``top5`` (bool, share in common), ``reference_logp`` and ``candidate_logp`` (of the
            next token), ``confidence`` (largest probability of the reference), ``reference_correct``,
            ``candidate_correct`` (bool), and ``{reference,candidate}_top_{ids,logp}`` ``[T, 3]``.
            Unbiased: ``kl`` and ``reverse_kl``, float32, nats, with ``kl_variance``, float32, nats squared: the
            unbiased estimate of what drawing the tail tokens adds (NaN below two draws; 0 without a tail).
            Bounds: ``kl_lower_bound`` and ``reverse_kl_lower_bound``; `is_lower_bound` says whether ``kl`` and
            ``reverse_kl`` are no more than these.

        Raises:
            CheckpointError: another vocabulary or number of positions.
            NumericsError: NaN or infinity in ``logp_TV``.
        """
        if tuple(logp_TV.shape) != (len(self), self.vocab_size):
            raise CheckpointError(
                f"the reference cache has {len(self)} positions of {self.vocab_size} tokens here, the candidate "
                f"{tuple(logp_TV.shape)}; they are of different models or data"
            )
        here = self.to(logp_TV.device)
        parts = [here[part]._statistics(logp_TV[part]) for part in _chunks(*logp_TV.shape)]
        return {name: torch.cat([columns[name] for columns in parts]) for name in parts[0]}

    def _statistics(self, logp_TV: Tensor) -> dict[str, Tensor]:
        best_TK, best_logp_TK = stable_top(logp_TV, min(TOP, self.vocab_size))
        common_TKK = self.top_ids_TK[:, : best_TK.shape[1], None] == best_TK[:, None, :]
        return {
            **self._divergences(logp_TV),
            "top1": self.top_ids_TK[:, 0] == best_TK[:, 0],
            "top5": common_TKK.any(-1).float().mean(-1),
            "reference_logp": self.target_logp_T,
            "candidate_logp": logp_TV.gather(1, self.targets_T[:, None]).squeeze(1),
            "confidence": self.top_logp_TK[:, 0].exp(),
            "reference_correct": self.top_ids_TK[:, 0] == self.targets_T,
            "candidate_correct": best_TK[:, 0] == self.targets_T,
            "reference_top_ids": self.top_ids_TK[:, :SHOWN],
            "reference_top_logp": self.top_logp_TK[:, :SHOWN],
            "candidate_top_ids": best_TK[:, :SHOWN],
            "candidate_top_logp": best_logp_TK[:, :SHOWN],
        }

    def _divergences(self, logp_TV: Tensor) -> dict[str, Tensor]:
        p_TK, q_TK = self.top_logp_TK.double(), logp_TV.gather(1, self.top_ids_TK).double()
        lower_T = (p_TK.exp() * (p_TK - q_TK)).sum(-1)
        reverse_lower_T = (q_TK.exp() * (q_TK - p_TK)).sum(-1)
        nothing_T = torch.zeros_like(lower_T)
        forward_T = backward_T = variance_T = nothing_T
        if self.top_ids_TK.shape[1] < self.vocab_size:
            log_q_tail_T = tail_weights(logp_TV, self.top_ids_TK)[1]
            ratio_T = self.log_tail_T - log_q_tail_T  # log P/Q
            p_tail_T, q_tail_T = self.log_tail_T.exp(), log_q_tail_T.exp()
            lower_T = lower_T + p_tail_T * ratio_T
            reverse_lower_T = reverse_lower_T - q_tail_T * ratio_T
            q_TM = logp_TV.gather(1, self.sample_ids_TM).double()
            log_x_TM = q_TM - self.sample_logp_TM.double() + ratio_T[:, None]
            num_drawn = log_x_TM.shape[1]
            variance_T = torch.full_like(lower_T, torch.nan)
            if num_drawn:
                terms_TM = torch.expm1(log_x_TM) - log_x_TM
                forward_T = p_tail_T * terms_TM.mean(-1)
                backward_T = q_tail_T * (log_x_TM.exp() * log_x_TM - torch.expm1(log_x_TM)).mean(-1)
            if num_drawn > 1:
                variance_T = p_tail_T.square() * terms_TM.var(-1) / num_drawn
        # A negative lower bound is rounding and counts as 0, as it does without a cache.
        lower_T, reverse_lower_T = lower_T.clamp_min(0), reverse_lower_T.clamp_min(0)
        columns = {
            "kl": lower_T + forward_T,
            "reverse_kl": reverse_lower_T + backward_T,
            "kl_lower_bound": lower_T,
            "reverse_kl_lower_bound": reverse_lower_T,
        }
        # The sum over the vocabulary sees a NaN or infinity anywhere, the columns see an overflow of their own.
        if not all(value.isfinite().all() for value in (logp_TV.sum(-1), *columns.values())):
            raise NumericsError("the log-probabilities of the candidate contain NaN or infinity")
        return {name: value.float() for name, value in (columns | {"kl_variance": variance_T}).items()}


def compress(logp_TV: Tensor, targets_T: Tensor, k: int, samples: int, generator: torch.Generator) -> CachedRow:
    """Keeps what a `CachedRow` keeps of float32 log-probabilities ``[T, V]``; int64 ``targets_T``.

    Args:
        k: top tokens; all of them where the vocabulary is smaller.
        samples: tail tokens drawn for each position.
        generator: of the CPU, whatever the device, so that draws do not depend on it.

    Raises:
        NumericsError: NaN or infinity, or no log-probabilities.
    """
    size = logp_TV.shape[1]
    if not logp_TV.sum(-1).isfinite().all():
        raise NumericsError("the log-probabilities of the reference contain NaN or infinity")
    parts = []
    for part in _chunks(*logp_TV.shape):
        chunk_TV, next_T = logp_TV[part], targets_T[part].to(logp_TV.device)
        ids_TK, top_TK = stable_top(chunk_TV, min(k, size))
        if k < size:
            weights_TV, log_tail_T = tail_weights(chunk_TV, ids_TK)
            drawn_TM = _draw(weights_TV, samples, generator)
        else:
            log_tail_T = torch.full_like(top_TK[:, 0], -inf, dtype=torch.float64)
            drawn_TM = ids_TK[:, :0]
        mass_T = top_TK.double().exp().sum(-1) + log_tail_T.exp()
        if not ((mass_T - 1).abs() < MASS_TOLERANCE).all():
            raise NumericsError(
                f"expected log-probabilities of the reference, found rows whose probabilities sum to "
                f"{float(mass_T[(mass_T - 1).abs().argmax()]):.4g}"
            )
        target_logp_T = chunk_TV.gather(1, next_T[:, None]).squeeze(1)
        drawn_logp_TM = chunk_TV.gather(1, drawn_TM)
        parts.append(CachedRow(size, next_T, target_logp_T, ids_TK, top_TK, log_tail_T, drawn_TM, drawn_logp_TM))
    tensors: dict[str, Any] = {name: torch.cat([vars(part)[name] for part in parts]) for name in parts[0]._tensors()}
    return dataclasses.replace(parts[0], **tensors)


def stable_top(logp_TV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids (int64) and values of the ``k`` largest, in falling order; of equal ones the lowest id comes first.

    Log-probabilities from 16-bit logits are often equal, and `torch.topk` then promises no order. As float64 they
    have 29 bits to spare; the id goes there. A log-probability is negative, so a larger id makes a smaller number.
    """
    ids_V = torch.arange(logp_TV.shape[1], device=logp_TV.device)
    keys_TV = (logp_TV.double().view(torch.int64) | ids_V).view(torch.float64)
    ids_TK = keys_TV.topk(k, dim=-1).indices
    return ids_TK, logp_TV.gather(1, ids_TK)


def tail_weights(logp_TV: Tensor, top_ids_TK: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens but the top ones: relative weights (largest 1; top tokens 0), and the logarithm of their mass.

    Returns:
        float32 ``[T, V]`` and float64 ``[T]``.
    """
    rest_TV = logp_TV.scatter(1, top_ids_TK, -inf)
    largest_T = rest_TV.amax(-1)
    weights_TV = rest_TV.sub_(largest_T[:, None]).exp_()
    return weights_TV, weights_TV.sum(-1, dtype=torch.float64).log() + largest_T.double()


def _draw(weights_TV: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """Ids ``[T, samples]`` drawn with replacement in proportion to ``weights_TV``, by inversion."""
    uniform_TM = torch.rand(len(weights_TV), samples, generator=generator, dtype=torch.float64)
    cumulative_TV = weights_TV.cumsum(-1, dtype=torch.float64)
    total_T1 = cumulative_TV[:, -1:]
    # Below the total whatever the rounding; "right" passes over tokens of weight 0.
    level_TM = (uniform_TM.to(weights_TV.device) * total_T1).minimum(total_T1 * (1 - 2**-52))
    return torch.searchsorted(cumulative_TV, level_TM, right=True)


def loss_against(exact_kl_T: Tensor, cached_kl_T: Tensor, lower_bound_T: Tensor | None = None) -> dict[str, Any]:
    """What the cache loses, where the exact KL of every position is known too; nats.

    Args:
        exact_kl_T, cached_kl_T, lower_bound_T: ``[T]``, the same positions (columns ``kl`` of the uncached
            statistics, ``kl`` and ``kl_lower_bound`` of `CachedRow.statistics`).
    """
    exact_T, cached_T = exact_kl_T.double().cpu(), cached_kl_T.double().cpu()
    if exact_T.shape != cached_T.shape or not len(exact_T):
        raise NumericsError(f"{len(exact_T)} exact KLs cannot be compared with {len(cached_T)} cached ones")
    return {
        "positions": len(exact_T),
        "kl_mean_exact": float(exact_T.mean()),
        "kl_mean_cached": float(cached_T.mean()),
        "difference": float((cached_T - exact_T).mean()),
        "rms_per_position": float((cached_T - exact_T).square().mean().sqrt()),
        "kl_p99_exact": float(exact_T.quantile(0.99)),
        "kl_p99_cached": float(cached_T.quantile(0.99)),
        "lower_bound_mean": None if lower_bound_T is None else float(lower_bound_T.double().mean()),
    }


def _chunks(num_positions: int, vocab_size: int) -> Iterator[slice]:
    size = max(1, _CHUNK_ELEMENTS // vocab_size)
    for start in range(0, max(num_positions, 1), size):
        yield slice(start, min(start + size, num_positions))
