"""How a PEFT LoRA adapter names its tensors (peft 0.21, and the older spellings it still reads).

A tensor is called ``base_model.model.<module>.<part>``. peft strips the adapter's name on save;
files of older versions keep it, and the usual name ``default`` is accepted in the middle.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from qconv.errors import AdapterError

PREFIX = "base_model.model."
_LORA = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.(?P<leaf>weight|bias))?"
)
_PARTS = {
    ("lora_A", "weight"): "a",
    ("lora_B", "weight"): "b",
    ("lora_B", "bias"): "b_bias",
    ("lora_magnitude_vector", None): "magnitude",
    ("lora_magnitude_vector", "weight"): "magnitude",
}
_SAVED = re.compile(r"\.modules_to_save(?:\.default)?\.(?=[^.]+$)|\.modules_to_save(?:\.default)?(?=\.)")
_REFUSED = {
    "lora_embedding_A": "LoRA on an embedding is not read yet; train with modules_to_save=['embed_tokens']",
    "lora_embedding_B": "LoRA on an embedding is not read yet; train with modules_to_save=['embed_tokens']",
    "token_adapter": "trained token rows are not read yet; train with modules_to_save=['embed_tokens']",
    "trainable_tokens_delta": "trained token rows are not read yet; train with modules_to_save=['embed_tokens']",
    "lora_E": "AdaLoRA's singular values scale the update; the config should then say peft_type ADALORA",
    "lora_diag": "KaSA scales the rank components and changed the base",
}


@dataclass(frozen=True, kw_only=True)
class AdapterNames:
    """The tensors of an adapter by what they do.

    Attributes:
        lora: module -> part (``a``, ``b``, ``b_bias``, ``magnitude``) -> adapter tensor.
        plain: base tensor name -> adapter tensors that hold a value for it (more than one only
            where peft saves a module twice).
        copies: base tensor name -> copy of the layer under a LoRA (``base_layer.weight`` is frozen,
            ``base_layer.bias`` may have been trained).
    """

    lora: dict[str, dict[str, str]] = field(default_factory=dict)
    plain: dict[str, list[str]] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)


def sort_names(tensor_names: Iterable[str], where: str) -> AdapterNames:
    """Sorts every tensor of an adapter file; ``where`` is the file, for messages.

    Raises:
        AdapterError: no tensors, a missing prefix, a name of another method, a double.
    """
    names = AdapterNames()
    frozen: dict[str, str] = {}
    tensor_name = None
    for tensor_name in tensor_names:
        if not tensor_name.startswith(PREFIX):
            raise AdapterError(
                f"{where}: expected tensor names to start with {PREFIX!r}, found {tensor_name!r}; not an adapter that "
                "peft saved? Load it with the tool that made it and save it with peft's save_pretrained"
            )
        name = tensor_name.removeprefix(PREFIX)
        _refuse_foreign(name, tensor_name, where)
        if match := _LORA.fullmatch(name):
            _add_lora(names, match, tensor_name, where)
        elif ".original_module." in name:
            frozen[name.replace(".original_module.", ".")] = tensor_name
        elif ".base_layer." in name:
            names.copies[name.replace(".base_layer.", ".")] = tensor_name
        else:
            names.plain.setdefault(_SAVED.sub(lambda m: "." if m[0].endswith(".") else "", name), []).append(
                tensor_name
            )
    if tensor_name is None:
        raise AdapterError(f"{where}: holds no tensors; the save was interrupted, or only the config was saved")
    for name, tensor_name in frozen.items():
        # modules_to_save runs its trained copy; the original that bias="all" or a resize saves along is unused.
        if name not in names.plain:
            raise AdapterError(
                f"{where}: tensor {tensor_name!r} is the untrained original of a module in modules_to_save, "
                "but the trained one is missing; save the adapter again"
            )
    return names


def _refuse_foreign(name: str, tensor_name: str, where: str) -> None:
    for component in name.split("."):
        reason = _REFUSED.get(component)
        if (
            reason is None
            and component.startswith("lora_")
            and component
            not in (
                "lora_A",
                "lora_B",
                "lora_magnitude_vector",
            )
        ):
            reason = f"{component!r} is not a part of plain LoRA, rsLoRA or DoRA"
        if reason is not None:
            raise AdapterError(f"{where}: tensor {tensor_name!r} cannot be merged: {reason}")


def _add_lora(names: AdapterNames, match: re.Match[str], tensor_name: str, where: str) -> None:
    part = _PARTS.get((match["part"], match["leaf"]))
    if part is None:
        raise AdapterError(f"{where}: tensor {tensor_name!r} is no part of a LoRA layer that peft saves")
    parts = names.lora.setdefault(match["module"], {})
    if part in parts:
        raise AdapterError(f"{where}: tensors {parts[part]!r} and {tensor_name!r} are the same part; keep one adapter")
    parts[part] = tensor_name
