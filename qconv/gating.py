"""Which gates a run has, and whether it can measure what they ask for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod

from qconv.config import ValidationConfig
from qconv.errors import UsageError, concerning
from qconv.gate_rules import ArtifactKind, Rule, artifact_kind, combine, default_rules
from qconv.runners import Candidate, Reference
from qconv.validate.prompts import load_prompts
from qconv.validate.tasks import check_tasks


def rules_for(
    candidate: Candidate, has_adapter: bool, config: ValidationConfig, is_audited: bool = True
) -> tuple[Rule, ...]:
    """The defaults for what the candidate is, replaced where a policy file or a flag says otherwise.

    What cannot be measured is no default gate; asked for, it fails.
    """
    defaults = default_rules(_kinds(candidate), has_adapter) if config.defaults and config.policy.defaults else ()
    if not is_audited:
        defaults = tuple(rule for rule in defaults if rule.metric != "findings")
    return combine(defaults, config.policy.rules, config.rules)


def _kinds(candidate: Candidate) -> Mapping[ArtifactKind, int]:
    """How many weights of the candidate are of each kind; what is not quantized counts where nothing is."""
    view, found = candidate.view, Counter[ArtifactKind]()
    for module, bits in view.bits.items():
        scheme = view.schemes.get(module)
        kind = artifact_kind(bits, scheme is not None and (scheme.kind == "float" or scheme.rounds_activations))
        found[kind] += prod(view.specs()[f"{module}.weight"].shape)
    return found or {"plain": 1}


def check_rules(reference: Reference, config: ValidationConfig, has_adapter: bool) -> None:
    """Refuses a gate that nothing could be measured for; to be asked before the work.

    Args:
        has_adapter: an adapter is given, or is trained before.

    Raises:
        UsageError: a gate on the adapter or the merge without an adapter, and the like.
    """
    if config.prompts is not None:
        load_prompts(config.prompts)
    tasks = check_tasks(config.tasks, config.task_folder)
    for rule in (*config.policy.rules, *config.rules):
        with concerning("gates", rule.metric):
            _check_rule(rule.metric, reference, config, has_adapter, tasks)


def _check_rule(
    metric: str, reference: Reference, config: ValidationConfig, has_adapter: bool, tasks: Sequence[str]
) -> None:
    if not has_adapter and (metric == "adapter_effect_retained" or metric.startswith("merge.")):
        raise UsageError(f"the gate on {metric} needs an adapter: without one there is no merge to measure")
    if metric == "adapter_effect_retained" and reference.resizes_vocabulary:
        raise UsageError(
            f"the gate on {metric} compares with the base, and the adapter resizes its vocabulary: drop the gate"
        )
    if metric == "prompts_identical" and config.prompts is None:
        raise UsageError(f"the gate on {metric} needs prompts: add --prompts default, or a file")
    if metric.startswith("task.") and not any(metric.startswith(f"task.{name}.") for name in tasks):
        name = metric.removeprefix("task.").rpartition(".")[0]
        asked = f" (asked for: {', '.join(tasks)})" if tasks else ""
        raise UsageError(f"the gate on {metric} needs that task: add --tasks {name}{asked}")
