"""Keys and values on their way into a cache: where an attention hands them over, for whoever looks or rounds.

transformers' attentions hand keys, after rotary embedding, and values to ``past_key_values.update`` and go on with what
it gives back. What stands in the place of that cache sees just what a serving engine keeps; no family is named here,
and a cache that is there (in ``generate``) still gets what it would.

An attention counts if compressed-tensors 0.20 gives it scales (`is_cached_attention_module`): "attention" in the name
of its class, a projection of keys and values of its own, and ``past_key_values`` among what it is called with. Engines
that read that package's checkpoints look for scales in the same places.

What passes these signs and keeps something else is told apart by calling it (`cached_attentions.py`).
Left out: attention that keeps a latent instead (MLA), which its callers refuse.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qconv.errors import CalibrationError

_PROJECTIONS = ("k_proj", "v_proj", "qkv_proj", "kv_b_proj")

HANDS_NONE = (
    "hands no keys and values to a cache (layers that share those of others do not), so there is nothing to scale; "
    "leave --kv-cache out"
)

Exchange = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Gets keys and values ``[B, heads, S, features]``, and gives what the attention goes on with."""


def cached_attentions(root: nn.Module) -> dict[str, nn.Module]:
    """The attentions below a module that hand keys and values to a cache, by name."""
    return {name: module for name, module in root.named_modules() if _is_cached(module)}


def _is_cached(module: nn.Module) -> bool:
    return (
        "attention" in type(module).__name__.lower()
        and any(hasattr(module, name) for name in _PROJECTIONS)
        and "past_key_values" in inspect.signature(module.forward).parameters
    )


def exchanging(attention: nn.Module, exchange: Exchange) -> RemovableHandle:
    """Lets ``exchange`` have the keys and values of an attention from now on, until the handle is removed."""

    def stand_in(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "past_key_values": _StandIn(exchange, kwargs.get("past_key_values"))}

    return attention.register_forward_pre_hook(stand_in, with_kwargs=True)


class _StandIn:
    """Stands in the place of a cache, or of none."""

    def __init__(self, exchange: Exchange, cache: Any):
        self._exchange = exchange
        self._cache = cache

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._exchange(keys, values)
        if self._cache is None:
            return keys, values
        result: tuple[Tensor, Tensor] = self._cache.update(keys, values, *args, **kwargs)
        return result

    def get_seq_length(self, *args: Any) -> int:
        return 0 if self._cache is None else self._cache.get_seq_length(*args)

    def __getattr__(self, name: str) -> Any:
        if self._cache is None:
            raise CalibrationError(
                f"an attention asks its cache for {name!r}, which a cache of keys and values does not have: its states "
                "are others, and float8 scales are of keys and values; leave --kv-cache out"
            )
        return getattr(self._cache, name)
