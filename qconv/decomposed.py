"""What LQ-LoRA saves, as a base and an adapter that fit one another.

Method: Guo et al. 2024, "LQ-LoRA" (arXiv 2311.12023): a weight is taken apart into quantized codes and low-rank factors
before training, so that the factors are an adapter of the codes and of nothing else. Its code pickles the state dict of
the whole model, codes included, as ``full_model.pth``; `safe_pickles` reads it and runs nothing of it, and
`convert/lq_lora.py` decodes the codes. Factors with the scaling of their ``adapter_config.json`` are plain LoRA.

Rounding: decoded in float32, as training computes; once to the dtype of the base's file, by default the same.
Left out: classifiers (a head that is trained whole), several adapters in one file.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qconv.adapter_configs import UnpickleConfig
from qconv.checkpoint import SIDE_PATTERNS, read_json, resolve_folder
from qconv.convert import lq_lora
from qconv.errors import AdapterError, CheckpointError, NumericsError
from qconv.finite import all_finite
from qconv.layout import PLAIN
from qconv.plain_tensors import is_plain_float
from qconv.records import write_train_record
from qconv.safe_pickles import load_pickle
from qconv.side_files import LQ_LORA_MODEL, side_files
from qconv.types import TensorSpec
from qconv.work_folder import check_inputs, check_output, filling
from qconv.writer import CheckpointWriter

PREFIX = "base_model.model."
MAX_SHARD_BYTES = 5 * 10**9
_FACTOR = re.compile(r"(.+\.lora_[AB])\.([^.]+)\.weight")
_NOT_PERSISTENT = ".rotary_emb.inv_freq"  # computed; releases of transformers before 4.32 saved it


@dataclass(frozen=True, kw_only=True)
class Separated:
    """What came out.

    Attributes:
        bits: of codes -> number of weights.
    """

    base: Path
    adapter: Path
    bits: Mapping[int, int]
    num_factors: int
    dtype: str


def separate(config: UnpickleConfig) -> Separated:
    """Writes ``OUT/base``, a plain model, and ``OUT/adapter``, plain LoRA of it; both appear complete or not at all.

    Raises:
        CheckpointError: the file or the base's config cannot be read, tensors do not fit, or ``out`` cannot be written.
        AdapterError: the file holds more than tensors and LQ-LoRA's weights, or no LoRA.
        NumericsError: NaN or infinity in a weight, or one that the dtype does not hold.
    """
    out_base, out_adapter = config.out / "base", config.out / "adapter"
    for out in (out_base, out_adapter):
        check_output(out, config.overwrite)
        check_inputs(out, [config.adapter, config.base])
    folder = resolve_folder(config.adapter)
    file = folder / LQ_LORA_MODEL
    about = read_json(folder / "adapter_config.json", "LQ-LoRA's folder has the adapter_config.json that peft wrote")
    origin = _origin(config, about, folder)
    model_config = read_json(origin / "config.json", "a model folder has a config.json")
    weights, factors = _sorted(_state(file), file)
    _drop_tied_head(weights, model_config)
    specs = [_spec(name, tensor, PLAIN[config.dtype]) for name, tensor in weights.items()]
    with CheckpointWriter(out_base, specs, MAX_SHARD_BYTES, config.overwrite) as writer:
        for spec in specs:
            writer.write(spec.name, _stored(weights[spec.name], spec, file))
        kept = {key: value for key, value in model_config.items() if key not in ("torch_dtype", "quantization_config")}
        writer.write_json("config.json", kept | {"dtype": str(PLAIN[config.dtype]).removeprefix("torch.")})
        writer.copy_files(side_files(origin, folder))
        with filling(out_adapter, config.overwrite) as adapter:
            _write_adapter(adapter.path, factors, about, out_base, file)
            writer.commit(adapter)
    bits = Counter(
        lq_lora.bits_of(tensor) for tensor in weights.values() if isinstance(tensor, lq_lora.QuantizedTensor)
    )
    return Separated(
        base=out_base,
        adapter=out_adapter,
        bits=dict(sorted(bits.items())),
        num_factors=len(factors),
        dtype=config.dtype,
    )


def _origin(config: UnpickleConfig, about: Mapping[str, Any], folder: Path) -> Path:
    source = config.base or about.get("base_model_name_or_path")
    if not source:
        raise CheckpointError(
            f"{folder / 'adapter_config.json'}: does not say which model was decomposed; give it with --base, for its "
            "config and tokenizer"
        )
    try:
        return resolve_folder(str(source), patterns=SIDE_PATTERNS)
    except CheckpointError as error:
        if config.base is not None:
            raise
        raise CheckpointError(
            f"{error}. So adapter_config.json calls the model; give another place with --base"
        ) from error


def _state(file: Path) -> Mapping[Any, Any]:
    only = "Read are state dicts of tensors and of the weights of LQ-LoRA's own classes, as its save_full_model writes"
    content = load_pickle(file, only, lq_lora.CLASSES)
    if not isinstance(content, Mapping) or not content:
        raise AdapterError(f"{file}: expected a dictionary of tensors, found {type(content).__name__}")
    return content


def _sorted(state: Mapping[Any, Any], file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of the base by its names, and of the adapter by peft's."""
    weights: dict[str, Tensor] = {}
    factors: dict[str, Tensor] = {}
    adapters = set()
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise AdapterError(f"{file}: {name!r}: expected a tensor under a name, found {type(tensor).__name__}")
        if not isinstance(tensor, lq_lora.QuantizedTensor) and not _is_plain(tensor):
            raise AdapterError(f"{file}: {name!r}: expected a plain tensor, found {tensor.layout} {tensor.dtype}")
        if not name.startswith(PREFIX):
            raise AdapterError(f"{file}: expected the names of a model under peft ({PREFIX}...), found {name!r}")
        factor = _FACTOR.fullmatch(name)
        if factor is not None:
            adapters.add(factor[2])
            factors[f"{factor[1]}.weight"] = tensor
        elif ".lora_" in name or ".modules_to_save." in name or ".original_module." in name:
            raise AdapterError(f"{file}: {name!r} is no part of a LoRA on linears, which is all that LQ-LoRA trains")
        elif not name.endswith(_NOT_PERSISTENT):
            weights[name.removeprefix(PREFIX).replace(".base_layer.", ".")] = tensor
    if len(adapters) != 1 or not any(isinstance(tensor, lq_lora.QuantizedTensor) for tensor in weights.values()):
        found = f"adapters {', '.join(sorted(adapters))}" if adapters else "no lora_A and lora_B"
        raise AdapterError(f"{file}: expected quantized weights and the factors of one adapter, found {found}")
    return weights, factors


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_meta)


def _drop_tied_head(weights: dict[str, Tensor], config: Mapping[str, Any]) -> None:
    head, embedding = weights.get("lm_head.weight"), weights.get("model.embed_tokens.weight")
    if (
        config.get("tie_word_embeddings")
        and head is not None
        and embedding is not None
        and torch.equal(head, embedding)
    ):
        del weights["lm_head.weight"]


def _spec(name: str, tensor: Tensor, storage: torch.dtype) -> TensorSpec:
    dtype = storage if is_plain_float(tensor.dtype) else tensor.dtype
    return TensorSpec(name=name, shape=tuple(tensor.shape), dtype=dtype)


def _stored(tensor: Tensor, spec: TensorSpec, file: Path) -> Tensor:
    decoded = _decoded(tensor, spec.name, file)
    stored = decoded.to(spec.dtype).contiguous()
    if is_plain_float(stored.dtype) and not all_finite(stored):
        what = "has NaN or infinity" if not all_finite(decoded) else f"does not fit {spec.dtype}; use --dtype fp32"
        raise NumericsError(f"{file}: tensor {spec.name!r} {what}")
    return stored


def _decoded(tensor: Tensor, name: str, file: Path) -> Tensor:
    if not isinstance(tensor, lq_lora.QuantizedTensor):
        return tensor.detach()
    try:
        return lq_lora.decode(tensor)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: tensor {name!r} {error}") from error


def _write_adapter(
    folder: Path, factors: Mapping[str, Tensor], about: Mapping[str, Any], base: Path, file: Path
) -> None:
    from safetensors.torch import save

    tensors = {
        name: _decoded(tensor, name, file).clone(memory_format=torch.contiguous_format)
        for name, tensor in factors.items()
    }
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    config = dict(about) | {"base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_train_record(folder, "16bit", str(base))
