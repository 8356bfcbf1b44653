"""Which of an adapter's ranks to merge: each by its loss on held-out text of the task, with the adapter unmerged.

Method: DyLoRA and QDyLoRA (Valipour et al. 2023, Rajabzadeh et al. 2024) train the first b components to work for every
b, so that a rank is chosen afterwards. Looked at are 1, 2, 4 and so on, and the rank of training. The lowest loss is
taken, of equal ones the smaller rank: a merged model costs the same with any.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qconv.checkpoint import open_checkpoint
from qconv.config import MergeJob
from qconv.errors import AdapterError
from qconv.held_out import Loss, held_out_rows, loss_facts, measure_losses
from qconv.inputs import load_reference
from qconv.plan import make_plan
from qconv.progress import QUIET, Progress
from qconv.remembered import Remembered
from qconv.runners import streamed
from qconv.streaming import BlockModel
from qconv.types import Adapter


@dataclass(frozen=True, kw_only=True)
class RankSweep:
    """What was measured, from the rank of training down; and the rank that was taken."""

    rank: int
    losses: list[Loss]

    def facts(self) -> dict[str, object]:
        """For the report."""
        return {"merged": self.rank, "by": "the lowest loss", **loss_facts(self.losses)}


def with_rank(job: MergeJob, device: str, progress: Progress) -> tuple[MergeJob, RankSweep | None]:
    """The job with a number in the place of ``auto``, and how it was found; the job itself if it has one.

    Raises:
        QconvError: any of its kinds; see `errors`.
    """
    options, config = job.options, job.validation
    if options.rank != "auto" or config is None:
        return job, None
    make_plan(job, QUIET)  # what can be refused is refused before the work
    source = open_checkpoint(job.base, job.revision)
    reference = load_reference(
        source, job.adapter, job.trained_on, options=replace(options, rank=None, rank_scaling=None)
    )
    assert reference.adapter is not None  # the job has one
    base = Remembered(reference.base)
    models: dict[str, BlockModel] = {}
    ranks = _ranks(reference.adapter)
    for rank in ranks:
        one = load_reference(source, job.adapter, job.trained_on, options=replace(options, rank=rank))
        models[f"rank {rank}"] = streamed(base, one.adapter, None, device)
    if not reference.resizes_vocabulary:
        models["base without the adapter"] = streamed(base, None, None, device)
    rows = held_out_rows(reference, config, with_general=False)
    losses = measure_losses(models, rows, config, device, progress, base.forget)
    for loss in losses:
        progress.say(loss.line())
    chosen, _ = min(zip(ranks, losses, strict=False), key=lambda pair: (pair[1].loss, pair[0]))
    progress.say(f"merging rank {chosen}, which has the lowest loss")
    return replace(job, options=replace(options, rank=chosen)), RankSweep(rank=chosen, losses=losses)


def _ranks(adapter: Adapter) -> list[int]:
    """Those to look at, the largest first."""
    if not adapter.deltas:
        raise AdapterError(f"{adapter.location}: --rank is for LoRA, and this is of kind {adapter.kind}")
    largest = min(delta.rank for delta in adapter.deltas.values())
    return sorted({largest, *(1 << power for power in range(largest.bit_length()))}, reverse=True)
