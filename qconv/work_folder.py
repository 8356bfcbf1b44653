"""An output folder that appears complete or not at all, and never at the cost of somebody else's files.

``OUT.partial`` is filled and renamed to ``OUT`` in the end. It carries a marker file, locked while its run lives
(`flock`), so that a second run with the same output is refused instead of sharing the folder, the leftovers of a run
that was killed are recognised and removed, and a folder that only happens to have this name is left alone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from qconv.errors import CheckpointError, UsageError

MARKER = ".qconv-partial"
REPORT_SIGN = "qconv-report.json"  # a rejected folder of ours has one
PACK_SIGN = "qconv-pack.json"
_OVERWRITTEN = ("config.json", "adapter_config.json", PACK_SIGN)  # one of these is in what may be replaced
_NOT_OURS = "exists and was not made by qconv; move it away or choose another -o"


class WorkFolder:
    """``OUT.partial``; `begin`, fill `path`, then `publish` or `reject`; `discard` is always safe.

    Args:
        out: the final folder.
        overwrite: an existing model folder at ``out`` is replaced when the new one is published.

    Raises:
        CheckpointError: ``out`` cannot be written or replaced, or another run is writing it.
    """

    def __init__(self, out: Path, overwrite: bool):
        self.out = Path(os.path.abspath(out))
        self.path = self.out.with_name(self.out.name + ".partial")
        self._overwrite = overwrite
        self._lock: int | None = None
        self._is_mine = False
        self._made: list[Path] = []  # folders on the way to it, deepest first
        check_output(self.out, overwrite)

    def begin(self) -> None:
        try:
            self._made = [folder for folder in self.out.parents if not folder.exists()]
            self.out.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() or self.path.is_symlink():
                self._remove_leftover()
            self._make()
            self._lock = os.open(self.path / MARKER, os.O_CREAT | os.O_RDWR, 0o644)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise disk_error(self.path, error) from error

    def _make(self) -> None:
        self._is_mine = True  # before it is there: an interrupt may come right after
        try:
            self.path.mkdir()
        except OSError:  # somebody else's, for one
            self._is_mine = False
            raise

    def _remove_leftover(self) -> None:
        if not (self.path / MARKER).is_file():
            raise CheckpointError(f"{self.path}: {_NOT_OURS}")
        handle = os.open(self.path / MARKER, os.O_RDWR)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{self.out}: another run is writing it; wait for it or choose another -o") from None
        finally:
            os.close(handle)
        shutil.rmtree(self.path)

    def publish(self, first: WorkFolder | None = None) -> None:
        """Syncs the folder and makes it visible as ``out``; an old one is removed last, and put back on failure.

        Args:
            first: another folder, of no use without this one, nor this one without it. Both appear, or none: it comes
                before this one, and of two old ones goes after it, so that this one is never there without it.
        """
        folders = (self,) if first is None else (first, self)
        try:
            for folder in folders:
                folder._seal()
                check_output(folder.out, folder._overwrite)
            with _undisturbed():
                _put_in_place(folders)
            for folder in folders:
                _fsync(folder.out.parent)
        except OSError as error:
            raise disk_error(self.out, error) from error

    def reject(self) -> Path:
        """Keeps a complete folder that missed a gate, for inspection; ``out`` stays as it was.

        It is called ``OUT.rejected``; an earlier rejected output is replaced, anything else of that name is not.
        """
        rejected = self.out.with_name(self.out.name + ".rejected")
        try:
            self._seal()
            if (rejected / REPORT_SIGN).is_file():
                shutil.rmtree(rejected)
            elif rejected.exists():
                rejected = _free_name(self.out, ".rejected")
            self.path.rename(rejected)
            self._release()
        except OSError as error:
            raise disk_error(rejected, error) from error
        return rejected

    def discard(self) -> None:
        """Removes what was begun, if it was neither published nor rejected."""
        if self._is_mine:
            with _undisturbed():
                shutil.rmtree(self.path, ignore_errors=True)
                self._release()
            with suppress(OSError):  # somebody else's files are in one by now
                for folder in self._made:
                    folder.rmdir()

    def _seal(self) -> None:
        for file in self.path.iterdir():
            _fsync(file)
        (self.path / MARKER).unlink()
        _fsync(self.path)

    def _release(self) -> None:
        self._is_mine = False
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Renaming and removing are short: a ctrl-C in between, often the second one, would leave the rest behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _put_in_place(folders: Sequence[WorkFolder]) -> None:
    """Renames all of them, or none."""
    renamed: list[tuple[Path, Path]] = []  # now called -> was called
    old = []
    try:
        for folder in reversed(folders):
            if folder.out.exists():
                old.append(_free_name(folder.out, ".old"))
                folder.out.rename(old[-1])
                renamed.append((old[-1], folder.out))
        for folder in folders:
            folder.path.rename(folder.out)
            renamed.append((folder.out, folder.path))
    except OSError:
        for now, before in reversed(renamed):
            with suppress(OSError):  # the others, all the same
                now.rename(before)
        raise
    for folder in folders:
        folder._release()
    for path in old:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def publishing(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to fill, published as ``out`` when the block ends well and removed when it does not."""
    with filling(out, overwrite) as folder:
        yield folder.path
        folder.publish()


@contextmanager
def filling(out: Path, overwrite: bool) -> Iterator[WorkFolder]:
    """A folder to fill and to publish, removed at the end of the block where it was not."""
    folder = WorkFolder(out, overwrite)
    try:
        folder.begin()
        yield folder
    except OSError as error:
        raise disk_error(out, error) from error
    finally:
        folder.discard()


def check_output(out: Path, overwrite: bool) -> None:
    """Refuses an output that exists, unless it may be replaced and is a model folder or empty."""
    if out.is_symlink() and not out.exists():
        raise CheckpointError(f"{out}: is a link to something that does not exist; remove it or choose another -o")
    if not out.exists():
        return
    if not overwrite:
        raise CheckpointError(f"{out}: exists already; choose another -o, or pass --overwrite to replace it")
    if not out.is_dir():
        raise CheckpointError(f"{out}: expected a folder to overwrite, found a file")
    if any(out.iterdir()) and not any((out / name).exists() for name in _OVERWRITTEN):
        raise CheckpointError(f"{out}: has files but no config.json; --overwrite replaces model folders and packs only")


def check_place(out: Path) -> None:
    """Refuses an output that could not be begun where it is to be made.

    Raises:
        CheckpointError: a file is in the way, a folder that cannot be written, or ``OUT.partial`` of somebody else.
    """
    out = Path(os.path.abspath(out))
    there = next(path for path in out.parents if path.exists())
    if not there.is_dir():
        raise CheckpointError(f"{out}: cannot be made, {there} is a file; choose another -o")
    if not os.access(there, os.W_OK | os.X_OK):
        raise CheckpointError(f"{out}: cannot be made, {there} is not writable; choose another -o")
    partial = out.with_name(out.name + ".partial")
    if (partial.exists() or partial.is_symlink()) and not (partial / MARKER).is_file():
        raise CheckpointError(f"{partial}: {_NOT_OURS}")


def check_inputs(out: Path, inputs: Iterable[str | Path | None]) -> None:
    """Refuses an output whose making would remove an input of the same run.

    Raises:
        UsageError: an input is, or lies in, ``OUT``, ``OUT.partial`` or ``OUT.rejected``.
    """
    out = Path(os.path.abspath(out))
    taken = [out, *(out.with_name(out.name + ending) for ending in (".partial", ".rejected"))]
    for source in inputs:
        if source is None or not Path(source).exists():
            continue
        real = Path(source).resolve()
        for folder in taken:
            if real == folder.resolve() or folder.resolve() in real.parents:
                raise UsageError(f"-o {out}: would replace {source}, an input of this run; choose another output")


def check_beside(out: Path, folder: Path | None) -> None:
    """Refuses a second place for reports that lies where the output is made, and would go with it.

    Raises:
        UsageError: ``folder`` is, or lies in, ``OUT``, ``OUT.partial`` or ``OUT.rejected``.
    """
    if folder is None:
        return
    out, real = Path(os.path.abspath(out)), Path(folder).resolve()
    for taken in (out, *(out.with_name(out.name + ending) for ending in (".partial", ".rejected"))):
        if real == taken.resolve() or taken.resolve() in real.parents:
            raise UsageError(f"--report {folder}: lies in {taken}, which has its reports anyway; choose another folder")


def disk_error(path: Path, error: OSError) -> CheckpointError:
    """The message for a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"{path}: the disk is full ({error.strerror}); nothing was left behind, make room and run again"
        )
    return CheckpointError(f"{path}: cannot be written ({error})")


def _free_name(out: Path, ending: str) -> Path:
    names = (out.with_name(f"{out.name}{ending}{number or ''}") for number in range(1_000_000))
    return next(name for name in names if not name.exists() and not name.is_symlink())


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
