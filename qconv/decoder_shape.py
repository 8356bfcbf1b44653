"""The numbers of a decoder that a serving engine goes by, read from ``config.json`` without transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qconv.errors import CheckpointError

_FULL, _SLIDING = "full_attention", ("sliding_attention", "chunked_attention")


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """Attributes:
    num_heads, num_kv_heads: of queries, and of keys and values.
    head_dim: features of a head.
    max_positions: longest sequence that the config allows; None where it says nothing.
    windows: of each layer that keeps keys and values: tokens that it keeps at most, or None = all.
    latent: features that a token keeps in a layer where keys and values are compressed (MLA), else None.
    uncounted: kinds of layers whose state does not grow with the sequence (linear attention, Mamba).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int | None
    windows: tuple[int | None, ...]
    latent: int | None = None
    uncounted: tuple[str, ...] = ()

    @staticmethod
    def of(config: Mapping[str, Any], location: str) -> DecoderShape:
        """Reads the names that decoder families give these numbers.

        Raises:
            CheckpointError: a number is not there or is none.
        """
        found = _of_decoder(config)
        num_heads = _number(found, location, "num_attention_heads", "n_head", "num_heads")
        hidden = _number(found, location, "hidden_size", "n_embd", "d_model")
        num_layers = _number(found, location, "num_hidden_layers", "n_layer", "num_layers")
        latent = found.get("kv_lora_rank")
        windows, uncounted = _windows(found, num_layers)
        return DecoderShape(
            num_heads=num_heads,
            num_kv_heads=1 if found.get("multi_query") else int(found.get("num_key_value_heads") or num_heads),
            head_dim=int(found.get("head_dim") or hidden // num_heads),
            max_positions=found.get("max_position_embeddings") or found.get("n_positions"),
            windows=windows,
            latent=None if latent is None else int(latent) + int(found.get("qk_rope_head_dim") or 0),
            uncounted=uncounted,
        )


def keeps_latents(config: Mapping[str, Any]) -> bool:
    """Whether attentions cache one latent in the place of keys and values (MLA)."""
    return _of_decoder(config).get("kv_lora_rank") is not None


def _of_decoder(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, Mapping) else config


def _windows(config: Mapping[str, Any], num_layers: int) -> tuple[tuple[int | None, ...], tuple[str, ...]]:
    """Of the layers that keep keys and values, and the kinds of those that do not.

    Where only a pattern that engines know by the family's name says which layers slide, all count as full: too much
    memory rather than too little.
    """
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    if config.get("use_sliding_window") is False:
        window = None
    if not kinds:
        of_all = window if config.get("model_type") in ("mistral", "mixtral") else None
        return (of_all,) * num_layers, ()
    keeping = [kind for kind in kinds if kind == _FULL or kind in _SLIDING]
    size = {"chunked_attention": config.get("attention_chunk_size")}
    return (
        tuple(size.get(kind, window) if kind in _SLIDING else None for kind in keeping),
        tuple(sorted({str(kind) for kind in kinds} - set(keeping))),
    )


def _number(config: Mapping[str, Any], location: str, *names: str) -> int:
    value = next((config[name] for name in names if config.get(name) is not None), None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{location}: config.json: expected a number above 0 under {names[0]!r}, found {value!r}")
    return value
