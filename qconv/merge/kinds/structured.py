"""FourierFT, C3A, MiSS, SHiRA, Super-Tuning, HiRA and DeLoRA: updates with a structure of their own.

Method: FourierFT (Gao et al. 2024, equations 2 to 4) adds the inverse transform of a sparse spectrum, whose places a
seed gives (torch's CPU generator, the same everywhere); C3A (Chen et al. 2025) adds blocks that are circulant; MiSS
(Kang & Yin 2024, first named Bone) adds one small matrix to all blocks of columns, in its "bat" form
``W_block B + B``; SHiRA (Bhardwaj et al. 2024) adds values at stored places, and so does Super-Tuning, with or without
a plain LoRA; HiRA (Huang et al. 2025, equation 3) adds the elementwise product of the weight and a low-rank product;
DeLoRA (Bini et al. 2025, equation 6) normalises each component, and scales columns by the norms of the base's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qconv.merge.kinds.kind import Kind, Layer, Parts, Settings, check_indices


def _check_fourier(layer: Layer) -> Settings:
    if layer.rank > layer.n * layer.k:
        layer.refuse(f"has {layer.rank} frequencies for a weight [{layer.n}, {layer.k}]")
    layer.expect("fourierft_spectrum", layer.rank)
    return {"scaling": layer.read.number("scaling"), "seed": layer.read.whole("random_loc_seed")}


def _fourier(w_NK: Tensor, parts: Parts, settings: Settings) -> Tensor:
    values = parts["fourierft_spectrum"]
    generator = torch.Generator().manual_seed(settings["seed"])
    places = torch.randperm(w_NK.numel(), generator=generator)[: len(values)].to(w_NK.device)
    spectrum_NK = w_NK.new_zeros(w_NK.shape)
    spectrum_NK.view(-1)[places] = values
    update_NK: Tensor = torch.fft.ifft2(spectrum_NK).real
    return w_NK + update_NK * float(settings["scaling"])


def _check_c3a(layer: Layer) -> Settings:
    if layer.n % layer.rank or layer.k % layer.rank:
        layer.refuse(f"has a weight [{layer.n}, {layer.k}], which blocks of {layer.rank} do not divide")
    layer.expect("c3a_kernel", layer.n // layer.rank, layer.k // layer.rank, layer.rank)
    return {}


def _c3a(w_NK: Tensor, parts: Parts, settings: Settings) -> Tensor:
    kernel_nkH = parts["c3a_kernel"]
    steps = torch.arange(kernel_nkH.shape[-1], device=w_NK.device)
    blocks_nkHH = kernel_nkH[..., (steps[None, :] - steps[:, None]) % len(steps)]
    return w_NK + blocks_nkHH.permute(0, 2, 1, 3).reshape(w_NK.shape) / w_NK.shape[1]


def _check_miss(layer: Layer) -> Settings:
    form = layer.read.config.get("init_weights")
    if form == "bat":
        size = layer.shape("miss_block", 3)[2]
        layer.expect("miss_block", layer.n // size, size, size)
        if layer.n % size or layer.k % size:
            layer.refuse(f"has a weight [{layer.n}, {layer.k}], which blocks of {size} do not divide")
    else:
        width = layer.read.whole("mini_r", 1) if form == "mini" else layer.n
        layer.expect("miss_block", layer.rank, width)
        if layer.n % width:
            layer.refuse(f"has {layer.n} outputs, which mini_r {width} does not divide")
    return {"bat": form == "bat"}


def _miss(w_NK: Tensor, parts: Parts, settings: Settings) -> Tensor:
    block, (n, k) = parts["miss_block"], w_NK.shape
    if settings["bat"]:
        size = block.shape[-1]
        w_knHH = w_NK.reshape(n // size, size, k // size, size).permute(2, 0, 1, 3)
        return w_NK + (w_knHH @ block + block).permute(1, 2, 0, 3).reshape(n, k)
    repeated_NR = block.repeat(1, n // block.shape[1]).T
    return w_NK + repeated_NR.repeat(1, -(-k // len(block)))[:, :k]


def _check_shira(layer: Layer) -> Settings:
    count = layer.rank * (layer.n + layer.k)
    layer.expect("shira_weight", count)
    layer.expect("shira_indices", 2, count)
    return {}


def _shira(w_NK: Tensor, parts: Parts, settings: Settings) -> Tensor:
    rows, columns = parts["shira_indices"].long()
    check_indices("shira_indices, rows", rows, w_NK.shape[0])
    check_indices("shira_indices, columns", columns, w_NK.shape[1])
    return w_NK.index_put((rows, columns), parts["shira_weight"], accumulate=True)


def _check_super(layer: Layer) -> Settings:
    if "supertuning_indices" not in layer.shapes:
        layer.refuse(
            "has no supertuning_indices (save_precomputed_indices was false): they are where the base has its largest "
            "weights, and equal ones may come in any order. Load the adapter where it was trained, set "
            "save_precomputed_indices=True in its config, and save it again"
        )
    count = int(layer.n * layer.k * (1 - layer.read.share("sparsity")))
    layer.expect("supertuning_indices", count)
    layer.expect("supertuning_values", count)
    if layer.read.config.get("r") is None:
        return {"scaling": None}
    rank = layer.read.rank("r")
    layer.expect("supertuning_lora_A.weight", rank, layer.k)
    layer.expect("supertuning_lora_B.weight", layer.n, rank)
    return {"scaling": layer.read.number("lora_alpha") / rank}


def _super(w_NK: Tensor, parts: Parts, settings: Settings) -> Tensor:
    places = parts["supertuning_indices"].long()
    check_indices("supertuning_indices", places, w_NK.numel())
    result = w_NK.flatten().scatter_add(0, places, parts["supertuning_values"]).view(w_NK.shape)
    if settings["scaling"] is None:
        return result
    result += parts["supertuning_lora_B.weight"] @ parts["supertuning_lora_A.weight"] * settings["scaling"]
    return result


def _check_hira(layer: Layer) -> Settings:
    rank = layer.shape("hira_A", 2)[0]  # peft writes a rank_pattern and does not follow it
    layer.expect("hira_A", rank, layer.k)
    layer.expect("hira_B", layer.n, rank)
    return {}


def _hira(w_NK: Tensor, parts: Parts, settings: Settings) -> Tensor:
    return torch.addcmul(w_NK, w_NK, parts["hira_B"] @ parts["hira_A"])


def _check_delora(layer: Layer) -> Settings:
    layer.expect("delora_A", layer.rank, layer.k)
    layer.expect("delora_B", layer.n, layer.rank)
    layer.expect("delora_lambda", 1)
    layer.expect("delora_w_norm", layer.k)
    return {}


def _delora(w_NK: Tensor, parts: Parts, settings: Settings) -> Tensor:
    a_RK, b_NR = parts["delora_A"], parts["delora_B"]
    norms_R: Tensor = torch.linalg.vector_norm(a_RK, dim=1).clamp(min=1e-4)
    norms_R = norms_R * torch.linalg.vector_norm(b_NR, dim=0).clamp(min=1e-4)
    factor_R = parts["delora_lambda"] / len(a_RK) / norms_R
    return w_NK + (b_NR * factor_R) @ (a_RK * parts["delora_w_norm"])


FOURIERFT = Kind(
    peft_type="FOURIERFT",
    title="FourierFT (Gao et al. 2024)",
    parts=frozenset({"fourierft_spectrum"}),
    check=_check_fourier,
    merged=_fourier,
    keys=frozenset({"n_frequency", "n_frequency_pattern", "random_loc_seed", "scaling"}),
    vanishing=frozenset({"fourierft_spectrum"}),
    rank_key="n_frequency",
    rank_pattern="n_frequency_pattern",
)
C3A = Kind(
    peft_type="C3A",
    title="C3A (Chen et al. 2025)",
    parts=frozenset({"c3a_kernel"}),
    check=_check_c3a,
    merged=_c3a,
    keys=frozenset({"block_size", "block_size_pattern"}),
    vanishing=frozenset({"c3a_kernel"}),
    rank_key="block_size",
    rank_pattern="block_size_pattern",
)
MISS = Kind(
    peft_type="MISS",
    title="MiSS (Kang & Yin 2024)",
    parts=frozenset({"miss_block"}),
    check=_check_miss,
    merged=_miss,
    keys=frozenset({"mini_r", "r"}),
    harmless=frozenset({"miss_dropout"}),
    vanishing=frozenset({"miss_block"}),
    rank_key="r",
)
SHIRA = Kind(
    peft_type="SHIRA",
    title="SHiRA (Bhardwaj et al. 2024)",
    parts=frozenset({"shira_indices", "shira_weight"}),
    check=_check_shira,
    merged=_shira,
    keys=frozenset({"r"}),
    harmless=frozenset({"mask_type", "random_seed"}),
    vanishing=frozenset({"shira_weight"}),
    indices=frozenset({"shira_indices"}),
    rank_key="r",
)
SUPERTUNING = Kind(
    peft_type="SUPERTUNING",
    title="Super-Tuning",
    parts=frozenset(
        {"supertuning_indices", "supertuning_lora_A.weight", "supertuning_lora_B.weight", "supertuning_values"}
    ),
    check=_check_super,
    merged=_super,
    keys=frozenset({"lora_alpha", "r", "sparsity"}),
    harmless=frozenset({"lora_dropout", "save_precomputed_indices", "select_top"}),
    vanishing_together=frozenset({"supertuning_lora_B.weight", "supertuning_values"}),
    indices=frozenset({"supertuning_indices"}),
)
HIRA = Kind(
    peft_type="HIRA",
    title="HiRA (Huang et al. 2025)",
    parts=frozenset({"hira_A", "hira_B"}),
    check=_check_hira,
    merged=_hira,
    harmless=frozenset({"hira_dropout", "r"}),
    vanishing=frozenset({"hira_B"}),
)
DELORA = Kind(
    peft_type="DELORA",
    title="DeLoRA (Bini et al. 2025)",
    parts=frozenset({"delora_A", "delora_B", "delora_lambda", "delora_w_norm"}),
    check=_check_delora,
    merged=_delora,
    keys=frozenset({"r"}),
    harmless=frozenset({"delora_lambda", "lambda_pattern", "module_dropout"}),  # lambda is a tensor
    vanishing=frozenset({"delora_B"}),
    rank_key="r",
)
