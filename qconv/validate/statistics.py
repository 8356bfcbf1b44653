"""Statistics of one pair of models, position by position and summarised.

Definitions, per evaluated position with reference distribution p, candidate q and actual next token t:

- KL = sum_v p_v (log p_v - log q_v), reverse KL the same with p and q exchanged; nats.
- top-1 agreement: argmax p equals argmax q; top-5 agreement: share of the five most probable tokens in common.
- probability difference: q_t - p_t, its mean and root mean square.
- perplexity = exp(mean of -log probability of t); log ratio = mean(log p_t - log q_t).
- flip: t is the most probable token of one model and not of the other (Dutta et al. 2024, "Accuracy is Not
  All You Need", section 3, on next tokens instead of answers).
- confidence: the reference's largest probability.

These are the definitions of llama.cpp's ``llama-perplexity --kl-divergence``, which differs in what it
evaluates: only the second half of each window, and reference logits stored in 16 bits after a cut at 16 nats
below the maximum. Here every position that has a next token counts, and logits are not rounded.

Dimension legend: T = positions of one row, P = all positions, K = top tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from qconv.errors import NumericsError
from qconv.validate.bootstrap import Bootstrap, Interval, clusters, ratio_interval
from qconv.validate.distribution import Distribution, divergences_from

QUANTILES = {"median": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99_9": 0.999}
CONFIDENCE_EDGES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
HISTOGRAM_EDGES = tuple(-8 + 0.25 * step for step in range(41))  # of log10 KL: -8 to 2
SHOWN = 3  # most probable tokens kept for each position, to show the worst ones


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """What a pair's columns need of one model once its logits are gone, at some positions.

    Attributes:
        top_TK, top_ids_TK, max_T: see `Distribution`.
        target_T: logits of the actual next tokens.
    """

    top_TK: Tensor
    top_ids_TK: Tensor
    max_T: Tensor
    target_T: Tensor

    @classmethod
    def of(cls, distribution: Distribution, targets_T: Tensor) -> Kept:
        return cls(
            top_TK=distribution.top_TK,
            top_ids_TK=distribution.top_ids_TK,
            max_T=distribution.max_T,
            target_T=distribution.at(targets_T),
        )

    @classmethod
    def cat(cls, parts: Sequence[Kept]) -> Kept:
        return cls(**{name: torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])})


def pair_columns(reference: Kept, other: Kept, sums_T4: Tensor, targets_T: Tensor) -> dict[str, Tensor]:
    """The columns that `PairStatistics` collects, one value for each position, of models whose logits are gone.

    Args:
        sums_T4: `Distribution.divergence_sums`.
        targets_T: the actual next tokens, int64, on the same device.
    """
    kl_T, reverse_kl_T = divergences_from(sums_T4)
    log_z_T, other_log_z_T = (
        kept.max_T.double() + sums_T4[:, side].log() for side, kept in enumerate((reference, other))
    )
    top_logp_TK, other_top_logp_TK = (
        (kept.top_TK.double() - each_T[:, None]).float()
        for kept, each_T in ((reference, log_z_T), (other, other_log_z_T))
    )
    common_TKK = reference.top_ids_TK[:, :, None] == other.top_ids_TK[:, None, :]
    return {
        "kl": kl_T,
        "reverse_kl": reverse_kl_T,
        "top1": reference.top_ids_TK[:, 0] == other.top_ids_TK[:, 0],
        "top5": common_TKK.any(-1).float().mean(-1),
        "reference_logp": (reference.target_T.double() - log_z_T).float(),
        "candidate_logp": (other.target_T.double() - other_log_z_T).float(),
        "confidence": top_logp_TK[:, 0].exp(),
        "reference_correct": reference.top_ids_TK[:, 0] == targets_T,
        "candidate_correct": other.top_ids_TK[:, 0] == targets_T,
        "reference_top_ids": reference.top_ids_TK[:, :SHOWN],
        "reference_top_logp": top_logp_TK[:, :SHOWN],
        "candidate_top_ids": other.top_ids_TK[:, :SHOWN],
        "candidate_top_logp": other_top_logp_TK[:, :SHOWN],
    }


class PairStatistics:
    """Collects the columns of a pair and summarises them."""

    def __init__(self, name: str):
        self.name = name
        self._parts: list[tuple[Mapping[str, Tensor], Tensor, int]] = []

    def add(self, columns: Mapping[str, Tensor], documents_T: Tensor, row: int) -> None:
        """Adds positions of one row.

        Args:
            columns: as `pair_columns` gives them.
            documents_T: the document of each position's next token, int.
            row: number of the evaluated row.
        """
        self._parts.append((columns, documents_T, row))

    @property
    def num_positions(self) -> int:
        return len(self.documents)

    @cached_property
    def _columns(self) -> dict[str, Tensor]:
        if not self._parts:
            raise NumericsError(f"no position was evaluated for {self.name}")
        names = self._parts[0][0]
        return {name: torch.cat([columns[name] for columns, _, _ in self._parts]).cpu() for name in names}

    def __getitem__(self, column: str) -> Tensor:
        """One column ``[P]`` (or ``[P, 3]`` for the top tokens), on the CPU."""
        return self._columns[column]

    @cached_property
    def documents(self) -> Tensor:
        return torch.cat([documents.cpu() for _, documents, _ in self._parts])

    @cached_property
    def rows(self) -> Tensor:
        return torch.cat([torch.full((len(documents),), row) for _, documents, row in self._parts])

    @cached_property
    def bootstrap(self) -> Bootstrap:
        return Bootstrap(clusters(self.documents, self.rows))

    @property
    def kl_mean(self) -> float:
        return float(self["kl"].double().mean())

    @property
    def log_ratios(self) -> Tensor:
        return self["reference_logp"].double() - self["candidate_logp"].double()

    @property
    def flips(self) -> Tensor:
        return (self["reference_correct"] != self["candidate_correct"]).double()

    @property
    def differences(self) -> Tensor:
        return self["candidate_logp"].double().exp() - self["reference_logp"].double().exp()

    def measure(self, metric: str) -> tuple[float, Interval]:
        """One statistic by its gate name (``"kl_p99"``, ``"top1_agreement"``, ...) and its 95% interval.

        Raises:
            KeyError: no such statistic.
        """
        for direction in ("kl", "reverse_kl"):
            for name, q in QUANTILES.items():
                if metric == f"{direction}_{name}":
                    return self._quantile(direction, q), self.bootstrap.quantile(self[direction], q)
            if metric == f"{direction}_max":
                largest = float(self[direction].max())
                return largest, (largest, largest)  # of the text that was evaluated; nothing to infer from it
        return self._MEANS[metric](self)

    def _mean(self, values_P: Tensor) -> tuple[float, Interval]:
        return float(values_P.double().mean()), self.bootstrap.mean(values_P)

    def _perplexity_ratio(self) -> tuple[float, Interval]:
        value, interval = self._mean(self.log_ratios)
        return ratio_interval((value, value))[0], ratio_interval(interval)

    def _difference_rms(self) -> tuple[float, Interval]:
        squares_P = self.differences.square()
        return float(squares_P.mean().sqrt()), self.bootstrap.root_mean(squares_P)

    def _quantile(self, column: str, q: float) -> float:
        # numpy's and torch's own default: linear between the two nearest. torch.quantile refuses long inputs.
        ordered_P = self[column].double().sort().values
        place = q * (len(ordered_P) - 1)
        low = int(place)
        high = min(low + 1, len(ordered_P) - 1)
        return float(ordered_P[low] + (place - low) * (ordered_P[high] - ordered_P[low]))

    _MEANS: Mapping[str, Callable[[PairStatistics], tuple[float, Interval]]] = {
        "kl_mean": lambda self: self._mean(self["kl"]),
        "reverse_kl_mean": lambda self: self._mean(self["reverse_kl"]),
        "top1_agreement": lambda self: self._mean(self["top1"]),
        "top5_agreement": lambda self: self._mean(self["top5"]),
        "flips": lambda self: self._mean(self.flips),
        "log_perplexity_ratio": lambda self: self._mean(self.log_ratios),
        "perplexity_ratio": lambda self: self._perplexity_ratio(),
        "probability_difference_rms": lambda self: self._difference_rms(),
    }

    def summary(self) -> dict[str, Any]:
        """The PAIR of a report: see ``report.schema.json``."""
        right, was_right = self["candidate_correct"], self["reference_correct"]
        return {
            "positions": self.num_positions,
            "documents": len(torch.unique(self.documents)),
            "kl": self._summarise("kl"),
            "reverse_kl": self._summarise("reverse_kl"),
            "top1_agreement": self._value("top1_agreement"),
            "top5_agreement": self._value("top5_agreement"),
            "probability_difference": {
                "mean": float(self.differences.mean()),
                "rms": self.measure("probability_difference_rms")[0],
            },
            "perplexity": _perplexity(self["candidate_logp"]),
            "reference_perplexity": _perplexity(self["reference_logp"]),
            "perplexity_ratio": self._value("perplexity_ratio"),
            "log_perplexity_ratio": self._value("log_perplexity_ratio"),
            "flips": {
                **self._value("flips"),
                "correct_to_wrong": int((was_right & ~right).sum()),
                "wrong_to_correct": int((right & ~was_right).sum()),
            },
            "by_confidence": self._by_confidence(),
            "histogram": self._histogram(),
        }

    def _value(self, metric: str) -> dict[str, Any]:
        value, interval = self.measure(metric)
        return {"value": value, "interval_95": list(interval)}

    def _summarise(self, column: str) -> dict[str, Any]:
        value, interval = self.measure(f"{column}_mean")
        quantiles = {name: self._quantile(column, q) for name, q in QUANTILES.items()}
        return {"mean": value, "interval_95": list(interval), **quantiles, "max": float(self[column].max())}

    def _by_confidence(self) -> list[dict[str, Any]]:
        rows = []
        for low, high in pairwise(CONFIDENCE_EDGES):
            inside = (self["confidence"] >= low) & (self["confidence"] < (high if high < 1 else 2))
            count = int(inside.sum())
            rows.append(
                {
                    "from": low,
                    "to": high,
                    "positions": count,
                    "kl_mean": float(self["kl"][inside].double().mean()) if count else None,
                    "top1_agreement": float(self["top1"][inside].double().mean()) if count else None,
                }
            )
        return rows

    def _histogram(self) -> dict[str, Any]:
        edges = torch.tensor(HISTOGRAM_EDGES, dtype=torch.float64)
        logs_P = self["kl"].double().clamp_min(1e-300).log10().clamp(edges[0], edges[-1])
        bins_P = (torch.bucketize(logs_P, edges, right=True) - 1).clamp(0, len(edges) - 2)
        return {
            "log10_edges": list(HISTOGRAM_EDGES),
            "counts": torch.bincount(bins_P, minlength=len(edges) - 1).tolist(),
        }


def effect_retained(candidate: PairStatistics, base: PairStatistics) -> dict[str, Any]:
    """How much of what the adapter changed survives: 1 - KL(ref||candidate) / KL(ref||base without adapter).

    1 = the candidate behaves like base + adapter, 0 = like the base alone; negative = further away.
    Measured on the positions that both have: the first ones of ``candidate``, all of ``base``.

    Raises:
        NumericsError: the base without the adapter gives the same outputs.
    """
    base_P = base["kl"].double()
    candidate_P = candidate["kl"][: len(base_P)].double()
    if float(base_P.mean()) <= 0:
        raise NumericsError("the adapter changes no output: base with and without it agree exactly (was it trained?)")
    value = 1 - float(candidate_P.mean() / base_P.mean())
    return {"value": value, "interval_95": list(base.bootstrap.effect(candidate_P, base_P))}


def _perplexity(logp_P: Tensor) -> float:
    return float((-logp_P.double().mean()).exp())
