"""SmoothQuant: even out the channels of a linear's input, at the weights' expense, before both are rounded to 8 bits.

Method: SmoothQuant (Xiao et al. 2022, section 4, equation 4): s = max|x|^alpha / max|w|^(1 - alpha) per input channel;
quantize ``W * s`` and feed ``x / s``. The paper sets alpha for a model (0.5, more where outliers are strong); here it
is chosen for each fold, from a grid that has "no scales at all" in it, by the squared error that rounding the weights
(per channel) and sampled inputs (per token, as engines do) makes together in sampled outputs.

Rounding points: ``s`` is float32 and not rounded here (the fold into the preceding operation decides its storage).
Rounded are the inputs as `int8.fake_quantize_per_token` does and the weights on min-max grids.

Left out: which operation absorbs 1/s (that is model knowledge); one alpha for a whole model.

Legend: N = out features, K = in features, t = sampled tokens, n = sampled rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qconv.quantize.awq import nearest_powers, sample_rows
from qconv.quantize.grid import check_finite, grid_of_range, quantize_dequantize, range_of
from qconv.quantize.int8 import fake_quantize_per_token
from qconv.quantize.sample import InputSample
from qconv.types import Scheme

ALPHAS = tuple(i / 20 for i in range(4, 20))


class SmoothScale(NamedTuple):
    """Result of `search_smoothing`.

    Attributes:
        s_K: ``[K]`` float32, positive; all ones where nothing helps.
        alpha: the exponent; 0 where nothing helps.
        loss_before: mean squared output error of plain rounding, summed over sampled outputs.
        loss_after: the same with ``s_K``; never larger, unless the scale was shared afterwards.
    """

    s_K: Tensor
    alpha: float
    loss_before: float
    loss_after: float

    @property
    def is_idle(self) -> bool:
        return self.alpha == 0


def search_smoothing(
    weights: Sequence[Tensor],
    sample: InputSample,
    scheme: Scheme,
    name: str = "linear",
    share: Callable[[Tensor], Tensor] | None = None,
    *,
    powers_of_two: bool = False,
) -> SmoothScale:
    """The channel scale that minimises the output error of linears that share an input.

    Args:
        weights: float32 ``[N_i, K]`` each.
        sample: of the input. Channels without a signal keep scale 1.
        scheme: the integer scheme that the weights will get.
        name: for messages.
        share: applied to the best scale, ``[K]`` to ``[K]``, whose loss is ``loss_after`` then and may exceed
            ``loss_before``.
        powers_of_two: round every scale that is tried to one.

    Raises:
        NumericsError: NaN or infinity in a weight.
    """
    for w_NK in weights:
        check_finite(w_NK, f"{name}: weight")
    w_nK = sample_rows(weights)
    w_max_K = torch.stack([w_NK.abs().amax(0) for w_NK in weights]).amax(0).float()
    s_CK = torch.stack(
        [torch.ones_like(w_max_K), *(smoothing_scale(sample.max_abs_K, w_max_K, alpha) for alpha in ALPHAS)]
    )
    if powers_of_two:
        s_CK = nearest_powers(s_CK)
    loss_C = torch.stack([_loss(w_nK, s_K, sample.x_tK, scheme) for s_K in s_CK])
    best = int(loss_C.argmin())
    s_K, loss_after = s_CK[best], loss_C[best]
    if share is not None:
        s_K = share(s_K)
        loss_after = _loss(w_nK, s_K, sample.x_tK, scheme)
    alpha = ALPHAS[best - 1] if best else 0.0
    return SmoothScale(s_K=s_K, alpha=alpha, loss_before=float(loss_C[0]), loss_after=float(loss_after))


def smoothing_scale(x_max_K: Tensor, w_max_K: Tensor, alpha: float) -> Tensor:
    """Equation 4 of the paper, up to a factor that puts the scales around 1; 1 where either side has no signal."""
    live_K = (x_max_K > 0) & (w_max_K > 0)
    s_K = torch.where(live_K, x_max_K.pow(alpha) / w_max_K.pow(1 - alpha), 1.0)
    if not bool(live_K.any()):
        return s_K
    live = s_K[live_K]
    return torch.where(live_K, s_K / (live.amax() * live.amin()).sqrt(), 1.0)


def _loss(w_nK: Tensor, s_K: Tensor, x_tK: Tensor, scheme: Scheme) -> Tensor:
    """Mean over tokens of the squared output error, summed over rows; float64 scalar."""
    scaled_nK = w_nK * s_K
    scale_n, zero_n = grid_of_range(*range_of(scaled_nK), scheme)
    rounded_nK = quantize_dequantize(scaled_nK, scale_n.unsqueeze(-1), zero_n.unsqueeze(-1), scheme)
    error_tn = fake_quantize_per_token(x_tK / s_K) @ rounded_nK.t() - x_tK @ w_nK.t()
    return error_tn.square().sum(dtype=torch.float64) / len(x_tK)
