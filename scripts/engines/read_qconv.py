"""Scores rows and generates with qconv's own reading of an artifact: decoded weights in a plain transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cut import towards_zero
from exchange import answer
from hugging_face import generate, score


def read(request: dict[str, Any]) -> dict[str, Any]:
    from qconv.checkpoint import open_checkpoint
    from qconv.corpus import load_tokenizer
    from qconv.quantize import key_values
    from qconv.runners import Candidate, candidate_model

    if request.get("cuts"):
        key_values.fake_quantize_cached = towards_zero
    folder = Path(request["folder"])
    candidate = Candidate.of(open_checkpoint(folder))
    runner, _ = candidate_model(candidate, candidate.view, "cpu", False, "qconv")
    model, tokenizer = runner.whole(), load_tokenizer(folder)
    return {
        "logprobs": score(model, request["rows"]),
        **generate(model, tokenizer, request["prompt"], request["new_tokens"]),
        "ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in request.get("texts", [])],
    }


if __name__ == "__main__":
    answer(read, ["qconv", "torch", "transformers"])
