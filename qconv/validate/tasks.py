"""Task accuracy: does the candidate answer as well as the reference, document by document?

The tasks are those of lm-evaluation-harness (``lm_eval``; Gao et al., "A framework for few-shot language model
evaluation"), or local task files in its format. Both models answer the same documents with the same few-shot
examples and seeds, and are compared by `qconv.validate.paired`.

Which metrics: every metric that a task declares as a plain mean over documents (``acc``, ``acc_norm``,
``exact_match``, ...), for each of its answer filters. They have a score per document, so documents can be paired;
which of several is the customary one differs from task to task, so none is left out. Scores of 0 and 1 get McNemar's
exact test and the adjusted Wald interval; other scores the difference with a bootstrap interval. A task without such
a metric is judged by those it has, of the perplexities by the first alone (they are one number in several units):
value and difference with a bootstrap interval over documents, and no test. A group that aggregates its tasks gets
an entry of its own: their documents together, weighted as the group says.

Left out: tasks that run model-written code, multimodal tasks, corpus metrics beside a plain mean.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qconv.errors import CalibrationError, UsageError
from qconv.progress import QUIET, Progress
from qconv.validate.harness import contained, run_harness
from qconv.validate.paired import (
    Aggregate,
    Stratum,
    adjusted_wald_interval,
    bootstrap_interval,
    difference,
    mcnemar_exact,
)
from qconv.validate.task_files import load_tasks

MODELS = ("reference", "candidate")
_PERPLEXITIES = ("word_perplexity", "byte_perplexity", "bits_per_byte", "perplexity")
_FEWER_RESAMPLES = 500  # where every resample recomputes a metric from its items

Model = nn.Module | Callable[[], nn.Module]


def evaluate_tasks(
    models: Mapping[str, Model],
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    device: str = "cpu",
    seed: int = 0,
    chat_template: bool = False,
    allow_task_code: bool = False,
    progress: Progress = QUIET,
) -> list[dict[str, Any]]:
    """Runs ``tasks`` on ``"reference"`` and ``"candidate"`` and compares the answers in pairs.

    Args:
        models: causal language models of transformers, or functions that load one. Loaded one after the other and
            freed again, so two models are never in memory together. A model on another kind of device is moved.
        tokenizer: of both models; left as it is.
        tasks: names of lm_eval tasks, groups or tags, or paths of task files (``*.yaml``).
        include: folder with local task files.
        limit: the first so many documents of each task; None = all.
        batch_size: documents (answers) per forward pass.
        seed: draws few-shot examples, sampled answers and resamples.
        chat_template: put prompts into the tokenizer's chat template.
        allow_task_code: let local task files bring Python (``!function``).

    Returns:
        One dict per task, metric and filter: ``name``, ``metric`` (``"acc"``, or ``"exact_match,FILTER"`` where there
        are several filters), ``num_samples`` (documents), ``reference``, ``candidate``, ``difference`` (candidate -
        reference), ``interval_95`` of it, ``better_to_worse`` and ``worse_to_better`` (documents that changed
        sides), ``mcnemar_p``, ``higher_is_better``. Where scores are not 0 or 1, the changed sides and p are None.

    Raises:
        UsageError: lm_eval is not installed, a task is unknown, unreadable, brings code or cannot run.
        CalibrationError: documents are missing, or the two models did not answer the same ones.
        NumericsError: a model's log-likelihoods are NaN.
    """
    if set(models) != set(MODELS):
        raise UsageError(f"tasks compare {' and '.join(MODELS)}, got {', '.join(models) or 'nothing'}")
    if limit is not None and limit < 1:
        raise UsageError(f"the limit on documents per task must be at least 1, got {limit}")
    if chat_template and not getattr(tokenizer, "chat_template", None):
        raise UsageError("the tokenizer has no chat template to put prompts into")
    runs: dict[str, dict[str, Any]] = {}
    with contained(progress):
        loaded = load_tasks(tasks, include, allow_task_code=allow_task_code)
    for name in MODELS:
        progress.say(f"tasks on the {name}: {', '.join(loaded['tasks'])}")
        model = _load(models[name], device)
        with contained(progress):
            runs[name] = run_harness(
                model,
                tokenizer,
                loaded,
                name=name,
                limit=limit,
                batch_size=batch_size,
                chat_template=chat_template,
                seed=seed,
            )
        del model
        _free()
    with contained(progress):  # metrics of lm_eval are called once more for their resamples
        return _compare(loaded, runs, seed)


def check_tasks(tasks: Sequence[str], include: Path | None = None) -> list[str]:
    """Builds the tasks and drops them: raises now what `evaluate_tasks` would raise after the other work.

    Returns:
        The names under which tasks and groups are reported; a YAML file may name its task otherwise than itself.
    """
    if not tasks:
        return []
    with contained(QUIET):
        loaded = load_tasks(tasks, include, allow_task_code=False)
    return [*loaded["tasks"], *(group.name for group in loaded["groups"].values())]


def measurements(tasks: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Gateable values, by metric name, each ``{"value", "interval_95"}``; larger = the candidate is worse.

    ``task.NAME.METRIC_drop`` is reference - candidate; where lower values are better it is
    ``task.NAME.METRIC_rise``, candidate - reference.
    """
    measured = {}
    for task in tasks:
        value, (low, high) = task["difference"], task["interval_95"]
        name = f"task.{task['name']}.{task['metric']}"
        if task["higher_is_better"]:
            measured[f"{name}_drop"] = {"value": -value, "interval_95": [-high, -low]}
        else:
            measured[f"{name}_rise"] = {"value": value, "interval_95": [low, high]}
    return measured


@dataclass(frozen=True, kw_only=True)
class _Scores:
    """One metric of one task or group; ``aggregate`` None = the mean."""

    name: str
    metric: str
    higher_is_better: bool
    strata: Sequence[Stratum]
    aggregate: Aggregate | None = None

    def as_dict(self, seed: int) -> dict[str, Any]:
        binary = self.aggregate is None and all(stratum.is_binary for stratum in self.strata)
        worse = better = p = None
        if self.aggregate is not None:
            values = difference(self.strata, self.aggregate)
            interval = bootstrap_interval(self.strata, self.aggregate, resamples=_FEWER_RESAMPLES, seed=seed)
        else:
            values = difference(self.strata)
            interval = adjusted_wald_interval(self.strata) if binary else bootstrap_interval(self.strata, seed=seed)
        if binary:
            flips = [stratum.flips() for stratum in self.strata]
            worse, better = sum(down for down, _ in flips), sum(up for _, up in flips)
            worse, better = (worse, better) if self.higher_is_better else (better, worse)
            p = mcnemar_exact(worse, better)
        return {
            "name": self.name,
            "metric": self.metric,
            "num_samples": sum(len(stratum.reference) for stratum in self.strata),
            "reference": values[0],
            "candidate": values[1],
            "difference": values[2],
            "interval_95": list(interval),
            "better_to_worse": worse,
            "worse_to_better": better,
            "mcnemar_p": p,
            "higher_is_better": self.higher_is_better,
        }


def _load(model: Model, device: str) -> nn.Module:
    loaded = model if isinstance(model, nn.Module) else model()
    if next(loaded.parameters()).device.type != torch.device(device).type:
        loaded = loaded.to(device)
    return loaded.eval()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _compare(loaded: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]], seed: int) -> list[dict[str, Any]]:
    entries: dict[str, list[_Scores]] = {}
    by_metric: dict[tuple[str, str, str], _Scores] = {}
    for name, task in loaded["tasks"].items():
        pairs = pair_samples(name, *(runs[model]["samples"].get(name, []) for model in MODELS))
        scores = _scores(name, task, pairs)
        entries[name] = _judged(scores)
        by_metric.update({(name, metric, kind): score for (metric, kind), score in scores.items()})
    groups = [score for group in loaded["groups"].values() for score in _group_scores(group, by_metric)]
    return [score.as_dict(seed) for score in (*groups, *(s for scores in entries.values() for s in scores))]


def pair_samples(
    task: str, reference: Sequence[Mapping[str, Any]], candidate: Sequence[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """The two models' logged samples of a task, document by document and filter by filter.

    Raises:
        CalibrationError: there are none, or they are not the same documents with the same prompts and targets.
    """
    ours, theirs = (_by_document(task, samples) for samples in (reference, candidate))
    if not ours:
        raise CalibrationError(f"task {task} has no documents to evaluate")
    alone = sorted(ours.keys() ^ theirs.keys(), key=str)
    if alone:
        document, kind = alone[0]
        raise CalibrationError(
            f"task {task}: {len(alone)} of the answers have no partner, first document {document} (filter {kind}): "
            "reference and candidate did not answer the same documents"
        )
    for (document, _), sample in ours.items():
        for what in ("doc_hash", "prompt_hash", "target_hash"):
            if sample.get(what) != theirs[document, _].get(what):
                raise CalibrationError(
                    f"task {task}, document {document}: reference and candidate saw different "
                    f"{what.removesuffix('_hash')}s; a task must build the same ones each time"
                )
    return [(sample, theirs[key]) for key, sample in ours.items()]


def _by_document(task: str, samples: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, str], Mapping[str, Any]]:
    found = {(sample["doc_id"], str(sample["filter"])): sample for sample in samples}
    if len(found) != len(samples):
        raise CalibrationError(f"task {task}: {len(samples) - len(found)} documents were answered more than once")
    return found


def _scores(
    name: str, task: Any, pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> dict[tuple[str, str], _Scores]:
    """Every metric of a task for every filter."""
    from lm_eval.api.metrics import mean, nanmean

    items: dict[tuple[str, str], tuple[list[Any], list[Any]]] = {}
    for sample, other in pairs:
        if set(sample["metrics"]) != set(other["metrics"]):
            raise CalibrationError(f"task {name}, document {sample['doc_id']}: the models got different metrics")
        for metric in sample["metrics"]:
            ours, theirs = items.setdefault((metric, str(sample["filter"])), ([], []))
            ours.append(sample[metric])
            theirs.append(other[metric])
    scores = {}
    for (metric, kind), (ours, theirs) in items.items():
        aggregate = task.aggregation().get(metric, mean)
        plain = aggregate in (mean, nanmean) and all(_is_score(value) for value in (*ours, *theirs))
        filters = {f for m, f in items if m == metric}
        scores[metric, kind] = _Scores(
            name=name,
            metric=metric if len(filters) == 1 else f"{metric},{kind}",
            higher_is_better=bool(task.higher_is_better().get(metric, True)),
            strata=[Stratum(reference=ours, candidate=theirs)],
            aggregate=None if plain else aggregate,
        )
    return scores


def _is_score(value: Any) -> bool:
    return isinstance(value, bool | int | float) and math.isfinite(value)


def _judged(scores: Mapping[tuple[str, str], _Scores]) -> list[_Scores]:
    """The plain means, or else everything there is with the first perplexity alone."""
    means = [score for score in scores.values() if score.aggregate is None]
    if means:
        return means
    perplexities = [metric for metric, _ in scores if metric in _PERPLEXITIES]
    return [s for (metric, _), s in scores.items() if metric not in perplexities[1:]]


def _group_scores(group: Any, by_metric: Mapping[tuple[str, str, str], _Scores]) -> Iterator[_Scores]:
    names = [task.task_name for task in group.get_all_tasks()]
    for aggregate in group.aggregate_metric_list or ():
        kinds = sorted({k for n, m, k in by_metric if n in names and m == aggregate.metric})
        for kind in kinds if aggregate.filter_list is None else aggregate.filter_list:
            keys = [(name, aggregate.metric, kind) for name in names]
            members = [by_metric[key] for key in keys if key in by_metric and by_metric[key].aggregate is None]
            if not members:
                continue
            sizes = [len(member.strata[0].reference) for member in members]
            weights = [size / sum(sizes) if aggregate.weight_by_size else 1 / len(sizes) for size in sizes]
            yield _Scores(
                name=group.name,
                metric=members[0].metric,
                higher_is_better=members[0].higher_is_better,
                strata=[
                    Stratum(reference=m.strata[0].reference, candidate=m.strata[0].candidate, weight=weight)
                    for m, weight in zip(members, weights, strict=True)
                ],
            )
