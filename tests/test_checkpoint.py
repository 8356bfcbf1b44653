"""Reader and writer of folders, against the safetensors library, and every way to refuse a folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qconv.checkpoint import open_adapter_files, open_checkpoint
from qconv.errors import CheckpointError
from qconv.side_files import side_files
from qconv.types import TensorSpec
from qconv.writer import CheckpointWriter

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.randn(5, 7).to(torch.bfloat16),
    "c.codes": torch.arange(9, dtype=torch.uint8),
    "d.fp8": torch.randn(4, 4).to(torch.float8_e4m3fn),
    "e.scalar": torch.tensor(3.5, dtype=torch.float16),
    "f.empty": torch.empty(0, 4, dtype=torch.int32),
}


def make_folder(folder: Path, tensors: dict[str, torch.Tensor] = TENSORS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file(tensors, folder / "model.safetensors")
    return folder


def make_raw(folder: Path, header: str, data: bytes = b"") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    text = header.encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype and a.shape == b.shape and a.flatten().view(torch.uint8).equal(b.flatten().view(torch.uint8))
    )


def specs_of(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name=name, shape=tuple(t.shape), dtype=t.dtype) for name, t in tensors.items()]


def test_reads_what_safetensors_wrote(tmp_path):
    checkpoint = open_checkpoint(make_folder(tmp_path / "m"))
    assert checkpoint.specs().keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert same_bytes(checkpoint.read(name), tensor), name


@pytest.mark.parametrize("max_shard_bytes", [50, 100, 10**9])
def test_safetensors_reads_what_the_writer_wrote(tmp_path, max_shard_bytes):
    out = tmp_path / "out"
    with CheckpointWriter(out, specs_of(TENSORS), max_shard_bytes) as writer:
        writer.write_json("config.json", {"model_type": "llama"})
        for name in reversed(TENSORS):
            writer.write(name, TENSORS[name])
        assert not out.exists()
        writer.commit()
    loaded = {}
    for file in out.glob("*.safetensors"):
        loaded |= load_file(file)
    assert loaded.keys() == TENSORS.keys()
    assert all(same_bytes(loaded[name], tensor) for name, tensor in TENSORS.items())
    assert not out.with_name("out.partial").exists()
    again = open_checkpoint(out)
    assert all(same_bytes(again.read(name), tensor) for name, tensor in TENSORS.items())
    index = out / "model.safetensors.index.json"
    assert index.exists() == (max_shard_bytes < 1000)
    if index.exists():
        total = sum(t.numel() * t.element_size() for t in TENSORS.values())
        assert json.loads(index.read_text())["metadata"]["total_size"] == total


def test_failure_leaves_nothing_and_keeps_the_old(tmp_path):
    out = make_folder(tmp_path / "out")
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(ZeroDivisionError), CheckpointWriter(out, specs_of(TENSORS), 10**9, overwrite=True) as writer:
        writer.write("a.weight", TENSORS["a.weight"])
        raise ZeroDivisionError
    assert (out / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_missing_tensor_is_not_committed(tmp_path):
    with (
        pytest.raises(CheckpointError, match=r"never written.*b\.weight"),
        CheckpointWriter(tmp_path / "out", specs_of(TENSORS), 10**9) as writer,
    ):
        for name in TENSORS.keys() - {"b.weight"}:
            writer.write(name, TENSORS[name])
        writer.commit()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("a.weight", torch.zeros(4, 3), "announced as"),
        ("a.weight", torch.zeros(3, 4, dtype=torch.float16), "announced as"),
        ("z.weight", torch.zeros(3, 4), "not announced"),
    ],
)
def test_writer_refuses_what_was_not_announced(tmp_path, name, tensor, message):
    with (
        pytest.raises(CheckpointError, match=message),
        CheckpointWriter(tmp_path / "out", specs_of(TENSORS), 10**9) as writer,
    ):
        writer.write(name, tensor)


def test_existing_output_is_refused(tmp_path):
    out = make_folder(tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists already"):
        CheckpointWriter(out, [], 10**9)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match="replaces model folders and packs only"):
        CheckpointWriter(other, [], 10**9, overwrite=True)


def test_full_disk_is_refused_before_work(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with (
        pytest.raises(CheckpointError, match=r"needs .* GB and the disk has"),
        CheckpointWriter(tmp_path / "o", specs_of(TENSORS), 10**9),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(CheckpointError, match="disk is full"),
        CheckpointWriter(tmp_path / "o", specs_of(TENSORS), 10**9) as writer,
    ):
        monkeypatch.setattr("qconv.writer.os.pwrite", full)
        writer.write("a.weight", TENSORS["a.weight"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (
            '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            b"1234",
            "stands twice",
        ),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,NaN]}}', b"1234", "NaN is not JSON"),
        ('{"../../x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234", "not a dotted name"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', b"1234", "cannot fill"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', b"12345678", "overlap or hole"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"12", "truncated"),
        ('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b"1234", "malformed header"),
        ('{"a":{"dtype":"Q4","shape":[1],"data_offsets":[0,4]}}', b"1234", "dtype Q4"),
        ('{"a":7}', b"", "malformed header"),
        ("[1]", b"", "expected a JSON object"),
        ("{", b"", "not valid JSON"),
    ],
)
def test_malformed_safetensors_is_refused(tmp_path, header, data, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(make_raw(tmp_path / "m", header, data))


def test_header_longer_than_the_file_is_refused(tmp_path):
    folder = make_raw(tmp_path / "m", "{}")
    (folder / "model.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="not a safetensors file, or truncated"):
        open_checkpoint(folder)


def test_what_git_lfs_leaves_in_place_of_a_file_is_told(tmp_path):
    """The pointer's text is that of the Git LFS specification, version 1."""
    folder = make_raw(tmp_path / "m", "{}")
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\n"
        "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
    )
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_checkpoint(folder)


def with_index(folder: Path, weight_map: dict[str, str]) -> Path:
    make_folder(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a.weight": "../m/model.safetensors"}, "leaves the folder"),
        ({"a.weight": "/etc/passwd"}, "leaves the folder"),
        ({"a.weight": "pytorch_model.bin"}, "pickled weights are not read"),
        ({"a.weight": "model-00002-of-00002.safetensors"}, "missing from the folder"),
        ({"z.weight": "model.safetensors"}, "it is not there"),
        ({"a.weight": "model.safetensors"}, "not in the index"),
        ({}, "non-empty object"),
    ],
)
def test_bad_index_is_refused(tmp_path, weight_map, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(with_index(tmp_path / "m", weight_map))


def test_pickle_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights"):
        open_checkpoint(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="pickled weights"):
        open_adapter_files(tmp_path)


@pytest.mark.parametrize(("source", "message"), [("no/such/folder", "no such folder"), ("nowhere", "no such folder")])
def test_missing_folder(source, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(source)


def test_folders_that_were_named_in_the_wrong_place_are_named(tmp_path):
    for name in ("one", "two"):
        (tmp_path / "several" / name).mkdir(parents=True)
        (tmp_path / "several" / name / "config.json").write_text("{}")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json: not found; .*, and .*adapter is an adapter"):
        open_checkpoint(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: not found; .*, and .*one is a model"):
        open_adapter_files(tmp_path / "several" / "one")
    with pytest.raises(CheckpointError, match=r"config\.json: not found; .*; one, two in .*several have one"):
        open_checkpoint(tmp_path / "several")


def test_hub_id_goes_through_huggingface_hub(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "snapshot")
    asked = {}

    def snapshot_download(repo, revision, allow_patterns):
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert open_checkpoint("some-org/some-model", "v2").folder == folder
    assert asked["repo"] == "some-org/some-model"
    assert asked["revision"] == "v2"
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in asked["patterns"])


def test_hub_failure_says_so(monkeypatch):
    def snapshot_download(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=r"hub did not deliver.*offline"):
        open_checkpoint("some-org/some-model")


def test_an_adapter_of_the_adapters_library_is_refused_with_the_alternative(tmp_path):
    about = {"config": {"mh_adapter": True, "reduction_factor": 16}, "model_class": "LlamaForCausalLM", "name": "a"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    (tmp_path / "pytorch_adapter.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"bottleneck adapters are nonlinear.*serve it with that library"):
        open_adapter_files(tmp_path)


def test_side_files_prefer_the_adapters_tokenizer(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder, names in {
        base: ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "generation_config.json", "LICENSE"),
        adapter: ("tokenizer.json", "chat_template.jinja", "README.md"),
    }.items():
        folder.mkdir()
        for name in names:
            (folder / name).write_text(folder.name)
    chosen = {file.name: file.parent.name for file in side_files(base, adapter)}
    assert chosen == {
        "tokenizer.json": "adapter",
        "chat_template.jinja": "adapter",
        "generation_config.json": "base",
        "LICENSE": "base",
    }
    assert {file.parent.name for file in side_files(base, None)} == {"base"}
