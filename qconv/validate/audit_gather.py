"""The sums that the audit of a weight needs: one pass over what is stored, what is expected, and the base.

In plain PyTorch, some rows at a time; on CUDA as one Triton kernel (`audit_kernels.py`), which reads every value once,
where PyTorch would go through memory some seventy times.

Rounding points: stored values are exact in float32, products are float32, sums run in float32 along a row or a column
of at most a few MiB (in the kernel: of a tile) and in float64 beyond.

Dimension legend: N = rows, K = columns of the stored weight, n = rows worked on at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qconv.triton_support import available
from qconv.validate.audit_regression import Sums
from qconv.validate.audit_stored import Stored

CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """Totals over ``z = nearest(We) - We``, the expected weight's own rounding to the candidate's grid."""

    za: float
    zz: float
    zd: float
    mismatch: float  # of y - z, squared


@dataclass(frozen=True, kw_only=True, eq=False)
class Factor:
    """Scales that the expected weight is multiplied by: ``row_N`` and ``column_K``, float32."""

    row_N: Tensor
    column_K: Tensor

    @classmethod
    def ones(cls, like_NK: Tensor) -> Factor:
        num_rows, num_columns = like_NK.shape
        return cls(
            row_N=torch.ones(num_rows, device=like_NK.device), column_K=torch.ones(num_columns, device=like_NK.device)
        )

    def of(self, rows: slice) -> Tensor:
        return self.row_N[rows, None] * self.column_K


@dataclass(frozen=True, kw_only=True, eq=False)
class Gathered:
    """What `gather` found, where it was found: on the device, which was not waited for.

    Attributes:
        totals_4: float64, as `Nearest` has them but for their order: za, zz, mismatch, zd.
        nearest_is_known: whether they mean anything.
    """

    sums: Sums
    totals_4: Tensor
    nearest_is_known: bool

    @property
    def tensors(self) -> list[Tensor]:
        return [self.sums.row_PN, self.sums.column_PK, self.totals_4]

    def on_host(self, copies: Sequence[Tensor]) -> tuple[Sums, Nearest | None]:
        """The same from copies of `tensors` on the host."""
        row_PN, column_PK, totals_4 = copies
        sums = Sums(row_PN, column_PK)
        if not self.nearest_is_known:
            return sums, None
        za, zz, mismatch, zd = totals_4.tolist()
        return sums, Nearest(za=za, zz=zz, mismatch=mismatch, zd=zd)


def gather(stored: Stored, expected: Tensor, base: Tensor | None, factor: Factor | None = None) -> Gathered:
    """Sums for the candidate, and totals for the expected weight rounded to the candidate's grid.

    Args:
        stored: the candidate's weight ``[N, K]``.
        expected: ``[N, K]`` float32.
        base: ``[N, K]``, any float dtype, or None where the adapter changes nothing.
        factor: of expected weight and update; None = 1.
    """
    if is_fused(stored, expected):
        from qconv.validate.audit_kernels import launch  # imports Triton

        scales = factor or Factor.ones(expected)
        parts = launch(stored, expected, base, scales.row_N, scales.column_K)
        row_PN, column_PK = (part.sum(1, dtype=torch.float64) for part in parts[:2])
        totals_4 = parts[2].sum(0, dtype=torch.float64)
        return Gathered(sums=Sums(row_PN, column_PK), totals_4=totals_4, nearest_is_known=stored.nearest_is_known)
    num_rows, num_columns = expected.shape
    sums = Sums.zeros(num_rows, num_columns, base is not None, expected.device)
    totals = torch.zeros(4, dtype=torch.float64, device=expected.device)
    for rows in _chunks(expected):
        a = expected[rows]
        d = None if base is None else a - base[rows].float()
        if factor is not None:
            a = a * factor.of(rows)
            d = None if d is None else d.mul_(factor.of(rows))
        y = stored.values(rows).sub_(a)
        sums.add(rows, a=a, y=y, **({} if d is None else {"d": d}))
        if not stored.nearest_is_known:
            continue
        z = stored.nearest(a, rows).sub_(a)
        totals[0] += (z * a).sum(dtype=torch.float64)
        totals[1] += (z * z).sum(dtype=torch.float64)
        totals[2] += y.sub_(z).square_().sum(dtype=torch.float64)
        if d is not None:
            totals[3] += z.mul_(d).sum(dtype=torch.float64)
    return Gathered(sums=sums, totals_4=totals, nearest_is_known=stored.nearest_is_known)


def fit_channels(stored: Stored, expected: Tensor, num_rounds: int = 3) -> Factor:
    """Alternating least squares for ``Wc = diag(row) We diag(column)``; the rows' median is 1."""
    ones = Factor.ones(expected)
    row_N, column_K = ones.row_N, ones.column_K
    for _ in range(num_rounds):
        column_K = _slopes(stored, expected, Factor(row_N=row_N, column_K=ones.column_K), 0)
        row_N = _slopes(stored, expected, Factor(row_N=ones.row_N, column_K=column_K), 1)
        middle = row_N.median()
        middle = torch.where(middle == 0, 1.0, middle)
        row_N = row_N / middle
        column_K = column_K * middle
    return Factor(row_N=row_N, column_K=column_K)


def _slopes(stored: Stored, expected: Tensor, factor: Factor, axis: int) -> Tensor:
    """Least-squares scales of ``Wc`` by ``a``, the expected weight times the factor, along an axis; float32."""
    if is_fused(stored, expected):
        from qconv.validate.audit_kernels import COLUMNS, ROWS, launch, slopes  # imports Triton

        side = COLUMNS if axis == 0 else ROWS
        rows, columns, _ = launch(stored, expected, None, factor.row_N, factor.column_K, side)
        found: Tensor = slopes(columns if axis == 0 else rows)
        return found
    size = expected.shape[1 - axis]
    top, bottom = (torch.zeros(size, dtype=torch.float64, device=expected.device) for _ in "tb")
    for rows_n in _chunks(expected):
        a = expected[rows_n] * (factor.row_N[rows_n, None] if axis == 0 else factor.column_K)
        place = slice(None) if axis == 0 else rows_n
        top[place] += (stored.values(rows_n) * a).sum(axis)
        bottom[place] += a.square_().sum(axis)
    return torch.where(bottom > 0, top / bottom.clamp_min(1e-300), 1.0).float()


def is_fused(stored: Stored, expected: Tensor) -> bool:
    """Whether `audit_kernels` takes it: integer codes whose groups lie one after the other."""
    quantized = stored.quantized
    return (
        quantized is not None
        and quantized.scheme.kind == "int"
        and quantized.group_index_K is None
        and expected.dtype == torch.float32
        and available(expected)
    )


def _chunks(tensor: Tensor) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS.get(tensor.device.type, 1 << 19) // max(1, tensor.shape[1]))
    for start in range(0, tensor.shape[0], step):
        yield slice(start, start + step)
