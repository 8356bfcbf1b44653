"""Pickled adapters: tensors come out bit for bit, and nothing else does anything."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qconv.adapter_configs import UnpickleConfig
from qconv.cli import main
from qconv.errors import AdapterError, CheckpointError, QconvError
from qconv.records import write_train_record
from qconv.unpickle import unpickle
from tests.merge_cases import TINY_LLAMA, factors, write_adapter


def pickled(folder: Path, content: Any, name: str = "adapter_model.bin") -> Path:
    write_adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(content, folder / name)
    return folder


def converted(folder: Path) -> Path:
    out = folder.with_name(folder.name + "-out")
    unpickle(UnpickleConfig(adapter=str(folder), out=out))
    return out


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter.pt"])
def test_the_same_tensors(name: str, tmp_path: Path) -> None:
    own = factors()
    whole = torch.randn(4, 6, dtype=torch.bfloat16)
    content = own | {"parameter": nn.Parameter(whole), "view": whole[:, 2:], "turned": whole.T}
    folder = pickled(tmp_path / "pickled", content, name)
    write_train_record(folder, "nf4-dq", "base")
    out = converted(folder)
    found = load_file(out / "adapter_model.safetensors")
    assert found.keys() == content.keys()
    for key, tensor in content.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor.detach())
    for file in ("adapter_config.json", "qconv-train.json"):
        assert (out / file).read_bytes() == (folder / file).read_bytes()


class Harmful:
    """What a pickle can do when it is read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_a_program_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "was-here"
    folder = pickled(tmp_path / "a", factors() | {"x": Harmful(mark)})
    with pytest.raises(AdapterError, match="more than tensors"):
        converted(folder)
    assert not mark.exists()
    assert not (tmp_path / "a-out").exists()
    with pytest.raises(FileNotFoundError):
        mark.rmdir()
    torch.load(folder / "adapter_model.bin", weights_only=False)
    assert mark.exists(), "the file is as harmful as it is meant to be"


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(1)], "found list"),
        ({}, "found dict"),
        ({"model": {"a": torch.ones(1)}}, "'model': expected a plain tensor, found dict"),
        ({"step": 3}, "'step': expected a plain tensor, found int"),
        ({3: torch.ones(1)}, "expected names of tensors as keys, found 3"),
        ({"a": torch.eye(3).to_sparse()}, "sparse"),
        ({"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, "quantized"),
        ({"a": torch.ones(2).as_subclass(Subclass)}, "more than tensors"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_anything_else_is_refused(content: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=words):
        converted(pickled(tmp_path / "a", content))


def test_files_that_are_no_pickled_adapter(tmp_path: Path) -> None:
    def expect(folder: Path, words: str, error: type[QconvError] = CheckpointError) -> None:
        with pytest.raises(error, match=words):
            converted(folder)

    expect(write_adapter(tmp_path / "safe"), "nothing to convert")
    none = pickled(tmp_path / "none", factors())
    (none / "adapter_model.bin").unlink()
    expect(none, "found none")
    two = pickled(tmp_path / "two", factors(), "a.pt")
    shutil.copyfile(two / "a.pt", two / "b.pt")
    expect(two, r"found a\.pt, b\.pt")
    cut = pickled(tmp_path / "cut", factors())
    data = (cut / "adapter_model.bin").read_bytes()
    (cut / "adapter_model.bin").write_bytes(data[: len(data) // 2])
    expect(cut, "cannot be read")
    (cut / "adapter_model.bin").write_bytes(pickle.dumps({"a": Path()}, protocol=2))
    expect(cut, "more than tensors", AdapterError)
    (cut / "adapter_model.bin").write_bytes(pickle.dumps({"a": Path()}, protocol=4))
    expect(cut, "a pickle protocol that torch.save does not use")


class NewTensor:
    """Memory as it is, under the name of a tensor."""

    def __reduce__(self) -> Any:
        return torch.FloatTensor, (1000,)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_without_values_of_their_own_are_refused(zipped: bool, tmp_path: Path) -> None:
    folder = pickled(tmp_path / "new", {})
    content = factors() | {"x": NewTensor()}
    torch.save(content, folder / "adapter_model.bin", _use_new_zipfile_serialization=zipped)
    assert torch.load(folder / "adapter_model.bin", weights_only=True)["x"].shape == (1000,), "torch makes it"
    with pytest.raises(AdapterError, match=r"new tensor \(torch\.FloatTensor\)"):
        converted(folder)
    torch.save(factors(), folder / "adapter_model.bin", _use_new_zipfile_serialization=zipped)
    assert converted(folder).is_dir()


def test_a_small_file_does_not_become_a_large_one(tmp_path: Path) -> None:
    wide = torch.zeros(1).expand(10**9)
    folder = pickled(tmp_path / "wide", factors() | {"x": wide})
    assert (folder / "adapter_model.bin").stat().st_size < 10**5
    with pytest.raises(CheckpointError, match="4000000000 bytes, and 4 are stored"):
        converted(folder)
    file = pickled(tmp_path / "packed", factors()) / "adapter_model.bin"
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    with pytest.raises(CheckpointError, match=r"data\.pkl is compressed"):
        converted(file.parent)


def test_torch_before_it_was_mended_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pickled(tmp_path / "old", factors())
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    with pytest.raises(CheckpointError, match=r"torch 2\.10 or newer, found 2\.9\.1"):
        converted(folder)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pickled(tmp_path / "a", factors())
    main(["convert", str(folder), "--to", "safetensors", "-o", str(tmp_path / "out"), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert (document["file"], document["num_tensors"]) == ("adapter_model.bin", 2)
    for arguments, words in (
        ([str(TINY_LLAMA)], "is no adapter"),
        ([str(folder), "--base", "b"], "--base is not for --to safetensors"),
        ([str(folder), "--max-shard-size", "5GB"], "--max-shard-size is not for --to safetensors"),
        ([str(folder), "--dry-run"], "--dry-run plans"),
    ):
        with pytest.raises(SystemExit) as raised:
            main(["convert", *arguments, "--to", "safetensors", "-o", str(tmp_path / "other")])
        assert raised.value.code == 2
        assert words in capsys.readouterr().err
