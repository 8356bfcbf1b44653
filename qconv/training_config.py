"""What is trained, on what and how long: frozen, checked once when built. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qconv.errors import UsageError
from qconv.types import BnbKind


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to train, on what, and how long.

    Attributes:
        base: folder or hub id; bitsandbytes 4-bit, or 16-bit (then quantized as it is loaded).
        out: adapter folder; it must not exist, unless it may be overwritten.
        data: text: a file, a data set or an embedded text (see `corpus.load_documents`).
        steps: optimizer steps; text that is too short for them is read again in another order.
        batch_size: rows per forward pass.
        gradient_accumulation: forward passes per step.
        seq_len: tokens per row.
        rank: LoRA's r (Hu et al. 2021, section 4.1).
        alpha: LoRA's alpha; the update is scaled by alpha / r.
        dropout: before the update, a fraction.
        learning_rate: peak, after the warm-up.
        schedule: of the learning rate, after the warm-up.
        seed: of the adapter's start, the choice of text and its order.
        quantize: how a 16-bit base is loaded; None = ``"nf4-dq"``, or as the base is on disk.
        gradient_checkpointing: trade time for memory; None = on a GPU only (on CPU it costs 1.3 x).
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        overwrite: an existing adapter folder is replaced.
        revision: branch, tag or commit, when the base is a hub id.
    """

    base: str
    out: Path
    data: str = "default"
    steps: int = 200
    batch_size: int = 4
    gradient_accumulation: int = 1
    seq_len: int = 512
    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    learning_rate: float = 2e-4
    schedule: Literal["constant", "cosine"] = "constant"
    seed: int = 0
    quantize: BnbKind | None = None
    gradient_checkpointing: bool | None = None
    device: str = "auto"
    overwrite: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation", "rank", "alpha", "learning_rate"):
            if not getattr(self, name) > 0:
                raise UsageError(f"--{name.replace('_', '-')} must be positive, got {getattr(self, name)}")
        if self.seq_len < 8:
            raise UsageError(f"--seq-len must be at least 8, got {self.seq_len}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"--dropout is a fraction from 0 up to 1, got {self.dropout}")
        if self.schedule not in ("constant", "cosine"):
            raise UsageError(f"--schedule is constant or cosine, got {self.schedule}")
