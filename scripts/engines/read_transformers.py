"""Scores rows and generates with transformers and what it loads an artifact with; runs in an engine's environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exchange import answer
from hugging_face import generate, score


def read(request: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(request["folder"])
    file = next((path.name for path in folder.glob("*.gguf")), None)
    dtype = torch.bfloat16 if file is None else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, device_map="cpu", dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model.eval()
    return {
        "logprobs": score(model, request["rows"]),
        **generate(model, tokenizer, request["prompt"], request["new_tokens"]),
    }


if __name__ == "__main__":
    answer(read, ["gptqmodel", "torch", "transformers", "optimum", "compressed-tensors", "bitsandbytes", "gguf"])
