"""The keys of a GGUF file that describe the model, from its config, and back.

Sources: the GGUF specification (ggml, docs/gguf.md) and gguf-py's ``constants.Keys``; which keys an architecture needs,
from llama.cpp's `convert_hf_to_gguf.py`, and what it computes, from its `src/models`. What llama.cpp would compute
otherwise than transformers is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from qconv.errors import CheckpointError
from qconv.gguf.families import Family, family_of, family_of_keys
from qconv.gguf.rotary import add_rope, head_dim, local_theta, original_context, rope_of, rope_parameters, rotated

# Layers with full attention: the last of so many.
_WINDOW_PATTERNS = {"gemma2": 2, "gemma3": 6}
# Numbers of layers by which llama.cpp knows Gemma's 27B models, whose attention is scaled otherwise.
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}
# What transformers takes where the config does not say.
_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


def check_config(config: Mapping[str, Any], location: str) -> None:
    """Raises `CheckpointError` for what llama.cpp computes otherwise."""
    family = family_of(config, location)
    activation = config.get("hidden_activation") or config.get("hidden_act") or family.activation
    wanted: list[tuple[str, Any, Any]] = [("hidden_act", activation, family.activation)]
    if family.model_type != "phi3":
        rope = rope_of(config, location)
        partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
        wanted.append(("partial_rotary_factor", partial, 1.0))
    if family.normalizes_experts is not None:
        wanted += _wanted_of_experts(family, config)
    if family.is_gemma:
        wanted += _wanted_of_gemma(family, config, location)
    if family.architecture in ("phi3", "olmoe", "qwen2moe"):
        wanted.append(("heads times head_dim", head_dim(config) * config["num_attention_heads"], config["hidden_size"]))
    if family.architecture == "olmoe":
        wanted.append(("num_key_value_heads", config.get("num_key_value_heads"), config["num_attention_heads"]))
    for what, found, own in wanted:
        if found != own:
            raise CheckpointError(f"{location}: {what} {found!r}: llama.cpp's architecture has {own!r}")
    rotated(config, location)


def _wanted_of_experts(family: Family, config: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    wanted = [
        ("mlp_only_layers", list(config.get("mlp_only_layers") or []), []),
        ("decoder_sparse_step", config.get("decoder_sparse_step") or 1, 1),
        ("clip_qkv", config.get("clip_qkv"), None),
    ]
    if family.model_type != "mixtral":
        wanted.append(("norm_topk_prob", bool(config.get("norm_topk_prob", False)), family.normalizes_experts))
    return wanted


def _wanted_of_gemma(family: Family, config: Mapping[str, Any], location: str) -> list[tuple[str, Any, Any]]:
    if "head_dim" not in config:
        raise CheckpointError(
            f"{location}: config.json has no head_dim, which Gemma's size of heads does not follow from"
        )
    arch, num_layers = family.architecture, int(config["num_hidden_layers"])
    wanted: list[tuple[str, Any, Any]] = [
        ("use_bidirectional_attention", bool(config.get("use_bidirectional_attention")), False)
    ]
    if arch not in _WINDOW_PATTERNS:
        return wanted
    size = (
        config["hidden_size"] // config["num_attention_heads"] if num_layers == _GEMMA_27B[arch] else head_dim(config)
    )
    wanted.append(("query_pre_attn_scalar", config.get("query_pre_attn_scalar", 256), size))
    every = _WINDOW_PATTERNS[arch]
    kinds = ["full_attention" if number % every == every - 1 else "sliding_attention" for number in range(num_layers)]
    wanted.append(("layer_types", list(config.get("layer_types") or kinds), kinds))
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or every
    wanted.append(("sliding_window_pattern", pattern, every))
    if arch == "gemma3":
        wanted.append(("attn_logit_softcapping", config.get("attn_logit_softcapping"), None))
    else:
        wanted += [(key, bool(config.get(key, default)), True) for key, default in _CAPS.items()]
    return wanted


def context_length(family: Family, config: Mapping[str, Any]) -> int:
    """Of the file. Most architectures attend to everything: beyond a sliding window they would not compute the same."""
    length = int(config["max_position_embeddings"])
    window = config.get("sliding_window")
    if window is None or family.has_window or not config.get("use_sliding_window", True):
        return length
    return min(length, int(window))


def add_metadata(writer: Any, config: Mapping[str, Any], vocab_size: int, location: str) -> None:
    """Puts the keys into a `gguf.GGUFWriter`."""
    family = family_of(config, location)
    heads = int(config["num_attention_heads"])
    writer.add_context_length(context_length(family, config))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(vocab_size)
    add_rope(writer, config, location)
    if family.expert_names is not None:
        writer.add_expert_count(num_experts(config))
        writer.add_expert_used_count(int(config["num_experts_per_tok"]))
        if "moe_intermediate_size" in config:
            writer.add_expert_feed_forward_length(int(config["moe_intermediate_size"]))
        if "shared_expert_intermediate_size" in config:
            writer.add_expert_shared_feed_forward_length(int(config["shared_expert_intermediate_size"]))
    if family.has_window:
        writer.add_sliding_window(int(config["sliding_window"]))
    if family.architecture == "gemma2":
        writer.add_attn_logit_softcapping(float(config.get("attn_logit_softcapping", _CAPS["attn_logit_softcapping"])))
        writer.add_final_logit_softcapping(
            float(config.get("final_logit_softcapping", _CAPS["final_logit_softcapping"]))
        )
    if family.architecture == "gemma3":
        writer.add_rope_freq_base_swa(local_theta(config))
        if config.get("final_logit_softcapping"):
            writer.add_final_logit_softcapping(float(config["final_logit_softcapping"]))


def num_experts(config: Mapping[str, Any]) -> int:
    return int(config.get("num_experts") or config["num_local_experts"])


def config_of(
    keys: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    constants: Callable[[str], Tensor | None],
    location: str,
) -> dict[str, Any]:
    """What ``config.json`` would say of a file with these keys and tensors. llama.cpp computes in float32.

    Args:
        constants: reads a tensor that no model has; None where there is none of the name.

    Raises:
        CheckpointError: a key is missing, or says what is not read.
    """
    family = family_of_keys(keys, location)

    def key(name: str, default: Any = None) -> Any:
        value = keys.get(f"{family.architecture}.{name}", default)
        if value is None:
            raise CheckpointError(f"{location}: key {family.architecture + '.' + name!r} is missing")
        return value

    heads, hidden = int(key("attention.head_count")), int(key("embedding_length"))
    if "token_embd.weight" not in shapes:
        raise CheckpointError(f"{location}: tensor 'token_embd.weight' is missing")
    size = int(key("attention.key_length", hidden // heads))
    config: dict[str, Any] = {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        "hidden_size": hidden,
        "intermediate_size": int(key("feed_forward_length")),
        "num_hidden_layers": int(key("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(key("attention.head_count_kv", heads)),
        "head_dim": size,
        "hidden_act": family.activation,
        "max_position_embeddings": int(key("context_length")),
        "rms_norm_eps": float(key("attention.layer_norm_rms_epsilon")),
        "vocab_size": shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
        "dtype": "float32",
        "bos_token_id": keys.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": keys.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": keys.get("tokenizer.ggml.padding_token_id"),
        "rope_parameters": rope_parameters(keys, family.architecture, size, constants, location),
    }
    if family.expert_names is not None:
        config |= _config_of_experts(family, key, shapes)
    if family.is_gemma:
        config |= _config_of_gemma(family, key, config)
    if family.model_type == "phi3":
        config["original_max_position_embeddings"] = original_context(config, config["rope_parameters"])
    return config


def _config_of_experts(
    family: Family, key: Callable[..., Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    count = int(key("expert_count"))
    config: dict[str, Any] = {"num_local_experts": count, "num_experts": count}
    config["num_experts_per_tok"] = int(key("expert_used_count"))
    if family.model_type != "mixtral":
        config |= {"norm_topk_prob": family.normalizes_experts, "decoder_sparse_step": 1, "mlp_only_layers": []}
        if "blk.0.ffn_up_exps.weight" in shapes:
            config["moe_intermediate_size"] = shapes["blk.0.ffn_up_exps.weight"][1]
    if "blk.0.ffn_up_shexp.weight" in shapes:
        config["shared_expert_intermediate_size"] = shapes["blk.0.ffn_up_shexp.weight"][0]
    if family.model_type == "qwen2_moe":
        config["qkv_bias"] = "blk.0.attn_q.bias" in shapes
    return config


def _config_of_gemma(family: Family, key: Callable[..., Any], config: Mapping[str, Any]) -> dict[str, Any]:
    arch = family.architecture
    own: dict[str, Any] = {"hidden_activation": family.activation}
    if arch == "gemma":
        return own
    is_27b = config["num_hidden_layers"] == _GEMMA_27B[arch]
    own["query_pre_attn_scalar"] = (
        config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"]
    )
    own["sliding_window"] = int(key("attention.sliding_window", 4096))
    if arch == "gemma2":
        own["attn_logit_softcapping"] = float(key("attn_logit_softcapping", _CAPS["attn_logit_softcapping"]))
        own["final_logit_softcapping"] = float(key("final_logit_softcapping", _CAPS["final_logit_softcapping"]))
    else:
        own["final_logit_softcapping"] = float(key("final_logit_softcapping", 0.0)) or None
        local = {"rope_type": "default", "rope_theta": float(key("rope.freq_base_swa", 10000.0))}
        own["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}
    return own
