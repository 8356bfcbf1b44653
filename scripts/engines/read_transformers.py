"""Scores rows and generates with transformers and the kernels of gptqmodel; runs in gptqmodel's environment."""

from __future__ import annotations

from typing import Any

from exchange import answer
from hugging_face import generate, score


def read(request: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(request["folder"], device_map="cpu", dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(request["folder"])
    model.eval()
    return {
        "logprobs": score(model, request["rows"]),
        "text": generate(model, tokenizer, request["prompt"], request["new_tokens"]),
    }


if __name__ == "__main__":
    answer(read, ["gptqmodel", "torch", "transformers", "optimum"])
