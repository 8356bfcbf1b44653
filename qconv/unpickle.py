"""An adapter whose tensors are pickled, as safetensors: the same names and values.

A pickle is a program. torch's restricted unpickler (``weights_only=True``) runs none: it makes tensors and plain
containers and refuses every other object. What comes out is checked once more, since an adapter is a flat dictionary of
tensors and nothing else. Config, tokenizer and the record of training come along.

Left out: models (their own tools write safetensors), and files of several pickles.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qconv.adapter_configs import UnpickleConfig
from qconv.checkpoint import PICKLES, refuse_decomposed_base, resolve_folder
from qconv.errors import AdapterError, CheckpointError
from qconv.records import TRAIN_RECORD_NAME
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
    refuse_decomposed_base(folder)
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
    try:
        with torch.serialization.safe_globals([]):
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise AdapterError(
            f"{file}: holds more than tensors, and making it would run its code ({_first_line(error)}). Nothing was "
            "run. Save the adapter's state dict alone, with the tool that made the file"
        ) from error
    except Exception as error:  # a damaged archive, an old format with a damaged header, ...
        raise CheckpointError(f"{file}: cannot be read ({type(error).__name__}: {_first_line(error)})") from error
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


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split(". ")[0].split())[:300]
