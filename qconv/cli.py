"""Commands: parse, build one frozen config, call one function. Heavy imports wait until a command runs."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qconv import __version__, errors
from qconv.cli_options import output_options, quantize_options, run_options, trained_on_option, validate_options
from qconv.config import (
    BNB_KINDS,
    PLAIN_DTYPES,
    CalibrationConfig,
    MergeJob,
    QuantizationConfig,
    ValidateJob,
    ValidationConfig,
    parse_size,
)
from qconv.gate_rules import Policy, Rule, load_policy, parse_rule
from qconv.own_process import begin, keep_freed_memory, without_collections
from qconv.progress import Progress
from qconv.targets import TARGETS
from qconv.timeline import TIMELINE

# OpenMP threads that spin while they wait ruin every run on a busy machine; must be set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Without this the allocator of torch holds twice the GPU memory that blocks of changing sizes need.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

if TYPE_CHECKING:
    from qconv.outcome import Outcome


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="qconv")
def cli() -> None:
    """Turn a QLoRA adapter into a deployable quantized model, and prove that it still behaves like the one you trained.

    \b
    Exit codes: 0 done, 2 usage, 3 bad input, 4 gate failed, 5 gate inconclusive, 1 anything else, 130 interrupted.
    """


@cli.command()
@click.argument("base")
@click.argument("adapter")
@click.option("--requant", type=click.Choice(list(TARGETS)), help="Re-quantize [default: write plain 16-bit shards].")
@trained_on_option
@click.option("--no-validate", is_flag=True, help="Skip the comparison with the unmerged model.")
@output_options
@quantize_options
@validate_options
@run_options
def merge(base: str, adapter: str, requant: str | None, no_validate: bool, **options: Any) -> None:
    """Merge ADAPTER into the dequantized BASE, optionally re-quantize, and validate against the unmerged model.

    \b
    qconv merge ./base-nf4 ./adapter --requant awq -o ./out
    qconv merge meta-llama/Llama-3.1-8B ./adapter --trained-on nf4-dq --requant w4a16 --max-kl 0.1 -o ./out
    """
    _run_job(_merge_job(base, adapter, requant, not no_validate, options), options)


@cli.command()
@click.argument("model")
@click.option("--to", "target", required=True, type=click.Choice(list(TARGETS)), help="Target format.")
@click.option("--no-validate", is_flag=True, help="Skip the comparison with the unquantized model.")
@output_options
@quantize_options
@validate_options
@run_options
def quantize(model: str, target: str, no_validate: bool, **options: Any) -> None:
    """Quantize a MODEL without an adapter, and validate against it.

    \b
    qconv quantize ./merged --to gptq -o ./out
    """
    _run_job(_merge_job(model, None, target, not no_validate, options), options)


@cli.command()
@click.argument("model")
@click.option("--to", "dtype", required=True, type=click.Choice(PLAIN_DTYPES), help="Plain dtype to write.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Output folder; must not exist.")
@click.option("--overwrite", is_flag=True, help="Replace an existing model folder, once the new one is complete.")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest shard file.")
@click.option("--revision", help="Branch, tag or commit, when the model is a hub id.")
@run_options
def convert(model: str, dtype: str, **options: Any) -> None:
    """Dequantize MODEL (anything that qconv reads or writes) to plain weights.

    \b
    qconv convert ./base-nf4 --to bf16 -o ./base-bf16
    """
    job = MergeJob(
        base=model,
        out=options["out"],
        dtype=dtype,
        max_shard_bytes=parse_size(options["max_shard_size"]),
        validation=None,
        device=options["device"],
        overwrite=options["overwrite"],
        revision=options["revision"],
    )
    _run_job(job, options)


@cli.command()
@click.option("--reference", help="The base that the adapter was trained on.")
@click.option("--adapter", help="The adapter, left unmerged.")
@click.option("--candidate", help="The folder to judge; any format that qconv reads.")
@click.option("--candidate-adapter", help="The candidate is served with this adapter, unmerged.")
@click.option(
    "--reference-cache",
    type=click.Path(path_type=Path),
    help="The reference's distributions: written when the file is missing, otherwise used instead of running it.",
)
@click.option(
    "--engine",
    type=click.Choice(["qconv", "transformers"]),
    default="qconv",
    show_default=True,
    help="What runs the candidate: weights decoded by qconv, or transformers with its own quantized kernels.",
)
@trained_on_option
@click.option("--seed", default=0, show_default=True, help="Seed of the evaluation sampling.")
@validate_options
@run_options
def validate(reference: str | None, adapter: str | None, candidate: str | None, **options: Any) -> None:
    """Compare a CANDIDATE folder with base + unmerged adapter, and gate on it.

    \b
    qconv validate --reference ./base-nf4 --adapter ./adapter --candidate ./out --report ./report
    qconv validate --reference ./base-nf4 --adapter ./adapter --reference-cache ref.qcache   # once
    qconv validate --reference-cache ref.qcache --candidate ./out --gate 'kl_mean<=0.1'      # then, without the base
    """
    begin(options["device"], [reference, adapter, candidate])
    with without_collections():
        from qconv import pipeline

    job = ValidateJob(
        reference=reference,
        candidate=candidate,
        adapter=adapter,
        candidate_adapter=options["candidate_adapter"],
        trained_on=options["trained_on"],
        reference_cache=options["reference_cache"],
        validation=_validation(options),
        device=options["device"],
        report_dir=options["report_dir"],
    )
    keep_freed_memory()
    _finish(pipeline.validate(job, _progress(options)))


@cli.command()
@click.argument("reports", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "markdown", "html", "junit", "json"]),
    default="text",
    show_default=True,
    help="Two reports are compared as text, markdown or json.",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Write there instead of to stdout.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def report(reports: tuple[Path, ...], form: str, out: Path | None, debug: bool) -> None:
    """Show one report (a qconv-report.json, or a folder with one) in another form, or compare two.

    \b
    qconv report ./out --format html -o report.html
    qconv report ./release-1 ./release-2
    """
    from qconv.report.render import render

    text = render(reports, form)
    if out is None:
        click.echo(text)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise errors.CheckpointError(f"{out}: cannot be written ({error})") from error


@cli.command()
@click.argument("base")
@click.argument("data", default="default")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Adapter folder; must not exist.")
@click.option("--overwrite", is_flag=True, help="Replace an existing adapter folder.")
@click.option("--rank", default=16, show_default=True, help="LoRA rank r.")
@click.option("--alpha", default=32, show_default=True, help="LoRA alpha; the scale is alpha / r.")
@click.option("--learning-rate", default=2e-4, show_default=True)
@click.option("--schedule", default="constant", show_default=True, type=click.Choice(["constant", "cosine"]))
@click.option("--dropout", default=0.0, show_default=True, help="LoRA dropout.")
@click.option("--steps", default=200, show_default=True, help="Optimizer steps.")
@click.option("--batch-size", default=4, show_default=True, help="Rows per forward pass.")
@click.option("--gradient-accumulation", default=1, show_default=True, help="Forward passes per step.")
@click.option("--quantize", type=click.Choice(BNB_KINDS), help="How a 16-bit base is loaded [default: nf4-dq].")
@click.option("--revision", help="Branch, tag or commit, when the base is a hub id.")
@click.option("--seq-len", default=512, show_default=True, help="Tokens per row.")
@click.option("--seed", default=0, show_default=True)
@run_options
def train(base: str, data: str, **options: Any) -> None:
    """Train a QLoRA adapter on BASE with DATA (.txt, .jsonl, or the embedded default).

    \b
    qconv train ./base ./data.jsonl -o ./adapter
    """
    from qconv.config import TrainConfig
    from qconv.train import train as run_training

    progress = _progress(options)
    for name in ("quiet", "verbose", "debug"):
        del options[name]
    result = run_training(TrainConfig(base=base, data=data, **options), progress)
    click.echo(f"adapter      {result.out}\nloss         {result.first_loss:.3f} -> {result.final_loss:.3f}")


@cli.command()
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def inspect(path: str, as_json: bool, debug: bool) -> None:
    """Say what a checkpoint or adapter is: kind, scheme, sizes. Reads headers only."""
    from qconv.describe import describe

    facts = describe(path)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        width = max(map(len, facts))
        for key, value in facts.items():
            click.echo(f"{key:<{width}}  {value}")


@cli.command()
@click.option("-o", "--out", default="demo-out", show_default=True, type=click.Path(path_type=Path))
@click.option("--requant", default="awq", show_default=True, type=click.Choice(list(TARGETS)))
@click.option("--steps", default=60, show_default=True, help="Training steps of 4 x 256 tokens.")
@run_options
def demo(out: Path, requant: str, steps: int, **options: Any) -> None:
    """Run the whole story on SmolLM2-135M: NF4 base, a short QLoRA training, merge, re-quantize, validate."""
    from qconv.demo import run_demo

    run_demo(out, requant, steps, options["device"], _progress(options))


def _merge_job(
    base: str, adapter: str | None, target: str | None, validate_it: bool, options: dict[str, Any]
) -> MergeJob:
    quantization = None
    if target is not None:
        names = ("algorithm", "bits", "group_size", "symmetric", "desc_act", "damping")
        quantization = QuantizationConfig(target=target, **{name: options[name] for name in names})
    elif options["desc_act"] or any(options[k] is not None for k in ("algorithm", "bits", "group_size", "symmetric")):
        raise errors.UsageError("--algorithm, --bits, --group-size, --sym/--asym and --desc-act belong to --requant")
    names = ("gates", "max_kl", "min_effect", "policy", "prompts", "tasks")
    asked = [name for name in names if options[name] not in (None, ())]
    if not validate_it and asked:
        raise errors.UsageError(
            "--no-validate leaves nothing to gate: drop it, or drop "
            + ", ".join("--gate" if name == "gates" else f"--{name.replace('_', '-')}" for name in asked)
        )
    return MergeJob(
        base=base,
        adapter=adapter,
        out=options["out"],
        trained_on=options.get("trained_on"),
        dtype=options["dtype"],
        max_shard_bytes=parse_size(options["max_shard_size"]),
        quantization=quantization,
        calibration=CalibrationConfig(
            source=options["calibration"],
            samples=options["samples"],
            seq_len=options["seq_len"],
            seed=options["seed"],
        ),
        validation=_validation(options) if validate_it else None,
        device=options["device"],
        overwrite=options["overwrite"],
        gpu_memory_limit=None if options["gpu_memory"] is None else parse_size(options["gpu_memory"]),
        revision=options["revision"],
        report_dir=options["report_dir"],
    )


def _validation(options: dict[str, Any]) -> ValidationConfig:
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
        engine=options.get("engine", "qconv"),
        prompts=options["prompts"],
        new_tokens=options["new_tokens"],
        tasks=options["tasks"],
        task_folder=options["task_folder"],
        task_limit=options["task_limit"],
    )


def _progress(options: dict[str, Any]) -> Progress:
    return Progress(verbosity=0 if options["quiet"] else 2 if options["verbose"] else 1)


def _run_job(job: MergeJob, options: dict[str, Any]) -> None:
    solves = job.quantization is not None and job.quantization.resolved_algorithm == "gptq"
    begin(job.device, [job.base, job.adapter], solves)
    with without_collections():
        from qconv import pipeline

    outcome = pipeline.run(job, _progress(options))
    passed = outcome.verdict in ("pass", "not gated")
    click.echo(
        f"{'output':<11} {outcome.folder}" if passed else f"{'rejected':<11} {outcome.folder} (kept for inspection)"
    )
    if outcome.fidelity is not None:
        _finish(outcome)


def _finish(outcome: Outcome) -> None:
    click.echo(outcome.summary())
    if outcome.verdict == "fail":
        raise errors.GateError("a gate failed: see the report")
    if outcome.verdict == "inconclusive":
        raise errors.GateInconclusiveError("a gate is inconclusive: see the report for how many tokens would settle it")


def main(arguments: list[str] | None = None) -> None:
    """Entry point: turns every error into a message on stderr and an exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of the libraries; read when tqdm is imported
    if threading.current_thread() is threading.main_thread():
        # A cancelled CI job sends SIGTERM: clean up as for ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        cli.main(args=arguments, standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(errors.EXIT_USAGE)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted: nothing was left behind", err=True)
        sys.exit(errors.EXIT_INTERRUPTED)
    except errors.QconvError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        click.echo(f"unexpected {type(error).__name__}: {error}\n(--debug shows where; this is a bug)", err=True)
        sys.exit(errors.EXIT_OTHER)
    finally:
        if TIMELINE.is_on:
            click.echo(TIMELINE.table(), err=True)
