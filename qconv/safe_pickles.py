"""Reading a pickle without running it: tensors, plain containers and classes without behaviour, and nothing else.

A pickle is a program. torch's restricted unpickler (``weights_only=True``) runs none: it makes tensors and plain
containers, and instances of classes that are named here. What else a file asks for is refused by its name.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qconv.errors import AdapterError, CheckpointError

_NAMED = re.compile(r"GLOBAL (\S+)")


def load_pickle(file: Path, what_to_do: str, stand_ins: Mapping[str, Any] | None = None) -> Any:
    """The content of a file that ``torch.save`` wrote, on the CPU.

    Args:
        what_to_do: about a file that holds more, for the message.
        stand_ins: by the full name of a class in the file, what is made in its place.

    Raises:
        AdapterError: the file holds anything else; nothing of it was run.
        CheckpointError: it cannot be read.
    """
    allowed: list[Any] = [(stand_in, name) for name, stand_in in (stand_ins or {}).items()]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        named = _NAMED.search(str(error))
        what = named[1] if named else str(error).split("WeightsUnpickler error:")[-1].strip().splitlines()[0]
        raise AdapterError(
            f"{file}: holds more than tensors, and making it would run its code ({what}). Nothing was run. {what_to_do}"
        ) from error
    except Exception as error:  # a damaged archive, an old format with a damaged header, ...
        first = " ".join(str(error).split(". ")[0].split())[:300]
        raise CheckpointError(f"{file}: cannot be read ({type(error).__name__}: {first})") from error
