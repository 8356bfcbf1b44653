"""Keys and values cut towards zero on their way into an FP8 cache, as vLLM 0.32's CPU build does (measured)."""

from __future__ import annotations

from typing import Any


def towards_zero(x: Any, scale: Any) -> Any:
    """What comes back from such a cache, in the place of `qconv.quantize.key_values.fake_quantize_cached`."""
    import torch

    scaled = (x.float() / scale).clamp(-448, 448)
    nearest = scaled.to(torch.float8_e4m3fn)
    # The code of the next number towards zero is one less; zero is never further from zero than what it stands for.
    one_less = (nearest.view(torch.uint8) - (nearest.float().abs() > scaled.abs()).to(torch.uint8)).view(nearest.dtype)
    return (one_less.float() * scale).to(x.dtype)
