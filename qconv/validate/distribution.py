"""One model's next-token distributions over some positions, and the divergences between two of them.

Logits stay as the model gave them. Sums over the vocabulary run piece by piece, in float32 within a
piece and float64 across pieces: the pieces fit in a core's cache, which makes this several times
faster on CPU than whole rows.

Dimension legend: T = positions, V = vocabulary, K = top tokens kept, P = vocabulary of one piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

import torch
from torch import Tensor

from qconv.errors import NumericsError

TOP = 5  # tokens whose overlap is the top-k agreement
_BLOCK = 128
_PIECE_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 25}  # of one float32 temporary; five of them are in use


class Distribution:
    """Softmax of ``logits_TV``; what needs a pass over the vocabulary is computed when it is first asked for.

    Attributes:
        name: of the model, for messages.
        logits_TV: any float dtype.
        max_T: largest logit, float32.
        top_ids_TK: the most probable tokens, in order.
    """

    def __init__(self, logits_TV: Tensor, name: str):
        """From logits of any float dtype.

        Raises:
            NumericsError: the largest logit of a position is NaN or infinite.
        """
        self.name = name
        self.logits_TV = logits_TV
        self._top_TK, self.top_ids_TK = top_tokens(logits_TV, min(TOP, logits_TV.shape[1]))
        self.max_T = self._top_TK[:, 0].float()
        self._total_T: Tensor | None = None  # sum of exp(logit - max), float64
        if not self.max_T.isfinite().all():  # NaN sorts above everything
            _refuse(name)

    @property
    def log_total(self) -> Tensor:
        """Logarithm of the partition function relative to the largest logit, float64."""
        if self._total_T is None:
            self._total_T = torch.zeros_like(self.max_T, dtype=torch.float64)
            for part_TP in _pieces(self.logits_TV):
                self._total_T += (part_TP - self.max_T[:, None]).exp_().sum(-1)
        return self._total_T.log()

    @property
    def log_z(self) -> Tensor:
        """Logarithm of the partition function, float64; ``logits - log_z`` are log-probabilities."""
        return self.max_T.double() + self.log_total

    @property
    def top_logp(self) -> Tensor:
        """Log-probabilities of ``top_ids_TK``, float32."""
        return (self._top_TK.double() - self.log_z[:, None]).float()

    def logp(self, ids_T: Tensor) -> Tensor:
        """Log-probabilities of one token for each position, float32."""
        return self.logits_TV.gather(1, ids_T[:, None]).squeeze(1).double().sub(self.log_z).float()

    def log_probabilities(self) -> Tensor:
        """All of them, float32 ``[T, V]``."""
        return self.logits_TV.float() - self.log_z[:, None].float()

    def divergences(self, other: Distribution) -> tuple[Tensor, Tensor]:
        """KL(self || other) and KL(other || self) for each position, float32 nats; rounding below 0 counts as 0.

        Raises:
            NumericsError: a divergence is not finite (a logit of minus infinity).
        """
        forward_T, backward_T, total_T, other_total_T = torch.zeros(
            4, len(self.max_T), dtype=torch.float64, device=self.max_T.device
        )
        for p_TP, q_TP in zip(_pieces(self.logits_TV), _pieces(other.logits_TV), strict=True):
            weights_p_TP, weights_q_TP = p_TP - self.max_T[:, None], q_TP - other.max_T[:, None]
            # Subtract first: entropy minus cross-entropy would cancel, and small KLs are what is measured.
            distance_TP = weights_p_TP - weights_q_TP
            total_T += weights_p_TP.exp_().sum(-1)
            other_total_T += weights_q_TP.exp_().sum(-1)
            forward_T += weights_p_TP.mul_(distance_TP).sum(-1)
            backward_T -= weights_q_TP.mul_(distance_TP).sum(-1)
        self._total_T, other._total_T = total_T, other_total_T
        # So far all is relative to the maxima, which float32 holds well; the partition functions are float64.
        shift_T = total_T.log() - other_total_T.log()
        forward_T = forward_T / total_T - shift_T
        backward_T = backward_T / other_total_T + shift_T
        if not (forward_T.isfinite() & backward_T.isfinite()).all():
            _refuse(f"{self.name} or {other.name}")
        return forward_T.clamp_min(0).float(), backward_T.clamp_min(0).float()


def top_tokens(logits_TV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest logits ``[T, k]`` in order, and their ids (int64); of equal ones the lowest id first.

    Logits of 16-bit models are often equal, so an arbitrary order would be noise in every agreement. The
    k largest lie in the k blocks with the largest maxima (the first ones, of equal blocks), so only those
    are searched: several times faster on CPU than a search of the whole row.
    """
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


def _refuse(name: str) -> NoReturn:
    raise NumericsError(f"the logits of {name} contain NaN or infinity")
