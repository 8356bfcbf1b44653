"""Scores rows with ONNX Runtime, fed tokens and an empty cache, and generates with ONNX Runtime GenAI, on a CPU.

Nothing of qconv's own ONNX code is in between: inputs are those that the graph declares and genai_config.json sizes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from exchange import answer

TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16"}


def read(request: dict[str, Any]) -> dict[str, Any]:
    folder = Path(request["folder"])
    return {
        "logprobs": score(folder, request["rows"]),
        **generate(folder, request["prompt"], request["new_tokens"]),
    }


def score(folder: Path, rows: list[list[int]]) -> list[float]:
    """Log-probability of each token after the first, row by row."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", 0))  # 0: its own choice
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    no_past = (1, decoder["num_key_value_heads"], 0, decoder["head_size"])
    logprobs: list[float] = []
    for row in rows:
        ids = np.array([row], dtype=np.int64)
        known = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(len(row))[None]}
        feed = {
            entry.name: known[entry.name] if entry.name in known else np.zeros(no_past, dtype=TYPES[entry.type])
            for entry in session.get_inputs()
        }
        logits = session.run(["logits"], feed)[0][0, :-1].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        logprobs += logp[np.arange(len(row) - 1), row[1:]].tolist()
    return logprobs


def generate(folder: Path, prompt: str, new_tokens: int) -> dict[str, Any]:
    """Greedy, with the tokenizer of the folder and keys and values in GenAI's cache."""
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    tokenizer = genai.Tokenizer(model)
    tokens = tokenizer.encode(prompt)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(tokens) + new_tokens)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(tokens)
    while not generator.is_done():
        generator.generate_next_token()
    ends = set(tokenizer.eos_token_ids)
    made = [int(token) for token in generator.get_sequence(0)[len(tokens) :] if int(token) not in ends]
    return {"text": tokenizer.decode(made), "tokens": made}


if __name__ == "__main__":
    answer(read, ["onnxruntime", "onnxruntime-genai", "numpy"])
