"""The story: open, dequantize, merge, quantize, write, read back, compare, judge."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from qconv.account import combination_facts, describe_plan, stages
from qconv.assemble import write_tensors
from qconv.card import model_card
from qconv.config import MergeJob
from qconv.estimate_jobs import estimate_merge
from qconv.held_out import loss_facts, merge_losses
from qconv.inputs import resolve_device
from qconv.judging import hashed, judge_output
from qconv.making import Making, quantized_blocks, write_importance
from qconv.outcome import Outcome, Provenance, make_report_folder
from qconv.plan import make_plan
from qconv.progress import QUIET, Progress
from qconv.rank_sweep import with_rank
from qconv.report.document import HTML_NAME, JSON_NAME, MARKDOWN_NAME, write_reports
from qconv.runners import Reference
from qconv.timeline import TIMELINE
from qconv.width_choice import with_widths


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
        reference, merged = plan.reference, plan.reference.merged
    for line in describe_plan(job, reference, plan.layouts, device):
        progress.say(line)
    with TIMELINE.stage("interference"):
        of_all = {"combination": combination_facts(reference, device, progress), "rank": sweep and sweep.facts()}
    with ExitStack() as stack, Provenance(hashed(reference)) as digests:
        makings = [
            Making(output=output, layout=layout, writer=stack.enter_context(writer))
            for output, layout, writer in zip(job.outputs, plan.layouts, plan.writers, strict=True)
        ]
        for making in makings:
            making.write_beside(plan)
        blocks = quantized_blocks(job, makings, plan, merged, device, progress)
        write_tensors(makings, merged, blocks, progress, device)
        write_importance(job, makings, plan, merged, device, progress)
        if reference.dampening is not None:
            progress.say(reference.dampening.summary)
        of_all["held-out loss"] = _losses(job, reference, device, progress)
        documents = []
        for number, making in enumerate(makings):
            output, writer = making.output, making.writer
            own = making.finish(progress) | {"budget": number in choices and choices[number].facts()}
            digests.add("candidate", writer.partial, None if own["onnx"] else writer.digests)
            text = plan.calibration_text
            facts = stages(job, output, reference, merged, making.layout, plan.calibration, text, making.counts)
            facts |= {name: found for name, found in (own | of_all).items() if found}
            documents.append(judge_output(job, output, reference, writer.partial, facts, digests, device, progress))
            with TIMELINE.stage("report"):
                write_reports(writer.partial, documents[-1], (JSON_NAME, MARKDOWN_NAME, HTML_NAME))
                writer.write_text("README.md", model_card(documents[-1], job, output, reference, making.layout))
        with TIMELINE.stage("publish"):
            outcomes = tuple(
                Outcome(document=document, folder=making.publish(str(document["verdict"])))
                for making, document in zip(makings, documents, strict=True)
            )
    for output, outcome in zip(job.outputs, outcomes, strict=True):
        folder = job.report_folder(output)
        if folder is not None:
            make_report_folder(folder)
            write_reports(folder, outcome.document)
    return outcomes


def _losses(job: MergeJob, reference: Reference, device: str, progress: Progress) -> dict[str, Any]:
    if job.validation is None or job.validation.task_data is None:
        return {}
    losses = merge_losses(reference, job.validation, device, progress)
    for loss in losses:
        progress.say(loss.line())
    return loss_facts(losses)
