"""A base without the smallest singular components of some weights.

Method: KaSA (Wang et al. 2024) takes them from the frozen weight when training begins. With R = the rank of the layer
and ``W = sum_i s_i u_i v_i^T``, the last R terms are left out, as peft 0.21 does. KaSA's own repository keeps the first
K - R, K = in features: where N <= K - R that is all of them (``update_layer`` of its fork of peft).

Rounding: decomposed in float32 and rounded once to the dtype that the base is stored in, as training had it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from qconv.read_ahead import read_ahead
from qconv.types import Checkpoint, TensorSpec


class WithoutSmallest:
    """A `Checkpoint` over a base; by weight, how many components are left out."""

    def __init__(self, base: Checkpoint, dropped: Mapping[str, int]):
        self._base, self._dropped = base, dict(dropped)

    @property
    def location(self) -> str:
        return self._base.location

    @property
    def config(self) -> Mapping[str, Any]:
        return self._base.config

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._base.specs()

    @torch.no_grad()
    def read(self, name: str, device: str = "cpu") -> Tensor:
        """The tensor with what is left of it, in its own dtype.

        Raises:
            CheckpointError: no such tensor, or its bytes cannot be read.
        """
        w_NK = self._base.read(name, device)
        if name not in self._dropped:
            return w_NK
        u_NR, s_R, v_RK = torch.linalg.svd(w_NK.float(), full_matrices=False)
        kept = len(s_R) - self._dropped[name]
        result: Tensor = (u_NR[:, :kept] * s_R[:kept]) @ v_RK[:kept]
        return result.to(w_NK.dtype)

    def read_ahead(self, names: Iterable[str], pin: bool = False, max_bytes: int | None = None) -> None:
        """Begins to fetch what is stored of the base, see `ReadsAhead`."""
        read_ahead(self._base, names, pin, max_bytes)
