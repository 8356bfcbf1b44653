"""What a folder is, from its headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qconv.checkpoint import open_adapter_files, open_checkpoint, resolve_folder
from qconv.convert import dequantize
from qconv.errors import AdapterError
from qconv.inputs import load_reference, resolve_device
from qconv.merge.adapter_config import parse_adapter_config
from qconv.merge.kinds import KINDS, LOW_RANK, how_merged
from qconv.merge.spectrum import LOOKED_AT, THRESHOLD, spectrum_changes
from qconv.records import read_train_record
from qconv.stored_tensors import FileCheckpoint
from qconv.types import BnbKind, Checkpoint, Scheme


def describe(source: str | Path) -> dict[str, Any]:
    """Facts about a model or adapter folder, ready for JSON.

    Raises:
        CheckpointError: neither a model nor an adapter folder, or a malformed one.
    """
    if Path(source).is_file():
        return _describe_model(open_checkpoint(source))
    folder = resolve_folder(source)
    if (folder / "adapter_config.json").exists():
        return _describe_adapter(open_adapter_files(folder))
    return _describe_model(open_checkpoint(folder))


def describe_spectrum(adapter: str, base: str, trained_on: BnbKind | None, device: str) -> dict[str, Any]:
    """Facts about an adapter, and which singular vectors of the merged weights are foreign to the base's.

    Raises:
        UsageError: a 16-bit base whose training quantization nobody recorded.
        CheckpointError, AdapterError: they cannot be read, or are not for one another.
    """
    reference = load_reference(open_checkpoint(base), adapter, trained_on)
    assert reference.adapter is not None  # one was named
    if reference.adapter.transforms:
        raise AdapterError(
            f"{adapter}: --spectral looks at LoRA adapters; this one is of kind {reference.adapter.kind}"
        )
    changes = list(spectrum_changes(reference.base, reference.adapter, resolve_device(device)))
    return describe(adapter) | {
        "intruder dimensions": sum(len(change.intruders) for change in changes),
        "looked at": f"the {LOOKED_AT} leading left singular vectors of each weight; foreign below cosine {THRESHOLD}",
        "spectrum": [asdict(change) for change in changes],
    }


def _describe_model(checkpoint: FileCheckpoint) -> dict[str, Any]:
    view = dequantize(checkpoint)
    config = checkpoint.config
    facts: dict[str, Any] = {
        "kind": "model",
        "folder": checkpoint.location,
        "architecture": ", ".join(config.get("architectures") or [str(config.get("model_type"))]),
        "storage": view.kind,
    }
    schemes = Counter(_in_words(scheme) for module, scheme in view.schemes.items() if module not in view.block_kinds)
    schemes.update(view.block_kinds.values())
    if schemes:
        counted = [f"{words} x {count}" for words, count in schemes.most_common()]
        facts["scheme"] = "; ".join(counted if len(schemes) > 1 else schemes)
    facts["quantized linears"] = len(view.quantized_modules)
    if view.cache.is_float8:
        num_scaled = len(view.cache.scales)
        stored = f"scales of {num_scaled} attentions" if num_scaled else "no scales stored, for which vLLM takes 1"
        facts["keys and values"] = f"float8, {stored}"
    elif view.cache.why_not is not None:
        facts["keys and values"] = view.cache.why_not
    facts["parameters"] = _num_elements(view)
    return facts | _sizes(checkpoint)


def _in_words(scheme: Scheme) -> str:
    return (
        f"{scheme.kind}{scheme.bits}, group size {scheme.group_size}, "
        f"{f'blocks of {scheme.block_rows} rows, ' if scheme.block_rows > 1 else ''}"
        f"{'symmetric' if scheme.symmetric else 'asymmetric'}"
    )


def _describe_adapter(adapter: FileCheckpoint) -> dict[str, Any]:
    config = adapter.config
    record = read_train_record(adapter.folder)
    kind = KINDS.get(str(config.get("peft_type")))
    decisive = {} if kind is None else {key: config.get(key) for key in sorted(kind.keys)}
    if config.get("peft_type") in LOW_RANK:
        decisive = {
            **{key: config.get(key) for key in ("r", "init_r", "lora_alpha") if key in config},
            "use_rslora": bool(config.get("use_rslora")),
            "use_dora": bool(config.get("use_dora")),
        }
    return {
        "kind": "adapter",
        "folder": adapter.location,
        "peft_type": config.get("peft_type"),
        **({} if kind is None else {"method": kind.title}),
        "merge": _how_merged(config),
        "base": config.get("base_model_name_or_path"),
        **decisive,
        "target_modules": config.get("target_modules"),
        **({"target_parameters": config["target_parameters"]} if config.get("target_parameters") else {}),
        "modules_to_save": config.get("modules_to_save"),
        "trained on": record.trained_on if record else "not recorded (a 16-bit base needs --trained-on)",
        "parameters": _num_elements(adapter),
        **_sizes(adapter),
    }


def _how_merged(config: Mapping[str, Any]) -> str:
    if config.get("peft_type") in LOW_RANK:
        try:
            parse_adapter_config(config, "adapter_config.json")
        except AdapterError as error:
            return f"refused: {error}"
    return how_merged(config.get("peft_type"))


def _sizes(checkpoint: FileCheckpoint) -> dict[str, Any]:
    specs = checkpoint.specs().values()
    dtypes = Counter(str(spec.dtype).removeprefix("torch.") for spec in specs)
    return {
        "tensors": len(specs),
        "bytes": sum(spec.num_bytes for spec in specs),
        "shards": len({checkpoint.file_of(spec.name) for spec in specs}),
        "dtypes": ", ".join(f"{name} x {count}" for name, count in dtypes.most_common()),
    }


def _num_elements(checkpoint: Checkpoint) -> int:
    total = 0
    for spec in checkpoint.specs().values():
        count = 1
        for size in spec.shape:
            count *= size
        total += count
    return total
