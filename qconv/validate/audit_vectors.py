"""How far a norm's weight or a bias is from what it should be, value by value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qconv.on_the_way import to_host
from qconv.validate.audit_stored import Stored

PLUS_ONE_MODELS = ("gemma", "recurrent_gemma", "qwen3_next")


def compare_vectors(stored: Stored, expected_K: Tensor, plus_one: bool) -> Callable[[], dict[str, Any]]:
    """Begins to compare; what it returns gives fields of `TensorAudit` once a `mark` that is set now is reached.

    Args:
        stored: a vector as a matrix of one row.
        expected_K: float32.
        plus_one: what is compared is 1 + value.
    """
    found_K = stored.values(slice(None)).reshape(-1)
    expected_K = expected_K.reshape(-1)
    if plus_one:
        found_K, expected_K = found_K + 1, expected_K + 1
    # Zeros are compared with the size of the whole vector.
    size_K = torch.maximum(expected_K.abs(), expected_K.abs().mean() * 1e-3).clamp_min(1e-12)
    deviation_K = (found_K - expected_K).abs() / size_K
    deviation = deviation_K.max() if found_K.numel() else deviation_K.sum()
    copies = to_host([stored.is_finite(), deviation, expected_K / found_K])

    def finish() -> dict[str, Any]:
        if not copies[0]:
            return {"is_finite": False}
        return {"deviation": float(copies[1]), "ratio_K": copies[2]}

    return finish


def has_plus_one(config: Mapping[str, Any]) -> bool:
    """Norms that multiply by 1 + weight."""
    return str(config.get("model_type")).startswith(PLUS_ONE_MODELS)
