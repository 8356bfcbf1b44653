"""``python run_llama_cpp.py REQUEST.json ANSWER.json``, in llama-cpp-python's environment.

Quantizes a float32 file by llama.cpp's own rule, then runs that file and others on the same rows and compares their
logits with those of the float32 file.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float64]


def quantize(source: str, out: str, kind: str) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    status = llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params))
    if status:
        raise RuntimeError(f"llama_model_quantize to {kind} returned {status}")


def opened(file: str, length: int) -> llama_cpp.Llama:
    return llama_cpp.Llama(file, n_ctx=length, n_batch=length, logits_all=True, verbose=False)


def log_probabilities(model: llama_cpp.Llama, row: list[int]) -> Logits:
    model.reset()
    model.eval(row)
    logits: Logits = model.scores[: len(row) - 1].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits


class Pair:
    """What is gathered of one file beside the reference, row by row."""

    def __init__(self, file: str, length: int):
        self.file, self.model = file, opened(file, length)
        self.kl: list[Logits] = []
        self.same: list[Logits] = []
        self.chosen: list[Logits] = []

    def add(self, p: Logits, row: list[int]) -> None:
        q = log_probabilities(self.model, row)
        self.kl.append((np.exp(p) * (p - q)).sum(axis=1))
        self.same.append(p.argmax(axis=1) == q.argmax(axis=1))
        self.chosen.append(q[np.arange(len(row) - 1), row[1:]])

    def summary(self) -> dict[str, float]:
        """The interval is that of 95% over rows, which are independent where tokens are not."""
        divergences = np.concatenate(self.kl)
        means = np.array([row.mean() for row in self.kl])
        return {
            "megabytes": Path(self.file).stat().st_size / 1e6,
            "kl": float(divergences.mean()),
            "interval": float(1.96 * means.std(ddof=1) / len(means) ** 0.5),
            "p99": float(np.quantile(divergences, 0.99)),
            "top1": float(np.concatenate(self.same).mean()),
            "perplexity": float(np.exp(-np.concatenate(self.chosen).mean())),
        }


def main(asked: str, answered: str) -> None:
    request: dict[str, Any] = json.loads(Path(asked).read_text())
    for out, kind in request["quantize"].items():
        quantize(request["reference"], out, kind)
    rows = request["rows"]
    reference = opened(request["reference"], len(rows[0]))
    pairs = {label: Pair(file, len(rows[0])) for label, file in request["files"].items()}
    for row in rows:
        p = log_probabilities(reference, row)
        for pair in pairs.values():
            pair.add(p, row)
    Path(answered).write_text(json.dumps({label: pair.summary() for label, pair in pairs.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
