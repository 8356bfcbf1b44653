"""What the audit knows of one tensor."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qconv.validate.audit_measure import Fit

FIT_NUMBERS = (
    "relative_error", "residual", "rounding", "mismatch", "scale", "scale_error", "cosine", "update", "base_distance",
    "coefficient", "coefficient_error", "nearest_coefficient", "is_folded",
)  # fmt: skip
_BLOCK = re.compile(r"^(.*?\.(\d+))\.")


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorAudit:
    """What was measured on one tensor.

    Attributes:
        name: of the candidate's tensor.
        expected_name: of the tensor it was compared with (another one for a head that is tied).
        shape: its shape.
        changed: whether the adapter changes it.
        dtype: of its values, or None where it is quantized.
        bits: of its integer or bitsandbytes codes, else None.
        file: the shard it lies in, or "".
        is_finite: False leaves all that follows at its default.
        fit: of a weight with two or more dimensions.
        on_blocks: a 16-bit weight whose blocks of 64 take at most 16 values, or a bitsandbytes one.
        encoded_share: see `share_after_encoding`, or None.
        resembles: another tensor that it matches better than its own, or None.
        deviation: of a vector, largest |candidate - expected| relative to the expected value.
        ratio_K: of a vector, expected / candidate, of what it multiplies by (1 + weight in Gemma's norms).
    """

    name: str
    expected_name: str
    shape: tuple[int, ...]
    changed: bool
    dtype: torch.dtype | None = None
    bits: int | None = None
    file: str = ""
    is_finite: bool = True
    fit: Fit | None = None
    on_blocks: bool = False
    encoded_share: float | None = None
    resembles: str | None = None
    deviation: float | None = None
    ratio_K: Tensor | None = None

    @property
    def block(self) -> str:
        """``model.layers.3``, or "" outside the blocks."""
        match = _BLOCK.match(self.name)
        return match[1] if match else ""

    @property
    def role(self) -> str:
        """The name within its block: ``mlp.up_proj.weight``."""
        return self.name[len(self.block) + 1 :] if self.block else self.name

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        fit = self.fit
        numbers: dict[str, Any] = {
            "name": self.name,
            "changed": self.changed,
            "file": self.file,
            "is_finite": self.is_finite,
            "deviation": self.deviation,
            "resembles": self.resembles,
        }
        if fit is not None:
            numbers |= {name: getattr(fit, name) for name in FIT_NUMBERS}
        return numbers
