"""Feeds the audit of stored weights while a comparison goes through the blocks, so that nothing is read twice."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor

from qconv.convert import simulate_weight
from qconv.runners import Candidate, Reference
from qconv.types import Checkpoint
from qconv.validate.audit import WeightAudit


class StreamedAudit:
    """`WeightAudit`, one block at a time.

    Args:
        base, merged: views of the reference's base and of the merge, which may remember what they read.
    """

    def __init__(
        self,
        reference: Reference,
        candidate: Candidate,
        base: Checkpoint,
        merged: Checkpoint,
        changed: Collection[str],
        device: str,
    ):
        source = candidate.source

        def encode(weight: Tensor) -> Tensor:
            return simulate_weight(weight, reference.kind)

        self._device = device
        self._audit = WeightAudit(
            expected=merged,
            base=base,
            candidate=candidate.view,
            changed=changed,
            files={name: source.file_of(name).name for name in source.specs()},
            encode=None if reference.kind == "16bit" else encode,
        )
        self._left = dict.fromkeys(self._audit.names)

    def block(self, prefix: str) -> None:
        """Measures the tensors whose names begin with ``prefix``."""
        for name in [name for name in self._left if name.startswith(prefix)]:
            self._add(name)

    def rest(self, forget: Callable[[], None]) -> None:
        """Measures what no block had; calls ``forget`` after each tensor."""
        for name in list(self._left):
            self._add(name)
            forget()

    def findings(self) -> list[dict[str, Any]]:
        return self._audit.findings()

    def _add(self, name: str) -> None:
        del self._left[name]
        self._audit.add(name, self._device)
