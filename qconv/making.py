"""Outputs on their way: what quantizing is asked for each, what lies beside its tensors, and where it ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qconv.account import cache_facts, cache_line
from qconv.assemble import Filling
from qconv.config import MergeJob, OutputConfig
from qconv.convert import DequantizedCheckpoint
from qconv.gguf import IMATRIX_NAME, model_file, write_imatrix
from qconv.importance import input_squares
from qconv.onnx_export import export
from qconv.plan import Plan, stored_blocks
from qconv.progress import Progress
from qconv.quantize.blocks import QuantizedBlock, QuantizeRequest, quantize_blocks
from qconv.quantize.zeros import ZeroMoves
from qconv.runners import Reference
from qconv.side_files import side_files
from qconv.streaming import StreamedModel
from qconv.types import Checkpoint, QuantizedLinear


@dataclass(frozen=True, kw_only=True)
class Making(Filling):
    """One output on its way.

    Attributes:
        counts: how often something was done that the report says.
        expert_tokens: by layer, how many calibration tokens chose each expert.
        cache_scales: of keys and values, by attention.
        zero_moves: what moving zero points changed.
    """

    output: OutputConfig
    counts: Counter[str] = field(default_factory=Counter)
    expert_tokens: dict[str, list[int]] = field(default_factory=dict)
    cache_scales: dict[str, tuple[float, float]] = field(default_factory=dict)
    zero_moves: ZeroMoves = field(default_factory=ZeroMoves)

    def write_beside(self, plan: Plan) -> None:
        """All of its files but its tensors and reports."""
        writer, layout = self.writer, self.layout
        writer.write_json("config.json", layout.config)
        for file_name, content in layout.extra_files.items():
            writer.write_json(file_name, content)
        if layout.gguf is not None and plan.vocabulary is not None:
            writer.write_text("Modelfile", model_file(layout.gguf.file_name, plan.vocabulary.turns))
        writer.copy_files(side_files(plan.reference.source.folder, plan.adapter_folder))

    def finish(self, progress: Progress) -> dict[str, Any]:
        """Completes its tensors; gives what the report says of its making, the ONNX graph under ``onnx``."""
        self.writer.finish_tensors()
        built = export(self.writer.partial, self.layout, progress) if self.layout.onnx is not None else None
        if self.cache_scales:
            progress.say(f"{self.output.out}: {cache_line(self.cache_scales)}")
        if self.zero_moves.groups:
            progress.say(f"{self.output.out}: {self.zero_moves.line()}")
        return {
            "onnx": built,
            "calibration_tokens_of_experts": self.expert_tokens,
            "key-value cache": self.cache_scales and cache_facts(self.cache_scales),
            "zero points": self.zero_moves.groups and self.zero_moves.facts(),
        }

    def publish(self, verdict: str) -> Path:
        """Where it is now: in its place, or aside when it missed a gate."""
        if verdict not in ("pass", "not gated"):
            return self.writer.reject()
        self.writer.commit()
        return self.output.out


def quantized_blocks(
    job: MergeJob, makings: Sequence[Making], plan: Plan, view: Checkpoint, device: str, progress: Progress
) -> Iterator[QuantizedBlock]:
    """Decoder blocks of the model in ``view``, quantized as each output has them."""
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
            cache_scales=making.cache_scales,
            kept=_kept_codes(plan.reference) if making.output.quantization.keeps_codes else None,
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
    yield from quantize_blocks(model, requests, plan.calibration, progress)


def _kept_codes(reference: Reference) -> Callable[[str, str], QuantizedLinear]:
    """Reads the codes of the base's linears, by the weight's name on a device."""
    base = reference.base
    assert isinstance(base, DequantizedCheckpoint)  # the layout was planned with its schemes
    return lambda weight, device: base.read_quantized(weight.removesuffix(".weight"), device)


def write_importance(
    job: MergeJob, makings: Sequence[Making], plan: Plan, view: Checkpoint, device: str, progress: Progress
) -> None:
    """llama.cpp's importance matrix, beside the files that it is asked for."""
    asking = [making for making in makings if making.output.quantization and making.output.quantization.imatrix]
    if not asking:
        return
    calibration = plan.calibration
    assert calibration is not None  # a job with such an output asks for it
    squares = input_squares(view, calibration, asking[0].layout.storage, device, progress)
    for making in asking:
        assert making.layout.gguf is not None  # it is for such targets alone
        file = making.writer.partial / IMATRIX_NAME
        write_imatrix(file, making.layout.gguf, squares, job.calibration.sources, *calibration.shape)
        making.counts["tokens of the importance matrix"] = calibration.numel()
