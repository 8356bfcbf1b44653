"""Our importance matrix in llama.cpp's own quantizer: what it makes of a float32 file must lie nearer to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = ("Q3_K_M", "Q4_K_M")
ARGUMENTS = (
    *("quantize", "tests/data/tiny-llama", "--to", "gguf-f32", "--imatrix"),
    *("--calibration", "default-prose", "--samples", "32", "--seq-len", "128"),
)
"""The tests' model: widths of SmolLM2 are no multiples of 256, which K-quants need."""


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """Mean KL divergence from the float32 file, nats per token.

    Attributes:
        plain: of llama.cpp's file without an importance matrix; None where it made none.
        weighed: of its file with ours.
        refusal: llama.cpp's own words, or None.
    """

    kind: str
    plain: float | None = None
    weighed: float | None = None
    refusal: str | None = None

    @property
    def failure(self) -> str | None:
        if self.plain is None or self.weighed is None:
            return f"refused: {self.refusal}"
        if not self.weighed < self.plain:
            return f"the importance matrix makes it worse: KL {self.weighed:.5f}, without it {self.plain:.5f}"
        return None


def means_of(imatrix: Path) -> dict[str, list[float]]:
    """By tensor, the mean of the square of each input, as llama.cpp's loader makes it of the file."""
    from gguf import GGUFReader

    stored = {tensor.name: tensor.data for tensor in GGUFReader(imatrix).tensors}
    sums = [name.removesuffix(".in_sum2") for name in stored if name.endswith(".in_sum2")]
    return {name: (stored[f"{name}.in_sum2"] / stored[f"{name}.counts"]).flatten().tolist() for name in sums}


def request_of(folder: Path, kind: str, rows: Sequence[list[int]]) -> dict[str, Any]:
    (file,) = folder.glob("*.gguf")
    return {"file": str(file), "kind": kind, "rows": rows, "imatrix": means_of(folder / "model.imatrix")}
