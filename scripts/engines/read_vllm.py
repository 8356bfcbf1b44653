"""Scores rows and generates with vLLM's CPU build; runs in vLLM's environment (see `exchange`)."""

from __future__ import annotations

import os
from typing import Any

from exchange import answer

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_CPU_INT4_W4A8": "0",  # else 4-bit kernels on CPUs with AMX also round activations to 8 bits
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def read(request: dict[str, Any]) -> dict[str, Any]:
    os.environ.update(SETTINGS | request.get("settings", {}))
    import torch
    from vllm import LLM, SamplingParams

    # On CPUs without float8 instructions torch._scaled_mm with oneDNN does 0.02 GFLOP/s, hours for a few rows; without
    # it, the same products in float32.
    torch.backends.mkldnn.set_flags(request["onednn"])
    rows = request["rows"]
    engine = LLM(
        model=request["folder"],
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=max(map(len, rows)) + 8,
        max_num_seqs=8,
    )
    scored = engine.generate(
        [{"prompt_token_ids": row} for row in rows], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    )
    logprobs = [
        logprob[token].logprob
        for row, output in zip(rows, scored, strict=True)
        for token, logprob in list(zip(row, output.prompt_logprobs, strict=True))[1:]
    ]
    said = engine.generate([request["prompt"]], SamplingParams(temperature=0, max_tokens=request["new_tokens"]))
    made = said[0].outputs[0]
    eos = engine.get_tokenizer().eos_token_id
    return {"logprobs": logprobs, "text": made.text, "tokens": [token for token in made.token_ids if token != eos]}


if __name__ == "__main__":
    answer(read, ["vllm-cpu", "torch", "transformers", "compressed-tensors"])
