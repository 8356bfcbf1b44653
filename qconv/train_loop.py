"""The optimizer loop of QLoRA training: AdamW, warm-up, clipped gradients, one JSON line a step.

Legend: B = rows in a batch, T = tokens in a row.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from qconv.errors import NumericsError
from qconv.progress import Progress
from qconv.training_config import TrainConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_GRADIENT_NORM = 0.3
WARMUP_FRACTION = 0.03


def optimize(model: Any, rows_BT: Tensor, config: TrainConfig, log: TextIO, progress: Progress) -> list[float]:
    """Trains the adapter in place; returns the loss (nats per token) of each step.

    Args:
        model: peft model on its device, in train mode.
        rows_BT: int64 ``[rows, T]``.
        log: gets one JSON object a step.

    Raises:
        NumericsError: a loss or gradient is not finite.
    """
    import torch

    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    parameters = [parameter for _, parameter in named]
    optimizer = _optimizer(parameters, config.learning_rate)
    batches = _batches(rows_BT, config)
    losses: list[float] = []
    start = time.monotonic()
    for step in progress.track(range(config.steps), "train"):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config)
        loss = 0.0
        for _ in range(config.gradient_accumulation):
            tokens_BT = next(batches).to(model.device)
            part = model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss / config.gradient_accumulation
            part.backward()
            loss += float(part.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise _not_finite(step, loss, named, config)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss)
        row = {
            "step": step + 1,
            "loss": loss,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "gradient_norm": norm,
            "seconds": round(time.monotonic() - start, 3),
        }
        log.write(json.dumps(row) + "\n")
        log.flush()
        progress.detail(f"step {step + 1}/{config.steps}  loss {loss:.4f}  gradient norm {norm:.4f}")
    return losses


def _optimizer(parameters: list[Tensor], learning_rate: float) -> torch.optim.Optimizer:
    if parameters[0].is_cuda:
        from bitsandbytes.optim import PagedAdamW8bit

        paged: torch.optim.Optimizer = PagedAdamW8bit(parameters, lr=learning_rate, weight_decay=0.0)
        return paged
    from torch.optim import AdamW

    return AdamW(parameters, lr=learning_rate, weight_decay=0.0)


def _schedule(step: int, config: TrainConfig) -> float:
    """The learning rate of a step, counted from 0, as a fraction of the peak."""
    warmup = math.ceil(WARMUP_FRACTION * config.steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))


def _batches(rows_BT: Tensor, config: TrainConfig) -> Iterator[Tensor]:
    """Batches without end; every row comes once before any comes again, in an order of its own each time."""
    import torch

    generator = torch.Generator().manual_seed(config.seed)
    order: list[int] = []
    while True:
        while len(order) < config.batch_size:
            order += torch.randperm(len(rows_BT), generator=generator).tolist()
        yield rows_BT[order[: config.batch_size]]
        order = order[config.batch_size :]


def _not_finite(step: int, loss: float, named: list[tuple[str, Tensor]], config: TrainConfig) -> NumericsError:
    broken = next((name for name, p in named if p.grad is not None and not bool(p.grad.isfinite().all())), None)
    where = f"; first gradient that is not finite: {broken}" if broken else ""
    return NumericsError(
        f"{config.base}: the loss at step {step + 1} of {config.steps} is {loss}{where}; nothing was written. "
        "Lower --learning-rate; if it is not finite at step 1, the base has broken weights"
    )
