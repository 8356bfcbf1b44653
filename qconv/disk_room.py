"""Whether disks have room for folders that are yet to be made."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qconv.work_folder import disk_error


@dataclass(frozen=True, kw_only=True)
class Room:
    """What the folders of one disk need of it, beside all that lies there now.

    Attributes:
        folder: where the first of them is made, or what is there of the way to it.
        need, free: bytes.
        num_folders: that share the disk.
    """

    folder: Path
    need: int
    free: int
    num_folders: int

    @property
    def complaint(self) -> str | None:
        """What is wrong, in words; None when there is room."""
        if self.free >= self.need:
            return None
        what = "the output needs" if self.num_folders == 1 else f"the {self.num_folders} outputs need"
        return (
            f"{self.folder}: {what} {self.need / 1e9:.2f} GB and the disk has {self.free / 1e9:.2f} GB free; "
            "make room or choose another -o"
        )


def rooms_for(folders: Mapping[Path, int]) -> list[Room]:
    """What folders that are yet to be made, with their bytes, need on each disk.

    Raises:
        CheckpointError: a disk cannot be looked at.
    """
    sharing: dict[int, list[Path]] = {}
    for folder in folders:
        parent = _existing(folder.parent)
        try:
            sharing.setdefault(parent.stat().st_dev, []).append(folder)
        except OSError as error:
            raise disk_error(folder, error) from error
    rooms = []
    for together in sharing.values():
        parent = _existing(together[0].parent)
        need, free = sum(folders[folder] for folder in together), shutil.disk_usage(parent).free
        rooms.append(Room(folder=parent, need=need, free=free, num_folders=len(together)))
    return rooms


def joined(rooms: Iterable[Room]) -> list[Room]:
    """Rooms with those of one disk added up."""
    by_disk: dict[int, list[Room]] = {}
    for room in rooms:
        by_disk.setdefault(room.folder.stat().st_dev, []).append(room)
    return [
        replace(some[0], need=sum(room.need for room in some), num_folders=sum(room.num_folders for room in some))
        for some in by_disk.values()
    ]


def _existing(folder: Path) -> Path:
    """The folder, or what is there of the way to it."""
    return next((path for path in (folder, *folder.parents) if path.is_dir()), folder)
