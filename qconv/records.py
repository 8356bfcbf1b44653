"""What qconv itself writes beside an adapter: how training saw the base.

A LoRA update is right only for the weights it was trained against, and ``adapter_config.json``
does not say whether those were 16-bit or bitsandbytes 4-bit. ``qconv train`` therefore leaves
``qconv-train.json`` in the adapter folder:
``{"format": 1, "trained_on": "nf4-dq", "base": "org/name"}``. Adapters from elsewhere have none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from qconv.errors import AdapterError
from qconv.types import BnbBackend, BnbKind

TRAIN_RECORD_NAME = "qconv-train.json"
TRAIN_RECORD_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class TrainRecord:
    """How an adapter was trained.

    Attributes:
        trained_on: the quantization of the base during training.
        base: folder or hub id of the base, as it was given to training.
        backend: whose bitsandbytes kernels quantized it; the two round a few values differently.
    """

    trained_on: BnbKind
    base: str
    backend: BnbBackend = "cuda"


def write_train_record(
    folder: Path, trained_on: BnbKind, base: str, backend: BnbBackend = "cuda", details: Mapping[str, Any] | None = None
) -> None:
    """Leaves the record in an adapter folder; an existing one is replaced in one step.

    ``details`` (settings, digests, versions) is kept for people and not read back.
    """
    record = {
        "format": TRAIN_RECORD_FORMAT,
        "trained_on": trained_on,
        "base": base,
        "backend": backend,
        **(details or {}),
    }
    partial = folder / (TRAIN_RECORD_NAME + ".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / TRAIN_RECORD_NAME)


def read_train_record(folder: Path) -> TrainRecord | None:
    """The record of an adapter folder, or None when the adapter comes from elsewhere.

    Raises:
        AdapterError: the record is there and cannot be understood.
    """
    file = folder / TRAIN_RECORD_NAME
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{file}: not a readable JSON file ({error}); {_WHAT_TO_DO}") from error
    if not isinstance(record, dict):
        raise AdapterError(f"{file}: expected a JSON object, found {type(record).__name__}; {_WHAT_TO_DO}")
    if type(record.get("format")) is not int or record["format"] != TRAIN_RECORD_FORMAT:
        raise AdapterError(
            f'{file}: expected "format": {TRAIN_RECORD_FORMAT}, found {record.get("format")!r}; '
            "the record was edited, or written by a newer qconv: update qconv"
        )
    kinds = get_args(BnbKind)
    trained_on, base = record.get("trained_on"), record.get("base", "")
    if trained_on not in kinds:
        raise AdapterError(
            f'{file}: expected "trained_on" to be one of {", ".join(kinds)}, found {trained_on!r}; {_WHAT_TO_DO}'
        )
    if not isinstance(base, str):
        raise AdapterError(f'{file}: expected "base" to be a string, found {base!r}; {_WHAT_TO_DO}')
    backend = record.get("backend", "cuda")
    if backend not in get_args(BnbBackend):
        raise AdapterError(f'{file}: expected "backend" to be cpu or cuda, found {backend!r}; {_WHAT_TO_DO}')
    return TrainRecord(trained_on=cast(BnbKind, trained_on), base=base, backend=cast(BnbBackend, backend))


_WHAT_TO_DO = "restore the file from training, or delete it and say on the command line how training saw the base"
