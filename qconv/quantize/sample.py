"""Tokens kept as they reach a linear: what the rounding of inputs does is no function of their Gram matrix.

Of every batch some tokens, evenly spaced, are kept in float32, and the largest magnitude of each channel over all
tokens, which a sample would miss.

Legend: T = tokens, t = tokens that are kept, K = in features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qconv.quantize.gram import no_tokens, not_finite

SAMPLE_TOKENS = 512


@dataclass(frozen=True)
class InputSample:
    """Of one distinct linear input: some tokens ``[t, K]`` and the largest magnitudes ``[K]`` of all; float32."""

    x_tK: Tensor
    max_abs_K: Tensor

    def divided_by(self, s_K: Tensor) -> InputSample:
        """The same of the inputs ``x / s``."""
        return InputSample(self.x_tK / s_K, self.max_abs_K / s_K)


def pooled_samples(samples: Sequence[InputSample]) -> InputSample | None:
    """Of several inputs together, as many tokens as one sample has; None of none."""
    if not samples:
        return None
    x_tK = torch.cat([sample.x_tK for sample in samples])
    step = -(-len(x_tK) // SAMPLE_TOKENS)
    return InputSample(x_tK[::step], torch.stack([sample.max_abs_K for sample in samples]).amax(0))


class SampleAccumulator:
    """Keeps tokens batch by batch.

    Args:
        in_features: K.
        device: where the inputs are.
        name: the module, for messages.
        num_batches: that will come; about `SAMPLE_TOKENS` are kept of them all.
    """

    def __init__(self, in_features: int, device: str | torch.device, name: str, num_batches: int):
        self.name = name
        self._per_batch = -(-SAMPLE_TOKENS // max(1, num_batches))
        self._kept: list[Tensor] = []
        self._max_abs_K = torch.zeros(in_features, device=device)

    def add(self, x_TK: Tensor) -> None:
        """Adds inputs ``[..., K]``, bfloat16, float16 or float32; leading dimensions are all tokens."""
        x_TK = x_TK.detach().reshape(-1, x_TK.shape[-1])
        if x_TK.shape[0] == 0:
            return
        step = -(-x_TK.shape[0] // self._per_batch)
        self._kept.append(x_TK[::step].to(torch.float32, copy=True))  # no view, which would keep all
        torch.maximum(self._max_abs_K, torch.linalg.vector_norm(x_TK, ord=torch.inf, dim=0), out=self._max_abs_K)

    def sample(self) -> InputSample:
        """What was kept.

        Raises:
            CalibrationError: no token was added.
            NumericsError: an input was NaN or infinite.
        """
        if not self._kept:
            raise no_tokens(self.name)
        bad_K = ~torch.isfinite(self._max_abs_K)
        if bool(bad_K.any()):
            raise not_finite(self.name, bad_K)
        return InputSample(torch.cat(self._kept), self._max_abs_K)
