"""A model as an OCI artifact: config, manifest and index in the words of CNCF's ModelPack. Touches no disk.

Sources: https://github.com/modelpack/model-spec, docs/spec.md (media types), docs/config.md and
schema/config-schema.json, docs/annotations.md; https://github.com/opencontainers/image-spec, image-layout.md,
manifest.md, annotations.md (``image.title`` is the name that ORAS gives a file that it pulls).

Every file is a layer of its own, as it is (``raw``): nothing to unpack where it is served. A manifest depends on the
files alone, times and owners are constants, so a folder has one digest wherever it is packed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

TAG = "latest"
LAYOUT_FILE, INDEX_FILE, BLOBS = "oci-layout", "index.json", "blobs/sha256"
LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
ARTIFACT = "application/vnd.cncf.model.manifest.v1+json"
CONFIG = "application/vnd.cncf.model.config.v1+json"
WEIGHT = "application/vnd.cncf.model.weight.v1.raw"
WEIGHT_CONFIG = "application/vnd.cncf.model.weight.config.v1.raw"
DOC = "application/vnd.cncf.model.doc.v1.raw"
_KINDS = (
    (WEIGHT, ("*.safetensors", "*.gguf", "*.onnx", "*.onnx.data")),
    (DOC, ("*.md", "LICENSE*", "NOTICE*", "USE_POLICY*", "qconv-report.*")),
    (WEIGHT_CONFIG, ("*.json", "*.jinja", "*.model", "vocab.txt", "merges.txt", "Modelfile", "*.imatrix")),
)  # the first that matches counts
_NO_TIME = "1970-01-01T00:00:00Z"


@dataclass(frozen=True, kw_only=True)
class Blob:
    """Attributes:
    name: of the file; empty = it is none of the model's.
    digest: SHA-256 of its bytes, in hexadecimal digits.
    """

    name: str = ""
    media_type: str
    digest: str
    size: int

    @staticmethod
    def of(media_type: str, data: bytes) -> Blob:
        return Blob(media_type=media_type, digest=hashlib.sha256(data).hexdigest(), size=len(data))

    def descriptor(self) -> dict[str, Any]:
        return {"mediaType": self.media_type, "digest": f"sha256:{self.digest}", "size": self.size}


def media_type_of(name: str) -> str | None:
    """What a file is to those who pull it; None = nothing that a model needs."""
    return next((kind for kind, patterns in _KINDS if any(fnmatchcase(name, p) for p in patterns)), None)


def in_order(blobs: Sequence[Blob]) -> list[Blob]:
    """Weights, what belongs to them, documents."""
    rank = [WEIGHT, WEIGHT_CONFIG, DOC]
    return sorted(blobs, key=lambda blob: (rank.index(blob.media_type), blob.name))


def model_config(descriptor: Mapping[str, Any], config: Mapping[str, Any], layers: Sequence[Blob]) -> bytes:
    """The artifact's config; raw layers are their own uncompressed content."""
    text = {"inputTypes": ["text"], "outputTypes": ["text"]}
    return _json(
        {
            "descriptor": dict(descriptor),
            "config": {"architecture": "transformer", **config, "capabilities": text},
            "modelfs": {"type": "layers", "diffIds": [f"sha256:{layer.digest}" for layer in layers]},
        }
    )


def manifest(config: Blob, layers: Sequence[Blob], annotations: Mapping[str, str]) -> bytes:
    return _json(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": ARTIFACT,
            "config": config.descriptor(),
            "layers": [_layer(layer) for layer in layers],
            "annotations": dict(annotations),
        }
    )


def index(of: Blob) -> bytes:
    """``index.json``: the manifest under the tag `TAG`."""
    named = {"artifactType": ARTIFACT, "annotations": {"org.opencontainers.image.ref.name": TAG}}
    return _json({"schemaVersion": 2, "mediaType": INDEX, "manifests": [of.descriptor() | named]})


def _layer(blob: Blob) -> dict[str, Any]:
    attributes = {"name": blob.name, "mode": 0o644, "uid": 0, "gid": 0, "size": blob.size, "mtime": _NO_TIME}
    annotations = {
        "org.cncf.model.filepath": blob.name,
        "org.cncf.model.file.metadata+json": json.dumps({**attributes, "typeflag": 0}),
        "org.opencontainers.image.title": blob.name,
    }
    return blob.descriptor() | {"annotations": annotations}


def size_in_words(num_parameters: int) -> str:
    """Such as 6.7B: a number with one digit after the point at most, and K, M, B, T or Q."""
    factor, letter = next(
        (pair for pair in zip((1e15, 1e12, 1e9, 1e6), "QTBM", strict=True) if num_parameters >= pair[0]), (1e3, "K")
    )
    return f"{num_parameters / factor:.1f}".removesuffix(".0") + letter


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, indent=2).encode()
