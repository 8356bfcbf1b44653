"""The estimate of each kind of job, from what it has opened and planned; see `estimate.py`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from qconv.config import MergeJob, OutputConfig
from qconv.errors import CapacityError
from qconv.estimate import Estimate, Stage
from qconv.estimate_compare import comparison_stage, decompositions
from qconv.estimate_machine import file_bytes, machine_of, notes_of, replaced, tokenizer_bytes, usable_on_gpu
from qconv.estimate_memory import (
    Steps,
    Work,
    moving,
    process,
    quantizing,
    quantizing_by_weights,
    quantizing_on_gpu,
    writing_plain,
    writing_plain_on_gpu,
)
from qconv.layout import BNB_FORMATS, Layout, block_number, config_dtype, in_order
from qconv.plan import Plan
from qconv.quantization_config import QuantizationConfig
from qconv.quantize.memory import LIBRARIES, MemoryPlan, ModelShape, free_memory, is_shared_pass, plan_memory
from qconv.sensitivity import split_rows
from qconv.side_files import side_files, tokenizer_folder
from qconv.size_budget import together
from qconv.streaming import StreamedModel
from qconv.types import Checkpoint, TensorSpec
from qconv.writer import json_text, rooms_of

BUILDER_LIBRARIES = 900_000_000  # torch, transformers and onnxruntime-genai, in a process of their own
ENCODED_AT_ONCE = 300_000_000  # temporaries of encoding to bitsandbytes' 4 bits; see `convert/bnb_kernels.py`


@dataclass(frozen=True, kw_only=True)
class _Making:
    """What the stages of one job share.

    Attributes:
        changed: tensors that an adapter changes, or will.
        sources: bytes of each folder that is read.
    """

    job: MergeJob
    plan: Plan
    device: str
    merged: Checkpoint
    changed: Collection[str]
    sources: Sequence[int]

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def held(self, spec: TensorSpec) -> int:
        """Bytes of a tensor as the view gives it: float32 where the adapter adds to it."""
        return 4 * prod(spec.shape) if spec.name in self.changed else spec.num_bytes


def estimate_merge(
    job: MergeJob, plan: Plan, device: str, command: str, coming: int = 0, coming_changes: Collection[str] = ()
) -> Estimate:
    """What a planned job takes.

    Args:
        coming: bytes of an adapter that is trained before, for a job that has none yet.
        coming_changes: what that adapter will change.
    """
    reference, merged = plan.reference, plan.reference.merged
    changed = set(coming_changes) or set(getattr(merged, "changed", ()))
    adapters = [coming] if coming else [file_bytes(adapter.tensors) for adapter in reference.adapters]
    making = _Making(
        job=job,
        plan=plan,
        device=device,
        merged=merged,
        changed=changed,
        sources=[file_bytes(reference.source), *adapters],
    )
    running = job.validation is not None or any(output.is_calibrated for output in job.outputs)
    tokenizer = tokenizer_folder(reference.source.folder, plan.adapter_folder)
    stages = [Stage(name="prepare", units={"start running" if running else "start": 1.0})]
    for number, stage in enumerate(_making_stages(making)):
        units = {**stage.units, **decompositions(reference, looks_for_intruders=number == 0)}
        stages.append(replace(stage, units=units))
    problems: list[str] = []
    gpu_usable = usable_on_gpu(device)  # --gpu-memory is for quantizing, whose plan keeps to it
    if job.validation is not None:
        for output, layout in zip(job.outputs, plan.layouts, strict=True):
            stages.append(
                comparison_stage(
                    f"validate{_of(job, output)}",
                    reference,
                    candidate_specs={spec.name: spec for spec in layout.specs},
                    candidate_dtype=layout.storage,
                    config=job.validation,
                    device=device,
                    merges=bool(changed),
                )
            )
    return Estimate(
        command=command,
        device=device,
        stages=[_fitted(making, stage, problems) for stage in stages],
        process=process(running, tokenizer_bytes(tokenizer), making.on_gpu),
        rooms=rooms_of(plan.writers),
        replaced=replaced(job.overwrite, [output.out for output in job.outputs]),
        machine=machine_of(device),
        cores=torch.get_num_threads(),
        gpu_usable=gpu_usable,
        problems=problems,
        notes=[
            *notes_of(device),
            *plan.warnings,
            *(f"{output.out}: {text} (not taken)" for output in job.outputs for text in output.not_taken),
        ],
    )


def _fitted(making: _Making, stage: Stage, problems: list[str]) -> Stage:
    """A stage with its GPU plan; why there is none goes to ``problems``."""
    plan = making.plan
    what = stage.name.partition(" ")[0]
    if what not in ("quantize", "measure") or not making.on_gpu or plan.calibration is None:
        return stage
    try:
        found = _gpu_plan(making)
    except CapacityError as error:
        problems.append(str(error))
        return stage
    if what == "measure":  # its plan leaves room for the blocks beside it
        return replace(stage, gpu=quantizing_on_gpu(found))
    host = {"quantize": {**moving(making.sources, stage.writes, len(_in_blocks(making)), True)}}
    host["quantize"]["activations of the calibration, page-locked"] = found.host_bytes
    return replace(stage, gpu=quantizing_on_gpu(found), host=host)


def _gpu_plan(making: _Making) -> MemoryPlan:
    assert making.plan.calibration is not None
    rows, seq_len = making.plan.calibration.shape
    return plan_memory(
        _shape(making),
        rows,
        seq_len,
        _in_blocks(making),
        making.device,
        free_memory(making.device),
        making.job.gpu_memory_limit,
    )


def _making_stages(making: _Making) -> Iterator[Stage]:
    job, plan = making.job, making.plan
    pairs = list(zip(job.outputs, plan.layouts, strict=True))
    in_blocks = [(output, layout) for output, layout in pairs if layout.scheme is not None]
    for output, layout in in_blocks:
        if output.quantization is not None and output.quantization.budget is not None:
            yield _measure_stage(making, output, layout)
    if in_blocks:
        yield _quantize_stage(making, in_blocks)
    if any(output.quantization is not None and output.quantization.imatrix for output, _ in pairs):
        yield _importance_stage(making)
    for output, layout in pairs:
        if layout.scheme is None:
            yield _alone_stage(making, output, layout)
    for output, layout in pairs:
        if layout.onnx is not None:
            yield _build_stage(making, output, layout)


def _quantize_stage(making: _Making, pairs: Sequence[tuple[OutputConfig, Layout]]) -> Stage:
    plan = making.plan
    written = sum(_written(making, output) for output, _ in pairs)
    through = moving(making.sources, written, len(pairs), making.on_gpu)
    elements = sum(prod(spec.shape) for spec in making.merged.specs().values())
    parameters, source, largest, linears = _largest_block(making)
    units: dict[str, float] = {"merge": elements, "write": written}
    weights = sum(n * k for n, k in linears.values())
    for output, _ in pairs:
        assert output.quantization is not None
        algorithm = output.quantization.resolved_algorithm
        for unit in _units(algorithm):
            units[unit] = units.get(unit, 0.0) + weights
    steps: Steps
    if plan.calibration is None:
        steps = quantizing_by_weights(parameters, source, largest, _head(making))
    else:
        shape = _shape(making)
        rows, seq_len = plan.calibration.shape
        steps = quantizing(shape, rows, seq_len, _in_blocks(making))
        blocks = max(1, round(weights / max(1, sum(n * k for n, k in shape.stacks))))
        tokens = rows * seq_len
        gathers = any("gram" in output.statistics for output in _in_blocks(making))
        squares = gathers * sum(k * k for k in shape.grams)
        units["forward"] = blocks * tokens * (2.0 * _passes(_in_blocks(making)) * shape.parameters + squares)
        solved = float(blocks * sum(n * k * k for n, k in shape.stacks))
        for output, layout in pairs:
            assert output.quantization is not None
            if output.quantization.solves:
                floats = _share_of_floats(making, layout)
                for name, share in (("gptq", 1 - floats), ("gptq of floats", floats)):
                    units |= {name: units.get(name, 0.0) + share * solved} if share else {}
    gpu: dict[str, Mapping[str, int]] = {}
    if making.on_gpu and plan.calibration is None:
        gpu = {"solve": {"CUDA and its libraries": LIBRARIES, **dict(steps["solve"])}}
    outside = [_work(making, pairs[0][1], name) for name in in_order(making.merged) if block_number(name) is None]
    host = {"outside": writing_plain(outside, torch.get_num_threads())["write"]}
    host |= {} if making.on_gpu else steps
    return Stage(
        name="quantize",
        reads=sum(making.sources),
        writes=written,
        host={name: {**through, **terms} for name, terms in host.items()},
        gpu=gpu,
        units=units,
    )


def _share_of_floats(making: _Making, layout: Layout) -> float:
    """Of the quantized weights, which are in 4-bit floats."""
    specs = making.merged.specs()
    num = {is_fp4: sum(prod(specs[name].shape) for name, scheme in layout.schemes.items() if scheme.is_fp4 == is_fp4)
           for is_fp4 in (False, True)}  # fmt: skip
    return num[True] / sum(num.values())


def _measure_stage(making: _Making, output: OutputConfig, layout: Layout) -> Stage:
    """What each linear costs, for a budget: one more pass of quantizing, and blocks in float32 beside it."""
    quantizing_it = _quantize_stage(making, [(output, layout)])
    assert making.plan.calibration is not None
    _, compared_BS = split_rows(making.plan.calibration)
    num_units = len(together([name.removesuffix(".weight") for name in layout.quantized]))
    parameters, _, _, linears = _largest_block(making)
    weights, hidden = sum(n * k for n, k in linears.values()), _shape(making).hidden_size
    vocabulary = int(making.merged.config.get("vocab_size", 0))
    tokens = compared_BS.numel()
    # A swapped unit runs through half of the blocks on average, and then through the head.
    forward = tokens * num_units * (2.0 * weights / 2 + 2.0 * hidden * vocabulary)
    own = {
        "swapped hidden states": 4 * tokens * hidden * num_units,
        "block in float32": 4 * parameters,
        "logits": 3 * 4 * compared_BS.shape[1] * vocabulary,
    }
    units = {**quantizing_it.units, "write": 0.0}
    return replace(
        quantizing_it,
        name=f"measure{_of(making.job, output)}",
        writes=0,
        host={name: {**terms, **own} for name, terms in quantizing_it.host.items()},
        units={**units, "forward": units.get("forward", 0.0) + forward},
    )


def _importance_stage(making: _Making) -> Stage:
    """A forward pass over the calibration text."""
    assert making.plan.calibration is not None
    parameters, source, _, linears = _largest_block(making)
    tokens, itemsize = making.plan.calibration.numel(), config_dtype(making.merged.config).itemsize
    hidden = int(making.merged.config["hidden_size"])
    steps = {
        "activations of the calibration": tokens * hidden * itemsize,
        "block as read": source,
        "block in the compute dtype": parameters * itemsize,
    }
    return Stage(
        name="importance",
        reads=sum(making.sources),
        host={"forward": {**moving(making.sources, 0, 0, making.on_gpu), **steps}},
        gpu={"forward": {"CUDA and its libraries": LIBRARIES, **steps}} if making.on_gpu else {},
        units={"forward": 2.0 * tokens * sum(n * k for n, k in linears.values())},
    )


def _alone_stage(making: _Making, output: OutputConfig, layout: Layout) -> Stage:
    """A plain output, or one in bitsandbytes' 4 bits: reads everything for itself."""
    written = _written(making, output)
    through = moving(making.sources, written, 1, making.on_gpu)
    names = [name for name in in_order(making.merged) if name not in layout.quantized]
    works = [_work(making, layout, name) for name in names]
    steps = writing_plain_on_gpu(works) if making.on_gpu else writing_plain(works, torch.get_num_threads())
    specs = making.merged.specs()
    units = {"merge": float(sum(prod(spec.shape) for spec in specs.values())), "write": float(written)}
    if layout.format in BNB_FORMATS:
        largest = max(prod(specs[name].shape) for name in layout.quantized)
        encoding = {"linear in work": 8 * largest, "encoding": min(ENCODED_AT_ONCE, 36 * largest)}
        steps = {**steps, "encode": {**({"CUDA and its libraries": LIBRARIES} if making.on_gpu else {}), **encoding}}
        units["round"] = float(sum(prod(specs[name].shape) for name in layout.quantized))
    host = {"write": through} if making.on_gpu else {name: {**through, **terms} for name, terms in steps.items()}
    return Stage(
        name=f"write{_of(making.job, output)}",
        reads=sum(making.sources),
        writes=written,
        host=host,
        gpu=steps if making.on_gpu else {},
        units=units,
    )


def _build_stage(making: _Making, output: OutputConfig, layout: Layout) -> Stage:
    """The builder has the model as it is stored and as it will be, in a process of its own; then both are run."""
    return Stage(
        name=f"build ONNX{_of(making.job, output)}",
        reads=3 * layout.built_bytes,  # by the builder, to compare, and to run
        writes=layout.built_bytes,
        host={"build": {"model in the builder": 2 * layout.built_bytes, "libraries of the builder": BUILDER_LIBRARIES}},
        units={"start running": 1.0, "write": float(layout.built_bytes)},
    )


def _work(making: _Making, layout: Layout, name: str) -> Work:
    spec = making.merged.specs()[name]
    elements = prod(spec.shape)
    stored = elements * layout.storage.itemsize if spec.dtype.is_floating_point else spec.num_bytes
    is_changed, is_cast = name in making.changed, spec.dtype not in (layout.storage,)
    base = elements * config_dtype(making.merged.config).itemsize if is_changed else 0
    return Work(
        elements=elements, held=making.held(spec) + base + (stored if is_cast or is_changed else 0), stored=stored
    )


def _largest_block(making: _Making) -> tuple[int, int, int, dict[str, tuple[int, int]]]:
    """Elements and bytes of the largest block, elements of its largest linear, and all linears to quantize."""
    quantized = frozenset().union(*(layout.quantized for layout in making.plan.layouts))
    sizes: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    linears: dict[str, tuple[int, int]] = {}
    for name, spec in making.merged.specs().items():
        number = block_number(name)
        if number is not None:
            sizes[number][0] += prod(spec.shape)
            sizes[number][1] += making.held(spec)
        if name in quantized:
            linears[name] = (spec.shape[0], spec.shape[1])
    parameters, source = max(sizes.values(), default=[0, 0])
    inside = (n * k for name, (n, k) in linears.items() if block_number(name) is not None)
    return parameters, source, max(inside, default=0), linears


def _shape(making: _Making) -> ModelShape:
    """Of what is calibrated, with the bytes of blocks as an adapter that is yet to come will make them."""
    layout = next(layout for layout in making.plan.layouts if layout.scheme is not None)
    model = StreamedModel(making.merged, "cpu", layout.storage)
    weights = frozenset().union(*(layout.quantized for layout in making.plan.layouts))
    return replace(ModelShape.of(model, weights), source_bytes=_largest_block(making)[1])


def _passes(outputs: Sequence[QuantizationConfig]) -> int:
    """Forward passes of a block over the calibration, at most: looking at keys and values ends at the attention."""
    gathering, looking = any(output.statistics for output in outputs), sum(bool(o.kv_cache) for o in outputs)
    return gathering + 1 + (looking if is_shared_pass(outputs) else 0)


def _units(algorithm: str) -> list[str]:
    """What weights go through, beside the solver of GPTQ."""
    if algorithm == "gptq":
        return []
    return ["awq"] if algorithm.startswith(("awq", "smoothquant")) else ["fp8" if algorithm == "fp8" else "round"]


def _in_blocks(making: _Making) -> list[QuantizationConfig]:
    """Of the outputs that are made block by block."""
    return [
        output.quantization
        for output, layout in zip(making.job.outputs, making.plan.layouts, strict=True)
        if output.quantization is not None and layout.scheme is not None
    ]


def _head(making: _Making) -> tuple[int, int]:
    """Elements and bytes of an output head to quantize; zeros without one."""
    name = next((layout.head for layout in making.plan.layouts if layout.head is not None), None)
    if name is None:
        return 0, 0
    spec = making.merged.specs()[name]
    return prod(spec.shape), making.held(spec)


def _written(making: _Making, output: OutputConfig) -> int:
    """Bytes of a folder: weights and side files exactly, its JSON as it is written; reports come on top."""
    number = making.job.outputs.index(output)
    layout, writer = making.plan.layouts[number], making.plan.writers[number]
    files = side_files(making.plan.reference.source.folder, making.plan.adapter_folder)
    texts = [layout.config, *layout.extra_files.values()]
    return writer.weights_bytes + sum(file.stat().st_size for file in files) + sum(len(json_text(t)) for t in texts)


def _of(job: MergeJob, output: OutputConfig) -> str:
    return f" {output.out}" if len(job.outputs) > 1 else ""
