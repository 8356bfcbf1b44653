"""The estimate of a training, and of the adapter that it makes.

Memory is the base as it is loaded, adapter, gradients and the optimizer's state, activations of one forward pass and
the logits with their gradient. It was not measured beside real trainings, and says so in a note.

Legend: N = out features, K = in features, R = rank, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from qconv.checkpoint import open_checkpoint
from qconv.convert import dequantize
from qconv.disk_room import Room, rooms_for
from qconv.estimate import Estimate, Stage
from qconv.estimate_machine import file_bytes, machine_of, notes_of, replaced, tokenizer_bytes, usable_on_gpu
from qconv.estimate_memory import process
from qconv.layout import config_dtype
from qconv.quantize.memory import LIBRARIES, ModelShape
from qconv.skeleton import linear_weights
from qconv.streaming import StreamedModel
from qconv.train import Prepared, prepare
from qconv.training_config import TrainConfig
from qconv.types import Checkpoint
from qconv.writer import SIDE_BYTES

TRAINER_BYTES = 350_000_000  # peft, bitsandbytes and accelerate beside what a forward pass imports
OPERATIONS = 6  # of a weight and token: forward, and backward to the inputs, dequantizing beside it
SAVED_PER_LINEAR = 2  # activations kept for backward: a linear's input, and what the adapter's branch keeps
NOTE = "memory and time of training are derived from shapes and were not measured beside real trainings"


@dataclass(frozen=True, kw_only=True)
class Coming:
    """The adapter that a training will make: bytes of its weights, and the weights that it changes."""

    num_bytes: int
    changes: frozenset[str]


def adapter_to_come(config: TrainConfig) -> Coming:
    """What a training will make, from the headers of its base.

    Raises:
        CheckpointError: the base cannot be read.
    """
    return _coming(config, dequantize(open_checkpoint(config.base, config.revision)))


def _coming(config: TrainConfig, view: Checkpoint) -> Coming:
    linears = linear_weights(view)
    size = 4 * config.rank * sum(sum(view.specs()[name].shape) for name in linears)
    return Coming(num_bytes=size, changes=frozenset(linears))


def rooms_of_training(config: TrainConfig, coming: Coming) -> list[Room]:
    """What the adapter's folder needs of its disk."""
    return rooms_for({config.out: coming.num_bytes + SIDE_BYTES})


def estimate_training(config: TrainConfig, device: str) -> tuple[Estimate, Coming]:
    """What a training takes, and what it makes.

    Raises:
        QconvError: what the training itself would raise before its work.
    """
    ready = prepare(config)
    source = open_checkpoint(ready.folder)
    view = dequantize(source)
    model = StreamedModel(view, "cpu", config_dtype(view.config))
    coming = _coming(config, view)
    shapes = [view.specs()[name].shape for name in coming.changes]
    terms = _terms(config, ready, model, shapes, coming)
    on_gpu = device.startswith("cuda")
    elements = sum(prod(spec.shape) for spec in view.specs().values())
    tokens = config.steps * config.batch_size * config.gradient_accumulation * config.seq_len
    stage = Stage(
        name="train",
        reads=file_bytes(source),
        writes=coming.num_bytes + tokenizer_bytes(ready.folder),
        host={} if on_gpu else {"train": {"training libraries": TRAINER_BYTES, **terms}},
        gpu={"train": {"CUDA and its libraries": LIBRARIES, **terms}} if on_gpu else {},
        units={"start running": 1.0, "train": float(OPERATIONS * elements * tokens)},
    )
    estimate = Estimate(
        command="train",
        device=device,
        stages=[stage],
        process=process(True, tokenizer_bytes(ready.folder), on_gpu),
        rooms=rooms_of_training(config, coming),
        replaced=replaced(config.overwrite, [config.out]),
        machine=machine_of(device),
        cores=torch.get_num_threads(),
        gpu_usable=usable_on_gpu(device),
        notes=[NOTE, *notes_of(device)],
    )
    return estimate, coming


def _terms(
    config: TrainConfig, ready: Prepared, model: StreamedModel, shapes: list[tuple[int, ...]], coming: Coming
) -> dict[str, int]:
    shape = ModelShape.of(model, ())
    linear_elements = sum(n * k for n, k in shapes)
    outside = sum(prod(spec.shape) for spec in model.view.specs().values()) - linear_elements
    width = shape.itemsize
    in_codes = ready.kind != "16bit"
    tokens = config.batch_size * config.seq_len
    saved = tokens * width * SAVED_PER_LINEAR * sum(k for _, k in shapes)
    checkpointed = config.gradient_checkpointing
    if checkpointed is None:
        checkpointed = config.device != "cpu" and torch.cuda.is_available()
    if checkpointed:
        saved = saved // model.num_blocks + tokens * width * shape.hidden_size * model.num_blocks
    vocabulary = model.head_bytes // max(1, shape.hidden_size * width)
    return {
        "base": (linear_elements * 9 // 16 if in_codes else linear_elements * width) + outside * width,
        "a linear decoded": 4 * max(n * k for n, k in shapes),
        "adapter, gradients and optimizer": 4 * coming.num_bytes,
        "activations": saved,
        "logits and their gradient": tokens * vocabulary * (width + 8),
    }
