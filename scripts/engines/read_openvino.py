"""Scores rows and generates with OpenVINO, which reads ONNX files by itself, on a CPU; runs in its environment.

In float32: by default OpenVINO computes in bfloat16 on CPUs with AMX, and rounds inputs of 4-bit and 8-bit weights.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from exchange import answer

SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def read(request: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    import openvino
    from tokenizers import Tokenizer

    folder = Path(request["folder"])
    threads = os.environ.get("OMP_NUM_THREADS")
    settings = SETTINGS | ({} if threads is None else {"INFERENCE_NUM_THREADS": threads})
    model = openvino.Core().compile_model(str(folder / "model.onnx"), "CPU", settings)
    config = json.loads((folder / "genai_config.json").read_text())["model"]
    no_past = (1, config["decoder"]["num_key_value_heads"], 0, config["decoder"]["head_size"])
    logprobs: list[float] = []
    for row in request["rows"]:
        logp = predict(model, row, no_past)[:-1]
        logprobs += [float(logp[place, token]) for place, token in enumerate(row[1:])]

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompt, made = tokenizer.encode(request["prompt"]).ids, []
    while len(made) < request["new_tokens"]:
        token = int(predict(model, prompt + made, no_past)[-1].argmax())
        if token in np.atleast_1d(config["eos_token_id"]):
            break
        made.append(token)
    return {"logprobs": logprobs, "text": tokenizer.decode(made), "tokens": made}


def predict(model: Any, row: list[int], no_past: tuple[int, ...]) -> Any:
    """Log-probabilities ``[S, V]`` behind each token of a whole row, without keys and values of an earlier call."""
    import numpy as np

    ids = np.array([row], dtype=np.int64)
    known = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(len(row))[None]}
    feed = {
        name: known[name] if name in known else np.zeros(no_past, dtype=entry.get_element_type().to_dtype())
        for entry in model.inputs
        for name in [entry.get_any_name()]
    }
    logits = model(feed)["logits"][0].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


if __name__ == "__main__":
    answer(read, ["openvino", "tokenizers", "numpy"])
