"""Reading a pickle without running it: tensors, plain containers and classes without behaviour, and nothing else.

A pickle is a program. torch's restricted unpickler (``weights_only=True``) runs none: it makes tensors and plain
containers, and instances of classes that are named here. What else a file asks for is refused by its name. Three things
that it lets through are refused here: archives that unpack to more than they are, tensors without values of their own
(new memory of whatever was there before), and tensors that are larger than what is stored of them. Before torch 2.10 a
file can damage memory (CVE-2026-24747), so that none is read.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qconv.errors import AdapterError, CheckpointError

_NAMED = re.compile(r"GLOBAL (\S+)")
_SAFE_SINCE = (2, 10)
_LEGACY_PICKLES = 4  # magic number, protocol, system, and the object
_NEW_TENSOR = re.compile(r"torch(\.\w+)* \w*Tensor")


def load_pickle(file: Path, what_to_do: str, stand_ins: Mapping[str, Any] | None = None) -> Any:
    """The content of a file that ``torch.save`` wrote, on the CPU.

    Args:
        what_to_do: about a file that holds more, for the message.
        stand_ins: by the full name of a class in the file, what is made in its place.

    Raises:
        AdapterError: the file holds anything else; nothing of it was run.
        CheckpointError: it cannot be read.
    """
    _check_torch(file)
    allowed: list[Any] = [(stand_in, name) for name, stand_in in (stand_ins or {}).items()]
    try:
        _check_archive(file, what_to_do)
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        _check_sizes(content, file)
        return content
    except (AdapterError, CheckpointError):
        raise
    except pickle.UnpicklingError as error:
        named = _NAMED.search(str(error))
        what = named[1] if named else str(error).split("WeightsUnpickler error:")[-1].strip().splitlines()[0]
        if what.startswith("Unsupported operand"):
            raise CheckpointError(
                f"{file}: damaged, or written in a pickle protocol that torch.save does not use ({what}). Nothing was "
                "run: copy or download the file again"
            ) from error
        raise AdapterError(
            f"{file}: holds more than tensors, and making it would run its code ({what}). Nothing was run. {what_to_do}"
        ) from error
    except Exception as error:  # a damaged archive, an old format with a damaged header, ...
        first = " ".join(str(error).split(". ")[0].split())[:300]
        raise CheckpointError(f"{file}: cannot be read ({type(error).__name__}: {first})") from error


def _check_torch(file: Path) -> None:
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < _SAFE_SINCE:
        raise CheckpointError(
            f"{file}: pickled files are read with torch 2.10 or newer, found {torch.__version__}: before it a file can "
            "damage memory while it is read (CVE-2026-24747). Update torch, or save the file as safetensors"
        )


def _check_archive(file: Path, what_to_do: str) -> None:
    if not zipfile.is_zipfile(file):
        with file.open("rb") as stream:
            for _ in range(_LEGACY_PICKLES):
                if not stream.peek(1):
                    return
                _check_globals(stream, file, what_to_do)
        return
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{file}: {entry.filename} is compressed, which torch.save never does; damaged")
        for entry in archive.infolist():
            if entry.filename.rpartition("/")[2] == "data.pkl":
                with archive.open(entry) as packed:
                    _check_globals(packed, file, what_to_do)


def _check_globals(stream: Any, file: Path, what_to_do: str) -> None:
    """What is saved of a tensor is rebuilt from its storage; only a class of tensors that is called makes a new one."""
    for code, argument, _ in pickletools.genops(stream):
        if code.name == "GLOBAL" and _NEW_TENSOR.fullmatch(str(argument)):
            name = str(argument).replace(" ", ".")
            raise AdapterError(
                f"{file}: asks for a new tensor ({name}), which would hold what was in memory. Nothing was run. "
                f"{what_to_do}"
            )


def _check_sizes(content: Any, file: Path) -> None:
    for tensor in _tensors_in(content):
        if tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized):
            num_bytes = tensor.numel() * tensor.element_size()
            if num_bytes > tensor.untyped_storage().nbytes():
                raise CheckpointError(
                    f"{file}: a tensor of {tuple(tensor.shape)} {tensor.dtype} has {num_bytes} bytes, and "
                    f"{tensor.untyped_storage().nbytes()} are stored of it; damaged"
                )


def _tensors_in(content: Any) -> Iterator[Tensor]:
    """All that can be reached, each object once."""
    seen: set[int] = set()
    left = [content]
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            yield one
        if isinstance(one, Mapping):
            left += one.values()
        elif isinstance(one, list | tuple | set | frozenset):
            left += one
        left += getattr(one, "__dict__", {}).values()
