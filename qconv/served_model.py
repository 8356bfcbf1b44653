"""A model folder and its adapters as a serving engine will meet them: opened, checked, counted."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qconv import corpus
from qconv.checkpoint import open_adapter_files, open_checkpoint
from qconv.convert import DequantizedCheckpoint, dequantize
from qconv.convert.dequantize import CONV1D_MODELS
from qconv.decoder_shape import DecoderShape
from qconv.errors import AdapterError, CheckpointError, UsageError
from qconv.gguf import GgufCheckpoint
from qconv.merge import load_adapter
from qconv.records import read_train_record
from qconv.runners import Candidate
from qconv.serving import Served, ServedAdapter
from qconv.serving_config import DEFAULT_CONTEXT, AdapterSource, PackConfig, name_of_model
from qconv.side_files import is_adapter, tokenizer_files
from qconv.stored_tensors import FileCheckpoint
from qconv.tensor_parallel import COLUMN, REPLICATED, ROW, Linear, parallel_linears
from qconv.work_folder import REPORT_SIGN


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """Attributes:
    source, view: the checkpoint as it lies on disk, and its logical weights.
    served: what an engine is told of it.
    candidates: the model alone, and with each adapter, to run.
    adapter_bytes: of all adapters' tensors.
    verdict: of the report in the folder; None = it has none.
    """

    source: FileCheckpoint
    view: DequantizedCheckpoint
    shape: DecoderShape
    served: Served
    candidates: tuple[Candidate, ...]
    adapter_bytes: int
    verdict: str | None

    def linears(self) -> list[Linear]:
        """As `tensor_parallel` asks for them."""
        layouts = {module: self.view.layout_of(module) for module in self.view.quantized_modules}
        is_transposed = self.view.config.get("model_type") in CONV1D_MODELS
        return parallel_linears(self.view.specs(), layouts, self.view.schemes, is_transposed)


def open_served(config: PackConfig, port: int, concurrency: int) -> ServedModel:
    """Opens what is packed, from headers; adapters are read once.

    Raises:
        CheckpointError: the model cannot be read.
        AdapterError: an adapter is not plain LoRA, or not of this model.
        UsageError: an adapter in the model's place, or a context that the model does not have.
    """
    folder = Path(config.model)
    if folder.is_dir() and is_adapter(folder):
        raise UsageError(
            f"{config.model} is an adapter: name the model that serves it, and it as --adapter {config.model}"
        )
    source = open_checkpoint(config.model)
    view = dequantize(source)
    shape = DecoderShape.of(source.config, source.location)
    candidates = [Candidate(source=source, view=view)]
    adapters, num_bytes = [], 0
    for named in config.adapters:
        files = open_adapter_files(named.source)
        adapters.append(_served_adapter(named, files))
        num_bytes += sum(spec.num_bytes for spec in files.specs().values())
        candidates.append(Candidate(source=source, view=view, adapter=load_adapter(files.folder, view)))
    quantized = set(view.quantized_modules)
    served = Served(
        name=config.name or name_of_model(config.model),
        path=config.model_path or str(_place(source).resolve()),
        layout=view.kind,
        schemes=tuple(dict.fromkeys(view.schemes.values())),
        quantization=source.config.get("quantization_config") or {},
        dtype=str(source.config.get("dtype") or source.config.get("torch_dtype")).removeprefix("torch."),
        unquantized=tuple(_plain_linears(view, quantized)),
        adapters=tuple(adapters),
        num_gpus=config.num_gpus,
        num_kv_heads=shape.num_kv_heads,
        context=_context(config, shape),
        concurrency=concurrency,
        cache_dtype="fp8" if view.cache.is_float8 else config.cache_dtype,
        has_cache_scales=bool(view.cache.scales),
        port=port,
        model_file=_model_file(source),
        adds_special_tokens=_adds_special_tokens(source, view),
    )
    return ServedModel(
        source=source,
        view=view,
        shape=shape,
        served=served,
        candidates=tuple(candidates),
        adapter_bytes=num_bytes,
        verdict=_verdict(source.folder),
    )


def _place(source: FileCheckpoint) -> Path:
    """What an engine is given: the folder, or the GGUF file in it."""
    return source.file_of(next(iter(source.specs()))) if isinstance(source, GgufCheckpoint) else source.folder


def _adds_special_tokens(source: FileCheckpoint, view: DequantizedCheckpoint) -> bool:
    """Asked of ONNX folders alone: other engines read that from the tokenizer's files."""
    if not view.kind.startswith("onnx") or not tokenizer_files(source.folder):
        return False
    return corpus.adds_special_tokens(corpus.load_tokenizer(source.folder))


def _model_file(source: FileCheckpoint) -> str:
    """The Modelfile in the folder of a GGUF file, for Ollama; empty where there is none.

    Raises:
        CheckpointError: it cannot be read, or does not begin with the file.
    """
    file = source.folder / "Modelfile"
    if not isinstance(source, GgufCheckpoint) or not file.is_file():
        return ""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from error
    if not text.startswith("FROM "):
        raise CheckpointError(f"{file}: expected a line FROM with the GGUF file first, as qconv writes it; remove it")
    return text


def _context(config: PackConfig, shape: DecoderShape) -> int:
    longest = shape.max_positions
    if config.context is None:
        return min(longest or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if longest is not None and config.context > longest:
        raise UsageError(f"--context {config.context}: {config.model} has positions for {longest} tokens")
    return config.context


def _plain_linears(view: DequantizedCheckpoint, quantized: Iterable[str]) -> Iterable[str]:
    """Modules of linears that stay in 16 bits; a tied head has no weight of its own and is one."""
    names = [name.removesuffix(".weight") for name, spec in view.specs().items() if len(spec.shape) == 2]
    roles = COLUMN | ROW | REPLICATED
    found = [name for name in names if name not in set(quantized) and name.rpartition(".")[2] in roles]
    return dict.fromkeys([*found, *(["lm_head"] if "lm_head" not in set(quantized) else [])])


def _served_adapter(named: AdapterSource, files: FileCheckpoint) -> ServedAdapter:
    """Refuses what engines read otherwise than peft: they take one rank and one scaling of an adapter, and no more."""
    config = files.config
    odd = [key for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "use_dora", "use_rslora", "lora_bias")
           if config.get(key)]  # fmt: skip
    odd += ["bias"] if config.get("bias") not in (None, "none") else []
    if config.get("peft_type") != "LORA" or odd:
        what = f"has {', '.join(odd)}" if odd else f"is of kind {config.get('peft_type')}"
        raise AdapterError(
            f"{files.folder}: engines load plain LoRA, and this adapter {what}; make one of it with "
            f"qconv convert {named.source} --to lora, or merge it"
        )
    record = read_train_record(files.folder)
    return ServedAdapter(
        name=named.name,
        path=str(files.folder.resolve()),
        rank=int(config["r"]),
        trained_on=None if record is None else record.trained_on,
    )


def _verdict(folder: Path) -> str | None:
    """What the report in a folder ends with.

    Raises:
        CheckpointError: there is one and it cannot be read.
    """
    report = folder / REPORT_SIGN
    if not report.is_file():
        return None
    try:
        return str(json.loads(report.read_text(encoding="utf-8"))["verdict"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{report}: cannot be read as a report ({type(error).__name__}: {error})") from error
