"""The stage of an estimate that compares a candidate with its reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod

import torch

from qconv.config import ValidationConfig
from qconv.estimate import Stage
from qconv.estimate_machine import file_bytes
from qconv.estimate_memory import Contest, Steps, comparing
from qconv.layout import block_number, config_dtype
from qconv.lineup import LEAST_FLOOR_ROWS, control_rows, fits_in_memory, rows_per_batch
from qconv.merge.leading_vectors import SMALL
from qconv.quantize.memory import ModelShape
from qconv.runners import Reference, resident_bytes
from qconv.streaming import StreamedModel
from qconv.types import TensorSpec


def comparison_stage(
    name: str,
    reference: Reference,
    *,
    candidate_specs: Mapping[str, TensorSpec] | None,
    candidate_dtype: torch.dtype,
    config: ValidationConfig,
    device: str,
    merges: bool,
    candidate_bytes: int = 0,
) -> Stage:
    """A comparison from shapes.

    Args:
        candidate_specs: tensors as they are stored, or will be; None without a candidate.
        candidate_dtype: that it runs in.
        merges: an adapter is merged for the controls, also one that is yet to come.
        candidate_bytes: of its files, where they exist; else what its tensors take.
    """
    merged = reference.merged
    model = StreamedModel(merged, "cpu", config_dtype(merged.config))
    shape = ModelShape.of(model, ())
    stored = {} if candidate_specs is None else candidate_specs
    elements = sum(prod(spec.shape) for spec in merged.specs().values())
    models = [elements * shape.itemsize] + ([] if candidate_specs is None else [elements * candidate_dtype.itemsize])
    heads = [model.head_bytes] * len(models)
    controls = control_rows(config)
    entrants = {"reference": config.rows, "floor": min(config.rows, max(LEAST_FLOOR_ROWS, controls // 2))}
    if candidate_specs is not None:
        entrants["candidate"] = config.rows
    if merges:
        entrants |= {"merged": controls, "base": controls}
    on_gpu = device.startswith("cuda")
    contest = Contest(
        block=shape,
        entrants=entrants,
        seq_len=config.seq_len,
        rows_per_batch=rows_per_batch(config, device),
        head_bytes=heads,
        vocabulary=model.head_bytes // max(1, shape.hidden_size * shape.itemsize),
        models_bytes=sum(models),
        keep=fits_in_memory(sum(models), device),
        whole=config.prompts is not None or bool(config.tasks),
        merges=merges,
        ahead_bytes=largest_stored_block(reference.source.specs()) + largest_stored_block(stored),
        resident_bytes=resident_bytes(reference, device) or 0,
    )
    steps = comparing(contest, on_gpu, torch.get_num_threads())
    host: Steps = steps
    if on_gpu:
        host = {"blocks": {"next block, page-locked": 2 * contest.ahead_bytes}}
    read = file_bytes(reference.source) + sum(file_bytes(adapter.tensors) for adapter in reference.adapters)
    rows = sum(entrants.values())
    return Stage(
        name=name,
        reads=read + (candidate_bytes or sum(spec.num_bytes for spec in stored.values())),
        host=host,
        gpu=steps if on_gpu else {},
        units={
            "compare": 2.0 * (elements + contest.vocabulary * shape.hidden_size) * rows * config.seq_len,
            **decompositions(reference),
        },
    )


def decompositions(reference: Reference, looks_for_intruders: bool = False) -> dict[str, float]:
    """The unit ``svd`` (N K min(N, K) of each decomposition) where weights are read once; nothing without any.

    Args:
        looks_for_intruders: scaled intruders are looked for, which is done once in a run: before and after the merge.
    """
    adapter = reference.adapter
    if adapter is None:
        return {}
    times = {name: 1 for name, delta in adapter.deltas.items() if delta.dropped}  # KaSA
    times |= {name: 1 for name, transform in adapter.transforms.items() if transform.kind == "OSF"}
    specs = reference.base.specs()
    work = [count * prod(specs[name].shape) * min(specs[name].shape) for name, count in times.items() if name in specs]
    if looks_for_intruders and reference.dampening is not None:
        changed = [specs[name].shape for name in (*adapter.deltas, *adapter.transforms) if name in specs]
        work += [2 * prod(shape) * min(*shape, SMALL) for shape in changed]
    return {"svd": float(sum(work))} if work else {}


def largest_stored_block(specs: Mapping[str, TensorSpec]) -> int:
    """Bytes on disk of the block that takes most."""
    sizes = Counter[int]()
    for name, spec in specs.items():
        number = block_number(name)
        if number is not None:
            sizes[number] += spec.num_bytes
    return max(sizes.values(), default=0)
