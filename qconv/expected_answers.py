"""What a model is sure to answer: the beginning of a greedy answer, up to the first token that rounding could change.

Engines compute with other kernels than qconv: the same artifact differs by 0.04 nats for a token where inputs are not
rounded and by up to 0.2 where they are (docs/targets.md), so a greedy answer parts where the two best tokens are near
one another. An answer is recorded up to there: every token before is ahead of the next best by `MARGIN` nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qconv import corpus
from qconv.host_memory import usable_bytes
from qconv.layout import config_dtype
from qconv.quantize.memory import free_memory
from qconv.runners import Candidate, candidate_model
from qconv.side_files import tokenizer_folder
from qconv.validate.prompts import load_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARGIN = 1.0
"""Nats: five times the largest difference that was measured."""
NEW_TOKENS = 16
KEPT = 3
PLAIN_PROMPTS = (
    "red, green, blue, red, green, blue, red, green, blue, red,",
    "1, 2, 3, 4, 5, 6, 7,",
    "One, two, three, four,",
    "A B C D E F G",
    "The capital of France is Paris. The capital of Italy is",
    "It was the best of times, it was the worst of",
)
"""Continuations rather than questions: a base model is sure of them, too."""


@dataclass(frozen=True, kw_only=True)
class ExpectedAnswer:
    """Attributes:
    text: that a greedy answer begins with; empty = nothing is sure.
    num_tokens: of it.
    """

    prompt: str
    text: str
    num_tokens: int


def why_not_whole(candidate: Candidate, device: str) -> str | None:
    """Answers need the whole decoded model in memory; in words when it does not fit, else None."""
    itemsize = config_dtype(candidate.view.config).itemsize
    need = sum(prod(spec.shape) * itemsize for spec in candidate.view.specs().values())
    usable = usable_bytes() if device == "cpu" else free_memory(device)
    if usable is None or need * 1.2 <= usable:
        return None
    return f"the decoded model takes {need / 1e9:.1f} GB and {usable / 1e9:.1f} GB can be had"


def expected_answers(candidate: Candidate, prompts: str | None, device: str) -> list[ExpectedAnswer]:
    """The surest beginnings of answers, longest first, at least one.

    Args:
        prompts: as `load_prompts` has them; None = `PLAIN_PROMPTS`.

    Raises:
        CalibrationError: prompts or tokenizer cannot be read.
    """
    adapter = None if candidate.adapter is None else Path(candidate.adapter.location)
    tokenizer = corpus.load_tokenizer(tokenizer_folder(candidate.source.folder, adapter))
    model, _ = candidate_model(candidate, candidate.view, device, False, "qconv")
    whole = model.whole()
    texts = list(PLAIN_PROMPTS) if prompts is None else load_prompts(prompts)
    found = [_answer(whole, tokenizer, text, model.device) for text in texts]
    return sorted(found, key=lambda answer: -answer.num_tokens)[: max(1, min(KEPT, sum(bool(a.text) for a in found)))]


@torch.no_grad()
def _answer(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, device: str) -> ExpectedAnswer:
    ids: list[int] = list(tokenizer(prompt)["input_ids"])
    new: list[int] = []
    for _ in range(NEW_TOKENS):
        logits = model(input_ids=torch.tensor([ids + new], device=device), use_cache=False).logits[0, -1].float()
        best = torch.topk(torch.log_softmax(logits, -1), 2)
        token = int(best.indices[0])
        if float(best.values[0] - best.values[1]) < MARGIN or token == tokenizer.eos_token_id:
            break
        new.append(token)
    text = str(tokenizer.decode(new, skip_special_tokens=True)).rstrip("�")  # an unfinished character
    return ExpectedAnswer(prompt=prompt, text=text if text.strip() else "", num_tokens=len(new) if text.strip() else 0)
