"""Whether channel scales that were moved between neighbours balance.

AWQ (Lin et al. 2023, section 3.2) and SmoothQuant multiply the input channels of a linear and divide what
produces them: a norm's weight (Gemma's norms multiply by 1 + weight), or the rows of another linear (the last
ones of a fused projection; one value head feeds several heads of ``o_proj``). Both sides are seen in the stored
weights, so their product is checked channel by channel. Which linear follows which producer is found by matching
the scales themselves within a block, not by name; names only say which linears share an input.

Dimension legend: K = input channels, N = output channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from qconv.experts import expert_of
from qconv.validate.audit_scales import EVEN_FACTOR, Scales, follows, is_hidden
from qconv.validate.audit_tensor import TensorAudit

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
OPEN_SPREAD = 0.02  # of log scales that nothing takes back: less is within what 4-bit rounding does to channels
OPEN_ERRORS = 3.0
# The share of the rest that fitted channel scales explain: 0.09 was the most in clean artifacts without any.
CLEAR_GAIN = 0.25


@dataclass(kw_only=True)
class FoldVerdict:
    """What was found in one block.

    Attributes:
        explained: vectors (norms, biases) whose difference a linear takes back.
        imbalance: folded linear -> how many times too large its product with its producer is.
        unbalanced: linears with channel scales that nothing takes back.
        scaled_norms: norms whose linears are all too large by the same factor.
    """

    explained: set[str] = field(default_factory=set)
    imbalance: dict[str, float] = field(default_factory=dict)
    unbalanced: list[str] = field(default_factory=list)
    scaled_norms: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Norm:
    """The norm whose scales a linear has, and their common factor (a logarithm)."""

    name: str
    middle: float


def judge_folds(block: Sequence[TensorAudit], config: Mapping[str, Any]) -> FoldVerdict:
    """Matches the scales of one decoder block; ``config`` gives the number of heads."""
    verdict = FoldVerdict()
    linears = [t for t in block if t.fit is not None]
    columns = {t.name: _column_scales(t) for t in linears}
    norms = _match_norms(block, columns, {t.name: _half_step(t) for t in linears}, verdict)
    rows = {t.name: _row_scales(t, columns[t.name], norms) for t in linears}
    consumed = _judge_pairs(linears, columns, rows, norms, config, verdict)
    for linear in linears:
        if linear.name in consumed or not _is_folded(linear):
            continue
        if not _is_clear(linear):
            verdict.imbalance.setdefault(linear.name, columns[linear.name].factor())
        elif _is_open(linear, columns[linear.name], norms) or _stands_out(rows[linear.name]):
            verdict.unbalanced.append(linear.name)
    _judge_siblings(linears, columns, norms, verdict)
    for bias in block:
        weight = bias.name.removesuffix("bias") + "weight"
        if bias.ratio_K is None or not bias.name.endswith(".bias") or weight not in rows:
            continue
        if len(bias.ratio_K) != len(rows[weight]):
            continue  # GPT-2's Conv1D stores its weights [K, N]; no format quantizes those, so nothing was folded
        wanted = -Scales.of(bias.ratio_K)  # a bias is divided as the rows of its own weight are
        if is_hidden(wanted, rows[weight]) or follows(rows[weight], wanted):
            verdict.explained.add(bias.name)
    return verdict


def _match_norms(
    block: Sequence[TensorAudit], columns: Mapping[str, Scales], half_steps: Mapping[str, float], verdict: FoldVerdict
) -> dict[str, _Norm]:
    """For each linear the norm whose scales it has, if there is one."""
    vectors = {t.name: Scales.of(t.ratio_K) for t in block if t.ratio_K is not None and not t.name.endswith(".bias")}
    moved = {name: scales for name, scales in vectors.items() if scales.log_K.abs().max() > 0}
    norms: dict[str, _Norm] = {}
    for linear, own in columns.items():
        alike = {name: scales for name, scales in moved.items() if len(scales) == len(own)}
        hidden = {name for name, scales in alike.items() if is_hidden(scales, own, half_steps[linear])}
        verdict.explained |= hidden
        matching = {
            name: (own - scales).spread()
            for name, scales in alike.items()
            if follows(own, scales) or (name in hidden and scales.is_factor)
        }
        if matching:
            best = min(matching, key=matching.__getitem__)
            verdict.explained.add(best)
            difference = own - alike[best]
            norms[linear] = _Norm(name=best, middle=own.middle() - difference.middle())
            verdict.imbalance[linear] = difference.factor()
    for norm in dict.fromkeys(found.name for found in norms.values()):
        factors = [verdict.imbalance[linear] for linear, found in norms.items() if found.name == norm]
        is_scaled = min(abs(factor - 1) for factor in factors) > EVEN_FACTOR
        if is_scaled and max(factors) - min(factors) < EVEN_FACTOR:
            verdict.scaled_norms.append(norm)
    return norms


def _half_step(linear: TensorAudit) -> float:
    """Of a grid of integers, relative to its largest value."""
    return 0.0 if linear.bits is None else 0.5 / (2**linear.bits - 1)


def _column_scales(linear: TensorAudit) -> Scales:
    """Scale of each column, without what rounding alone does: grids of least error shrink weights."""
    assert linear.fit is not None
    channels = linear.fit.channels
    return Scales.of(channels.column_K, channels.column_error_K).shifted(-_shrinkage(linear))


def _row_scales(linear: TensorAudit, column: Scales, norms: Mapping[str, _Norm]) -> Scales:
    """Scale of each row, without what the norm before the linear explains.

    Fitted together, rows have the median 1 and the common factor is in the columns; fitted alone, rows have it.
    """
    assert linear.fit is not None
    channels = linear.fit.channels
    of_norm = norms[linear.name].middle if linear.name in norms else 0.0
    common = column.middle() if linear.fit.is_folded else -_shrinkage(linear)
    return Scales.of(channels.row_N, channels.row_error_N).shifted(common - of_norm)


def _judge_pairs(
    linears: Sequence[TensorAudit],
    columns: Mapping[str, Scales],
    rows: Mapping[str, Scales],
    norms: Mapping[str, _Norm],
    config: Mapping[str, Any],
    verdict: FoldVerdict,
) -> set[str]:
    """Linears whose input channels another one's rows take back; both members of every such pair."""
    consumed: set[str] = set()
    inputs: dict[tuple[str, int], list[Scales]] = {}  # by producer and number of inputs
    homes = {linear.name: _home(linear.name) for linear in linears}
    for linear in linears:
        column = columns[linear.name]
        if linear.name in norms:
            continue
        partners: list[tuple[float, TensorAudit, float]] = []
        for producer in linears:
            if producer is linear or producer.name in consumed or homes[producer.name] != homes[linear.name]:
                continue
            if not _may_be_pair(linear, producer, column):
                continue
            key = (producer.name, len(column))
            if key not in inputs:
                inputs[key] = _as_inputs(rows[producer.name], len(column), config)
            for row in inputs[key]:
                if _is_pair(linear, producer, column, row):
                    partners.append(((column + row).spread(), producer, (column + row).factor()))
        if partners:
            _, producer, factor = min(partners, key=lambda partner: partner[0])
            # A producer whose own input channels nothing explains has no factor of its own to speak of.
            is_open = _is_open(producer, columns[producer.name], norms)
            verdict.imbalance[linear.name] = 1.0 if is_open else factor
            verdict.imbalance[producer.name] = 1.0
            consumed |= {linear.name, producer.name}
    return consumed


def _home(name: str) -> tuple[str, int] | None:
    """The expert that a linear is of: what one makes reaches no linear of another."""
    expert = expert_of(name.removesuffix(".weight"))
    return None if expert is None else (expert.experts, expert.number)


def _may_be_pair(linear: TensorAudit, producer: TensorAudit, column: Scales) -> bool:
    """What `_is_pair` needs in any case; told without looking at the producer's rows."""
    return _is_folded(linear) or _is_folded(producer) or column.is_factor


def _is_pair(linear: TensorAudit, producer: TensorAudit, column: Scales, row: Scales) -> bool:
    """Whether a linear's input channels and its producer's rows cancel; either may be the one that is followed."""
    taken = -row
    if (_is_folded(linear) and follows(taken, column)) or (_is_folded(producer) and follows(column, taken)):
        return True
    # Scales of nearly all channels alike do not show as folded, but as two factors that cancel.
    return column.is_factor and abs((column + row).factor() - 1) < EVEN_FACTOR / 2


def _judge_siblings(
    linears: Sequence[TensorAudit], columns: Mapping[str, Scales], norms: Mapping[str, _Norm], verdict: FoldVerdict
) -> None:
    """Linears that share an input must all follow the scales that were moved into its norm."""
    for group in SHARED_INPUTS:
        members = [t.name for t in linears if t.name.split(".")[-2] in group]
        followed = {norms[name].name: columns[name] for name in members if name in norms}
        for name in members:
            if name not in norms and name not in verdict.unbalanced:
                gaps = [columns[name] - scales for scales in followed.values()]
                if any(_stands_out(gap) for gap in gaps):
                    verdict.unbalanced.append(name)


def _is_open(linear: TensorAudit, column: Scales, norms: Mapping[str, _Norm]) -> bool:
    """Its input channels are clearly scaled, and by no norm."""
    return _is_clear(linear) and linear.name not in norms and _stands_out(column)


def _stands_out(scales: Scales) -> bool:
    return scales.spread() > OPEN_SPREAD and scales.errors() > OPEN_ERRORS


def _is_clear(tensor: TensorAudit) -> bool:
    """Its channel scales explain more than rounding noise looks like."""
    return tensor.fit is not None and tensor.fit.fold_gain > CLEAR_GAIN


def _is_folded(tensor: TensorAudit) -> bool:
    return tensor.fit is not None and tensor.fit.is_folded


def _shrinkage(tensor: TensorAudit) -> float:
    """Logarithm of the scale that rounding to nearest alone leaves."""
    assert tensor.fit is not None
    shrunk = tensor.fit.nearest_scale
    return math.log(shrunk) if shrunk is not None and shrunk > 0 else 0.0


def _as_inputs(row: Scales, num_inputs: int, config: Mapping[str, Any]) -> list[Scales]:
    """Scales per output of a producer as scales per input of what may follow it: the ways in which they can fit.

    All or the last rows (fused projections), and value heads that are each repeated for their query heads.
    """
    ways = [row[slice(len(row) - num_inputs, None)]] if len(row) >= num_inputs else []
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if not isinstance(heads, int) or not isinstance(groups, int) or not 0 < groups < heads:
        return ways
    width = num_inputs // heads
    if heads % groups == 0 and width * heads == num_inputs and len(row) >= groups * width:
        source_K = torch.arange(len(row))[-groups * width :].view(groups, 1, width)
        ways.append(row[source_K.expand(-1, heads // groups, -1).reshape(-1)])
    return ways
