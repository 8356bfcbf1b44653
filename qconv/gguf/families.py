"""Model families that llama.cpp runs and qconv writes: names of tensors, and what lies in another way there.

Sources: gguf-py's `TensorNameMap`; llama.cpp's `convert_hf_to_gguf.py` for the order of rows and for norms; its
`src/models` for what an architecture computes. llama.cpp rotates pairs of neighbouring features in the architecture
``llama``, transformers the two halves of a head: rows of q and k (and their biases) are interleaved for it. The other
architectures rotate halves there, too. Gemma multiplies by its norms' weights plus one, and llama.cpp by what is
stored. A layer's experts lie in one tensor for each of their three linears, ``[experts, out, in]``.

Left out: vision towers, state-space models, experts with biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from qconv import experts
from qconv.errors import CheckpointError
from qconv.gguf.package import gguf_package

# A matrix of one row in the model, and a vector in the file.
VECTOR = "ffn_gate_inp_shexp.weight"
# Constants of the architecture, which old versions of transformers stored.
BUFFERS = (".rotary_emb.inv_freq",)
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_GEMMA_NORMS = (*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_SHARED = tuple(f"mlp.shared_expert{part}" for part in ("_gate", ".gate_proj", ".up_proj", ".down_proj"))


@dataclass(frozen=True, kw_only=True)
class Family:
    """How llama.cpp knows a model type.

    Attributes:
        architecture: the value of ``general.architecture``.
        model_type: of transformers.
        class_name: of transformers, for a config that is read back.
        modules: of a decoder layer, but for experts.
        biases: linears that llama.cpp loads a bias of.
        interleaves: rows of q and k lie as pairs of neighbours.
        norm_offset: what is added to the weights of norms.
        activation: of the feed-forward layers, as transformers calls it.
        normalizes_experts: whether the weights of the chosen experts are made to sum to one; None without experts.
        needs_head: the output head must be a tensor of its own.
        has_window: llama.cpp keeps to the config's sliding window.
    """

    architecture: str
    model_type: str
    class_name: str
    modules: tuple[str, ...] = (*_ATTENTION, *_MLP, *_NORMS)
    biases: tuple[str, ...] = ()
    interleaves: bool = False
    norm_offset: float = 0.0
    activation: str = "silu"
    normalizes_experts: bool | None = None
    needs_head: bool = False
    has_window: bool = False

    @property
    def expert_names(self) -> experts.ExpertNames | None:
        return None if self.normalizes_experts is None else experts.FAMILIES[self.model_type]

    @property
    def is_gemma(self) -> bool:
        return self.norm_offset != 0


_QKV = ("q_proj", "k_proj", "v_proj")
_ALL = (*_QKV, "o_proj", "gate_proj", "up_proj", "down_proj")
_MOE = (*_ATTENTION, "mlp.gate", *_NORMS)
_GELU = "gelu_pytorch_tanh"
_FAMILIES = (
    Family(architecture="llama", model_type="llama", class_name="LlamaForCausalLM", biases=_ALL, interleaves=True),
    Family(architecture="llama", model_type="mistral", class_name="MistralForCausalLM", interleaves=True),
    Family(
        architecture="llama",
        model_type="mixtral",
        class_name="MixtralForCausalLM",
        modules=(*_ATTENTION, "block_sparse_moe.gate", *_NORMS),
        interleaves=True,
        normalizes_experts=True,
    ),
    Family(architecture="qwen2", model_type="qwen2", class_name="Qwen2ForCausalLM", biases=_QKV),
    Family(
        architecture="qwen2moe",
        model_type="qwen2_moe",
        class_name="Qwen2MoeForCausalLM",
        modules=(*_MOE, *_SHARED),
        biases=_QKV,
        normalizes_experts=False,
        needs_head=True,
    ),
    Family(
        architecture="qwen3",
        model_type="qwen3",
        class_name="Qwen3ForCausalLM",
        modules=(*_ATTENTION, *_QK_NORMS, *_MLP, *_NORMS),
    ),
    Family(
        architecture="qwen3moe",
        model_type="qwen3_moe",
        class_name="Qwen3MoeForCausalLM",
        modules=(*_MOE, *_QK_NORMS),
        normalizes_experts=True,
    ),
    Family(
        architecture="olmoe",
        model_type="olmoe",
        class_name="OlmoeForCausalLM",
        modules=(*_MOE, *_QK_NORMS),
        normalizes_experts=False,
        needs_head=True,
    ),
    Family(
        architecture="phi3",
        model_type="phi3",
        class_name="Phi3ForCausalLM",
        modules=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", *_NORMS),
    ),
    Family(
        architecture="gemma",
        model_type="gemma",
        class_name="GemmaForCausalLM",
        norm_offset=1.0,
        activation=_GELU,
    ),
    Family(
        architecture="gemma2",
        model_type="gemma2",
        class_name="Gemma2ForCausalLM",
        modules=(*_ATTENTION, *_MLP, *_GEMMA_NORMS),
        norm_offset=1.0,
        activation=_GELU,
        has_window=True,
    ),
    Family(
        architecture="gemma3",
        model_type="gemma3_text",
        class_name="Gemma3ForCausalLM",
        modules=(*_ATTENTION, *_QK_NORMS, *_MLP, *_GEMMA_NORMS),
        norm_offset=1.0,
        activation=_GELU,
        has_window=True,
    ),
)
FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _FAMILIES}


def family_of(config: Mapping[str, Any], location: str) -> Family:
    """Raises `CheckpointError` for a model type that is not written."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise CheckpointError(
            f"{location}: model type {config.get('model_type')!r} is not written as GGUF; written are "
            f"{', '.join(FAMILIES)}. llama.cpp's own convert_hf_to_gguf.py knows more: give it a plain merge"
        )
    return family


def family_of_keys(keys: Mapping[str, Any], location: str) -> Family:
    """The first family of a file's architecture, with experts where the file has some.

    Raises:
        CheckpointError: an architecture that is not read.
    """
    architecture = str(keys.get("general.architecture"))
    has_experts = bool(keys.get(f"{architecture}.expert_count"))
    for family in _FAMILIES:
        if family.architecture == architecture and (family.expert_names is not None) == has_experts:
            return family
    known = dict.fromkeys(family.architecture for family in _FAMILIES)
    which = f" {'with' if has_experts else 'without'} experts" if architecture in known else ""
    raise CheckpointError(f"{location}: architecture {architecture!r}{which} is not read; read are {', '.join(known)}")


class Place(NamedTuple):
    """Where a tensor of the model lies: a tensor of the file, or one expert's part of it."""

    stored: str
    expert: int | None = None


def places(family: Family, names: list[str], num_blocks: int, location: str) -> dict[str, Place]:
    """By name in the model, for all tensors but constant buffers.

    Raises:
        CheckpointError: a tensor that the architecture has no place for.
    """
    name_map = _name_map(family, num_blocks)
    result: dict[str, Place] = {}
    for name in names:
        if name.endswith(BUFFERS):
            continue
        place = _expert_place(family, name)
        if place is None:
            stored = name_map.get_name(name, try_suffixes=(".weight", ".bias"))
            module, _, part = name.rpartition(".")
            if stored is None or (part == "bias" and module.rpartition(".")[2] not in family.biases):
                raise CheckpointError(
                    f"{location}: tensor {name!r} has no place in the GGUF architecture {family.architecture!r}"
                )
            place = Place(stored)
        result[name] = place
    return result


def _expert_place(family: Family, name: str) -> Place | None:
    linear = experts.expert_of(name.removesuffix(".weight"))
    names = family.expert_names
    if linear is None or names is None:
        return None
    part = {names.gate: "gate", names.up: "up", names.down: "down"}.get(linear.role)
    block = next((part for part in name.split(".") if part.isdecimal()), None)
    if part is None or linear.experts != f"model.layers.{block}.{names.stored}.{experts.EXPERTS}":
        return None
    return Place(f"blk.{block}.ffn_{part}_exps.weight", linear.number)


def model_names(family: Family, num_blocks: int, num_experts: int) -> dict[str, list[str]]:
    """Name in the file -> name in the model, or those of all experts, for all tensors that the family has."""
    name_map = _name_map(family, num_blocks)
    modules = ["model.embed_tokens", "model.norm", "lm_head"]
    modules += [f"model.layers.{number}.{part}" for number in range(num_blocks) for part in family.modules]
    result: dict[str, list[str]] = {}
    for module in modules:
        for suffix in (".weight", ".bias"):
            stored = name_map.get_name(module + suffix, try_suffixes=(suffix,))
            if stored is not None:
                result[stored] = [module + suffix]
    names = family.expert_names
    if names is not None:
        for number in range(num_blocks):
            whole = f"model.layers.{number}.{names.stored}.{experts.EXPERTS}"
            for part, role in (("gate", names.gate), ("up", names.up), ("down", names.down)):
                own = [f"{whole}.{expert}.{role}.weight" for expert in range(num_experts)]
                result[f"blk.{number}.ffn_{part}_exps.weight"] = own
    return result


def _name_map(family: Family, num_blocks: int) -> Any:
    gguf = gguf_package()
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    return gguf.get_tensor_name_map(number, num_blocks)


def heads_to_interleave(family: Family, name: str, config: Mapping[str, Any]) -> int | None:
    """Heads whose rows lie as pairs of neighbours in the file; None where rows lie as in the model."""
    if not family.interleaves:
        return None
    role = name.rpartition(".")[0].rpartition(".")[2]
    heads = config["num_attention_heads"]
    if role == "q_proj":
        return int(heads)
    return int(config.get("num_key_value_heads") or heads) if role == "k_proj" else None


def added_to(family: Family, name: str) -> float:
    """What the file's tensor has more than the model's."""
    return family.norm_offset if name.endswith("norm.weight") else 0.0


def interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows of the two halves of each head, one of each in turn; works on packed rows, too."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def in_halves(tensor: Tensor, heads: int) -> Tensor:
    """Inverse of `interleaved`."""
    return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
