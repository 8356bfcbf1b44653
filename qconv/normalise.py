"""An adapter as a product: any LoRA that one low-rank update per linear can express, as plain LoRA that engines load.

Method: rsLoRA and both patterns are scalings and ranks of single modules, so they fold into B and zero rows exactly
(see `merge/plain_lora.py`); AdaLoRA's singular values, QA-LoRA's pooling and IR-QLoRA's connections fold into A and B.
Refused, since no low-rank update of a linear equals them: DoRA (its magnitude rescales the whole base weight), trained
biases, whole trained tensors.

Rounding: B times its scaling in float32, then once to the dtype of the file; the default float32 keeps what was stored.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from qconv import __version__
from qconv.adapter_configs import NormaliseConfig
from qconv.checkpoint import SafetensorsCheckpoint, open_adapter_files, open_checkpoint
from qconv.convert import dequantize
from qconv.errors import AdapterError
from qconv.merge import load_adapter, truncated
from qconv.merge.delta import factors
from qconv.merge.implied_base import ImpliedBase
from qconv.merge.plain_lora import SERVED_RANKS, Factors, served_rank, write_plain_lora
from qconv.progress import QUIET, Progress
from qconv.records import TRAIN_RECORD_NAME, read_train_record
from qconv.report.adapter_card import adapter_card
from qconv.side_files import tokenizer_files
from qconv.types import Adapter, LoraDelta
from qconv.work_folder import check_inputs, check_output, publishing

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WHAT_ELSE = "merge the adapter (qconv merge), which is exact"


@dataclass(frozen=True, kw_only=True)
class Normalised:
    """What came out.

    Attributes:
        ranks: of the modules before, in increasing order.
        rank: of every module now; lora_alpha is the same number.
        rounding: largest relative error of a module's update that the dtype of the file brings (Frobenius norm).
    """

    out: Path
    num_modules: int
    ranks: tuple[int, ...]
    rank: int
    dtype: str
    rounding: float


def normalise(config: NormaliseConfig, progress: Progress = QUIET) -> Normalised:
    """Writes the adapter as plain LoRA of one rank; the folder appears complete or not at all.

    Raises:
        CheckpointError: the adapter or the base cannot be read, or ``out`` cannot be written.
        AdapterError: it is not the adapter of this base, no LoRA of linears equals it, or its base has to be read
            and is not given.
        NumericsError: NaN or infinity in an adapter tensor.
    """
    check_output(config.out, config.overwrite)
    check_inputs(config.out, [config.adapter, config.base])
    files = open_adapter_files(config.adapter, config.revision)
    base = ImpliedBase(files) if config.base is None else dequantize(open_checkpoint(config.base))
    options = config.options
    adapter = load_adapter(files.folder, base, options=options)
    if isinstance(options.rank, int) and options.rank_scaling is not None:
        adapter = truncated(adapter, options.rank, options.rank_scaling)
    _refuse_what_is_no_lora(adapter)
    ranks = tuple(sorted({delta.rank for delta in adapter.deltas.values()}))
    rank = served_rank(ranks[-1])
    if rank is None:
        raise AdapterError(
            f"{adapter.location}: has rank {ranks[-1]}, and engines load ranks up to {SERVED_RANKS[-1]}; {WHAT_ELSE}"
        )
    padded = "" if ranks == (rank,) else f"padded to {rank}, "
    progress.say(f"{len(adapter.deltas)} modules of rank {', '.join(map(str, ranks))}: {padded}scaling in B")
    modules = {delta.module: _factors(adapter, delta) for delta in adapter.deltas.values()}
    dtype = DTYPES[config.dtype]
    rounding = max(_rounding(factors, dtype) for factors in modules.values())
    if rounding == float("inf"):
        raise AdapterError(f"{adapter.location}: {config.dtype} cannot hold its values; use --dtype bf16 or fp32")
    with publishing(config.out, config.overwrite) as partial:
        write_plain_lora(
            partial, modules, rank, dtype, _about(files), short_names=_has_short_names(files.config, modules)
        )
        for file in [*tokenizer_files(files.folder), files.folder / TRAIN_RECORD_NAME]:
            if file.is_file():
                shutil.copyfile(file, partial / file.name)
        record = read_train_record(files.folder)
        card = adapter_card(
            tool=f"qconv {__version__}",
            adapter=config.adapter,
            base=files.config.get("base_model_name_or_path") or (None if record is None else record.base),
            trained_on=None if record is None else record.trained_on,
            ranks=ranks,
            rank=rank,
            modules=len(modules),
        )
        (partial / "README.md").write_text(card, encoding="utf-8")
    return Normalised(
        out=config.out,
        num_modules=len(modules),
        ranks=ranks,
        rank=rank,
        dtype=config.dtype,
        rounding=rounding,
    )


def _refuse_what_is_no_lora(adapter: Adapter) -> None:
    for transform in adapter.transforms.values():
        _refuse(adapter, next(iter(transform.tensors.values())), f"peft_type {adapter.kind} is no low-rank product")
    for delta in adapter.deltas.values():
        if delta.singular is not None and adapter.kind != "ADALORA":
            _refuse(adapter, delta.singular, "KaSA changed the base")
    for delta in adapter.deltas.values():
        if delta.magnitude is not None:
            _refuse(adapter, delta.magnitude, "DoRA rescales the rows of the whole base weight, which has full rank")
        if delta.of_embedding:
            _refuse(adapter, delta.a, f"it is on {delta.weight}, an embedding, on which vLLM loads no LoRA")
        if delta.b_bias is not None and adapter.tensors.read(delta.b_bias).any():
            _refuse(adapter, delta.b_bias, "engines load no bias with a LoRA (lora_bias)")
    for rows in adapter.rows.values():
        _refuse(adapter, rows.tensor, f"it holds trained rows of {rows.weight}, which vLLM does not load")
    for name, tensor in adapter.replacements.items():
        what = "a trained bias" if name.endswith(".bias") else "a whole trained tensor (modules_to_save)"
        _refuse(adapter, tensor, f"{name} is {what}, which no low-rank update equals and vLLM does not load")


def _refuse(adapter: Adapter, tensor: str, why: str) -> NoReturn:
    raise AdapterError(f"{adapter.location}: tensor {tensor!r} cannot be written as plain LoRA: {why}; {WHAT_ELSE}")


def _factors(adapter: Adapter, delta: LoraDelta) -> Factors:
    a_RK, b_NR = factors(adapter, delta)
    return Factors(a_RK=a_RK, b_NR=b_NR * delta.scaling)


def _rounding(factors: Factors, dtype: torch.dtype) -> float:
    """Relative error of ``B @ A`` when both are rounded; infinity when one overflows."""
    if dtype == torch.float32:
        return 0.0
    a_RK, b_NR = factors.a_RK.to(dtype).double(), factors.b_NR.to(dtype).double()
    if not (a_RK.isfinite().all() and b_NR.isfinite().all()):
        return float("inf")
    # B A - B' A' = [B, -B'] [A; A'], whose norm needs only the Gram matrices of the thin sides.
    error = _norm(torch.cat([factors.b_NR.double(), -b_NR], 1), torch.cat([factors.a_RK.double(), a_RK]))
    whole = _norm(factors.b_NR.double(), factors.a_RK.double())
    return error / whole if whole else 0.0


def _norm(b_NR: torch.Tensor, a_RK: torch.Tensor) -> float:
    """``||B @ A||`` in the Frobenius norm, without the product."""
    return float(((b_NR.T @ b_NR) * (a_RK @ a_RK.T)).sum().clamp(min=0).sqrt())


def _about(files: SafetensorsCheckpoint) -> dict[str, Any]:
    kept = ("base_model_name_or_path", "revision", "task_type", "fan_in_fan_out")
    return {key: files.config[key] for key in kept if files.config.get(key) is not None}


def _has_short_names(config: Mapping[str, Any], modules: Mapping[str, Factors]) -> bool:
    """Whether the adapter was made by naming last parts alone, so that those target no other module."""
    targets = config.get("target_modules")
    narrowed = any(config.get(key) for key in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    return isinstance(targets, list) and not narrowed and {name.rpartition(".")[2] for name in modules} <= set(targets)
