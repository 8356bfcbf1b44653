"""What is done to adapters by themselves, and several together: frozen, checked once when built. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from qconv.errors import UsageError
from qconv.targets import PLAIN_DTYPES

CombineMethod = Literal["linear", "cat", "svd", "sequential", "ties", "dare", "dare-ties", "magnitude-prune"]


LOW_RANK_METHODS = ("linear", "cat", "svd", "sequential")


SPARSE_METHODS = ("ties", "dare", "dare-ties", "magnitude-prune")


COMBINE_METHODS = (*LOW_RANK_METHODS, *SPARSE_METHODS)


@dataclass(frozen=True, kw_only=True)
class CombinationConfig:
    """Several adapters of one base, merged together.

    Attributes:
        adapters: folders or hub ids, at least two.
        method: how their updates are combined.
        weights: of the adapters, in their order; empty = 1 each.
        rank: of the result: of svd (null = the largest of the adapters), or to which ties, dare, dare-ties and
            magnitude-prune are truncated (null = not at all).
        factors: A and B are combined apart, as peft does with linear, ties, dare and magnitude_prune, and not the
            updates that they make.
        density: share of elements that ties, dare, dare-ties and magnitude-prune keep.
        majority_sign: what elects signs for ties and dare-ties: the sum of the updates, or of their signs;
            None = ``"total"``.
        seed: of what dare and dare-ties drop.
    """

    adapters: tuple[str, ...]
    method: CombineMethod
    weights: tuple[float, ...] = ()
    rank: int | None = None
    factors: bool = False
    density: float | None = None
    majority_sign: Literal["total", "frequency"] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.adapters) < 2:
            raise UsageError(f"--combine takes two adapters or more, got {len(self.adapters)}")
        if self.weights and len(self.weights) != len(self.adapters):
            raise UsageError(f"--weights has {len(self.weights)} numbers for {len(self.adapters)} adapters")
        if not all(math.isfinite(weight) for weight in self.weights) or (self.weights and not any(self.weights)):
            raise UsageError(f"--weights are finite numbers and not all 0, got {', '.join(map(str, self.weights))}")
        if self.weights and self.method == "sequential":
            raise UsageError("--weights is not for --combine sequential, which adds each adapter as it was trained")
        if self.rank is not None and (self.method not in ("svd", *SPARSE_METHODS) or self.rank < 1):
            raise UsageError(
                f"--combine-rank is for --combine svd, {', '.join(SPARSE_METHODS)} and at least 1, got {self.rank} for "
                f"{self.method}"
            )
        if self.factors and (self.method not in ("linear", *SPARSE_METHODS) or self.rank is not None):
            raise UsageError(
                "--combine-factors is for --combine linear, "
                f"{', '.join(SPARSE_METHODS)} without --combine-rank, got {self.method}"
                + (f" with rank {self.rank}" if self.rank is not None else "")
            )
        if (self.density is None) == (self.method in SPARSE_METHODS):
            what = "needs" if self.density is None else "does not take"
            raise UsageError(f"--combine {self.method} {what} --density, the share of elements that is kept")
        if self.density is not None and not 0 < self.density <= 1:
            raise UsageError(f"--density is a share above 0 and up to 1, got {self.density}")
        if self.majority_sign is not None and self.method not in ("ties", "dare-ties"):
            raise UsageError(f"--majority-sign is for --combine ties and dare-ties, not {self.method}")

    @property
    def is_low_rank(self) -> bool:
        """Whether the result is an adapter again, which can be left unmerged beside the base."""
        return self.method in LOW_RANK_METHODS or self.rank is not None or self.factors

    @property
    def resolved_weights(self) -> tuple[float, ...]:
        return self.weights or (1.0,) * len(self.adapters)

    @property
    def summary(self) -> str:
        """In words, for reports."""
        settings = [f"{weight:g} x {name}" for weight, name in zip(self.resolved_weights, self.adapters, strict=True)]
        settings += [f"rank {self.rank}"] if self.rank is not None else []
        settings += ["A and B apart"] if self.factors else []
        settings += [f"density {self.density:g}"] if self.density is not None else []
        settings += [f"signs by {self.majority_sign or 'total'}"] if self.method in ("ties", "dare-ties") else []
        settings += [f"seed {self.seed}"] if self.method in ("dare", "dare-ties") else []
        return f"{self.method}: {', '.join(settings)}"


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """How one adapter is read and merged, where its own config does not say it.

    Attributes:
        dampen_intruders: factor, 0 to 1, of singular vectors of a merged weight that are foreign to the base's; null =
            they stay as they are.
        rank: merge the first components alone (DyLoRA, QDyLoRA); auto = of 1, 2, 4 and so on the one with the lowest
            loss on the task's text; null = all.
        rank_scaling: of those: by alpha over the rank that is merged (truncated, as DyLoRA trains), or over the rank of
            training (trained).
        qa_lora: the adapter is QA-LoRA's, whose A takes inputs pooled in groups: their sum, their mean, or the mean
            times the number of groups (peft).
        ir_qlora: the adapter is IR-QLoRA's, with elastic connections; trained on a base that was quantized with
            information calibration (calibrated), or without (plain).
        kasa: the adapter is KaSA's, trained with the code of its repository, whose config does not say so.
    """

    dampen_intruders: float | None = None
    rank: int | Literal["auto"] | None = None
    rank_scaling: Literal["truncated", "trained"] | None = None
    qa_lora: Literal["sum", "mean", "peft"] | None = None
    ir_qlora: Literal["calibrated", "plain"] | None = None
    kasa: Literal["repository"] | None = None

    def __post_init__(self) -> None:
        if (self.rank is None) != (self.rank_scaling is None):
            raise UsageError(
                "--rank and --rank-scaling go together: truncated (alpha over the rank that is merged, as DyLoRA "
                "trains) or trained (alpha over the rank of training)"
            )
        if isinstance(self.rank, int) and self.rank < 1:
            raise UsageError(f"--rank is at least 1, or auto, got {self.rank}")
        if self.dampen_intruders is not None and not 0 <= self.dampen_intruders <= 1:
            raise UsageError(f"--dampen-intruders is a factor from 0 to 1, got {self.dampen_intruders}")

    @property
    def summary(self) -> str:
        """How an adapter is read, in words; empty when its own config says it all."""
        words = [f"the first {self.rank} components, scaled as {self.rank_scaling}"] if self.rank is not None else []
        words += [f"QA-LoRA, {self.qa_lora} of pooled inputs"] if self.qa_lora is not None else []
        words += [f"IR-QLoRA on a {self.ir_qlora} base"] if self.ir_qlora is not None else []
        words += [f"KaSA of its {self.kasa}"] if self.kasa is not None else []
        return "; ".join(words)

    @property
    def flags(self) -> list[str]:
        """As they are typed."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        given = [(f"--{name.replace('_', '-')}", str(value)) for name, value in values.items() if value is not None]
        return [word for pair in given for word in pair]

    def check_adapter(self, has_adapter: bool, combination: CombinationConfig | None) -> None:
        """Refuses options that have nothing to apply to.

        Raises:
            UsageError: names the options that are set.
        """
        given = ", ".join(self.flags[::2])
        if given and not has_adapter:
            raise UsageError(f"{given}: says how an adapter is merged, and there is no adapter")
        if given and combination is not None and not combination.is_low_rank:
            raise UsageError(
                f"{given}: not with --combine {combination.method}, whose update is no adapter's; merge first, or "
                f"combine by {', '.join(LOW_RANK_METHODS)}, or with --combine-rank"
            )
        if combination is not None and replace(self, dampen_intruders=None) != AdapterOptions():
            raise UsageError(f"{given}: says how one adapter is read, and --combine takes several")


@dataclass(frozen=True, kw_only=True)
class NormaliseConfig:
    """An adapter -> plain LoRA of one rank, as engines load it.

    Attributes:
        adapter: folder or hub id.
        out: adapter folder; it must not exist, unless it may be overwritten.
        base: the adapter's, folder or hub id; None = what the adapter itself says of it.
        dtype: of the factors.
        options: what its config does not say of it.
        overwrite: an existing adapter folder is replaced.
        revision: branch, tag or commit, when the adapter is a hub id.
    """

    adapter: str
    out: Path
    base: str | None = None
    dtype: str = "fp32"
    options: AdapterOptions = field(default_factory=AdapterOptions)
    overwrite: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in PLAIN_DTYPES:
            raise UsageError(f"--dtype takes {', '.join(PLAIN_DTYPES)}, got {self.dtype}")
        if self.options.rank == "auto":
            raise UsageError("--rank auto goes by a loss, which qconv merge measures; give the rank's number")
        if self.options.qa_lora is not None and self.base is None:
            raise UsageError("--qa-lora: only the base's shapes tell how many inputs are pooled; give it with --base")


@dataclass(frozen=True, kw_only=True)
class UnpickleConfig:
    """An adapter with pickled tensors -> the same as safetensors.

    Attributes:
        adapter: folder.
        out: adapter folder, or of LQ-LoRA one for base and adapter; it must not exist, unless it may be overwritten.
        overwrite: an existing adapter folder is replaced.
        base: of LQ-LoRA: the model that was decomposed, folder or hub id, for its config; None = as the adapter says.
        dtype: of LQ-LoRA: of the decoded base.
    """

    adapter: str
    out: Path
    overwrite: bool = False
    base: str | None = None
    dtype: str = "fp32"


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Two full checkpoints -> the LoRA between them.

    Attributes:
        base: folder or hub id.
        tuned: folder or hub id; of the base's architecture.
        out: adapter folder; it must not exist, unless it may be overwritten.
        rank: of every module; or
        energy: the share of each module's squared difference to keep.
        others: what becomes of tensors that differ and are no linears.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        overwrite: an existing adapter folder is replaced.
        revision: branch, tag or commit, when the base is a hub id.
    """

    base: str
    tuned: str
    out: Path
    rank: int | None = None
    energy: float | None = None
    others: Literal["refuse", "save", "drop"] = "refuse"
    device: str = "auto"
    overwrite: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise UsageError("give one of --rank (of every module) and --energy (share to keep, such as 0.95)")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"--rank must be at least 1, got {self.rank}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"--energy is a share above 0 and up to 1, got {self.energy}")
