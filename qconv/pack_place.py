"""Where a pack is put, and what it is when it is there."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconv.errors import CheckpointError
from qconv.work_folder import PACK_SIGN, check_inputs, check_output, check_place

PACK_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Attributes:
    out: the folder that was written.
    document: what is in its qconv-pack.json.
    """

    out: Path
    document: dict[str, Any]


def place_of_pack(out: Path | None, model: str, suffix: str, overwrite: bool, inputs: Iterable[str | Path]) -> Path:
    """``out``, or a folder beside the model, called after it; what lies in the hub's cache gets one here.

    Raises:
        CheckpointError: it exists, and is no pack or may not be replaced; or it cannot be made.
        UsageError: an input lies in it.
    """
    folder = Path(os.path.abspath(model)) if Path(model).exists() else Path.cwd() / Path(model).name
    place = out or folder.with_name(f"{folder.name}-{suffix}")
    check_output(place, overwrite)
    if place.is_dir() and any(place.iterdir()) and not (place / PACK_SIGN).is_file():
        raise CheckpointError(f"{place}: holds no pack of qconv's, and --overwrite replaces nothing else here")
    check_place(place)
    check_inputs(place, inputs)
    return place
