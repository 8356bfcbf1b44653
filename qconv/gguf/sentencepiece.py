"""SentencePiece's BPE as tokenizer.json has it (Llama 2, Mistral, Phi-3, Gemma), as scores for llama.cpp.

llama.cpp merges the two neighbours whose union has the highest score, the leftmost first; tokenizer.json lists pairs in
the order of their rank. transformers made that list of the scores: for each token, from the highest score down, all
pairs of tokens that make it. Where a list is like that, and only there, the two rules are one, and a score that falls
with the rank of a token gives the same tokens. It is checked: what would be merged otherwise is refused.

Blanks become ``▁``. llama.cpp can put one before a text, which is then put behind each special token, too, as
transformers did in release 4. Since release 5 most tokenizers put one only before the whole text, and none where it
begins with a blank: texts that begin with one, and text behind special tokens, differ by a blank. That is said once.

Left out: Unigram models; white space that a special token takes with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BLANK = "\u2581"
BYTES = tuple(f"<0x{number:02X}>" for number in range(256))
WITHOUT_MERGE = -1e6  # of tokens that nothing is merged into: far below every rank
_PREPEND, _REPLACE = {"type": "Prepend", "prepend": BLANK}, {"type": "Replace", "pattern": {"String": " "}}
_DIFFERS = (
    "llama.cpp puts a blank before every text and behind every special token, while this tokenizer puts one "
    "{scheme}: such texts may differ from it by one blank"
)


class NotAlikeError(Exception):
    """llama.cpp would not tokenize alike; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """What scores and keys say.

    Attributes:
        scores: token's text -> score, for all tokens of the model.
        adds_blank: before a text.
        warning: in which texts the tokens differ, or None.
    """

    scores: Mapping[str, float]
    adds_blank: bool
    warning: str | None


def pieces_of(content: Mapping[str, Any], merges: Sequence[str]) -> Pieces:
    """Of the content of a tokenizer.json whose model is BPE with byte fallback.

    Raises:
        NotAlikeError: llama.cpp would not tokenize alike.
    """
    model = content["model"]
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(key):
            raise NotAlikeError(f"its model has {key} {model[key]!r}")
    missing = next((text for text in BYTES if text not in model["vocab"]), None)
    if missing is not None:
        raise NotAlikeError(f"it falls back to bytes and has no token {missing}")
    adds_blank, warning = _blanks(content.get("normalizer"), content.get("pre_tokenizer"))
    added = {token["content"] for token in content["added_tokens"]}
    return Pieces(scores=_scores(model["vocab"], merges, added), adds_blank=adds_blank, warning=warning)


def _blanks(normalizer: Mapping[str, Any] | None, pre_tokenizer: Mapping[str, Any] | None) -> tuple[bool, str | None]:
    """Whether a blank is put before a text, and what to say of it."""
    steps = [] if normalizer is None else [normalizer]
    if normalizer is not None and normalizer["type"] == "Sequence":
        steps = list(normalizer["normalizers"])
    replaces = [step for step in steps if {**step, "content": None} == {**_REPLACE, "content": None}]
    prepends = [step for step in steps if dict(step) == _PREPEND]
    if len(replaces) + len(prepends) != len(steps) or any(step["content"] != BLANK for step in replaces):
        raise NotAlikeError(f"its normalizer is {dict(normalizer or {})}")
    if pre_tokenizer is None or _does_nothing(pre_tokenizer):
        if not replaces:
            raise NotAlikeError("it does not replace blanks")
        return bool(prepends), None
    whole = pre_tokenizer["type"] == "Metaspace" and not pre_tokenizer.get("split", True) and not steps
    if not whole or pre_tokenizer.get("replacement") != BLANK:
        raise NotAlikeError(f"its pre-tokenizer is {dict(pre_tokenizer)}")
    scheme = pre_tokenizer.get("prepend_scheme", "always")
    if scheme == "never":
        return False, None
    where = "only before a whole text" if scheme == "first" else "behind special tokens, too, but"
    return True, _DIFFERS.format(scheme=f"{where} that begins without one")


def _does_nothing(pre_tokenizer: Mapping[str, Any]) -> bool:
    """Gemma's cuts at blanks, when the normalizer has left none."""
    return bool(pre_tokenizer["type"] == "Split" and pre_tokenizer["pattern"] == {"String": " "})


def _scores(vocabulary: Mapping[str, int], merges: Sequence[str], added: set[str]) -> dict[str, float]:
    """Falling with the place of a token's merges."""
    scores: dict[str, float] = {}
    pairs: set[str] = set()
    last = ""
    for merge in merges:
        left, _, right = merge.partition(" ")
        token = left + right
        if token != last and token in scores:
            raise NotAlikeError(f"its merges into {token!r} do not stand together, so they have no common score")
        scores.setdefault(token, -float(len(scores)))
        pairs.add(merge)
        last = token
    for token in vocabulary:
        if token in added or token in BYTES or len(token) == 1:
            continue
        for cut in range(1, len(token)):
            halves = token[:cut], token[cut:]
            is_made = all(half in scores or (len(half) == 1 and half in vocabulary) for half in halves)
            if is_made and " ".join(halves) not in pairs:
                raise NotAlikeError(f"it does not merge {halves[0]!r} and {halves[1]!r}, though {token!r} is a token")
    return {token: scores.get(token, WITHOUT_MERGE) for token in vocabulary}
