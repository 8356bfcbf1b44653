"""BEFT and GLoRA: kinds that train the bias of a layer, alone or with its weight.

Method: BEFT adds to the bias; GLoRA (Chavan et al. 2023) has five terms, ``W' = W + W * A + B`` and
``b' = b + W C + b * D + E``, each a low-rank product, a vector, one number or nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from qconv.merge.kinds.kind import Kind, Layer, Parts, Settings


def _check_beft(layer: Layer) -> Settings:
    if not layer.has_bias:
        layer.refuse(
            "has a trained bias, and no bias in the base; a model without that bias cannot hold the merged one"
        )
    layer.expect("beft_bias", 1, layer.n)
    return {}


def _beft_bias(bias_N: Tensor, weight: Callable[[], Tensor], parts: Parts, settings: Settings) -> Tensor:
    return bias_N + parts["beft_bias"][0]


_TERMS = "ABCDE"


def _check_glora(layer: Layer) -> Settings:
    sizes = {"A": (layer.n, layer.k), "B": (layer.n, layer.k), "C": (layer.k, 1), "D": (layer.n,), "E": (layer.n,)}
    for term, size in sizes.items():
        name = f"glora_{term}"
        if name + ".zeros" in layer.shapes:
            layer.expect(name + ".zeros", *size)
        elif not layer.has_bias and term in "CDE":
            layer.refuse(f"has a trained {name}, which changes the bias, and no bias in the base")
        elif name + ".X" in layer.shapes:
            is_vector = layer.shapes[name + ".X"] != (1,)
            layer.expect(name + ".X", *((size[0], 1)[: len(size)] if is_vector else (1,)))
        else:
            layer.expect(name + ".Xd", size[0], layer.rank)
            layer.expect(name + ".Xu", layer.rank, size[-1])
    return {}


def _term(parts: Parts, term: str) -> Tensor | float:
    name = f"glora_{term}"
    if name + ".Xd" in parts:
        return parts[name + ".Xd"] @ parts[name + ".Xu"]
    return parts.get(name + ".X", 0.0)


def _glora(w_NK: Tensor, parts: Parts, settings: Settings) -> Tensor:
    return w_NK + w_NK * _term(parts, "A") + _term(parts, "B")


def _glora_bias(bias_N: Tensor, weight: Callable[[], Tensor], parts: Parts, settings: Settings) -> Tensor:
    c_K1 = _term(parts, "C")
    of_weight = (weight() @ c_K1).squeeze(-1) if isinstance(c_K1, Tensor) else 0.0
    return bias_N + bias_N * _term(parts, "D") + _term(parts, "E") + of_weight


BEFT = Kind(
    peft_type="BEFT",
    title="BEFT",
    parts=frozenset({"beft_bias"}),
    check=_check_beft,
    merged=None,
    merged_bias=_beft_bias,
    vanishing=frozenset({"beft_bias"}),
)
GLORA = Kind(
    peft_type="GLORA",
    title="GLoRA (Chavan et al. 2023)",
    parts=frozenset(f"glora_{term}.{part}" for term in _TERMS for part in ("X", "Xd", "Xu", "zeros")),
    check=_check_glora,
    merged=_glora,
    merged_bias=_glora_bias,
    keys=frozenset({"r"}),
    harmless=frozenset({"config_A_B", "config_C", "config_D_E"}),  # the tensors' names and shapes say what they decided
    vanishing_together=frozenset(f"glora_{term}.{part}" for term in _TERMS for part in ("X", "Xd")),
    rank_key="r",
)
