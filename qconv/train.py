"""QLoRA training: a low-rank adapter on a frozen bitsandbytes 4-bit base.

Method: QLoRA (Dettmers et al. 2023, sections 3 and 4, table 9): NF4 with double quantization,
bfloat16 compute, LoRA on every linear of the blocks, AdamW without weight decay (paged 8-bit on
a GPU), gradient clipping at 0.3, warm-up over the first 3% of the steps, next-token loss.

Rounding points: a 16-bit base is quantized in its dtype on disk; each linear is dequantized to that
dtype and multiplied in the compute dtype; the adapter is float32, its branch is computed there and
rounded once to the activation dtype (no autocast). Everything else stays in the dtype on disk.
peft's `prepare_model_for_kbit_training` would raise that to float32, and the model that was trained
would not be the one that is merged, measured and served. Dropout is 0 by default for the same
reason, and so that one seed gives one adapter on one machine.

Left out: loss on answers alone (conversations are rendered and trained on whole), several processes,
resuming, evaluation.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qconv import __version__
from qconv.checkpoint import read_json, resolve_folder
from qconv.corpus import calibration_digest, load_documents, load_tokenizer, pack_tokens
from qconv.errors import CheckpointError, UsageError, concerning
from qconv.progress import QUIET, Progress, quiet_libraries
from qconv.records import write_train_record
from qconv.side_files import tokenizer_files
from qconv.train_loop import optimize
from qconv.training_config import TrainConfig
from qconv.types import BnbKind
from qconv.work_folder import check_inputs, check_output, check_place, publishing

if TYPE_CHECKING:
    from torch import Tensor

LOG_NAME = "train-log.jsonl"
FINAL_LOSS_STEPS = 10
EXTRAS = ("peft", "bitsandbytes", "accelerate")


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What came out: the folder, how the base was seen, and the mean loss (nats per token) of the last steps."""

    out: Path
    trained_on: BnbKind
    num_steps: int
    num_tokens: int
    first_loss: float
    final_loss: float
    train_seconds: float


def train(config: TrainConfig, progress: Progress = QUIET) -> TrainResult:
    """Trains an adapter and writes it, its record, its log and the base's tokenizer to ``config.out``.

    The folder appears complete or not at all.

    Raises:
        UsageError: the extras are not installed, no such device, or a contradiction in the config.
        CheckpointError: the base or its tokenizer cannot be read, or ``out`` cannot be written.
        CalibrationError: the text cannot be read, or has not one row.
        NumericsError: the loss or a gradient is not finite.
    """
    ready = prepare(config, progress)
    folder, kind, rows_BT = ready.folder, ready.kind, ready.rows_BT
    num_rows = config.steps * config.batch_size * config.gradient_accumulation
    progress.say(f"{rows_BT.numel()} tokens of text, {num_rows * config.seq_len} to train on, base as {kind}")

    with publishing(config.out, config.overwrite) as partial, _seeded(config.seed), quiet_libraries():
        model = _load_model(config, folder, kind)
        seen = _seen_by(model)
        if seen != kind:
            raise CheckpointError(f"{folder}: expected the base to load as {kind}, but its linears hold {seen}")
        start = time.monotonic()
        with open(partial / LOG_NAME, "w", encoding="utf-8") as log:
            losses = optimize(model, rows_BT, config, log, progress)
        seconds = time.monotonic() - start
        _save_adapter(model, partial, config.base)
        for file in tokenizer_files(folder):
            shutil.copyfile(file, partial / file.name)
        device = model.device.type
        details = _details(config, folder, calibration_digest(rows_BT), device)
        write_train_record(partial, kind, config.base, "cuda" if device == "cuda" else "cpu", details)
    last = losses[-FINAL_LOSS_STEPS:]
    return TrainResult(
        out=config.out,
        trained_on=kind,
        num_steps=len(losses),
        num_tokens=num_rows * config.seq_len,
        first_loss=losses[0],
        final_loss=sum(last) / len(last),
        train_seconds=seconds,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """What a training begins with: the base's folder, how it will be loaded, and token rows, int64 ``[rows, T]``."""

    folder: Path
    kind: BnbKind
    rows_BT: Tensor


def prepare(config: TrainConfig, progress: Progress = QUIET) -> Prepared:
    """Opens and checks what a training reads, and makes nothing; raises as `train` does."""
    with concerning("train"):
        return _prepared(config, progress)


def _prepared(config: TrainConfig, progress: Progress) -> Prepared:
    _require_extras()
    check_output(config.out, config.overwrite)
    check_place(config.out)
    check_inputs(config.out, [config.base, config.data])
    folder = resolve_folder(config.base, config.revision)
    base_config = read_json(folder / "config.json", "a model folder has a config.json")
    kind = _training_kind(config, base_config, folder)
    tokenizer = load_tokenizer(folder)
    documents = load_documents(config.data, tokenizer)
    progress.say(documents.summary())
    num_rows = config.steps * config.batch_size * config.gradient_accumulation
    rows_BT = pack_tokens(documents, tokenizer, num_rows, config.seq_len, config.seed, allow_fewer=True)
    _check_vocabulary(rows_BT, base_config, folder)
    return Prepared(folder=folder, kind=kind, rows_BT=rows_BT)


def _require_extras() -> None:
    missing = [name for name in EXTRAS if find_spec(name) is None]
    if missing:
        raise UsageError(f'training needs {", ".join(missing)}, not installed here: pip install "qconv[train]"')


def _training_kind(config: TrainConfig, base_config: dict[str, Any], folder: Path) -> BnbKind:
    stored = base_config.get("quantization_config")
    if stored is None:
        return config.quantize or "nf4-dq"
    method = stored.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes" or not stored.get("load_in_4bit"):
        what = "bitsandbytes 8-bit" if method == "bitsandbytes" else method
        raise CheckpointError(
            f"{folder}: expected a 16-bit or bitsandbytes 4-bit base, found {what}; train on the 16-bit original"
        )
    kind: Any = stored.get("bnb_4bit_quant_type", "fp4") + ("-dq" if stored.get("bnb_4bit_use_double_quant") else "")
    if config.quantize not in (None, kind):
        raise UsageError(f"{folder} is {kind} on disk; it cannot be trained as {config.quantize}")
    return kind  # type: ignore[no-any-return]


def _check_vocabulary(rows_BT: Tensor, base_config: dict[str, Any], folder: Path) -> None:
    size = base_config.get("vocab_size", (base_config.get("text_config") or {}).get("vocab_size"))
    if size is not None and int(rows_BT.max()) >= size:
        raise CheckpointError(
            f"{folder}: its tokenizer gives token {int(rows_BT.max())}, its model has {size}; "
            "the tokenizer is from another model"
        )


def _load_model(config: TrainConfig, folder: Path, kind: BnbKind) -> Any:
    """The base on its device, frozen, with a fresh adapter (B = 0) on every linear of its blocks."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; use --device cpu")
    options: dict[str, Any] = {}
    if kind != "16bit" and "quantization_config" not in read_json(folder / "config.json", ""):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind.removesuffix("-dq"),
            bnb_4bit_use_double_quant=kind.endswith("-dq"),
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype="auto",
            device_map={"": device},
            local_files_only=True,
            trust_remote_code=False,
            **options,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{folder}: transformers cannot load this base for training ({error})") from error
    checkpointing = device != "cpu" if config.gradient_checkpointing is None else config.gradient_checkpointing
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.enable_input_require_grads()
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora).train()


def _seen_by(model: Any) -> str:
    """How the loaded linears really hold the base, from their own quantization states."""
    states = [getattr(parameter, "quant_state", None) for parameter in model.parameters()]
    kinds = {state.quant_type + ("-dq" if state.nested else "") for state in states if state is not None}
    return " and ".join(sorted(kinds)) or "16bit"


def _save_adapter(model: Any, folder: Path, base: str) -> None:
    """peft's files; module names sorted and the base as the user named it, so equal runs give equal files."""
    lora = model.peft_config["default"]
    lora.target_modules = sorted(lora.target_modules)
    lora.base_model_name_or_path = base
    model.save_pretrained(str(folder), save_embedding_layers=False)


def _details(config: TrainConfig, folder: Path, data_digest: str, device: str) -> dict[str, Any]:
    settings = {key: value for key, value in asdict(config).items() if key not in ("base", "out", "overwrite")}
    return {
        "base_config_sha256": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
        "data_sha256": data_digest,
        "device": device,
        "hyperparameters": settings,
        "versions": {"qconv": __version__, **{name: version(name) for name in ("torch", "transformers", *EXTRAS)}},
    }


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Torch's random numbers from the seed, and the caller's own sequence again afterwards."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
