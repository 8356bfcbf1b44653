"""Quantizes a model block by block, once for each of several requests; each block is read once for all of them.

For one decoder block: gather the Gram matrix of every distinct linear input (linears that share an
input share one), fold AWQ scales, choose the codes, then run the block again with the weights as
they will be stored, whose outputs feed the next block: each block sees the activations that the
stored blocks before it make. Only one block is in memory, plus the activations. Round-to-nearest and
FP8 need no activations.

Where several requests are calibrated they share the statistics, and the activations are those of the
unquantized blocks: one forward pass gives the statistics and the next block's input, and no output
depends on what else is made beside it or in which order. What that costs is in docs/architecture.md.

Keys and values, where an FP8 cache is wanted for them, are looked at in a pass with the weights as they will be stored:
the one that makes the next block's input, or one that ends at the attention.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qconv.experts import stays_float32
from qconv.progress import QUIET, Progress
from qconv.quantization_config import Folding, QuantizationConfig, Statistic
from qconv.quantize.activations import Activations
from qconv.quantize.few_tokens import tokens_of_experts, with_few_tokens
from qconv.quantize.fold_block import FoldContext, Statistics, fold_scales
from qconv.quantize.folds import Heads, folds_of
from qconv.quantize.gather import gather
from qconv.quantize.key_values import CacheRanges
from qconv.quantize.memory import ModelShape, free_memory, plan_memory, solving_order
from qconv.quantize.solve import round_searched, solve
from qconv.quantize.zeros import ZeroMoves, moved_zeros
from qconv.skeleton import StoredBlocks
from qconv.streaming import StreamedModel
from qconv.targets import TARGETS
from qconv.timeline import TIMELINE
from qconv.types import QuantizedLinear, Scheme


@dataclass(frozen=True, kw_only=True)
class QuantizedBlock:
    """One finished block.

    Attributes:
        request: number of the request that it answers.
        linears: quantized weights by full tensor name.
        plain: the block's other tensors by full name: as read, or float32 where they took an AWQ scale.
        cache_scales: of keys and values, ``[1]`` float32 each, by the full name of their attention.
    """

    index: int
    request: int
    linears: Mapping[str, QuantizedLinear]
    plain: Mapping[str, Tensor]
    cache_scales: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest:
    """What to do to a model.

    Attributes:
        config: algorithm and options.
        scheme: resolved scheme of every weight that is not in ``schemes``.
        weights: full names of the weights to quantize; others stay as they are.
        schemes: of weights that may have another one, by full name.
        head: the weight of the output head, when it is among ``weights``; of several requests the same one.
        storage: dtype in which unquantized tensors will be stored.
        model_type: as in config.json; selects the AWQ folds.
        counts: what happened.
        cache_scales: is filled with those of keys and values, by the attention's full name.
        expert_tokens: is filled with the calibration tokens that chose each expert, by the module of a layer's experts.
        gpu_memory_limit: bytes that the process may take on a GPU; None = what is free there.
        kept: for an algorithm that keeps the base's codes, reads them by full name on a device; and what became of
            their zero points, `zero_moves`.
    """

    config: QuantizationConfig
    scheme: Scheme
    weights: Collection[str]
    storage: torch.dtype
    model_type: str
    gpu_memory_limit: int | None = None
    counts: Counter[str] = field(default_factory=Counter)
    expert_tokens: dict[str, list[int]] = field(default_factory=dict)
    cache_scales: dict[str, tuple[float, float]] = field(default_factory=dict)
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    head: str | None = None
    kept: Callable[[str, str], QuantizedLinear] | None = None
    zero_moves: ZeroMoves = field(default_factory=ZeroMoves)

    def scheme_of(self, weight: str) -> Scheme:
        return self.schemes.get(weight, self.scheme)


def quantize_blocks(
    model: StreamedModel | StoredBlocks,
    requests: Sequence[QuantizeRequest],
    calibration: Tensor | Sequence[Tensor] | None,
    progress: Progress = QUIET,
) -> Iterator[QuantizedBlock]:
    """Yields the blocks in order, each as often as there are requests; each is read once.

    An output head that some request quantizes comes last, as one more block.

    What happened (scales folded or skipped, damping raised, dead channels) is counted in the request's ``counts``.

    Args:
        model: `StoredBlocks` will do where there is no calibration.
        requests: what to make of each block; see the module's text on several that are calibrated.
        calibration: int64 ``[R, S]`` token rows, put into batches as `plan_memory` says; or the batches ``[B, S]``
            themselves, whose activations then stay on the device; None when no algorithm needs any.

    Raises:
        NumericsError: NaN or infinity in weights or activations; names the tensor.
        CapacityError: the model does not fit the GPU, however it is run.
    """
    hidden = None
    if calibration is not None:
        assert isinstance(model, StreamedModel)  # what is calibrated has to run
        with TIMELINE.stage("embed"):
            hidden = _embed(model, requests, calibration, progress)
    label = " + ".join(dict.fromkeys(request.config.resolved_algorithm for request in requests))
    for index in progress.track(range(model.num_blocks), label, model.num_blocks):
        yield from _quantize_block(model, index, requests, hidden, progress)
    del hidden  # the head needs room of its own
    head = next((request.head for request in requests if request.head is not None), None)
    if head is not None:
        yield from _quantize_head(model, head, requests)


def _quantize_head(
    model: StreamedModel | StoredBlocks, name: str, requests: Sequence[QuantizeRequest]
) -> Iterator[QuantizedBlock]:
    """The output head, whose inputs no block sees: each group's grid searched, then round-to-nearest."""
    with TIMELINE.stage("read block"):
        w_NK = model.view.read(name, model.device)
    for number, request in enumerate(requests):
        if request.head is None:
            yield QuantizedBlock(index=model.num_blocks, request=number, linears={}, plain={name: w_NK})
            continue
        with TIMELINE.stage("solve"):
            linear = round_searched(w_NK.float(), request.scheme_of(name), f"{model.view.location}: {name}")
        request.counts["output head rounded to nearest on a searched grid, without calibration"] = 1
        yield QuantizedBlock(index=model.num_blocks, request=number, linears={name: linear}, plain={})


def _embed(
    model: StreamedModel,
    requests: Sequence[QuantizeRequest],
    calibration: Tensor | Sequence[Tensor],
    progress: Progress,
) -> Activations:
    if not isinstance(calibration, Tensor):
        return Activations.embed(model, calibration, "device")
    num_rows, seq_len = calibration.shape
    limits = [request.gpu_memory_limit for request in requests if request.gpu_memory_limit is not None]
    plan = plan_memory(
        ModelShape.of(model, frozenset().union(*(request.weights for request in requests))),
        num_rows,
        seq_len,
        [request.config for request in requests],
        model.device,
        free_memory(model.device),
        min(limits, default=None),
    )
    progress.detail(f"memory plan: {plan}")
    return Activations.embed(model, torch.split(calibration, plan.rows_per_batch), plan.placement)


def _quantize_block(
    model: StreamedModel | StoredBlocks,
    index: int,
    requests: Sequence[QuantizeRequest],
    hidden: Activations | None,
    progress: Progress,
) -> Iterator[QuantizedBlock]:
    with TIMELINE.stage("read block"):
        tensors = model.read_block(index)
    statistics: dict[str, Statistics] = {}
    calibrated = [request for request in requests if request.config.needs_calibration]
    is_last = index + 1 == model.num_blocks
    advances = len(calibrated) > 1 and not is_last
    # Looking at keys and values takes the block's inputs once more: then they are replaced at the end.
    advances_at_end = advances and any(request.config.kv_cache for request in requests)
    if hidden is not None:
        assert isinstance(model, StreamedModel)
        with TIMELINE.stage("gather"):
            statistics = _gather(model, index, tensors, calibrated, hidden, advance=advances and not advances_at_end)
    # Until the last one, what was read and gathered has to stay.
    order = solving_order([request.config for request in requests])
    for number in order:
        request = requests[number]
        shared = number != order[-1] or advances_at_end
        own = (dict(tensors), dict(statistics)) if shared else (tensors, statistics)
        is_alone = calibrated == [request] and not is_last
        yield _answer(model, index, number, request, *own, hidden, progress, advance=is_alone)
    if advances_at_end:
        assert isinstance(model, StreamedModel)
        assert hidden is not None
        with TIMELINE.stage("advance"):
            block = model.build_block(index, tensors)
            for number, h_BSH in hidden.each():
                hidden.replace(number, model.run_block(index, block, h_BSH))


def _gather(
    model: StreamedModel,
    index: int,
    tensors: Mapping[str, Tensor],
    requests: Sequence[QuantizeRequest],
    hidden: Activations,
    *,
    advance: bool,
) -> dict[str, Statistics]:
    prefix = model.block_prefix(index)
    wanted = frozenset[Statistic]().union(*(request.config.statistics for request in requests))
    if not (wanted or advance):
        return {}
    asking = [request for request in requests if request.config.statistics]
    names = [name for name in tensors if any(prefix + name in request.weights for request in asking)]
    return gather(model, index, tensors, names, hidden, wanted, advance=advance)


def _answer(
    model: StreamedModel | StoredBlocks,
    index: int,
    number: int,
    request: QuantizeRequest,
    tensors: dict[str, Tensor],
    statistics: dict[str, Statistics],
    hidden: Activations | None,
    progress: Progress,
    *,
    advance: bool,
) -> QuantizedBlock:
    """What one request makes of a block; takes out of both dictionaries what it no longer needs before the next step.

    Args:
        hidden: what the block is given; None = it is not run.
        advance: put what the block as it will be stored makes of it in its place.
    """
    prefix = model.block_prefix(index)
    names = [name for name in tensors if prefix + name in request.weights]
    for name in statistics.keys() - set(names):  # another request's
        del statistics[name]
    if statistics:
        _count_tokens(statistics, tensors, prefix, request)
    if request.config.folding is not None:
        with TIMELINE.stage("fold"):
            _fold(model, tensors, statistics, prefix, request, request.config.folding)
    with TIMELINE.stage("solve"):
        where = f"{model.view.location}: {prefix}"
        solved: dict[str, QuantizedLinear] = {}
        # Linears with an equal scheme together: those that share an input are solved as one.
        if request.kept is not None:
            solved = {n: _moved(model, prefix + n, tensors.pop(n), request) for n in names}
        for scheme in dict.fromkeys(request.scheme_of(prefix + name) for name in names if name not in solved):
            weights = {n: tensors.pop(n).float() for n in names if request.scheme_of(prefix + n) == scheme}
            solved |= solve(weights, statistics, where, request.config, scheme, request.counts, progress)
        linears = {name: solved[name] for name in names}
    cache_scales: Mapping[str, tuple[Tensor, Tensor]] = {}
    if hidden is not None and (advance or request.config.kv_cache):
        assert isinstance(model, StreamedModel)
        with TIMELINE.stage("advance"):
            cache_scales = _run_stored(model, index, tensors, linears, request, hidden, advance)
    return QuantizedBlock(
        index=index,
        request=number,
        linears={prefix + name: linear for name, linear in linears.items()},
        plain={prefix + name: tensor for name, tensor in tensors.items()},
        cache_scales=cache_scales,
    )


def _moved(model: StreamedModel | StoredBlocks, name: str, w_NK: Tensor, request: QuantizeRequest) -> QuantizedLinear:
    assert request.kept is not None
    stored, scheme = request.kept(name, str(w_NK.device)), request.scheme_of(name)
    where = f"{model.view.location}: {name}"
    target = TARGETS[request.config.target]
    in_storage = request.storage if target.format == "hqq" else None
    zeros_in = in_storage or (torch.float32 if target.has_float_zeros else torch.uint8)
    return moved_zeros(w_NK, stored, scheme, zeros_in, where, request.zero_moves, in_storage)


def _count_tokens(
    statistics: Mapping[str, Statistics], tensors: Mapping[str, Tensor], prefix: str, request: QuantizeRequest
) -> None:
    """Says how many tokens chose each expert, and which had too few of their own."""
    tokens = tokens_of_experts(statistics, statistics)
    request.expert_tokens.update({prefix + module: numbers for module, numbers in tokens.items()})
    if not tokens:
        return
    few = with_few_tokens(statistics, statistics, {name: tensors[name].shape[1] for name in statistics})
    unseen = [name for name in few if statistics[name].num_tokens == 0]
    request.counts["linears of experts that no calibration token chose"] += len(unseen)
    request.counts["linears of experts with fewer tokens than inputs"] += len(few) - len(unseen)


def _run_stored(
    model: StreamedModel,
    index: int,
    others: Mapping[str, Tensor],
    linears: Mapping[str, QuantizedLinear],
    request: QuantizeRequest,
    hidden: Activations,
    advance: bool,
) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Runs the block with its weights as they will be stored; scales of its keys and values, where they are wanted.

    Args:
        advance: run each batch to its end, and put what the block makes of it in its place.
    """
    config, storage = model.view.config, request.storage
    stored = {name: tensor if stays_float32(name, config) else tensor.to(storage) for name, tensor in others.items()}
    for name, linear in linears.items():  # one float32 copy at a time
        stored[name] = linear.dequantize().to(model.compute_dtype)
    block = model.build_block(index, stored)
    if request.config.kv_cache is None:
        for number, h_BSH in hidden.each():
            hidden.replace(number, model.run_block(index, block, h_BSH))
        return {}
    ranges = CacheRanges(block, model.block_prefix(index), ends_early=not advance)
    if ranges.wants_nothing:
        return {}
    with ranges.listening():
        for number, h_BSH in hidden.each():
            with ranges.batch():
                out_BSH = model.run_block(index, block, h_BSH)
                if advance:
                    hidden.replace(number, out_BSH)
    scales = ranges.scales()
    request.cache_scales.update({name: (float(keys), float(values)) for name, (keys, values) in scales.items()})
    return scales


def _fold(
    model: StreamedModel | StoredBlocks,
    tensors: dict[str, Tensor],
    statistics: dict[str, Statistics],
    prefix: str,
    request: QuantizeRequest,
    method: Folding,
) -> None:
    """Applies the folds of this family: puts new tensors and statistics in the place of old ones."""
    folds = folds_of(request.model_type, tensors)
    if not folds:
        request.counts[f"{method} folds skipped: model family without a fold table"] += 1
        return
    for fold in folds:
        context = FoldContext(
            method=method,
            heads=Heads.of(model.view.config),
            scheme=request.scheme_of(f"{prefix}{fold.targets[0]}.weight"),  # engines fuse all of them: one scheme
            storage=request.storage,
            counts=request.counts,
            where=f"{model.view.location}: {prefix}",
        )
        fold_scales(tensors, statistics, fold, context)
