"""From the options of a command to the job that one function runs."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconv import errors
from qconv.adapter_configs import COMBINE_METHODS, AdapterOptions, CombinationConfig, NormaliseConfig, UnpickleConfig
from qconv.config import CalibrationConfig, MergeJob, OutputConfig, ValidateJob, ValidationConfig, parse_size
from qconv.gate_rules import Policy, Rule, load_policy, parse_rule
from qconv.overrides import parse_override
from qconv.progress import Progress
from qconv.quantization_config import QuantizationConfig, parse_budget, parse_widths
from qconv.side_files import LQ_LORA_MODEL, is_adapter
from qconv.targets import GGUF_TARGETS, ONNX_PLAIN, TARGETS, gguf_file_name
from qconv.training_config import TrainConfig


def merge_job(
    base: str, adapters: Sequence[str], targets: Sequence[str], validate_it: bool, options: dict[str, Any]
) -> MergeJob:
    """``targets``: none for a plain output; with several, each output lies in a folder of its name."""
    quantizations: list[QuantizationConfig | None] = [None]
    not_taken: dict[str, list[str]] = {}
    if targets:
        quantizations = [*_quantizations(targets, options, not_taken)]
    elif given := _given(options):
        words = ", ".join(one.typed for one in given)
        raise errors.UsageError(f"{words}: without --requant the output is not quantized; name a target, or drop it")
    return MergeJob(
        base=base,
        adapter=adapters[0] if len(adapters) == 1 else None,
        combination=_combination(adapters, options),
        options=_adapter_options(options),
        outputs=tuple(
            OutputConfig(
                out=options["out"] if len(targets) < 2 else options["out"] / target,
                quantization=quantization,
                dtype=options["dtype"],
                max_shard_bytes=parse_size(options["max_shard_size"], "--max-shard-size"),
                not_taken=tuple(not_taken.get(target, ())),
            )
            for target, quantization in zip(targets or [""], quantizations, strict=True)
        ),
        trained_on=options.get("trained_on"),
        calibration=CalibrationConfig(
            sources=tuple(options["calibration"]),
            samples=options["samples"],
            seq_len=options["seq_len"],
            seed=options["seed"],
        ),
        validation=validation_config(options) if validate_it else None,
        device=options["device"],
        overwrite=options["overwrite"],
        gpu_memory_limit=None if options["gpu_memory"] is None else parse_size(options["gpu_memory"], "--gpu-memory"),
        revision=options["revision"],
        tensor_parallel=options["tp"],
        report_dir=options["report_dir"],
    )


def _adapter_options(options: dict[str, Any]) -> AdapterOptions:
    """What was given of them; commands without adapters have none."""
    given = {f.name: options.get(f.name) for f in dataclasses.fields(AdapterOptions) if f.name != "rank"}
    rank = options.get("rank")
    if rank not in (None, "auto"):
        if not re.fullmatch(r"\d{1,6}", rank):
            raise errors.UsageError(f"--rank takes a number or auto, got {rank!r}")
        rank = int(rank)
    return AdapterOptions(**given, rank=rank)


def _combination(adapters: Sequence[str], options: dict[str, Any]) -> CombinationConfig | None:
    """How several adapters are merged together; None for one or none.

    Raises:
        UsageError: several without --combine, options of it without several, or ones that do not fit.
    """
    names = {"weights": "weights", "combine_rank": "rank", "density": "density", "majority_sign": "majority_sign"}
    given = {field: options[name] for name, field in names.items() if options.get(name) is not None}
    given |= {"factors": True} if options.get("combine_factors") else {}
    method = options.get("combine")
    if len(adapters) < 2:
        if method is not None or given:
            raise errors.UsageError(
                "--combine, --weights, --combine-rank, --combine-factors, --density and --majority-sign are for two "
                "adapters or more"
            )
        return None
    if method is None:
        raise errors.UsageError(
            f"{len(adapters)} adapters: say how with --combine {'|'.join(COMBINE_METHODS)} (linear adds their updates)"
        )
    if "weights" in given:
        try:
            given["weights"] = tuple(float(word) for word in given["weights"].split(","))
        except ValueError:
            raise errors.UsageError(f"--weights takes numbers, such as 0.7,0.3, got {given['weights']!r}") from None
    return CombinationConfig(adapters=tuple(adapters), method=method, seed=options["seed"], **given)


@dataclass(frozen=True)
class _Given:
    """An option of targets as it was typed, and the field that it sets; a tuple is added to what is there."""

    field: str
    value: Any
    typed: str

    def to(self, config: QuantizationConfig) -> QuantizationConfig:
        value = getattr(config, self.field) + self.value if isinstance(self.value, tuple) else self.value
        return dataclasses.replace(config, **{self.field: value})


def _given(options: dict[str, Any]) -> list[_Given]:
    """The options of targets that were given; of those that may be repeated, each by itself."""
    found = []
    for name in ("algorithm", "bits", "group_size", "activations", "damping", "kv_cache"):
        if options[name] is not None:
            found.append(_Given(name, options[name], f"--{name.replace('_', '-')} {options[name]}"))
    if options["symmetric"] is not None:
        found.append(_Given("symmetric", options["symmetric"], "--sym" if options["symmetric"] else "--asym"))
    found += [
        _Given(name, True, f"--{name.replace('_', '-')}")
        for name in ("desc_act", "lm_head", "imatrix")
        if options[name]
    ]
    found += [_Given("ignore", (text,), f"--ignore {text!r}") for text in options["ignore"]]
    found += [_Given("overrides", (parse_override(text),), f"--override {text!r}") for text in options["overrides"]]
    if options["budget"] is not None:
        found.append(_Given("budget", parse_budget(options["budget"]), f"--budget {options['budget']}"))
    if options["budget_bits"] is not None:
        widths = parse_widths(options["budget_bits"])
        found.append(_Given("budget_bits", widths, f"--budget-bits {options['budget_bits']}"))
    return found


def _quantizations(
    targets: Sequence[str], options: dict[str, Any], not_taken: dict[str, list[str]]
) -> Iterable[QuantizationConfig]:
    """One for each target. Of several, each gets the options that it takes, and a line says which it does not.

    Args:
        not_taken: gets the options that a target does not take, with the reason.

    Raises:
        UsageError: a target is named twice, or an option is for none of them.
    """
    twice = next((target for target in targets if targets.count(target) > 1), None)
    if twice is not None:
        raise errors.UsageError(f"{twice} is asked for twice; name each target once, or make another run with -o")
    made = {target: QuantizationConfig(target=target) for target in targets}
    for option in _given(options):
        refusals: dict[str, errors.UsageError] = {}
        for target, config in made.items():
            try:
                made[target] = option.to(config)
            except errors.UsageError as error:
                refusals[target] = error
        if len(refusals) == len(made):
            raise refusals[targets[0]]
        if refusals:
            for target, refusal in refusals.items():
                not_taken.setdefault(target, []).append(f"{option.typed}: {refusal}")
            taking = ", ".join(target for target in targets if target not in refusals)
            reasons = "; ".join(map(str, refusals.values()))
            progress_of(options).say(f"note: {option.typed} is for {taking} alone ({reasons})")
    return made.values()


def validation_config(options: dict[str, Any]) -> ValidationConfig:
    rules = [parse_rule(text) for text in options["gates"]]
    if options["max_kl"] is not None:
        rules.append(Rule(metric="kl_mean", upper=True, limit=options["max_kl"], origin="flag"))
    if options["min_effect"] is not None:
        rules.append(Rule(metric="adapter_effect_retained", upper=False, limit=options["min_effect"], origin="flag"))
    return ValidationConfig(
        source=options["eval_data"],
        tokens=options["eval_tokens"],
        seq_len=options["eval_seq_len"],
        seed=options["seed"],
        rules=tuple(rules),
        policy=Policy() if options["policy"] is None else load_policy(options["policy"]),
        defaults=not options["no_default_gates"],
        control_tokens=options["control_tokens"],
        attribution=options["attribution"],
        engine=options.get("engine"),
        prompts=options["prompts"],
        new_tokens=options["new_tokens"],
        tasks=options["tasks"],
        task_folder=options["task_folder"],
        task_limit=options["task_limit"],
        task_data=options.get("task_data"),
    )


def check_conversion(source: str, target: str, options: dict[str, Any]) -> None:
    """Refuses a target that is not for what ``source`` is, and options that are not for the target.

    Raises:
        UsageError: says what would do.
        CheckpointError: there is no such folder.
    """
    folder = Path(source)
    if not folder.is_dir():  # a hub id; what is here is looked at without torch
        from qconv.checkpoint import resolve_folder

        folder = resolve_folder(source, options["revision"])
    of_adapter = is_adapter(folder)
    if of_adapter and target not in ("lora", "safetensors"):
        raise errors.UsageError(
            f"{source} is an adapter: --to {target} is for models. --to lora makes a plain LoRA of it, qconv merge "
            "puts it into its base"
        )
    if not of_adapter and target in ("lora", "safetensors"):
        raise errors.UsageError(
            f"{source} is no adapter (it has no adapter_config.json), and --to {target} is for adapters; "
            "qconv extract makes a LoRA of two models"
        )
    of_lora = ["base", "dtype", "rank", "rank_scaling", "qa_lora", "ir_qlora"]
    strange = (
        ["max_shard_size"] if of_adapter else [name for name in of_lora if name != "dtype" or target not in ONNX_PLAIN]
    )
    if target == "safetensors":
        decomposed = ("base", "dtype") if (folder / LQ_LORA_MODEL).is_file() else ()
        strange += [name for name in (*of_lora, "revision") if name not in decomposed]
    given = [f"--{name.replace('_', '-')}" for name in strange if options[name] is not None]
    if given:
        what = "--to safetensors" if target == "safetensors" else "adapters" if of_adapter else "models"
        raise errors.UsageError(f"{', '.join(given)} is not for {what}; drop it")
    if of_adapter and options["dry_run"]:
        raise errors.UsageError("--dry-run plans what is done to models; converting an adapter takes seconds, drop it")


def convert_job(model: str, target: str, options: dict[str, Any]) -> MergeJob:
    size = parse_size(options["max_shard_size"] or "5GB", "--max-shard-size")
    if target in GGUF_TARGETS:
        quantization = QuantizationConfig(target=target, algorithm="ggml")
        output = OutputConfig(out=options["out"], quantization=quantization, max_shard_bytes=size)
    elif target in ONNX_PLAIN:
        quantization = QuantizationConfig(target=target)
        dtype = options["dtype"]
        output = OutputConfig(out=options["out"], quantization=quantization, dtype=dtype, max_shard_bytes=size)
    else:
        output = OutputConfig(out=options["out"], dtype=target, max_shard_bytes=size)
    return MergeJob(
        base=model,
        outputs=(output,),
        validation=None,
        device=options["device"],
        overwrite=options["overwrite"],
        revision=options["revision"],
    )


def normalise_config(adapter: str, options: dict[str, Any]) -> NormaliseConfig:
    return NormaliseConfig(
        adapter=adapter,
        out=options["out"],
        base=options["base"],
        dtype=options["dtype"] or "fp32",
        options=_adapter_options(options),
        overwrite=options["overwrite"],
        revision=options["revision"],
    )


def unpickle_config(adapter: str, options: dict[str, Any]) -> UnpickleConfig:
    return UnpickleConfig(
        adapter=adapter,
        out=options["out"],
        overwrite=options["overwrite"],
        base=options["base"],
        dtype=options["dtype"] or "fp32",
    )


def validate_job(
    reference: str | None, adapter: str | None, candidate: str | None, options: dict[str, Any]
) -> ValidateJob:
    return ValidateJob(
        reference=reference,
        candidate=candidate,
        adapter=adapter,
        options=_adapter_options(options),
        candidate_adapter=options["candidate_adapter"],
        trained_on=options["trained_on"],
        reference_cache=options["reference_cache"],
        validation=validation_config(options),
        device=options["device"],
        report_dir=options["report_dir"],
    )


def train_config(base: str, data: str, options: dict[str, Any]) -> TrainConfig:
    about_the_run = ("quiet", "verbose", "debug", "as_json", "log_json", "dry_run")
    return TrainConfig(
        base=base, data=data, **{name: value for name, value in options.items() if name not in about_the_run}
    )


def solves(job: MergeJob) -> bool:
    """Whether a job uses solvers of linear algebra."""
    return any(o.quantization is not None and o.quantization.solves for o in job.outputs)


def progress_of(options: dict[str, Any]) -> Progress:
    """What a run says meanwhile: nothing beside ``--json``, unless lines of JSON were asked for too."""
    in_lines = options["log_json"]
    if options["quiet"] or (options.get("as_json") and not in_lines):
        return Progress(verbosity=0)
    return Progress(verbosity=2 if options["verbose"] else 1, as_json=in_lines)


def following_a_merge(job: MergeJob, output: OutputConfig) -> tuple[str, ...]:
    """What to do with a folder that was made: validate it if that was left out, and serve it."""
    if output.quantization is None and not job.adapters:
        return ()
    lines = []
    if job.validation is None and job.combination is None:  # one adapter is what `qconv validate` leaves unmerged
        words = ["qconv", "validate", "--reference", job.base]
        words += ["--adapter", job.adapter] if job.adapter is not None else []
        words += ["--trained-on", job.trained_on] if job.trained_on is not None else []
        words += job.options.flags
        lines.append(shlex.join([*words, "--candidate", str(output.out)]))
    target = output.quantization
    kind = None if target is None else TARGETS[target.target].gguf_kind
    if kind is not None:
        return (*lines, shlex.join(["llama-cli", "-m", str(output.out / gguf_file_name(kind))]))
    if output.is_onnx:
        return (*lines, shlex.join(["qconv", "pack", str(output.out), "--for", "ort-genai"]))
    # That one vLLM does not take.
    if target is None or not (target.target in ("gptq", "gptq_v2") and target.symmetric is False):
        lines.append(shlex.join(["vllm", "serve", str(output.out)]))
    return tuple(lines)


def following_a_training(config: TrainConfig) -> tuple[str, ...]:
    return (shlex.join(["qconv", "merge", config.base, str(config.out), "--requant", "w4a16", "-o", "OUT"]),)


def following_a_validation(job: ValidateJob) -> tuple[str, ...]:
    """A cache that was only written is there to judge something with."""
    if job.candidate is not None or job.reference_cache is None:
        return ()
    words = ["qconv", "validate", "--reference-cache", str(job.reference_cache), "--candidate", "FOLDER"]
    return (shlex.join(words),)
