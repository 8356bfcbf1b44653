"""GraLoRA, VB-LoRA, Uni-LoRA and TinyLoRA: low-rank products whose factors are put together of something else.

Method: GraLoRA (Jung et al. 2025) has a small product for each pair of a block of inputs and a block of
outputs, and may add a plain LoRA; VB-LoRA (Li et al. 2024) composes rows of the factors of a shared
bank of vectors, the ``topk`` best weighed by a softmax; Uni-LoRA (Li et al. 2025) looks all factors up in one vector,
scaled by how often each value is used; TinyLoRA puts ``R = sum_i v_i P_i`` between factors that it keeps of the base's
own decomposition, where a vector v may be shared by several layers.

TinyLoRA's file does not say which layer has which v. The random P of a layer does: it was drawn with the layer's number
added to the seed (torch's CPU generator, the same everywhere), and the number says which v is its.

Left out: Uni-LoRA saved without its indices, TinyLoRA without its P: what a seed gives depends on version and order.

Dimensions: J = blocks, S = rank of a block's product, L = length of a vector, T = vectors of one composition.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qconv.errors import AdapterError
from qconv.merge.kinds.kind import Kind, Layer, Parts, Settings, check_indices

if TYPE_CHECKING:
    from qconv.merge.adapter_source import AdapterSource

_SAVE_AGAIN = "Load the adapter where it was trained, set {} in its config, and save it again"


def _check_gralora(layer: Layer) -> Settings:
    blocks, hybrid = layer.read.whole("gralora_k", 1), layer.read.whole("hybrid_r")
    if layer.n % blocks or layer.k % blocks or layer.rank % blocks:
        layer.refuse(
            f"has a weight [{layer.n}, {layer.k}] and rank {layer.rank}, which gralora_k {blocks} does not divide"
        )
    layer.expect("gralora_A", blocks, layer.k // blocks, layer.rank)
    layer.expect("gralora_B", blocks, layer.rank, layer.n // blocks)
    if hybrid:
        layer.expect("gralora_A_general.weight", hybrid, layer.k)
        layer.expect("gralora_B_general.weight", layer.n, hybrid)
    return {"scaling": layer.read.number("alpha") / (layer.rank + hybrid)}


def _gralora(w_NK: Tensor, parts: Parts, settings: Settings) -> Tensor:
    a_JiR, b_JRo = parts["gralora_A"], parts["gralora_B"]
    blocks, i, rank = a_JiR.shape
    a_JiJS = a_JiR.reshape(blocks, i, blocks, rank // blocks)
    b_JJSo = b_JRo.reshape(blocks, blocks, rank // blocks, b_JRo.shape[-1])
    update = torch.einsum("nijs,jnso->joni", a_JiJS, b_JJSo).reshape(w_NK.shape)
    if "gralora_A_general.weight" in parts:
        update = update + parts["gralora_B_general.weight"] @ parts["gralora_A_general.weight"]
    return w_NK + update * float(settings["scaling"])


def _check_vblora(layer: Layer) -> Settings:
    vectors, length = layer.shape("vblora_vector_bank", 2)
    topk = layer.read.whole("topk", 1)
    if layer.n % length or layer.k % length or topk > vectors:
        layer.refuse(
            f"has a weight [{layer.n}, {layer.k}] and topk {topk}; {vectors} vectors of {length} values do not fit that"
        )
    shapes = {"A": (layer.rank, layer.k // length), "B": (layer.n // length, layer.rank)}
    for side, shape in shapes.items():
        if f"vblora_logits_{side}_topk_indices" in layer.shapes:
            layer.expect(f"vblora_logits_{side}_topk_indices", *shape, topk)
            layer.expect(f"vblora_logits_{side}_topk_weights", *shape, topk - 1)
        else:
            layer.expect(f"vblora_logits_{side}", *shape, vectors)
    return {"topk": topk}


def _vblora(w_NK: Tensor, parts: Parts, settings: Settings) -> Tensor:
    a_RKL, b_NRL = (_composed(parts, f"vblora_logits_{side}", settings["topk"]) for side in "AB")
    b_NR = b_NRL.transpose(1, 2).reshape(len(w_NK), -1)
    return w_NK + b_NR @ a_RKL.flatten(1)


def _composed(parts: Parts, logits: str, topk: int) -> Tensor:
    if logits in parts:
        best, places = parts[logits].topk(topk, dim=-1)
        weights = best.softmax(dim=-1)
    else:  # saved compactly: all weights but the last, which make 1 together
        places, weights = parts[logits + "_topk_indices"].long(), parts[logits + "_topk_weights"]
        weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1)
    bank_VL = parts["vblora_vector_bank"]
    check_indices(logits, places, len(bank_VL))
    return (weights[..., None] * bank_VL[places]).sum(-2)


def _check_unilora(layer: Layer) -> Settings:
    layer.expect("unilora_theta_d", layer.read.whole("theta_d_length", 1))
    for kind in ("indices", "scales"):
        layer.expect(f"unilora_{kind}_A", layer.rank, layer.k)
        layer.expect(f"unilora_{kind}_B", layer.n, layer.rank)
    return {}


def _unilora(w_NK: Tensor, parts: Parts, settings: Settings) -> Tensor:
    theta = parts["unilora_theta_d"]
    a_RK, b_NR = (_looked_up(theta, parts, side) for side in "AB")
    return w_NK + b_NR @ a_RK


def _looked_up(theta: Tensor, parts: Parts, side: str) -> Tensor:
    places = parts[f"unilora_indices_{side}"].long()
    check_indices(f"unilora_indices_{side}", places, len(theta))
    return theta[places] * parts[f"unilora_scales_{side}"]


def _check_tinylora(layer: Layer) -> Settings:
    if "tinylora_P" not in layer.shapes:
        layer.refuse(
            "has no tinylora_P (save_projection was false): what its seed gives depends on version and machine. "
            + _SAVE_AGAIN.format("save_projection=True")
        )
    rank, size = min(layer.rank, layer.n, layer.k), layer.read.whole("u", 1)
    layer.expect("tinylora_A", rank, layer.k)
    layer.expect("tinylora_B", layer.n, rank)
    layer.expect("tinylora_P", size, rank, rank)
    layer.expect("tinylora_v", size)
    return {}


def _tinylora(w_NK: Tensor, parts: Parts, settings: Settings) -> Tensor:
    between_RR = torch.einsum("i,irs->rs", parts["tinylora_v"], parts["tinylora_P"])
    return w_NK + parts["tinylora_B"] @ between_RR @ parts["tinylora_A"]


def _vector_of(source: AdapterSource, module: str) -> Mapping[str, str]:
    """The v of a layer: the only one, or that of the group which peft puts a layer of its number in."""
    vectors = [name for name in source.names.shared if name.startswith("tinylora_v.")]
    if len(vectors) == 1 or "tinylora_P" not in source.names.layers[module]:
        return dict.fromkeys(["tinylora_v"][: len(vectors)], vectors[0] if vectors else "")
    layers = len(source.names.layers)
    groups = max(1, round(layers * (1 - source.config.read.share("weight_tying"))))
    number = _number_of(source, module, layers)
    return {"tinylora_v": f"tinylora_v.{min(number // max(1, layers // groups), groups - 1)}"}


def _number_of(source: AdapterSource, module: str, layers: int) -> int:
    tensor = source.names.layers[module]["tinylora_P"]
    p_URR = source.files.read(tensor).float()
    seed, deviation = source.config.read.whole("projection_seed"), p_URR.shape[-1] ** -0.5
    for number in range(layers):
        generator = torch.Generator().manual_seed(seed + number)
        drawn = torch.normal(0.0, deviation, size=tuple(p_URR.shape), generator=generator)
        if torch.allclose(drawn, p_URR, rtol=1e-2, atol=1e-2):  # the file may hold 16-bit values
            return number
    raise AdapterError(
        f"{source.where}: tensor {tensor!r} is not what projection_seed {seed} gives for any of {layers} layers, so "
        f"which tinylora_v {module} has is not known. " + _SAVE_AGAIN.format("weight_tying=1.0 before training")
    )


GRALORA = Kind(
    peft_type="GRALORA",
    title="GraLoRA (Jung et al. 2025)",
    parts=frozenset({"gralora_A", "gralora_B", "gralora_A_general.weight", "gralora_B_general.weight"}),
    check=_check_gralora,
    merged=_gralora,
    keys=frozenset({"alpha", "gralora_k", "hybrid_r", "r"}),
    harmless=frozenset({"gralora_dropout"}),
    vanishing_together=frozenset({"gralora_B", "gralora_B_general.weight"}),
    rank_key="r",
)
VBLORA = Kind(
    peft_type="VBLORA",
    title="VB-LoRA (Li et al. 2024)",
    parts=frozenset(f"vblora_logits_{side}{end}" for side in "AB" for end in ("", "_topk_indices", "_topk_weights")),
    shared={"base_model.vblora_vector_bank": "vblora_vector_bank"},
    check=_check_vblora,
    merged=_vblora,
    keys=frozenset({"r", "topk"}),
    harmless=frozenset(
        {
            "init_logits_std",
            "init_vector_bank_bound",
            "num_vectors",
            "save_only_topk_weights",
            "vblora_dropout",
            "vector_length",
        }
    ),
    vanishing=frozenset({"vblora_vector_bank"}),
    indices=frozenset({"vblora_logits_A_topk_indices", "vblora_logits_B_topk_indices"}),
    rank_key="r",
)
UNILORA = Kind(
    peft_type="UNILORA",
    title="Uni-LoRA (Li et al. 2025)",
    parts=frozenset(f"unilora_{kind}_{side}" for kind in ("indices", "scales") for side in "AB"),
    shared={"base_model.unilora_theta_d": "unilora_theta_d"},
    check=_check_unilora,
    merged=_unilora,
    keys=frozenset({"r", "theta_d_length"}),
    harmless=frozenset({"init_theta_d_bound", "proj_seed", "save_indices", "unilora_dropout"}),
    vanishing=frozenset({"unilora_theta_d"}),
    indices=frozenset({"unilora_indices_A", "unilora_indices_B"}),
    rank_key="r",
    when_no_layers=(
        "the indices were not saved (save_indices was false), and what their seed gives depends on numpy's version and "
        "the order of layers. " + _SAVE_AGAIN.format("save_indices=True")
    ),
)
TINYLORA = Kind(
    peft_type="TINYLORA",
    title="TinyLoRA",
    parts=frozenset({"tinylora_A", "tinylora_B", "tinylora_P"}),
    shared={"base_model.tinylora_v.": "tinylora_v."},
    shared_of=_vector_of,
    check=_check_tinylora,
    merged=_tinylora,
    keys=frozenset({"projection_seed", "r", "u", "weight_tying"}),
    harmless=frozenset({"init_v_bound", "save_projection", "tinylora_dropout"}),
    vanishing=frozenset({"tinylora_v"}),
    rank_key="r",
)
