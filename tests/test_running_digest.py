"""A file that is hashed while it is written, against hashlib on the whole of it."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from itertools import pairwise
from pathlib import Path

import pytest

from qconv import running_digest
from qconv.running_digest import RunningDigest


@pytest.mark.parametrize("seed", range(4))
def test_pieces_in_any_order_from_several_threads(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running_digest, "_BUFFER_BYTES", 1000)
    source = random.Random(seed)
    content = source.randbytes(50_000)
    cuts = sorted({0, len(content), *source.sample(range(len(content)), 40)})
    pieces = list(pairwise(cuts))
    source.shuffle(pieces)
    file = tmp_path / "shard"
    file.write_bytes(b"\0" * len(content))  # the space is there before the content
    digest = RunningDigest(file)
    handle = os.open(file, os.O_WRONLY)

    def write(some: list[tuple[int, int]]) -> None:
        for begin, end in some:
            os.pwrite(handle, content[begin:end], begin)
            digest.written(begin, end - begin)

    threads = [threading.Thread(target=write, args=(pieces[number::3],)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(handle)
    assert digest.result(len(content)) == hashlib.sha256(content).hexdigest()


def test_an_empty_piece_and_an_empty_file(tmp_path: Path) -> None:
    file = tmp_path / "shard"
    file.write_bytes(b"")
    digest = RunningDigest(file)
    digest.written(0, 0)
    assert digest.result(0) == hashlib.sha256(b"").hexdigest()
    file.write_bytes(b"abc")
    digest = RunningDigest(file)
    digest.written(3, 0)
    digest.written(0, 0)
    digest.written(0, 3)
    assert digest.result(3) == hashlib.sha256(b"abc").hexdigest()


def test_no_digest_of_what_is_not_complete(tmp_path: Path) -> None:
    file = tmp_path / "shard"
    file.write_bytes(b"abcdef")
    gap = RunningDigest(file)
    gap.written(0, 2)
    gap.written(3, 3)
    assert gap.result(6) is None
    cut = RunningDigest(file)
    cut.written(0, 9)
    assert cut.result(9) is None
    assert RunningDigest(tmp_path / "absent").result(0) is None
    stopped = RunningDigest(file)
    stopped.written(0, 6)
    stopped.stop()
    stopped.stop()
    waiting = RunningDigest(file)
    waiting.stop()
    assert waiting.result(6) is None
