"""What a job is going to do, decided and checked before the work: whatever can be refused is refused here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qconv import corpus
from qconv.checkpoint import open_checkpoint
from qconv.config import MergeJob, OutputConfig
from qconv.evaluation import check_vocabulary, evaluation_rows
from qconv.gating import check_rules
from qconv.inputs import load_reference
from qconv.layout import Layout, config_dtype, plan_layout
from qconv.mixture import load_mixture, pack_mixture
from qconv.outcome import check_report_folder
from qconv.progress import QUIET, Progress
from qconv.runners import Reference
from qconv.side_files import tokenizer_folder
from qconv.skeleton import StoredBlocks, linear_weights
from qconv.streaming import StreamedModel
from qconv.types import Checkpoint
from qconv.validate.peft_layers import check_peft
from qconv.work_folder import check_beside, check_inputs, check_output
from qconv.writer import CheckpointWriter


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `make_plan` has decided.

    Attributes:
        reference: base and adapter, opened and checked.
        adapter_folder: whose tokenizer counts; None without an adapter that brings one.
        layouts: of the outputs, in their order.
        writers: the same; nothing is begun.
        calibration: token rows, or None where none are needed.
        calibration_text: in words, what they were cut from.
    """

    reference: Reference
    adapter_folder: Path | None
    layouts: Sequence[Layout]
    writers: Sequence[CheckpointWriter]
    calibration: torch.Tensor | None
    calibration_text: str


def make_plan(job: MergeJob, progress: Progress, adapter_comes: bool = False) -> Plan:
    """Opens what a job reads, from headers alone, and plans what it writes.

    Args:
        adapter_comes: the job has no adapter yet, and gets one before it runs.

    Raises:
        QconvError: any of its kinds; see `errors`.
    """
    for output in job.outputs:
        check_output(output.out, job.overwrite)
        check_inputs(output.out, [job.base, *job.adapters])
        for other in job.outputs:
            check_beside(output.out, job.report_folder(other))
    source = open_checkpoint(job.base, job.revision)
    reference = load_reference(source, job.adapter, job.trained_on, job.combination)
    merged = reference.merged
    linears = linear_weights(merged) if any(output.quantization for output in job.outputs) else []
    layouts = [plan_layout(merged, o.dtype, o.quantization, linears if o.quantization else []) for o in job.outputs]
    adapter_folder = reference.side_folder
    tokenizer = tokenizer_folder(source.folder, adapter_folder)
    _check_before_work(job, reference, merged, tokenizer, adapter_comes or reference.adapter is not None)
    calibration, calibration_text = _calibration_rows(job, merged, tokenizer, progress)
    writers = [
        CheckpointWriter(o.out, layout.specs, o.max_shard_bytes, job.overwrite, with_digests=True)
        for o, layout in zip(job.outputs, layouts, strict=True)
    ]
    return Plan(
        reference=reference,
        adapter_folder=adapter_folder,
        layouts=layouts,
        writers=writers,
        calibration=calibration,
        calibration_text=calibration_text,
    )


def plan_before_training(job: MergeJob, progress: Progress = QUIET) -> Plan:
    """What can be planned, and refused, of a job whose adapter is yet to be trained.

    Raises:
        QconvError: any of its kinds; see `errors`.
    """
    return make_plan(replace(job, adapter=None, trained_on=None), progress, adapter_comes=True)


def _check_before_work(
    job: MergeJob, reference: Reference, merged: Checkpoint, tokenizer: Path, has_adapter: bool
) -> None:
    """Raises now what the run would otherwise raise after hours."""
    check_report_folder(job.report_dir)
    if job.validation is not None:
        check_rules(reference, job.validation, has_adapter)
        if reference.adapter is not None:
            check_peft(reference.adapter)
        check_vocabulary(evaluation_rows(tokenizer, job.validation)[0].ids_TS, merged, tokenizer)
    quantized = any(output.quantization is not None for output in job.outputs)
    if job.validation is not None or (quantized and stored_blocks(job.outputs, merged, "cpu") is None):
        # From headers alone: can this model be run block by block?
        StreamedModel(merged, "cpu", config_dtype(merged.config))


def stored_blocks(outputs: Iterable[OutputConfig], view: Checkpoint, device: str) -> StoredBlocks | None:
    """Blocks for outputs that look at their weights alone; None where one has to run them, or to ask transformers."""
    return None if any(is_calibrated(output) for output in outputs) else StoredBlocks.of(view, device)


def is_calibrated(output: OutputConfig) -> bool:
    return output.quantization is not None and output.quantization.needs_calibration


def _calibration_rows(
    job: MergeJob, view: Checkpoint, folder: Path, progress: Progress
) -> tuple[torch.Tensor | None, str]:
    """Token rows, and in words what they were cut from; None where none are needed."""
    if not any(is_calibrated(output) for output in job.outputs):
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
