"""What the readers that run a transformers model share."""

from __future__ import annotations

from typing import Any


def score(model: Any, rows: list[list[int]]) -> list[float]:
    """Log-probability of each token after the first, row by row."""
    import torch

    logprobs: list[float] = []
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row])
            logp = model(ids).logits[0, :-1].float().log_softmax(-1)
            logprobs += logp.gather(1, ids[0, 1:, None]).flatten().tolist()
    return logprobs


def generate(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> dict[str, Any]:
    """Greedy, without what a ``generation_config.json`` may add: text, tokens and how clear each of them was."""
    import torch
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        made = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    tokens = made.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    best_TV = torch.cat(made.logits).float().topk(2).values
    return {
        "text": tokenizer.decode(tokens, skip_special_tokens=True),
        "tokens": [token for token in tokens if token != tokenizer.eos_token_id],
        "gaps": (best_TV[:, 0] - best_TV[:, 1]).tolist(),
    }
