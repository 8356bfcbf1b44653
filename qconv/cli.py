"""Commands: parse, build one frozen config, call one function. Heavy imports wait until a command runs."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from qconv import __version__, cli_jobs, errors
from qconv.cli_adapters import extract
from qconv.cli_answers import (
    Answer,
    Complaints,
    answer_of,
    answers,
    made,
    normalised_facts,
    separated_facts,
    together,
    training_facts,
    unpickled_facts,
)
from qconv.cli_looking import completion, doctor, inspect, report
from qconv.cli_options import (
    adapter_options,
    combine_options,
    dry_run_option,
    json_option,
    output_options,
    push_options,
    quantize_options,
    reading_options,
    run_options,
    task_data_option,
    train_options,
    trained_on_option,
    validate_options,
)
from qconv.cli_parsing import COMPLETE_VARIABLE, Choice, Group, files, folders, given_options
from qconv.cli_plans import planned_merge, planned_training, planned_validation
from qconv.cli_publish import push_config, pushed, refuse_push
from qconv.cli_recipe import run, schema
from qconv.cli_serving import pack
from qconv.config import MergeJob
from qconv.own_process import begin, expand_segments, keep_freed_memory, without_collections
from qconv.progress import as_json_lines
from qconv.side_files import LQ_LORA_MODEL
from qconv.targets import GGUF_TARGETS, ONNX_PLAIN, PLAIN_DTYPES, TARGETS
from qconv.timeline import TIMELINE
from qconv.unused import refuse_unused

# OpenMP threads that spin while they wait ruin every run on a busy machine; must be set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
expand_segments()  # before torch loads, too


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="qconv", help="Show the version.")
def cli() -> None:
    """Turn a QLoRA adapter into a deployable quantized model, and prove that it still behaves like the one you trained.

    \b
    qconv train ./base ./data.jsonl -o ./adapter
    qconv merge ./base ./adapter --requant w4a16 -o ./out
    qconv run ./release.yaml
    qconv doctor

    \b
    Exit codes: 0 done, 2 usage, 3 bad input, 4 gate failed, 5 gate inconclusive, 1 anything else, 130 interrupted.
    """


@cli.command()
@click.argument("base", shell_complete=folders)
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True, shell_complete=folders)
@click.option(
    "--requant",
    "--to",
    "targets",
    multiple=True,
    type=Choice(list(TARGETS)),
    help="Re-quantize, or write GGUF or ONNX [default: plain shards]. Repeatable: outputs then lie in OUT/TARGET.",
)
@combine_options
@trained_on_option
@adapter_options
@task_data_option
@click.option("--no-validate", is_flag=True, help="Skip the comparison with the unmerged model.")
@output_options
@quantize_options
@validate_options
@push_options
@dry_run_option
@json_option
@run_options
@answers
def merge(base: str, adapters: tuple[str, ...], targets: tuple[str, ...], no_validate: bool, **options: Any) -> Answer:
    """Merge ADAPTER into the dequantized BASE, optionally re-quantize, and validate against the unmerged model.

    \b
    qconv merge ./base-nf4 ./adapter --requant awq -o ./out
    qconv merge ./base-nf4 ./adapter --requant awq --requant fp8 -o ./out   # ./out/awq and ./out/fp8
    qconv merge meta-llama/Llama-3.1-8B ./adapter --trained-on nf4-dq --requant w4a16 --max-kl 0.1 -o ./out
    qconv merge ./base-nf4 ./one ./two --combine ties --weights 0.7,0.3 --density 0.5 -o ./out
    """
    return _run_job(cli_jobs.merge_job(base, adapters, targets, not no_validate, options), options, "merge")


@cli.command()
@click.argument("model", shell_complete=folders)
@click.option(
    "--to",
    "--requant",
    "targets",
    required=True,
    multiple=True,
    type=Choice(list(TARGETS)),
    help="Target format. Repeatable: outputs then lie in OUT/TARGET.",
)
@click.option("--no-validate", is_flag=True, help="Skip the comparison with the unquantized model.")
@output_options
@quantize_options
@validate_options
@push_options
@dry_run_option
@json_option
@run_options
@answers
def quantize(model: str, targets: tuple[str, ...], no_validate: bool, **options: Any) -> Answer:
    """Quantize a MODEL without an adapter, and validate against it.

    \b
    qconv quantize ./merged --to gptq -o ./out
    """
    return _run_job(cli_jobs.merge_job(model, (), targets, not no_validate, options), options, "quantize")


@cli.command()
@click.argument("source", metavar="MODEL|ADAPTER", shell_complete=folders)
@click.option(
    "--to",
    "target",
    required=True,
    type=Choice([*PLAIN_DTYPES, *GGUF_TARGETS, *ONNX_PLAIN, "lora", "safetensors"]),
    help="Plain dtype, uncalibrated GGUF or ONNX of a model; plain LoRA or safetensors of an adapter.",
)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Output folder; must not exist.")
@click.option("--overwrite", is_flag=True, help="Replace an existing model folder, once the new one is complete.")
@click.option("--max-shard-size", metavar="SIZE", help="Largest shard file of a model [default: 5GB]")
@click.option(
    "--base",
    shell_complete=folders,
    help="lora: the adapter's base, where the adapter stores tensors of it; safetensors: the model that LQ-LoRA "
    "decomposed, for its config.",
)
@click.option(
    "--dtype",
    type=Choice(PLAIN_DTYPES),
    help="lora: dtype of the factors; onnx: of the graph; safetensors: of LQ-LoRA's base [default: fp32]",
)
@reading_options
@click.option("--revision", help="Branch, tag or commit, when the model or adapter is a hub id.")
@push_options
@dry_run_option
@json_option
@run_options
@answers
def convert(source: str, target: str, **options: Any) -> Answer:
    """Dequantize MODEL (anything that qconv reads or writes) to plain weights or GGUF, or make ADAPTER a plain LoRA.

    GGUF is rounded by llama.cpp's own rule; qconv quantize --to gguf-q4_0 calibrates.

    A plain LoRA has one rank that engines allocate (8, 16, 32, 64, 128, 256, 320, 512), padded with zeros, and
    lora_alpha = r: rsLoRA, rank and alpha patterns are in its factors. What no such LoRA equals is refused.
    --to safetensors reads the pickled tensors of an ADAPTER without running what else a pickle may hold; what LQ-LoRA
    saves becomes OUT/base and OUT/adapter.

    \b
    qconv convert ./base-nf4 --to bf16 -o ./base-bf16
    qconv convert ./merged --to gguf-q5_1 -o ./merged-gguf
    qconv convert ./adapter --to lora -o ./adapter-served
    """
    cli_jobs.check_conversion(source, target, options)
    if target == "safetensors":
        refuse_push(options, "--to safetensors")
        pickled = cli_jobs.unpickle_config(source, options)
        if (Path(source) / LQ_LORA_MODEL).is_file():
            from qconv.decomposed import separate

            return separated_facts(separate(pickled))
        from qconv.unpickle import unpickle

        return unpickled_facts(unpickle(pickled))
    if target != "lora":
        return _run_job(cli_jobs.convert_job(source, target, options), options, "convert")
    config, progress = cli_jobs.normalise_config(source, options), cli_jobs.progress_of(options)
    push = push_config(options, [config.out])
    from qconv.normalise import normalise

    return pushed(normalised_facts(normalise(config, progress)), push, config.out, 1, progress)


@cli.command()
@click.option("--reference", shell_complete=folders, help="The base that the adapter was trained on.")
@click.option("--adapter", shell_complete=folders, help="The adapter, left unmerged.")
@click.option("--candidate", shell_complete=folders, help="The folder to judge; any format that qconv reads.")
@click.option("--candidate-adapter", shell_complete=folders, help="The candidate is served with this one, unmerged.")
@click.option(
    "--reference-cache",
    type=click.Path(path_type=Path),
    help="The reference's distributions: written when the file is missing, otherwise used instead of running it.",
)
@click.option(
    "--engine",
    type=Choice(["qconv", "transformers", "onnxruntime"]),
    help="What runs the candidate: weights decoded by qconv, transformers with its own quantized kernels, or ONNX "
    "Runtime [default: onnxruntime for a folder of it, else qconv]",
)
@trained_on_option
@adapter_options
@click.option("--seed", default=0, show_default=True, help="Seed of the evaluation sampling.")
@validate_options
@dry_run_option
@json_option
@run_options
@answers
def validate(reference: str | None, adapter: str | None, candidate: str | None, **options: Any) -> Answer:
    """Compare a CANDIDATE folder with base + unmerged adapter, and gate on it.

    \b
    qconv validate --reference ./base-nf4 --adapter ./adapter --candidate ./out --report ./report
    qconv validate --reference ./base-nf4 --adapter ./adapter --reference-cache ref.qcache   # once
    qconv validate --reference-cache ref.qcache --candidate ./out --gate 'kl_mean<=0.1'      # then, without the base
    """
    job = cli_jobs.validate_job(reference, adapter, candidate, options)
    if options["dry_run"]:
        return planned_validation(job)
    begin(options["device"], [reference, adapter, candidate], runs=True, unmerged=adapter is not None)
    with without_collections():
        from qconv import judging

    keep_freed_memory()
    outcome = judging.validate(job, cli_jobs.progress_of(options))
    following = cli_jobs.following_a_validation(job)
    return answer_of(outcome, outcome.summary(), following, is_written=job.report_dir is not None)


@cli.command()
@click.argument("base", shell_complete=folders)
@click.argument("data", default="default", shell_complete=files)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Adapter folder; must not exist.")
@click.option("--overwrite", is_flag=True, help="Replace an existing adapter folder.")
@click.option("--revision", help="Branch, tag or commit, when the base is a hub id.")
@train_options
@dry_run_option
@json_option
@run_options
@answers
def train(base: str, data: str, **options: Any) -> Answer:
    """Train a QLoRA adapter on BASE with DATA: text, chats or instructions.

    DATA is .txt, .jsonl, .json or .parquet, org/name[:split], or the embedded default.

    \b
    qconv train ./base ./data.jsonl -o ./adapter
    qconv train HuggingFaceTB/SmolLM2-135M ./data.txt --rank 32 --alpha 64 --steps 500 -o ./adapter
    """
    config = cli_jobs.train_config(base, data, options)
    if options["dry_run"]:
        return planned_training(config)
    from qconv.train import train as run_training

    result = run_training(config, cli_jobs.progress_of(options))
    text, document = training_facts(result, base)
    return Answer(text=text, document=document, following=cli_jobs.following_a_training(config))


@cli.command()
@click.option(
    "-o",
    "--out",
    default="demo-out",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder for base, adapter and result; must not exist.",
)
@click.option("--requant", default="awq", show_default=True, type=Choice(list(TARGETS)), help="Target format.")
@click.option("--steps", default=60, show_default=True, help="Training steps of 4 x 256 tokens.")
@run_options
def demo(out: Path, requant: str, steps: int, **options: Any) -> None:
    """Run the whole story on SmolLM2-135M: NF4 base, a short QLoRA training, merge, re-quantize, validate.

    \b
    qconv demo --requant w4a16 -o ./demo
    """
    from qconv.demo import run_demo

    run_demo(out, requant, steps, options["device"], cli_jobs.progress_of(options))


for _command in (extract, pack, run, schema, report, inspect, doctor, completion):
    cli.add_command(_command)


def _run_job(job: MergeJob, options: dict[str, Any], command: str) -> Answer:
    refuse_unused(job, given_options())
    push, progress = push_config(options, [output.out for output in job.outputs]), cli_jobs.progress_of(options)
    if options["dry_run"]:
        return planned_merge(job, command, progress)
    solves = cli_jobs.solves(job)
    begin(job.device, [job.base, *job.adapters], solves, runs=solves)
    with without_collections():
        from qconv import pipeline

    outcomes = pipeline.run(job, progress)
    parts = [
        answer_of(outcome, made(outcome), cli_jobs.following_a_merge(job, output))
        for output, outcome in zip(job.outputs, outcomes, strict=True)
    ]
    return together(
        [pushed(part, push, output.out, len(parts), progress) for output, part in zip(job.outputs, parts, strict=True)]
    )


def main(arguments: list[str] | None = None) -> None:
    """Entry point: turns every error into a message on stderr and an exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    in_lines = "--log-json" in arguments
    with as_json_lines() if in_lines else nullcontext():
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of the libraries; read when tqdm is imported
        if threading.current_thread() is threading.main_thread():
            # A cancelled CI job sends SIGTERM: clean up as for ctrl-C.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            _run(arguments, Complaints(as_json="--json" in arguments, in_lines=in_lines))
        finally:
            if TIMELINE.is_on:
                click.echo(TIMELINE.table(), err=True)


def _run(arguments: list[str], complaints: Complaints) -> None:
    is_debug = "--debug" in arguments
    try:
        code = cli.main(args=arguments, standalone_mode=False, complete_var=COMPLETE_VARIABLE)
    except click.ClickException as error:
        complaints.tell("UsageError", error.format_message(), errors.EXIT_USAGE, words=error.show)
        sys.exit(errors.EXIT_USAGE)
    except (KeyboardInterrupt, click.Abort):
        message = "interrupted: nothing was left behind"
        complaints.tell("Interrupted", message, errors.EXIT_INTERRUPTED, words=message)
        sys.exit(errors.EXIT_INTERRUPTED)
    except errors.QconvError as error:
        if is_debug:
            traceback.print_exc()
        words = f"error: {error}"
        complaints.tell(type(error).__name__, str(error), error.exit_code, words=words, is_answered=error.is_answered)
        sys.exit(error.exit_code)
    except Exception as error:
        if is_debug:
            traceback.print_exc()
        words = f"unexpected {type(error).__name__}: {error}\n(--debug shows where; this is a bug)"
        complaints.tell(type(error).__name__, str(error), errors.EXIT_OTHER, words=words)
        sys.exit(errors.EXIT_OTHER)
    if code:  # what a command ended with by itself
        sys.exit(code)
