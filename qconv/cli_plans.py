"""What ``--dry-run`` answers: the estimate of a job, made after the checks that come before its work."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from qconv.cli_answers import Answer
from qconv.config import MergeJob, ValidateJob
from qconv.errors import CapacityError
from qconv.estimate_show import show
from qconv.progress import QUIET, Progress
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
    from qconv.estimate_train import estimate_training
    from qconv.inputs import resolve_device

    making = estimate_before_training(train, job, progress)
    training, _ = estimate_training(train, resolve_device(job.device))
    whole = replace(
        making,
        stages=[*training.stages, *making.stages],
        process={**making.process, **training.process},
        replaced={**training.replaced, **making.replaced},
        notes=list(dict.fromkeys([*training.notes, *making.notes])),
    )
    return _answer(whole)


def estimate_before_training(train: TrainConfig, job: MergeJob, progress: Progress = QUIET) -> Estimate:
    """What comes after a training, with the adapter that it will make: its terms, and its room beside the outputs.

    Raises:
        QconvError: what can be known before it and would stop the job after it.
    """
    from qconv.disk_room import joined
    from qconv.estimate_jobs import estimate_merge
    from qconv.estimate_train import adapter_to_come, rooms_of_training
    from qconv.inputs import resolve_device
    from qconv.plan import plan_before_training

    plan = plan_before_training(job, progress)
    coming = adapter_to_come(train)
    making = estimate_merge(job, plan, resolve_device(job.device), "run", coming.num_bytes, coming.changes)
    return replace(making, rooms=joined([*rooms_of_training(train, coming), *making.rooms]))


def _answer(estimate: Estimate) -> Answer:
    document = estimate.as_dict()
    failure = CapacityError("\n".join(document["problems"])) if document["problems"] else None
    return Answer(text=show(document), document=document, failure=failure)
