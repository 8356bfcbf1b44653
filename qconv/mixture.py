"""Several sources of text, each with its share of the token rows.

Each source gives its own rows, cut as `corpus.pack_rows` cuts them with the same seed, so a source alone is
the mixture of one. The shares are of rows, which are equally long, and so of tokens: num_samples is
divided by largest remainders (Hamilton's method; Balinski and Young 1982, Fair Representation), which keeps
every count within one row of its exact share. Rows of the sources alternate in proportion.

Left out: rows that mix sources, and weights by documents.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qconv.corpus import Documents, TokenRows, load_documents, pack_rows
from qconv.errors import CalibrationError
from qconv.text_sources import digest_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Mixture:
    """Sources and their shares.

    Attributes:
        parts: the documents of each source.
        weights: the share of each, in (0, 1]; their sum is 1.
    """

    parts: tuple[Documents, ...]
    weights: tuple[float, ...]

    @property
    def sha256(self) -> str:
        """Of one source, its digest; of several, that of their digests and weights in order (hex)."""
        if len(self.parts) == 1:
            return self.parts[0].sha256
        pairs = zip(self.parts, self.weights, strict=True)
        return digest_texts([f"{weight!r} {part.sha256}" for part, weight in pairs])

    def facts(self) -> list[dict[str, Any]]:
        """What a report says of each source; plain values."""
        return [{**part.facts(), "weight": weight} for part, weight in zip(self.parts, self.weights, strict=True)]

    def summary(self) -> str:
        """The same in words, one line for each source."""
        if len(self.parts) == 1:
            return self.parts[0].summary()
        pairs = zip(self.parts, self.weights, strict=True)
        return "\n".join(f"{part.summary()}; {weight:.1%} of the rows" for part, weight in pairs)


def split_weight(source: str) -> tuple[str, float | None]:
    """``"train.jsonl:0.7"`` as source and weight; None = no weight, and always for what exists as a path.

    Raises:
        CalibrationError: a weight that is not positive and finite.
    """
    name, colon, text = source.rpartition(":")
    if not colon or not name or os.path.exists(source):
        return source, None
    try:
        weight = float(text)
    except ValueError:
        return source, None  # the split of a data set, or whatever load_documents makes of it
    if not (math.isfinite(weight) and weight > 0):
        raise CalibrationError(f"{source}: a weight is a positive number, such as {name}:0.5; found {text}")
    return name, weight


def load_mixture(sources: Sequence[str], tokenizer: PreTrainedTokenizerBase | None = None) -> Mixture:
    """The documents of several sources, each as `load_documents` takes it, with ``:weight`` behind or not.

    Weights need not sum to 1. Without any the sources have equal shares.

    Raises:
        CalibrationError: no source, one named twice, weights on some but not all, or what `load_documents` refuses.
    """
    named = [split_weight(source) for source in sources]
    if not named:
        raise CalibrationError("expected at least one text source, found none")
    names = [name for name, _ in named]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CalibrationError(f"{', '.join(twice)}: named more than once; name it once, with the sum of the weights")
    without = [name for name, weight in named if weight is None]
    if without and len(without) < len(named):
        raise CalibrationError(f"{', '.join(without)}: has no weight and others have; give every source one, or none")
    weights = [1.0 if weight is None else weight for _, weight in named]
    total = math.fsum(weights)
    parts = tuple(load_documents(name, tokenizer) for name in names)
    return Mixture(parts, tuple(weight / total for weight in weights))


def pack_mixture(
    mixture: Mixture,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    seq_len: int,
    seed: int,
    allow_fewer: bool = False,
) -> TokenRows:
    """``num_samples`` rows, of each source its share; otherwise as `corpus.pack_rows`.

    Documents are numbered through all sources, in their order. With ``allow_fewer`` the shares hold
    and the rows become fewer, as many as the source allows that is too short.

    Raises:
        CalibrationError: a source too short for its share, or a share of no row at all.
    """
    import torch

    counts = _divide(mixture, num_samples)
    packed = [
        pack_rows(part, tokenizer, count, seq_len, seed, allow_fewer)
        for part, count in zip(mixture.parts, counts, strict=True)
    ]
    have = [len(rows.ids_TS) for rows in packed]
    while any(count > most for count, most in zip(counts, have, strict=True)):
        # Largest remainders may give a source fewer rows of more: every total is tried, from a close bound.
        bound = min(most / weight for most, weight in zip(have, mixture.weights, strict=True)) + len(have)
        num_samples = min(num_samples - 1, int(bound))
        counts = _divide(mixture, num_samples)
    ids, documents, keys, first = [], [], [], 0
    for index, (part, rows, count) in enumerate(zip(mixture.parts, packed, counts, strict=True)):
        ids.append(rows.ids_TS[:count])
        documents.append(rows.documents_TS[:count] + first)
        keys += [((row + 0.5) / count, index) for row in range(count)]
        first += len(part)
    order = torch.tensor(sorted(range(len(keys)), key=keys.__getitem__), dtype=torch.int64)
    return TokenRows(torch.cat(ids)[order], torch.cat(documents)[order])


def _divide(mixture: Mixture, num_samples: int) -> list[int]:
    """Rows of each source; their sum is ``num_samples``."""
    exact = [weight * num_samples for weight in mixture.weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: (counts[index] - exact[index], index))
    for index in by_remainder[: num_samples - sum(counts)]:
        counts[index] += 1
    for part, count, weight in zip(mixture.parts, counts, mixture.weights, strict=True):
        if count < 1:
            raise CalibrationError(
                f"{part.source}: its weight, {weight:.2%} of all, is not one row of {num_samples}; "
                "ask for more rows, give it a larger weight, or leave it out"
            )
    return counts
