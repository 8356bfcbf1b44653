"""Has llama.cpp quantize a float32 file with and without an importance matrix; runs in llama-cpp-python's environment.

A request has ``file``, ``kind`` (of llama.cpp's file types), ``rows`` and ``imatrix`` (by tensor, the mean of the
square of each input). The answer has ``plain`` and ``weighed``: the mean KL divergence of each file from the first, in
nats per token.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exchange import answer


def read(request: dict[str, Any]) -> dict[str, Any]:
    from llama_cpp import Llama

    files = {"reference": request["file"]}
    with tempfile.TemporaryDirectory(prefix="qconv-engines-") as folder:
        for name, imatrix in (("plain", {}), ("weighed", request["imatrix"])):
            files[name] = str(Path(folder) / f"{name}.gguf")
            quantize(request["file"], files[name], request["kind"], imatrix)
        length = max(map(len, request["rows"]))
        models = {
            name: Llama(file, n_ctx=length, n_batch=length, logits_all=True, verbose=False)
            for name, file in files.items()
        }
        return {name: divergence(models["reference"], models[name], request["rows"]) for name in ("plain", "weighed")}


def quantize(source: str, out: str, kind: str, imatrix: Mapping[str, Sequence[float]]) -> None:
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    entries = (llama_cpp.llama_cpp.llama_model_imatrix_data * (len(imatrix) + 1))()  # one without a name ends them
    for entry, (name, means) in zip(entries, imatrix.items(), strict=False):
        entry.name, entry.size = name.encode(), len(means)
        entry.data = (ctypes.c_float * len(means))(*means)
    if imatrix:
        parameters.imatrix = entries
    status = llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(parameters))
    if status:
        raise RuntimeError(f"llama_model_quantize to {kind} returned {status}")


def divergence(reference: Any, model: Any, rows: Sequence[list[int]]) -> float:
    """Mean KL divergence over all positions, nats."""
    import numpy as np

    found = []
    for row in rows:
        p, q = (log_probabilities(each, row) for each in (reference, model))
        found.append((np.exp(p) * (p - q)).sum(axis=1))
    return float(np.concatenate(found).mean())


def log_probabilities(model: Any, row: list[int]) -> Any:
    import numpy as np

    model.reset()
    model.eval(row)
    logits = model.scores[: len(row)].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


if __name__ == "__main__":
    answer(read, ["llama_cpp_python", "numpy"])
