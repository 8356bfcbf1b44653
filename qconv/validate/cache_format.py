"""The file of a reference cache: layout, digest, writing it whole, and every check of one that is read.

The layout is described in `cache`. Readers get a file that is complete, unchanged since it was written, consistent in
itself and made of numbers, or an error.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from qconv.checkpoint import parse_json_object
from qconv.errors import CheckpointError, NumericsError
from qconv.validate.cached_row import MASS_TOLERANCE, TOP
from qconv.work_folder import disk_error

FORMAT = 1
_METADATA = "qconv_reference_cache"
_NO_DIGEST = "0" * 64
_AGAIN = "write the cache again, or fetch it again from where it was written"
_FLOATS = {
    "target_logp": np.dtype("float32"),
    "log_tail": np.dtype("float64"),
    "top_logp": np.dtype("float32"),
    "sample_logp": np.dtype("float32"),
}
Arrays = dict[str, np.ndarray[Any, Any]]


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("uint16") if vocab_size <= 1 << 16 else np.dtype("int32")


def write_cache(path: Path, content: Mapping[str, Any], arrays: Arrays) -> None:
    """Writes metadata and tensors with their digest, complete or not at all.

    Raises:
        CheckpointError: the file cannot be written.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    unsigned = {"format": FORMAT, **content, "sha256": _NO_DIGEST}
    text = json.dumps(unsigned, sort_keys=True, allow_nan=False)
    digest = _digest(text, arrays)
    _write_atomically(path, save(arrays, {_METADATA: text.replace(_NO_DIGEST, digest)}))


def read_cache(path: Path) -> tuple[dict[str, Any], Arrays]:
    """Metadata and tensors of a file, checked.

    Raises:
        CheckpointError: no such file, truncated, damaged, of another format, or inconsistent.
        NumericsError: NaN, infinity, or values that are no log-probabilities.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read as a reference cache ({error.strerror})") from error
    content, text = _read_metadata(path, data)
    try:
        arrays = load(data)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: truncated or damaged ({error}); {_AGAIN}") from error
    found = str(content.get("sha256"))
    if len(found) != len(_NO_DIGEST) or found != _digest(text.replace(found, _NO_DIGEST), arrays):
        raise CheckpointError(f"{path}: its content does not match its SHA-256: it was damaged or edited; {_AGAIN}")
    _check_shapes(path, content, arrays)
    _check_values(path, content["settings"], arrays)
    return content, arrays


def _digest(text: str, arrays: Arrays) -> str:
    """SHA-256 (hex) over the metadata with zeros for the digest, and name, dtype, shape and bytes of every tensor."""
    digest = hashlib.sha256(text.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"\0{name} {array.dtype.str} {array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _write_atomically(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


def _read_metadata(path: Path, data: bytes) -> tuple[dict[str, Any], str]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise CheckpointError(f"{path}: not a safetensors file, or truncated ({len(data)} bytes); {_AGAIN}")
    metadata = parse_json_object(data[8 : 8 + length], str(path)).get("__metadata__")
    text = metadata.get(_METADATA) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise CheckpointError(f"{path}: a safetensors file, but not a reference cache of qconv")
    content = parse_json_object(text, f"{path}, metadata")
    if type(content.get("format")) is not int or content["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: expected a reference cache of format {FORMAT}, found {content.get('format')!r}; "
            "write it again with this version of qconv"
        )
    return content, text


def _check_shapes(path: Path, content: Mapping[str, Any], arrays: Arrays) -> None:
    """That the tensors are those of the settings; a digest that matches does not make them so."""
    settings = content.get("settings")
    keys = ("top_k", "samples", "seed", "vocab_size")
    parts = all(isinstance(content.get(name), dict) for name in ("header", "fingerprint", "storage"))
    if not parts or not isinstance(settings, dict) or any(type(settings.get(key)) is not int for key in keys):
        raise CheckpointError(f"{path}: the metadata of the reference cache is incomplete; {_AGAIN}")
    shape: tuple[int, ...] = arrays["ids"].shape if "ids" in arrays else ()
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 2:
        raise CheckpointError(f"{path}: expected rows of two or more tokens, found ids of shape {shape}; {_AGAIN}")
    size, k, samples = settings["vocab_size"], settings["top_k"], settings["samples"]
    positions, ids = shape[0] * (shape[1] - 1), id_dtype(size)
    expected = {
        "ids": (np.dtype("int32"), shape),
        "documents": (np.dtype("int32"), shape),
        "target_logp": (_FLOATS["target_logp"], (positions,)),
        "log_tail": (_FLOATS["log_tail"], (positions,)),
        "top_ids": (ids, (positions, k)),
        "top_logp": (_FLOATS["top_logp"], (positions, k)),
        "sample_ids": (ids, (positions, samples)),
        "sample_logp": (_FLOATS["sample_logp"], (positions, samples)),
    }
    for name in sorted(expected.keys() | arrays.keys()):
        found = (arrays[name].dtype, arrays[name].shape) if name in arrays else None
        if found != expected.get(name):
            raise CheckpointError(f"{path}: tensor {name!r}: expected {expected.get(name)}, found {found}; {_AGAIN}")
    if not min(TOP, size) <= k <= size:
        raise CheckpointError(f"{path}: {k} top tokens of a vocabulary of {size}; {_AGAIN}")


def _check_values(path: Path, settings: Mapping[str, int], arrays: Arrays) -> None:
    for name in ("ids", "top_ids", "sample_ids"):
        array = arrays[name]
        if array.size and not (array.min() >= 0 and array.max() < settings["vocab_size"]):
            raise CheckpointError(f"{path}: tensor {name!r} has tokens outside the vocabulary; {_AGAIN}")
    whole = settings["top_k"] == settings["vocab_size"]
    for name in _FLOATS:
        array = arrays[name]
        good = np.isneginf(array) if whole and name == "log_tail" else np.isfinite(array)
        if not good.all():
            raise NumericsError(f"{path}: tensor {name!r} has {int((~good).sum())} values that are no number; {_AGAIN}")
    mass = np.exp(arrays["top_logp"].astype(np.float64)).sum(-1) + np.exp(arrays["log_tail"])
    if not (np.abs(mass - 1) < 2 * MASS_TOLERANCE).all():
        raise NumericsError(f"{path}: probabilities sum to {mass[np.abs(mass - 1).argmax()]:.4g}; {_AGAIN}")
