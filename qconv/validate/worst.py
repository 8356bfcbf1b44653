"""The evaluated positions where the candidate is furthest from the reference, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qconv.corpus import TokenRows
from qconv.validate.statistics import PairStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_SHOWN = 20
_CONTEXT_TOKENS = 24


def worst_tokens(pair: PairStatistics, rows: TokenRows, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The positions with the largest KL: the text before, the actual next token, and what both models expected."""
    shown = pair["kl"].argsort(descending=True, stable=True)[:NUM_SHOWN].tolist()
    per_row = rows.ids_TS.shape[1] - 1

    def top(side: str, index: int) -> list[list[Any]]:
        ids, logps = pair[f"{side}_top_ids"][index], pair[f"{side}_top_logp"][index]
        return [[tokenizer.decode([int(token)]), float(logp.exp())] for token, logp in zip(ids, logps, strict=True)]

    found = []
    for index in shown:
        row, position = divmod(index, per_row)
        ids_S = rows.ids_TS[row]
        start = max(0, position + 1 - _CONTEXT_TOKENS)
        found.append(
            {
                "row": row,
                "position": position,
                "document": int(rows.documents_TS[row, position + 1]),
                "kl": float(pair["kl"][index]),
                "context": tokenizer.decode(ids_S[start : position + 1].tolist()),
                "target": tokenizer.decode([int(ids_S[position + 1])]),
                "reference_top": top("reference", index),
                "candidate_top": top("candidate", index),
            }
        )
    return found
