"""What an estimate asks of the machine and of the folders that a job reads and writes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from qconv.estimate_time import Machine, machine_for
from qconv.merge.expert_adapter import ExpertAdapter
from qconv.quantize.memory import LIBRARIES, free_memory
from qconv.side_files import VOCABULARY_FILES
from qconv.stored_tensors import FileCheckpoint
from qconv.types import Checkpoint


def machine_of(device: str) -> Machine | None:
    """The row of the table of throughputs; None where nobody has measured this GPU."""
    return machine_for(torch.cuda.get_device_name(device) if device.startswith("cuda") else None)


def notes_of(device: str) -> list[str]:
    """What the estimate leaves open."""
    if machine_of(device) is not None:
        return []
    return [f"no time estimate: {torch.cuda.get_device_name(device)} is not in the table of measured machines"]


def usable_on_gpu(device: str, limit: int | None = None) -> int | None:
    """What this process may take on the GPU in all; None on a CPU."""
    free = free_memory(device)
    if free is None:
        return None
    return free + LIBRARIES if limit is None else min(limit, free + LIBRARIES)  # the libraries had taken theirs


def file_bytes(checkpoint: Checkpoint) -> int:
    """Of the files that a folder's weights lie in."""
    if isinstance(checkpoint, ExpertAdapter):
        checkpoint = checkpoint.files
    assert isinstance(checkpoint, FileCheckpoint)
    return sum(file.stat().st_size for file in {checkpoint.file_of(name) for name in checkpoint.specs()})


def tokenizer_bytes(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in VOCABULARY_FILES if (folder / name).is_file())


def replaced(overwrite: bool, folders: Iterable[Path]) -> dict[Path, int]:
    """Folders that stay until the new ones are complete, with their bytes."""
    found = [folder for folder in folders if overwrite and folder.is_dir()]
    return {folder: sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) for folder in found}
