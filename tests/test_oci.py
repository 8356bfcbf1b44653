"""``pack --for oci``: the layout by the schemas of its specifications, its blobs by their own digests.

Layouts of safetensors, GGUF and ONNX folders were also pushed to a registry by skopeo 1.9 and pulled again by ORAS's
client for Python, file by file the same, and olot 0.1.11, which models both specifications, took them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from qconv import disk_room
from qconv import oci as writing
from qconv.checkpoint import open_checkpoint
from qconv.cli import main
from qconv.serving.oci import media_type_of, size_in_words
from tests.conftest import TINY_LLAMA

# As in schema/*.json of opencontainers/image-spec and schema/config-schema.json of modelpack/model-spec.
DESCRIPTOR: dict[str, Any] = {
    "type": "object",
    "properties": {
        "mediaType": {"type": "string", "pattern": r"^[A-Za-z0-9][\w!#$&^.+-]{0,126}/[A-Za-z0-9][\w!#$&^.+-]{0,126}$"},
        "artifactType": {"type": "string", "const": "application/vnd.cncf.model.manifest.v1+json"},
        "digest": {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"},
        "size": {"type": "integer", "minimum": 0},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
    "required": ["mediaType", "digest", "size"],
    "additionalProperties": False,
}
ANNOTATIONS = DESCRIPTOR["properties"]["annotations"]
INDEX = {
    "properties": {
        "schemaVersion": {"const": 2},
        "mediaType": {"const": "application/vnd.oci.image.index.v1+json"},
        "manifests": {"type": "array", "items": DESCRIPTOR, "minItems": 1, "maxItems": 1},
    },
    "required": ["schemaVersion", "manifests"],
    "additionalProperties": False,
}
MANIFEST = {
    "properties": {
        "schemaVersion": {"const": 2},
        "mediaType": {"const": "application/vnd.oci.image.manifest.v1+json"},
        "artifactType": DESCRIPTOR["properties"]["artifactType"],
        "config": DESCRIPTOR,
        "layers": {"type": "array", "items": DESCRIPTOR, "minItems": 1},
        "annotations": ANNOTATIONS,
    },
    "required": ["schemaVersion", "config", "layers", "artifactType"],
    "additionalProperties": False,
}
TEXT = {"type": "string", "minLength": 1}
CONFIG = {
    "properties": {
        "descriptor": {
            "properties": dict.fromkeys(("name", "family", "description"), TEXT),
            "additionalProperties": False,
        },
        "config": {
            "properties": dict.fromkeys(("architecture", "format", "precision", "quantization"), TEXT)
            | {
                "paramSize": {"type": "string", "pattern": r"^\d+(\.\d)?[KMBTQ]$"},
                "capabilities": {
                    "properties": {key: {"const": ["text"]} for key in ("inputTypes", "outputTypes")},
                    "additionalProperties": False,
                },
            },
            "additionalProperties": False,
        },
        "modelfs": {
            "properties": {
                "type": {"const": "layers"},
                "diffIds": {"type": "array", "items": DESCRIPTOR["properties"]["digest"], "minItems": 1},
            },
            "required": ["type", "diffIds"],
            "additionalProperties": False,
        },
    },
    "required": ["descriptor", "config", "modelfs"],
    "additionalProperties": False,
}  # fmt: skip
WEIGHT, WEIGHT_CONFIG, DOC = (f"application/vnd.cncf.model.{w}.v1.raw" for w in ("weight", "weight.config", "doc"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "my model"
    shutil.copytree(TINY_LLAMA, folder)
    (folder / "README.md").write_text("# A card\n")
    return folder


def pack(model: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    main(["pack", str(model), "--for", "oci", "--device", "cpu", "--json", *words])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["pack", *map(str, words), "--for", "oci", "--device", "cpu"])
    return int(str(caught.value.code)), capsys.readouterr().err


def blob_of(folder: Path, descriptor: dict[str, Any]) -> Path:
    """The file of a descriptor, which must be what the descriptor says."""
    algorithm, _, digits = descriptor["digest"].partition(":")
    file = folder / "blobs" / algorithm / digits
    data = file.read_bytes()
    assert hashlib.new(algorithm, data).hexdigest() == digits
    assert len(data) == descriptor["size"]
    return file


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Manifest and config of a layout in which everything is of its schema and every blob is named by its bytes."""
    assert json.loads((folder / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((folder / "index.json").read_text())
    jsonschema.validate(index, INDEX)
    (named,) = index["manifests"]
    assert named["mediaType"] == MANIFEST["properties"]["mediaType"]["const"]  # type: ignore[index]
    assert named["annotations"] == {"org.opencontainers.image.ref.name": "latest"}
    manifest = json.loads(blob_of(folder, named).read_text())
    jsonschema.validate(manifest, MANIFEST)
    assert manifest["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    config = json.loads(blob_of(folder, manifest["config"]).read_text())
    jsonschema.validate(config, CONFIG)
    assert config["modelfs"]["diffIds"] == [layer["digest"] for layer in manifest["layers"]]
    there = [named, manifest["config"], *manifest["layers"]]
    assert {file.name for file in (folder / "blobs" / "sha256").iterdir()} == {x["digest"][7:] for x in there}
    return manifest, config


def pulled(folder: Path, into: Path) -> Path:
    """What clients make of the layers: ModelPack's by one annotation, ORAS by the other."""
    manifest, _ = read(folder)
    into.mkdir()
    for layer in manifest["layers"]:
        name = layer["annotations"]["org.cncf.model.filepath"]
        assert name == layer["annotations"]["org.opencontainers.image.title"] == Path(name).name
        attributes = json.loads(layer["annotations"]["org.cncf.model.file.metadata+json"])
        assert (attributes["name"], attributes["size"], attributes["mode"]) == (name, layer["size"], 0o644)
        shutil.copyfile(blob_of(folder, layer), into / name)
    return into


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_layout_of_its_schemas_gives_the_model_back(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = pack(model, capsys)
    folder = Path(document["folder"])
    assert folder == tmp_path / "my model-oci"
    manifest, config = read(folder)
    assert contents(pulled(folder, tmp_path / "pulled")) == contents(model)
    kinds = {x["annotations"]["org.opencontainers.image.title"]: x["mediaType"] for x in manifest["layers"]}
    assert {name for name, kind in kinds.items() if kind == WEIGHT} == {"model.safetensors"}
    assert {name for name, kind in kinds.items() if kind == DOC} == {"README.md"}
    assert set(kinds.values()) == {WEIGHT, WEIGHT_CONFIG, DOC}
    assert config["descriptor"]["name"] == "my-model"
    parameters = sum(
        tensor.numel() for tensor in (open_checkpoint(model).read(name) for name in open_checkpoint(model).specs())
    )
    assert config["config"] == {
        "architecture": "transformer",
        "format": "safetensors",
        "paramSize": f"{parameters / 1e6:.1f}M",
        "precision": "bfloat16",
        "capabilities": {"inputTypes": ["text"], "outputTypes": ["text"]},
    }
    page = (folder / "README.md").read_text()
    assert "oras cp --from-oci-layout './my model-oci:latest' REGISTRY/REPOSITORY:TAG" in page
    assert document["manifest"] in page


def test_weights_are_linked_and_small_files_are_not(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = pack(model, capsys)
    blobs = Path(document["folder"]) / "blobs" / "sha256"
    same = {
        layer["file"]: (blobs / layer["digest"][7:]).samefile(model / layer["file"]) for layer in document["layers"]
    }
    assert {name for name, is_same in same.items() if is_same} == {"model.safetensors"}
    assert document["bytes linked"] == (model / "model.safetensors").stat().st_size


def test_files_of_the_hubs_cache_are_followed(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cached = tmp_path / "snapshot"
    cached.mkdir()
    for file in model.iterdir():
        (cached / file.name).symlink_to(file)
    document = pack(cached, capsys)
    assert contents(pulled(Path(document["folder"]), tmp_path / "pulled")) == contents(model)
    assert document["bytes linked"] > 0


def test_a_folder_has_one_digest(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = pack(model, capsys, "--name", "tuned")
    elsewhere = shutil.copytree(model, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    assert pack(elsewhere, capsys, "--name", "tuned")["manifest"] == first["manifest"]
    (elsewhere / "README.md").write_text("# Another card\n")
    assert pack(elsewhere, capsys, "--name", "tuned", "--overwrite")["manifest"] != first["manifest"]


def no_link(*_: Any) -> None:
    raise OSError(errno.EXDEV, "Invalid cross-device link")


def test_on_another_disk_files_are_copied(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", no_link)
    document = pack(model, capsys)
    assert document["bytes linked"] == 0
    read(Path(document["folder"]))
    assert "hard links" not in (Path(document["folder"]) / "README.md").read_text()


def test_a_copy_that_is_not_what_was_hashed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing.shutil, "copyfile", lambda _, place: place.write_bytes(b"something else"))
    code, message = refused(capsys, model)
    assert (code, "changed while it was copied" in message) == (3, True)
    assert [file.name for file in tmp_path.iterdir()] == ["my model"]


def test_no_room_for_copies(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", no_link)
    monkeypatch.setattr(disk_room.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    code, message = refused(capsys, model)
    assert (code, "make room" in message, "linked" in message) == (3, True, True)
    assert [file.name for file in tmp_path.iterdir()] == ["my model"]


def test_what_does_not_belong_to_the_model_stays_behind_and_is_named(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "original").mkdir()
    for name in ("consolidated.safetensors", "pytorch_model.bin", ".gitattributes"):
        (model / name).write_bytes(b"?")
    document = pack(model, capsys)
    assert document["left out"] == [".gitattributes", "consolidated.safetensors", "original/", "pytorch_model.bin"]
    assert "- original/" in (Path(document["folder"]) / "README.md").read_text()
    assert not {layer["file"] for layer in document["layers"]} & set(document["left out"])


def test_what_the_report_says_goes_along(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = hashlib.sha256((model / "config.json").read_bytes()).hexdigest()
    report = {
        "verdict": "fail",
        "fidelity": {"total": {"kl": {"mean": 0.0123}}},
        "provenance": {"candidate": {"config.json": digest, "model.safetensors": "0" * 64}},
    }
    (model / "qconv-report.json").write_text(json.dumps(report))
    document = pack(model, capsys)
    assert document["verdict"] == "fail"
    gates, changed = document["warnings"]
    assert "did not pass its gates" in gates
    assert changed.endswith("by their SHA-256: model.safetensors")
    _, config = read(Path(document["folder"]))
    assert "mean KL divergence 0.0123 nats" in config["descriptor"]["description"]
    (model / "qconv-report.json").write_text("{}")
    assert "cannot be read as a report" in refused(capsys, model, "--overwrite")[1]


def test_gguf_files_in_a_folder_and_alone(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    main(["convert", str(model), "--to", "gguf-q8_0", "-q", "-o", str(tmp_path / "q8")])
    document = pack(tmp_path / "q8", capsys)
    manifest, config = read(Path(document["folder"]))
    assert (config["config"]["format"], config["config"]["quantization"]) == ("gguf", "gguf-q8_0")
    assert manifest["layers"][0]["annotations"]["org.opencontainers.image.title"] == "model-Q8_0.gguf"
    assert {"Modelfile", "config.json"} < {layer["file"] for layer in document["layers"]}
    alone = Path(shutil.copy(tmp_path / "q8" / "model-Q8_0.gguf", tmp_path / "alone.gguf"))
    document = pack(alone, capsys)
    assert [layer["file"] for layer in document["layers"]] == ["alone.gguf"]
    read(Path(document["folder"]))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--tp", "2", "--no-answers"], 2, "--no-answers, --tp: --for oci packs files"),
        (["--context", "512", "--kv-dtype", "fp8"], 2, "--kv-dtype, --context: --for oci"),
        (["--name", "a/b"], 2, "--name has letters"),
        (["--adapter", "x"], 2, "--adapter: --for oci"),
    ],
)
def test_options_of_engines_are_refused(
    words: list[str], code: int, message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, said = refused(capsys, model, *words)
    assert (found, message in said) == (code, True), said


def test_only_packs_are_replaced_and_adapters_are_no_models(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(pack(model, capsys)["folder"])
    assert "exists already" in refused(capsys, model)[1]
    pack(model, capsys, "--overwrite")
    (folder / "qconv-pack.json").unlink()
    assert "--overwrite replaces model folders and packs only" in refused(capsys, model, "--overwrite")[1]
    assert (folder / "index.json").exists()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    code, message = refused(capsys, tmp_path / "adapter")
    assert (code, "is an adapter: merge it" in message) == (2, True)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model-00001-of-00002.safetensors", WEIGHT),
        ("model.onnx.data", WEIGHT),
        ("model.safetensors.index.json", WEIGHT_CONFIG),
        ("tokenizer.model", WEIGHT_CONFIG),
        ("merges.txt", WEIGHT_CONFIG),
        ("qconv-report.json", DOC),
        ("LICENSE.txt", DOC),
        ("notes.txt", None),
        ("pytorch_model.bin", None),
    ],
)
def test_kinds_of_files(name: str, kind: str | None) -> None:
    assert media_type_of(name) == kind


@pytest.mark.parametrize(
    ("number", "words"),
    [(134_515_008, "134.5M"), (8_030_261_248, "8B"), (6_740_000_000, "6.7B"), (1_000_000_000_000, "1T"), (900, "0.9K")],
)
def test_sizes_in_words(number: int, words: str) -> None:
    assert size_in_words(number) == words
