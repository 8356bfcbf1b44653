"""Which attentions of a model hand keys and values to a cache: asked of transformers' code, without weights.

Each decoder block is called on the meta device with two tokens, and left as soon as its attention has shown what it
does; so a family whose attentions keep something else is known before any work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qconv.errors import CalibrationError
from qconv.key_values import HANDS_NONE, cached_attentions, exchanging
from qconv.streaming import StreamedModel
from qconv.types import Checkpoint, TensorSpec


@dataclass(frozen=True, kw_only=True)
class CacheUse:
    """What the attentions do that compressed-tensors' readers give scales to, see `key_values`.

    Attributes:
        handing: full names of those that hand keys and values to a cache, in the model's order.
        others: what the others do instead, in words, by name.
    """

    handing: tuple[str, ...]
    others: Mapping[str, str]


def cache_use(view: Checkpoint) -> CacheUse:
    """From headers alone.

    Raises:
        CheckpointError: the model cannot be run block by block, see `StreamedModel`.
    """
    model = StreamedModel(_Hollow(view), "cpu", torch.bfloat16)
    (h_BSH,) = model.embed([torch.zeros(1, 2, dtype=torch.long)])
    handing, others = [], {}
    for index in range(model.num_blocks):
        block = model.block_without_values(index)
        run = partial(model.run_without_values, index, block, h_BSH)
        for name, attention in cached_attentions(block).items():
            full_name, instead = model.block_prefix(index) + name, _what_instead(attention, run)
            if instead is None:
                handing.append(full_name)
            else:
                others[full_name] = instead
    return CacheUse(handing=tuple(handing), others=others)


class _HandedError(Exception):
    """Ends a pass: keys and values were handed over."""


class _ReturnedError(Exception):
    """Ends a pass: the attention returned without."""


def _hand(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    raise _HandedError


def _return(*_: Any) -> None:
    raise _ReturnedError


def _what_instead(attention: nn.Module, run: Callable[[], Any]) -> str | None:
    """In words, what an attention does with a cache; None where it hands it keys and values."""
    handles = [exchanging(attention, _hand), attention.register_forward_hook(_return)]
    try:
        run()
    except _HandedError:
        return None
    except CalibrationError as error:
        return str(error)
    except _ReturnedError:
        return HANDS_NONE
    except Exception:  # steps before it depend on values: it is heard when it runs
        return None
    finally:
        for handle in handles:
            handle.remove()
    return HANDS_NONE  # it was not called


class _Hollow:
    """A checkpoint of zeros that take no memory."""

    def __init__(self, view: Checkpoint):
        self._view = view

    @property
    def location(self) -> str:
        return self._view.location

    @property
    def config(self) -> Mapping[str, Any]:
        return self._view.config

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._view.specs()

    def read(self, name: str, device: str = "cpu") -> Tensor:
        spec = self.specs()[name]
        return torch.zeros((), dtype=spec.dtype, device=device).expand(spec.shape)
