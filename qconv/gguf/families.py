"""Model families that llama.cpp runs and qconv writes: names of tensors, and what lies in another order there.

Sources: gguf-py's `TensorNameMap`; llama.cpp's `convert_hf_to_gguf.py` for the order of rows. llama.cpp rotates pairs
of neighbouring features in the architecture ``llama``, transformers the two halves of a head: rows of q and k (and
their biases) are interleaved for it. The other architectures rotate halves there, too.

Left out: mixtures of experts, vision towers, state-space models, and families whose weights change on the way (Gemma
stores its norms plus one).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qconv.errors import CheckpointError
from qconv.gguf.package import gguf_package

# Constants of the architecture, which old versions of transformers stored.
BUFFERS = (".rotary_emb.inv_freq",)


@dataclass(frozen=True, kw_only=True)
class Family:
    """How llama.cpp knows a model type.

    Attributes:
        architecture: the value of ``general.architecture``.
        model_type: of transformers.
        class_name: of transformers, for a config that is read back.
        biases: linears that llama.cpp loads a bias of.
        interleaves: rows of q and k lie as pairs of neighbours.
    """

    architecture: str
    model_type: str
    class_name: str
    biases: tuple[str, ...] = ()
    interleaves: bool = False


_QKV = ("q_proj", "k_proj", "v_proj")
_ALL = (*_QKV, "o_proj", "gate_proj", "up_proj", "down_proj")
_FAMILIES = (
    Family(architecture="llama", model_type="llama", class_name="LlamaForCausalLM", biases=_ALL, interleaves=True),
    Family(architecture="llama", model_type="mistral", class_name="MistralForCausalLM", interleaves=True),
    Family(architecture="qwen2", model_type="qwen2", class_name="Qwen2ForCausalLM", biases=_QKV),
    Family(architecture="qwen3", model_type="qwen3", class_name="Qwen3ForCausalLM"),
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


def family_of_architecture(architecture: str, location: str) -> Family:
    """The first family of a file's architecture; raises `CheckpointError` for one that is not read."""
    family = next((family for family in _FAMILIES if family.architecture == architecture), None)
    if family is None:
        known = dict.fromkeys(family.architecture for family in _FAMILIES)
        raise CheckpointError(f"{location}: architecture {architecture!r} is not read; read are {', '.join(known)}")
    return family


def stored_names(family: Family, names: list[str], num_blocks: int, location: str) -> dict[str, str]:
    """Name in the model -> name in the file, for all tensors but constant buffers.

    Raises:
        CheckpointError: a tensor that the architecture has no place for.
    """
    name_map = _name_map(family, num_blocks)
    result: dict[str, str] = {}
    for name in names:
        if name.endswith(BUFFERS):
            continue
        stored = name_map.get_name(name, try_suffixes=(".weight", ".bias"))
        module, _, part = name.rpartition(".")
        if stored is None or (part == "bias" and module.rpartition(".")[2] not in family.biases):
            raise CheckpointError(
                f"{location}: tensor {name!r} has no place in the GGUF architecture {family.architecture!r}"
            )
        result[name] = stored
    return result


def model_names(family: Family, num_blocks: int) -> dict[str, str]:
    """Name in the file -> name in the model, for all tensors that the families here have."""
    name_map = _name_map(family, num_blocks)
    modules = ["model.embed_tokens", "model.norm", "lm_head"]
    parts = [f"self_attn.{p}" for p in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    parts += [f"mlp.{p}" for p in ("gate_proj", "up_proj", "down_proj")]
    parts += ["input_layernorm", "post_attention_layernorm"]
    modules += [f"model.layers.{number}.{part}" for number in range(num_blocks) for part in parts]
    result = {}
    for module in modules:
        for suffix in (".weight", ".bias"):
            stored = name_map.get_name(module + suffix, try_suffixes=(suffix,))
            if stored is not None:
                result[stored] = module + suffix
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


def interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows of the two halves of each head, one of each in turn; works on packed rows, too."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def in_halves(tensor: Tensor, heads: int) -> Tensor:
    """Inverse of `interleaved`."""
    return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
