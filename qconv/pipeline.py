"""The story: open, dequantize, merge, quantize, write, read back, compare, judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qconv import corpus
from qconv.account import describe_plan, model_card, stages, subject
from qconv.assemble import Filling, write_tensors
from qconv.cached_fidelity import measure_cached, write_cached
from qconv.checkpoint import open_checkpoint, resolve_folder
from qconv.config import MergeJob, OutputConfig, ValidateJob, ValidationConfig
from qconv.errors import UsageError
from qconv.evaluation import check_vocabulary, evaluation_rows, reference_tokenizer
from qconv.fidelity import Fidelity, measure_fidelity
from qconv.gating import check_rules, rules_for
from qconv.inputs import load_candidate, load_reference, resolve_device
from qconv.layout import config_dtype, plan_layout
from qconv.mixture import load_mixture, pack_mixture
from qconv.outcome import Outcome, Provenance, conclude, make_report_folder, run_tasks
from qconv.progress import QUIET, Progress
from qconv.quantize.blocks import QuantizedBlock, QuantizeRequest, quantize_blocks
from qconv.report.document import HTML_NAME, JSON_NAME, MARKDOWN_NAME, write_reports
from qconv.runners import Candidate, Reference, candidate_model, reference_model
from qconv.side_files import side_files, tokenizer_folder
from qconv.skeleton import StoredBlocks, linear_weights
from qconv.streaming import StreamedModel
from qconv.timeline import TIMELINE
from qconv.types import Checkpoint
from qconv.work_folder import check_beside, check_inputs, check_output
from qconv.writer import CheckpointWriter, check_room


@dataclass(frozen=True, kw_only=True)
class _Making(Filling):
    """One output on its way."""

    output: OutputConfig
    counts: Counter[str]


def run(job: MergeJob, progress: Progress = QUIET) -> tuple[Outcome, ...]:
    """Makes the outputs of a job, or leaves nothing: an error removes all that was begun.

    Each output is judged by itself: a missed gate moves it aside, and the others appear all the same. None appears
    before all are judged.

    Returns:
        What became of each output, in the order of the job.

    Raises:
        QconvError: any of its kinds; see `errors`.
    """
    for output in job.outputs:
        check_output(output.out, job.overwrite)
        check_inputs(output.out, [job.base, job.adapter])
        for other in job.outputs:
            check_beside(output.out, job.report_folder(other))
    device = resolve_device(job.device)
    with TIMELINE.stage("prepare"):
        source = open_checkpoint(job.base, job.revision)
        reference = load_reference(source, job.adapter, job.trained_on)
        merged = reference.merged
        linears = linear_weights(merged) if any(output.quantization for output in job.outputs) else []
        layouts = [plan_layout(merged, o.dtype, o.quantization, linears if o.quantization else []) for o in job.outputs]
        adapter_folder = resolve_folder(job.adapter) if job.adapter else None
        tokenizer = tokenizer_folder(source.folder, adapter_folder)
        _check_before_work(job, reference, merged, tokenizer, job.adapter is not None)
        calibration, calibration_text = _calibration_rows(job, merged, tokenizer, progress)
    for line in describe_plan(job, reference, layouts):
        progress.say(line)
    writers = [
        CheckpointWriter(o.out, layout.specs, o.max_shard_bytes, job.overwrite, with_digests=True)
        for o, layout in zip(job.outputs, layouts, strict=True)
    ]
    check_room(writers)
    with ExitStack() as stack, Provenance(_inputs(reference)) as digests:
        makings = [
            _Making(output=output, layout=layout, writer=stack.enter_context(writer), counts=Counter())
            for output, layout, writer in zip(job.outputs, layouts, writers, strict=True)
        ]
        for making in makings:
            writer, layout = making.writer, making.layout
            writer.write_json("config.json", layout.config)
            for file_name, content in layout.extra_files.items():
                writer.write_json(file_name, content)
            writer.copy_files(side_files(source.folder, adapter_folder))
        blocks = _quantized_blocks(job, makings, merged, calibration, device, progress)
        write_tensors(makings, merged, blocks, progress, device)
        documents = []
        for making in makings:
            writer, output = making.writer, making.output
            writer.finish_tensors()
            digests.add("candidate", writer.partial, writer.digests)
            facts = stages(job, output, reference, merged, making.layout, calibration, calibration_text, making.counts)
            documents.append(_judge_output(job, output, reference, writer.partial, facts, digests, device, progress))
            with TIMELINE.stage("report"):
                write_reports(writer.partial, documents[-1], (JSON_NAME, MARKDOWN_NAME, HTML_NAME))
                writer.write_text("README.md", model_card(documents[-1], job, output, reference))
        with TIMELINE.stage("publish"):
            outcomes = tuple(
                Outcome(document=document, folder=_publish(making.writer, making.output.out, str(document["verdict"])))
                for making, document in zip(makings, documents, strict=True)
            )
    for output, outcome in zip(job.outputs, outcomes, strict=True):
        folder = job.report_folder(output)
        if folder is not None:
            make_report_folder(folder)
            write_reports(folder, outcome.document)
    return outcomes


def check_before_training(job: MergeJob) -> None:
    """Raises what `run` would refuse of base, text and outputs before the adapter of the job exists.

    Raises:
        QconvError: any of its kinds; see `errors`.
    """
    resolve_device(job.device)
    source = open_checkpoint(job.base, job.revision)
    reference = load_reference(source, None, None)
    linears = linear_weights(reference.merged)
    for output in job.outputs:
        plan_layout(reference.merged, output.dtype, output.quantization, linears if output.quantization else [])
    tokenizer = tokenizer_folder(source.folder, None)
    _check_before_work(job, reference, reference.merged, tokenizer, has_adapter=True)
    _calibration_rows(job, reference.merged, tokenizer, QUIET)


def _publish(writer: CheckpointWriter, out: Path, verdict: str) -> Path:
    """Where the output is now: in its place, or aside when it missed a gate."""
    if verdict not in ("pass", "not gated"):
        return writer.reject()
    writer.commit()
    return out


def _inputs(reference: Reference | None) -> dict[str, Path | None]:
    """The folders of a reference, for their digests."""
    adapter = None if reference is None else reference.adapter
    return {
        "reference": reference.source.folder if reference else None,
        "adapter": Path(adapter.location) if adapter else None,
    }


def _judge_output(
    job: MergeJob,
    output: OutputConfig,
    reference: Reference,
    stored: Path,
    facts: Mapping[str, Any],
    digests: Provenance,
    device: str,
    progress: Progress,
) -> dict[str, Any]:
    """The report on what was just written, read back from its bytes."""
    command = "merge" if job.adapter else "quantize" if output.quantization else "convert"
    config = job.validation
    if config is None:
        return conclude(
            command, subject(job, output), device, stages=facts, provenance=digests.result(), progress=progress
        )
    name = f"{output.out} " if len(job.outputs) > 1 else ""
    progress.say(f"validating {name}on {config.tokens} tokens of {config.source}")
    candidate = Candidate.of(open_checkpoint(stored))
    fidelity = measure_fidelity(reference, candidate, config, device, progress)
    return conclude(
        command,
        subject(job, output),
        device,
        config=config,
        fidelity=fidelity,
        rules=rules_for(candidate, reference.adapter is not None, config),
        stages=facts,
        provenance=digests.result(),
        tasks=_tasks(reference, candidate, fidelity, config, device, progress),
        progress=progress,
    )


def validate(job: ValidateJob, progress: Progress = QUIET) -> Outcome:
    """Compares an existing candidate folder with base + unmerged adapter, or with a cache of their outputs.

    Raises:
        QconvError: any of its kinds; see `errors`.
    """
    device = resolve_device(job.device)
    config = job.validation
    make_report_folder(job.report_dir)
    reference = None
    if job.reference is not None:
        reference = load_reference(open_checkpoint(job.reference), job.adapter, job.trained_on)
        check_rules(reference, config, reference.adapter is not None)
    candidate = None if job.candidate is None else load_candidate(job.candidate, job.candidate_adapter)
    with Provenance(_inputs(reference) | {"candidate": candidate.source.folder if candidate else None}) as digests:
        fidelity = _measure(job, reference, candidate, device, progress)
        tasks = _tasks(reference, candidate, fidelity, config, device, progress) if reference and candidate else []
        has_merge = fidelity.facts["merge"] is not None
        has_findings = fidelity.is_audited or any(finding["severity"] == "error" for finding in fidelity.findings)
        document = conclude(
            "validate",
            {
                "reference": job.reference or f"cached in {job.reference_cache}",
                "adapter": job.adapter,
                "candidate": job.candidate,
                "candidate_adapter": job.candidate_adapter,
                "target": candidate.view.kind if candidate else None,
            },
            device,
            config=config,
            fidelity=fidelity,
            rules=rules_for(candidate, has_merge, config, has_findings) if candidate else (),
            provenance=digests.result(),
            tasks=tasks,
            progress=progress,
        )
    if job.report_dir is not None:
        write_reports(job.report_dir, document)
    return Outcome(document=document)


def _measure(
    job: ValidateJob, reference: Reference | None, candidate: Candidate | None, device: str, progress: Progress
) -> Fidelity:
    cache, config = job.reference_cache, job.validation
    if cache is None:
        assert reference is not None  # the job checked it
        assert candidate is not None
        return measure_fidelity(reference, candidate, config, device, progress)
    if reference is not None and not cache.exists():
        return write_cached(cache, reference, candidate, config, device, progress)
    if candidate is None:
        raise UsageError(f"{cache}: exists already; add --candidate to use it, or remove it to write it anew")
    return measure_cached(cache, reference, candidate, config, device, progress)


def _tasks(
    reference: Reference,
    candidate: Candidate,
    fidelity: Fidelity,
    config: ValidationConfig,
    device: str,
    progress: Progress,
) -> list[dict[str, Any]]:
    ready = fidelity.models  # the same models that were compared; none when the reference came from a cache
    models = {
        "reference": lambda: ready[0] if ready else reference_model(reference, reference.base, device, False)[0],
        "candidate": lambda: (
            ready[1] if ready else candidate_model(candidate, candidate.view, device, False, config.engine)[0]
        ),
    }
    tokenizer = reference_tokenizer(reference) or candidate.source.folder
    return run_tasks(models, tokenizer, config, device, progress)


def _check_before_work(
    job: MergeJob, reference: Reference, merged: Checkpoint, tokenizer: Path, has_adapter: bool
) -> None:
    """Raises now what the run would otherwise raise after hours."""
    make_report_folder(job.report_dir)
    if job.validation is not None:
        check_rules(reference, job.validation, has_adapter)
        check_vocabulary(evaluation_rows(tokenizer, job.validation)[0].ids_TS, merged, tokenizer)
    quantized = any(output.quantization is not None for output in job.outputs)
    if job.validation is not None or (quantized and _stored_blocks(job.outputs, merged, "cpu") is None):
        # From headers alone: can this model be run block by block?
        StreamedModel(merged, "cpu", config_dtype(merged.config))


def _stored_blocks(outputs: Iterable[OutputConfig], view: Checkpoint, device: str) -> StoredBlocks | None:
    """Blocks for outputs that look at their weights alone; None where one has to run them, or to ask transformers."""
    return None if any(_is_calibrated(output) for output in outputs) else StoredBlocks.of(view, device)


def _is_calibrated(output: OutputConfig) -> bool:
    return output.quantization is not None and output.quantization.needs_calibration


def _calibration_rows(
    job: MergeJob, view: Checkpoint, folder: Path, progress: Progress
) -> tuple[torch.Tensor | None, str]:
    """Token rows, and in words what they were cut from; None where none are needed."""
    if not any(_is_calibrated(output) for output in job.outputs):
        return None, ""
    config = job.calibration
    tokenizer = corpus.load_tokenizer(folder)
    text = load_mixture(config.sources, tokenizer)
    for line in text.summary().splitlines():
        progress.say(line)
    if job.validation is not None:
        held_out = corpus.load_documents(job.validation.source, tokenizer)
        for part in text.parts:
            corpus.check_disjoint(part, held_out)
    rows_TS = pack_mixture(text, tokenizer, config.samples, config.seq_len, config.seed).ids_TS
    check_vocabulary(rows_TS, view, folder)
    return rows_TS, text.summary()


def _quantized_blocks(
    job: MergeJob,
    makings: Sequence[_Making],
    view: Checkpoint,
    calibration: torch.Tensor | None,
    device: str,
    progress: Progress,
) -> Iterator[QuantizedBlock]:
    requests = [
        QuantizeRequest(
            config=making.output.quantization,
            scheme=making.layout.scheme,
            weights=making.layout.quantized,
            storage=making.layout.storage,
            model_type=str(view.config.get("model_type")),
            gpu_memory_limit=job.gpu_memory_limit,
            counts=making.counts,
        )
        for making in makings
        if making.output.quantization is not None and making.layout.scheme is not None
    ]
    if not requests:
        return
    # Without calibration no block is run, and stored ones can do what is asked of the model.
    running = [request for request in requests if request.config.needs_calibration] or requests
    model = _stored_blocks(job.outputs, view, device) or StreamedModel(view, device, running[0].storage)
    yield from quantize_blocks(model, requests, calibration, progress)
