"""Whether channel scales that were moved between neighbours balance.

AWQ (Lin et al. 2023, section 3.2) and SmoothQuant multiply the input channels of a linear and divide what
produces them: a norm's weight (Gemma's norms multiply by 1 + weight), or the rows of another linear (the last
ones of a fused projection; one value head feeds several heads of ``o_proj``). Both sides are seen in the stored
weights, so their product is checked channel by channel. Which linear follows which producer is found by matching
the scales themselves within a block, not by name; names only say which linears share an input.

Noise that the match must survive: a least-squares scale of a column of N weights that were rounded with relative
error e has a standard error of about e / sqrt(N) (4-bit, N = 256: 1%).

Dimension legend: K = input channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qconv.validate.audit_tensor import TensorAudit

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
LEAST_SPREAD = 0.004  # of log scales: 16-bit storage of a norm alone makes 0.002
# The share of the rest that fitted channel scales explain: 0.09 was the most in clean artifacts without any.
CLEAR_GAIN = 0.25
STRONG_ERRORS = 15.0  # of a single channel, to be judged by itself
MIN_ERRORS = 5.0  # that scales must stand out of the noise by to be matched
EVEN_FACTOR = 0.02  # of a whole weight; GPTQ moved scales by up to 0.8%


@dataclass(kw_only=True)
class FoldVerdict:
    """What was found in one block.

    Attributes:
        explained: vectors (norms, biases) whose difference a linear takes back.
        imbalance: folded linear -> how many times too large its product with its producer is.
        unbalanced: linears or vectors with channel scales that nothing takes back.
    """

    explained: set[str] = field(default_factory=set)
    imbalance: dict[str, float] = field(default_factory=dict)
    unbalanced: list[str] = field(default_factory=list)


def judge_folds(block: Sequence[TensorAudit], config: Mapping[str, Any]) -> FoldVerdict:
    """Matches the scales of one decoder block; ``config`` gives the number of heads."""
    verdict = FoldVerdict()
    linears = [t for t in block if t.fit is not None]
    columns = {t.name: _log(t.fit.channels.column_K) - _shrinkage(t) for t in linears if t.fit is not None}
    norms: dict[str, tuple[str, float]] = {}  # linear -> the norm whose scale it has, and that scale's median
    for vector in block:
        for ratio_K in (vector.ratio_K, vector.ratio_plus_one_K):
            if ratio_K is None or vector.name.endswith(".bias"):
                continue
            log_K = _log(ratio_K)
            if _spread(log_K) < LEAST_SPREAD:
                continue
            for linear in linears:
                if len(columns[linear.name]) == len(log_K) and _norm(log_K) < MIN_ERRORS * _noise(linear, 0):
                    verdict.explained.add(vector.name)  # smaller than can be seen in the linear: cannot be refuted
                elif _matches(columns[linear.name], log_K, _noise(linear, 0)):
                    verdict.explained.add(vector.name)
                    norms.setdefault(linear.name, (vector.name, float(log_K.median())))
                    verdict.imbalance.setdefault(linear.name, _median_factor(columns[linear.name] - log_K))
    rows = {t.name: _row_scales(t, columns[t.name], norms) for t in linears}
    consumed = _judge_pairs(linears, columns, rows, norms, config, verdict)
    for linear in linears:
        if linear.name in consumed or not _is_folded(linear):
            continue
        if not _is_clear(linear):
            verdict.imbalance.setdefault(linear.name, _median_factor(columns[linear.name]))
        elif _is_open(linear, columns[linear.name], norms) or _spread(rows[linear.name]) > 4 * _noise(linear, 1) + 0.02:
            verdict.unbalanced.append(linear.name)
    _judge_siblings(linears, {name: norm for name, (norm, _) in norms.items()}, verdict)
    _judge_biases(block, {t.name: t for t in linears}, rows, verdict)
    return verdict


def _row_scales(linear: TensorAudit, column_K: Tensor, norms: Mapping[str, tuple[str, float]]) -> Tensor:
    """Log scale of each row, without what the norm before the linear explains.

    Fitted together, rows have the median 1 and the common factor is in the columns; fitted alone, rows have it.
    """
    assert linear.fit is not None
    of_norm = norms[linear.name][1] if linear.name in norms else 0.0
    common = float(column_K.median()) if linear.fit.is_folded else -_shrinkage(linear)
    return _log(linear.fit.channels.row_N) + (common - of_norm)


def _judge_pairs(
    linears: Sequence[TensorAudit],
    columns: Mapping[str, Tensor],
    rows: Mapping[str, Tensor],
    norms: Mapping[str, tuple[str, float]],
    config: Mapping[str, Any],
    verdict: FoldVerdict,
) -> set[str]:
    """Linears whose input channels another one's rows take back; both members of every such pair."""
    consumed: set[str] = set()
    for linear in linears:
        column_K = columns[linear.name]
        if linear.name in norms:
            continue
        partners: list[tuple[float, TensorAudit, float]] = []
        for producer in linears:
            if producer is linear or producer.name in consumed:
                continue
            for row_K in _as_inputs(rows[producer.name], len(column_K), config):
                if _is_pair(linear, producer, column_K, row_K):
                    both_K = column_K + row_K
                    partners.append((_spread(both_K), producer, _median_factor(both_K)))
        if partners:
            _, producer, factor = min(partners, key=lambda partner: partner[0])
            # A producer whose own input channels nothing explains has no factor of its own to speak of.
            is_open = _is_open(producer, columns[producer.name], norms)
            verdict.imbalance[linear.name] = 1.0 if is_open else factor
            verdict.imbalance[producer.name] = 1.0
            consumed |= {linear.name, producer.name}
    return consumed


def _is_pair(linear: TensorAudit, producer: TensorAudit, column_K: Tensor, row_K: Tensor) -> bool:
    """Whether a linear's input channels and its producer's rows cancel; the half that is fitted better leads."""
    noises = _noise(linear, 0), _noise(producer, 1)
    for leader, wanted_K, own_K, noise in (
        (linear, column_K, -row_K, noises[0]),
        (producer, -row_K, column_K, noises[1]),
    ):
        if _is_folded(leader) and _spread(wanted_K) > 3 * noise and _matches(own_K, wanted_K, sum(noises)):
            return True
    # Scales of nearly all channels alike do not show as folded, but as two factors that cancel.
    factor = _median_factor(column_K + row_K)
    return abs(_median_factor(column_K) - 1) > EVEN_FACTOR and abs(factor - 1) < EVEN_FACTOR / 2


def _is_open(linear: TensorAudit, column_K: Tensor, norms: Mapping[str, tuple[str, float]]) -> bool:
    """Its input channels are clearly scaled, and by no norm."""
    return _is_clear(linear) and linear.name not in norms and _spread(column_K) > 2 * _noise(linear, 0)


def _is_clear(tensor: TensorAudit) -> bool:
    """Its channel scales explain more than rounding noise looks like."""
    return tensor.fit is not None and tensor.fit.fold_gain > CLEAR_GAIN


def _is_folded(tensor: TensorAudit) -> bool:
    return tensor.fit is not None and tensor.fit.is_folded


def _shrinkage(tensor: TensorAudit) -> float:
    """Log of what rounding alone makes of the scale: grids of least error shrink weights."""
    assert tensor.fit is not None
    shrunk = tensor.fit.nearest_scale
    return float(torch.tensor(shrunk).log()) if shrunk is not None and shrunk > 0 else 0.0


def _median_factor(log_K: Tensor) -> float:
    return float(log_K.median().exp())


def _judge_siblings(linears: Sequence[TensorAudit], norm_of: Mapping[str, str], verdict: FoldVerdict) -> None:
    """Linears that share an input must all follow the scales that were moved into its norm."""
    for group in SHARED_INPUTS:
        members = [t.name for t in linears if t.name.split(".")[-2] in group]
        if any(name in norm_of for name in members):
            verdict.unbalanced += [n for n in members if n not in norm_of and n not in verdict.unbalanced]


def _judge_biases(
    block: Sequence[TensorAudit], linears: Mapping[str, TensorAudit], rows: Mapping[str, Tensor], verdict: FoldVerdict
) -> None:
    """A bias is divided as the rows of its own weight are."""
    for bias in block:
        weight = linears.get(bias.name.removesuffix("bias") + "weight")
        if bias.ratio_K is None or not bias.name.endswith(".bias") or weight is None:
            continue
        row_N, wanted_N = rows[weight.name], -_log(bias.ratio_K)
        is_used_N = bias.ratio_K.isfinite() & (bias.ratio_K > 0)
        noise = _noise(weight, 1)
        is_unseen = _spread(wanted_N) >= LEAST_SPREAD and _norm(wanted_N) < MIN_ERRORS * noise
        if is_unseen or _matches(row_N[is_used_N], wanted_N[is_used_N], noise):
            verdict.explained.add(bias.name)


def _as_inputs(row_N: Tensor, num_inputs: int, config: Mapping[str, Any]) -> list[Tensor]:
    """Scales per output of a producer as scales per input of what may follow it: the ways in which they can fit.

    All or the last rows (fused projections), and value heads that are each repeated for their query heads.
    """
    ways = [row_N[len(row_N) - num_inputs :]] if len(row_N) >= num_inputs else []
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if not isinstance(heads, int) or not isinstance(groups, int) or not 0 < groups < heads:
        return ways
    width = num_inputs // heads
    if heads % groups == 0 and width * heads == num_inputs and len(row_N) >= groups * width:
        ways.append(row_N[-groups * width :].view(groups, 1, width).expand(-1, heads // groups, -1).reshape(-1))
    return ways


def _log(scale: Tensor) -> Tensor:
    """Logarithm of channel scales; what is no positive number becomes far off and matches nothing."""
    return torch.where(scale.isfinite() & (scale > 0), scale, 1e-9).double().log()


def _norm(log_K: Tensor) -> float:
    return float((log_K - log_K.median()).square().sum().sqrt())


def _spread(log_K: Tensor) -> float:
    return float((log_K - log_K.median()).square().mean().sqrt()) if log_K.numel() else 0.0


def _noise(tensor: TensorAudit, axis: int) -> float:
    """Standard error of the log scale of a column (axis 0) or row (axis 1)."""
    assert tensor.fit is not None
    channels = tensor.fit.channels
    count = len(channels.row_N) if axis == 0 else len(channels.column_K)
    return float(tensor.fit.residual / max(1, count) ** 0.5) + 0.001


def _matches(log_K: Tensor, wanted_K: Tensor, noise: float) -> bool:
    """Whether scales are the wanted ones up to a common factor: as a whole, and in nine of ten strong channels.

    The wanted ones are those known better: least squares on noisy values would find too small a slope.
    """
    if len(log_K) != len(wanted_K) or len(log_K) < 8:
        return False
    x, y = wanted_K - wanted_K.median(), log_K - log_K.median()
    power = float((x * x).sum())
    # The slope's own error is noise / sqrt(power).
    if power**0.5 < MIN_ERRORS * noise or not 0.7 < float((x * y).sum()) / power < 1.3:
        return False
    is_strong = x.abs() > STRONG_ERRORS * noise
    if not bool(is_strong.any()):
        return True
    is_off = (y - x).abs() > 0.35 * x.abs()  # five errors of a channel that is just strong enough
    return float(is_off[is_strong].double().mean()) < 0.1
