"""The story: open, dequantize, merge, quantize, write, read back, compare, judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qconv.account import combination_facts, describe_plan, model_card, stages, subject
from qconv.assemble import Filling, write_tensors
from qconv.cached_fidelity import measure_cached, write_cached
from qconv.checkpoint import open_checkpoint
from qconv.config import MergeJob, OutputConfig, ValidateJob, ValidationConfig
from qconv.convert import DequantizedCheckpoint
from qconv.estimate_jobs import estimate_merge
from qconv.evaluation import reference_tokenizer
from qconv.fidelity import Fidelity, measure_fidelity
from qconv.gating import check_rules, rules_for
from qconv.gguf import IMATRIX_NAME, model_file, write_imatrix
from qconv.held_out import loss_facts, merge_losses
from qconv.importance import input_squares
from qconv.inputs import load_candidate, load_reference, resolve_device
from qconv.onnx_export import export
from qconv.outcome import Outcome, Provenance, conclude, make_report_folder, run_tasks
from qconv.plan import Plan, make_plan, stored_blocks
from qconv.progress import QUIET, Progress
from qconv.quantize.blocks import QuantizedBlock, QuantizeRequest, quantize_blocks
from qconv.quantize.zeros import ZeroMoves
from qconv.rank_sweep import with_rank
from qconv.report.document import HTML_NAME, JSON_NAME, MARKDOWN_NAME, write_reports
from qconv.runners import Candidate, Reference, candidate_model, reference_model
from qconv.side_files import side_files
from qconv.streaming import StreamedModel
from qconv.timeline import TIMELINE
from qconv.types import Checkpoint, QuantizedLinear
from qconv.validate.fingerprint import Digests
from qconv.width_choice import with_widths
from qconv.writer import CheckpointWriter


@dataclass(frozen=True, kw_only=True)
class _Making(Filling):
    """One output on its way."""

    output: OutputConfig
    counts: Counter[str]
    expert_tokens: dict[str, list[int]]
    zero_moves: ZeroMoves


def run(job: MergeJob, progress: Progress = QUIET) -> tuple[Outcome, ...]:
    """Makes the outputs of a job, or leaves nothing: an error removes all that was begun.

    Each output is judged by itself: a missed gate moves it aside, and the others appear all the same. None appears
    before all are judged.

    Returns:
        What became of each output, in the order of the job.

    Raises:
        QconvError: any of its kinds; see `errors`.
    """
    device = resolve_device(job.device)
    job, sweep = with_rank(job, device, progress)
    job, choices = with_widths(job, device, progress)
    with TIMELINE.stage("prepare"):
        plan = make_plan(job, progress)
        for line in [*plan.warnings, *estimate_merge(job, plan, device, "").check()]:
            progress.say(f"warning: {line}")
        make_report_folder(job.report_dir)
        reference, merged, calibration = plan.reference, plan.reference.merged, plan.calibration
    for line in describe_plan(job, reference, plan.layouts, device):
        progress.say(line)
    with TIMELINE.stage("interference"):
        combined = combination_facts(reference, device, progress)
    with ExitStack() as stack, Provenance(_inputs(reference)) as digests:
        makings = [
            _Making(
                output=output,
                layout=layout,
                writer=stack.enter_context(writer),
                counts=Counter(),
                expert_tokens={},
                zero_moves=ZeroMoves(),
            )
            for output, layout, writer in zip(job.outputs, plan.layouts, plan.writers, strict=True)
        ]
        for making in makings:
            _write_beside(making, plan)
        blocks = _quantized_blocks(job, makings, reference, merged, calibration, device, progress)
        write_tensors(makings, merged, blocks, progress, device)
        _write_importance(job, makings, merged, calibration, device, progress)
        if reference.dampening is not None:
            progress.say(reference.dampening.summary)
        losses = _losses(job, reference, device, progress)
        documents = []
        for number, making in enumerate(makings):
            writer, output = making.writer, making.output
            writer.finish_tensors()
            built = export(writer.partial, making.layout, progress) if making.layout.onnx is not None else None
            digests.add("candidate", writer.partial, writer.digests if built is None else None)
            facts = stages(
                job, output, reference, merged, making.layout, calibration, plan.calibration_text, making.counts
            )
            if making.zero_moves.groups:
                progress.say(f"{output.out}: {making.zero_moves.line()}")
            further = {
                "onnx": built,
                "calibration_tokens_of_experts": making.expert_tokens,
                "zero points": making.zero_moves.groups and making.zero_moves.facts(),
                "budget": number in choices and choices[number].facts(),
                "combination": combined,
                "rank": sweep and sweep.facts(),
                "held-out loss": losses,
            }
            facts |= {name: found for name, found in further.items() if found}
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


def _write_beside(making: _Making, plan: Plan) -> None:
    """All of an output's files but its tensors and reports."""
    writer, layout = making.writer, making.layout
    writer.write_json("config.json", layout.config)
    for file_name, content in layout.extra_files.items():
        writer.write_json(file_name, content)
    if layout.gguf is not None and plan.vocabulary is not None:
        writer.write_text("Modelfile", model_file(layout.gguf.file_name, plan.vocabulary.turns))
    writer.copy_files(side_files(plan.reference.source.folder, plan.adapter_folder))


def _write_importance(
    job: MergeJob,
    makings: Sequence[_Making],
    view: Checkpoint,
    calibration: torch.Tensor | None,
    device: str,
    progress: Progress,
) -> None:
    """llama.cpp's importance matrix, beside the files that it is asked for."""
    asking = [making for making in makings if making.output.quantization and making.output.quantization.imatrix]
    if not asking:
        return
    assert calibration is not None  # the plan has read it
    squares = input_squares(view, calibration, asking[0].layout.storage, device, progress)
    for making in asking:
        assert making.layout.gguf is not None  # it is for such targets alone
        file = making.writer.partial / IMATRIX_NAME
        write_imatrix(file, making.layout.gguf, squares, job.calibration.sources, *calibration.shape)
        making.counts["tokens of the importance matrix"] = calibration.numel()


def _losses(job: MergeJob, reference: Reference, device: str, progress: Progress) -> dict[str, Any]:
    if job.validation is None or job.validation.task_data is None:
        return {}
    losses = merge_losses(reference, job.validation, device, progress)
    for loss in losses:
        progress.say(loss.line())
    return loss_facts(losses)


def _publish(writer: CheckpointWriter, out: Path, verdict: str) -> Path:
    """Where the output is now: in its place, or aside when it missed a gate."""
    if verdict not in ("pass", "not gated"):
        return writer.reject()
    writer.commit()
    return out


def _inputs(reference: Reference | None) -> dict[str, Path | None]:
    """The folders of a reference, for their digests."""
    if reference is None:
        return {"reference": None, "adapter": None}
    folders = reference.adapter_folders
    names = [f"adapter_{number}" for number in range(1, len(folders) + 1)] if len(folders) > 1 else ["adapter"]
    return {"reference": reference.source.folder, **dict(zip(names, folders, strict=False))}


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
    command = "merge" if job.adapters else "quantize" if output.is_quantized else "convert"
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
        reference = load_reference(open_checkpoint(job.reference), job.adapter, job.trained_on, options=job.options)
        check_rules(reference, config, reference.adapter is not None)
    candidate = None if job.candidate is None else load_candidate(job.candidate, job.candidate_adapter)
    with Provenance(_inputs(reference) | {"candidate": candidate.source.folder if candidate else None}) as digests:
        fidelity = _measure(job, reference, candidate, device, progress, digests.of)
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
    job: ValidateJob,
    reference: Reference | None,
    candidate: Candidate | None,
    device: str,
    progress: Progress,
    digests: Digests,
) -> Fidelity:
    cache, config = job.reference_cache, job.validation
    if cache is None:
        assert reference is not None  # the job checked it
        assert candidate is not None
        return measure_fidelity(reference, candidate, config, device, progress)
    if reference is not None and not cache.exists():
        return write_cached(cache, reference, candidate, config, device, progress, digests)
    return measure_cached(cache, reference, candidate, config, device, progress, digests)


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


def _quantized_blocks(
    job: MergeJob,
    makings: Sequence[_Making],
    reference: Reference,
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
            schemes=making.layout.schemes,
            head=making.layout.head,
            storage=making.layout.storage,
            model_type=str(view.config.get("model_type")),
            gpu_memory_limit=job.gpu_memory_limit,
            counts=making.counts,
            expert_tokens=making.expert_tokens,
            kept=_kept_codes(reference) if making.output.quantization.keeps_codes else None,
            zero_moves=making.zero_moves,
        )
        for making in makings
        if making.output.quantization is not None and making.layout.scheme is not None
    ]
    if not requests:
        return
    # Without calibration no block is run, and stored ones can do what is asked of the model.
    running = [request for request in requests if request.config.needs_calibration] or requests
    model = stored_blocks(job.outputs, view, device) or StreamedModel(view, device, running[0].storage)
    yield from quantize_blocks(model, requests, calibration, progress)


def _kept_codes(reference: Reference) -> Callable[[str, str], QuantizedLinear]:
    """Reads the codes of the base's linears, by the weight's name on a device."""
    base = reference.base
    assert isinstance(base, DequantizedCheckpoint)  # the layout was planned with its schemes
    return lambda weight, device: base.read_quantized(weight.removesuffix(".weight"), device)
