"""Width and groups of each linear under a budget: what it costs is measured, and the budget spent where it saves most.

The result is a job whose outputs have overrides in the place of their budgets: it can be planned, run, and written
down like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qconv.config import MergeJob, OutputConfig
from qconv.convert import FORMATS
from qconv.layout import Layout
from qconv.overrides import OverrideConfig
from qconv.plan import Plan, make_plan
from qconv.progress import QUIET, Progress
from qconv.quantization_config import QuantizationConfig
from qconv.quantize.blocks import QuantizeRequest
from qconv.selection import schemes_of
from qconv.sensitivity import Sensitivity, measure_sensitivity, measured_by
from qconv.size_budget import Choice, Sizes, choose, sizes_of, without_budget
from qconv.targets import TARGETS

SHOWN = 5  # units on the terminal


@dataclass(frozen=True, kw_only=True)
class WidthChoice:
    """What was chosen for one output, and by what.

    Attributes:
        asked: the config with its budget.
        chosen: with a group size and overrides in its place.
        choices: of each unit, by name.
    """

    asked: QuantizationConfig
    chosen: QuantizationConfig
    sizes: Sizes
    choices: Mapping[str, Choice]
    sensitivity: Sensitivity

    @property
    def num_bytes(self) -> int:
        """Of all tensors of the quantized linears on disk."""
        return self.sizes.num_bytes(self.choices)

    @property
    def expected(self) -> float:
        """Sum of the costs of all units with their choices, in nats per token."""
        return sum(self.sensitivity.at(name, choice) for name, choice in self.choices.items())

    @property
    def alike(self) -> dict[str, tuple[float, float]]:
        """Bits per weight and sum of costs if all units had one width, in the groups that nothing chose, by width."""
        found = {}
        for choice in self.sizes.alike(self.asked):
            everywhere = self.sizes.everywhere(choice)
            cost = sum(self.sensitivity.at(name, choice) for name in everywhere)
            found[choice.width] = self.sizes.bits_per_weight(self.sizes.num_bytes(everywhere)), cost
        return found

    @property
    def overrides(self) -> list[str]:
        """Those that stand for the budget, as ``--override`` takes them."""
        return [_as_option(override) for override in self.chosen.overrides[len(self.asked.overrides) :]]

    def facts(self) -> dict[str, Any]:
        """For the report."""
        measured, (least, most) = self.sensitivity.measured, self.sizes.reach
        choices = {choice for unit in self.sizes.units for choice in unit.num_bytes}
        group_sizes = sorted({choice.group_size for choice in choices if choice.target is None})
        return {
            "bits per weight asked": self.asked.budget,
            "bits per weight": round(self.sizes.bits_per_weight(self.num_bytes), 4),
            "bytes of quantized linears": self.num_bytes,
            "bits per weight within reach": [least, most],
            "widths": [*self.asked.widths, *self.asked.budget_targets],
            "group sizes": group_sizes,
            "cost measured": f"KL of the model with one unit at {measured} by {self.sensitivity.algorithm}, "
            f"{self.sensitivity.num_positions} positions of calibration text, sha256 {self.sensitivity.tokens}",
            "sum of costs as chosen": self.expected,
            "with one width for all": {
                width: {"bits per weight": round(taken, 4), "sum of costs": cost}
                for width, (taken, cost) in self.alike.items()
            },
            "group size of what no override is about": self.sizes.group_size,
            "as overrides": self.overrides,
            **({"linears that keep their scheme": list(self.sizes.kept)} if self.sizes.kept else {}),
            "linears": {
                unit.name: {
                    "bits": self.choices[unit.name].bits,
                    "group size": self.choices[unit.name].group_size,
                    **({"target": self.choices[unit.name].target} if self.asked.budget_targets else {}),
                    f"cost at {measured.width}": self.sensitivity.costs[unit.name],
                    "cost": self.sensitivity.at(unit.name, self.choices[unit.name]),
                    "weights": unit.num_weights,
                }
                for unit in self.sizes.units
            },
        }

    def say(self, progress: Progress) -> None:
        costs = self.sensitivity.costs
        alike = ", ".join(
            f"{cost:.2g} with all in {width.removesuffix(' bits')} ({taken:.3f})"
            for width, (taken, cost) in self.alike.items()
        )
        progress.say(
            f"budget of {self.asked.budget:g} bits per weight: {self.sizes.bits_per_weight(self.num_bytes):.4f} taken, "
            f"expected KL {self.expected:.2g}; {alike}"
        )
        for choice in sorted(set(self.choices.values()), key=_order):
            units = [unit for unit in self.sizes.units if self.choices[unit.name] == choice]
            share = sum(unit.num_weights for unit in units) / self.sizes.num_weights
            dearest = sorted(units, key=lambda unit: -costs[unit.name])
            shown = ", ".join(f"{unit.name} ({costs[unit.name]:.2g})" for unit in dearest[:SHOWN])
            rest = f" and {len(units) - SHOWN} more" if len(units) > SHOWN else ""
            progress.say(f"{choice}: {share:.1%} of the weights: {shown}{rest}")
        for unit in self.sizes.units:
            progress.detail(
                f"{unit.name}: {self.choices[unit.name]}, costs {costs[unit.name]:.3g} at {self.sensitivity.measured}"
            )


def _order(choice: Choice) -> tuple[int, int]:
    return choice.bits, choice.group_size % 1000  # one scale for each row comes last


def _as_option(override: OverrideConfig) -> str:
    settings = {"bits": override.bits, "group-size": override.group_size, "target": override.target}
    return f"{override.pattern}:" + ",".join(f"{name}={value}" for name, value in settings.items() if value is not None)


def _measured(sizes: Sizes, config: QuantizationConfig) -> Choice:
    """What to measure at: the largest width that all could have, or the smallest; of integers where there are any.

    Near what will be chosen: the further away, the less is the KL quadratic in the error.
    """
    assert config.budget is not None
    alike = sizes.alike(config)
    alike = [choice for choice in alike if choice.target is None] or alike
    taken = {choice: sizes.bits_per_weight(sizes.num_bytes(sizes.everywhere(choice))) for choice in alike}
    fitting = [choice for choice in alike if taken[choice] <= config.budget]
    return max(fitting or [min(alike, key=taken.__getitem__)], key=taken.__getitem__)


def with_widths(job: MergeJob, device: str, progress: Progress) -> tuple[MergeJob, dict[int, WidthChoice]]:
    """The job with overrides in the place of budgets, and what was chosen by the number of the output.

    Raises:
        QconvError: any of its kinds; see `errors`.
    """
    if not any(output.quantization and output.quantization.budget for output in job.outputs):
        return job, {}
    plan = make_plan(job, QUIET)  # what can be refused is refused before the work
    outputs, choices = list(job.outputs), {}
    measured: dict[Any, Sensitivity] = {}
    for number, (output, layout) in enumerate(zip(job.outputs, plan.layouts, strict=True)):
        if output.quantization is not None and output.quantization.budget is not None:
            choices[number] = _choose(job, output, layout, plan, device, progress, measured)
            choices[number].say(progress)
            outputs[number] = replace(output, quantization=choices[number].chosen)
    return replace(job, outputs=tuple(outputs)), choices


def _choose(
    job: MergeJob,
    output: OutputConfig,
    layout: Layout,
    plan: Plan,
    device: str,
    progress: Progress,
    measured: dict[Any, Sensitivity],
) -> WidthChoice:
    """What to do with one output.

    Args:
        measured: what was measured for other outputs, by all that it depends on.
    """
    config, view = output.quantization, plan.reference.merged
    assert config is not None
    assert plan.calibration is not None  # a budget needs text
    weights = [name for name in view.specs() if name in layout.quantized]
    sizes = sizes_of(view, weights, config, FORMATS[TARGETS[config.target].format], layout.storage)
    at = _measured(sizes, config)
    uniform = without_budget(config, sizes, sizes.everywhere(at))
    default, schemes = schemes_of(view, weights, uniform)
    request = QuantizeRequest(
        config=measured_by(uniform),
        scheme=default,
        weights=layout.quantized,
        schemes=schemes,
        storage=layout.storage,
        model_type=str(view.config.get("model_type")),
        gpu_memory_limit=job.gpu_memory_limit,
    )
    key = (
        (request.config.resolved_algorithm, request.config.desc_act, request.config.damping, layout.storage),
        frozenset(schemes.items()),
        tuple((unit.modules, tuple(unit.num_bytes)) for unit in sizes.units),
    )
    if key not in measured:
        progress.say(f"measuring what each of {len(sizes.units)} linears, fused ones as one, costs in {at.width}")
        integers, _ = schemes_of(view, weights, config)
        measured[key] = measure_sensitivity(
            view, sizes.units, at, integers, request, plan.calibration, device, progress
        )
    sensitivity = measured[key]
    costs = {
        unit.name: {choice: sensitivity.at(unit.name, choice) for choice in unit.num_bytes} for unit in sizes.units
    }
    choices = choose(sizes, config, costs)
    return WidthChoice(
        asked=config,
        chosen=without_budget(config, sizes, choices),
        sizes=sizes,
        choices=choices,
        sensitivity=sensitivity,
    )
