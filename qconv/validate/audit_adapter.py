"""Whether the adapter is in the weights: all of it, at its scaling, everywhere.

Single weights are judged where their own noise permits, and pooled by shard, block and role where it does not:
inverse-variance means, whose error is widened when the members scatter more than their errors say (the Birge
ratio, as in meta-analysis), since what GPTQ does to one weight is not independent over its whole.

What a pooled coefficient may be: between what rounding to nearest onto the candidate's grid leaves and 1.
Algorithms that pass rounding errors on (GPTQ) keep all of a small update on average; rounding to nearest does
not, and both are clean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qconv.validate.audit_measure import SAME_AS_NEAREST
from qconv.validate.audit_tensor import TensorAudit
from qconv.validate.audit_words import finding, where

Finding = dict[str, Any]
Verdict = Literal["applied", "absent", "scaled", "unseen"]

# Standard errors that a verdict must be away from its limit. The largest of 420 clean GPTQ coefficients was 6.7
# errors below 1, but none was outside of its limits.
ERRORS = 5.0
LEAST_ERROR = 2e-3  # float32 sums, and the update rounded to bfloat16 by other tools
ABSENT_SHARE = 0.35  # of the coefficient that the storage permits
# alpha and rank are off by 2 or more, rsLoRA by sqrt(rank); GPTQ moved a single weight's coefficient by 1.5 and
# the mean of all by less than 0.06.
SCALE_MARGIN = 1.1
SCALE_MARGIN_COARSE, SCALE_MARGIN_ONE_COARSE = 1.3, 1.8
LOSS = 0.75  # a smaller part of the update than this deserves a word even when rounding explains it
SAME_AS_BASE = 0.02  # ||Wc - Wb|| / ||D||


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """Coefficient over several weights; ``low .. high`` is what clean storage may make of it."""

    coefficient: float
    error: float
    low: float
    high: float

    def verdict(self, margin: float) -> Verdict:
        slack = ERRORS * self.error
        if self.coefficient + slack < self.low / margin:
            is_zero = abs(self.coefficient) < max(ABSENT_SHARE * self.low, slack)
            return "absent" if is_zero else "scaled"
        if self.coefficient - slack > margin * self.high:
            return "scaled"
        return "applied" if slack < ABSENT_SHARE * self.low else "unseen"


def pool(tensors: Sequence[TensorAudit]) -> Pooled:
    """Inverse-variance mean of the coefficients of weights that all have one."""
    total = weighted = low = high = 0.0
    pairs = []
    for tensor in tensors:
        fit = tensor.fit
        assert fit is not None
        assert fit.coefficient is not None
        assert fit.coefficient_error is not None
        nearest = 1.0 if fit.nearest_coefficient is None else fit.nearest_coefficient
        weight = 1 / max(fit.coefficient_error, LEAST_ERROR) ** 2
        pairs.append((fit.coefficient, weight))
        total += weight
        weighted += weight * fit.coefficient
        low += weight * min(1.0, nearest)
        high += weight * max(1.0, nearest)
    mean = weighted / total
    scatter = sum(weight * (value - mean) ** 2 for value, weight in pairs) / max(1, len(pairs) - 1)
    return Pooled(
        coefficient=mean, error=(max(1.0, scatter) / total) ** 0.5, low=max(0.0, low / total), high=high / total
    )


def absent_names(tensors: Sequence[TensorAudit]) -> set[str]:
    """Weights that the adapter changes and that do not hold its update."""
    seen = [t for t in tensors if t.fit is not None and t.fit.coefficient is not None]
    return _absent(seen, {t.name: _verdict([t]) for t in seen}) if seen else set()


def adapter_findings(tensors: Sequence[TensorAudit], everything: Sequence[TensorAudit]) -> list[Finding]:
    """What is wrong with the update of ``tensors`` (weights that the adapter changes and that are otherwise sound)."""
    seen = [t for t in tensors if t.fit is not None and t.fit.coefficient is not None]
    if not seen:
        return []
    single = {t.name: _verdict([t]) for t in seen}
    absent = _absent(seen, single)
    applied = [t for t in seen if t.name not in absent]
    if applied and absent and _are_weakened(applied, [t for t in seen if t.name in absent]):
        absent, applied = set(), seen
    if not applied or ("applied" not in single.values() and _verdict(seen) == "absent"):
        return [_nothing_applied(seen)]
    found: list[Finding] = []
    rounded = _rounded_away(seen)
    if rounded:
        found.append(_blocks_finding(rounded))
        absent -= {t.name for t in rounded}
        applied = [t for t in applied if t not in rounded]
    if absent:
        found.append(_partly_applied([t for t in seen if t.name in absent], everything))
    return found + (_scaling_findings(applied) if applied else [])


def _margin(tensors: Sequence[TensorAudit]) -> float:
    if any(t.bits is not None and t.bits < 8 for t in tensors):
        return SCALE_MARGIN_COARSE if len(tensors) > 1 else SCALE_MARGIN_ONE_COARSE
    return SCALE_MARGIN


def _verdict(tensors: Sequence[TensorAudit]) -> Verdict:
    return pool(tensors).verdict(_margin(tensors))


def _absent(tensors: Sequence[TensorAudit], single: Mapping[str, Verdict]) -> set[str]:
    """Weights without the update: by themselves, or as members of a shard, block or role that has none of it."""
    absent = {name for name, verdict in single.items() if verdict == "absent"}
    for key in ("", "file", "block", "role"):
        for members in _groups(tensors, key):
            verdicts = {single[t.name] for t in members}
            if "unseen" in verdicts <= {"unseen", "absent"} and _verdict(members) == "absent":
                absent |= {t.name for t in members}
    return absent


def _are_weakened(applied: Sequence[TensorAudit], absent: Sequence[TensorAudit]) -> bool:
    """Whether the absent have some of the update after all, and the others less than they should: one scaling."""
    some, others = pool(absent), pool(applied)
    return some.coefficient > ERRORS * some.error and others.coefficient < others.low and _verdict(applied) == "scaled"


def _groups(tensors: Sequence[TensorAudit], key: str) -> Iterable[list[TensorAudit]]:
    """The weights that have an attribute in common; all of them for an empty key."""
    groups: dict[str, list[TensorAudit]] = {}
    for tensor in tensors:
        groups.setdefault(getattr(tensor, key) if key else "", []).append(tensor)
    return groups.values()


def _rounded_away(tensors: Sequence[TensorAudit]) -> list[TensorAudit]:
    """Weights in 4-bit blocks that hold too little of their update, and are not the base's own.

    What rounding to nearest leaves there is not known (a block's scale follows its largest weight), but it is what
    takes updates away that are smaller than the grid's steps: of merges that were right it left 0 to 95%.
    """
    on_blocks = [t for t in tensors if t.on_blocks and _coefficient(t) < 1 and not _is_base(t)]
    if not on_blocks:
        return []
    if _verdict(on_blocks) == "scaled":
        return on_blocks
    weak = absent_names(on_blocks) | {t.name for t in _scaled_parts(on_blocks)}
    return [t for t in on_blocks if t.name in weak]


def _blocks_finding(tensors: Sequence[TensorAudit]) -> Finding:
    values = [_coefficient(t) for t in tensors]
    return finding(
        "error",
        "adapter-rounded-away",
        f"{len(tensors)} weights lost much of the adapter to rounding in 4-bit blocks",
        f"{where(tensors)}: {min(values):.0%}"
        + (f" to {max(values):.0%}" if len(values) > 1 else "")
        + " of the adapter's update is in these weights, which lie on a 4-bit grid of blocks of 64: rounding to "
        "nearest takes updates back that are smaller than its steps (an adapter applied with less than its scaling "
        "looks the same). Quantize the merged weights with calibration instead, e.g. to w4a16, awq or gptq",
        tensors,
    )


def _coefficient(tensor: TensorAudit) -> float:
    assert tensor.fit is not None
    assert tensor.fit.coefficient is not None
    return tensor.fit.coefficient


def _is_base(tensor: TensorAudit) -> bool:
    return tensor.fit is not None and (tensor.fit.base_distance or 0.0) < SAME_AS_BASE


def _nothing_applied(tensors: Sequence[TensorAudit]) -> Finding:
    pooled = pool(tensors)
    is_base = all(_is_base(t) for t in tensors)
    on_blocks = sum(t.on_blocks for t in tensors) >= 0.9 * len(tensors)
    if on_blocks and not is_base:
        return finding(
            "error",
            "adapter-rounded-away",
            "the adapter was merged in 4 bits and rounded away",
            f"{pooled.coefficient:.1%} of the adapter's update is in the weights, and these lie on a 4-bit grid of "
            "blocks of 64: the merged weights were rounded back to the grid of the base, whose steps are larger than "
            "the update. Merge into the dequantized base, and quantize that with calibration",
            tensors,
        )
    return finding(
        "error",
        "adapter-not-applied",
        "the adapter is not in the weights",
        f"the coefficient of the adapter's update is {pooled.coefficient:.3f} ± {2 * pooled.error:.3f} over "
        f"{len(tensors)} weights (1 = applied): "
        + ("the weights are the base's own. " if is_base else "")
        + "The candidate was written without the merge",
        tensors,
    )


def _partly_applied(absent: Sequence[TensorAudit], everything: Sequence[TensorAudit]) -> Finding:
    files = {t.file for t in absent}
    peers = {t.name for t in everything if t.file in files}
    is_shard = "" not in files and {t.name for t in absent} == peers and len({t.file for t in everything}) > len(files)
    shards = ", ".join(sorted(files))
    return finding(
        "error",
        "adapter-partly-applied",
        f"the adapter is missing in {len(absent)} weights",
        f"{where(absent)}: the coefficient of the adapter's update is {pool(absent).coefficient:.3f} (1 = applied), "
        "and near 1 elsewhere. "
        + (
            f"These are exactly the weights of {shards}: the file is stale, written before the merge; write it again"
            if is_shard
            else "Check which modules the merge matched by name"
        ),
        absent,
    )


def _scaling_findings(tensors: Sequence[TensorAudit]) -> list[Finding]:
    pooled = pool(tensors)
    overall = pooled.verdict(_margin(tensors))
    if overall == "scaled":
        return [
            finding(
                "error",
                "adapter-scale",
                f"the adapter was applied with {pooled.coefficient:.2f}x its scaling",
                f"the coefficient of the adapter's update is {pooled.coefficient:.3f} ± {2 * pooled.error:.3f} over "
                f"{len(tensors)} weights (1 = as trained): check lora_alpha, r and use_rslora, and whether it was "
                "merged more than once",
                tensors,
            )
        ]
    odd = _scaled_parts(tensors)
    found = []
    if odd:
        values = [_coefficient(t) for t in odd]
        found.append(
            finding(
                "error",
                "adapter-scale",
                f"{len(odd)} weights have another share of the adapter",
                f"{where(odd)}: the coefficient of the adapter's update is {min(values):.2f}"
                + (f" to {max(values):.2f}" if len(values) > 1 else "")
                + " (1 = as trained), the others' is as it should be: check rank_pattern and alpha_pattern",
                odd,
            )
        )
    if overall == "unseen" and not _is_nearest(tensors):
        found.append(
            finding(
                "note",
                "adapter-not-visible",
                "the adapter is smaller than the rounding of the weights",
                f"the coefficient of the adapter's update is {pooled.coefficient:.2f} ± {2 * pooled.error:.2f}: the "
                "weights alone do not tell whether it was applied; the comparison of logits does",
            )
        )
    elif pooled.coefficient < LOSS and pooled.low < LOSS:
        found.append(_loss_warning(tensors, pooled))
    return found


def _scaled_parts(tensors: Sequence[TensorAudit]) -> list[TensorAudit]:
    """Weights with another scaling: by themselves, or as a block or role whose mean has one."""
    names = {t.name for t in tensors if _verdict([t]) == "scaled"}
    for key in ("block", "role"):
        for members in _groups(tensors, key):
            if len(members) > 1 and _verdict(members) == "scaled":
                names |= {t.name for t in members}
    return [t for t in tensors if t.name in names]


def _is_nearest(tensors: Sequence[TensorAudit]) -> bool:
    """Every weight is the merged one rounded to nearest on its grid, which proves it however small the update is."""
    return all(t.fit is not None and t.fit.mismatch is not None and t.fit.mismatch < SAME_AS_NEAREST for t in tensors)


def _loss_warning(tensors: Sequence[TensorAudit], pooled: Pooled) -> Finding:
    reason = (
        "The weights are the merged ones rounded to nearest, and the steps of that grid are larger than the update: "
        "the base lies on a 4-bit grid itself, so whole clusters of weights round the same way. "
        if _is_nearest(tensors)
        else f"Rounding to nearest on the candidate's grid would leave {pooled.low:.0%}, so rounding may be the "
        "reason; so may an adapter that was applied with less than its scaling. "
    )
    return finding(
        "warning",
        "adapter-rounded-away",
        f"the weights hold {pooled.coefficient:.0%} of the adapter's update",
        f"coefficient {pooled.coefficient:.3f} ± {2 * pooled.error:.3f} over {len(tensors)} weights. {reason}"
        "An algorithm that passes rounding errors on (gptq) keeps nearly all of it",
        tensors,
    )
