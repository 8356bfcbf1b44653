"""Hidden states of all calibration tokens between two blocks, on the compute device or in host memory.

A pass goes through the batches in order (`Activations.each`) and may put the next block's input in the place of this
one's (`Activations.replace`). On the device that is a list. In host memory the states lie page-locked, and copies run
beside the computation:

    upload stream     up 0 | up 1 |      | up 2 |      | up 3 | ...
    compute stream         | block on 0  | block on 1  | block on 2 | ...
    download stream                      | down 0      | down 1     | ...

Batch i + 1 is uploaded while batch i computes, into the one of two fixed slots that batch i - 1 has left; the result of
batch i - 1 is downloaded meanwhile. The host never waits: streams wait for each other's events.

- upload i waits until the computation that read its slot has ended, and until the download that last wrote batch i to
  the host has; the computation on batch i waits for upload i.
- download i waits for the computation that made it. The result is kept alive until the compute stream has been told to
  wait for that download, so the allocator gives its memory to nothing that could run earlier. At most two results are
  kept so, which bounds the memory even where the host runs far ahead of the device.

Left out: two passes at a time over one object; hidden states on disk.

Dimension legend: B = rows in a batch, S = tokens per row, H = hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor

from qconv.streaming import BlockModel

Placement = Literal["device", "host"]
NUM_SLOTS = 2  # device buffers for inputs on their way in
NUM_LEAVING = 2  # results on their way out


class Activations(ABC):
    """The hidden states of some batches, ``[B, S, H]`` each."""

    @staticmethod
    def embed(model: BlockModel, batches: Iterable[Tensor], placement: Placement) -> Activations:
        """The inputs of the first block for token batches ``[B, S]``.

        Args:
            placement: ``"host"`` needs a CUDA device.
        """
        states = _OnHost(torch.device(model.device)) if placement == "host" else _OnDevice()
        for h_BSH in model.embed_each(batches):
            states.append(h_BSH)
        return states

    @abstractmethod
    def __len__(self) -> int:
        """Number of batches."""

    @abstractmethod
    def append(self, h_BSH: Tensor) -> None:
        """Adds a batch that was just computed."""

    @abstractmethod
    def each(self) -> Iterator[tuple[int, Tensor]]:
        """All batches in order, on the device. A tensor is valid until the next one is asked for."""

    @abstractmethod
    def replace(self, index: int, h_BSH: Tensor) -> None:
        """Puts a result, just computed on the current stream, in the place of the batch that `each` gave last."""


class _OnDevice(Activations):
    def __init__(self) -> None:
        self._states: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._states)

    def append(self, h_BSH: Tensor) -> None:
        self._states.append(h_BSH)

    def each(self) -> Iterator[tuple[int, Tensor]]:
        for index in range(len(self._states)):
            yield index, self._states[index]

    def replace(self, index: int, h_BSH: Tensor) -> None:
        self._states[index] = h_BSH


class _OnHost(Activations):
    """See the top of the file. ``None`` for an event: there is nothing to wait for."""

    def __init__(self, device: torch.device):
        self._device = device
        self._up: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._down: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._states: list[Tensor] = []
        self._stored: list[torch.cuda.Event | None] = []  # per batch: its download
        self._slots: list[Tensor] = []  # flat
        self._uploaded: list[torch.cuda.Event | None] = [None] * NUM_SLOTS
        self._vacated: list[torch.cuda.Event | None] = [None] * NUM_SLOTS  # per slot: the computation that read it
        self._leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def __len__(self) -> int:
        return len(self._states)

    def append(self, h_BSH: Tensor) -> None:
        self._states.append(torch.empty(h_BSH.shape, dtype=h_BSH.dtype, pin_memory=True))
        self._stored.append(None)
        self.replace(len(self._states) - 1, h_BSH)

    def each(self) -> Iterator[tuple[int, Tensor]]:
        if not self._states:
            return
        self._make_slots()
        self._upload(0)
        for index in range(len(self._states)):
            if index + 1 < len(self._states):
                self._upload(index + 1)
            _wait(self._compute(), self._uploaded[index % NUM_SLOTS])
            try:
                yield index, self._slot(index)
            finally:
                self._vacated[index % NUM_SLOTS] = self._compute().record_event()
        while self._leaving:  # what comes after the pass may use their memory
            self._let_go()

    def replace(self, index: int, h_BSH: Tensor) -> None:
        storage = h_BSH.untyped_storage().data_ptr()
        if any(slot.untyped_storage().data_ptr() == storage for slot in self._slots):
            h_BSH = h_BSH.clone()  # a block that gave back what it was given: the slot is about to be overwritten
        made = self._compute().record_event()
        with torch.cuda.stream(self._down):
            self._down.wait_event(made)
            self._states[index].copy_(h_BSH, non_blocking=True)
            stored = self._down.record_event()
        self._stored[index] = stored
        self._leaving.append((h_BSH, stored))
        if len(self._leaving) > NUM_LEAVING:
            self._let_go()

    def _let_go(self) -> None:
        leaving_BSH, stored = self._leaving.popleft()
        self._compute().wait_event(stored)
        del leaving_BSH  # not before the line above

    def _make_slots(self) -> None:
        size = max(state.numel() for state in self._states)
        if self._slots and len(self._slots[0]) >= size:
            return
        dtype = self._states[0].dtype
        self._slots = [torch.empty(size, dtype=dtype, device=self._device) for _ in range(NUM_SLOTS)]
        for number, slot in enumerate(self._slots):
            slot.record_stream(self._up)  # for the day when it is freed
            # Its memory may be that of something which the compute stream has yet to finish with.
            self._vacated[number] = self._compute().record_event()

    def _upload(self, index: int) -> None:
        with torch.cuda.stream(self._up):
            _wait(self._up, self._vacated[index % NUM_SLOTS])
            _wait(self._up, self._stored[index])
            self._slot(index).copy_(self._states[index], non_blocking=True)
            self._uploaded[index % NUM_SLOTS] = self._up.record_event()

    def _slot(self, index: int) -> Tensor:
        state_BSH = self._states[index]
        return self._slots[index % NUM_SLOTS][: state_BSH.numel()].view(state_BSH.shape)

    def _compute(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)


def _wait(stream: torch.cuda.Stream, event: torch.cuda.Event | None) -> None:
    if event is not None:
        stream.wait_event(event)
