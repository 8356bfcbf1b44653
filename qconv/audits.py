"""Feeds the audit of stored weights while a comparison goes through the blocks, so that nothing is read twice."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from math import prod
from typing import Any

import torch
from torch import Tensor

from qconv.convert import DequantizedCheckpoint, quant_map, simulate_weight
from qconv.lineup import Views
from qconv.on_the_way import mark
from qconv.runners import Candidate, Reference
from qconv.timeline import TIMELINE
from qconv.validate.audit import Begun, WeightAudit
from qconv.validate.audit_cells import MOST_ELEMENTS, cell_findings, cell_slope
from qconv.validate.workers import one_worker

_PROBED_WEIGHTS = 24
_REHEARSED_WEIGHTS = 3


def _levels(reference: Reference, stored: DequantizedCheckpoint) -> Tensor | None:
    """The 4-bit levels of the base, where a candidate of 4 bits has to be told by them; see `audit_cells`."""
    if not reference.kind.startswith("nf4") or not _weights_of_4_bits(stored):
        return None
    return quant_map("nf4", "cpu")


def _weights_of_4_bits(stored: DequantizedCheckpoint) -> set[str]:
    """With fewer bits the candidate's own errors are too large to show the base's, with more there is no need. 4-bit
    floats have uneven cells themselves."""
    return {f"{module}.weight" for module, s in stored.schemes.items() if s.kind == "int" and s.bits == 4}


class StreamedAudit:
    """`WeightAudit`, one block at a time.

    The main thread reads tensors and gives the GPU its work, and waits for neither; a thread beside it makes fits of
    what comes back, and judges blocks. Use it as a context, which ends that thread.

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
        self._worker = one_worker("qconv-audit")
        self._coming: deque[Future[list[str]]] = deque()  # names of the tensors that each measured

    def __enter__(self) -> StreamedAudit:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.shutdown(cancel_futures=True)

    def rehearse(self) -> None:
        """Measures the smallest quantized weight of each width for nothing: a GPU's kernels are compiled for them."""
        smallest: dict[int, str] = {}
        shapes = {name: self._stored.specs()[name].shape for name in self._left}
        for name in sorted(shapes, key=lambda name: prod(shapes[name])):
            if name.removesuffix(".weight") in self._stored.quantized_modules and len(shapes[name]) == 2:
                smallest.setdefault(shapes[name][1], name)
        for name in list(smallest.values())[:_REHEARSED_WEIGHTS]:
            self._audit.begin(name, self._device)
        self._views.forget()

    def compare_embedding(self) -> None:
        """Passes over embeddings that are what they should be, while they are at hand: they are large."""
        for name in list(self._left):
            if "embed" in name and self._is_untouched(name):
                del self._left[name]

    def block(self, prefix: str) -> None:
        """Begins to measure the tensors whose names begin with ``prefix``: of whole blocks, in one call each.

        Raises:
            Exception: whatever the thread ran into with blocks before this one.
        """
        while self._coming and self._coming[0].done():
            self._take()
        self._begin([name for name in self._left if name.startswith(prefix)])

    def rest(self) -> None:
        """Begins to measure what no block had."""
        for name in list(self._left):
            if self._is_untouched(name):
                del self._left[name]
            else:
                self._begin([name])
            self._views.forget()

    def findings(self) -> list[dict[str, Any]]:
        """What is wrong, errors first; waits for all that was begun, and raises what the thread ran into."""
        while self._coming:
            self._take()
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

    def _begin(self, names: Sequence[str]) -> None:
        begun: list[Begun] = []
        try:
            for name in names:
                del self._left[name]
                is_probed = self._levels is not None and name in self._probed
                begun.append(self._audit.begin(name, self._device, MOST_ELEMENTS if is_probed else 0))
        finally:  # what came before an error may be what explains it
            self._coming.append(self._worker.submit(self._finish, begun, mark(self._device)))

    def _finish(self, begun: Sequence[Begun], arrived: Callable[[], None]) -> list[str]:
        """What the thread does: names of what was measured."""
        with TIMELINE.stage("wait for audit"):
            arrived()
        with TIMELINE.stage("audit findings"):
            measured = [(one.finish(), one.sample) for one in begun]
            for result, sample in measured:
                self._audit.keep(result)
                if sample is None or self._levels is None or result.fit is None or result.fit.is_folded:
                    continue
                slope = cell_slope(*sample, self._levels)
                if slope is not None:
                    self._slopes[result.name] = slope
            for block in dict.fromkeys(result.block for result, _ in measured if result.block):
                self._audit.judge(block)
        return [result.name for result, _ in measured]

    def _take(self) -> None:
        for name in self._coming.popleft().result():
            self._audit.look_again(name, self._device)
