"""What a measurement of the reference depends on, by content: a reference cache is only for the model it was made of.

A fingerprint is a JSON object of parts. Files are known by their SHA-256, so a renamed folder or another machine
changes nothing and a retrained adapter does. What is not in it: library versions and the device, which move
log-probabilities by rounding only; the caller's header says them.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from qconv.checkpoint import INDEX_NAME, open_adapter_files, open_checkpoint, read_json
from qconv.corpus import calibration_digest
from qconv.errors import CheckpointError
from qconv.onnx import GENAI_CONFIG, OnnxCheckpoint
from qconv.records import TRAIN_RECORD_NAME, read_train_record
from qconv.side_files import tokenizer_files
from qconv.stored_tensors import FileCheckpoint

_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_OTHERS = ("generation_config.json", "quantize_config.json", TRAIN_RECORD_NAME)
_NOT_COMPARED = ("source",)  # where text came from; the digest of the tokens says whether it is the same
_THREADS = 4
_BUFFER_BYTES = 1 << 24
_FILE_PARTS = {
    "reference": "the reference's",
    "adapter": "the adapter's",
    "tokenizer": "the tokenizer's",
}
PARTS = ("reference", "adapter", "tokenizer", "chat_template", "training", "evaluation", "tokens")


Digests = Callable[[str], Mapping[str, str]]
"""By the name of a folder: SHA-256 (hex) of its files by theirs."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One thing in which two fingerprints differ: the part (one of `PARTS`) and a clause that names it."""

    part: str
    message: str


def fingerprint(
    reference_folder: str | Path,
    adapter_folder: str | Path | None,
    tokenizer_folder: str | Path,
    evaluation: Mapping[str, Any],
    ids_TS: Tensor,
    digests: Digests | None = None,
) -> dict[str, Any]:
    """Everything that the reference's distributions depend on.

    Args:
        evaluation: JSON values that settle the numbers: ``seq_len``, ``seed``, ``dtype`` (of the computation), and
            ``trained_on`` and ``backend`` (how training saw the base) where the adapter does not record them.
            ``source`` is kept and not compared.
        ids_TS: the evaluated tokens.
        digests: what `file_digests` says of ``"reference"`` and ``"adapter"``, where it was asked before; None = these
            files are hashed here.

    Returns:
        ``{"reference": {file: sha256}, "adapter": {file: sha256} | None, "training": {...}}`` and what
        `candidate_fingerprint` returns, with the adapter's chat template where it brings one.

    Raises:
        CheckpointError: a folder or file is missing or malformed.
    """
    reference = open_checkpoint(reference_folder)
    adapter = None if adapter_folder is None else open_adapter_files(adapter_folder)
    record = None if adapter is None else read_train_record(adapter.folder)
    training = {
        "trained_on": evaluation.get("trained_on", record.trained_on if record else None),
        "backend": evaluation.get("backend", record.backend if record else None),
    }

    def known_or_hashed(name: str, files: Iterable[Path]) -> dict[str, str]:
        if digests is None:
            return _hash_files(files)
        known = digests(name)
        return {file.name: known[file.name] for file in files}

    templates = [Path(tokenizer_folder), reference.folder]
    if adapter is not None:
        templates.insert(0, adapter.folder)
    return {
        "reference": known_or_hashed("reference", _model_files(reference)),
        "adapter": None if adapter is None else known_or_hashed("adapter", _adapter_files(adapter)),
        "training": training,
        **candidate_fingerprint(tokenizer_folder, evaluation, ids_TS, templates),
    }


def candidate_fingerprint(
    tokenizer_folder: str | Path,
    evaluation: Mapping[str, Any],
    ids_TS: Tensor,
    template_folders: Iterable[str | Path] | None = None,
) -> dict[str, Any]:
    """The parts that can be told where only the candidate is: tokenizer, chat template, evaluation and tokens.

    Args:
        template_folders: where to look for a chat template; None = the tokenizer's folder.
    """
    folder = Path(tokenizer_folder)
    names = [file for file in tokenizer_files(folder) if file.name not in _TEMPLATES]
    if not names:
        raise CheckpointError(f"{folder}: has no tokenizer; copy the tokenizer files of the base model there")
    return {
        "tokenizer": _hash_files(names),
        "chat_template": _template_digest([folder] if template_folders is None else template_folders),
        "evaluation": {key: value for key, value in evaluation.items() if key not in ("trained_on", "backend")},
        "tokens": {"shape": list(ids_TS.shape), "sha256": calibration_digest(ids_TS)},
    }


def file_digests(
    folder: str | Path, stop: threading.Event | None = None, known: Mapping[str, str] | None = None
) -> dict[str, str]:
    """SHA-256 (hex) of every file of a model or adapter folder that a reader of it uses, by file name.

    Args:
        stop: given up as soon as this is set.
        known: digests by file name that were made while the files were written; these are not read again.

    Raises:
        CheckpointError: neither a model nor an adapter folder, a malformed one, or given up.
    """
    folder = Path(folder)
    is_adapter = (folder / "adapter_config.json").is_file()
    files = _adapter_files(open_adapter_files(folder)) if is_adapter else _model_files(open_checkpoint(folder))
    others = [folder / name for name in _OTHERS if (folder / name).is_file()]
    digests = dict(known or {})
    names = [*files, *tokenizer_files(folder), *others]
    digests |= _hash_files([file for file in names if file.name not in digests], stop)
    return {file.name: digests[file.name] for file in names}


def check_fingerprint(expected: Mapping[str, Any], found: Mapping[str, Any], skip: Collection[str] = ()) -> None:
    """Refuses a cache of something else.

    Args:
        expected: the fingerprint of the cache.
        found: of what is there now; parts that it lacks (see `candidate_fingerprint`) are not compared.
        skip: further parts that are not compared.

    Raises:
        CheckpointError: the two differ; names in what.
    """
    wrong = [difference for difference in differences(expected, found) if difference.part not in skip]
    if wrong:
        raise CheckpointError(
            f"the reference cache was made of something else: {'; '.join(one.message for one in wrong)}. "
            "Validate against the reference model, or write the cache again"
        )


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[Difference]:
    """In what two fingerprints differ, as clauses; parts that ``found`` lacks are not compared."""
    result = []
    for part in [name for name in PARTS if name in found]:
        if part not in expected:
            clauses = [f"the cache does not say what {part.replace('_', ' ')} it was made with"]
        elif part in _FILE_PARTS:
            clauses = _file_clauses(part, expected[part], found[part])
        elif part in ("training", "evaluation"):
            clauses = _value_clauses(part, expected[part], found[part])
        elif expected[part] != found[part]:
            clauses = [_digest_clause(part, expected[part], found[part])]
        else:
            clauses = []
        result += [Difference(part=part, message=clause) for clause in clauses]
    return result


def _file_clauses(part: str, expected: Mapping[str, str] | None, found: Mapping[str, str] | None) -> list[str]:
    if expected is None or found is None:
        if expected is found:
            return []
        return ["the cache is of an adapter, now there is none" if found is None else "the cache is of no adapter"]
    lost, new = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    clauses = [f"{_owner(part, name)} differ: {name} is missing" for name in lost]
    clauses += [f"{_owner(part, name)} differ: {name} was not there" for name in new]
    common = sorted(expected.keys() & found.keys())
    return clauses + [f"{_owner(part, name)} differ: {name}" for name in common if expected[name] != found[name]]


def _owner(part: str, file_name: str) -> str:
    is_weights = file_name.endswith(".safetensors") or file_name == INDEX_NAME
    what = "weights" if is_weights else "files" if part == "tokenizer" else "settings"
    return f"{_FILE_PARTS[part]} {what}"


def _value_clauses(part: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    names = sorted((expected.keys() | found.keys()) - set(_NOT_COMPARED))
    label = "how training saw the base" if part == "training" else "the evaluation"
    return [
        f"{label} differs: {name} was {expected.get(name)!r}, is {found.get(name)!r}"
        for name in names
        if expected.get(name) != found.get(name)
    ]


def _digest_clause(part: str, expected: Any, found: Any) -> str:
    if part == "chat_template":
        if expected is None or found is None:
            return f"the chat template differs: {'there was none' if expected is None else 'there is none now'}"
        return "the chat template differs"
    return (
        f"the evaluated tokens differ: {_rows(expected)} then, {_rows(found)} now, of other text or another tokenizer"
    )


def _rows(tokens: Mapping[str, Any]) -> str:
    return " x ".join(map(str, tokens["shape"]))


def _model_files(checkpoint: FileCheckpoint) -> list[Path]:
    """config.json, the index where there is one, and the shards that are read (not other weights beside them)."""
    shards = {checkpoint.file_of(name) for name in checkpoint.specs()}
    names = [checkpoint.folder / name for name in ("config.json", INDEX_NAME)]
    if isinstance(checkpoint, OnnxCheckpoint):
        shards |= {checkpoint.graph_file, checkpoint.folder / GENAI_CONFIG}
    return [file for file in names if file.is_file()] + sorted(shards)


def _adapter_files(adapter: FileCheckpoint) -> list[Path]:
    return [adapter.folder / "adapter_config.json", *sorted({adapter.file_of(name) for name in adapter.specs()})]


def _template_digest(folders: Iterable[str | Path]) -> str | None:
    """SHA-256 of the text of the first chat template, whichever of the three places it lies in."""
    for folder in map(Path, folders):
        if (folder / _TEMPLATES[0]).is_file():
            return _sha256(folder / _TEMPLATES[0])
        for name in (_TEMPLATES[1], "tokenizer_config.json"):
            template = read_json(folder / name, "").get("chat_template") if (folder / name).is_file() else None
            if template is not None:
                text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
                return hashlib.sha256(text.encode()).hexdigest()
    return None


def _hash_files(files: Iterable[Path], stop: threading.Event | None = None) -> dict[str, str]:
    """Digests by file name; files are hashed side by side, which hashlib allows outside the interpreter's lock."""
    paths = list(files)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        digests = pool.map(partial(_sha256, stop=stop), paths)
        return dict(zip([path.name for path in paths], digests, strict=True))


def _sha256(file: Path, stop: threading.Event | None = None) -> str:
    try:
        digest = hashlib.sha256()
        # Large pieces: each hand-over of the interpreter lock can hold up the thread that does the work.
        buffer = bytearray(_BUFFER_BYTES)
        with open(file, "rb", buffering=0) as handle:
            while size := handle.readinto(buffer):
                if stop is not None and stop.is_set():
                    raise CheckpointError(f"{file}: reading it was given up")
                digest.update(memoryview(buffer)[:size])
        return digest.hexdigest()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
