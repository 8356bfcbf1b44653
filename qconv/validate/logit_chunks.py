"""Logits of some positions at a time: how many, and from which models.

Dimension legend: B = rows in a batch, S = tokens per row, H = hidden size, V = vocabulary, T = positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from qconv.validate.distribution import is_fused

_CHUNK_BYTES = {"cpu": 13_000_000, "cuda": 128_000_000}  # float32 logits that are worked on together
_ROW_BYTES = 200_000_000  # ... of two models on a GPU, where statistics go through the vocabulary in pieces
_FUSED_BYTES = 550_000_000  # ... of all models, as they are, where kernels need no temporaries beside them
_FUSED_BYTES_SHARED = 1_200_000_000  # ... but, divided by models beyond the first, less than temporaries would take

Head = Callable[[Tensor], Tensor]


def position_chunks(logits_TV: Tensor) -> list[slice]:
    """Slices of positions whose float32 logits stay small enough to be worked on quickly."""
    return slices(len(logits_TV), chunk_size(logits_TV))


def chunk_size(logits_TV: Tensor) -> int:
    """Positions to work on together, for a vocabulary and device like these."""
    return max(1, _CHUNK_BYTES["cuda" if logits_TV.is_cuda else "cpu"] // (4 * logits_TV.shape[1]))


def slices(num: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, num)) for start in range(0, num, size)]


def positions_at_once(logits_TV: Tensor, num_models: int, are_observed: bool) -> int:
    """On a GPU, for logits like these; an observer makes log-probabilities and more of the same size from them."""
    if are_observed:
        return chunk_size(logits_TV)
    vocab_size, others = logits_TV.shape[1], max(1, num_models - 1)
    if is_fused(logits_TV):
        num_bytes = min(_FUSED_BYTES, _FUSED_BYTES_SHARED // others)
        return max(1, num_bytes // (num_models * logits_TV.element_size() * vocab_size))
    return max(1, _ROW_BYTES // others // (4 * vocab_size))


def logit_chunks(
    present: Mapping[str, tuple[Head, Tensor]], device: str, size: int | None
) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """Logits of some positions of one row at a time, by entrant; the last position has no next token.

    Args:
        present: what makes logits of hidden states, and those of the row ``[1, S, H]``.
        size: most positions at a time; None = all.
    """
    num = next(iter(present.values()))[1].shape[1] - 1
    if size is not None:
        num_parts = max(1, -(-num // size))
        for part in slices(num, max(1, -(-num // num_parts))):  # of about the same size
            yield part, {name: head(h_BSH[:, part])[0].to(device) for name, (head, h_BSH) in present.items()}
        return
    logits = {name: head(h_BSH)[0, :-1].to(device) for name, (head, h_BSH) in present.items()}
    for part in position_chunks(next(iter(logits.values()))):
        yield part, {name: logits_TV[part] for name, logits_TV in logits.items()}
