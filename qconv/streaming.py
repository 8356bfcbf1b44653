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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qconv.errors import CheckpointError
from qconv.types import Checkpoint

Decorate = Callable[[str, nn.Module], None]
"""Called with a module's name prefix (``"model.layers.3."``, or ``""`` for the parts outside the
blocks) and the module, after its weights are in place; may attach forward hooks."""


class BlockModel(ABC):
    """A causal language model that is run one decoder block at a time."""

    layers_name: str
    num_blocks: int
    device: str

    def __init__(self) -> None:
        self._calls: dict[tuple[int, int], list[_Call]] = {}

    @abstractmethod
    def load_block(self, index: int) -> nn.Module:
        """A runnable decoder layer; drop it to free its memory."""

    @abstractmethod
    def _load_outer(self, with_head: bool) -> nn.Module:
        """The whole model with everything outside the decoder layers in place."""

    @torch.no_grad()
    def run_block(self, index: int, block: nn.Module, hidden_BSH: Tensor) -> Tensor:
        """One decoder block on one batch that came from `embed` (its masks and positions are kept by shape)."""
        call = self._calls[(hidden_BSH.shape[0], hidden_BSH.shape[1])][index]
        out = block(hidden_BSH, *call.args, **call.kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    @torch.no_grad()
    def embed(self, batches: Iterable[Tensor]) -> list[Tensor]:
        """The inputs of the first block for token batches ``[B, S]``; ``[B, S, H]`` each.

        Also records what each block is called with, once per batch shape.
        """
        outer = self._load_outer(with_head=False)
        hidden: list[Tensor] = []
        for ids_BS in batches:
            calls: list[_Call] = []
            with _replaced_layers(outer, self.layers_name, calls, None):
                outer.base_model(input_ids=ids_BS.to(self.device), use_cache=False)  # type: ignore[operator]
            first = calls[0].hidden_BSH
            assert first is not None
            hidden.append(first)
            self._calls[(ids_BS.shape[0], ids_BS.shape[1])] = [replace(call, hidden_BSH=None) for call in calls]
        return hidden

    def head(self) -> Callable[[Tensor], Tensor]:
        """A function from the last block's output ``[B, S, H]`` to logits ``[B, S, V]``; drop it to free the head."""
        outer = self._load_outer(with_head=True)

        @torch.no_grad()
        def logits(hidden_BSH: Tensor) -> Tensor:
            ids_BS = torch.zeros(hidden_BSH.shape[:2], dtype=torch.long, device=self.device)
            with _replaced_layers(outer, self.layers_name, [], hidden_BSH):
                result: Tensor = outer(input_ids=ids_BS, use_cache=False).logits
            return result

        return logits


class StreamedModel(BlockModel):
    """Runs a checkpoint view block by block, reading each block's weights when it is visited.

    Args:
        view: logical weights under the names that transformers gives the model's parameters.
        device: where blocks run.
        compute_dtype: dtype of weights and activations while a block runs.
        decorate: see `Decorate`; how adapters and activation quantization join the forward pass.

    Raises:
        CheckpointError: transformers does not know the architecture, or a parameter is missing
            from the view or has another shape.
    """

    def __init__(self, view: Checkpoint, device: str, compute_dtype: torch.dtype, decorate: Decorate | None = None):
        super().__init__()
        self.view = view
        self.device = device
        self.compute_dtype = compute_dtype
        self._decorate = decorate
        self._skeleton = build_skeleton(view, compute_dtype)
        self.layers_name, layers = find_blocks(self._skeleton, view.location)
        self._layers = list(layers)
        self.num_blocks = len(self._layers)
        self._tied = _tied_names(self._skeleton)
        _check_parameters(self._skeleton, view, self._tied)
        for name, buffer in list(self._skeleton.named_buffers()):
            if not buffer.is_meta:
                _assign(self._skeleton, name, buffer.to(device))

    def block_prefix(self, index: int) -> str:
        return f"{self.layers_name}.{index}."

    def read_block(self, index: int) -> dict[str, Tensor]:
        """The tensors of one block by their name inside the block, in the view's own dtypes."""
        prefix = self.block_prefix(index)
        return {name: self.view.read(prefix + name, self.device) for name in self._layers[index].state_dict()}

    def build_block(self, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A runnable decoder layer holding ``tensors`` (as `read_block` names them), cast to the compute dtype."""
        block = copy.deepcopy(self._layers[index])
        for name, tensor in tensors.items():
            _assign(block, name, _cast(tensor, self.compute_dtype))
        block.to(self.device).eval()
        if self._decorate is not None:
            self._decorate(self.block_prefix(index), block)
        return block

    def load_block(self, index: int) -> nn.Module:
        return self.build_block(index, self.read_block(index))

    def _load_outer(self, with_head: bool) -> nn.Module:
        outer: nn.Module = copy.deepcopy(self._skeleton)
        inside = self.layers_name + "."
        head = "lm_head."
        for name in self._skeleton.state_dict():
            if name.startswith(inside) or name in self._tied or (name.startswith(head) and not with_head):
                continue
            _assign(outer, name, _cast(self.view.read(name, self.device), self.compute_dtype))
        for name, source in self._tied.items():
            _assign(outer, name, outer.get_parameter(source))
        outer.eval()
        if self._decorate is not None:
            self._decorate("", outer)
        return outer


def build_skeleton(view: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """The transformers model of a checkpoint's config, its parameters on the meta device."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in view.config.items() if key != "quantization_config"}
    try:
        config = AutoConfig.for_model(**fields)
        with init_empty_weights(include_buffers=False):
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (KeyError, ValueError, TypeError, ImportError) as error:
        raise CheckpointError(
            f"{view.location}: transformers cannot build a causal language model from config.json "
            f"(model_type {view.config.get('model_type')!r}): {error}"
        ) from error
    return model


def find_blocks(model: nn.Module, location: str) -> tuple[str, nn.ModuleList]:
    """The decoder layers and their name: the list of ``num_hidden_layers`` modules nearest the top."""
    count = model.config.num_hidden_layers  # type: ignore[union-attr]
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found:
        raise CheckpointError(f"{location}: found no list of {count} decoder layers in {type(model).__name__}")
    return min(found, key=lambda pair: pair[0].count("."))


def linear_weights(view: Checkpoint) -> list[str]:
    """The weights of all `nn.Linear` inside the decoder blocks, in the model's order.

    These are what bitsandbytes quantizes when a model is loaded in 4 bits (it leaves the output
    embedding and ``llm_int8_skip_modules`` alone), and what qconv quantizes.
    """
    model = build_skeleton(view, torch.bfloat16)
    layers_name, _ = find_blocks(model, view.location)
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(layers_name + ".")
    ]


def block_linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def batches_of(ids_TS: Tensor, rows: int) -> Sequence[Tensor]:
    return torch.split(ids_TS, rows)


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Parameters that the model shares with another one: name -> source."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return {}
    output = model.get_output_embeddings()  # type: ignore[operator]
    source = model.get_input_embeddings()  # type: ignore[operator]
    names = {id(module): name for name, module in model.named_modules()}
    if output is None or id(output) not in names:
        return {}
    return {f"{names[id(output)]}.weight": f"{names[id(source)]}.weight"}


def _check_parameters(model: nn.Module, view: Checkpoint, tied: Mapping[str, str]) -> None:
    specs = view.specs()
    for name, parameter in model.state_dict().items():
        if name in tied:
            continue
        if name not in specs:
            raise CheckpointError(
                f"{view.location}: the model needs tensor {name!r}, which is not in the checkpoint; "
                "the checkpoint is incomplete, or stores this architecture under other names"
            )
        if specs[name].shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{view.location}: tensor {name!r} has shape {list(specs[name].shape)}, "
                f"config.json makes it {list(parameter.shape)}"
            )


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


class _replaced_layers:  # noqa: N801 - reads as a verb where it is used
    """Within this context every decoder layer records its call and returns its input, or ``last`` at the end."""

    def __init__(self, model: nn.Module, layers_name: str, calls: list[_Call], last: Tensor | None):
        self._layers: nn.ModuleList = model.get_submodule(layers_name)  # type: ignore[assignment]
        self._calls = calls
        self._last = last

    def _record(self, is_last: bool, hidden_BSH: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._calls.append(_Call(hidden_BSH, args, kwargs))
        return self._last if is_last and self._last is not None else hidden_BSH

    def __enter__(self) -> None:
        self._own = [layer.__dict__.get("forward") for layer in self._layers]
        for index, layer in enumerate(self._layers):
            layer.forward = partial(self._record, index == len(self._layers) - 1)

    def __exit__(self, *_: object) -> None:
        for layer, own in zip(self._layers, self._own, strict=True):
            del layer.forward
            if own is not None:  # somebody else had wrapped it
                layer.forward = own
