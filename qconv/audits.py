"""Feeds the audit of stored weights while a comparison goes through the blocks, so that nothing is read twice."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from qconv.convert import DequantizedCheckpoint, quant_map, simulate_weight
from qconv.lineup import Views
from qconv.runners import Candidate, Reference
from qconv.validate.audit import WeightAudit
from qconv.validate.audit_cells import cell_findings, cell_slope
from qconv.validate.workers import one_thread

_PROBED_WEIGHTS = 24


def _levels(reference: Reference, stored: DequantizedCheckpoint) -> Tensor | None:
    """The 4-bit levels of the base, where a candidate of 4 bits has to be told by them; see `audit_cells`."""
    if not reference.kind.startswith("nf4") or not _weights_of_4_bits(stored):
        return None
    return quant_map("nf4", "cpu")


def _weights_of_4_bits(stored: DequantizedCheckpoint) -> set[str]:
    """With fewer bits the candidate's own errors are too large to show the base's, with more there is no need."""
    return {f"{module}.weight" for module, s in stored.schemes.items() if s.kind == "int" and s.bits == 4}


class StreamedAudit:
    """`WeightAudit`, one block at a time.

    Args:
        views: of base, merge and candidate, which remember what they read; `rest` makes them forget.
    """

    def __init__(
        self,
        reference: Reference,
        candidate: Candidate,
        views: Views,
        device: str,
    ):
        source = candidate.source
        assert views.stored is not None

        def encode(weight: Tensor) -> Tensor:
            return simulate_weight(weight, reference.kind)

        self._device = device
        self._views, self._stored = views, views.stored
        self._audit = WeightAudit(
            expected=views.merged,
            base=views.base,
            candidate=views.stored,
            changed=views.changed,
            files={name: source.file_of(name).name for name in source.specs()},
            encode=None if reference.kind == "16bit" else encode,
        )
        self._left = dict.fromkeys(self._audit.names)
        self._levels = _levels(reference, views.stored)
        four = _weights_of_4_bits(views.stored)
        changed = [name for name in self._left if name in views.changed and name in four]
        self._probed = frozenset(changed[:: max(1, len(changed) // _PROBED_WEIGHTS)])
        self._slopes: dict[str, float] = {}

    def compare_embedding(self) -> None:
        """Passes over embeddings that are what they should be, while they are at hand: they are large."""
        for name in list(self._left):
            if "embed" in name and self._is_untouched(name):
                del self._left[name]

    def block(self, prefix: str) -> None:
        """Measures the tensors whose names begin with ``prefix``."""
        for name in [name for name in self._left if name.startswith(prefix)]:
            self._add(name)

    def rest(self) -> None:
        """Measures what no block had."""
        for name in list(self._left):
            if self._is_untouched(name):
                del self._left[name]
            else:
                self._add(name)
            self._views.forget()

    def findings(self) -> list[dict[str, Any]]:
        """What is wrong, errors first."""
        found = self._audit.findings()
        folded = {t.block for t in self._audit.tensors.values() if t.fit is not None and t.fit.is_folded}
        slopes = {n: slope for n, slope in self._slopes.items() if self._audit.tensors[n].block not in folded}
        if not any(finding["code"] == "wrong-base" for finding in found):
            found = [*cell_findings(slopes), *found]
        return found

    def _is_untouched(self, name: str) -> bool:
        """Whether a matrix that the adapter leaves alone is stored bit for bit as in the base."""
        wanted, found = self._views.merged.specs().get(name), self._stored.specs()[name]
        if name in self._views.changed or wanted is None or len(found.shape) != 2:
            return False
        if (wanted.shape, wanted.dtype) != (found.shape, found.dtype):
            return False
        own, kept = self._views.merged.read(name, self._device), self._stored.read(name, self._device)
        # In parts: the comparison of a large embedding takes half as much memory again.
        return all(torch.equal(a, b) for a, b in zip(torch.split(own, 8192), torch.split(kept, 8192), strict=True))

    def _add(self, name: str) -> None:
        del self._left[name]
        # On a GPU, what is left for the host is many small operations.
        with one_thread() if self._device.startswith("cuda") else nullcontext():
            measured = self._audit.add(name, self._device)
        if self._levels is None or name not in self._probed or measured.fit is None or measured.fit.is_folded:
            return
        stored, merged, base = (
            view.read(name, self._device) for view in (self._stored, self._views.merged, self._views.base)
        )
        slope = cell_slope(stored, merged, base, self._levels)
        if slope is not None:
            self._slopes[name] = slope
