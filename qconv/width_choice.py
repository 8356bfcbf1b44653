"""The width of each linear under a budget: what it costs is measured, and the budget is spent where it saves most.

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
from qconv.size_budget import Sizes, choose_widths, sizes_of, without_budget
from qconv.targets import TARGETS

SHOWN = 5  # units on the terminal


@dataclass(frozen=True, kw_only=True)
class WidthChoice:
    """What was chosen for one output, and by what.

    Attributes:
        asked: the config with its budget.
        chosen: with overrides in its place.
        widths: of each unit, by name.
    """

    asked: QuantizationConfig
    chosen: QuantizationConfig
    sizes: Sizes
    widths: Mapping[str, int]
    sensitivity: Sensitivity

    @property
    def num_bytes(self) -> int:
        """Of all tensors of the quantized linears on disk."""
        return self.sizes.num_bytes(self.widths)

    @property
    def expected(self) -> float:
        """Sum of the costs of all units at their widths, in nats per token."""
        return sum(self.sensitivity.at(name, bits) for name, bits in self.widths.items())

    @property
    def overrides(self) -> list[str]:
        """Those that stand for the budget, as ``--override`` takes them."""
        return [_as_option(override) for override in self.chosen.overrides[len(self.asked.overrides) :]]

    def facts(self) -> dict[str, Any]:
        """For the report."""
        smallest, (least, most) = self.asked.widths[0], self.sizes.reach
        return {
            "bits per weight asked": self.asked.budget,
            "bits per weight": round(self.sizes.bits_per_weight(self.num_bytes), 4),
            "bytes of quantized linears": self.num_bytes,
            "bits per weight within reach": [least, most],
            "widths": list(self.asked.widths),
            "cost measured": f"KL of the model with one unit at {smallest} bits by {self.sensitivity.algorithm}, "
            f"{self.sensitivity.num_positions} positions of calibration text, sha256 {self.sensitivity.tokens}",
            f"sum of costs at {smallest} bits": sum(self.sensitivity.costs.values()),
            "sum of costs as chosen": self.expected,
            "as overrides": self.overrides,
            **({"linears that keep their scheme": list(self.sizes.kept)} if self.sizes.kept else {}),
            "linears": {
                unit.name: {
                    "bits": self.widths[unit.name],
                    f"cost at {smallest} bits": self.sensitivity.costs[unit.name],
                    "weights": unit.num_weights,
                }
                for unit in self.sizes.units
            },
        }

    def say(self, progress: Progress) -> None:
        smallest = self.asked.widths[0]
        costs = self.sensitivity.costs
        progress.say(
            f"budget of {self.asked.budget:g} bits per weight: {self.sizes.bits_per_weight(self.num_bytes):.4f} taken, "
            f"expected KL {self.expected:.4f} ({sum(costs.values()):.4f} with all in {smallest} bits)"
        )
        for bits in self.asked.widths:
            units = [unit for unit in self.sizes.units if self.widths[unit.name] == bits]
            share = sum(unit.num_weights for unit in units) / self.sizes.num_weights
            dearest = sorted(units, key=lambda unit: -costs[unit.name])
            shown = ", ".join(f"{unit.name} ({costs[unit.name]:.2g})" for unit in dearest[:SHOWN])
            rest = f" and {len(units) - SHOWN} more" if len(units) > SHOWN else ""
            progress.say(f"{bits} bits: {share:.1%} of the weights{': ' if units else ''}{shown}{rest}")
        for unit in self.sizes.units:
            progress.detail(f"{unit.name}: {self.widths[unit.name]} bits, costs {costs[unit.name]:.3g} at {smallest}")


def _as_option(override: OverrideConfig) -> str:
    return f"{override.pattern}:bits={override.bits}"


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
    smallest = config.widths[0]
    at_smallest = without_budget(config, sizes, {unit.name: smallest for unit in sizes.units})
    default, schemes = schemes_of(view, weights, at_smallest)
    request = QuantizeRequest(
        config=measured_by(at_smallest),
        scheme=default,
        weights=layout.quantized,
        schemes=schemes,
        storage=layout.storage,
        model_type=str(view.config.get("model_type")),
        gpu_memory_limit=job.gpu_memory_limit,
    )
    key = (request.config.resolved_algorithm, request.config.desc_act, request.config.damping, layout.storage,
           frozenset(schemes.items()), tuple(unit.modules for unit in sizes.units))  # fmt: skip
    if key not in measured:
        progress.say(f"measuring what each of {len(sizes.units)} linears, fused ones as one, costs in {smallest} bits")
        measured[key] = measure_sensitivity(view, sizes.units, smallest, request, plan.calibration, device, progress)
    sensitivity = measured[key]
    costs = {name: {bits: sensitivity.at(name, bits) for bits in config.widths} for name in sensitivity.costs}
    widths = choose_widths(sizes, config, costs)
    return WidthChoice(
        asked=config,
        chosen=without_budget(config, sizes, widths),
        sizes=sizes,
        widths=widths,
        sensitivity=sensitivity,
    )
