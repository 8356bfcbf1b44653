"""Writes an OCI image layout of a model folder: blobs by their SHA-256, without a second copy of the weights.

Weights are hard links to the model's own files where the disk allows it, and copies that are hashed again where it does
not; small files are copied, so that an editor does not change a blob. What readers of containers see is in
`serving/oci.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconv import __version__
from qconv.checkpoint import open_checkpoint
from qconv.convert import DequantizedCheckpoint, dequantize
from qconv.disk_room import rooms_for
from qconv.errors import CheckpointError, UsageError
from qconv.pack_place import PACK_FORMAT, Packed, place_of_pack
from qconv.progress import QUIET, Progress
from qconv.report.document import JSON_NAME
from qconv.serving import oci
from qconv.serving_config import OciConfig, name_of_model
from qconv.side_files import is_adapter
from qconv.stored_tensors import FileCheckpoint
from qconv.work_folder import PACK_SIGN, publishing

SOURCES = (
    "https://github.com/modelpack/model-spec",
    "https://github.com/opencontainers/image-spec/blob/main/image-layout.md",
    "https://oras.land/docs/commands/oras_cp",
)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """Files of a model, and names of those that stay behind."""

    files: Sequence[Path]
    left_out: Sequence[str]


def pack_oci(config: OciConfig, progress: Progress = QUIET) -> Packed:
    """Writes the layout, complete or not at all.

    Raises:
        UsageError: an adapter in the model's place.
        CheckpointError: the model cannot be read, the layout cannot be written, or a copy is not what was hashed.
    """
    if Path(config.model).is_dir() and is_adapter(Path(config.model)):
        raise UsageError(f"{config.model} is an adapter: merge it, or push it with --push-to-hub")
    source = open_checkpoint(config.model)
    view = dequantize(source)
    found = _found(source)
    out = place_of_pack(config.out, config.model, "oci", config.overwrite, [config.model, source.folder])
    report = _report(source.folder)
    num_bytes = sum(file.stat().st_size for file in found.files)
    progress.say(f"hashing {len(found.files)} files, {num_bytes / 1e6:,.1f} MB")
    layers = oci.in_order([_blob(file) for file in found.files])
    warnings = _warnings(report, layers)
    for line in warnings:
        progress.say(f"warning: {line}")
    name = config.name or name_of_model(config.model)
    with publishing(out, config.overwrite) as partial:
        blobs = partial / oci.BLOBS
        blobs.mkdir(parents=True)
        linked = _store(found.files, layers, blobs)
        made = _describe(blobs, name, source, view, report, layers)
        (partial / oci.INDEX_FILE).write_bytes(oci.index(made))
        (partial / oci.LAYOUT_FILE).write_bytes(oci.LAYOUT)
        document = {
            "format": PACK_FORMAT,
            "tool": f"qconv {__version__}",
            "command": "pack",
            "engine": "oci",
            "model": str(source.location),
            "name": name,
            "layout": view.kind,
            "verdict": report.get("verdict"),
            "manifest": f"sha256:{made.digest}",
            "layers": [{"file": b.name, "type": b.media_type, "digest": f"sha256:{b.digest}"} for b in layers],
            "bytes": num_bytes,
            "bytes linked": linked,
            "left out": list(found.left_out),
            "warnings": warnings,
            "sources": list(SOURCES),
        }
        (partial / PACK_SIGN).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(_read_me(out, document), encoding="utf-8")
    return Packed(out=out, document=document)


def _found(source: FileCheckpoint) -> _Found:
    """All that belongs to the model: of weights those that its tensors lie in, or the whole graph."""
    if source.folder.is_file():
        return _Found(files=[source.folder], left_out=())
    used = {source.file_of(name).name for name in source.specs()}
    files, left_out = [], []
    for file in sorted(source.folder.iterdir()):
        kind = oci.media_type_of(file.name) if file.is_file() else None
        is_stray = kind == oci.WEIGHT and file.suffix in (".safetensors", ".gguf") and file.name not in used
        if kind is None or is_stray:
            left_out.append(file.name + ("/" if file.is_dir() else ""))
        else:
            files.append(file)
    return _Found(files=files, left_out=left_out)


def _report(folder: Path) -> dict[str, Any]:
    """The report in a folder; empty where there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    file = folder / JSON_NAME
    if not file.is_file():
        return {}
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        report["verdict"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: cannot be read as a report ({type(error).__name__}: {error})") from error
    return dict(report)


def _blob(file: Path) -> oci.Blob:
    kind = oci.media_type_of(file.name)
    assert kind is not None  # the others were left out
    return oci.Blob(name=file.name, media_type=kind, digest=_digest(file), size=file.stat().st_size)


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from error


def _warnings(report: dict[str, Any], layers: Sequence[oci.Blob]) -> list[str]:
    found = []
    if report.get("verdict") in ("fail", "inconclusive"):
        found.append(f"the report in this folder ends with '{report['verdict']}': it did not pass its gates")
    judged = (report.get("provenance") or {}).get("candidate") or {}
    changed = [layer.name for layer in layers if judged.get(layer.name, layer.digest) != layer.digest]
    if changed:
        found.append(f"not the files that the report in this folder is about, by their SHA-256: {', '.join(changed)}")
    return found


def _store(files: Sequence[Path], layers: Sequence[oci.Blob], blobs: Path) -> int:
    """Puts every file there under its digest; returns the bytes of those that are links."""
    by_name = {file.name: file.resolve() for file in files}  # in the hub's cache they are links themselves
    linked, left = 0, []
    for layer in layers:
        place = blobs / layer.digest
        if not place.exists() and layer.media_type == oci.WEIGHT and _link(by_name[layer.name], place):
            linked += layer.size
        elif not place.exists():
            left.append(layer)
    _check_room(blobs, sum(layer.size for layer in left))
    for layer in left:
        place = blobs / layer.digest
        shutil.copyfile(by_name[layer.name], place)
        if _digest(place) != layer.digest:
            raise CheckpointError(f"{by_name[layer.name]}: changed while it was copied; pack again when it is finished")
    return linked


def _link(file: Path, place: Path) -> bool:
    """False where the disk, or the rights to the file, allow no hard link."""
    try:
        os.link(file, place)
    except OSError:
        return False
    return True


def _check_room(folder: Path, num_bytes: int) -> None:
    for room in rooms_for({folder / "copies": num_bytes}):
        if room.complaint is not None:
            raise CheckpointError(f"{room.complaint} (weights on the same disk take no room: they are linked)")


def _describe(
    blobs: Path,
    name: str,
    source: FileCheckpoint,
    view: DequantizedCheckpoint,
    report: dict[str, Any],
    layers: Sequence[oci.Blob],
) -> oci.Blob:
    """Writes config and manifest; gives the latter."""
    descriptor = {"name": name, "description": _in_words(view, report)}
    if source.config.get("model_type"):
        descriptor["family"] = str(source.config["model_type"])
    facts = {
        "format": "onnx"
        if view.kind.startswith("onnx")
        else "gguf"
        if view.kind.startswith("gguf-")
        else "safetensors",
        "paramSize": oci.size_in_words(sum(math.prod(spec.shape) for spec in view.specs().values())),
        "precision": ",".join(_precisions(source, view)),
        **({"quantization": view.kind} if view.quantized_modules else {}),
    }
    data = oci.model_config(descriptor, facts, layers)
    config = oci.Blob.of(oci.CONFIG, data)
    (blobs / config.digest).write_bytes(data)
    title = {"org.opencontainers.image.title": name, "org.opencontainers.image.description": descriptor["description"]}
    data = oci.manifest(config, layers, title)
    made = oci.Blob.of(oci.MANIFEST, data)
    (blobs / made.digest).write_bytes(data)
    return made


def _precisions(source: FileCheckpoint, view: DequantizedCheckpoint) -> list[str]:
    """That linears are computed in, as the specification spells them."""
    found = [str(source.config.get("dtype") or source.config.get("torch_dtype")).removeprefix("torch.")]
    for scheme in view.schemes.values():
        if scheme.rounds_activations and not scheme.is_fp4:
            found.append("float8_e4m3" if scheme.kind == "float" or scheme.float8_activations else "int8")
    return list(dict.fromkeys(found))


def _in_words(view: DequantizedCheckpoint, report: dict[str, Any]) -> str:
    words = [f"stored as {view.kind}"]
    kl = ((((report.get("fidelity") or {}).get("total") or {}).get("kl")) or {}).get("mean")
    if isinstance(kl, float):
        words.append(f"mean KL divergence {kl:.3g} nats per token from its reference ({JSON_NAME})")
    if report:
        words.append(f"verdict: {report['verdict']}")
    return "; ".join([*words, f"packed by qconv {__version__}"])


def _read_me(out: Path, document: dict[str, Any]) -> str:
    here = shlex.quote(f"./{out.name}:{oci.TAG}")
    lines = [
        f"# {document['name']} as an OCI artifact",
        "",
        "An OCI image layout in the model format of CNCF's ModelPack: each file of the model is a layer, as it is. "
        f"`{document['manifest']}` is its manifest, tagged `{oci.TAG}` here.",
        "",
        "## Push it",
        "",
        "From the folder that this one lies in, with ORAS or skopeo:",
        "",
        f"    oras cp --from-oci-layout {here} REGISTRY/REPOSITORY:TAG",
        f"    skopeo copy {shlex.quote(f'oci:./{out.name}:{oci.TAG}')} docker://REGISTRY/REPOSITORY:TAG",
        "",
        "## Pull it",
        "",
        "    oras pull REGISTRY/REPOSITORY:TAG -o ./model",
        "    modctl pull REGISTRY/REPOSITORY:TAG --extract-from-remote --extract-dir ./model",
        "",
        "The folder is the model again, every file under its name.",
        "",
        "## Check it",
        "",
        "Blobs are called after their SHA-256:",
        "",
        '    cd blobs/sha256 && for blob in *; do echo "$blob  $blob"; done | sha256sum -c --quiet',
        "",
        "## What is in it",
        "",
        "| file | type | digest |",
        "|---|---|---|",
        *(f"| `{x['file']}` | `{x['type']}` | `{x['digest']}` |" for x in document["layers"]),
    ]
    if document["bytes linked"]:
        lines += ["", "Weights here are hard links to the model's own files: change neither in place."]
    for title, texts in (("Warnings", document["warnings"]), ("Left out", document["left out"])):
        lines += ["", f"## {title}", "", *(f"- {text}" for text in texts)] if texts else []
    lines += ["", "## Sources", "", *(f"- <{source}>" for source in document["sources"])]
    return "\n".join([*lines, "", f"Made with qconv {__version__}."]) + "\n"
