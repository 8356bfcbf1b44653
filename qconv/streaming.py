"""A causal language model that is never whole: one decoder block at a time.

transformers builds the skeleton on the meta device. A block's weights are read from a `Checkpoint`
view when the block is visited and dropped afterwards, so memory holds one block and the
activations. No model family is named here: the inputs of each decoder block and the work before
and after the blocks (embedding scale, masks, rotary angles, final norm, logit soft-capping) are
the model's own `forward`, run with its decoder layers replaced by recorders.

Dimension legend: B = rows in a batch, S = tokens per row, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qconv.experts import stays_float32
from qconv.skeleton import build_skeleton, check_parameters, find_blocks, tied_names
from qconv.types import Checkpoint, TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Decorate = Callable[[str, nn.Module], None]
"""Called with a module's name prefix (``"model.layers.3."``, or ``""`` for the parts outside the
blocks) and the module, after its weights are in place; may attach forward hooks."""


class BlockModel(ABC):
    """A causal language model that is run one decoder block at a time.

    Attributes:
        shows_hidden_states: what `run_block` gives are hidden states, and not something that stands for them.
    """

    shows_hidden_states = True
    layers_name: str
    num_blocks: int
    device: str

    def __init__(self) -> None:
        self._calls: dict[tuple[int, int], list[_Call]] = {}
        self._in_tuples: bool | None = None  # unknown until the first block was asked

    @abstractmethod
    def load_block(self, index: int) -> nn.Module:
        """A runnable decoder layer; drop it to free its memory."""

    @abstractmethod
    def _load_outer(self, with_embedding: bool, with_head: bool) -> nn.Module:
        """The whole model with everything outside the decoder layers in place, but for what is not asked for."""

    @property
    @abstractmethod
    def head_bytes(self) -> int:
        """Memory that `head` takes beyond what is there already."""

    @abstractmethod
    def whole(self) -> nn.Module:
        """The transformers model with all its blocks in memory, hooks and all; for ``generate`` and evaluation."""

    @torch.no_grad()
    def run_block(self, index: int, block: nn.Module, hidden_BSH: Tensor) -> Tensor:
        """One decoder block on one batch that came from `embed` (its masks and positions are kept by shape)."""
        call = self._calls[(hidden_BSH.shape[0], hidden_BSH.shape[1])][index]
        out = block(hidden_BSH, *call.args, **call.kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def embed(self, batches: Iterable[Tensor]) -> list[Tensor]:
        """The inputs of the first block for token batches ``[B, S]``; ``[B, S, H]`` each.

        Also records what each block is called with, once per batch shape.
        """
        return list(self.embed_each(batches))

    @torch.no_grad()
    def embed_each(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """As `embed`, one batch at a time: for hidden states that do not all fit on the device."""
        outer = self._load_outer(with_embedding=True, with_head=False)
        in_tuples = self._layers_return_tuples(outer)
        for ids_BS in batches:
            calls: list[_Call] = []
            with _replaced_layers(outer, self.layers_name, _Recorder(calls, in_tuples)):
                outer.base_model(input_ids=ids_BS.to(self.device), use_cache=False)  # type: ignore[operator]
            first = calls[0].hidden_BSH
            assert first is not None
            self._calls[(ids_BS.shape[0], ids_BS.shape[1])] = [replace(call, hidden_BSH=None) for call in calls]
            calls.clear()
            yield first

    def head(self) -> Callable[[Tensor], Tensor]:
        """A function from the last block's output ``[B, S, H]`` to logits ``[B, S, V]``; drop it to free the head."""
        outer = self._load_outer(with_embedding=False, with_head=True)
        in_tuples = bool(self._in_tuples)  # `embed` found out
        width = outer.get_input_embeddings().weight.shape[-1]  # type: ignore[operator]

        @torch.no_grad()
        def logits(hidden_BSH: Tensor) -> Tensor:
            # What goes in is dropped at the first layer, so the input embedding need not be there.
            unused = torch.zeros(*hidden_BSH.shape[:2], width, dtype=hidden_BSH.dtype, device=self.device)
            with _replaced_layers(outer, self.layers_name, _Recorder([], in_tuples, hidden_BSH)):
                result: Tensor = outer(inputs_embeds=unused, use_cache=False).logits
            return result

        return logits

    @torch.no_grad()
    def _layers_return_tuples(self, outer: nn.Module) -> bool:
        """Whether decoder layers return ``(hidden, ...)``, of which the model takes ``[0]``, or hidden states alone.

        What stands in for them must return the same. No annotation or config tells, so the first
        block is run once, on two tokens.
        """
        if self._in_tuples is None:
            calls: list[_Call] = []
            ids_BS = torch.zeros(1, 2, dtype=torch.long, device=self.device)
            with suppress(_StoppedError), _replaced_layers(outer, self.layers_name, partial(_record_and_stop, calls)):
                outer.base_model(input_ids=ids_BS, use_cache=False)  # type: ignore[operator]
            self._in_tuples = isinstance(self._try_block(calls[0]), tuple)
        return self._in_tuples

    def _try_block(self, call: _Call) -> Any:
        """What the first block returns for a call."""
        return self.load_block(0)(call.hidden_BSH, *call.args, **call.kwargs)


class StreamedModel(BlockModel):
    """Runs a checkpoint view block by block, reading each block's weights when it is visited.

    Args:
        view: logical weights under the names that transformers gives the model's parameters.
        device: where blocks run.
        compute_dtype: dtype of weights and activations while a block runs.
        decorate: see `Decorate`; how adapters and activation quantization join the forward pass.
        keep_blocks: a block that was loaded once stays in memory, for models that fit and are run again.

    Construction reads headers alone: it tells before any work whether a view can be run.

    Raises:
        CheckpointError: transformers cannot build the architecture, or a parameter is missing
            from the view under its name in transformers or has another shape.
    """

    def __init__(
        self,
        view: Checkpoint,
        device: str,
        compute_dtype: torch.dtype,
        decorate: Decorate | None = None,
        keep_blocks: bool = False,
    ):
        super().__init__()
        self.view = view
        self._kept: dict[int, nn.Module] | None = {} if keep_blocks else None
        self.device = device
        self.compute_dtype = compute_dtype
        self._decorate = decorate
        self._skeleton = build_skeleton(view, compute_dtype)
        self.layers_name, layers = find_blocks(self._skeleton, view.location)
        self._layers = list(layers)
        self.num_blocks = len(self._layers)
        self._tied = tied_names(self._skeleton)
        check_parameters(self._skeleton, view, self._tied)
        for name, buffer in list(self._skeleton.named_buffers()):
            if not buffer.is_meta:
                _assign(self._skeleton, name, buffer.to(device))

    def block_prefix(self, index: int) -> str:
        return f"{self.layers_name}.{index}."

    def block_specs(self, index: int) -> list[TensorSpec]:
        """Shapes and dtypes of what `read_block` reads, with full names."""
        prefix, specs = self.block_prefix(index), self.view.specs()
        return [specs[prefix + name] for name in self._layers[index].state_dict()]

    def read_block(self, index: int) -> dict[str, Tensor]:
        """The tensors of one block by their name inside the block, in the view's own dtypes."""
        prefix = self.block_prefix(index)
        return {name: self.view.read(prefix + name, self.device) for name in self._layers[index].state_dict()}

    def build_block(self, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A runnable decoder layer holding ``tensors`` (as `read_block` names them), cast to the compute dtype."""
        block = copy.deepcopy(self._layers[index])
        for name, tensor in tensors.items():
            _assign(block, name, tensor if stays_float32(name, self.view.config) else _cast(tensor, self.compute_dtype))
        block.to(self.device).eval()
        if self._decorate is not None:
            self._decorate(self.block_prefix(index), block)
        return block

    def load_block(self, index: int) -> nn.Module:
        if self._kept is None:
            return self.build_block(index, self.read_block(index))
        if index not in self._kept:
            self._kept[index] = self.build_block(index, self.read_block(index))
        return self._kept[index]

    def block_without_values(self, index: int) -> nn.Module:
        """A decoder layer on the meta device."""
        return copy.deepcopy(self._layers[index]).to("meta").eval()

    @torch.no_grad()
    def run_without_values(self, index: int, block: nn.Module, hidden_BSH: Tensor) -> Any:
        """What `block_without_values` returns for a batch from `embed`; raises where steps depend on values."""
        call = self._calls[(hidden_BSH.shape[0], hidden_BSH.shape[1])][index]
        return replace(call, hidden_BSH=hidden_BSH).without_values(block)

    def _try_block(self, call: _Call) -> Any:
        try:
            # Types do not depend on values, so no weight has to be read.
            return call.without_values(self.block_without_values(0))
        except Exception:  # a block whose steps depend on values
            return super()._try_block(call)

    @property
    def outer_bytes(self) -> int:
        """Memory of what `embed` needs beside the blocks."""
        specs, itemsize = self.view.specs(), self.compute_dtype.itemsize
        return sum(
            prod(specs[name].shape) * itemsize for name in self._outer_names(with_embedding=True, with_head=False)
        )

    @property
    def text_config(self) -> PreTrainedConfig:
        """The part of the config that describes the decoder, as transformers understands it."""
        return self._skeleton.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]

    @property
    def head_bytes(self) -> int:
        head = self._weight_of("get_output_embeddings")
        if head is None:
            return 0
        return prod(self.view.specs()[self._tied.get(head, head)].shape) * self.compute_dtype.itemsize

    def whole(self) -> nn.Module:
        outer = self._load_outer(with_embedding=True, with_head=True)
        outer.set_submodule(self.layers_name, nn.ModuleList(self.load_block(i) for i in range(self.num_blocks)))
        return outer

    def _weight_of(self, getter: str) -> str | None:
        """Name of the weight of ``get_input_embeddings`` or ``get_output_embeddings``."""
        module = getattr(self._skeleton, getter)()
        found = (name for name, other in self._skeleton.named_modules() if other is module)
        return None if module is None else f"{next(found)}.weight"

    def _outer_names(self, with_embedding: bool, with_head: bool) -> list[str]:
        """What `_load_outer` reads; tied weights are not among them."""
        left_out = set()
        if not with_head:
            left_out.add(self._weight_of("get_output_embeddings"))
        if not (with_embedding or self._tied):
            left_out.add(self._weight_of("get_input_embeddings"))
        inside = self.layers_name + "."
        return [
            name
            for name in self._skeleton.state_dict()
            if not (name.startswith(inside) or name in self._tied or name in left_out)
        ]

    def _load_outer(self, with_embedding: bool, with_head: bool) -> nn.Module:
        # The decoder layers stay on the meta device and are only stood in for: all copies may share them.
        layers = self._skeleton.get_submodule(self.layers_name)
        outer: nn.Module = copy.deepcopy(self._skeleton, {id(layers): layers})
        for name in self._outer_names(with_embedding, with_head):
            _assign(outer, name, _cast(self.view.read(name, self.device), self.compute_dtype))
        for name, source in self._tied.items():
            _assign(outer, name, outer.get_parameter(source))
        outer.eval()
        if self._decorate is not None:
            self._decorate("", outer)
        return outer


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _assign(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Replaces the parameter or buffer ``name`` by ``tensor``, without a copy."""
    *path, leaf = name.split(".")
    module = root.get_submodule(".".join(path))
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


@dataclass(frozen=True)
class _Call:
    """What a decoder layer was called with."""

    hidden_BSH: Tensor | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def without_values(self, block: nn.Module) -> Any:
        """What a layer on the meta device returns for it."""
        everything = (self.hidden_BSH, self.args, self.kwargs)
        hidden_BSH, args, kwargs = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, everything)
        return block(hidden_BSH, *args, **kwargs)


class _StoppedError(Exception):
    """Ends a forward pass whose first decoder layer was called."""


def _record_and_stop(calls: list[_Call], is_last: bool, hidden_BSH: Tensor, *args: Any, **kwargs: Any) -> None:
    calls.append(_Call(hidden_BSH, args, kwargs))
    raise _StoppedError


@dataclass(frozen=True)
class _Recorder:
    """Stands in for decoder layers: records the call and returns its input, or ``last`` at the end.

    Attributes:
        in_tuples: return as the layers do, see `BlockModel._layers_return_tuples`.
    """

    calls: list[_Call]
    in_tuples: bool
    last: Tensor | None = None

    def __call__(self, is_last: bool, hidden_BSH: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        self.calls.append(_Call(hidden_BSH, args, kwargs))
        out = self.last if is_last and self.last is not None else hidden_BSH
        return (out,) if self.in_tuples else out


class _replaced_layers:  # noqa: N801 - reads as a verb where it is used
    """Within this context ``stand_in(is_last, *args, **kwargs)`` is called for every decoder layer."""

    def __init__(self, model: nn.Module, layers_name: str, stand_in: Callable[..., Any]):
        self._layers: nn.ModuleList = model.get_submodule(layers_name)  # type: ignore[assignment]
        self._stand_in = stand_in

    def __enter__(self) -> None:
        self._own = [layer.__dict__.get("forward") for layer in self._layers]
        for index, layer in enumerate(self._layers):
            layer.forward = partial(self._stand_in, index == len(self._layers) - 1)

    def __exit__(self, *_: object) -> None:
        for layer, own in zip(self._layers, self._own, strict=True):
            del layer.forward
            if own is not None:  # somebody else had wrapped it
                layer.forward = own
