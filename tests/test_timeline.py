"""Where the seconds went: stages, threads and the option that prints them."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qconv.timeline import Timeline


def rows(table: str) -> dict[tuple[str, str], tuple[int, float]]:
    """(threads, stage) -> calls and seconds."""
    found = re.findall(r"^(\S+(?: x\d+)?)\s+(\S.*?)\s+(\d+)\s+([\d.]+)\s+\d+%", table, re.M)
    return {(threads, stage): (int(calls), float(seconds)) for threads, stage, calls, seconds in found}


def test_a_stage_is_not_charged_for_the_stages_inside_it() -> None:
    timeline = Timeline()
    timeline.start()
    with timeline.stage("outer"):
        time.sleep(0.05)
        for _ in range(2):
            with timeline.stage("inner"):
                time.sleep(0.1)
    found = rows(timeline.table())
    assert found["MainThread", "inner"][0] == 2
    assert found["MainThread", "inner"][1] >= 0.2
    assert 0.05 <= found["MainThread", "outer"][1] < found["MainThread", "inner"][1]


def test_threads_of_a_pool_share_a_row() -> None:
    timeline = Timeline()
    timeline.start()

    def work() -> None:
        with timeline.stage("read"):
            time.sleep(0.02)

    threads = [threading.Thread(target=work, name=f"qconv-read-{number}") for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    calls, seconds = rows(timeline.table())["qconv-read x3", "read"]
    assert calls == 3
    assert seconds >= 0.06


def test_a_stage_that_fails_is_ended() -> None:
    timeline = Timeline()
    timeline.start()
    with pytest.raises(ValueError, match="inside"), timeline.stage("broken"):
        raise ValueError("inside")
    with timeline.stage("next"):
        pass
    assert set(rows(timeline.table())) == {("MainThread", "broken"), ("MainThread", "next")}


def test_nothing_is_kept_when_it_is_off() -> None:
    timeline = Timeline()
    with timeline.stage("unseen"):
        pass
    timeline.start()
    assert rows(timeline.table()) == {}
    assert not timeline.is_on


@pytest.mark.parametrize("options", [[], ["--requant", "fp8"]])
def test_profile_of_a_merge(tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path, options: list[str]) -> None:
    command = [sys.executable, "-m", "qconv", "merge", str(tiny_nf4), str(tiny_adapter), "-o", str(tmp_path / "out")]
    command += [*options, "--no-validate", "-q", "--device", "cpu", "--profile"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = rows(done.stderr)
    assert ("MainThread", "prepare") in found
    assert any(threads.startswith("qconv-write") and stage == "write" for threads, stage in found)
    wall = float(re.search(r"whole process so far: ([\d.]+) s", done.stderr)[1])  # type: ignore[index]
    assert 0 < sum(seconds for (threads, _), (_, seconds) in found.items() if threads == "MainThread") <= wall
    assert "threads" not in done.stdout
