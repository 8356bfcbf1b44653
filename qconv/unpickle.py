"""An adapter whose tensors are pickled, as safetensors: the same names and values.

A pickle is a program, of which `safe_pickles` runs nothing. What comes out is checked once more, since an adapter is a
flat dictionary of tensors and nothing else. Config, tokenizer and the record of training come along.

Left out: models (their own tools write safetensors; LQ-LoRA's are `decomposed`'s), and files of several pickles.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qconv.adapter_configs import UnpickleConfig
from qconv.checkpoint import PICKLES, resolve_folder
from qconv.errors import AdapterError, CheckpointError
from qconv.records import TRAIN_RECORD_NAME
from qconv.safe_pickles import load_pickle
from qconv.side_files import tokenizer_files
from qconv.work_folder import check_inputs, check_output, publishing


@dataclass(frozen=True, kw_only=True)
class Unpickled:
    """What came out, and of which file."""

    out: Path
    file: str
    num_tensors: int


def unpickle(config: UnpickleConfig) -> Unpickled:
    """Writes the adapter with its tensors as safetensors; the folder appears complete or not at all.

    Raises:
        CheckpointError: no such folder, not exactly one pickled file in it, or ``out`` cannot be written.
        AdapterError: the file holds anything but tensors.
    """
    from safetensors.torch import save

    check_output(config.out, config.overwrite)
    check_inputs(config.out, [config.adapter])
    folder = resolve_folder(config.adapter)
    file = _pickled_file(folder)
    tensors = _tensors(file)
    with publishing(config.out, config.overwrite) as partial:
        (partial / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
        kept = [folder / "adapter_config.json", folder / TRAIN_RECORD_NAME, *tokenizer_files(folder)]
        for source in kept:
            if source.is_file():
                shutil.copyfile(source, partial / source.name)
    return Unpickled(out=config.out, file=file.name, num_tensors=len(tensors))


def _pickled_file(folder: Path) -> Path:
    if (folder / "adapter_model.safetensors").exists():
        raise CheckpointError(f"{folder}: has adapter_model.safetensors already; there is nothing to convert")
    found = sorted({path for pattern in PICKLES for path in folder.glob(pattern)})
    preferred = [path for path in found if path.stem == "adapter_model"]
    chosen = preferred or found
    if len(chosen) != 1:
        names = ", ".join(path.name for path in chosen) or "none"
        raise CheckpointError(
            f"{folder}: expected one file of pickled tensors (adapter_model.bin, or the only one), found {names}"
        )
    return chosen[0]


def _tensors(file: Path) -> dict[str, Tensor]:
    """The content of a pickle, where that is a flat dictionary of tensors; each a copy of its own."""
    content = load_pickle(file, "Save the adapter's state dict alone, with the tool that made the file")
    if not isinstance(content, Mapping) or not content:
        raise AdapterError(f"{file}: expected a dictionary of tensors, found {type(content).__name__}")
    return {_name(name, file): _plain(tensor, name, file) for name, tensor in content.items()}


def _name(name: object, file: Path) -> str:
    if not isinstance(name, str) or not name:
        raise AdapterError(f"{file}: expected names of tensors as keys, found {name!r}")
    return name


def _plain(value: object, name: object, file: Path) -> Tensor:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_meta:
        what = type(value).__name__
        if isinstance(value, Tensor):
            what = f"a {'quantized' if value.is_quantized else 'sparse or empty'} tensor"
        raise AdapterError(f"{file}: {name!r}: expected a plain tensor, found {what}")
    return value.detach().clone(memory_format=torch.contiguous_format)
