"""What the stored numbers of one weight say: how much of the adapter is in it, its scale, what is left over.

Method: ordinary least squares of the candidate on what the merge should give and on the adapter's update,
``Wc = scale * (Wb + coefficient * D) + rest`` with ``D = We - Wb``, where We is the merged weight and Wb the
base as training saw it. Rounding noise is neither independent nor of equal size (GPTQ passes errors on within
a row, and all rows share its Hessian), so standard errors are clustered by rows and by columns at once
(Cameron, Gelbach and Miller 2011, "Robust Inference with Multiway Clustering", equation 2.4).

The coefficient that rounding to nearest would leave is measured beside it, on the candidate's own grid: a base
that lies on a 4-bit grid puts whole clusters of weights between the same two codes, and rounding them to
nearest takes half of a small update away (bfloat16 takes a few percent).

Scales that were moved between neighbours (AWQ, Lin et al. 2023, section 3.2) are fitted per input and output
channel by alternating least squares and divided out; their balance is judged by `audit_folds`.

Rounding points: see `audit_gather`.

Dimension legend: N = rows, K = columns of the stored weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qconv.on_the_way import mark, to_host
from qconv.validate.audit_gather import Nearest, fit_channels, gather, is_fused
from qconv.validate.audit_regression import Regression, Sums, regress, solve
from qconv.validate.audit_stored import Stored

# Channel scales are divided out when they explain this share of the rest. Least squares on K free scales takes 1/N
# of any noise (4e-3 at N = 256); the noise of GPTQ and of round to nearest was seen to give 0.09, which does no
# harm: scales count as somebody's work only where they match a neighbour's, or explain much more.
FOLD_GAIN = 0.05
LOST_SCALE = 1e-3  # AWQ divides the rows before an outlier channel by 30 and more
SAME_AS_NEAREST = 0.05  # one value in 5000 a step off: what another order of summation can move across a threshold


@dataclass(frozen=True, kw_only=True, eq=False)
class Channels:
    """Scales per input channel ``column_K`` and per output channel ``row_N``, and their standard errors; float32."""

    column_K: Tensor
    row_N: Tensor
    column_error_K: Tensor
    row_error_N: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """What `measure` finds; ratios are Frobenius norms.

    Attributes:
        relative_error: ||Wc - We|| / ||We||, folded scales divided out.
        residual: the same after scale and coefficient are fitted: what neither explains.
        rounding: ||nearest(We) - We|| / ||We|| on the candidate's own grid, or None when it has none.
        mismatch: ||Wc - nearest(We)|| / ||nearest(We) - We||; 0 = the merge rounded to nearest, bit for bit.
        scale, scale_error: least-squares factor of the whole weight, and its standard error.
        nearest_scale: the same of nearest(We): quantizers shrink weights by about ``rounding ** 2``.
        cosine: of Wc and We.
        update: ||D|| / ||We||, or None when the adapter does not change the weight.
        base_distance: ||Wc - Wb|| / ||D||, or None; 0 = the base, bit for bit.
        coefficient, coefficient_error: of D, relative to the scale, and its standard error.
        nearest_coefficient: the same of nearest(We).
        channels: least-squares scale per channel; both fitted when `is_folded`, else each alone.
        is_folded: channel scales explain some of what the plain fit does not, and were divided out.
        fold_gain: the share of it that they explain.
        lost_rows, lost_columns: how many are (nearly) zero and should not be.
    """

    relative_error: float
    residual: float
    rounding: float | None
    mismatch: float | None
    scale: float
    scale_error: float
    nearest_scale: float | None
    cosine: float
    update: float | None
    base_distance: float | None
    coefficient: float | None
    coefficient_error: float | None
    nearest_coefficient: float | None
    channels: Channels
    is_folded: bool
    fold_gain: float
    lost_rows: int
    lost_columns: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _Folded:
    """What was gathered with channel scales divided out, and these; on the host."""

    sums: Sums
    nearest: Nearest | None
    row_N: Tensor
    column_K: Tensor


def measure(stored: Stored, expected: Tensor, base: Tensor | None) -> Fit | None:
    """Fits one weight of the candidate to what it should be, and waits for the result; see `begin`."""
    finish, arrived = begin(stored, expected, base), mark(expected.device)
    arrived()
    return finish()


@torch.no_grad()
def begin(stored: Stored, expected: Tensor, base: Tensor | None) -> Callable[[], Fit | None]:
    """Begins to fit one weight of the candidate to what it should be.

    Where one kernel does the work, the device is not waited for: it gets both rounds at once (the second one, with
    channel scales divided out, costs it little), and the host decides later whether there are such scales.

    Args:
        stored: the candidate's weight ``[N, K]``.
        expected: merged weight ``[N, K]``, float32.
        base: the same weight without the adapter ``[N, K]``, or None when the adapter does not change it.

    Returns:
        what gives the fit, in any thread, once a `mark` that is set now is reached. All numbers of the fit are
        finite; it is None where the stored weight is not.
    """
    is_finite = stored.is_finite()
    if is_fused(stored, expected):
        first, factor = gather(stored, expected, base), fit_channels(stored, expected)
        second = gather(stored, expected, base, factor)
        copies = to_host([*first.tensors, *second.tensors, factor.row_N, factor.column_K, is_finite])

        def finish() -> Fit | None:
            return None if not copies[-1] else _decide(*first.on_host(copies[:3]), lambda: folded(copies[3:-1]))

        def folded(copies: list[Tensor]) -> _Folded:
            sums, nearest = second.on_host(copies[:3])
            return _Folded(sums=sums, nearest=nearest, row_N=copies[3].float(), column_K=copies[4].float())

        return finish
    if not is_finite:
        return lambda: None

    def gather_again() -> _Folded:
        factor = fit_channels(stored, expected)
        found = gather(stored, expected, base, factor)
        sums, nearest = found.on_host([tensor.cpu() for tensor in found.tensors])
        return _Folded(sums=sums, nearest=nearest, row_N=factor.row_N.cpu(), column_K=factor.column_K.cpu())

    found = gather(stored, expected, base)
    fit = _decide(*found.on_host([tensor.cpu() for tensor in found.tensors]), gather_again)
    return lambda: fit


def _decide(sums: Sums, nearest: Nearest | None, fold: Callable[[], _Folded]) -> Fit:
    """The plain fit, or the one with channel scales divided out (``fold``) where these explain what is left."""
    plain = regress(sums)
    channels = _separate_channels(sums)
    is_nearest = nearest is not None and nearest.mismatch <= (SAME_AS_NEAREST**2) * nearest.zz
    if not is_nearest and _gain_of_channels(sums, plain.rest) > FOLD_GAIN:
        folded = fold()
        regression = regress(folded.sums)
        if regression.rest < (1 - FOLD_GAIN) * plain.rest:
            left = _separate_channels(folded.sums)
            both = Channels(
                column_K=folded.column_K,
                row_N=folded.row_N,
                column_error_K=left.column_error_K * folded.column_K.abs(),
                row_error_N=left.row_error_N * folded.row_N.abs(),
            )
            found = _fit(folded.sums, folded.nearest, regression, both, 1 - regression.rest / plain.rest)
            lost_rows, lost_columns = _lost(both.row_N, sums.row["aa"]), _lost(both.column_K, sums.column["aa"])
            return dataclasses.replace(found, lost_rows=lost_rows, lost_columns=lost_columns)
    return _fit(sums, nearest, plain, channels, 0.0)


def _separate_channels(sums: Sums) -> Channels:
    """The scale of each column, and of each row, as if there were no other, around the present ones."""

    def ratio(part: dict[str, Tensor]) -> Tensor:
        return torch.where(part["aa"] > 0, 1 + part["ya"] / part["aa"].clamp_min(1e-300), 1.0).float()

    def error(part: dict[str, Tensor], count: int) -> Tensor:
        """Of a slope through the origin: sqrt(rest / (count - 1) / aa)."""
        rest = (part["yy"] - part["ya"].square() / part["aa"].clamp_min(1e-300)).clamp_min(0)
        return torch.where(
            part["aa"] > 0, (rest / part["aa"].clamp_min(1e-300) / max(1, count - 1)).sqrt(), 1e3
        ).float()

    num_rows, num_columns = len(sums.row["aa"]), len(sums.column["aa"])
    return Channels(
        column_K=ratio(sums.column),
        row_N=ratio(sums.row),
        column_error_K=error(sums.column, num_rows),
        row_error_N=error(sums.row, num_columns),
    )


def _gain_of_channels(sums: Sums, rest: float) -> float:
    """The larger share of the rest that scales per column, or per row, would take away."""
    if rest <= 0 or min(len(sums.row["aa"]), len(sums.column["aa"])) < 8:
        return 0.0
    yy = sums.total("yy")

    def left(part: dict[str, Tensor]) -> float:
        return yy - float((part["ya"].square() / part["aa"].clamp_min(1e-300)).sum())

    return 1 - min(left(sums.row), left(sums.column)) / rest


def _lost(scale: Tensor, energy: Tensor) -> int:
    """How many channels have almost none of what they should have."""
    return int(((scale.abs() < LOST_SCALE * scale.median().abs()) & (energy > 1e-6 * energy.mean())).sum())


def _fit(sums: Sums, nearest: Nearest | None, regression: Regression, channels: Channels, fold_gain: float) -> Fit:
    aa, ya, yy = (sums.total(pair) for pair in ("aa", "ya", "yy"))
    has_update = "dd" in sums.pairs
    ad, dd, yd = (sums.total(pair) if has_update else 0.0 for pair in ("ad", "dd", "yd"))
    scale = 1 + regression.alpha
    cc = aa + 2 * ya + yy
    # A weight of zeros is met exactly or not at all.
    norm = aa**0.5 if aa > 0 else (1.0 if yy == 0 else 1e-30)
    nearest_scale = nearest_coefficient = rounding = mismatch = None
    if nearest is not None:
        alpha, beta = solve(aa, ad, dd, nearest.za, nearest.zd)
        nearest_scale, nearest_coefficient = 1 + alpha, 1 + beta / (1 + alpha)
        rounding = nearest.zz**0.5 / norm
        # A grid that holds the expected weight exactly has nothing to compare with: float32 decides.
        mismatch = nearest.mismatch**0.5 / max(nearest.zz**0.5, 1e-6 * norm)
    is_seen = has_update and dd > 0 and regression.beta_error != float("inf") and abs(scale) > 1e-6
    return Fit(
        relative_error=yy**0.5 / norm,
        residual=regression.rest**0.5 / norm,
        rounding=rounding,
        mismatch=mismatch,
        scale=scale,
        scale_error=regression.alpha_error,
        nearest_scale=nearest_scale,
        cosine=(aa + ya) / (norm * cc**0.5) if cc > 0 else float(yy == 0),
        update=dd**0.5 / norm if has_update else None,
        base_distance=(max(0.0, yy + 2 * yd + dd) / dd) ** 0.5 if dd > 0 else None,
        coefficient=1 + regression.beta / scale if is_seen else None,
        coefficient_error=regression.beta_error / abs(scale) if is_seen else None,
        nearest_coefficient=nearest_coefficient if is_seen else None,
        channels=channels,
        is_folded=fold_gain > 0,
        fold_gain=fold_gain,
        lost_rows=_lost(channels.row_N, sums.row["aa"]),
        lost_columns=_lost(channels.column_K, sums.column["aa"]),
    )
