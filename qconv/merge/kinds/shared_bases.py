"""VeRA and RandLoRA: random matrices that all layers share, with trained vectors of each layer.

Method: VeRA (Kopiczko et al. 2024, equation 2) adds ``diag(b) B diag(d) A``; RandLoRA (Albert et al. 2025, equation 3)
adds a sum of such products over several bases, the small sides scaled, by alpha / r. The shared matrices are made for
the largest layer and cut to each.

Left out: adapters saved without the shared matrices (``save_projection`` false): what a seed gives depends on the
version and the machine, so the merge could not be exact.
"""

from __future__ import annotations

from torch import Tensor

from qconv.merge.kinds.kind import Kind, Layer, Parts, Settings


def _check_saved(layer: Layer, *parts: str) -> None:
    if any(part not in layer.shapes for part in parts):
        layer.refuse(
            f"uses the shared {' and '.join(parts)}, which are not in the file (save_projection was false): what their "
            "seed gives depends on version and machine. Load the adapter where it was trained, set "
            "save_projection=True in its config, and save it again"
        )


def _check_vera(layer: Layer) -> Settings:
    _check_saved(layer, "vera_A", "vera_B")
    columns, rows = layer.shape("vera_A", 2)[1], layer.shape("vera_B", 2)[0]
    layer.expect("vera_A", layer.rank, max(columns, layer.k))
    layer.expect("vera_B", max(rows, layer.n), layer.rank)
    layer.expect("vera_lambda_b", layer.n)
    layer.expect("vera_lambda_d", layer.rank)
    return {}


def _vera(w_NK: Tensor, parts: Parts, settings: Settings) -> Tensor:
    n, k = w_NK.shape
    a_RK = parts["vera_lambda_d"][:, None] * parts["vera_A"][:, :k]
    b_NR = parts["vera_lambda_b"][:, None] * parts["vera_B"][:n]
    return w_NK + b_NR @ a_RK


def _check_randlora(layer: Layer) -> Settings:
    _check_saved(layer, "randlora_A", "randlora_B")
    small, large = sorted((layer.n, layer.k))
    bases = -(-small // layer.rank)
    a, b = layer.shape("randlora_A", 3), layer.shape("randlora_B", 3)
    layer.expect("randlora_A", layer.rank, 1, max(a[2], small))
    layer.expect("randlora_B", max(b[0], large), max(b[1], bases), layer.rank)
    layer.expect("randlora_lambda", layer.rank, bases)
    layer.expect("randlora_gamma", bases, small)
    return {"scaling": layer.read.number("randlora_alpha") / layer.rank, "bases": bases}


def _randlora(w_NK: Tensor, parts: Parts, settings: Settings) -> Tensor:
    n, k = w_NK.shape
    bases = settings["bases"]
    a_R1S = parts["randlora_A"][..., : min(n, k)]
    a_RBS = parts["randlora_lambda"][:, :, None] * a_R1S * parts["randlora_gamma"]
    b_LBR = parts["randlora_B"][: max(n, k), :bases]
    update_LS = b_LBR.flatten(1) @ a_RBS.flatten(0, 1)
    return w_NK + (update_LS if k == min(n, k) else update_LS.T) * float(settings["scaling"])


VERA = Kind(
    peft_type="VERA",
    title="VeRA (Kopiczko et al. 2024)",
    parts=frozenset({"vera_lambda_b", "vera_lambda_d"}),
    shared={"base_model.vera_A": "vera_A", "base_model.vera_B": "vera_B"},
    check=_check_vera,
    merged=_vera,
    keys=frozenset({"r"}),
    harmless=frozenset({"d_initial", "projection_prng_key", "save_projection", "vera_dropout"}),
    vanishing=frozenset({"vera_lambda_b"}),
    rank_key="r",
)
RANDLORA = Kind(
    peft_type="RANDLORA",
    title="RandLoRA (Albert et al. 2025)",
    parts=frozenset({"randlora_A", "randlora_B", "randlora_gamma", "randlora_lambda"}),  # peft copies A and B to layers
    shared={"base_model.randlora_A": "randlora_A", "base_model.randlora_B": "randlora_B"},
    check=_check_randlora,
    merged=_randlora,
    keys=frozenset({"r", "randlora_alpha"}),
    harmless=frozenset({"projection_prng_key", "randlora_dropout", "save_projection", "sparse", "very_sparse"}),
    vanishing=frozenset({"randlora_lambda"}),
    rank_key="r",
)
