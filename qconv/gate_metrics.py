"""The table of metrics that can be gated: name, direction, unit, range. Imports no torch.

KL is KL(reference || candidate) in nats per token, ``reverse_kl`` the other way round. Bare names are about the
reference against the stored candidate; ``merge.`` and ``requantization.`` are the two steps between them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from qconv.errors import UsageError

Unit = Literal["nats", "share", "ratio", "dB", "count"]

TASK_PATTERN = "task.<name>.<metric>_drop"  # _rise where a lower score is better
TASK_NAME = r"task\.(?P<task>[^\s<>=]+)\.(?P<metric>[\w,@+-]+)_(?P<way>drop|rise)"

# The smallest floors that a relative limit counts with: what one rounding of logits to the dtype can do, which is in
# every result whatever is measured. Batches of other shapes need not be computed in another order, and then the
# reference differs from itself nowhere; nothing but a bitwise copy would stay within any multiple of 0.
# A relative error e of logits gives a KL of the order e^2, and changes shares by the order e. On the tests' model exact
# merges, rounded once, are 2e-8, 1.6e-6 and 1.0e-4 away in float32, float16 and bfloat16, whose e^2 are 1e-14, 9.5e-7
# and 6.1e-5; their floors are 0.
# In float32 other things are coarser: ten times what log-probabilities round by (about 1e-7 per position), and one
# position in 10,000, about the least that the default evaluation can see at all.
_LEAST_FLOOR = {2: 1e-6, 1: 1e-4}


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One row of the table.

    Attributes:
        name: as it stands in rules and reports.
        label: as it stands in sentences.
        larger_is_better: a rule on it is ``>=``; otherwise ``<=``.
        unit: ``"share"`` and ``"ratio"`` may be written as percentages.
        description: one line.
        lowest, highest: the values it can take; a limit lies between them.
        noise_power: the power of the logits' relative error that it grows with; None = a limit on it cannot be
            relative: it has both signs (noise scatters around 0), or the floor does not measure it.
        needs: what a run needs for it to be measured; ends a sentence.
        more: what to measure more of where it is undecided and is not counted in tokens.
    """

    name: str
    label: str
    larger_is_better: bool
    unit: Unit
    description: str
    lowest: float = 0.0
    highest: float = float("inf")
    noise_power: Literal[1, 2] | None = None
    needs: str = "compare the candidate with the reference"
    more: str = "evaluate more tokens (--eval-tokens)"

    @property
    def operator(self) -> str:
        return ">=" if self.larger_is_better else "<="

    def least_floor(self, precision: float) -> float | None:
        """The smallest noise floor that a relative limit counts with, in a dtype of this epsilon."""
        if self.noise_power is None:
            return None
        return max(precision**self.noise_power, _LEAST_FLOOR[self.noise_power])


def _pair_metrics() -> Iterator[Metric]:
    """What is measured on every pair of models."""
    statistics = {
        "mean": ("mean", "mean over positions"),
        "median": ("median", "median over positions"),
        "p90": ("p90", "90th percentile over positions"),
        "p95": ("p95", "95th percentile over positions"),
        "p99": ("p99", "99th percentile over positions: the rare tokens that change"),
        "p99_9": ("p99.9", "99.9th percentile over positions"),
        "max": ("maximum", "largest of all positions; grows with the number of evaluated tokens"),
    }

    def kl(name: str, label: str, what: str) -> Metric:
        return Metric(name=name, label=label, larger_is_better=False, unit="nats", description=what, noise_power=2)

    for key, (short, what) in statistics.items():
        yield kl(f"kl_{key}", f"KL {short}", f"KL(reference || candidate), {what}")
    for key in ("mean", "p99"):
        short, what = statistics[key]
        yield kl(f"reverse_kl_{key}", f"reverse KL {short}", f"KL(candidate || reference), {what}")
    for k in (1, 5):
        what = (
            "share of positions with the same most likely token"
            if k == 1
            else "mean share of the five most likely tokens in common"
        )
        yield Metric(
            name=f"top{k}_agreement",
            label=f"top-{k} agreement",
            larger_is_better=True,
            unit="share",
            description=what,
            highest=1,
            noise_power=1,
        )
    yield Metric(
        name="perplexity_ratio",
        label="perplexity ratio",
        larger_is_better=False,
        unit="ratio",
        description="perplexity of the candidate / perplexity of the reference",
    )
    yield Metric(
        name="log_perplexity_ratio",
        label="log perplexity ratio",
        larger_is_better=False,
        unit="nats",
        description="mean extra -log probability of the actual next token; negative = better than the reference",
        lowest=float("-inf"),
    )
    yield Metric(
        name="flips",
        label="flips",
        larger_is_better=False,
        unit="share",
        description="share of positions whose greedy token turns from right to wrong or from wrong to right",
        highest=1,
        noise_power=1,
    )
    yield Metric(
        name="probability_difference_rms",
        label="RMS probability difference",
        larger_is_better=False,
        unit="share",
        description="root mean square difference of the probabilities of the actual next token",
        highest=1,
        noise_power=1,
    )


def _other_metrics() -> Iterator[Metric]:
    yield Metric(
        name="adapter_effect_retained",
        label="adapter effect retained",
        larger_is_better=True,
        unit="share",
        description="1 - KL(reference || candidate) / KL(reference || base without adapter); negative = further away",
        lowest=float("-inf"),
        highest=1,
        needs="give the adapter; one that resizes the vocabulary cannot be compared with its base",
    )
    yield Metric(
        name="block_sqnr_db_min",
        label="lowest block SQNR",
        larger_is_better=True,
        unit="dB",
        description="signal-to-quantization-noise ratio of the hidden states after the worst block, in dB",
        lowest=float("-inf"),
        needs="compare hidden states block by block",
    )
    yield Metric(
        name="prompts_identical",
        label="share of identical answers",
        larger_is_better=True,
        unit="share",
        description="share of prompts whose greedy text is identical",
        highest=1,
        needs="have prompts answered",
        more="compare more prompts",
    )
    yield Metric(
        name="findings",
        label="error findings",
        larger_is_better=False,
        unit="count",
        description="number of findings of severity error in the audit of the files",
        needs="let the files be audited",
        more="let the files be audited",
    )
    yield Metric(
        name=TASK_PATTERN,
        label="drop on a task",
        larger_is_better=False,
        unit="share",
        description="what the reference scores above the candidate on a task; negative = the candidate is better",
        lowest=float("-inf"),
        needs="run the task on both models",
        more="run more samples of the task",
    )


_STEPS = {
    "": ("", None),
    "merge.": (" (merge alone)", "give an adapter and let the merge be measured on its own"),
    "requantization.": (
        " (requantization alone)",
        "give an adapter and a quantized candidate, and let the merge be measured on its own",
    ),
}

METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        *(
            replace(
                metric,
                name=prefix + metric.name,
                label=metric.label + suffix,
                description=metric.description + suffix,
                needs=needs or metric.needs,
            )
            for prefix, (suffix, needs) in _STEPS.items()
            for metric in _pair_metrics()
        ),
        *_other_metrics(),
    )
}


def find_metric(name: str) -> Metric:
    """The metric of that name; any task's drop, e.g. ``task.arc_easy.acc_drop``, is one too.

    Raises:
        UsageError: there is none; names the nearest.
    """
    if name in METRICS and name != TASK_PATTERN:
        return METRICS[name]
    if match := re.fullmatch(TASK_NAME, name):
        label = f"{match['metric']} {match['way']} on {match['task']}"
        return replace(METRICS[TASK_PATTERN], name=name, label=label)
    asked = name[:60].lower()
    begun = [known for known in METRICS if known.startswith(f"{asked.rstrip('_')}_")]
    near = (begun or difflib.get_close_matches(asked, METRICS, n=4, cutoff=0.55))[:7]
    bare = ", ".join(known for known in METRICS if not known.startswith(tuple(filter(None, _STEPS))))
    hint = (
        f"did you mean {', '.join(near)}?" if near else f"there are {bare}; most also as merge.* and requantization.*"
    )
    raise UsageError(f"unknown metric {name[:60]!r}; {hint}")
