"""Statistics of a linear's inputs, accumulated batch by batch: Gram matrix and mean magnitude.

Method: the Gram matrix ``sum x x^T / num_tokens`` is the Hessian of the layer-wise squared error up to a factor
(GPTQ, Frantar et al. 2022, equation 1); the mean magnitude is the activation statistic of AWQ (Lin et al. 2023,
section 3.2). Linears that share an input share one accumulator. Only the upper triangle is computed, in strips of
rows, each one matrix product; it is mirrored once at the end, in place: for 14,336 inputs a Gram matrix is 822 MB, and
no second one is ever there.

Rounding points: every product and sum is float32. bfloat16 and float16 inputs on a CUDA device are multiplied on
tensor cores, where products of two such numbers are exact in float32 and only the sums round. Tensor cores truncate
those sums: on an H100 the diagonal of 2,048-token batches was low by 1e-5 relative, which damping (1e-2) dwarfs.

NaN and infinity: a bad input, or a sum that overflows, shows on the diagonal (x^2 of NaN is NaN, of infinity is
infinity, and no sum of products exceeds the larger of its two diagonal entries), so nothing else is kept to find it.

Left out: weighting of tokens, means (the Gram matrix is not centred).

Legend: T = tokens, K = in features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

import torch
from torch import Tensor

from qconv.errors import CalibrationError, NumericsError

# Narrow strips skip more of the lower triangle, wide ones multiply faster. On two CPU cores, relative to one whole
# product: 0.55 to 0.8 with strips of 256 columns (K = 576 to 8192). A GPU needs wider ones to fill its cores.
CPU_STRIP = 256
GPU_STRIP = 1024
MAGNITUDE_ELEMENTS = 1 << 22  # widened at once
MIRROR_COLUMNS = 1024  # size of the squares in which the triangle is mirrored


class GramAccumulator:
    """Sums over the tokens that reach one linear.

    Inputs are checked when a result is asked for, not on every `add`, which would stall a GPU.

    Args:
        in_features: K.
        device: where the sums live; inputs must be there.
        name: the module, for messages.
        with_mean_abs: also gather `mean_abs`, which reads the inputs once more.
    """

    def __init__(
        self, in_features: int, device: str | torch.device = "cpu", name: str = "linear", *, with_mean_abs: bool = True
    ):
        self.name = name
        self.num_tokens = 0
        self._gram_KK = torch.zeros(in_features, in_features, device=device)
        self._abs_K = torch.zeros(in_features, device=device) if with_mean_abs else None
        self._is_checked = False
        self._is_done = False

    def add(self, x_TK: Tensor) -> None:
        """Adds inputs ``[..., K]``, bfloat16, float16 or float32; leading dimensions are all tokens."""
        if self._is_done:
            raise ValueError(f"{self.name}: the Gram matrix was taken already; tokens come before that")
        x_TK = x_TK.detach().reshape(-1, x_TK.shape[-1])
        if x_TK.shape[0] == 0:
            return
        self.num_tokens += x_TK.shape[0]
        self._is_checked = False
        on_tensor_cores = x_TK.is_cuda and x_TK.dtype in (torch.bfloat16, torch.float16)
        if not on_tensor_cores:
            x_TK = x_TK.float()
        for rows in _strips(len(self._gram_KK), GPU_STRIP if x_TK.is_cuda else CPU_STRIP):
            strip = self._gram_KK[rows, rows.start :]
            left_KT, right_TK = x_TK[:, rows].t(), x_TK[:, rows.start :]
            if on_tensor_cores:
                _add_product(strip, left_KT, right_TK)
            else:
                strip.addmm_(left_KT, right_TK)
        if self._abs_K is not None:
            self._abs_K += _sum_of_magnitudes(x_TK)

    def gram(self) -> Tensor:
        """``[K, K]`` float32, mean over tokens of ``x x^T``, exactly symmetric; ends the accumulation.

        Every call returns the same tensor, which is the caller's from then on.

        Raises:
            CalibrationError: no token was added.
            NumericsError: an input was NaN or infinite, or a sum overflowed float32.
        """
        if not self._is_checked:
            check_inputs([self])
        if not self._is_done:
            self._is_done = True
            self._gram_KK /= self.num_tokens
            _mirror(self._gram_KK)
        return self._gram_KK

    def mean_abs(self) -> Tensor:
        """``[K]`` float32, mean over tokens of ``|x|``. Raises as `gram` does."""
        if self._abs_K is None:
            raise ValueError(f"{self.name}: made without mean_abs")
        if not self._is_checked:
            check_inputs([self])
        return self._abs_K / self.num_tokens

    def _explain(self) -> None:
        """Raises what is wrong with the inputs, if anything is."""
        if self.num_tokens == 0:
            raise no_tokens(self.name)
        bad_K = ~torch.isfinite(self._gram_KK.diagonal())
        if bool(bad_K.any()):
            raise not_finite(self.name, bad_K)


def no_tokens(name: str) -> CalibrationError:
    return CalibrationError(
        f"{name}: expected calibration tokens, found none that reach this module; use more or longer calibration text"
    )


def not_finite(name: str, bad_K: Tensor) -> NumericsError:
    return NumericsError(
        f"{name}: expected finite inputs during calibration, found NaN or infinity in "
        f"{int(bad_K.sum())} of {bad_K.numel()} input channels (first: {int(bad_K.nonzero()[0])}); "
        "a layer before it overflows: check the merged weights, or calibrate in bfloat16 or float32"
    )


def check_inputs(accumulators: Iterable[GramAccumulator]) -> None:
    """Checks all of them and waits for the device once; they are not checked again.

    Raises:
        CalibrationError: no token reached one of them.
        NumericsError: an input was NaN or infinite, or a sum overflowed float32.
    """
    accumulators = list(accumulators)
    finite = [torch.isfinite(one._gram_KK.diagonal()).all() for one in accumulators]
    are_finite = torch.stack(finite).tolist() if finite else []
    for one, is_finite in zip(accumulators, are_finite, strict=True):
        if one.num_tokens == 0 or not is_finite:
            one._explain()
        one._is_checked = True


def _strips(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _add_product(sum_MN: Tensor, left_MT: Tensor, right_TN: Tensor) -> None:
    """``sum += left @ right`` for 16-bit factors and a float32 sum, on CUDA."""
    if _adds_in_float32(left_MT.device, left_MT.dtype):
        torch.addmm(sum_MN, left_MT, right_TN, out_dtype=torch.float32, out=sum_MN)
    else:
        sum_MN += torch.mm(left_MT, right_TN, out_dtype=torch.float32)


@cache
def _adds_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `torch.addmm` adds a product of 16-bit factors to a part of a float32 matrix in place.

    It is documented since PyTorch 2.8, where it refuses a float32 sum; so it is tried, once.
    """
    x_TK = torch.ones(16, 64, device=device, dtype=dtype)
    sums_KK = torch.ones(64, 64, device=device)
    part = sums_KK[32:, 32:]
    try:
        torch.addmm(part, x_TK[:, 32:].t(), x_TK[:, 32:], out_dtype=torch.float32, out=part)
    except (RuntimeError, TypeError):
        return False
    return bool((part == 17).all()) and bool((sums_KK[:32] == 1).all()) and bool((sums_KK[:, :32] == 1).all())


def _sum_of_magnitudes(x_TK: Tensor) -> Tensor:
    """``[K]`` float32."""
    if not x_TK.is_cuda:
        return x_TK.abs().sum(0, dtype=torch.float32)
    # In parts, since it widens what it is given before it reduces it.
    step = max(1, MAGNITUDE_ELEMENTS // x_TK.shape[1])
    parts = [torch.linalg.vector_norm(x_tK, ord=1, dim=0, dtype=torch.float32) for x_tK in torch.split(x_TK, step)]
    return torch.stack(parts).sum(0)


def _mirror(gram_KK: Tensor) -> None:
    """Copies the upper triangle into the lower one, in place."""
    for rows in _strips(len(gram_KK), MIRROR_COLUMNS):
        square = gram_KK[rows, rows]
        square.copy_(torch.triu(square) + torch.triu(square, 1).t())
        gram_KK[rows.stop :, rows] = gram_KK[rows, rows.stop :].t()


def output_error(error_NK: Tensor, gram_KK: Tensor) -> Tensor:
    """``diag(E G E^T)``, ``[N]``: the mean squared error of each output that weight errors ``E`` cause."""
    return (error_NK @ gram_KK).mul_(error_NK).sum(dim=1)
