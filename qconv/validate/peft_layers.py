"""The unmerged behaviour of adapters that are not low-rank products: peft's own layers on the decoded weights.

A formula of ours here would be the formula of `merge/kinds` once more, and a mistake in it would hide. So peft builds
its layers on the linears of the block that is running, is given the adapter's stored tensors in float32, and computes
what training computed.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from qconv.errors import AdapterError, UsageError
from qconv.types import Adapter, TensorSpec, Transform

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


class _BlockDiagonal:
    """What peft's CUDA extension for BOFT does: blocks ``[F, B, b, b]`` on the diagonals of F matrices."""

    @staticmethod
    def apply(blocks: Tensor) -> Tensor:
        return torch.stack([torch.block_diag(*factor) for factor in blocks])  # type: ignore[no-untyped-call]


def _allow_butterfly_factors() -> None:
    """Lets peft run several butterfly factors where it cannot build that extension, and would take one, with a warning.

    For the rest of the process: its layers look the function up whenever they run.
    """
    from peft.tuners.boft import layer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not layer.get_fbd_cuda():
            layer.get_fbd_cuda = lambda: True
            layer.FastBlockDiag = _BlockDiagonal


def attach_peft_layers(block: nn.Module, adapter: Adapter, transforms: Mapping[str, Transform]) -> None:
    """Replaces linears of ``block`` by peft's layers around them.

    Args:
        transforms: module name inside the block -> update.

    Raises:
        UsageError: peft is not installed.
        AdapterError: this peft cannot build a layer, or has tensors in it that the adapter does not hold.
    """
    check_peft(adapter)
    if any(transform.settings.get("factors", 1) > 1 for transform in transforms.values()):
        _allow_butterfly_factors()
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
    shapes = adapter.tensors.specs()
    for key, value in _OVERRIDES.get(stored["peft_type"], {}).items():
        values[key] = value(transforms, shapes) if callable(value) else value
    if "feedforward_modules" in values:  # of IA3: what scales inputs has a row
        values["feedforward_modules"] = [n for n, t in transforms.items() if shapes[t.tensors["ia3_l"]].shape[0] == 1]
    return config_class(**values, target_modules=sorted(transforms))


def _sizes(part: str, dimension: int) -> Callable[[Mapping[str, Transform], Mapping[str, TensorSpec]], dict[str, int]]:
    """What a pattern of the config has to say for each layer, from the shape of a tensor of it."""
    return lambda transforms, specs: {n: specs[t.tensors[part]].shape[dimension] for n, t in transforms.items()}


def _frozen_ranks(transforms: Mapping[str, Transform], specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    shapes = {
        name: [specs[transform.tensors[f"osf_svd_params.{x}_low"]].shape for x in "UV"]
        for name, transform in transforms.items()
    }
    return {f"^{re.escape(name)}$": min(u[0], v[1]) - u[1] for name, (u, v) in shapes.items()}


# What peft would work out for the whole model and cannot for a few of its layers.
_OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "FROD": {"progressbar": False, "runtime_offload_base_weight": False},
    "OSF": {"rank_pattern": _frozen_ranks},
    "TINYLORA": {"weight_tying": 0.0},
    "WAVEFT": {"n_frequency_pattern": _sizes("waveft_spectrum", 0), "proportional_parameters": False},
}


def _fill(layer: Any, adapter: Adapter, transform: Transform) -> None:
    """Puts the stored tensors into a layer that peft built."""
    device = str(layer.get_base_layer().weight.device)
    stored = {part: adapter.tensors.read(name, device) for part, name in transform.tensors.items()}
    tensors = {part: x.float() if x.is_floating_point() else x for part, x in stored.items()}
    if transform.kind == "VBLORA":
        tensors = _logits(tensors)
    left = {name for name, _ in layer.named_parameters() if not name.startswith("base_layer.")}
    for part, tensor in tensors.items():
        head, dot, leaf = part.partition(".")
        name = f"{head}.{ADAPTER_NAME}{dot}{leaf}"
        if part == "tinylora_v":  # its layers are numbered anew in a block, and none shares its vector here
            name += f".{layer._tinylora_v_key[ADAPTER_NAME]}"
        if name in left:
            _assign(layer.get_parameter(name), tensor, adapter, transform.tensors.get(part, part))
            left.remove(name)
        elif leaf:  # buffers of a module, zeros among them
            setattr(layer.get_submodule(f"{head}.{ADAPTER_NAME}"), leaf, tensor)
        else:  # buffers and plain dictionaries: shared projections, indices
            getattr(layer, head)[ADAPTER_NAME] = tensor
    left -= {name for name in left if name.startswith("tinylora_v.")}  # of the block's other layers
    if transform.kind == "FROD":  # U follows from the stored V
        weight = layer.get_base_layer().weight
        u_NK, _ = layer._calculate_frod_u_and_lambda(tensors["frod_V"], weight.T if layer.fan_in_fan_out else weight)
        layer.frod_U[ADAPTER_NAME] = u_NK.to(weight.device, weight.dtype)
    if left:
        raise AdapterError(
            f"{adapter.location}: peft's {transform.kind} layer of {transform.module} holds {', '.join(sorted(left))}, "
            "which the adapter does not; it was saved by another version of peft"
        )


def _logits(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """VB-LoRA's logits, from what is stored of them when only the largest are."""
    result = {part: tensor for part, tensor in tensors.items() if "_topk_" not in part}
    for part in [part for part in tensors if part.endswith("_topk_indices")]:
        logits = part.removesuffix("_topk_indices")
        weights = tensors[logits + "_topk_weights"]
        weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1)
        shape = (*weights.shape[:-1], len(tensors["vblora_vector_bank"]))
        nothing = torch.full(shape, -torch.inf, device=weights.device)
        result[logits] = nothing.scatter(-1, tensors[part].long(), weights.log())
    return result


@torch.no_grad()
def _assign(parameter: nn.Parameter, tensor: Tensor, adapter: Adapter, name: str) -> None:
    if parameter.shape != tensor.shape:
        raise AdapterError(
            f"{adapter.location}: tensor {name!r}: peft's layer expects shape {list(parameter.shape)}, found "
            f"{list(tensor.shape)}"
        )
    parameter.data = tensor
