"""Rotary positions in a GGUF file: its keys and tensors of divisors, from a config and back.

Sources: the GGUF specification (ggml, docs/gguf.md); llama.cpp's `convert_hf_to_gguf.py`; transformers'
`modeling_rope_utils` for the numbers.

Linear and yarn scaling are keys. Llama 3's is a tensor ``rope_freqs.weight`` of divisors, one for each frequency, that
a reader cannot turn back into its four numbers: they are sought among what is known, and must give the tensor again.
Phi-3's long rope is two such tensors, ``rope_factors_long.weight`` and ``rope_factors_short.weight``: llama.cpp takes
the long ones when its context is longer than the original one, transformers when the text is.

Left out: dynamic rope.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qconv.errors import CheckpointError

ROPE_FREQS, ROPE_LONG, ROPE_SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
CONSTANTS = (ROPE_FREQS, ROPE_LONG, ROPE_SHORT)
_LLAMA3_CONTEXTS = (8192,)
_KINDS = ("default", "linear", "yarn", "llama3", "longrope")


def head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_of(config: Mapping[str, Any], location: str) -> dict[str, Any]:
    """Rotary parameters with ``rope_type`` and ``rope_theta``, wherever the config has them; where layers with a
    sliding window have their own, those of the others.

    Raises:
        CheckpointError: a kind that is not written.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope = dict(rope.get("full_attention", rope))
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope["rope_type"] = {"su": "longrope"}.get(rope["rope_type"], rope["rope_type"])
    rope.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    if rope["rope_type"] not in _KINDS or (rope["rope_type"] == "longrope") > (config.get("model_type") == "phi3"):
        raise CheckpointError(
            f"{location}: rotary scaling {rope['rope_type']!r} is not written as GGUF; written are "
            f"{', '.join(_KINDS[:-1])}, and longrope of phi3"
        )
    return rope


def local_theta(config: Mapping[str, Any]) -> float:
    """Of layers with a sliding window, where they have their own (Gemma 3)."""
    own = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    return float(own.get("rope_theta") or config.get("rope_local_base_freq") or 10000.0)


def rotated(config: Mapping[str, Any], location: str) -> int:
    """Features of a head that are rotated."""
    rope = rope_of(config, location)
    return int(head_dim(config) * float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1))


def original_context(config: Mapping[str, Any], rope: Mapping[str, Any]) -> int:
    return int(
        rope.get("original_max_position_embeddings")
        or config.get("original_max_position_embeddings")
        or config["max_position_embeddings"]
    )


def add_rope(writer: Any, config: Mapping[str, Any], location: str) -> None:
    """Puts the keys into a `gguf.GGUFWriter`."""
    rope = rope_of(config, location)
    writer.add_rope_dimension_count(rotated(config, location))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_string(f"{writer.arch}.rope.scaling.type", rope["rope_type"])
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "yarn":
        _check_yarn(rope, location)
    if rope["rope_type"] in ("yarn", "longrope") or writer.arch == "phi3":
        writer.add_rope_scaling_orig_ctx_len(original_context(config, rope))
    if rope["rope_type"] == "longrope":
        writer.add_string(f"{writer.arch}.rope.scaling.type", "longrope")
        writer.add_rope_scaling_attn_factors(_long_attention_factor(config, rope))


def _check_yarn(rope: Mapping[str, Any], location: str) -> None:
    """Numbers that llama.cpp takes as they are by default."""
    for key, default in (("beta_fast", 32), ("beta_slow", 1), ("attention_factor", None), ("mscale", None)):
        if rope.get(key) not in (None, default):
            raise CheckpointError(f"{location}: yarn with {key} {rope[key]!r} is not written as GGUF")


def _long_attention_factor(config: Mapping[str, Any], rope: Mapping[str, Any]) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    original = original_context(config, rope)
    factor = config["max_position_embeddings"] / original
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def rope_tensors(config: Mapping[str, Any], location: str) -> dict[str, Tensor]:
    """Divisors of frequencies, float32 ``[features that are rotated / 2]``, by name in the file.

    Raises:
        CheckpointError: what could not be read back, or has another length.
    """
    rope = rope_of(config, location)
    if rope["rope_type"] == "llama3":
        divisors = _llama3_divisors(
            head_dim(config),
            float(rope["rope_theta"]),
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
        _llama3_of(head_dim(config), float(rope["rope_theta"]), divisors, location)
        return {ROPE_FREQS: divisors}
    if rope["rope_type"] != "longrope":
        return {}
    tensors = {}
    for name, key in ((ROPE_LONG, "long_factor"), (ROPE_SHORT, "short_factor")):
        factors = rope.get(key)
        if not isinstance(factors, list) or len(factors) != rotated(config, location) // 2:
            raise CheckpointError(f"{location}: long rope: expected {rotated(config, location) // 2} numbers as {key}")
        tensors[name] = torch.tensor(factors, dtype=torch.float32)
    return tensors


def _llama3_divisors(size: int, theta: float, factor: float, low: float, high: float, context: int) -> Tensor:
    """1 for short wavelengths, ``factor`` for long ones, a blend of the frequencies between."""
    frequencies = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    wavelengths = 2 * math.pi / frequencies
    blend = ((context / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - blend) / factor + blend)).float()


def _llama3_of(size: int, theta: float, divisors: Tensor, location: str) -> dict[str, Any]:
    """The parameters that ``rope_freqs.weight`` stands for; raises `CheckpointError` where no known ones give it."""
    factor = float(divisors.max())
    for context in _LLAMA3_CONTEXTS:
        made = _llama3_divisors(size, theta, factor, 1.0, 4.0, context)
        if made.shape == divisors.shape and torch.allclose(made, divisors, rtol=1e-5):
            return {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": context,
            }
    raise CheckpointError(f"{location}: {ROPE_FREQS} holds rotary frequencies that are not those of Llama 3.1")


def rope_parameters(
    keys: Mapping[str, Any], arch: str, size: int, constants: Callable[[str], Tensor | None], location: str
) -> dict[str, Any]:
    """What a config says of a file's rotary positions.

    Args:
        size: features of a head.
        constants: reads one of the tensors of divisors; None where the file has none.

    Raises:
        CheckpointError: a key says what is not read.
    """
    theta = float(keys.get(f"{arch}.rope.freq_base", 10000.0))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    divisors = constants(ROPE_FREQS)
    long, short = constants(ROPE_LONG), constants(ROPE_SHORT)
    scaling = keys.get(f"{arch}.rope.scaling.type")
    original = keys.get(f"{arch}.rope.scaling.original_context_length")
    if divisors is not None:
        rope = _llama3_of(size, theta, divisors, location)
    elif long is not None and short is not None:
        rope |= {"rope_type": "longrope", "long_factor": long.tolist(), "short_factor": short.tolist()}
        rope |= {"original_max_position_embeddings": original}
        rope |= {"attention_factor": keys.get(f"{arch}.rope.scaling.attn_factor", 1.0)}
    elif scaling in ("linear", "yarn"):
        rope |= {"rope_type": scaling, "factor": float(keys[f"{arch}.rope.scaling.factor"])}
        if scaling == "yarn":
            rope["original_max_position_embeddings"] = original
    elif scaling not in (None, "none"):
        raise CheckpointError(f"{location}: rotary scaling {scaling!r} is not read")
    rotated_features = int(keys.get(f"{arch}.rope.dimension_count") or size)
    return rope if rotated_features == size else rope | {"partial_rotary_factor": rotated_features / size}
