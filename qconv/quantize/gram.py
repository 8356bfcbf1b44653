"""Statistics of a linear's inputs, accumulated batch by batch: Gram matrix, mean magnitude, maximum.

Method: the Gram matrix ``sum x x^T / num_tokens`` is the Hessian of the layer-wise squared error up to a factor
(GPTQ, Frantar et al. 2022, equation 1); the mean magnitude is the activation statistic of AWQ (Lin et al. 2023,
section 3.2). Linears that share an input share one accumulator.

Rounding points: every product and sum is float32. bfloat16 and float16 inputs on a CUDA device are multiplied on
tensor cores, where products of two such numbers are exact in float32 and only the sums round. Tensor cores truncate
those sums: on an H100 the diagonal of 2,048-token batches was low by 1e-5 relative, which damping (1e-2) dwarfs.

Left out: weighting of tokens, means (the Gram matrix is not centred).

Legend: T = tokens, K = in features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qconv.errors import CalibrationError, NumericsError


class GramAccumulator:
    """Sums over the tokens that reach one linear.

    Inputs are checked when a result is asked for, not on every `add`, which would stall a GPU.

    Args:
        in_features: K.
        device: where the sums live; inputs must be there.
        name: the module, for messages.
    """

    def __init__(self, in_features: int, device: str | torch.device = "cpu", name: str = "linear"):
        self.name = name
        self.num_tokens = 0
        self._gram_KK = torch.zeros(in_features, in_features, device=device)
        self._abs_K = torch.zeros(in_features, device=device)
        self._max_K = torch.zeros(in_features, device=device)

    def add(self, x_TK: Tensor) -> None:
        """Adds inputs ``[..., K]``, bfloat16, float16 or float32; leading dimensions are all tokens."""
        x_TK = x_TK.detach().reshape(-1, x_TK.shape[-1])
        if x_TK.shape[0] == 0:
            return
        self.num_tokens += x_TK.shape[0]
        if x_TK.is_cuda and x_TK.dtype in (torch.bfloat16, torch.float16):
            self._gram_KK += torch.mm(x_TK.t(), x_TK, out_dtype=torch.float32)
        else:
            x_TK = x_TK.float()
            self._gram_KK.addmm_(x_TK.t(), x_TK)
        magnitude_TK = x_TK.abs()
        self._abs_K += magnitude_TK.sum(0, dtype=torch.float32)
        # maximum and amax pass NaN on, so that the check at the end sees it.
        self._max_K = torch.maximum(self._max_K, magnitude_TK.amax(0).float())

    def gram(self) -> Tensor:
        """``[K, K]`` float32, mean over tokens of ``x x^T``, exactly symmetric.

        Raises:
            CalibrationError: no token was added.
            NumericsError: an input was NaN or infinite, or a sum overflowed float32.
        """
        self._check(self._gram_KK.diagonal())
        mean_KK = self._gram_KK / self.num_tokens
        return (mean_KK + mean_KK.t()).mul_(0.5)

    def mean_abs(self) -> Tensor:
        """``[K]`` float32, mean over tokens of ``|x|``. Raises as `gram` does."""
        self._check(self._abs_K)
        return self._abs_K / self.num_tokens

    def max_abs(self) -> Tensor:
        """``[K]`` float32, largest ``|x|``. Raises as `gram` does."""
        self._check(self._max_K)
        return self._max_K.clone()

    def _check(self, result: Tensor) -> None:
        if self.num_tokens == 0:
            raise CalibrationError(
                f"{self.name}: expected calibration tokens, found none that reach this module; "
                "use more or longer calibration text"
            )
        for channels_K in (self._max_K, result):
            bad_K = ~torch.isfinite(channels_K)
            if bool(bad_K.any()):
                first = int(bad_K.nonzero()[0])
                raise NumericsError(
                    f"{self.name}: expected finite inputs during calibration, found NaN or infinity in "
                    f"{int(bad_K.sum())} of {bad_K.numel()} input channels (first: {first}); "
                    "a layer before it overflows: check the merged weights, or calibrate in bfloat16 or float32"
                )


def output_error(error_NK: Tensor, gram_KK: Tensor) -> Tensor:
    """``diag(E G E^T)``, ``[N]``: the mean squared error of each output that weight errors ``E`` cause."""
    return (error_NK @ gram_KK).mul_(error_NK).sum(dim=1)
