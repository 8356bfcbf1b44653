"""Scores rows and generates with llama.cpp, through llama-cpp-python; runs in its environment.

Settings are those of a caller who sets none: keys and values are kept in float16, on a CPU.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from exchange import answer


def read(request: dict[str, Any]) -> dict[str, Any]:
    from llama_cpp import Llama

    (file,) = Path(request["folder"]).glob("*.gguf")
    longest = max(len(row) for row in request["rows"])
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or None  # as many as everything else; None: its own choice
    model = Llama(
        str(file),
        n_ctx=longest + 1,
        n_batch=longest,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,
        verbose=False,
    )
    logprobs = [value for row in request["rows"] for value in score(model, row)]
    return {
        "logprobs": logprobs,
        **generate(model, request["prompt"], request["new_tokens"]),
        "ids": [model.tokenize(text.encode(), add_bos=False) for text in request.get("texts", [])],
    }


def score(model: Any, row: list[int]) -> list[float]:
    """Log-probability of each token after the first."""
    import numpy as np

    model.reset()
    model.eval(row)
    logits = model.scores[: len(row) - 1].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    chosen: list[float] = logp[np.arange(len(row) - 1), row[1:]].tolist()
    return chosen


def generate(model: Any, prompt: str, new_tokens: int) -> dict[str, Any]:
    """Greedy, from tokens that llama.cpp makes of the prompt with the tokenizer inside the file."""
    import numpy as np

    tokens = model.tokenize(prompt.encode(), add_bos=True, special=True)
    model.reset()
    model.eval(tokens)
    made: list[int] = []
    while len(made) < new_tokens:
        token = int(np.argmax(model.scores[model.n_tokens - 1]))
        if token == model.token_eos():
            break
        made.append(token)
        model.eval([token])
    text: bytes = model.detokenize(made, prev_tokens=tokens)
    return {"text": text.decode(errors="replace"), "tokens": made}


if __name__ == "__main__":
    answer(read, ["llama_cpp_python", "numpy"])
