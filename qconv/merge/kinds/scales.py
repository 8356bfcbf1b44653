"""IA3 and RoAD: outputs (or inputs) of a layer are scaled, or turned in pairs.

Method: IA3 (Liu et al. 2022, equation 1) multiplies the outputs of a layer, bias included, or the inputs of what
``feedforward_modules`` names; the vector's shape says which. RoAD (Liao & Monz 2024, equation 4) multiplies pairs of
outputs by ``[[a cos t, -a sin t], [a sin t, a cos t]]``, bias included; a pair lies half a group apart.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qconv.merge.kinds.kind import Kind, Layer, Parts, Settings


def _check_ia3(layer: Layer) -> Settings:
    rows, columns = layer.shape("ia3_l", 2)
    if columns != 1 or (rows == 1 and layer.n != 1):
        layer.expect("ia3_l", 1, layer.k)
    else:
        layer.expect("ia3_l", layer.n, 1)
    return {}


def _ia3(w_NK: Tensor, parts: Parts, settings: Settings) -> Tensor:
    return w_NK * parts["ia3_l"]


def _ia3_bias(bias_N: Tensor, weight: Callable[[], Tensor], parts: Parts, settings: Settings) -> Tensor:
    scale = parts["ia3_l"]
    return bias_N * scale[:, 0] if scale.shape[1] == 1 else bias_N


_PER_OUTPUT = {"road_1": 1, "road_2": 2, "road_4": 4}  # half parameters for each output feature


def _check_road(layer: Layer) -> Settings:
    variant = layer.read.one_of("variant", *_PER_OUTPUT)
    group = layer.read.whole("group_size", 2)
    if group % 2 or layer.n % group:
        layer.refuse(f"has {layer.n} outputs, which groups of {group} do not divide in pairs")
    for part in ("road_theta", "road_alpha"):
        layer.expect(part, layer.n * _PER_OUTPUT[variant] // 2)
    return {"variant": variant, "group": group}


def _turned(x_NC: Tensor, parts: Parts, settings: Settings) -> Tensor:
    """Columns of N outputs each, as RoAD leaves them."""
    half = settings["group"] // 2
    theta, alpha = parts["road_theta"], parts["road_alpha"]
    if settings["variant"] == "road_4":  # of each group first the factors of itself, then of its partner
        theta, alpha = (x.reshape(-1, 2, 2, half) for x in (theta, alpha))
        own, other = alpha[:, 0] * theta[:, 0].cos(), alpha[:, 1] * theta[:, 1].sin()
    else:  # road_1: both of a pair share theirs
        members = 1 if settings["variant"] == "road_1" else 2
        theta, alpha = (x.reshape(-1, members, half) for x in (theta, alpha))
        own, other = alpha * theta.cos(), alpha * theta.sin()
    x = x_NC.reshape(-1, 2, half, x_NC.shape[-1])
    partner = torch.stack((-x[:, 1], x[:, 0]), dim=1)
    turned: Tensor = x * own[..., None] + partner * other[..., None]
    return turned.reshape(x_NC.shape)


def _road_bias(bias_N: Tensor, weight: Callable[[], Tensor], parts: Parts, settings: Settings) -> Tensor:
    return _turned(bias_N[:, None], parts, settings)[:, 0]


IA3 = Kind(
    peft_type="IA3",
    title="IA3 (Liu et al. 2022)",
    parts=frozenset({"ia3_l"}),
    check=_check_ia3,
    merged=_ia3,
    merged_bias=_ia3_bias,
    harmless=frozenset({"feedforward_modules", "init_ia3_weights"}),
)
ROAD = Kind(
    peft_type="ROAD",
    title="RoAD (Liao & Monz 2024)",
    parts=frozenset({"road_alpha", "road_theta"}),
    check=_check_road,
    merged=_turned,
    merged_bias=_road_bias,
    keys=frozenset({"group_size", "variant"}),
)
