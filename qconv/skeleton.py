"""The transformers model of a checkpoint, its parameters on the meta device, and what its modules are called."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from qconv.errors import CheckpointError
from qconv.types import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def model_config(view: Checkpoint) -> PreTrainedConfig:
    """A checkpoint's ``config.json`` as transformers understands it.

    Raises:
        CheckpointError: an unknown architecture, or values that it refuses.
    """
    from transformers import AutoConfig

    fields = {key: value for key, value in view.config.items() if key != "quantization_config"}
    with _blamed_on_config(view):
        return AutoConfig.for_model(**fields)


def text_config(view: Checkpoint) -> PreTrainedConfig:
    """The part of `model_config` that describes the decoder: all of it, unless the model is composite."""
    return model_config(view).get_text_config(decoder=True)


def build_skeleton(view: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """The transformers model of a checkpoint's config, its parameters on the meta device."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = model_config(view)
    with _blamed_on_config(view), init_empty_weights(include_buffers=False):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


@contextmanager
def _blamed_on_config(view: Checkpoint) -> Iterator[None]:
    """transformers builds from user input here; what it raises for a bad one has no common type."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"{view.location}: transformers cannot build a causal language model from config.json "
            f"(model_type {view.config.get('model_type')!r}): {type(error).__name__}: {error}"
        ) from error


def find_blocks(model: nn.Module, location: str) -> tuple[str, nn.ModuleList]:
    """The decoder layers and their name: the list of ``num_hidden_layers`` modules nearest the top."""
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    count = getattr(config, "num_hidden_layers", None)
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found:
        raise CheckpointError(f"{location}: found no list of {count} decoder layers in {type(model).__name__}")
    return min(found, key=lambda pair: pair[0].count("."))


def linear_weights(view: Checkpoint) -> list[str]:
    """The weights of all `nn.Linear` inside the decoder blocks, in the model's order.

    These are what bitsandbytes quantizes when a model is loaded in 4 bits (it leaves the output
    embedding and ``llm_int8_skip_modules`` alone), and what qconv quantizes.

    Raises:
        CheckpointError: transformers cannot build the architecture, or the view has not all of them.
    """
    model = build_skeleton(view, torch.bfloat16)
    layers_name, _ = find_blocks(model, view.location)
    names = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(layers_name + ".")
    ]
    _check_names(names, model, view)
    return names


def block_linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def tied_names(model: nn.Module) -> dict[str, str]:
    """Parameters that the model shares with another one: name -> source."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return {}
    output = model.get_output_embeddings()  # type: ignore[operator]
    source = model.get_input_embeddings()  # type: ignore[operator]
    names = {id(module): name for name, module in model.named_modules()}
    if output is None or id(output) not in names:
        return {}
    return {f"{names[id(output)]}.weight": f"{names[id(source)]}.weight"}


def check_parameters(model: nn.Module, view: Checkpoint, tied: Mapping[str, str]) -> None:
    specs = view.specs()
    parameters = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    _check_names(parameters, model, view)
    for name, parameter in parameters.items():
        if specs[name].shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{view.location}: tensor {name!r} has shape {list(specs[name].shape)}, "
                f"config.json makes it {list(parameter.shape)}"
            )


def _check_names(names: Collection[str], model: nn.Module, view: Checkpoint) -> None:
    specs = view.specs()
    missing = next((name for name in names if name not in specs), None)
    if missing is None:
        return
    config = model.config
    per_expert = next((name for name in specs if re.search(r"\.experts\.\d+\.", name)), None)
    if per_expert is not None and not any(re.search(r"\.experts\.\d+\.", name) for name in model.state_dict()):
        cause = f"the checkpoint stores every expert by itself ({per_expert!r}), and transformers fuses them"
    elif config.get_text_config(decoder=True) is not config:  # type: ignore[union-attr, operator]
        cause = (
            f"model_type {view.config.get('model_type')!r} is a composite model (text and other parts), "
            "stored under other names than transformers gives its modules"
        )
    else:
        cause = "the checkpoint is incomplete, or stores this architecture under other names than transformers uses"
    raise CheckpointError(
        f"{view.location}: {type(model).__name__} needs tensor {missing!r}, which is not in the checkpoint: {cause}. "
        "Models stored under other names than those of their transformers modules cannot be quantized or validated "
        "yet. If the files are complete, a plain merge does without: no --requant, --no-validate, and a base that is "
        "stored in 4 bits or --trained-on 16bit"
    )
