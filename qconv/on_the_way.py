"""Numbers on their way from a GPU to the host: asked for by one thread, which does not wait, and read by another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the same shapes on the host, all in one piece and of the widest dtype among them.

    From a GPU they come into memory that torch keeps for the purpose (pinned, given out again when they are dropped),
    and are there when a `mark` that was set afterwards is reached; until then they hold anything.
    """
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).to("cpu", non_blocking=True)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def mark(device: torch.device | str) -> Callable[[], None]:
    """A function for any thread, which waits until the device has done all that it was given up to now."""
    device = torch.device(device)
    if device.type != "cuda":
        return lambda: None
    event: torch.cuda.Event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event.synchronize
