"""DEFT, OSF and FRoD: new weights that are made of the old one's own parts.

Method: DEFT (with ``para`` PaRa) takes what lies in the span of P out of the weight and puts a trained R there:
``W' = W - Q rel(P)^T W + Q R``, with P itself or its QR factor as Q; OSF (Nayak et al. 2025) keeps the leading
``effective_rank`` singular triples of W and replaces the rest by trained ones; FRoD writes W as ``U diag(l) V^T``
with a V that all layers of one place in the block share, and trains l and a sparse matrix beside it.

Rounding: peft keeps the parts of W in the dtype of the base; they are rounded to it here, too.

Left out: FRoD saved without its V, which a decomposition gives only up to signs and order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qconv.merge.kinds.kind import Kind, Layer, Parts, Settings, check_indices

if TYPE_CHECKING:
    from qconv.merge.adapter_source import AdapterSource


def _check_deft(layer: Layer) -> Settings:
    rank = min(layer.rank, layer.n)
    layer.expect("deft_P", layer.n, rank)
    removes_only = layer.read.flag("para")
    if not removes_only:
        layer.expect("deft_R", rank, layer.k)
    scaling = layer.read.number("alpha") / rank if layer.read.config.get("alpha") else 1.0
    return {"method": layer.read.one_of("decomposition_method", "relu", "qr"), "scaling": scaling}


def _deft(w_NK: Tensor, parts: Parts, settings: Settings) -> Tensor:
    p_NR = parts["deft_P"]
    if settings["method"] == "qr":
        q_NR = right_NR = torch.linalg.qr(p_NR)[0]
    else:
        q_NR, right_NR = p_NR, p_NR.relu()
    inside_RK = -(right_NR.T @ w_NK)
    if "deft_R" in parts:
        inside_RK += parts["deft_R"] * float(settings["scaling"])
    result: Tensor = w_NK + q_NR @ inside_RK
    return result


def _check_osf(layer: Layer) -> Settings:
    (count,) = layer.shape("osf_svd_params.S_low", 1)
    if count >= min(layer.n, layer.k):
        layer.refuse(f"has {count} trained singular values of a weight [{layer.n}, {layer.k}]; some have to be frozen")
    layer.expect("osf_svd_params.U_low", layer.n, count)
    layer.expect("osf_svd_params.V_low", count, layer.k)
    return {"dtype": layer.dtype}


def _osf(w_NK: Tensor, parts: Parts, settings: Settings) -> Tensor:
    u_NR, s_R, v_RK = torch.linalg.svd(w_NK, full_matrices=False)
    low = slice(len(s_R) - len(parts["osf_svd_params.S_low"]), None)
    before = [x.to(settings["dtype"]).to(w_NK.dtype) for x in (u_NR[:, low], s_R[low], v_RK[low])]
    after = [parts[f"osf_svd_params.{name}_low"] for name in "USV"]
    result: Tensor = w_NK + (after[0] * after[1]) @ after[2] - (before[0] * before[1]) @ before[2]
    return result


def _check_frod(layer: Layer) -> Settings:
    if "frod_V" not in layer.shapes:
        layer.refuse(
            "uses a V that is not in the file (save_projection was false): decomposing the base again gives it only up "
            "to signs and order. Load the adapter where it was trained, set save_projection=True in its config, and "
            "save it again"
        )
    (count,) = layer.shape("frod_lambda_s_values", 1)
    layer.expect("frod_lambda_l", layer.k)
    layer.expect("frod_V", layer.k, layer.k)
    layer.expect("frod_s_indices", 2, count)
    layer.expect("frod_s_size", 2)
    return {"dtype": layer.dtype}


def _frod(w_NK: Tensor, parts: Parts, settings: Settings) -> Tensor:
    v_KK = parts["frod_V"]
    rows, columns = parts["frod_s_indices"].long()
    check_indices("frod_s_indices", parts["frod_s_indices"], len(v_KK))
    try:
        in_v_NK = torch.linalg.solve(v_KK.double(), w_NK.double().T).T
    except RuntimeError:  # singular
        in_v_NK = w_NK.double() @ torch.linalg.pinv(v_KK.double(), rtol=1e-6).T
    norm_K = torch.linalg.vector_norm(in_v_NK, dim=0)
    u_NK = torch.where(norm_K > 1e-12, in_v_NK / norm_K, 0.0).to(settings["dtype"]).to(w_NK.dtype)
    trained_KK = torch.diag(parts["frod_lambda_l"])
    trained_KK.index_put_((rows, columns), parts["frod_lambda_s_values"], accumulate=True)
    return u_NK @ trained_KK @ v_KK.T


def _place_of(source: AdapterSource, module: str) -> Mapping[str, str]:
    """What layers of one place share, by peft's rule for what a place is: the last two parts of the name."""
    *_, parent, name = ["", *module.split(".")]
    place = name if parent.isdigit() or not parent else f"{parent}_{name}"
    if place == "output_dense" and module.endswith("attention.output.dense"):
        place = "attention_output"
    return {part: f"{part}.{place}" for part in ("frod_V", "frod_s_indices", "frod_s_size")}


DEFT = Kind(
    peft_type="DEFT",
    title="DEFT",
    parts=frozenset({"deft_P", "deft_R"}),
    check=_check_deft,
    merged=_deft,
    keys=frozenset({"alpha", "decomposition_method", "para", "r"}),
    harmless=frozenset({"deft_dropout", "init_scale"}),
    rank_key="r",
)
OSF = Kind(
    peft_type="OSF",
    title="OSF (Nayak et al. 2025)",
    parts=frozenset({"osf_svd_params.S_low", "osf_svd_params.U_low", "osf_svd_params.V_low"}),
    check=_check_osf,
    merged=_osf,
    harmless=frozenset({"effective_rank", "target_svd_config"}),  # the tensors' shapes say how many are trained
)
FROD = Kind(
    peft_type="FROD",
    title="FRoD",
    parts=frozenset({"frod_lambda_l", "frod_lambda_s_values"}),
    shared={f"base_model.{part}.": f"{part}." for part in ("frod_V", "frod_s_indices", "frod_s_size")},
    shared_of=_place_of,
    check=_check_frod,
    merged=_frod,
    harmless=frozenset(
        {
            "frod_dropout",
            "progressbar",
            "projection_prng_key",
            "regularization_alpha",
            "runtime_offload_base_weight",
            "save_projection",
            "sparse_rate",
        }
    ),
    indices=frozenset({"frod_s_indices", "frod_s_size"}),
)
