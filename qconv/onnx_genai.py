"""Whether ONNX Runtime GenAI loads a finished folder: its tokens, and what it generates, beside what is expected.

Greedy tokens must be those of the graph itself, run step by step; a graph in bfloat16 does not load on a CPU, and has
its tokenizer looked at alone. A tokenizer that differs from transformers' is told and no error: nothing is wrong with
the graph, and programs may bring tokens of their own.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qconv import corpus
from qconv.errors import CheckpointError, NumericsError
from qconv.onnx import TOKENIZER_FILE, OnnxPlan, OnnxSession, genai_greedy, genai_tokens
from qconv.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKENS = "tokenizer adds special tokens"
_NEW = 8
_TEXTS, _CHARACTERS = 16, 2000
_TIE = 0.02
"""Nats between two tokens that kernels may order either way."""


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Attributes:
    prompt: ids.
    steps: logits [V] of each token behind it, greedily chosen.
    """

    prompt: list[int]
    steps: list[Tensor]


def generate(session: OnnxSession, ids_S: Tensor) -> Generated:
    """Goes on with a row of tokens, one at a time."""
    logits, cache = session.step(ids_S[None], {})
    steps = [logits[0, -1]]
    while len(steps) < _NEW:
        logits, cache = session.step(steps[-1].argmax().reshape(1, 1), cache)
        steps.append(logits[0, -1])
    return Generated(prompt=ids_S.tolist(), steps=steps)


def check_genai(folder: Path, plan: OnnxPlan, expected: Generated, progress: Progress) -> dict[str, Any]:
    """What is to be said of it in the report; writes ``tokenizer.json`` where the folder has none.

    Raises:
        CheckpointError: it does not load the tokenizer or the model.
        NumericsError: it generates something else than the graph gives.
    """
    tokenizer = corpus.load_tokenizer(folder)
    if not (folder / TOKENIZER_FILE).is_file():
        _write_tokenizer(folder, tokenizer)
    adds = corpus.adds_special_tokens(tokenizer)
    differing, texts = _compare_tokens(folder, tokenizer, adds)
    tokens = f"the tokens of transformers on {texts} texts"
    if differing is not None:
        tokens = f"other tokens than transformers, first for {differing!r}"
        progress.say(f"warning: ONNX Runtime GenAI makes {tokens}; serve it with tokens that transformers makes")
    if plan.dtype == "bf16":
        return {SPECIAL_TOKENS: adds, "GenAI": f"{tokens}; not run, for want of bfloat16 on CPUs"}
    found = genai_greedy(folder, expected.prompt, _NEW)
    if not found:
        raise NumericsError(f"{folder}: ONNX Runtime GenAI generates nothing behind {len(expected.prompt)} tokens")
    for number, (token, logits_V) in enumerate(zip(found, expected.steps, strict=False)):
        best = int(logits_V.argmax())
        if token != best and not float(logits_V[best] - logits_V[token]) < _TIE:
            raise NumericsError(
                f"{folder}: ONNX Runtime GenAI generates other tokens than the graph gives: {token} and not {best} "
                f"after {number} of them; nothing was written"
            )
        if token != best:
            break
    return {SPECIAL_TOKENS: adds, "GenAI": f"{tokens}; generates the {len(found)} tokens that the graph gives"}


def _compare_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase, adds: bool) -> tuple[str | None, int]:
    """The beginning of the first text that gets other tokens, and how many were compared."""
    texts = [text[:_CHARACTERS] for text in corpus.load_documents("default-eval", tokenizer)[:_TEXTS]]
    for text, theirs in zip(texts, genai_tokens(folder, texts, adds), strict=True):
        if tokenizer(text).input_ids != theirs:
            return text[:40], len(texts)
    return None, len(texts)


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """GenAI reads no ``tokenizer.model``; transformers makes the other form of it."""
    with tempfile.TemporaryDirectory(prefix="qconv-onnx-") as made:
        tokenizer.save_pretrained(made)
        file = Path(made) / TOKENIZER_FILE
        if not file.is_file():
            raise CheckpointError(
                f"{folder}: ONNX Runtime GenAI reads tokenizers from {TOKENIZER_FILE} alone, and transformers makes "
                f"none of {type(tokenizer).__name__}; put one beside the base's weights"
            )
        shutil.copyfile(file, folder / TOKENIZER_FILE)
