"""Least squares of ``y = Wc - We`` on ``a = We`` and ``d = We - Wb``, from sums over rows and columns.

Rounding noise is neither independent nor of equal size (GPTQ passes errors on within a row, and all rows share its
Hessian), so standard errors are clustered by rows and by columns at once (Cameron, Gelbach and Miller 2011,
"Robust Inference with Multiway Clustering", equation 2.4). Sums are float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


class Sums:
    """Inner products of a = We, d = D and y = Wc - We: per row and per column, float64.

    Args:
        row_PN, column_PK: one row for each of the first 3 or (with an update) all 6 of `PAIRS`.
    """

    PAIRS = ("aa", "ya", "yy", "ad", "dd", "yd")

    def __init__(self, row_PN: Tensor, column_PK: Tensor):
        self.row_PN, self.column_PK = row_PN, column_PK
        self.pairs = self.PAIRS[: len(row_PN)]
        self.row = dict(zip(self.pairs, row_PN.unbind(), strict=True))
        self.column = dict(zip(self.pairs, column_PK.unbind(), strict=True))

    @classmethod
    def zeros(cls, num_rows: int, num_columns: int, has_update: bool, device: torch.device) -> Sums:
        num = len(cls.PAIRS) if has_update else 3
        row_PN, column_PK = (
            torch.zeros(num, size, dtype=torch.float64, device=device) for size in (num_rows, num_columns)
        )
        return cls(row_PN, column_PK)

    def add(self, rows: slice, **tensors: Tensor) -> None:
        for pair in self.pairs:
            product = tensors[pair[0]] * tensors[pair[1]]
            self.row[pair][rows] = product.sum(1).double()
            self.column[pair] += product.sum(0)

    def total(self, pair: str) -> float:
        """Of all rows; asks the device once."""
        return self._totals[pair]

    @cached_property
    def _totals(self) -> dict[str, float]:
        return {pair: float(row_N.sum()) for pair, row_N in self.row.items()}


@dataclass(frozen=True, kw_only=True)
class Regression:
    """``y = a * alpha + d * beta``: both coefficients, the covariance of their errors, and what is left of y."""

    alpha: float
    beta: float
    alpha_error: float
    beta_error: float
    rest: float


def solve(aa: float, ad: float, dd: float, ya: float, yd: float) -> tuple[float, float]:
    """Least squares with one or (where D is not parallel to We) two regressors."""
    determinant = aa * dd - ad * ad
    if dd > 0 and determinant > 1e-9 * aa * dd:
        return (ya * dd - yd * ad) / determinant, (yd * aa - ya * ad) / determinant
    return (ya / aa if aa > 0 else 0.0), 0.0


def regress(sums: Sums) -> Regression:
    """From sums on the host."""
    aa, ya, yy = (sums.total(pair) for pair in ("aa", "ya", "yy"))
    has_update = "dd" in sums.pairs
    ad, dd, yd = (sums.total(pair) if has_update else 0.0 for pair in ("ad", "dd", "yd"))
    alpha, beta = solve(aa, ad, dd, ya, yd)
    rest = max(0.0, yy - alpha * ya - beta * yd)
    is_joint = has_update and dd > 0 and aa * dd - ad * ad > 1e-9 * aa * dd
    if not is_joint:
        errors = _clustered_errors(sums, alpha, 0.0, [[1 / aa if aa > 0 else 0.0]], rest)
        return Regression(alpha=alpha, beta=beta, alpha_error=errors[0], beta_error=float("inf"), rest=rest)
    determinant = aa * dd - ad * ad
    inverse = [[dd / determinant, -ad / determinant], [-ad / determinant, aa / determinant]]
    errors = _clustered_errors(sums, alpha, beta, inverse, rest)
    return Regression(alpha=alpha, beta=beta, alpha_error=errors[0], beta_error=errors[1], rest=rest)


def _clustered_errors(
    sums: Sums, alpha: float, beta: float, inverse: list[list[float]], rest: float
) -> tuple[float, ...]:
    """Standard errors clustered by rows and by columns: V(rows) + V(columns) - V(neither)."""
    bread = torch.tensor(inverse, dtype=torch.float64)
    size = len(inverse)
    independent = bread * (rest / max(1, len(sums.row["aa"]) * len(sums.column["aa"])))
    variance = -independent.diagonal()
    for part in (sums.row, sums.column):
        scores = [part["ya"] - alpha * part["aa"] - (beta * part["ad"] if size > 1 else 0.0)]
        if size > 1:
            scores.append(part["yd"] - alpha * part["ad"] - beta * part["dd"])
        stacked = torch.stack(scores)
        variance = variance + (bread @ (stacked @ stacked.T) @ bread).diagonal()
    return tuple(float(v) ** 0.5 for v in torch.maximum(variance, independent.diagonal()))
