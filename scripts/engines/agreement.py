"""When another engine's reading of an artifact counts as the same model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import stdev
from typing import Any

LIMIT = 0.005
"""Largest relative difference of two perplexities; rows enough that kernels rounding elsewhere stay well below it."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one reader made of one artifact.

    Attributes:
        logprobs: natural logarithm of the probability of each scored token, in order; empty when it was refused.
        text: greedy continuation of the prompt.
        tokens: of the text.
        gaps: by how much the best logit led the second, token by token; empty where the reader does not see logits.
        ids: of the tokens of some texts, text by text.
        refusal: the engine's own words when it did not read the artifact, or None.
    """

    logprobs: list[float]
    text: str = ""
    tokens: tuple[int, ...] = ()
    gaps: tuple[float, ...] = ()
    ids: tuple[tuple[int, ...], ...] = ()
    refusal: str | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(-math.fsum(self.logprobs) / len(self.logprobs))

    @staticmethod
    def of(answer: dict[str, Any]) -> Reading:
        """From a reader's answer (see `exchange`)."""
        return Reading(
            logprobs=answer.get("logprobs", []),
            text=answer.get("text", ""),
            tokens=tuple(answer.get("tokens", ())),
            gaps=tuple(answer.get("gaps", ())),
            ids=tuple(map(tuple, answer.get("ids", ()))),
            refusal=answer.get("refusal"),
        )


@dataclass(frozen=True, kw_only=True)
class Check:
    """One artifact in one engine.

    Attributes:
        required: the engine is known to read this artifact here, so a refusal is a failure, too.
        close: greedy tokens must be the same up to a place where our best logit leads by no more than this; None: where
            something rounds differently, another continuation is no failure.
    """

    artifact: str
    engine: str
    ours: Reading
    theirs: Reading
    required: bool
    close: float | None = None

    @property
    def difference(self) -> float:
        """Of the perplexities, relative to ours and signed; NaN when there is nothing to compare."""
        if not self.ours.logprobs or not self.theirs.logprobs:
            return math.nan
        return self.theirs.perplexity / self.ours.perplexity - 1

    @property
    def interval(self) -> float:
        """Half the width of the 95% interval of `difference`, as if the tokens were independent."""
        if len(self.ours.logprobs) < 2 or len(self.ours.logprobs) != len(self.theirs.logprobs):
            return math.nan
        pairs = zip(self.ours.logprobs, self.theirs.logprobs, strict=True)
        return 1.96 * stdev(ours - theirs for ours, theirs in pairs) / math.sqrt(len(self.ours.logprobs))

    @property
    def token_difference(self) -> float:
        """Mean absolute difference of the log-probabilities of a token, in nats: errors do not cancel here."""
        if not self.ours.logprobs or len(self.ours.logprobs) != len(self.theirs.logprobs):
            return math.nan
        pairs = zip(self.ours.logprobs, self.theirs.logprobs, strict=True)
        return math.fsum(abs(ours - theirs) for ours, theirs in pairs) / len(self.ours.logprobs)

    @property
    def parted(self) -> int | None:
        """The first place where the greedy tokens differ, or None."""
        if self.ours.tokens == self.theirs.tokens:
            return None
        pairs = enumerate(zip(self.ours.tokens, self.theirs.tokens, strict=False))
        shorter = min(len(self.ours.tokens), len(self.theirs.tokens))
        return next((place for place, (ours, theirs) in pairs if ours != theirs), shorter)

    @property
    def failure(self) -> str | None:
        """Why this check does not pass, or None."""
        if self.ours.refusal is not None:
            return f"qconv cannot read its own output: {self.ours.refusal}"
        if self.theirs.refusal is not None:
            return f"refused: {self.theirs.refusal}" if self.required else None
        if len(self.theirs.logprobs) != len(self.ours.logprobs):
            return f"scored {len(self.theirs.logprobs)} tokens, expected {len(self.ours.logprobs)}"
        if self.theirs.ids != self.ours.ids:
            return f"makes the tokens {self.theirs.ids} of texts, expected {self.ours.ids}"
        # Written so that NaN fails.
        if not abs(self.difference) <= LIMIT:
            return f"the perplexity is off by {self.difference:+.2%}, more than {LIMIT:.1%}"
        place = self.parted
        if self.close is not None and place is not None and not self.ours.gaps[place] <= self.close:
            return (
                f"continues with {self.theirs.text!r}, expected {self.ours.text!r}: they part at token {place + 1}, "
                f"where our best logit leads by {self.ours.gaps[place]:.3f}, more than {self.close}"
            )
        return None
