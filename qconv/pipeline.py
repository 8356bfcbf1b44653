"""The story: open, dequantize, merge, quantize, write, read back, compare, judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from qconv import corpus
from qconv.account import describe_plan, model_card, stages, subject
from qconv.assemble import write_tensors
from qconv.cached_fidelity import measure_cached, write_cached
from qconv.checkpoint import open_checkpoint, resolve_folder
from qconv.config import MergeJob, ValidateJob, ValidationConfig
from qconv.errors import UsageError
from qconv.evaluation import check_vocabulary, evaluation_rows, reference_tokenizer
from qconv.fidelity import Fidelity, measure_fidelity
from qconv.gating import check_rules, rules_for
from qconv.inputs import load_candidate, load_reference, resolve_device
from qconv.layout import Layout, config_dtype, plan_layout
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
from qconv.writer import CheckpointWriter


def run(job: MergeJob, progress: Progress = QUIET) -> Outcome:
    """Makes ``job.out``, or leaves nothing: an error removes what was begun, a missed gate moves it aside.

    Raises:
        QconvError: any of its kinds; see `errors`.
    """
    check_output(job.out, job.overwrite)
    check_inputs(job.out, [job.base, job.adapter])
    check_beside(job.out, job.report_dir)
    device = resolve_device(job.device)
    with TIMELINE.stage("prepare"):
        source = open_checkpoint(job.base, job.revision)
        reference = load_reference(source, job.adapter, job.trained_on)
        merged = reference.merged
        linears = linear_weights(merged) if job.quantization else []
        layout = plan_layout(merged, job.dtype, job.quantization, linears)
        adapter_folder = resolve_folder(job.adapter) if job.adapter else None
        tokenizer = tokenizer_folder(source.folder, adapter_folder)
        _check_before_work(job, reference, merged, tokenizer)
        calibration, calibration_text = _calibration_rows(job, merged, tokenizer, progress)
    for line in describe_plan(job, reference, layout):
        progress.say(line)
    counts: Counter[str] = Counter()
    with (
        CheckpointWriter(job.out, layout.specs, job.max_shard_bytes, job.overwrite, with_digests=True) as writer,
        Provenance(_inputs(reference)) as digests,
    ):
        writer.write_json("config.json", layout.config)
        for file_name, content in layout.extra_files.items():
            writer.write_json(file_name, content)
        writer.copy_files(side_files(source.folder, adapter_folder))
        blocks = _quantized_blocks(job, merged, layout, calibration, device, counts, progress)
        write_tensors(writer, merged, layout, blocks, progress, device)
        writer.finish_tensors()
        digests.add("candidate", writer.partial, writer.digests)
        facts = stages(job, reference, merged, layout, calibration, calibration_text, counts)
        document = _judge_output(job, reference, writer.partial, facts, digests, device, progress)
        with TIMELINE.stage("report"):
            write_reports(writer.partial, document, (JSON_NAME, MARKDOWN_NAME, HTML_NAME))
            writer.write_text("README.md", model_card(document, job, reference))
        folder = job.out
        with TIMELINE.stage("publish"):
            if document["verdict"] in ("pass", "not gated"):
                writer.commit()
            else:
                folder = writer.reject()
    if job.report_dir is not None:
        write_reports(job.report_dir, document)
    return Outcome(document=document, folder=folder)


def _inputs(reference: Reference | None) -> dict[str, Path | None]:
    """The folders of a reference, for their digests."""
    adapter = None if reference is None else reference.adapter
    return {
        "reference": reference.source.folder if reference else None,
        "adapter": Path(adapter.location) if adapter else None,
    }


def _judge_output(
    job: MergeJob,
    reference: Reference,
    stored: Path,
    facts: Mapping[str, Any],
    digests: Provenance,
    device: str,
    progress: Progress,
) -> dict[str, Any]:
    """The report on what was just written, read back from its bytes."""
    command = "merge" if job.adapter else "quantize" if job.quantization else "convert"
    config = job.validation
    if config is None:
        return conclude(command, subject(job), device, stages=facts, provenance=digests.result(), progress=progress)
    progress.say(f"validating on {config.tokens} tokens of {config.source}")
    candidate = Candidate.of(open_checkpoint(stored))
    fidelity = measure_fidelity(reference, candidate, config, device, progress)
    return conclude(
        command,
        subject(job),
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
        check_rules(reference, config)
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


def _check_before_work(job: MergeJob, reference: Reference, merged: Checkpoint, tokenizer: Path) -> None:
    """Raises now what the run would otherwise raise after hours."""
    make_report_folder(job.report_dir)
    if job.validation is not None:
        check_rules(reference, job.validation)
        check_vocabulary(evaluation_rows(tokenizer, job.validation)[0].ids_TS, merged, tokenizer)
    if job.validation is not None or (job.quantization is not None and _stored_blocks(job, merged, "cpu") is None):
        # From headers alone: can this model be run block by block?
        StreamedModel(merged, "cpu", config_dtype(merged.config))


def _stored_blocks(job: MergeJob, view: Checkpoint, device: str) -> StoredBlocks | None:
    """Blocks for a job that looks at their weights alone; None where it has to run them, or to ask transformers."""
    runs = job.quantization is None or job.quantization.needs_calibration
    return None if runs else StoredBlocks.of(view, device)


def _calibration_rows(
    job: MergeJob, view: Checkpoint, folder: Path, progress: Progress
) -> tuple[torch.Tensor | None, str]:
    """Token rows, and in words what they were cut from; None where none are needed."""
    if job.quantization is None or not job.quantization.needs_calibration:
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
    view: Checkpoint,
    layout: Layout,
    calibration: torch.Tensor | None,
    device: str,
    counts: Counter[str],
    progress: Progress,
) -> Iterator[QuantizedBlock]:
    if job.quantization is None or layout.scheme is None:
        return
    request = QuantizeRequest(
        config=job.quantization,
        scheme=layout.scheme,
        weights=layout.quantized,
        storage=layout.storage,
        model_type=str(view.config.get("model_type")),
        gpu_memory_limit=job.gpu_memory_limit,
        counts=counts,
    )
    # Without calibration no block is run, and stored ones can do what is asked of the model.
    model = _stored_blocks(job, view, device) or StreamedModel(view, device, layout.storage)
    yield from quantize_blocks(model, request, calibration, progress)
