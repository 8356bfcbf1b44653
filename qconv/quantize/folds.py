"""Where an AWQ scale goes: into the op that produces a linear's input.

AWQ (Lin et al. 2023, section 3.2) multiplies input channel k of a linear by s_k and divides the
channel where it is produced, which leaves the function unchanged. Two kinds of producer exist:

- a norm: its weight is divided by s. Gemma's norm multiplies by (1 + weight), so (1 + weight) is.
  The norm is stored in 16 bits, so the quotient is rounded first and s is then re-derived from the
  stored value: the rounding cancels exactly.
- rows of a linear: the last ``n`` output features of `source` (all of ``v_proj`` and ``up_proj``; the
  value and up parts of Phi-3's fused projections) are divided by s. With grouped-query attention
  several heads of ``o_proj``'s input come from one value head, so they share a scale.

A model family that is not in the table gets no scales, which the report counts. In latent attention (DeepSeek) norms of
latents are producers, too; inputs of ``o_proj`` get no scales: in ``kv_b_proj`` values lie between keys, head by head.

In a layer of experts the rows of each expert's up projection take the scales of its own down projection. The norm
before it feeds gate and up projections of all experts and of shared ones, and the router, which stays in 16 bits: its
weight is multiplied by s. So that this rounds nothing, and every token goes where it went, these scales are powers of
two. (llm-compressor 0.13 takes any scale, and multiplies and rounds a router that is a linear; one that is a parameter
it leaves as it is, and says so in a comment.)

Dimension legend: K = input features of the scaled linears, P = features of the producer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qconv.experts import FAMILIES, ExpertNames, expert_of


@dataclass(frozen=True)
class Fold:
    """``targets`` share an input that ``source`` produces; names are local to a decoder block.

    Attributes:
        beside: linears that read the same input and are not quantized; where there are any, scales are powers of two.
    """

    kind: Literal["norm", "norm_plus_one", "rows"]
    source: str
    targets: tuple[str, ...]
    beside: tuple[str, ...] = ()


def _family(kind: Literal["norm", "norm_plus_one"], mlp_norm: str) -> tuple[Fold, ...]:
    return (
        Fold(kind, "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Fold("rows", "self_attn.v_proj", ("self_attn.o_proj",)),
        Fold(kind, mlp_norm, ("mlp.gate_proj", "mlp.up_proj")),
        Fold("rows", "mlp.up_proj", ("mlp.down_proj",)),
    )


_LLAMA = _family("norm", "post_attention_layernorm")
# Queries of latent attention come straight from hidden features, or by way of a latent of their own.
_QUERIES = (
    Fold("norm", "input_layernorm", ("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa")),
    Fold("norm", "input_layernorm", ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")),
    Fold("norm", "self_attn.q_a_layernorm", ("self_attn.q_b_proj",)),
)
_LATENT = (*_QUERIES, Fold("norm", "self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",)), *_LLAMA[2:])
FOLDS: Mapping[str, tuple[Fold, ...]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _family("norm_plus_one", "post_attention_layernorm"),
    "gemma2": _family("norm_plus_one", "pre_feedforward_layernorm"),
    "gemma3_text": _family("norm_plus_one", "pre_feedforward_layernorm"),
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "dots1": _LLAMA,
    "ernie4_5_moe": _LLAMA,
    "glm4_moe": _LLAMA,
    "mixtral": _LLAMA,
    "olmoe": tuple(fold for fold in _LLAMA if fold.source != "self_attn.v_proj"),  # may clip values
    "qwen2_moe": _LLAMA,
    "qwen3_moe": _LLAMA,
    "phi3": (
        Fold("norm", "input_layernorm", ("self_attn.qkv_proj",)),
        Fold("rows", "self_attn.qkv_proj", ("self_attn.o_proj",)),
        Fold("norm", "post_attention_layernorm", ("mlp.gate_up_proj",)),
        Fold("rows", "mlp.gate_up_proj", ("mlp.down_proj",)),
    ),
}


def folds_of(model_type: str, weights: Iterable[str]) -> tuple[Fold, ...]:
    """The folds of a block with these weights (names local to it); empty for a family that is not in the table."""
    modules = [weight.removesuffix(".weight") for weight in weights]
    folds, names = FOLDS.get(model_type, ()), FAMILIES.get(model_type)
    folds = tuple(fold for fold in folds if fold not in _QUERIES or all(target in modules for target in fold.targets))
    if not folds or names is None or not any(expert_of(module) for module in modules):
        return folds
    downs = [module for module in modules if module.rpartition(".")[2] == names.down]
    inner = tuple(Fold("rows", f"{down.rpartition('.')[0]}.{names.up}", (down,)) for down in downs)
    return (*(_in_sparse_block(fold, names, modules) for fold in folds if not _is_dense(fold, modules)), *inner)


def _is_dense(fold: Fold, modules: Collection[str]) -> bool:
    """Whether the fold is between the linears of a dense MLP, which the block does not have."""
    return fold.kind == "rows" and not all(target in modules for target in fold.targets)


def _in_sparse_block(fold: Fold, names: ExpertNames, modules: Collection[str]) -> Fold:
    """A norm before a dense MLP feeds all linears of experts, shared ones too, that take hidden features."""
    if all(target in modules for target in fold.targets):
        return fold
    sparse, roles = f"{names.stored}.", (names.gate, names.up)
    return Fold(
        fold.kind,
        fold.source,
        tuple(module for module in modules if module.startswith(sparse) and module.rpartition(".")[2] in roles),
        tuple(name for name in (sparse + part for part in (names.router, *names.unquantized)) if name in modules),
    )


@dataclass(frozen=True)
class Heads:
    """Attention shape: how ``o_proj``'s input channels map to value heads."""

    num_attention: int
    num_key_value: int
    head_dim: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Heads:
        num_attention = int(config["num_attention_heads"])
        num_key_value = int(config.get("num_key_value_heads") or num_attention)
        head_dim = int(config.get("head_dim") or config["hidden_size"] // num_attention)
        return cls(num_attention, num_key_value, head_dim)


def share_across_heads(scale_K: Tensor, heads: Heads) -> Tensor:
    """Makes an ``o_proj`` input scale equal on channels that one value head feeds (geometric mean)."""
    repeats = heads.num_attention // heads.num_key_value
    if repeats == 1:
        return scale_K
    grouped = scale_K.log().view(heads.num_key_value, repeats, heads.head_dim)
    return grouped.mean(dim=1, keepdim=True).expand_as(grouped).reshape(-1).exp()


def producer_scale(scale_K: Tensor, fold: Fold, heads: Heads) -> Tensor:
    """The scale per producer feature ``[P]``: one of the equal channels of each group of heads."""
    if not fold.targets[0].endswith("o_proj"):
        return scale_K
    return scale_K.view(heads.num_key_value, -1, heads.head_dim)[:, 0].reshape(-1)


def fold_into_norm(weight_K: Tensor, scale_K: Tensor, storage: torch.dtype, plus_one: bool) -> tuple[Tensor, Tensor]:
    """Divides a norm's weight by a scale.

    Returns:
        The new weight in float32, exact in ``storage``; and the scale that it really applies.
        Channels where the quotient vanishes keep their weight and scale 1.
    """
    offset = 1.0 if plus_one else 0.0
    old_K = weight_K.float() + offset
    new_weight_K = (old_K / scale_K - offset).to(storage).float()
    real_K = old_K / (new_weight_K + offset)
    usable_K = torch.isfinite(real_K) & (real_K > 0)
    return torch.where(usable_K, new_weight_K, weight_K.float()), torch.where(usable_K, real_K, torch.ones_like(real_K))


def fold_into_rows(weight_NK: Tensor, bias_N: Tensor | None, scale_P: Tensor) -> tuple[Tensor, Tensor | None]:
    """Divides the last P rows of a producing linear, and its bias there, by the scale; float32."""
    factor_N = torch.ones(weight_NK.shape[0], dtype=torch.float32, device=weight_NK.device)
    factor_N[-len(scale_P) :] = scale_P
    bias = None if bias_N is None else bias_N.float() / factor_N
    return weight_NK.float() / factor_N[:, None], bias
