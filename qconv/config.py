"""What can be asked of qconv: frozen, keyword-only, checked once when built. Imports no torch."""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qconv.adapter_configs import AdapterOptions, CombinationConfig
from qconv.errors import UsageError
from qconv.gate_rules import Policy, Rule, combine
from qconv.quantization_config import QuantizationConfig
from qconv.targets import PLAIN_DTYPES, TARGETS
from qconv.types import BnbKind

BNB_KINDS: tuple[BnbKind, ...] = ("nf4", "nf4-dq", "fp4", "fp4-dq", "16bit")
MAX_SHARD_BYTES = 5_000_000_000
NEW_TOKENS = 64
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


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
        engine: what runs the candidate: qconv's own decoding, transformers with its quantized kernels, or ONNX Runtime;
            None = ONNX Runtime where the candidate is its folder, else qconv's own.
        prompts: whose greedy answers are compared: ``"default"`` or a file; None = none.
        new_tokens: length of those answers.
        tasks: of lm-evaluation-harness, names or YAML files.
        task_folder: where local tasks are defined.
        task_limit: samples per task; None = all.
        task_data: held-out text of the adapter's task, as ``source``: loss is measured on both; None = not measured.
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
    engine: Literal["qconv", "transformers", "onnxruntime"] | None = None
    prompts: str | None = None
    new_tokens: int = NEW_TOKENS
    tasks: tuple[str, ...] = ()
    task_folder: Path | None = None
    task_limit: int | None = None
    task_data: str | None = None

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
        if self.task_limit is not None and not self.tasks:
            raise UsageError("--task-limit is of the samples of --tasks, and no task is asked for")
        if self.new_tokens != NEW_TOKENS and self.prompts is None:
            raise UsageError("--new-tokens is of answers to --prompts, and none is asked for")
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
        dtype: storage dtype of unquantized tensors; None = the base's, and float32 of ONNX.
        max_shard_bytes: largest file of weights.
        not_taken: options that were given for several outputs and are not for this one, each with the reason; for the
            report.
    """

    out: Path
    quantization: QuantizationConfig | None = None
    dtype: str | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES
    not_taken: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in PLAIN_DTYPES:
            raise UsageError(f"--dtype takes {', '.join(PLAIN_DTYPES)}, got {self.dtype}")
        target = None if self.quantization is None else TARGETS[self.quantization.target]
        if target is not None and target.gguf_kind is not None:
            if self.max_shard_bytes != MAX_SHARD_BYTES:
                raise UsageError(f"--max-shard-size: {target.name} is one file, however large; drop it")
            if self.dtype is not None and target.gguf_kind in ("f16", "bf16", "f32"):
                raise UsageError(f"--dtype: {target.name} says the dtype itself; drop it, or choose another target")
        if target is not None and target.is_onnx and self.max_shard_bytes != MAX_SHARD_BYTES:
            raise UsageError(f"--max-shard-size: {target.name} has its weights in one file, however large; drop it")
        if self.max_shard_bytes < 1_000_000:
            raise UsageError(f"--max-shard-size must be at least 1MB, got {self.max_shard_bytes} bytes")

    @property
    def is_calibrated(self) -> bool:
        return self.quantization is not None and self.quantization.needs_text

    @property
    def is_quantized(self) -> bool:
        """Whether it gets codes, or is only another file format."""
        return self.quantization is not None and self.quantization.resolved_algorithm != "plain"

    @property
    def is_onnx(self) -> bool:
        """Whether it becomes a folder of ONNX Runtime GenAI."""
        return self.quantization is not None and TARGETS[self.quantization.target].is_onnx


@dataclass(frozen=True, kw_only=True)
class MergeJob:
    """Base + adapter (or none) -> folders, plain or re-quantized, each validated unless told not to be.

    Attributes:
        base: folder or hub id.
        outputs: what to write, at least one; no two in the same folder or in one another.
        adapter: folder or hub id of a PEFT adapter, or None to only quantize or convert.
        combination: several adapters in its place.
        options: how the adapter is read and merged.
        trained_on: how training saw a 16-bit base; None = as the adapter's record says.
        validation: None = do not validate.
        tensor_parallel: GPUs that an engine will split each output among; what does not divide is refused before any
            work. None = not checked.
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
    options: AdapterOptions = field(default_factory=AdapterOptions)
    trained_on: BnbKind | None = None
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    validation: ValidationConfig | None = field(default_factory=ValidationConfig)
    device: str = "auto"
    gpu_memory_limit: int | None = None
    overwrite: bool = False
    revision: str | None = None
    tensor_parallel: int | None = None
    report_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.tensor_parallel is not None and self.tensor_parallel < 1:
            raise UsageError(f"--tp takes a number of GPUs, 1 or more, got {self.tensor_parallel}")
        if self.tensor_parallel is not None and any(output.is_onnx for output in self.outputs):
            raise UsageError("--tp: ONNX Runtime GenAI runs a model on one device; drop it")
        if self.trained_on is not None and self.trained_on not in BNB_KINDS:
            raise UsageError(f"--trained-on takes {', '.join(BNB_KINDS)}, got {self.trained_on}")
        if self.adapter is not None and self.combination is not None:
            raise UsageError("a job has one adapter or a combination of several, got both")
        self.options.check_adapter(bool(self.adapters), self.combination)
        dampens, asked = self.options.dampen_intruders is not None, self.validation
        if dampens and asked is not None and asked.task_data is None:
            raise UsageError(
                "--dampen-intruders trades the task for what the model knew before, and both have to be seen: give "
                "--task-data, held-out text of the adapter's task, or drop the comparison with --no-validate"
            )
        if not self.adapters and any(o.quantization is not None and o.quantization.keeps_codes for o in self.outputs):
            raise UsageError("--algorithm zeros puts an adapter's update into zero points, and there is no adapter")
        if self.options.rank == "auto" and (asked is None or asked.task_data is None):
            raise UsageError("--rank auto goes by the loss on held-out text of the adapter's task: give --task-data")
        if asked is not None and asked.task_data is not None and not self.adapters:
            raise UsageError("--task-data is text of an adapter's task, and there is no adapter")
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
        options: how the adapter is read, and was merged into the candidate.
        candidate_adapter: the candidate is served with this one, unmerged.
        reference_cache: read when it exists, written when it does not.
        report_dir: where the reports go; None = the terminal alone.
    """

    reference: str | None
    candidate: str | None
    adapter: str | None = None
    options: AdapterOptions = field(default_factory=AdapterOptions)
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
        self.options.check_adapter(self.adapter is not None, None)
        if self.options.rank == "auto":
            raise UsageError("--rank auto chooses a rank to merge; a candidate has one already: give its number")
        if self.reference_cache is not None and self.options not in (AdapterOptions(), _dampening_alone(self.options)):
            raise UsageError(
                "--rank, --qa-lora, --ir-qlora and --kasa with --reference-cache: a cache does not know how its "
                "adapter was read; compare without it"
            )
        asked = self.validation
        if asked.task_data is not None:
            raise UsageError(
                "--task-data compares what can be merged and is for qconv merge; --eval-data takes any text"
            )
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


def _dampening_alone(options: AdapterOptions) -> AdapterOptions:
    return AdapterOptions(dampen_intruders=options.dampen_intruders)


_SIZE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_size(text: str, option: str = "") -> int:
    """``"5GB"``, ``"500MiB"`` or ``"20m"`` in bytes; ``option`` is who gave it, for messages.

    Raises:
        UsageError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?\s*", text.lower())
    if not match or match[2] not in _SIZE_UNITS:
        raise UsageError(f"{f'{option}: ' if option else ''}expected a size such as 5GB or 500MiB, got {text!r}")
    return int(float(match[1]) * _SIZE_UNITS[match[2]])
