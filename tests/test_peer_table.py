"""The table of peers without a peer: what is run, and what is measured of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qconv.cli import cli

ROOT = Path(__file__).parents[1]


@pytest.fixture
def peer_table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import peer_table

    module: ModuleType = peer_table
    return module


def test_every_tool_gets_the_same_model_and_rows(peer_table: ModuleType, tmp_path: Path) -> None:
    merged, rows = tmp_path / "merged", tmp_path / "rows.json"
    jobs = peer_table.jobs(list(peer_table.PEERS), merged, rows, tmp_path)
    assert {job.tool for job in jobs} == {"qconv", *peer_table.PEERS}
    assert len({job.out for job in jobs}) == len(jobs)
    for job in jobs:
        if job.tool == "qconv":
            module, package, name, *arguments = job.command[1:]
            assert (module, package) == ("-m", "qconv")
            assert arguments[0] == str(merged)
            cli.commands[name].make_context(name, arguments)  # raises where an option is wrong
        else:
            python, script, *arguments = job.command
            assert python.endswith(f"/.venv-{job.tool}/bin/python")
            assert (ROOT / f"constraints-{job.tool}.txt").is_file()
            assert Path(script).is_file()
            assert arguments[:3] == [str(merged), str(rows), str(job.out)]


def test_a_job_is_measured_as_a_process(peer_table: ModuleType, tmp_path: Path) -> None:
    def job(code: str) -> object:
        return peer_table.Job(tool="x", method="y", command=(sys.executable, "-c", code), out=tmp_path / "out")

    # Larger than the process: that of a child begins with what its parent holds, for the kernel.
    ballast = bytearray(600_000_000)
    cost = peer_table.run(job("import time; block = bytearray(300_000_000); time.sleep(0.3); print('done')"))
    assert len(ballast)
    assert cost["status"] == 0
    assert cost["seconds"] >= 0.3
    assert 0.3 <= cost["host_gb"] <= 0.4
    assert (tmp_path / "out.log").read_text() == "done\n"
    assert peer_table.run(job("raise SystemExit(3)"))["status"] == 3


def test_peers_get_the_rows_that_ours_calibrates_with(
    peer_table: ModuleType, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_table, "SAMPLES", 4)
    monkeypatch.setattr(peer_table, "SEQ_LEN", 64)
    file = tmp_path / "rows.json"
    digest = peer_table.write_rows(tiny_llama, file)
    rows = json.loads(file.read_text())
    assert [len(row) for row in rows] == [64] * 4
    ours = peer_table.jobs([], tiny_llama, file, tmp_path)[0]
    assert peer_table.run(ours)["status"] == 0
    assert peer_table.rows_of(ours) == digest
    assert peer_table.artifact(ours) == ours.out
