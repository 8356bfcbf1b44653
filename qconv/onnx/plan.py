"""What an ONNX folder will be, decided before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qconv.onnx.builder import check_family
from qconv.onnx.package import check_packages

_TOLERANCES: Mapping[str, float] = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 1e-3}
_ROUNDED_INPUTS = 0.02


@dataclass(frozen=True, kw_only=True)
class OnnxPlan:
    """What is built.

    Attributes:
        dtype: of inputs, outputs and what is not quantized: ``"fp32"``, ``"fp16"`` or ``"bf16"``.
        bits: of the codes of linears; None = there are none.
    """

    dtype: str
    bits: int | None

    @property
    def tolerance(self) -> float:
        """Largest mean KL divergence (nats per token) between PyTorch and ONNX Runtime on the same weights.

        A bfloat16 graph is run in float32 on CPUs (see `session`), with its rotary angles as they are stored. In
        float32 graphs, which are for CPUs, ONNX Runtime rounds the inputs of linears with codes to 8 bits.
        """
        return _ROUNDED_INPUTS if self.bits is not None and self.dtype == "fp32" else _TOLERANCES[self.dtype]


def without_window(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a graph that attends to everything: a sliding window becomes the length of the context.

    The builder leaves mistral's window out of the graph, which would then compute something else beyond it.
    """
    window = config.get("sliding_window")
    if window is None or not config.get("use_sliding_window", True):
        return dict(config)
    changed = {**config, "sliding_window": None}
    changed["max_position_embeddings"] = min(int(config["max_position_embeddings"]), int(window))
    if "use_sliding_window" in config:
        changed["use_sliding_window"] = False
    if config.get("layer_types"):
        changed["layer_types"] = ["full_attention"] * len(config["layer_types"])
    return changed


def plan_onnx(config: Mapping[str, Any], location: str, dtype: str, bits: int | None) -> OnnxPlan:
    """Plans a folder.

    Raises:
        CheckpointError: a family that is not written.
        UsageError: packages are missing.
    """
    check_family(config, location)
    check_packages()
    return OnnxPlan(dtype=dtype, bits=bits)
