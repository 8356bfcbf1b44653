"""The output folder: complete or absent, one run at a time, and nobody else's files are removed."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from qconv.errors import CheckpointError, UsageError
from qconv.types import TensorSpec
from qconv.work_folder import MARKER, WorkFolder, check_inputs, publishing
from qconv.write_behind import WriteBehind
from qconv.writer import CheckpointWriter

SPECS = [TensorSpec(name="a.weight", shape=(4,), dtype=torch.float32)]


def fill(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_second_run_with_the_same_output_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with CheckpointWriter(out, SPECS, 10**9) as first:
        first.write("a.weight", torch.ones(4))
        with pytest.raises(CheckpointError, match="another run is writing it"), CheckpointWriter(out, SPECS, 10**9):
            pass
        first.commit()
    assert names(tmp_path) == ["out"]
    assert MARKER not in names(out)


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    leftover = tmp_path / "out.partial"
    leftover.mkdir()
    (leftover / MARKER).touch()
    (leftover / "model.safetensors").write_bytes(b"half")
    with publishing(tmp_path / "out", overwrite=False) as folder:
        assert names(folder) == [MARKER]
        fill(folder)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["config.json"]


def test_a_folder_of_that_name_which_is_not_ours_stays(tmp_path: Path) -> None:
    other = tmp_path / "out.partial"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match="was not made by qconv"), publishing(tmp_path / "out", overwrite=False):
        pass
    assert names(other) == ["thesis.tex"]


def test_overwriting_removes_the_old_output_and_nothing_beside_it(tmp_path: Path) -> None:
    out, bystander = tmp_path / "out", tmp_path / "out.old"
    for folder in (out, bystander):
        folder.mkdir()
        (folder / "config.json").write_text(folder.name)
    with publishing(out, overwrite=True) as folder:
        fill(folder)
    assert (out / "config.json").read_text() == "{}"
    assert (bystander / "config.json").read_text() == "out.old"
    assert names(tmp_path) == ["out", "out.old"]


def test_the_old_output_comes_back_when_the_last_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    rename = Path.rename

    def fail_for_partial(self: Path, target: Path) -> Path:
        if self.name == "out.partial":
            raise OSError("no")
        return rename(self, target)

    with pytest.raises(CheckpointError, match="cannot be written"), publishing(out, overwrite=True) as folder:
        fill(folder)
        monkeypatch.setattr(Path, "rename", fail_for_partial)
    assert (out / "config.json").read_text() == "old"


def test_rejected_outputs_of_ours_are_replaced_and_others_kept(tmp_path: Path) -> None:
    def reject() -> Path:
        folder = WorkFolder(tmp_path / "out", overwrite=False)
        folder.begin()
        (folder.path / "qconv-report.json").write_text("{}")
        return folder.reject()

    assert reject().name == "out.rejected"
    assert reject().name == "out.rejected"
    (tmp_path / "out.rejected" / "qconv-report.json").unlink()
    assert reject().name == "out.rejected1"
    assert names(tmp_path) == ["out.rejected", "out.rejected1"]


@pytest.mark.parametrize("where", ["out", "out.partial", "out.rejected", "out/nested", "out.partial/deep/er"])
def test_an_output_that_would_remove_an_input_is_refused(tmp_path: Path, where: str) -> None:
    source = tmp_path / where
    source.mkdir(parents=True)
    with pytest.raises(UsageError, match="an input of this run"):
        check_inputs(tmp_path / "out", [None, source])
    link = tmp_path / "link"
    link.symlink_to(source)
    with pytest.raises(UsageError, match="an input of this run"):
        check_inputs(tmp_path / "out", [link])
    check_inputs(tmp_path / "elsewhere", [source, "some-org/some-model"])


def test_broken_link(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="link to something that does not exist"):
        WorkFolder(tmp_path / "out", overwrite=False)


@pytest.mark.parametrize("call", ["rename", "rmtree"])
def test_an_interrupt_while_an_old_output_is_replaced_leaves_one_whole_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    folder = WorkFolder(out, overwrite=True)
    folder.begin()
    (folder.path / "config.json").write_text('{"new": true}')
    handler = signal.getsignal(signal.SIGINT)
    if call == "rename":
        rename = Path.rename

        def interrupted_rename(self: Path, target: Path) -> Path:
            os.kill(os.getpid(), signal.SIGINT)
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", interrupted_rename)
    else:
        rmtree = shutil.rmtree

        def interrupted_rmtree(path: Path, **options: bool) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            rmtree(path, **options)

        monkeypatch.setattr(shutil, "rmtree", interrupted_rmtree)
    folder.publish()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "config.json").read_text() == '{"new": true}'
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_interrupt_right_after_the_folder_was_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "new" / "out"
    mkdir = Path.mkdir

    def interrupted(folder: Path, *args: Any, **options: Any) -> None:
        mkdir(folder, *args, **options)
        if folder.name == "out.partial":
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt), publishing(out, overwrite=False):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(out, [], 1000):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_second_interrupt_during_the_end_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close = WriteBehind.close

    def interrupted_close(self: WriteBehind) -> None:
        close(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(WriteBehind, "close", interrupted_close)
    spec = TensorSpec(name="x", shape=(4,), dtype=torch.float32)
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path / "out", [spec], 10**9):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
