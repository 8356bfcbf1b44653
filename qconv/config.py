"""What can be asked of qconv: frozen, keyword-only, checked once when built. Imports no torch."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from qconv.errors import SchemeError, UsageError
from qconv.gate_rules import Policy, Rule, combine
from qconv.overrides import OverrideConfig, check_pattern
from qconv.targets import TARGETS, Algorithm
from qconv.types import BnbKind, Scheme

GROUP_SIZES = (128, 64, 32)
BNB_KINDS: tuple[BnbKind, ...] = ("nf4", "nf4-dq", "fp4", "fp4-dq", "16bit")
Folding = Literal["awq", "smoothquant"]
Statistic = Literal["gram", "mean_abs", "sample"]
PLAIN_DTYPES = ("bf16", "fp16", "fp32")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How to re-quantize.

    Attributes:
        target: the format to write (`TARGETS`).
        algorithm: how codes are chosen; None = the target's first.
        bits: of a weight; None = the target's first.
        group_size: input features that share a scale, -1 = the whole row; None = the largest of 128, 64, 32 that
            divides every quantized K.
        symmetric: without zero points; None = the target's default.
        desc_act: GPTQ's activation-ordered groups with a stored group index (``desc_act: true``).
            Columns are always visited in activation order; this also regroups them.
        damping: GPTQ damping as a fraction of the mean Gram diagonal.
        activations: how the engine finds the scales of inputs that it rounds to float8: for each token as it comes, or
            once for all, by calibration; for ``fp8``, where None = dynamic.
        ignore: linears that stay unquantized: patterns of module names, as in ``overrides``.
        lm_head: quantize the output head too, by round-to-nearest on a searched grid.
        overrides: other settings for some linears; the first that matches one counts.
    """

    target: str
    algorithm: Algorithm | None = None
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    desc_act: bool = False
    damping: float = 0.03
    activations: Literal["dynamic", "static"] | None = None
    ignore: tuple[str, ...] = ()
    lm_head: bool = False
    overrides: tuple[OverrideConfig, ...] = ()

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UsageError(f"unknown target {self.target!r}; there are {', '.join(TARGETS)}")
        target = TARGETS[self.target]
        if self.algorithm is not None and self.algorithm not in target.algorithms:
            raise UsageError(f"{self.target} takes --algorithm {' or '.join(target.algorithms)}, got {self.algorithm}")
        if self.bits is not None and self.bits not in target.bits:
            raise UsageError(
                f"{self.target} has --bits {' or '.join(map(str, sorted(target.bits)))}, got {self.bits}"
                f"{self._same_layout_with_these_bits()}"
            )
        if target.symmetric is None and (self.group_size is not None or self.symmetric is not None or self.desc_act):
            raise UsageError(f"{self.target} has one scheme: no --group-size, --sym/--asym or --desc-act")
        if self.desc_act and not (target.format in ("gptq", "gptq_v2") and self.solves):
            raise UsageError(
                "--desc-act belongs to --requant gptq or gptq_v2 with the gptq or awq+gptq algorithm (a stored group "
                "index)"
            )
        if self.group_size is not None and self.group_size != -1 and self.group_size < 8:
            raise SchemeError(f"--group-size must be at least 8, or -1 for one group per row, got {self.group_size}")
        if self.activations is not None and self.target != "fp8":
            raise UsageError(f"--activations belongs to --requant fp8, got {self.target}")
        if not 0 < self.damping < 1:
            raise UsageError(f"--damping is a fraction between 0 and 1, got {self.damping}")
        for pattern in self.ignore:
            check_pattern(pattern)
        self._check_mixture()

    def _check_mixture(self) -> None:
        target = TARGETS[self.target]
        mixed = [other.name for other in TARGETS.values() if other.mixed_bits]
        if self.overrides and not target.mixed_bits:
            raise UsageError(
                f"--override: {self.target} has one scheme for all linears, and its config.json no place for others; "
                f"{', '.join(mixed[:-1])} and {mixed[-1]} have"
                + ("; --requant w4a16 --algorithm awq chooses numbers as awq does" if self.target == "awq" else "")
            )
        if self.lm_head and not target.mixed_bits:
            raise UsageError(
                f"--lm-head: readers of {self.target} expect the output head in 16 bits; "
                f"{', '.join(mixed[:-1])} and {mixed[-1]} hold it"
            )
        for override in self.overrides:
            if override.bits is not None and override.bits not in target.mixed_bits:
                raise UsageError(
                    f"--override {override.pattern!r}: {self.target} has bits "
                    f"{' or '.join(map(str, target.mixed_bits))}, got {override.bits}"
                )

    def _same_layout_with_these_bits(self) -> str:
        names = [t.name for t in TARGETS.values() if t.format == TARGETS[self.target].format and self.bits in t.bits]
        return f"; {' or '.join(names)} holds {self.bits} bits" if names else ""

    @property
    def resolved_algorithm(self) -> Algorithm:
        return self.algorithm or TARGETS[self.target].algorithms[0]

    @property
    def folding(self) -> Folding | None:
        """What finds the channel scales that move into the operation before, if anything does."""
        match self.resolved_algorithm:
            case "awq" | "awq+gptq":
                return "awq"
            case "smoothquant" | "smoothquant+gptq":
                return "smoothquant"
        return None

    @property
    def solves(self) -> bool:
        """Codes are chosen by GPTQ."""
        return self.resolved_algorithm in ("gptq", "awq+gptq", "smoothquant+gptq")

    @property
    def statistics(self) -> frozenset[Statistic]:
        """What has to be gathered of the inputs of linears."""
        wanted: set[Statistic] = {"gram"} if self.solves else set()
        if self.folding == "awq":
            wanted |= {"gram", "mean_abs"}
        elif self.folding == "smoothquant":
            wanted |= {"sample"}
        if self.activations == "static":
            wanted |= {"sample"}
        return frozenset(wanted)

    @property
    def needs_calibration(self) -> bool:
        return bool(self.statistics)

    def scheme_for(self, in_features: Collection[int], location: str) -> Scheme:
        """The scheme for linears with these K.

        Raises:
            SchemeError: the group size does not divide every K; names the sizes that would.
        """
        target = TARGETS[self.target]
        if target.scheme is not None:
            scheme = replace(target.scheme, activation_order=self.solves)
            if self.activations == "static":
                scheme = replace(scheme, dynamic_activations=False, static_activations=True)
            return scheme
        widths = sorted(set(in_features))
        fitting = [g for g in GROUP_SIZES if all(k % g == 0 for k in widths)]
        size = self.group_size
        if size is None:
            size = fitting[0] if fitting else None
        if size is None or (size != -1 and any(k % size for k in widths)):
            wanted = "no group size of 128, 64, 32" if size is None else f"group size {size} does not divide"
            odd = next(k for k in widths if k % (size or GROUP_SIZES[-1]))
            raise SchemeError(
                f"{location}: {wanted}{' divides' if size is None else ''} the {odd} input features of a linear; "
                f"sizes that would: {', '.join(map(str, [*fitting, -1]))} (-1 = one group per row)"
            )
        symmetric = target.symmetric if self.symmetric is None else self.symmetric
        return Scheme(
            kind="int",
            bits=self.bits or target.bits[0],
            group_size=size,
            symmetric=bool(symmetric),
            activation_order=self.solves,
            min_zero=self.min_zero(bool(symmetric)),
        )

    def min_zero(self, symmetric: bool) -> Literal[0, 1]:
        """The smallest zero point, see `Scheme`."""
        return 1 if TARGETS[self.target].format == "gptq" and not symmetric else 0


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """Text that statistics are gathered on.

    Attributes:
        sources: files, data sets or embedded texts, each with ``:weight`` behind it or not
            (see `mixture.load_mixture`).
        samples: rows of text.
        seq_len: tokens per row.
        seed: of the choice of text.
    """

    sources: tuple[str, ...] = ("default",)
    samples: int = 128
    seq_len: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.seq_len < 8:
            raise UsageError(
                f"calibration needs --samples >= 1 and --seq-len >= 8, got {self.samples} and {self.seq_len}"
            )


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """What is compared and what must hold.

    Attributes:
        source: held-out text: a file, a data set or an embedded text (see `corpus.load_documents`).
        tokens: evaluated tokens (rounded down to whole rows).
        seq_len: tokens per row.
        seed: of the choice of text.
        rules: gates from the command line; replace those of the policy, which replace the defaults.
        policy: gates and waivers from a file.
        defaults: False = no default gates.
        control_tokens: tokens for the controls (merge alone, base alone, noise floor); None = one in ten, or
            all when a gate is about them.
        attribution: measure which block and linear costs what: always, never, or when a gate does not pass.
        engine: what runs the candidate: qconv's own decoding, or transformers with its quantized kernels.
        prompts: whose greedy answers are compared: ``"default"`` or a file; None = none.
        new_tokens: length of those answers.
        tasks: of lm-evaluation-harness, names or YAML files.
        task_folder: where local tasks are defined.
        task_limit: samples per task; None = all.
    """

    source: str = "default-eval"
    tokens: int = 16384
    seq_len: int = 512
    seed: int = 0
    rules: tuple[Rule, ...] = ()
    policy: Policy = field(default_factory=Policy)
    defaults: bool = True
    control_tokens: int | None = None
    attribution: Literal["auto", "always", "never"] = "auto"
    engine: Literal["qconv", "transformers"] = "qconv"
    prompts: str | None = None
    new_tokens: int = 64
    tasks: tuple[str, ...] = ()
    task_folder: Path | None = None
    task_limit: int | None = None

    def __post_init__(self) -> None:
        if self.seq_len < 8 or self.tokens < self.seq_len:
            raise UsageError(
                f"validation needs --eval-tokens >= --eval-seq-len >= 8, got {self.tokens}, {self.seq_len}"
            )
        if self.control_tokens is not None and self.control_tokens < self.seq_len:
            raise UsageError(f"--control-tokens needs at least one row of {self.seq_len}, got {self.control_tokens}")
        if self.new_tokens < 1 or (self.task_limit is not None and self.task_limit < 1):
            raise UsageError(f"--new-tokens and --task-limit are at least 1, got {self.new_tokens}, {self.task_limit}")
        if self.task_folder is not None and not self.tasks:
            raise UsageError("--task-folder says where --tasks are defined, and no task is asked for")
        combine((), self.policy.rules, self.rules)  # refuses two gates on one metric

    @property
    def rows(self) -> int:
        return self.tokens // self.seq_len


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """One folder to write.

    Attributes:
        out: the folder; it must not exist, unless it may be overwritten.
        quantization: None = write a plain checkpoint.
        dtype: storage dtype of unquantized tensors; None = the base's.
        max_shard_bytes: largest file of weights.
    """

    out: Path
    quantization: QuantizationConfig | None = None
    dtype: str | None = None
    max_shard_bytes: int = 5_000_000_000

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in PLAIN_DTYPES:
            raise UsageError(f"--dtype takes {', '.join(PLAIN_DTYPES)}, got {self.dtype}")
        if self.max_shard_bytes < 1_000_000:
            raise UsageError(f"--max-shard-size must be at least 1MB, got {self.max_shard_bytes} bytes")


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
        rank: of svd; None = the largest of the adapters.
        density: share of elements that ties, dare, dare-ties and magnitude-prune keep.
        majority_sign: what elects signs for ties and dare-ties: the sum of the updates, or of their signs;
            None = ``"total"``.
        seed: of what dare and dare-ties drop.
    """

    adapters: tuple[str, ...]
    method: CombineMethod
    weights: tuple[float, ...] = ()
    rank: int | None = None
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
        if self.rank is not None and (self.method != "svd" or self.rank < 1):
            raise UsageError(f"--combine-rank is for --combine svd and at least 1, got {self.rank} for {self.method}")
        if (self.density is None) == (self.method in SPARSE_METHODS):
            what = "needs" if self.density is None else "does not take"
            raise UsageError(f"--combine {self.method} {what} --density, the share of elements that is kept")
        if self.density is not None and not 0 < self.density <= 1:
            raise UsageError(f"--density is a share above 0 and up to 1, got {self.density}")
        if self.majority_sign is not None and self.method not in ("ties", "dare-ties"):
            raise UsageError(f"--majority-sign is for --combine ties and dare-ties, not {self.method}")

    @property
    def resolved_weights(self) -> tuple[float, ...]:
        return self.weights or (1.0,) * len(self.adapters)

    @property
    def summary(self) -> str:
        """In words, for reports."""
        settings = [f"{weight:g} x {name}" for weight, name in zip(self.resolved_weights, self.adapters, strict=True)]
        settings += [f"rank {self.rank}"] if self.rank is not None else []
        settings += [f"density {self.density:g}"] if self.density is not None else []
        settings += [f"signs by {self.majority_sign or 'total'}"] if self.method in ("ties", "dare-ties") else []
        settings += [f"seed {self.seed}"] if self.method in ("dare", "dare-ties") else []
        return f"{self.method}: {', '.join(settings)}"


@dataclass(frozen=True, kw_only=True)
class MergeJob:
    """Base + adapter (or none) -> folders, plain or re-quantized, each validated unless told not to be.

    Attributes:
        base: folder or hub id.
        outputs: what to write, at least one; no two in the same folder or in one another.
        adapter: folder or hub id of a PEFT adapter, or None to only quantize or convert.
        combination: several adapters in its place.
        trained_on: how training saw a 16-bit base; None = as the adapter's record says.
        validation: None = do not validate.
        report_dir: a second place for the reports, of several outputs a folder each (see `report_folder`);
            None = only the output folders.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        gpu_memory_limit: bytes of GPU memory that quantizing may take; None = what is free.
        overwrite: existing model folders are replaced, once the new ones are complete.
        revision: branch, tag or commit, when the base is a hub id.
        calibration: text that statistics are gathered on.
    """

    base: str
    outputs: tuple[OutputConfig, ...]
    adapter: str | None = None
    combination: CombinationConfig | None = None
    trained_on: BnbKind | None = None
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    validation: ValidationConfig | None = field(default_factory=ValidationConfig)
    device: str = "auto"
    gpu_memory_limit: int | None = None
    overwrite: bool = False
    revision: str | None = None
    report_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.trained_on is not None and self.trained_on not in BNB_KINDS:
            raise UsageError(f"--trained-on takes {', '.join(BNB_KINDS)}, got {self.trained_on}")
        if self.adapter is not None and self.combination is not None:
            raise UsageError("a job has one adapter or a combination of several, got both")
        if not self.outputs:
            raise UsageError("a job has at least one output, got none")
        folders = [Path(os.path.abspath(output.out)) for output in self.outputs]
        for one, other in itertools.permutations(folders, 2):
            if one == other or other in one.parents:
                what = (
                    "is the folder of two outputs" if one == other else f"lies in {other}, the folder of another output"
                )
                raise UsageError(f"{one}: {what}; give each a folder of its own")
        names = [folder.name for folder in folders]
        if self.report_dir is not None and len(set(names)) < len(names):
            raise UsageError(
                f"--report {self.report_dir}: two outputs are called {max(names, key=names.count)}, and their reports "
                "would be one folder; call them differently"
            )

    @property
    def adapters(self) -> tuple[str, ...]:
        """All of them, in their order."""
        if self.combination is not None:
            return self.combination.adapters
        return () if self.adapter is None else (self.adapter,)

    def report_folder(self, output: OutputConfig) -> Path | None:
        """The second place for the reports of an output: with several outputs, a folder of its name."""
        if self.report_dir is None or len(self.outputs) == 1:
            return self.report_dir
        return self.report_dir / Path(os.path.abspath(output.out)).name


@dataclass(frozen=True, kw_only=True)
class ValidateJob:
    """Compares a candidate with base + unmerged adapter, or with what a cache holds of them.

    Attributes:
        reference: the base, folder or hub id; None = only what the cache holds.
        candidate: the folder to judge; None = only write the cache.
        adapter: of the reference, unmerged.
        candidate_adapter: the candidate is served with this one, unmerged.
        reference_cache: read when it exists, written when it does not.
        report_dir: where the reports go; None = the terminal alone.
    """

    reference: str | None
    candidate: str | None
    adapter: str | None = None
    candidate_adapter: str | None = None
    trained_on: BnbKind | None = None
    reference_cache: Path | None = None
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    device: str = "auto"
    report_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.reference is None and self.reference_cache is None:
            raise UsageError("--reference is missing: give the base that the adapter was trained on, or a cache of it")
        if self.candidate is None and self.reference_cache is None:
            raise UsageError("--candidate is missing: give the folder to judge")
        if self.candidate is None and self.reference is None:
            raise UsageError("--reference-cache alone: give --candidate to judge it, or --reference to write the cache")
        if self.reference is None and self.adapter is not None:
            raise UsageError("--adapter belongs to --reference; a cache has the adapter in it already")
        if self.reference is None and self.trained_on is not None:
            raise UsageError("--trained-on belongs to --reference; a cache has the adapter in it already")
        asked = self.validation
        if self.reference is None and asked.tasks:
            raise UsageError("--tasks are answered by both models: give --reference too, a cache cannot answer")
        needing = {
            "--candidate-adapter": self.candidate_adapter,
            "--engine transformers": asked.engine == "transformers",
            "gates": (*asked.policy.rules, *asked.rules),
            "--prompts": asked.prompts,
            "--tasks": asked.tasks,
            "--attribution always": asked.attribution == "always",
        }
        if self.candidate is None and any(needing.values()):
            given = ", ".join(name for name, value in needing.items() if value)
            raise UsageError(f"{given}: there is nothing to judge without --candidate; drop that, or add --candidate")


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


@dataclass(frozen=True, kw_only=True)
class NormaliseConfig:
    """An adapter -> plain LoRA of one rank, as engines load it.

    Attributes:
        adapter: folder or hub id.
        out: adapter folder; it must not exist, unless it may be overwritten.
        base: the adapter's, folder or hub id; None = what the adapter itself says of it.
        dtype: of the factors.
        overwrite: an existing adapter folder is replaced.
        revision: branch, tag or commit, when the adapter is a hub id.
    """

    adapter: str
    out: Path
    base: str | None = None
    dtype: str = "fp32"
    overwrite: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in PLAIN_DTYPES:
            raise UsageError(f"--dtype takes {', '.join(PLAIN_DTYPES)}, got {self.dtype}")


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


_SIZE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_size(text: str) -> int:
    """``"5GB"``, ``"500MiB"`` or ``"20m"`` in bytes.

    Raises:
        UsageError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?\s*", text.lower())
    if not match or match[2] not in _SIZE_UNITS:
        raise UsageError(f"expected a size such as 5GB or 500MiB, got {text!r}")
    return int(float(match[1]) * _SIZE_UNITS[match[2]])
