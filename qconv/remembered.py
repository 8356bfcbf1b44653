"""A view whose tensors several models of one comparison share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qconv.types import Checkpoint, TensorSpec


class Remembered:
    """A `Checkpoint` that keeps what was read until `forget`, and after `stop` no longer keeps anything."""

    def __init__(self, view: Checkpoint):
        self.view = view
        self._is_stopped = False
        self._tensors: dict[tuple[str, str], Tensor] = {}
        self._lent: dict[tuple[str, str], Tensor] = {}

    @property
    def location(self) -> str:
        return self.view.location

    @property
    def config(self) -> Mapping[str, Any]:
        return self.view.config

    def specs(self) -> Mapping[str, TensorSpec]:
        return self.view.specs()

    def read(self, name: str, device: str = "cpu") -> Tensor:
        """The tensor; shared, not to be changed."""
        if (name, device) in self._lent:
            return self._lent[name, device]
        if self._is_stopped:
            return self.view.read(name, device)
        key = (name, device)
        if key not in self._tensors:
            self._tensors[key] = self.view.read(name, device)
        return self._tensors[key]

    def lend(self, tensors: Mapping[str, Tensor], device: str) -> None:
        """Has it give these for reads to ``device``, as long as it lives: somebody holds them there anyway."""
        self._lent |= {(name, device): tensor for name, tensor in tensors.items()}

    def take_back(self, name: str, device: str) -> None:
        """The opposite of `lend`, for one tensor."""
        self._lent.pop((name, device), None)

    def is_lent(self, name: str, device: str) -> bool:
        return (name, device) in self._lent

    def drop(self, name: str, device: str) -> None:
        """Forgets one tensor."""
        self._tensors.pop((name, device), None)

    def forget(self) -> None:
        self._tensors.clear()

    def stop(self) -> None:
        """Forgets, and from now on passes reads through: whoever reads later does not share."""
        self._is_stopped = True
        self.forget()
