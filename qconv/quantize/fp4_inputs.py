"""Inputs of linears in 4-bit floats, beside weights in them (W4A4).

Method: every group of a token's features has a scale, found at run time: its largest magnitude / 6, rounded to what the
format stores. NVFP4 (NVIDIA 2025, section 2): float8 after a multiplication by the global scale of the inputs, which is
calibrated, and a division by it. MXFP4 (OCP Microscaling Formats 1.0, 2023): a power of two.

The global scale is the largest power of two with which twice the largest magnitude of calibration still has a scale:
float8's precision is relative, so room above costs nothing, and without it what is larger at run time is clipped.

Rounding points: float32 throughout, as in `compute_dynamic_scales_and_zp` of compressed-tensors 0.20 on float32 inputs;
rounded once to the dtype of the inputs. Kernels of engines take approximate reciprocals, which moves a scale where it
is near the middle of two.

Legend: K = in features, G = groups, g = features of a group.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qconv import e2m1
from qconv.quantize.global_scale import power_of_two, shared_by_fused
from qconv.quantize.grid import MAX_E4M3, check_finite, groups_of, round_scale, ungroup
from qconv.quantize.sample import InputSample
from qconv.types import Scheme

HEADROOM = 2.0
ZERO_SCALE = 0.125  # what a float8 scale of 0 is replaced by


def input_global_scales(samples: Mapping[str, InputSample]) -> dict[str, float]:
    """Of the inputs of each weight, by name; those that engines fuse have the same."""
    largest = {name: float(sample.max_abs_K.max()) for name, sample in samples.items()}
    return {name: power_of_two(HEADROOM * value) for name, value in shared_by_fused(largest).items()}


def fake_quantize_fp4(x: Tensor, scheme: Scheme, global_scale: float = 1.0, name: str = "activation") -> Tensor:
    """What an engine's 4-bit matmul sees of its input.

    Args:
        x: ``[..., K]``; each row along the last axis is one token.
        scheme: of the weights.
        global_scale: of the inputs, beside one of the weights.
        name: the module, for messages.

    Returns:
        The same shape and dtype.

    Raises:
        NumericsError: NaN or infinity in the input.
    """
    check_finite(x, name)
    x_Gg = groups_of(x.float(), scheme.group_size)
    largest_G1 = x_Gg.abs().amax(dim=-1, keepdim=True)
    scale_G1 = largest_G1 / x_Gg.new_tensor(e2m1.MAX)
    if scheme.has_global_scale:
        scale_G1 = scale_G1.mul_(global_scale).clamp_(max=MAX_E4M3).to(torch.float8_e4m3fn).float()
        scale_G1 = torch.where(scale_G1 == 0, ZERO_SCALE, scale_G1) / x_Gg.new_tensor(global_scale)
    else:
        scale_G1 = round_scale(scale_G1, scheme)
    return ungroup(e2m1.nearest(x_Gg / scale_G1).mul_(scale_G1), x.shape[-1]).to(x.dtype)
