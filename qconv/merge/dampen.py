"""A merge whose intruder dimensions are scaled.

Method: singular vectors of W + dW that are foreign to W (Shuttleworth et al. 2024, see `spectrum.py`) are what models
that were trained with LoRA forget by. With ``W + dW = sum_i s_i u_i v_i^T`` the merged weight becomes
``W + dW + (L - 1) sum_{i foreign} s_i u_i v_i^T``: L = 1 changes nothing, L = 0 takes them out. Looked at are the same
leading left singular vectors that `spectrum.py` lists.

Rounding: float32 throughout; the one rounding to the storage dtype is the writer's.

Left out: a head that is tied to the embedding, as in `spectrum.py`, and embeddings.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qconv.errors import NumericsError
from qconv.finite import all_finite
from qconv.merge.merged import MergedCheckpoint
from qconv.merge.spectrum import Intruder, intruding_components
from qconv.read_ahead import read_ahead
from qconv.types import Adapter, Checkpoint, TensorSpec


@dataclass(frozen=True, kw_only=True)
class Dampened:
    """What is taken from one weight: ``shrunk_NI @ v_IK``, on the CPU; and the intruders that it is made of."""

    intruders: tuple[Intruder, ...]
    shrunk_NI: Tensor
    v_IK: Tensor


class Dampening:
    """How far intruders are scaled, and what was found so far; shared by all views of one merge.

    Attributes:
        factor: L, in [0, 1].
        found: by weight, as weights were read.
    """

    def __init__(self, factor: float):
        self.factor = factor
        self.found: dict[str, Dampened] = {}
        self._looking = threading.Lock()  # weights are read by several threads, and one decomposition fills all cores

    def of(self, name: str, w_NK: Tensor, merged_NK: Tensor) -> Dampened:
        """Of one weight; decomposed once in a run."""
        with self._looking:
            if name not in self.found:
                intruders, u_NI, v_IK = intruding_components(w_NK, merged_NK)
                sizes_I = torch.tensor([one.singular_value for one in intruders], device=u_NI.device)
                self.found[name] = Dampened(
                    intruders=tuple(intruders), shrunk_NI=((1 - self.factor) * sizes_I * u_NI).cpu(), v_IK=v_IK.cpu()
                )
            return self.found[name]

    @property
    def summary(self) -> str:
        """Of the weights that were read, for the terminal."""
        facts = self.facts()
        return f"intruder dimensions scaled by {self.factor:g}: {facts['found']}, in {facts['in weights']} weights"

    def facts(self) -> dict[str, Any]:
        """For the report; of the weights that were read, which are all once a model is written."""
        changed = {name: one.intruders for name, one in self.found.items() if one.intruders}
        return {
            "scaled by": self.factor,
            "found": sum(map(len, changed.values())),
            "in weights": f"{len(changed)} of {len(self.found)}",
            "count by weight": {name: len(one.intruders) for name, one in self.found.items()},
            "by weight": {
                name: ", ".join(f"{i.singular_value:.4g} (place {i.place}, cosine {i.cosine:.2f})" for i in intruders)
                for name, intruders in changed.items()
            },
        }


class DampenedCheckpoint:
    """A `Checkpoint` over a merged one, whose intruder dimensions are scaled.

    Attributes:
        changed, notes: as of the merge.
    """

    def __init__(self, base: Checkpoint, merged: MergedCheckpoint, adapter: Adapter, dampening: Dampening):
        self._base, self._merged, self._dampening = base, merged, dampening
        stored_KN = {name: delta.transposed for name, delta in adapter.deltas.items()}
        stored_KN |= {name: transform.transposed for name, transform in adapter.transforms.items()}
        specs = base.specs()
        self._weights = {
            name: is_KN
            for name, is_KN in stored_KN.items()
            if name in specs and specs[name].shape == merged.specs()[name].shape
        }
        self.config, self.changed = merged.config, merged.changed
        self.notes = (*merged.notes, f"intruder dimensions are scaled by {dampening.factor:g}")

    @property
    def location(self) -> str:
        return self._merged.location

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._merged.specs()

    def read(self, name: str, device: str = "cpu") -> Tensor:
        """As of the merge, without what is taken from intruders.

        Raises:
            CheckpointError, NumericsError: see `MergedCheckpoint.read`.
        """
        tensor = self._merged.read(name, device)
        if name not in self._weights:
            return tensor
        if not all_finite(tensor):  # what the merge has put off, a decomposition cannot
            raise NumericsError(f"{self.location}: NaN or infinity in the merged weight {name!r}")
        merged_NK = tensor.T if self._weights[name] else tensor
        w = self._base.read(name, device).float()
        taken = self._dampening.of(name, w.T if self._weights[name] else w, merged_NK)
        if taken.intruders:
            merged_NK = merged_NK - taken.shrunk_NI.to(device) @ taken.v_IK.to(device)
        return merged_NK.T.contiguous() if self._weights[name] else merged_NK

    def read_ahead(self, names: Iterable[str], pin: bool = False, max_bytes: int | None = None) -> None:
        """Begins to fetch what merged tensors are made of, see `ReadsAhead`."""
        read_ahead(self._merged, names, pin, max_bytes)
