"""Reading model and adapter folders: safetensors (or one GGUF file, or ONNX), lazily, one tensor at a time.

The header is parsed here because the reader of the safetensors library accepts duplicate keys, and an index may point
anywhere (format: https://github.com/huggingface/safetensors#format). Pickled weights are never opened.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import torch

from qconv.config import HUB_ID
from qconv.errors import CheckpointError
from qconv.gguf import open_gguf
from qconv.onnx import GENAI_CONFIG, is_onnx_folder, open_onnx
from qconv.side_files import LQ_LORA_MODEL
from qconv.stored_tensors import FileCheckpoint
from qconv.suggest import did_you_mean_path
from qconv.types import TensorSpec

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Where AutoGPTQ and AutoAWQ put what newer tools write to config.json, with the method that each stands for.
_QUANTIZATION_FILES = (("quantize_config.json", "gptq"), ("quant_config.json", "awq"))
SIDE_PATTERNS = ("*.json", "*.model", "*.jinja", "*.txt", "LICENSE*", "NOTICE*")
HUB_PATTERNS = ("*.safetensors", *SIDE_PATTERNS)


class SafetensorsCheckpoint(FileCheckpoint):
    """A `Checkpoint` over the safetensors files of one local folder.

    Args:
        folder: local folder.
        config: parsed ``config.json`` or ``adapter_config.json``.
        files: the shards, in order.
        index: tensor name -> shard file name, when the folder has an index.

    Raises:
        CheckpointError: a shard is malformed, or index and shards disagree.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], files: list[Path], index: Mapping[str, str] | None):
        super().__init__(folder, config)
        for file in files:
            for spec, offset in _read_header(file):
                if spec.name in self._specs:
                    other = self._places[spec.name][0].name
                    raise CheckpointError(
                        f"{file}: tensor {spec.name!r} is also in {other}; a tensor lies in one shard"
                    )
                self._specs[spec.name] = spec
                self._places[spec.name] = (file, offset)
        if index is not None:
            self._check_index(index)

    def _check_index(self, index: Mapping[str, str]) -> None:
        for name, file_name in index.items():
            if name not in self._places or self._places[name][0].name != file_name:
                raise CheckpointError(
                    f"{self.folder / INDEX_NAME}: says that {name!r} is in {file_name}, but it is not there; "
                    "a shard is missing, stale or from another model: fetch the folder again"
                )
        spare = sorted(self._specs.keys() - index.keys())
        if spare:
            raise CheckpointError(
                f"{self.folder / INDEX_NAME}: {len(spare)} tensors of the shards are not in the index, "
                f"first {spare[0]!r}; the index is stale: fetch or save the folder again"
            )


def open_checkpoint(source: str | Path, revision: str | None = None) -> FileCheckpoint:
    """Opens a model by local folder, GGUF file or hub id (``org/name``), reading headers only.

    Raises:
        CheckpointError: no such folder or hub model, no config.json, no weights, a malformed or missing shard, or an
            index that leaves the folder.
    """
    if Path(source).suffix == ".gguf" and Path(source).is_file():  # a file of another name is refused below
        return open_gguf(Path(source), Path(source))
    folder = resolve_folder(source, revision)
    packed = sorted(folder.glob("*.gguf"))
    if len(packed) == 1 and not any(folder.glob("*.safetensors")):
        return open_gguf(packed[0], folder)
    config = read_json(folder / "config.json", "a model folder has a config.json")
    if is_onnx_folder(folder) and not any(folder.glob("*.safetensors")):
        return open_onnx(folder, config, read_json(folder / GENAI_CONFIG, ""))
    checkpoint = _open_weights(folder, config)
    if "quantization_config" not in config and any(name.endswith(".qweight") for name in checkpoint.specs()):
        _add_quantization(config, folder)
    if not config.get("dtype") and not config.get("torch_dtype"):
        config["dtype"] = _common_dtype(checkpoint)
    return checkpoint


def _add_quantization(config: dict[str, Any], folder: Path) -> None:
    for name, method in _QUANTIZATION_FILES:
        if (folder / name).is_file():
            config["quantization_config"] = {"quant_method": method} | read_json(folder / name, "")
            return


def _common_dtype(checkpoint: SafetensorsCheckpoint) -> str:
    """The floating-point dtype of most elements, for a config.json that does not name one."""
    counts = Counter[torch.dtype]()
    for spec in checkpoint.specs().values():
        if spec.dtype in (torch.float32, torch.float16, torch.bfloat16):
            counts[spec.dtype] += prod(spec.shape)
    return str(counts.most_common(1)[0][0] if counts else torch.bfloat16).removeprefix("torch.")


def _open_weights(folder: Path, config: dict[str, Any]) -> SafetensorsCheckpoint:
    index_file = folder / INDEX_NAME
    if index_file.exists():
        weight_map = read_json(index_file, "").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index_file}: expected a non-empty object under 'weight_map'")
        return SafetensorsCheckpoint(folder, config, _index_files(index_file, weight_map), weight_map)
    single = folder / "model.safetensors"
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        _refuse_files(folder, files, "model.safetensors, or shards with " + INDEX_NAME)
    return SafetensorsCheckpoint(folder, config, files, None)


def open_adapter_files(source: str | Path, revision: str | None = None) -> SafetensorsCheckpoint:
    """Opens the files of a PEFT adapter (``adapter_config.json``, ``adapter_model.safetensors``).

    Raises:
        CheckpointError: the folder or one of the two files is missing or malformed.
    """
    folder = resolve_folder(source, revision)
    config = read_json(folder / "adapter_config.json", "a PEFT adapter folder has an adapter_config.json")
    refuse_decomposed_base(folder)
    if "peft_type" not in config and {"config", "model_class"} <= config.keys():
        raise CheckpointError(
            f"{folder}: an adapter of the adapters library (AdapterHub), and not of peft. Its bottleneck adapters are "
            "nonlinear networks behind the layers, which no fixed weight equals: serve it with that library, or train "
            "with LoRA. A LoRA of that library: merge it there (merge_adapter), then give the model to qconv quantize"
        )
    file = folder / "adapter_model.safetensors"
    if not file.exists():
        _refuse_files(folder, [], "adapter_model.safetensors")
    return SafetensorsCheckpoint(folder, config, [file], None)


def refuse_decomposed_base(folder: Path) -> None:
    """Raises `CheckpointError` for what LQ-LoRA saves: its adapter looks like any LoRA, and belongs to another base."""
    if (folder / LQ_LORA_MODEL).exists():
        raise CheckpointError(
            f"{folder}: holds {LQ_LORA_MODEL}, in which LQ-LoRA pickles the base that it decomposed; merged into the "
            f"original weights its adapter is wrong. qconv convert {folder} --to safetensors -o OUT makes OUT/base and "
            "OUT/adapter of it, for one another"
        )


def resolve_folder(source: str | Path, revision: str | None = None, patterns: Sequence[str] = HUB_PATTERNS) -> Path:
    """The local folder of a path or hub id; a hub id's files are downloaded to (or found in) the hub cache."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder}: expected a folder or a hub id (org/name), found a file")
    if not HUB_ID.fullmatch(str(source)):
        hint = did_you_mean_path(folder)
        raise CheckpointError(f"{source}: no such folder, and not a hub id of the form org/name{hint}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=list(patterns)))
    except Exception as error:
        raise CheckpointError(
            f"{source}: no such local folder, and the hub did not deliver it ({type(error).__name__}: {error}); "
            f"check the spelling, the network, and HF_TOKEN for gated models{did_you_mean_path(folder)}"
        ) from error


def read_json(file: Path, why: str) -> dict[str, Any]:
    """Parses a JSON object, refusing duplicate keys and NaN."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{file}: not found; {why}{_what_is_there(file)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read as text ({error})") from error
    return parse_json_object(text, str(file))


def _what_is_there(file: Path) -> str:
    """What somebody may have meant who named a folder without this file."""
    folder = file.parent
    if file.name == "config.json" and (folder / "adapter_config.json").is_file():
        return f", and {folder} is an adapter"
    if file.name == "adapter_config.json" and (folder / "config.json").is_file():
        return f", and {folder} is a model"
    models = sorted(found.parent.name for found in folder.glob("*/config.json")) if file.name == "config.json" else []
    return f"; {', '.join(models[:8])} in {folder} {'has' if len(models) == 1 else 'have'} one" if models else ""


def parse_json_object(text: str | bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [key for key, _ in pairs]
            twice = next(key for key in names if names.count(key) > 1)
            raise CheckpointError(f"{where}: key {twice!r} stands twice in one JSON object")
        return result

    def refuse_constant(constant: str) -> NoReturn:
        raise CheckpointError(f"{where}: {constant} is not JSON")

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _index_files(index_file: Path, weight_map: Mapping[str, Any]) -> list[Path]:
    names = dict.fromkeys(weight_map.values())
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or "\\" in name:
            raise CheckpointError(f"{index_file}: shard {name!r} leaves the folder; only plain file names are read")
        if not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index_file}: shard {name!r} is not a safetensors file; pickled weights are not read"
            )
        if not (index_file.parent / name).is_file():
            raise CheckpointError(f"{index_file}: shard {name!r} is missing from the folder; fetch it again")
    return [index_file.parent / name for name in names]


def _refuse_files(folder: Path, found: list[Path], expected: str) -> NoReturn:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if found:
        raise CheckpointError(f"{folder}: expected {expected}, found {', '.join(path.name for path in found)}")
    if pickles:
        raise CheckpointError(
            f"{folder}: holds only pickled weights ({pickles[0]}), which can run code when they are read; "
            f"expected {expected}. An adapter: qconv convert --to safetensors reads its tensors without running any. "
            "A model: load and save it once with transformers in a sandbox you trust (safetensors is its default)"
        )
    packed = sorted(path.name for path in folder.glob("*.gguf"))
    if packed:
        raise CheckpointError(
            f"{folder}: holds {len(packed)} GGUF files ({', '.join(packed)}); expected one, or {expected}. "
            "Name the file that is meant"
        )
    raise CheckpointError(f"{folder}: expected {expected}, found no safetensors file")


def _read_header(file: Path) -> Iterator[tuple[TensorSpec, int]]:
    """Yields each tensor's spec and its absolute byte offset, after checking the whole header."""
    try:
        file_bytes = file.stat().st_size
        with open(file, "rb") as handle:
            start = handle.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":  # a header would not be as long as these bytes say
                raise CheckpointError(
                    f"{file}: expected safetensors, found text, as Git LFS leaves it where the file itself was not "
                    "fetched; run 'git lfs pull' in that clone, or give the model's hub id instead"
                )
            if file_bytes < 8 or length > min(MAX_HEADER_BYTES, file_bytes - 8):
                raise CheckpointError(
                    f"{file}: not a safetensors file, or truncated ({file_bytes} bytes); copy or download it again"
                )
            header = parse_json_object(handle.read(length), str(file))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from error
    header.pop("__metadata__", None)
    data_start = 8 + length
    entries = sorted((_checked_entry(file, name, entry) for name, entry in header.items()), key=lambda e: e[1])
    end = 0
    for spec, begin in entries:
        if begin != end:
            raise CheckpointError(
                f"{file}: tensor {spec.name!r} starts at byte {begin}, expected {end} (overlap or hole)"
            )
        end = begin + spec.num_bytes
    if data_start + end != file_bytes:
        raise CheckpointError(
            f"{file}: expected {data_start + end} bytes, found {file_bytes}; the file is truncated or padded: "
            "copy or download it again"
        )
    by_name = {spec.name: (spec, begin) for spec, begin in entries}
    for name in header:
        spec, begin = by_name[name]
        yield spec, data_start + begin


def _checked_entry(file: Path, name: str, entry: Any) -> tuple[TensorSpec, int]:
    if not name or not name.isprintable() or "/" in name or "\\" in name or ".." in name:
        raise CheckpointError(f"{file}: tensor name {name!r} is not a dotted name")
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        ok = all(type(n) is int and n >= 0 for n in [*shape, begin, end])
    except (TypeError, KeyError, ValueError):
        ok = False
    if not ok:
        raise CheckpointError(f"{file}: tensor {name!r} has a malformed header entry: {entry!r}")
    if dtype not in DTYPES:
        raise CheckpointError(f"{file}: tensor {name!r} has dtype {dtype}; read are {', '.join(DTYPES)}")
    spec = TensorSpec(name=name, shape=tuple(shape), dtype=DTYPES[dtype])
    if prod(shape) * spec.dtype.itemsize != end - begin:
        raise CheckpointError(f"{file}: tensor {name!r} of {dtype} {shape} cannot fill {end - begin} bytes")
    return spec, begin
