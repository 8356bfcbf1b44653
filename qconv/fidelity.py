"""Builds the models that a validation compares and measures them.

Reference = base + UNMERGED adapter, as training saw it. On a GPU with bitsandbytes and peft
installed and a 4-bit base, it runs their own kernels; otherwise the base is decoded by qconv
(bit-equal) and the adapter hangs beside it. Candidate = the stored bytes, read back.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qconv import corpus
from qconv.assemble import config_dtype
from qconv.checkpoint import SafetensorsCheckpoint
from qconv.config import ValidationConfig
from qconv.convert import dequantize
from qconv.errors import CheckpointError, UsageError
from qconv.merge import merge
from qconv.progress import Progress
from qconv.quantize.fp8 import fake_quantize_per_token
from qconv.skeleton import block_linears, text_config
from qconv.streaming import BlockModel, Decorate, StreamedModel
from qconv.types import Adapter, BnbKind, Checkpoint
from qconv.validate.compare import compare
from qconv.validate.reference import unmerged
from qconv.validate.report import measure
from qconv.validate.resident import load_resident, why_not_resident


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """What training produced.

    Attributes:
        source: the base as it lies on disk.
        base: the same as training saw it: decoded, or rounded to 4 bits and back.
        adapter: left unmerged, or None.
        kind: how training saw the base.
    """

    source: SafetensorsCheckpoint
    base: Checkpoint
    adapter: Adapter | None
    kind: BnbKind


def measure_fidelity(
    reference: Reference,
    candidate: SafetensorsCheckpoint,
    config: ValidationConfig,
    device: str,
    progress: Progress,
) -> dict[str, Any]:
    """Compares the stored candidate with the unmerged reference on held-out text.

    Raises:
        CheckpointError: the candidate has another vocabulary or depth, or no tokenizer.
        NumericsError: NaN or infinity in either model.
    """
    _check_alike(reference, candidate)
    ids_TS, evaluation = evaluation_tokens(candidate.folder, config)
    others: dict[str, BlockModel] = {"candidate": candidate_model(candidate, device)}
    model, evaluation["reference"] = reference_model(reference, device)
    if reference.adapter is not None:
        if _resizes_vocabulary(reference):
            evaluation["note"] = "the adapter resizes the vocabulary of the base: effect retained not measured"
        else:
            others["base"] = StreamedModel(reference.base, device, config_dtype(reference.base.config))
    rows = max(1, (4096 if device == "cpu" else 16384) // config.seq_len)
    comparison = compare(model, others, ids_TS, rows_per_batch=rows, progress=progress)
    return measure(comparison, evaluation)


def check_gates(reference: Reference, config: ValidationConfig) -> None:
    """Refuses a gate that nothing could be measured for; to be asked before the work.

    Raises:
        UsageError: an adapter gate without an adapter, or with one that resizes the vocabulary.
    """
    if config.min_effect is None:
        return
    if reference.adapter is None:
        raise UsageError("--min-effect needs an adapter: the effect retained is measured against the base without it")
    if _resizes_vocabulary(reference):
        raise UsageError("--min-effect: the adapter resizes the vocabulary, so the base cannot be compared with it")


def evaluation_tokens(folder: Path, config: ValidationConfig) -> tuple[Tensor, dict[str, Any]]:
    """Held-out rows ``[rows, seq_len]`` through the tokenizer of a folder, and their description.

    Raises:
        CalibrationError: text that is missing or too short.
        CheckpointError: no tokenizer.
    """
    documents = corpus.load_documents(config.source)
    tokenizer = corpus.load_tokenizer(folder)
    ids_TS = corpus.pack_tokens(documents, tokenizer, config.rows, config.seq_len, config.seed)
    digest = corpus.calibration_digest(ids_TS)
    return ids_TS, {"source": config.source, "seq_len": config.seq_len, "seed": config.seed, "sha256": digest}


def reference_model(reference: Reference, device: str) -> tuple[BlockModel, str]:
    """The reference and which implementation runs it, for the report."""
    adapter = reference.adapter
    is_quantized = dequantize(reference.source).kind.startswith("bnb-")  # else 16-bit, quantized as it is loaded
    num_bytes = sum(spec.num_bytes for spec in reference.source.specs().values()) // (1 if is_quantized else 3)
    reason = why_not_resident(device, reference.kind, num_bytes)
    if reason is None and _resizes_vocabulary(reference):
        reason = "the adapter resizes the vocabulary, and peft does not load it on the base as it is"
    if reason is None:
        folder = None if adapter is None else Path(adapter.location)
        model = load_resident(reference.source.folder, folder, reference.kind, is_quantized, device)
        return model, "bitsandbytes and peft kernels, adapter unmerged"
    return streamed_reference(reference, device), f"decoded by qconv, adapter unmerged ({reason})"


def streamed_reference(reference: Reference, device: str) -> StreamedModel:
    """The reference without anybody's 4-bit kernels: the decoded base, the adapter's branches beside it."""
    view, adapter = reference.base, reference.adapter
    decorate: Decorate | None = None
    if adapter is not None:
        # Whole replacements (biases, saved modules) join the view; low-rank updates stay beside it.
        view = merge(view, [dataclasses.replace(adapter, deltas={})])
        decorate = unmerged(adapter)
    return StreamedModel(view, device, config_dtype(view.config), decorate)


def candidate_model(candidate: SafetensorsCheckpoint, device: str) -> StreamedModel:
    view = dequantize(candidate)
    decorate = None
    if view.scheme is not None and view.scheme.dynamic_activations:
        decorate = _quantize_inputs(frozenset(view.quantized_modules))
    return StreamedModel(view, device, config_dtype(view.config), decorate)


def _quantize_inputs(modules: frozenset[str]) -> Decorate:
    """Engines quantize the inputs of FP8 linears per token at run time; so does the candidate."""

    def decorate(prefix: str, block: nn.Module) -> None:
        for name, linear in block_linears(block).items():
            if prefix + name in modules:
                linear.register_forward_pre_hook(lambda _, args: (fake_quantize_per_token(args[0]), *args[1:]))

    return decorate


def _merged(reference: Reference) -> Checkpoint:
    return merge(reference.base, [reference.adapter]) if reference.adapter else reference.base


def _resizes_vocabulary(reference: Reference) -> bool:
    """Whether the adapter brings tensors of other shapes; only embedding and head may have them."""
    merged = _merged(reference).specs()
    return any(merged[name].shape != spec.shape for name, spec in reference.base.specs().items())


def _check_alike(reference: Reference, candidate: Checkpoint) -> None:
    # As transformers reads them: families have names of their own for these, composite models a part for text.
    expected, found = text_config(_merged(reference)), text_config(candidate)
    for key in ("num_hidden_layers", "vocab_size", "hidden_size"):
        wanted, has = getattr(expected, key, None), getattr(found, key, None)
        if wanted != has:
            raise CheckpointError(
                f"{candidate.location}: config.json has {key} {has}, the reference "
                f"({reference.source.location}, with its adapter) has {wanted}; they are different models"
            )
