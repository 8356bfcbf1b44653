"""LoHa and LoKr: products of small matrices that are not one low-rank product.

Method: LoHa (Hyeon-Woo et al. 2022, "FedPara", proposition 2) adds the elementwise product of two low-rank products;
LoKr (Edalati et al. 2022, "KronA", equation 4; LyCORIS) adds a Kronecker product. Both are scaled by alpha / r.

Left out: the Tucker form (``hada_t1``, ``lokr_t2``), which only convolutions have.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qconv.merge.kinds.kind import Kind, Layer, Parts, Settings

_HARMLESS = frozenset({"module_dropout", "rank_dropout", "rank_dropout_scale", "use_effective_conv2d"})


def _check_loha(layer: Layer) -> Settings:
    for i in "12":
        layer.expect(f"hada_w{i}_a", layer.n, layer.rank)
        layer.expect(f"hada_w{i}_b", layer.rank, layer.k)
    return {"scaling": layer.scaling}


def _loha(w_NK: Tensor, parts: Parts, settings: Settings) -> Tensor:
    first_NK = parts["hada_w1_a"] @ parts["hada_w1_b"]
    return w_NK + (parts["hada_w2_a"] @ parts["hada_w2_b"]).mul_(first_NK).mul_(settings["scaling"])


def _check_lokr(layer: Layer) -> Settings:
    sizes = [_lokr_factor(layer, factor) for factor in ("lokr_w1", "lokr_w2")]
    n, k = sizes[0][0] * sizes[1][0], sizes[0][1] * sizes[1][1]
    if (n, k) != (layer.n, layer.k):
        layer.refuse(
            f"expected factors whose Kronecker product is [{layer.n}, {layer.k}], found {list(sizes[0])} and "
            f"{list(sizes[1])}; the adapter belongs to another base model"
        )
    return {"scaling": layer.scaling}


def _lokr_factor(layer: Layer, factor: str) -> tuple[int, int]:
    """Shape of a factor that is stored whole, or as a product of two matrices of the layer's rank."""
    if factor in layer.shapes:
        rows, columns = layer.shape(factor, 2)
        return rows, columns
    rows, columns = layer.shape(factor + "_a", 2)[0], layer.shape(factor + "_b", 2)[1]
    layer.expect(factor + "_a", rows, layer.rank)
    layer.expect(factor + "_b", layer.rank, columns)
    return rows, columns


def _lokr(w_NK: Tensor, parts: Parts, settings: Settings) -> Tensor:
    first, second = (
        parts[factor] if factor in parts else parts[factor + "_a"] @ parts[factor + "_b"]
        for factor in ("lokr_w1", "lokr_w2")
    )
    return torch.kron(first, second).mul_(settings["scaling"]).add_(w_NK)


LOHA = Kind(
    peft_type="LOHA",
    title="LoHa (Hyeon-Woo et al. 2022)",
    parts=frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
    check=_check_loha,
    merged=_loha,
    keys=frozenset({"alpha", "r"}),
    harmless=_HARMLESS,
    vanishing=frozenset({"hada_w2_b"}),
    rank_key="r",
    alpha_key="alpha",
)
LOKR = Kind(
    peft_type="LOKR",
    title="LoKr (Edalati et al. 2022)",
    parts=frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}),
    check=_check_lokr,
    merged=_lokr,
    keys=frozenset({"alpha", "r"}),
    harmless=_HARMLESS | {"decompose_both", "decompose_factor"},  # the tensors' shapes say what they decided
    vanishing=frozenset({"lokr_w1", "lokr_w1_a"}),
    rank_key="r",
    alpha_key="alpha",
)
