"""The unmerged behaviour of adapters that are not low-rank products: peft's own layers on the decoded weights.

A formula of ours here would be the formula of `merge/kinds` once more, and a mistake in it would hide. So peft builds
its layers on the linears of the block that is running, is given the adapter's stored tensors in float32, and computes
what training computed.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from qconv.errors import AdapterError, UsageError
from qconv.types import Adapter, Transform

ADAPTER_NAME = "default"


def check_peft(adapter: Adapter) -> None:
    """Refuses before any work where the layers could not be built later.

    Raises:
        UsageError: peft is not installed.
    """
    if adapter.transforms and find_spec("peft") is None:
        raise UsageError(
            f"{adapter.location}: validating a merged {adapter.kind} adapter runs peft's own layers as the reference, "
            "and peft is not installed; pip install peft, or merge with --no-validate"
        )


def attach_peft_layers(block: nn.Module, adapter: Adapter, transforms: Mapping[str, Transform]) -> None:
    """Replaces linears of ``block`` by peft's layers around them.

    Args:
        transforms: module name inside the block -> update.

    Raises:
        UsageError: peft is not installed.
        AdapterError: this peft cannot build a layer, or has tensors in it that the adapter does not hold.
    """
    check_peft(adapter)
    config = _config(adapter, transforms)
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import cast_adapter_dtype

    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # on what peft sets for Conv1D layers, and on extensions that speed training
            PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](block, config, ADAPTER_NAME)
            cast_adapter_dtype(block, ADAPTER_NAME)
    except Exception as error:
        raise AdapterError(
            f"{adapter.location}: peft cannot run this {config.peft_type.value} adapter unmerged "
            f"({type(error).__name__}: {error}); update peft, or merge with --no-validate"
        ) from error
    for name, transform in transforms.items():
        _fill(block.get_submodule(name), adapter, transform)
    block.eval().requires_grad_(False)


def _config(adapter: Adapter, transforms: Mapping[str, Transform]) -> Any:
    """The adapter's config for a few modules, by their names inside the block; patterns are looked up by full names."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils.other import get_pattern_key

    stored = adapter.tensors.config
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[stored["peft_type"]]
    known = {field.name for field in dataclasses.fields(config_class)}
    ignored = {"target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "bias"}
    values = {key: value for key, value in stored.items() if key in known - ignored}
    for key, value in values.items():
        if key.endswith("_pattern") and value:
            matches = {name: get_pattern_key(value.keys(), transform.module) for name, transform in transforms.items()}
            values[key] = {name: value[match] for name, match in matches.items() if match in value}
    if "feedforward_modules" in values:  # of IA3: what scales inputs has a row
        shapes = adapter.tensors.specs()
        values["feedforward_modules"] = [n for n, t in transforms.items() if shapes[t.tensors["ia3_l"]].shape[0] == 1]
    return config_class(**values, target_modules=sorted(transforms))


def _fill(layer: nn.Module, adapter: Adapter, transform: Transform) -> None:
    """Puts the stored tensors into a layer that peft built."""
    device = str(layer.get_base_layer().weight.device)  # type: ignore[operator]
    left = {name for name, _ in layer.named_parameters() if not name.startswith("base_layer.")}
    for part, tensor_name in transform.tensors.items():
        tensor = adapter.tensors.read(tensor_name, device)
        head, dot, leaf = part.partition(".")
        name = f"{head}.{ADAPTER_NAME}{dot}{leaf}"
        held = getattr(layer, head)
        if name in left:
            _assign(layer.get_parameter(name), tensor.float(), adapter, tensor_name)
            left.remove(name)
        else:  # buffers and plain dictionaries: shared projections, indices
            held[ADAPTER_NAME] = tensor.float() if tensor.is_floating_point() else tensor
    if left:
        raise AdapterError(
            f"{adapter.location}: peft's {transform.kind} layer of {transform.module} holds {', '.join(sorted(left))}, "
            "which the adapter does not; it was saved by another version of peft"
        )


@torch.no_grad()
def _assign(parameter: nn.Parameter, tensor: Tensor, adapter: Adapter, name: str) -> None:
    if parameter.shape != tensor.shape:
        raise AdapterError(
            f"{adapter.location}: tensor {name!r}: peft's layer expects shape {list(parameter.shape)}, found "
            f"{list(tensor.shape)}"
        )
    parameter.data = tensor
