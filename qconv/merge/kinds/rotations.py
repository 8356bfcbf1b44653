"""OFT, BOFT and HRA: an orthogonal map of a layer's inputs.

Method: OFT (Qiu et al. 2023, equation 3) rotates blocks of the inputs by Cayley's map of a skew-symmetric Q,
``(I - Q) (I + Q)^-1``, or by the first terms of its Neumann series as the newer implementation does; the constrained
form (COFT, equation 5) shortens Q first. BOFT (Liu et al. 2024) multiplies several such factors, each on
inputs that a butterfly permutes, and scales each output. HRA (Yuan et al. 2024, equation 3) multiplies Householder
reflections.

Dimensions: D = blocks of inputs, H = size of a block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qconv.merge.kinds.kind import Kind, Layer, Parts, Settings


def _check_oft(layer: Layer) -> Settings:
    rows, elements = layer.shape("oft_R.weight", 2)
    size = (1 + math.isqrt(1 + 8 * elements)) // 2
    share = layer.read.flag("block_share")
    blocks = layer.k // size
    if size * (size - 1) // 2 != elements or size * blocks != layer.k or rows != (1 if share else blocks):
        layer.refuse(
            f"expected oft_R.weight to hold {'one block' if share else 'all blocks'} of {layer.k} inputs, a block of "
            f"size H as a row of H * (H - 1) / 2 values; found {[rows, elements]}; config and tensors are not of one "
            "adapter, or it belongs to another base model"
        )
    return {
        "size": size,
        "terms": layer.read.whole("num_cayley_neumann_terms", 1) if layer.read.flag("use_cayley_neumann") else None,
        "limit": layer.read.number("eps") / math.sqrt(rows) if layer.read.flag("coft") else None,
    }


def _oft(w_NK: Tensor, parts: Parts, settings: Settings) -> Tensor:
    rows_DE, size, terms = parts["oft_R.weight"], settings["size"], settings["terms"]
    upper = torch.triu_indices(size, size, 1, device=w_NK.device)
    q_DHH = rows_DE.new_zeros(len(rows_DE), size, size)
    q_DHH[:, upper[0], upper[1]] = rows_DE
    q_DHH = q_DHH - q_DHH.mT
    if settings["limit"] is not None:
        norm_D = torch.linalg.matrix_norm(q_DHH)
        q_DHH *= (settings["limit"] / norm_D.clamp(min=settings["limit"]))[:, None, None]
    rotation_DHH = _cayley(q_DHH) if terms is None else _neumann(q_DHH, terms)
    w_NDH = w_NK.reshape(len(w_NK), -1, size)
    return _rotated(w_NDH, rotation_DHH)


def _rotated(w_NDH: Tensor, rotation_DHH: Tensor) -> Tensor:
    """Each block of inputs by its own rotation, or all by one; broadcasting would copy the rotations N times."""
    rotations_DHH = rotation_DHH.expand(w_NDH.shape[1], -1, -1)
    return torch.bmm(w_NDH.transpose(0, 1), rotations_DHH.mT).transpose(0, 1).flatten(1)


def _cayley(q_DHH: Tensor) -> Tensor:
    eye = torch.eye(q_DHH.shape[-1], dtype=q_DHH.dtype, device=q_DHH.device)
    rotation_DHH: Tensor = torch.linalg.solve(eye + q_DHH, eye - q_DHH, left=False)
    return rotation_DHH


def _neumann(q_DHH: Tensor, terms: int) -> Tensor:
    """``I + 2 Q + 2 Q^2 + ... + Q^(terms - 1)``; peft keeps the cubic term when 3 terms are asked for."""
    factors = [1.0, 2.0][:terms] if terms < 3 else [1.0, 2.0, 2.0] + [2.0] * (terms - 4) + [1.0]
    power = torch.eye(q_DHH.shape[-1], dtype=q_DHH.dtype, device=q_DHH.device).expand_as(q_DHH)
    total = torch.zeros_like(q_DHH)
    for factor in factors:
        total += factor * power
        power = power @ q_DHH
    return total


def _check_boft(layer: Layer) -> Settings:
    factors, blocks, size, _ = layer.shape("boft_R", 4)
    layer.expect("boft_R", factors, layer.k // size, size, size)
    layer.expect("boft_s", layer.n, 1)
    if blocks * size != layer.k:
        layer.refuse(f"expected blocks that cover {layer.k} inputs, found {blocks} of size {size}")
    asked_for = layer.read.whole("boft_n_butterfly_factor", 1)
    if factors not in (1, asked_for):  # where its CUDA extension is missing, peft takes 1, and the config stays
        layer.refuse(f"expected boft_R with {asked_for} butterfly factors as in the config, or 1; found {factors}")
    if factors > 1 and (size % 2 or blocks % 2 ** (factors - 1)):
        layer.refuse(f"has {factors} butterfly factors, which {blocks} blocks of size {size} do not allow")
    return {"factors": factors}


def _boft(w_NK: Tensor, parts: Parts, settings: Settings) -> Tensor:
    for index, r_DHH in enumerate(parts["boft_R"]):
        rotation_DHH = _cayley(0.5 * (r_DHH - r_DHH.mT))
        order_K = _butterfly(w_NK.shape[1], r_DHH, index if settings["factors"] > 1 else None).to(w_NK.device)
        w_NDH = w_NK[:, order_K.argsort()].reshape(len(w_NK), len(r_DHH), -1)
        w_NK = _rotated(w_NDH, rotation_DHH)[:, order_K]
    return w_NK * parts["boft_s"]


def _butterfly(k: int, r_DHH: Tensor, index: int | None) -> Tensor:
    """Of each part of the inputs (2^index blocks), first the even half blocks, then the odd ones."""
    inputs = torch.arange(k)
    if index is None:
        return inputs
    blocks, size, _ = r_DHH.shape
    halves = inputs.view(blocks >> index, -1, size // 2)
    return torch.cat([halves[:, 0::2], halves[:, 1::2]], dim=1).flatten()


def _check_hra(layer: Layer) -> Settings:
    layer.expect("hra_u", layer.k, layer.rank)
    return {"orthogonal": layer.read.flag("apply_GS")}


def _hra(w_NK: Tensor, parts: Parts, settings: Settings) -> Tensor:
    result = w_NK.clone()
    done: list[Tensor] = []
    for u_K in parts["hra_u"].T:
        for other in done if settings["orthogonal"] else ():
            u_K = u_K - (other @ u_K) * other
        unit_K = u_K / torch.linalg.vector_norm(u_K)
        done.append(unit_K)
        result -= 2 * torch.outer(result @ unit_K, unit_K)
    return result


OFT = Kind(
    peft_type="OFT",
    title="OFT (Qiu et al. 2023)",
    parts=frozenset({"oft_R.weight"}),
    check=_check_oft,
    merged=_oft,
    keys=frozenset({"block_share", "coft", "eps", "num_cayley_neumann_terms", "use_cayley_neumann"}),
    harmless=frozenset({"module_dropout", "oft_block_size", "r"}),  # the tensors' shapes hold size and number
    vanishing=frozenset({"oft_R.weight"}),
)
BOFT = Kind(
    peft_type="BOFT",
    title="BOFT (Liu et al. 2024)",
    parts=frozenset({"boft_R", "boft_s"}),
    check=_check_boft,
    merged=_boft,
    keys=frozenset({"boft_n_butterfly_factor"}),
    harmless=frozenset({"boft_block_num", "boft_block_size", "boft_dropout"}),
)
HRA = Kind(
    peft_type="HRA",
    title="HRA (Yuan et al. 2024)",
    parts=frozenset({"hra_u"}),
    check=_check_hra,
    merged=_hra,
    keys=frozenset({"apply_GS", "r"}),
    rank_key="r",
)
