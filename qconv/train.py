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

Left out: chat templates and loss on answers alone, several processes, resuming, evaluation.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from qconv.checkpoint import read_json, resolve_folder
from qconv.corpus import calibration_digest, load_documents, load_tokenizer, pack_tokens, tokenizer_files
from qconv.errors import CheckpointError, NumericsError, UsageError
from qconv.progress import QUIET, Progress
from qconv.records import TRAIN_RECORD_NAME, write_train_record
from qconv.types import BnbKind
from qconv.writer import check_output

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LOG_NAME = "train-log.jsonl"
MAX_GRADIENT_NORM = 0.3
WARMUP_FRACTION = 0.03
FINAL_LOSS_STEPS = 10
EXTRAS = ("peft", "bitsandbytes", "accelerate")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to train, on what, and how long.

    Attributes:
        base: folder or hub id; bitsandbytes 4-bit, or 16-bit (then quantized as it is loaded).
        out: adapter folder.
        data: text, as `corpus.load_documents` reads it.
        steps: optimizer steps; text that is too short for them is read again in another order.
        batch_size: rows per forward pass.
        gradient_accumulation: forward passes per step.
        seq_len: tokens per row.
        rank, alpha, dropout: LoRA's r, alpha and dropout (Hu et al. 2021, section 4.1).
        learning_rate, schedule: peak, and what follows the warm-up.
        seed: of the adapter's start, the choice of text and its order.
        quantize: how a 16-bit base is loaded; None = ``"nf4-dq"``, or as the base is on disk.
        gradient_checkpointing: trade time for memory; None = on a GPU only (on CPU it costs 1.3 x).
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``.
    """

    base: str
    out: Path
    data: str = "default"
    steps: int = 200
    batch_size: int = 4
    gradient_accumulation: int = 1
    seq_len: int = 512
    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    learning_rate: float = 2e-4
    schedule: Literal["constant", "cosine"] = "constant"
    seed: int = 0
    quantize: BnbKind | None = None
    gradient_checkpointing: bool | None = None
    device: str = "auto"
    overwrite: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation", "rank", "alpha", "learning_rate"):
            if not getattr(self, name) > 0:
                raise UsageError(f"--{name.replace('_', '-')} must be positive, got {getattr(self, name)}")
        if self.seq_len < 8:
            raise UsageError(f"--seq-len must be at least 8, got {self.seq_len}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"--dropout is a fraction from 0 up to 1, got {self.dropout}")
        if self.schedule not in ("constant", "cosine"):
            raise UsageError(f"--schedule is constant or cosine, got {self.schedule}")


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
    _require_extras()
    check_output(config.out, config.overwrite)
    folder = resolve_folder(config.base, config.revision)
    base_config = read_json(folder / "config.json", "a model folder has a config.json")
    kind = _training_kind(config, base_config, folder)
    tokenizer = load_tokenizer(folder)
    documents = load_documents(config.data)
    num_rows = config.steps * config.batch_size * config.gradient_accumulation
    rows_BT = pack_tokens(documents, tokenizer, num_rows, config.seq_len, config.seed, allow_fewer=True)
    _check_vocabulary(rows_BT, base_config, folder)
    progress.say(f"{rows_BT.numel()} tokens of text, {num_rows * config.seq_len} to train on, base as {kind}")

    with _publishing(config.out, config.overwrite) as partial, _seeded(config.seed), quiet_libraries():
        model = _load_model(config, folder, kind)
        seen = _seen_by(model)
        if seen != kind:
            raise CheckpointError(f"{folder}: expected the base to load as {kind}, but its linears hold {seen}")
        start = time.monotonic()
        with open(partial / LOG_NAME, "w", encoding="utf-8") as log:
            losses = _optimize(model, rows_BT, config, log, progress)
        seconds = time.monotonic() - start
        _save_adapter(model, partial, config.base)
        for file in tokenizer_files(folder):
            shutil.copyfile(file, partial / file.name)
        write_train_record(partial, kind, config.base)
        _complete_record(partial / TRAIN_RECORD_NAME, config, folder, calibration_digest(rows_BT), model.device.type)
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


def _optimize(model: Any, rows_BT: Tensor, config: TrainConfig, log: TextIO, progress: Progress) -> list[float]:
    import torch

    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    parameters = [parameter for _, parameter in named]
    optimizer = _optimizer(parameters, config.learning_rate)
    batches = _batches(rows_BT, config)
    losses: list[float] = []
    start = time.monotonic()
    for step in progress.track(range(config.steps), "train"):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config)
        loss = 0.0
        for _ in range(config.gradient_accumulation):
            tokens_BT = next(batches).to(model.device)
            part = model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss / config.gradient_accumulation
            part.backward()
            loss += float(part.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise _not_finite(step, loss, named, config)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss)
        row = {
            "step": step + 1,
            "loss": loss,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "gradient_norm": norm,
            "seconds": round(time.monotonic() - start, 3),
        }
        log.write(json.dumps(row) + "\n")
        log.flush()
        progress.detail(f"step {step + 1}/{config.steps}  loss {loss:.4f}  gradient norm {norm:.4f}")
    return losses


def _optimizer(parameters: list[Tensor], learning_rate: float) -> torch.optim.Optimizer:
    if parameters[0].is_cuda:
        from bitsandbytes.optim import PagedAdamW8bit

        paged: torch.optim.Optimizer = PagedAdamW8bit(parameters, lr=learning_rate, weight_decay=0.0)
        return paged
    from torch.optim import AdamW

    return AdamW(parameters, lr=learning_rate, weight_decay=0.0)


def _schedule(step: int, config: TrainConfig) -> float:
    """The learning rate of a step, counted from 0, as a fraction of the peak."""
    warmup = math.ceil(WARMUP_FRACTION * config.steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))


def _batches(rows_BT: Tensor, config: TrainConfig) -> Iterator[Tensor]:
    """Batches without end; every row comes once before any comes again, in an order of its own each time."""
    import torch

    generator = torch.Generator().manual_seed(config.seed)
    order: list[int] = []
    while True:
        while len(order) < config.batch_size:
            order += torch.randperm(len(rows_BT), generator=generator).tolist()
        yield rows_BT[order[: config.batch_size]]
        order = order[config.batch_size :]


def _not_finite(step: int, loss: float, named: list[tuple[str, Tensor]], config: TrainConfig) -> NumericsError:
    broken = next((name for name, p in named if p.grad is not None and not bool(p.grad.isfinite().all())), None)
    where = f"; first gradient that is not finite: {broken}" if broken else ""
    return NumericsError(
        f"{config.base}: the loss at step {step + 1} of {config.steps} is {loss}{where}; nothing was written. "
        "Lower --learning-rate; if it is not finite at step 1, the base has broken weights"
    )


def _save_adapter(model: Any, folder: Path, base: str) -> None:
    """peft's files; module names sorted and the base as the user named it, so equal runs give equal files."""
    lora = model.peft_config["default"]
    lora.target_modules = sorted(lora.target_modules)
    lora.base_model_name_or_path = base
    model.save_pretrained(str(folder), save_embedding_layers=False)


def _complete_record(file: Path, config: TrainConfig, folder: Path, data_digest: str, device: str) -> None:
    record = json.loads(file.read_text(encoding="utf-8"))
    record["base_config_sha256"] = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    record["data_sha256"] = data_digest
    record["device"] = device
    record["hyperparameters"] = {k: v for k, v in asdict(config).items() if k not in ("base", "out", "overwrite")}
    record["versions"] = {name: version(name) for name in ("qconv", "torch", "transformers", *EXTRAS)}
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Torch's random numbers from the seed, and the caller's own sequence again afterwards."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without noise that asks nothing of the user: an absent CPU kernel for inference (training calls
    none), a deprecated name that peft reads, and a loading bar where no terminal shows it."""
    from transformers.utils import logging as transformers_logging

    kernels = logging.getLogger("bitsandbytes.backends.cpu.ops")
    kernels.addFilter(_is_not_about_kernels)
    bars = transformers_logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
            yield
    finally:
        kernels.removeFilter(_is_not_about_kernels)
        if bars:
            transformers_logging.enable_progress_bar()


def _is_not_about_kernels(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in record.getMessage()


@contextmanager
def _publishing(out: Path, overwrite: bool) -> Iterator[Path]:
    """``OUT.partial`` to fill, renamed to ``out`` when the block ends well and removed when it does not."""
    partial, old = out.with_name(out.name + ".partial"), out.with_name(out.name + ".old")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for file in partial.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        check_output(out, overwrite)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)
        partial.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
