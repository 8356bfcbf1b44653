"""What ``--dry-run`` answers: the estimate of a job, made after the checks that come before its work."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from qconv.cli_answers import Answer
from qconv.config import MergeJob, ValidateJob
from qconv.errors import CapacityError
from qconv.estimate_show import show
from qconv.progress import Progress
from qconv.training_config import TrainConfig

if TYPE_CHECKING:
    from qconv.estimate import Estimate


def planned_merge(job: MergeJob, command: str, progress: Progress) -> Answer:
    """Raises what the job itself would raise before its work; what does not fit is the answer's failure."""
    from qconv.estimate_jobs import estimate_merge
    from qconv.inputs import resolve_device
    from qconv.plan import make_plan

    device = resolve_device(job.device)
    return _answer(estimate_merge(job, make_plan(job, progress), device, command))


def planned_validation(job: ValidateJob) -> Answer:
    from qconv.estimate_validate import estimate_validation
    from qconv.inputs import resolve_device

    return _answer(estimate_validation(job, resolve_device(job.device)))


def planned_training(config: TrainConfig) -> Answer:
    from qconv.estimate_train import estimate_training
    from qconv.inputs import resolve_device

    estimate, _ = estimate_training(config, resolve_device(config.device))
    return _answer(estimate)


def planned_recipe(train: TrainConfig | None, job: MergeJob, progress: Progress) -> Answer:
    """Of a whole recipe: training first, then everything that is made of its adapter."""
    if train is None:
        return planned_merge(job, "run", progress)
    from qconv.disk_room import joined
    from qconv.estimate_jobs import estimate_merge
    from qconv.estimate_train import estimate_training
    from qconv.inputs import resolve_device
    from qconv.plan import plan_before_training

    device = resolve_device(job.device)
    plan = plan_before_training(job, progress)
    training, coming = estimate_training(train, device)
    making = estimate_merge(job, plan, device, "run", coming.num_bytes, coming.changes)
    whole = replace(
        making,
        stages=[*training.stages, *making.stages],
        process={**making.process, **training.process},
        rooms=joined([*training.rooms, *making.rooms]),
        replaced={**training.replaced, **making.replaced},
        notes=list(dict.fromkeys([*training.notes, *making.notes])),
    )
    return _answer(whole)


def _answer(estimate: Estimate) -> Answer:
    document = estimate.as_dict()
    failure = CapacityError("\n".join(document["problems"])) if document["problems"] else None
    return Answer(text=show(document), document=document, failure=failure)
