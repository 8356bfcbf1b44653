"""Quantizes a model block by block; each block sees the activations that the stored blocks before it make.

For one decoder block: gather the Gram matrix of every distinct linear input (linears that share an
input share one), fold AWQ scales, choose the codes, then run the block again with the weights as
they will be stored, whose outputs feed the next block. Only one block is in memory, plus the
activations. Round-to-nearest and FP8 need no activations and read each weight once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qconv.config import QuantizationConfig
from qconv.progress import QUIET, Progress
from qconv.quantize.awq_block import FoldContext, Statistics, fold_scales
from qconv.quantize.folds import FOLDS, Heads
from qconv.quantize.gram import GramAccumulator
from qconv.quantize.solve import solve
from qconv.skeleton import block_linears
from qconv.streaming import StreamedModel
from qconv.types import QuantizedLinear, Scheme


@dataclass(frozen=True, kw_only=True)
class QuantizedBlock:
    """One finished block.

    Attributes:
        linears: quantized weights by full tensor name.
        plain: other tensors that changed (norms and biases that took an AWQ scale), float32, by full name.
    """

    index: int
    linears: Mapping[str, QuantizedLinear]
    plain: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest:
    """What to do to a model.

    Attributes:
        config: algorithm and options.
        scheme: resolved scheme of every quantized linear.
        weights: full names of the weights to quantize; others stay as they are.
        storage: dtype in which unquantized tensors will be stored.
        model_type: as in config.json; selects the AWQ folds.
    """

    config: QuantizationConfig
    scheme: Scheme
    weights: Collection[str]
    storage: torch.dtype
    model_type: str
    counts: Counter[str] = field(default_factory=Counter)


def quantize_blocks(
    model: StreamedModel, request: QuantizeRequest, batches: list[Tensor] | None, progress: Progress = QUIET
) -> Iterator[QuantizedBlock]:
    """Yields the blocks in order. ``batches``: int64 ``[B, S]`` token batches, or None when none are needed.

    What happened (scales folded or skipped, damping raised, dead channels) is counted in ``request.counts``.

    Raises:
        NumericsError: NaN or infinity in weights or activations; names the tensor.
    """
    hidden = model.embed(batches) if batches is not None else []
    for index in progress.track(range(model.num_blocks), request.config.resolved_algorithm, model.num_blocks):
        tensors = model.read_block(index)
        prefix = model.block_prefix(index)
        names = [name for name in tensors if prefix + name in request.weights]
        statistics: dict[str, Statistics] = {}
        if batches is not None:
            statistics = _gather(model, index, tensors, names, hidden)
        changed: dict[str, Tensor] = {}
        if request.config.resolved_algorithm == "awq":
            changed = _fold(model, tensors, statistics, prefix, request)
        weights = {name: tensors[name].float() for name in names}
        where = f"{model.view.location}: {prefix}"
        linears = solve(weights, statistics, where, request.config, request.scheme, request.counts, progress)
        if batches is not None and index + 1 < model.num_blocks:
            stored = {name: tensor.to(request.storage) for name, tensor in tensors.items()}
            stored |= {name: linear.dequantize() for name, linear in linears.items()}
            block = model.build_block(index, stored)
            hidden = [model.run_block(index, block, h_BSH) for h_BSH in hidden]
        yield QuantizedBlock(
            index=index,
            linears={prefix + name: linear for name, linear in linears.items()},
            plain={prefix + name: tensor for name, tensor in changed.items()},
        )


def _gather(
    model: StreamedModel, index: int, tensors: Mapping[str, Tensor], names: list[str], hidden: list[Tensor]
) -> dict[str, Statistics]:
    """Runs the block on all batches; linears called with the same tensor object share their statistics."""
    block = model.build_block(index, tensors)
    prefix = model.block_prefix(index)
    modules = {name.removesuffix(".weight"): module for name, module in block_linears(block).items()}
    collectors: dict[str, GramAccumulator] = {}
    sharing: dict[str, str] = {}
    last: list[tuple[str, Tensor]] = []

    def listen(name: str, module: nn.Linear) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            owner = next((other for other, tensor in last if tensor is x), None)
            if owner is None:
                last.append((name, x))
                owner = name
                if sharing.setdefault(name, owner) == name:
                    if name not in collectors:
                        collectors[name] = GramAccumulator(module.in_features, x.device, prefix + name)
                    collectors[name].add(x)
            sharing.setdefault(name, owner)

        module.register_forward_pre_hook(hook)

    for name in names:
        listen(name, modules[name.removesuffix(".weight")])
    for h_BSH in hidden:
        last.clear()
        model.run_block(index, block, h_BSH)
    last.clear()
    done = {name: Statistics(collector.gram(), collector.mean_abs()) for name, collector in collectors.items()}
    return {name: done[sharing[name]] for name in names}


def _fold(
    model: StreamedModel,
    tensors: dict[str, Tensor],
    statistics: dict[str, Statistics],
    prefix: str,
    request: QuantizeRequest,
) -> dict[str, Tensor]:
    """Applies the AWQ folds of this family to ``tensors`` in place; returns what changed and is not quantized."""
    folds = FOLDS.get(request.model_type, ())
    if not folds:
        request.counts["awq folds skipped: model family without a fold table"] += 1
        return {}
    context = FoldContext(
        heads=Heads.of(model.view.config),
        scheme=request.scheme,
        storage=request.storage,
        counts=request.counts,
    )
    changed: set[str] = set()
    for fold in folds:
        changed |= fold_scales(tensors, statistics, fold, context)
    return {name: tensors[name] for name in sorted(changed) if prefix + name not in request.weights}
