"""A LoRA of two full checkpoints: ``W_tuned - W_base`` of every linear, in as many singular vectors as asked for.

Method: truncated singular value decomposition of each difference, see `merge/low_rank.py`. Both models are read tensor
by tensor; what stays in memory is the factors.

Rounding: stored values are read exactly into float32, and everything is computed there; the factors are written in
float32. A difference of two 16-bit checkpoints holds their own rounding, which has full rank and no direction: energy
that a LoRA misses there is not necessarily loss.

Left out: linears outside the decoder blocks and layers that are no `nn.Linear` count as other tensors.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qconv.adapter_configs import ExtractConfig
from qconv.checkpoint import open_checkpoint
from qconv.config import BNB_KINDS
from qconv.convert import DequantizedCheckpoint, dequantize
from qconv.errors import CheckpointError
from qconv.inputs import resolve_device
from qconv.merge.compare import relative_difference
from qconv.merge.low_rank import LowRank, low_rank
from qconv.merge.plain_lora import Factors, served_rank, write_plain_lora
from qconv.merge.vocabulary import find_vocabulary
from qconv.progress import QUIET, Progress
from qconv.records import write_train_record
from qconv.side_files import tokenizer_files
from qconv.skeleton import linear_weights
from qconv.stored_tensors import FileCheckpoint
from qconv.types import Checkpoint
from qconv.work_folder import check_inputs, check_output, publishing

SHOWN_OTHERS = 8


@dataclass(frozen=True, kw_only=True)
class OtherTensor:
    """A tensor that differs and is no linear of a block; ``change`` is ``||tuned - base|| / ||base||``."""

    name: str
    num_bytes: int
    change: float


@dataclass(frozen=True, kw_only=True)
class ExtractedLinear:
    """One module of the LoRA.

    Attributes:
        rank: that it needed.
        change: ``||D|| / ||W_base||``.
        energy: the share of ``||D||^2`` that the LoRA has.
    """

    module: str
    rank: int
    change: float
    energy: float


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """What came out; ``energy`` is of all linears together."""

    out: Path
    rank: int
    energy: float
    linears: tuple[ExtractedLinear, ...]
    others: tuple[OtherTensor, ...]
    others_were: str


@dataclass(kw_only=True)
class _Found:
    """What the comparison has gathered so far."""

    factors: dict[str, Factors] = field(default_factory=dict)
    linears: list[ExtractedLinear] = field(default_factory=list)
    kept: float = 0.0
    whole: float = 0.0

    def add(self, module: str, found: LowRank, base_norm: float) -> None:
        self.factors[module] = found.factors
        change = found.norm / base_norm if base_norm else float("inf")
        self.linears.append(ExtractedLinear(module=module, rank=found.factors.rank, change=change, energy=found.energy))
        self.kept += found.energy * found.norm**2
        self.whole += found.norm**2


def extract(config: ExtractConfig, progress: Progress = QUIET) -> Extracted:
    """Writes the LoRA that takes the base to the tuned model; the folder appears complete or not at all.

    Raises:
        CheckpointError: a model cannot be read, the two are not of one architecture, no linear differs, other tensors
            differ and ``others`` does not say what to do with them, or ``out`` cannot be written.
    """
    check_output(config.out, config.overwrite)
    check_inputs(config.out, [config.base, config.tuned])
    device = resolve_device(config.device)
    source, tuned_source = open_checkpoint(config.base, config.revision), open_checkpoint(config.tuned)
    base, tuned = dequantize(source), dequantize(tuned_source)
    _check_same_names(base, tuned)
    linears = set(linear_weights(base))
    others = _others(base, tuned, linears)
    if others and config.others == "refuse":
        raise CheckpointError(_explain_others(others, tuned))
    saved, biases = _saved(tuned, base, others) if config.others == "save" else ({}, {})
    found = _Found()
    for number, name in enumerate(name for name in base.specs() if name in linears):
        w_NK = base.read(name, device).float()
        d_NK = tuned.read(name, device).float() - w_NK
        if not d_NK.isfinite().all():
            raise CheckpointError(f"{tuned.location}: tensor {name!r} minus the base's has NaN or infinity")
        if not d_NK.any():
            continue
        module = name.removesuffix(".weight")
        found.add(module, low_rank(d_NK, config.rank, config.energy), float(torch.linalg.vector_norm(w_NK)))
        last = found.linears[-1]
        progress.detail(f"{number + 1}/{len(linears)} {module}: rank {last.rank}, energy {last.energy:.4f}")
    if not found.linears:
        raise CheckpointError(f"{tuned.location}: no linear differs from {base.location}, so there is no LoRA to make")
    rank = max(linear.rank for linear in found.linears)
    rank = config.rank or served_rank(rank) or rank
    with publishing(config.out, config.overwrite) as partial:
        about = {"base_model_name_or_path": config.base}
        are_all = len(found.factors) == len(linears)
        write_plain_lora(partial, found.factors, rank, torch.float32, about, saved, biases, short_names=are_all)
        _add_side_files(partial, source, tuned_source, base, config.base)
    return Extracted(
        out=config.out,
        rank=rank,
        energy=found.kept / found.whole,
        linears=tuple(found.linears),
        others=tuple(others),
        others_were={"save": "saved", "drop": "dropped", "refuse": ""}[config.others],
    )


def _check_same_names(base: Checkpoint, tuned: Checkpoint) -> None:
    for one, other in ((base, tuned), (tuned, base)):
        for name, spec in one.specs().items():
            twin = other.specs().get(name)
            if twin is None:
                raise CheckpointError(
                    f"{other.location}: has no tensor {name!r}, which {one.location} has; expected two checkpoints of "
                    "one architecture, the tuned one made from the base"
                )
            if twin.shape != spec.shape:
                raise CheckpointError(
                    f"{other.location}: tensor {name!r} is {list(twin.shape)}, and {list(spec.shape)} in "
                    f"{one.location}; a LoRA changes no shapes (was the vocabulary resized?)"
                )


def _others(base: Checkpoint, tuned: Checkpoint, linears: set[str]) -> list[OtherTensor]:
    found = []
    for name, spec in tuned.specs().items():
        if name in linears:
            continue
        change = relative_difference(tuned.read(name), base.read(name))
        if change:
            found.append(OtherTensor(name=name, num_bytes=spec.num_bytes, change=change))
    return found


def _explain_others(others: list[OtherTensor], tuned: Checkpoint) -> str:
    shown = "\n".join(
        f"  {o.name}  {o.num_bytes / 1e6:.3f} MB, changed by {o.change:.2%}" for o in others[:SHOWN_OTHERS]
    )
    more = f"\n  and {len(others) - SHOWN_OTHERS} more" if len(others) > SHOWN_OTHERS else ""
    total = sum(other.num_bytes for other in others) / 1e6
    return (
        f"{tuned.location}: {len(others)} tensors that no LoRA of linears covers differ from the base's:\n"
        f"{shown}{more}\n"
        f"--others save keeps them whole, as modules_to_save and biases ({total:.3f} MB; vLLM loads no such adapter), "
        "--others drop leaves them as in the base"
    )


def _saved(
    tuned: Checkpoint, base: Checkpoint, others: list[OtherTensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values of whole modules, and of biases whose weight is in the LoRA or unchanged, as peft saves them.

    A tied head has to be saved with its embedding.
    """
    names = [other.name for other in others]
    alone = {name for name in names if name.endswith(".bias") and _module(name) + ".weight" not in names}
    modules = {_module(name) for name in names if name not in alone}
    saved = {name: tuned.read(name) for name in tuned.specs() if _module(name) in modules}
    vocabulary = find_vocabulary(base, names)
    if vocabulary.head_is_embedding and vocabulary.embedding in saved and vocabulary.head is not None:
        saved[vocabulary.head] = saved[vocabulary.embedding].clone()
    return saved, {name: tuned.read(name) for name in alone}


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _add_side_files(
    folder: Path,
    source: FileCheckpoint,
    tuned: FileCheckpoint,
    base: DequantizedCheckpoint,
    base_name: str,
) -> None:
    """The tuned model's tokenizer, and which base the update is right for."""
    for file in tokenizer_files(tuned.folder) or tokenizer_files(source.folder):
        shutil.copyfile(file, folder / file.name)
    stored = base.kind.removeprefix("bnb-")
    kind = "16bit" if stored == "plain" else next((kind for kind in BNB_KINDS if kind == stored), None)
    if kind is not None:
        write_train_record(folder, kind, base_name)
