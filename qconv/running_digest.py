"""SHA-256 of a file while it is being written.

Reading a large file again when it is complete takes as long as a slow disk took to write it. Here a thread follows the
writing and hashes, from the page cache, what is there without a gap: with pieces that come about in order, little is
left to do in the end. Hashing and reading release the interpreter lock.
"""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

_BUFFER_BYTES = 1 << 18  # there is one for each file


class RunningDigest:
    """Follows one file; any thread may say what was written. Ends with `result` or `stop`."""

    def __init__(self, file: Path):
        self._file = file
        self._changed = threading.Condition()
        self._ends: dict[int, int] = {}  # pieces behind a gap: begin -> end
        self._front = 0  # all bytes before this one are written
        self._size: int | None = None  # of the complete file, once it is known
        self._is_stopped = False
        self._digest: str | None = None
        self._thread = threading.Thread(target=self._follow, name=f"qconv-digest-{file.stem}", daemon=True)
        self._thread.start()

    def written(self, offset: int, num_bytes: int) -> None:
        """These bytes are in the file now and stay as they are. Pieces do not overlap."""
        if not num_bytes:
            return
        with self._changed:
            self._ends[offset] = offset + num_bytes
            while self._front in self._ends:
                self._front = self._ends.pop(self._front)
            self._changed.notify_all()

    def result(self, size: int) -> str | None:
        """The digest (hex) of the complete file of ``size`` bytes; None where it could not be followed to its end."""
        with self._changed:
            self._size = size
            self._changed.notify_all()
        self._thread.join()
        return self._digest

    def stop(self) -> None:
        """Gives up."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        self._thread.join()

    def _follow(self) -> None:
        digest, done = hashlib.sha256(), 0
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        try:
            with open(self._file, "rb", buffering=0) as handle:
                while (front := self._wait(done)) > done:
                    size = handle.readinto(buffer[: min(front - done, len(buffer))])
                    if not size:
                        return
                    digest.update(buffer[:size])
                    done += size
        except OSError:  # whoever reads the file next says it
            return
        if done == self._size and not self._is_stopped:
            self._digest = digest.hexdigest()

    def _wait(self, done: int) -> int:
        """Until there is more than ``done``, or there will be no more; how far the file is written."""
        with self._changed:
            self._changed.wait_for(lambda: self._front > done or self._size is not None or self._is_stopped)
            return done if self._is_stopped else self._front
