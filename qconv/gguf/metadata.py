"""The keys of a GGUF file that describe the model, from its config, and back.

Sources: the GGUF specification (ggml, docs/gguf.md) and gguf-py's ``constants.Keys``; which keys an architecture needs,
from llama.cpp's `convert_hf_to_gguf.py`. What llama.cpp would compute otherwise than transformers is refused.

Rotary scaling: linear and yarn are keys. Llama 3's is a tensor ``rope_freqs.weight`` of divisors, one for each
frequency, that a reader cannot turn back into its four numbers: they are sought among what is known, and must give the
tensor again.

Left out: dynamic and long rope, partial rotation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qconv.errors import CheckpointError
from qconv.gguf.families import family_of_architecture

ROPE_FREQS = "rope_freqs.weight"
_LLAMA3_CONTEXTS = (8192,)
_PLAIN_ROPES = ("default", "linear", "yarn", "llama3")


def rope_of(config: Mapping[str, Any], location: str) -> dict[str, Any]:
    """Rotary parameters with ``rope_type`` and ``rope_theta``, wherever the config has them.

    Raises:
        CheckpointError: a kind that is not written.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    if rope["rope_type"] not in _PLAIN_ROPES:
        raise CheckpointError(
            f"{location}: rotary scaling {rope['rope_type']!r} is not written as GGUF; written are "
            f"{', '.join(_PLAIN_ROPES)}"
        )
    return rope


def head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def check_config(config: Mapping[str, Any], location: str) -> None:
    """Raises `CheckpointError` for what llama.cpp computes otherwise."""
    rope = rope_of(config, location)
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    for what, found, wanted in (
        ("hidden_act", config.get("hidden_act", "silu"), "silu"),
        ("partial_rotary_factor", partial, 1.0),
    ):
        if found != wanted:
            raise CheckpointError(f"{location}: {what} {found!r}: llama.cpp's architecture has {wanted!r}")


def context_length(config: Mapping[str, Any]) -> int:
    """Of the file. llama.cpp attends to everything: beyond a sliding window it would not compute the same."""
    length = int(config["max_position_embeddings"])
    window = config.get("sliding_window")
    if window is None or not config.get("use_sliding_window", True):
        return length
    return min(length, int(window))


def add_metadata(writer: Any, config: Mapping[str, Any], vocab_size: int, location: str) -> None:
    """Puts the keys into a `gguf.GGUFWriter`."""
    heads = int(config["num_attention_heads"])
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(vocab_size)
    rope = rope_of(config, location)
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_string(f"{writer.arch}.rope.scaling.type", rope["rope_type"])
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "yarn":
        _check_yarn(rope, location)
        original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(int(original))


def _check_yarn(rope: Mapping[str, Any], location: str) -> None:
    """Numbers that llama.cpp takes as they are by default."""
    for key, default in (("beta_fast", 32), ("beta_slow", 1), ("attention_factor", None), ("mscale", None)):
        if rope.get(key) not in (None, default):
            raise CheckpointError(f"{location}: yarn with {key} {rope[key]!r} is not written as GGUF")


def rope_tensor(config: Mapping[str, Any], location: str) -> Tensor | None:
    """The divisors of Llama 3's frequencies, float32 ``[head_dim / 2]``, or None for other models."""
    rope = rope_of(config, location)
    if rope["rope_type"] != "llama3":
        return None
    return _llama3_divisors(
        head_dim(config),
        float(rope["rope_theta"]),
        float(rope["factor"]),
        float(rope["low_freq_factor"]),
        float(rope["high_freq_factor"]),
        int(rope["original_max_position_embeddings"]),
    )


def _llama3_divisors(size: int, theta: float, factor: float, low: float, high: float, context: int) -> Tensor:
    """1 for short wavelengths, ``factor`` for long ones, a blend of the frequencies between."""
    frequencies = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    wavelengths = 2 * math.pi / frequencies
    blend = ((context / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - blend) / factor + blend)).float()


def config_of(keys: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], location: str) -> dict[str, Any]:
    """What ``config.json`` would say of a file with these keys and tensors. llama.cpp computes in float32.

    Raises:
        CheckpointError: a key is missing, or says what is not read.
    """
    family = family_of_architecture(str(keys.get("general.architecture")), location)

    def key(name: str, default: Any = None) -> Any:
        value = keys.get(f"{family.architecture}.{name}", default)
        if value is None:
            raise CheckpointError(f"{location}: key {family.architecture + '.' + name!r} is missing")
        return value

    heads, hidden = int(key("attention.head_count")), int(key("embedding_length"))
    if "token_embd.weight" not in shapes:
        raise CheckpointError(f"{location}: tensor 'token_embd.weight' is missing")
    config: dict[str, Any] = {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        "hidden_size": hidden,
        "intermediate_size": int(key("feed_forward_length")),
        "num_hidden_layers": int(key("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(key("attention.head_count_kv", heads)),
        "head_dim": int(key("attention.key_length", hidden // heads)),
        "hidden_act": "silu",
        "max_position_embeddings": int(key("context_length")),
        "rms_norm_eps": float(key("attention.layer_norm_rms_epsilon")),
        "vocab_size": shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
        "dtype": "float32",
        "bos_token_id": keys.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": keys.get("tokenizer.ggml.eos_token_id"),
    }
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(key("rope.freq_base", 10000.0))}
    scaling = keys.get(f"{family.architecture}.rope.scaling.type")
    if scaling in ("linear", "yarn"):
        rope |= {"rope_type": scaling, "factor": float(key("rope.scaling.factor"))}
        if scaling == "yarn":
            rope["original_max_position_embeddings"] = int(key("rope.scaling.original_context_length"))
    elif scaling not in (None, "none"):
        raise CheckpointError(f"{location}: rotary scaling {scaling!r} is not read")
    return config | {"rope_parameters": rope}


def with_llama3(config: dict[str, Any], divisors: Tensor, location: str) -> dict[str, Any]:
    """The config with the rotary scaling that ``rope_freqs.weight`` stands for.

    Raises:
        CheckpointError: no known numbers give this tensor.
    """
    theta, factor = float(config["rope_parameters"]["rope_theta"]), float(divisors.max())
    for context in _LLAMA3_CONTEXTS:
        made = _llama3_divisors(config["head_dim"], theta, factor, 1.0, 4.0, context)
        if made.shape == divisors.shape and torch.allclose(made, divisors, rtol=1e-5):
            rope = {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": context,
            }
            return config | {"rope_parameters": rope}
    raise CheckpointError(f"{location}: {ROPE_FREQS} holds rotary frequencies that are not those of Llama 3.1")


def check_llama3(config: Mapping[str, Any], location: str) -> None:
    """Refuses to write what could not be read back, see `with_llama3`."""
    divisors = rope_tensor(config, location)
    if divisors is not None:
        rope = rope_of(config, location)
        with_llama3({"head_dim": head_dim(config), "rope_parameters": rope}, divisors, location)
