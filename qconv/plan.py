"""What a job is going to do, decided and checked before the work: whatever can be refused is refused here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qconv import corpus
from qconv.adapter_configs import AdapterOptions
from qconv.checkpoint import open_checkpoint
from qconv.config import MergeJob, OutputConfig
from qconv.convert import DequantizedCheckpoint
from qconv.convert.dequantize import CONV1D_MODELS
from qconv.decoder_shape import DecoderShape
from qconv.errors import concerning
from qconv.evaluation import check_vocabulary, evaluation_rows
from qconv.gating import check_rules
from qconv.gguf import EMBEDDING, GgufPlan, Vocabulary, vocabulary_of
from qconv.held_out import held_out_rows
from qconv.inputs import load_reference
from qconv.layout import Layout, config_dtype, plan_layout
from qconv.mixture import load_mixture, pack_mixture
from qconv.outcome import check_report_folder
from qconv.progress import QUIET, Progress
from qconv.runners import Reference
from qconv.side_files import template_file, tokenizer_folder
from qconv.skeleton import StoredBlocks, linear_weights
from qconv.streaming import StreamedModel
from qconv.tensor_parallel import check_parallel, parallel_linears
from qconv.types import Checkpoint, Scheme
from qconv.validate.peft_layers import check_peft
from qconv.work_folder import check_beside, check_inputs, check_output, check_place
from qconv.writer import CheckpointWriter, PlannedFile


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
        vocabulary: of GGUF outputs.
        warnings: what engines will run slower, or only in some releases, on the GPUs that the job names; what texts
            llama.cpp tokenizes otherwise.
    """

    reference: Reference
    adapter_folder: Path | None
    layouts: Sequence[Layout]
    writers: Sequence[CheckpointWriter]
    calibration: torch.Tensor | None
    calibration_text: str
    vocabulary: Vocabulary | None = None
    warnings: tuple[str, ...] = ()


def make_plan(job: MergeJob, progress: Progress, adapter_comes: bool = False) -> Plan:
    """Opens what a job reads, from headers alone, and plans what it writes.

    Args:
        adapter_comes: the job has no adapter yet, and gets one before it runs.

    Raises:
        QconvError: any of its kinds; see `errors`.
    """
    for number, output in enumerate(job.outputs):
        with concerning("outputs", str(number), "out"):
            _check_folder(job, output)
    with concerning("base"):
        source = open_checkpoint(job.base, job.revision)
    with concerning("combine" if job.combination is not None else "adapter"):
        reference = load_reference(source, job.adapter, job.trained_on, job.combination, job.options)
    merged = reference.merged
    with concerning("base"):
        linears = linear_weights(merged) if any(output.quantization for output in job.outputs) else []
    layouts = []
    for number, output in enumerate(job.outputs):
        with concerning("outputs", str(number)):
            some = linears if output.quantization else []
            layouts.append(plan_layout(merged, output.dtype, output.quantization, some, kept_schemes(reference)))
    with concerning("tp"):
        warnings = _parallel_warnings(job, merged, layouts)
    adapter_folder = reference.side_folder
    tokenizer = tokenizer_folder(source.folder, adapter_folder)
    _check_before_work(job, reference, merged, tokenizer, adapter_comes or reference.adapter is not None)
    if any(output.is_onnx for output in job.outputs):
        with concerning("base"):
            corpus.load_tokenizer(tokenizer)  # for the text that the graph is run on
    with concerning("calibration"):
        calibration, calibration_text = _calibration_rows(job, merged, tokenizer, progress)
    vocabulary = None
    if any(layout.gguf is not None for layout in layouts):
        vocabulary = gguf_vocabulary(merged, source.folder, adapter_folder)
        warnings += () if vocabulary.warning is None else (vocabulary.warning,)
    writers = [
        CheckpointWriter(
            output.out,
            layout.specs,
            output.max_shard_bytes,
            job.overwrite,
            with_digests=True,
            files=None
            if vocabulary is None or layout.gguf is None
            else [gguf_file(layout.gguf, vocabulary, output.out)],
            made_of_them=layout.built_bytes,
        )
        for output, layout in zip(job.outputs, layouts, strict=True)
    ]
    return Plan(
        reference=reference,
        adapter_folder=adapter_folder,
        layouts=layouts,
        writers=writers,
        calibration=calibration,
        calibration_text=calibration_text,
        vocabulary=vocabulary,
        warnings=warnings,
    )


def kept_schemes(reference: Reference) -> Mapping[str, Scheme]:
    """Of the linears whose integer codes an output may keep, by module."""
    return reference.base.schemes if isinstance(reference.base, DequantizedCheckpoint) else {}


def _check_folder(job: MergeJob, output: OutputConfig) -> None:
    check_output(output.out, job.overwrite)
    check_place(output.out)
    check_inputs(output.out, [job.base, *job.adapters])
    for other in job.outputs:
        check_beside(output.out, job.report_folder(other))


def _parallel_warnings(job: MergeJob, merged: Checkpoint, layouts: Sequence[Layout]) -> tuple[str, ...]:
    """Raises `SchemeError` for an output that does not divide by the GPUs of the job."""
    if job.tensor_parallel is None:
        return ()
    shape = DecoderShape.of(merged.config, merged.location)
    is_transposed = merged.config.get("model_type") in CONV1D_MODELS
    found = []
    for output, layout in zip(job.outputs, layouts, strict=True):
        stored = {name.removesuffix(".weight"): layout.layout_of(name) for name in layout.quantized}
        schemes = {name.removesuffix(".weight"): scheme for name, scheme in layout.schemes.items()}
        linears = parallel_linears(merged.specs(), stored, schemes, is_transposed)
        found += check_parallel(shape, linears, job.tensor_parallel, str(output.out))
    return tuple(dict.fromkeys(found))


def gguf_vocabulary(view: Checkpoint, base: Path, adapter: Path | None) -> Vocabulary:
    """The tokenizer and the chat template that lie beside other outputs, for a GGUF file.

    Raises:
        CheckpointError: a tokenizer that llama.cpp would not use alike.
    """
    folder = tokenizer_folder(base, adapter)
    tokenizer: Any = corpus.load_tokenizer(folder)
    template = template_file(base, adapter)
    if template is not None:
        text = template.read_text(encoding="utf-8")
        tokenizer.chat_template = text if template.suffix == ".jinja" else json.loads(text)["chat_template"]
    return vocabulary_of(tokenizer, view.specs()[EMBEDDING].shape[0], str(folder))


def gguf_file(plan: GgufPlan, vocabulary: Vocabulary, out: Path) -> PlannedFile:
    """The file of a GGUF output."""
    head, begins, num_bytes = plan.header(vocabulary, out.name)
    return PlannedFile(name=plan.file_name, head=head, begins=begins, num_bytes=num_bytes)


def plan_before_training(job: MergeJob, progress: Progress = QUIET) -> Plan:
    """What can be planned, and refused, of a job whose adapter is yet to be trained.

    Raises:
        QconvError: any of its kinds; see `errors`.
    """
    validation = None if job.validation is None else replace(job.validation, task_data=None)
    without = replace(job, adapter=None, trained_on=None, options=AdapterOptions(), validation=validation)
    plan = make_plan(without, progress, adapter_comes=True)
    if job.validation is not None and job.validation.task_data is not None:
        with concerning("validation", "task-data"):
            held_out_rows(plan.reference, job.validation, with_general=False)
    return plan


def _check_before_work(
    job: MergeJob, reference: Reference, merged: Checkpoint, tokenizer: Path, has_adapter: bool
) -> None:
    """Raises now what the run would otherwise raise after hours."""
    with concerning("report"):
        check_report_folder(job.report_dir)
    if job.validation is not None:
        with concerning("validation"):
            check_rules(reference, job.validation, has_adapter)
            check_vocabulary(evaluation_rows(tokenizer, job.validation)[0].ids_TS, merged, tokenizer)
        if reference.adapter is not None:
            with concerning("adapter"):
                check_peft(reference.adapter)
        if job.validation.task_data is not None:
            with concerning("validation", "task-data"):
                held_out_rows(reference, job.validation, with_general=False)
    quantized = any(output.quantization is not None for output in job.outputs)
    if job.validation is not None or (quantized and stored_blocks(job.outputs, merged, "cpu") is None):
        # From headers alone: can this model be run block by block?
        with concerning("base"):
            StreamedModel(merged, "cpu", config_dtype(merged.config))


def stored_blocks(outputs: Iterable[OutputConfig], view: Checkpoint, device: str) -> StoredBlocks | None:
    """Blocks for outputs that look at their weights alone; None where one has to run them, or to ask transformers."""
    return None if any(output.is_calibrated for output in outputs) else StoredBlocks.of(view, device)


def _calibration_rows(
    job: MergeJob, view: Checkpoint, folder: Path, progress: Progress
) -> tuple[torch.Tensor | None, str]:
    """Token rows, and in words what they were cut from; None where none are needed."""
    if not any(output.is_calibrated for output in job.outputs):
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
