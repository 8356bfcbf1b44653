"""What a comparison does on a GPU, done once in small while libraries are imported.

Triton compiles a kernel when it meets the first tensors of a kind: half a second each, in compilers that need no
interpreter. On a machine that validates for the first time, as in CI, that is seconds which would come between the
blocks of models; until `transformers` is imported there are no models, and nothing else to do.
"""

from __future__ import annotations

from contextlib import suppress

import torch

from qconv.audits import StreamedAudit
from qconv.layout import config_dtype
from qconv.lineup import Views
from qconv.own_process import is_importing
from qconv.runners import Candidate, Reference
from qconv.timeline import TIMELINE
from qconv.validate.distribution import Distribution


def rehearse_while_importing(reference: Reference, candidate: Candidate, device: str) -> None:
    """Does so on a GPU, while `own_process.begin` is still importing; elsewhere there is nothing to gain."""
    if device.startswith("cuda") and is_importing():
        with TIMELINE.stage("rehearse"), suppress(Exception):  # whatever is wrong is told where it counts
            rehearse(reference, candidate, device)


def rehearse(reference: Reference, candidate: Candidate, device: str) -> None:
    """Audits a weight of each width, and compares two tokens of all logits."""
    if candidate.adapter is None:
        with StreamedAudit(reference, candidate, Views.of(reference, candidate, device), device) as audit:
            audit.rehearse()
    config = reference.base.config
    logits_TV = torch.zeros(2, int(config["vocab_size"]), dtype=config_dtype(config), device=device)
    first, second = Distribution(logits_TV, "first"), Distribution(logits_TV, "second")
    first.divergence_sums(second)
