"""The story: open, dequantize, merge, quantize, write, read back, compare, judge."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from qconv import corpus
from qconv.account import describe_plan, environment, stages, subject
from qconv.assemble import Layout, config_dtype, plan_layout, write_tensors
from qconv.checkpoint import (
    SafetensorsCheckpoint,
    open_checkpoint,
    resolve_folder,
)
from qconv.config import BNB_KINDS, MergeJob, ValidateJob
from qconv.convert import DequantizedCheckpoint, dequantize, simulate_training_base
from qconv.errors import AdapterError, CheckpointError, UsageError
from qconv.fidelity import Reference, check_gates, evaluation_tokens, measure_fidelity
from qconv.merge import load_adapter, merge
from qconv.progress import QUIET, Progress
from qconv.quantize.blocks import QuantizedBlock, QuantizeRequest, quantize_blocks
from qconv.side_files import side_files, tokenizer_folder
from qconv.skeleton import linear_weights
from qconv.streaming import StreamedModel
from qconv.types import Adapter, BnbKind, Checkpoint
from qconv.validate.report import JSON_NAME, MARKDOWN_NAME, Report, judge
from qconv.work_folder import check_inputs, check_output
from qconv.writer import CheckpointWriter


def run(job: MergeJob, progress: Progress = QUIET) -> Report:
    """Makes ``job.out``, or leaves nothing: an error removes what was begun, a missed gate moves it aside.

    Raises:
        QconvError: any of its kinds; see `errors`.
    """
    check_output(job.out, job.overwrite)
    check_inputs(job.out, [job.base, job.adapter])
    device = resolve_device(job.device)
    source = open_checkpoint(job.base, job.revision)
    reference = load_reference(source, job.adapter, job.trained_on)
    merged = merge(reference.base, [reference.adapter]) if reference.adapter else reference.base
    linears = linear_weights(merged) if job.quantization else []
    layout = plan_layout(merged, job.dtype, job.quantization, linears)
    adapter_folder = resolve_folder(job.adapter) if job.adapter else None
    tokenizer = tokenizer_folder(source.folder, adapter_folder)
    _check_before_work(job, reference, merged, tokenizer)
    calibration = _calibration_rows(job, merged, tokenizer)
    for line in describe_plan(job, reference, layout):
        progress.say(line)
    counts: Counter[str] = Counter()
    with CheckpointWriter(job.out, layout.specs, job.max_shard_bytes, job.overwrite) as writer:
        writer.write_json("config.json", layout.config)
        for file_name, content in layout.extra_files.items():
            writer.write_json(file_name, content)
        writer.copy_files(side_files(source.folder, adapter_folder))
        blocks = _quantized_blocks(job, merged, layout, calibration, device, counts, progress)
        write_tensors(writer, merged, layout, blocks, progress)
        writer.finish_tensors()
        fidelity = None
        if job.validation is not None:
            progress.say(f"validating on {job.validation.tokens} tokens of {job.validation.source}")
            stored = open_checkpoint(writer.partial)
            fidelity = measure_fidelity(reference, stored, job.validation, device, progress)
        report = Report(
            subject=subject(job, device),
            stages=stages(job, reference, merged, layout, calibration, counts),
            fidelity=fidelity,
            gates=judge(fidelity, job.validation) if fidelity and job.validation else [],
        )
        writer.write_text(JSON_NAME, report.to_json())
        writer.write_text(MARKDOWN_NAME, report.to_markdown())
        if report.verdict == "pass":
            writer.commit()
        else:
            writer.reject()
    return report


def validate(job: ValidateJob, progress: Progress = QUIET) -> Report:
    """Compares an existing candidate folder with base + unmerged adapter.

    Raises:
        QconvError: any of its kinds; see `errors`.
    """
    device = resolve_device(job.device)
    reference = load_reference(open_checkpoint(job.reference), job.adapter, job.trained_on)
    check_gates(reference, job.validation)
    candidate = open_checkpoint(job.candidate)
    if job.report_dir is not None:
        _make_folder(job.report_dir)
    fidelity = measure_fidelity(reference, candidate, job.validation, device, progress)
    compared = {
        "reference": job.reference,
        "adapter": job.adapter,
        "candidate": job.candidate,
        "environment": environment(device),
    }
    report = Report(subject=compared, fidelity=fidelity, gates=judge(fidelity, job.validation))
    if job.report_dir is not None:
        (job.report_dir / JSON_NAME).write_text(report.to_json(), encoding="utf-8")
        (job.report_dir / MARKDOWN_NAME).write_text(report.to_markdown(), encoding="utf-8")
    return report


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: the report cannot be written there ({error}); choose a folder") from error


def load_reference(source: SafetensorsCheckpoint, adapter_source: str | None, trained_on: BnbKind | None) -> Reference:
    """The base as training saw it, and the checked adapter.

    Raises:
        UsageError: a 16-bit base whose training quantization nobody recorded, or options that disagree.
        AdapterError: the adapter was trained on another kind of base than the one given.
    """
    base = dequantize(source)
    if adapter_source is None:
        if trained_on is not None:
            raise UsageError("--trained-on says how an adapter saw its base, and there is no adapter")
        return Reference(source=source, base=base, adapter=None, kind=_stored_kind(base))
    adapter = load_adapter(adapter_source, base)
    kind = _training_kind(base, adapter, trained_on)
    seen: Checkpoint = base
    if base.kind == "plain" and kind != "16bit":
        seen = simulate_training_base(base, kind, linear_weights(base), adapter.backend)
    return Reference(source=source, base=seen, adapter=adapter, kind=kind)


def _stored_kind(base: DequantizedCheckpoint) -> BnbKind:
    stored = base.kind.removeprefix("bnb-")
    return next((kind for kind in BNB_KINDS if kind == stored), "16bit")


def _training_kind(base: DequantizedCheckpoint, adapter: Adapter, trained_on: BnbKind | None) -> BnbKind:
    recorded = adapter.trained_on
    if trained_on and recorded and trained_on != recorded:
        raise UsageError(f"{adapter.location}: --trained-on {trained_on}, but the adapter's own record says {recorded}")
    kind = trained_on or recorded
    if base.kind != "plain":
        stored = _stored_kind(base)
        if kind is not None and kind != stored:
            raise AdapterError(
                f"{adapter.location}: trained on a base quantized as {kind}, but {base.location} is "
                f"stored as {stored}; "
                "give the base that the adapter was trained on"
            )
        return stored
    if kind is None:
        raise UsageError(
            f"{base.location} is a 16-bit base and {adapter.location} does not record how training saw it. "
            "Say which:\n"
            "  --trained-on nf4-dq  load_in_4bit with nf4 and double quantization (most QLoRA recipes)\n"
            "  --trained-on nf4     load_in_4bit with nf4, bnb_4bit_use_double_quant=False\n"
            "  --trained-on fp4-dq | fp4   the same with bnb_4bit_quant_type fp4 (the default of transformers is fp4)\n"
            "  --trained-on 16bit   plain LoRA on the 16-bit weights, nothing was quantized\n"
            "The adapter corrects the rounding that it was trained on. Merged into another rounding it drifts: "
            "KL 0.164 instead of 0.0016 nats per token on SmolLM2-135M (docs/quality.md)"
        )
    return kind


def _check_before_work(job: MergeJob, reference: Reference, merged: Checkpoint, tokenizer: Path) -> None:
    """Raises now what the run would otherwise raise after hours."""
    if job.validation is not None:
        check_gates(reference, job.validation)
        ids_TS, _ = evaluation_tokens(tokenizer, job.validation)
        check_vocabulary(ids_TS, merged, tokenizer)
    if job.validation is not None or job.quantization is not None:
        # From headers alone: can this model be run block by block?
        StreamedModel(merged, "cpu", config_dtype(merged.config))


def check_vocabulary(ids_TS: torch.Tensor, view: Checkpoint, tokenizer: Path) -> None:
    """Refuses a tokenizer that makes tokens which the model's embedding does not have."""
    size = view.config.get("vocab_size")
    if isinstance(size, int) and int(ids_TS.max()) >= size:
        raise CheckpointError(
            f"{tokenizer}: its tokenizer gives token {int(ids_TS.max())}, {view.location} has {size}; "
            "the tokenizer is from another model, or its new tokens were never trained"
        )


def _calibration_rows(job: MergeJob, view: Checkpoint, folder: Path) -> torch.Tensor | None:
    if job.quantization is None or not job.quantization.needs_calibration:
        return None
    config = job.calibration
    documents = corpus.load_documents(config.source)
    if job.validation is not None:
        corpus.check_disjoint(documents, corpus.load_documents(job.validation.source))
    tokenizer = corpus.load_tokenizer(folder)
    rows_TS = corpus.pack_tokens(documents, tokenizer, config.samples, config.seq_len, config.seed)
    check_vocabulary(rows_TS, view, folder)
    return rows_TS


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
        counts=counts,
    )
    rows = max(1, (4096 if device == "cpu" else 16384) // job.calibration.seq_len)
    batches = None if calibration is None else list(torch.split(calibration, rows))
    yield from quantize_blocks(StreamedModel(view, device, layout.storage), request, batches, progress)


def resolve_device(device: str) -> str:
    """``"auto"`` is CUDA where there is one.

    Raises:
        UsageError: CUDA was asked for and there is none, or the device is another one.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UsageError(f"--device takes cpu, cuda, cuda:N or auto, got {device!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device on this machine; use --device cpu or auto")
    return device
