"""One model's next-token distributions over some positions, and the divergences between two of them.

Logits stay as the model gave them. Sums over the vocabulary run piece by piece, in float32 within a
piece and float64 across pieces: the pieces fit in a core's cache, which makes this several times
faster on CPU than whole rows. On CUDA, Triton kernels (`distribution_kernels.py`) do the same in one pass over
the logits for the largest ones and one for the sums, where PyTorch would make some twenty.

Dimension legend: T = positions, V = vocabulary, K = top tokens kept, P = vocabulary of one piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

import torch
from torch import Tensor

from qconv.errors import NumericsError
from qconv.triton_support import available

TOP = 5  # tokens whose overlap is the top-k agreement
_BLOCK = 128
_PIECE_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 25}  # of one float32 temporary; five of them are in use


class FiniteChecks:
    """Values that must be finite and the models they are of. They are looked at together: reading waits for the GPU."""

    def __init__(self) -> None:
        self._values: list[tuple[str, Tensor]] = []

    def add(self, name: str, values: Tensor) -> None:
        self._values.append((name, values))

    def take(self, other: FiniteChecks) -> None:
        """Adds all of ``other``, which has none then."""
        self._values += other._values
        other._values = []

    def settle(self) -> None:
        """Looks at what was added since the last time.

        Raises:
            NumericsError: NaN or infinity; names the model whose values were added first.
        """
        values, self._values = self._values, []
        if not values or torch.cat([tensor.flatten() for _, tensor in values]).isfinite().all():
            return
        _refuse(next(name for name, tensor in values if not tensor.isfinite().all()))


class Distribution:
    """Softmax of ``logits_TV``; what needs a pass over the vocabulary is computed when it is first asked for.

    Attributes:
        name: of the model, for messages.
        logits_TV: any float dtype.
        max_T: largest logit, float32.
        top_TK: the largest logits, in order.
        top_ids_TK: the most probable tokens, in order.
    """

    def __init__(self, logits_TV: Tensor, name: str, checks: FiniteChecks | None = None):
        """From logits of any float dtype.

        Args:
            checks: takes what must be finite, to be settled by the caller; None = it is checked at once.

        Raises:
            NumericsError: the largest logit of a position is NaN or infinite.
        """
        self.name = name
        self.logits_TV = logits_TV
        self.top_TK, self.top_ids_TK = top_tokens(logits_TV, min(TOP, logits_TV.shape[1]))
        self.max_T = self.top_TK[:, 0].float().contiguous()
        self._total_T: Tensor | None = None  # sum of exp(logit - max), float64
        _require_finite(name, self.max_T, checks)  # NaN sorts above everything

    @property
    def log_total(self) -> Tensor:
        """Logarithm of the partition function relative to the largest logit, float64."""
        if self._total_T is None:
            self._total_T = _totals(self.logits_TV, self.max_T)
        return self._total_T.log()

    @property
    def log_z(self) -> Tensor:
        """Logarithm of the partition function, float64; ``logits - log_z`` are log-probabilities."""
        return self.max_T.double() + self.log_total

    def at(self, ids_T: Tensor) -> Tensor:
        """Logits of one token for each position."""
        return self.logits_TV.gather(1, ids_T[:, None]).squeeze(1)

    def log_probabilities(self) -> Tensor:
        """All of them, float32 ``[T, V]``."""
        return self.logits_TV.float() - self.log_z[:, None].float()

    def divergences(self, other: Distribution) -> tuple[Tensor, Tensor]:
        """KL(self || other) and KL(other || self) for each position, float32 nats; rounding below 0 counts as 0.

        Raises:
            NumericsError: a divergence is not finite (a logit of minus infinity).
        """
        return divergences_from(self.divergence_sums(other))

    def divergence_sums(self, other: Distribution, checks: FiniteChecks | None = None) -> Tensor:
        """What `divergences_from` takes: sums over the vocabulary, float64 ``[T, 4]``.

        With ``p`` and ``q`` = exp(logit - max) of this distribution and the other, and ``d`` = log p - log q:
        the sums of ``p``, ``q``, ``p d`` and ``-q d``.

        Args:
            checks: as for the distribution itself.

        Raises:
            NumericsError: a sum is not finite (a logit of minus infinity).
        """
        sums_T4 = _divergence_sums(self.logits_TV, other.logits_TV, self.max_T, other.max_T)
        self._total_T, other._total_T = sums_T4[:, 0], sums_T4[:, 1]
        _require_finite(f"{self.name} or {other.name}", sums_T4, checks)
        return sums_T4


def divergences_from(sums_T4: Tensor) -> tuple[Tensor, Tensor]:
    """The divergences of `Distribution.divergences`, float32 ``[T]``, from `Distribution.divergence_sums`."""
    total_T, other_total_T, forward_T, backward_T = sums_T4.unbind(1)
    # So far all is relative to the maxima, which float32 holds well; the partition functions are float64.
    shift_T = total_T.log() - other_total_T.log()
    forward_T = forward_T / total_T - shift_T
    backward_T = backward_T / other_total_T + shift_T
    return forward_T.clamp_min(0).float(), backward_T.clamp_min(0).float()


def is_fused(logits_TV: Tensor) -> bool:
    """Whether `distribution_kernels` takes these logits, which then need no temporaries of their size."""
    is_narrow = logits_TV.element_size() <= 4  # sums of float64 logits are float64
    return is_narrow and logits_TV.numel() > 0 and logits_TV.stride(1) == 1 and available(logits_TV)


def _totals(logits_TV: Tensor, max_T: Tensor) -> Tensor:
    if is_fused(logits_TV):
        from qconv.validate.distribution_kernels import totals  # imports Triton

        fused_T: Tensor = totals(logits_TV, max_T)
        return fused_T
    total_T = torch.zeros_like(max_T, dtype=torch.float64)
    for part_TP in _pieces(logits_TV):
        total_T += (part_TP - max_T[:, None]).exp_().sum(-1)
    return total_T


def _divergence_sums(p_TV: Tensor, q_TV: Tensor, p_max_T: Tensor, q_max_T: Tensor) -> Tensor:
    if is_fused(p_TV) and is_fused(q_TV):
        from qconv.validate.distribution_kernels import divergence_sums  # imports Triton

        fused_T4: Tensor = divergence_sums(p_TV, q_TV, p_max_T, q_max_T)
        return fused_T4
    sums_T4 = torch.zeros(len(p_max_T), 4, dtype=torch.float64, device=p_max_T.device)
    total_T, other_total_T, forward_T, backward_T = sums_T4.unbind(1)
    for p_TP, q_TP in zip(_pieces(p_TV), _pieces(q_TV), strict=True):
        weights_p_TP, weights_q_TP = p_TP - p_max_T[:, None], q_TP - q_max_T[:, None]
        # Subtract first: entropy minus cross-entropy would cancel, and small KLs are what is measured.
        distance_TP = weights_p_TP - weights_q_TP
        total_T += weights_p_TP.exp_().sum(-1)
        other_total_T += weights_q_TP.exp_().sum(-1)
        forward_T += weights_p_TP.mul_(distance_TP).sum(-1)
        backward_T -= weights_q_TP.mul_(distance_TP).sum(-1)
    return sums_T4


def top_tokens(logits_TV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest logits ``[T, k]`` in order, and their ids (int64); of equal ones the lowest id first.

    Logits of 16-bit models are often equal, so an arbitrary order would be noise in every agreement. The
    k largest lie in the k blocks with the largest maxima (the first ones, of equal blocks), so only those
    are searched: several times faster on CPU than a search of the whole row.
    """
    if is_fused(logits_TV) and 0 < k <= TOP:
        from qconv.validate import distribution_kernels  # imports Triton

        values_TK, ids_TK = distribution_kernels.top_tokens(logits_TV, k)
        return values_TK, ids_TK
    num, size = logits_TV.shape
    blocks = size // _BLOCK
    everything_TV = torch.arange(size, device=logits_TV.device).expand(num, -1)
    if blocks <= 2 * k:
        return _first_largest(logits_TV, everything_TV, k)
    maxima_TB = logits_TV[:, : blocks * _BLOCK].reshape(num, blocks, _BLOCK).amax(-1)
    _, best_TK = _first_largest(maxima_TB, everything_TV[:, :blocks], k)
    inside_W = torch.arange(_BLOCK, device=logits_TV.device)
    ids_TC = torch.cat([(best_TK[:, :, None] * _BLOCK + inside_W).flatten(1), everything_TV[:, blocks * _BLOCK :]], 1)
    return _first_largest(logits_TV.gather(1, ids_TC), ids_TC, k)


def _first_largest(values_TC: Tensor, ids_TC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest values and their ids; of equal values the lowest id first."""
    # The bits of a float, read as an integer, are in order once those of negative numbers are turned round;
    # NaN comes out on top, and is found there. What is left of 64 bits takes the id, reversed.
    bits_TC = (values_TC.float() + 0.0).view(torch.int32).long()  # the sum makes a positive zero of a negative one
    bits_TC = torch.where(values_TC.isnan(), 0x7FC00000, bits_TC)  # whatever its sign
    order_TC = torch.where(bits_TC < 0, bits_TC ^ 0x7FFFFFFF, bits_TC)
    keys_TC = (order_TC << 32) | (0x7FFFFFFF - ids_TC)
    places_TK = keys_TC.topk(k, dim=-1).indices
    return values_TC.gather(1, places_TK), ids_TC.gather(1, places_TK)


def _pieces(logits_TV: Tensor) -> Iterator[Tensor]:
    limit = _PIECE_ELEMENTS["cuda" if logits_TV.is_cuda else "cpu"]
    return iter(torch.split(logits_TV, max(1, limit // max(1, len(logits_TV))), dim=1))


def _require_finite(name: str, values: Tensor, checks: FiniteChecks | None) -> None:
    pending = FiniteChecks() if checks is None else checks
    pending.add(name, values)
    if checks is None:
        pending.settle()


def _refuse(name: str) -> NoReturn:
    raise NumericsError(f"the logits of {name} contain NaN or infinity")
