"""Statistics of what the linears of one block are given, from one pass over the calibration tokens.

Linears that are called with the same tensor share their statistics. What follows the call of the last linear (its own
product, often the block's largest) matters to none of them: the first batch tells in which order they are called, and
later batches end where the last one is, unless their outputs are wanted.

Dimension legend: B = rows in a batch, S = tokens per row, H = hidden size.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress

from torch import Tensor, nn

from qconv.expert_modules import all_experts
from qconv.experts import expert_of
from qconv.quantization_config import Statistic
from qconv.quantize.activations import Activations
from qconv.quantize.few_tokens import experts_of, filled_up, with_few_tokens
from qconv.quantize.fold_block import Statistics
from qconv.quantize.gram import GramAccumulator, check_inputs, no_tokens
from qconv.quantize.sample import SampleAccumulator
from qconv.skeleton import block_linears
from qconv.streaming import StreamedModel


class _SeenAllError(Exception):
    """Ends a forward pass in which every linear was called."""


def gather(
    model: StreamedModel,
    index: int,
    tensors: Mapping[str, Tensor],
    names: list[str],
    hidden: Activations,
    wanted: Collection[Statistic],
    *,
    advance: bool = False,
) -> dict[str, Statistics]:
    """Runs block ``index``, holding ``tensors``, on all batches; statistics by weight name, one object for each input.

    Experts that few tokens chose are given all tokens in a second pass, see `few_tokens`.

    Args:
        names: weights of the linears that are wanted.
        wanted: what to gather of them.
        advance: run each batch to its end, and put what the block makes of it in its place.

    Raises:
        CalibrationError: a linear that is no expert's is never called.
        NumericsError: NaN or infinity in an input; names its linear.
    """
    block = model.build_block(index, tensors)
    experts = dict(all_experts(block))
    statistics = _listen(model, index, block, names, hidden, wanted, advance=advance and not experts)
    if not experts:
        return statistics
    inputs = {name: tensors[name].shape[1] for name in names}
    few = with_few_tokens(names, statistics, inputs)
    if few:
        for module, numbers in experts_of(few).items():
            experts[module].given_all = numbers
        statistics |= filled_up(statistics, _listen(model, index, block, few, hidden, wanted, advance=False), inputs)
        for layer in experts.values():
            layer.given_all = frozenset()
    if advance:  # the second pass needed what the first one had
        for number, h_BSH in hidden.each():
            hidden.replace(number, model.run_block(index, block, h_BSH))
    return {name: statistics[name] for name in names}


def _listen(
    model: StreamedModel,
    index: int,
    block: nn.Module,
    names: list[str],
    hidden: Activations,
    wanted: Collection[Statistic],
    *,
    advance: bool,
) -> dict[str, Statistics]:
    """One pass; without the experts that no token chose."""
    linears = block_linears(block)
    listener = _Listener(names, model.block_prefix(index), wanted, len(hidden), ends_early=not advance)
    handles = [linears[name.removesuffix(".weight")].register_forward_pre_hook(listener.hook(name)) for name in names]
    for number, h_BSH in hidden.each():
        listener.begin()
        with suppress(_SeenAllError):
            out_BSH = model.run_block(index, block, h_BSH)
            if advance:
                hidden.replace(number, out_BSH)
    for handle in handles:
        handle.remove()
    return listener.statistics()


class _Listener:
    """Hears of every call of a wanted linear."""

    def __init__(
        self, names: list[str], prefix: str, wanted: Collection[Statistic], num_batches: int, ends_early: bool
    ):
        self._names = names
        self._prefix = prefix
        self._wanted = wanted
        self._expected_batches = num_batches
        self._ends_early = ends_early
        self._sums: dict[str, GramAccumulator] = {}
        self._samples: dict[str, SampleAccumulator] = {}
        self._num_tokens = Counter[str]()
        self._sharing: dict[str, str] = {}  # linear -> the one whose sums hold its inputs
        self._inputs: list[tuple[str, weakref.ref[Tensor]]] = []  # of this batch, with who was given each first
        self._calls: list[str] = []  # of this batch, in order
        self._num_batches = 0
        self._order: list[str] = []  # in which the first batch called the linears, if it called each of them once

    def begin(self) -> None:
        """A batch begins."""
        if self._ends_early and self._num_batches == 1 and sorted(self._calls) == sorted(self._names):
            self._order = self._calls
        self._num_batches += 1
        self._calls = []
        self._inputs.clear()

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hear(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._calls.append(name)
            self._add(name, args[0])
            if self._calls == self._order:  # a batch that calls them otherwise is run to its end
                raise _SeenAllError

        return hear

    def _add(self, name: str, x: Tensor) -> None:
        # Weak: an input lives no longer than the block needs it, and a dead one equals no new one.
        owner = next((other for other, tensor in self._inputs if tensor() is x), None)
        if owner is None:
            owner = name
            self._inputs.append((name, weakref.ref(x)))
            if self._sharing.setdefault(name, owner) == name:
                self._gather(name, x)
        self._sharing.setdefault(name, owner)

    def _gather(self, name: str, x: Tensor) -> None:
        where = self._prefix + name
        self._num_tokens[name] += x.shape[:-1].numel()
        if "gram" in self._wanted:
            if name not in self._sums:
                with_mean_abs = "mean_abs" in self._wanted
                self._sums[name] = GramAccumulator(x.shape[-1], x.device, where, with_mean_abs=with_mean_abs)
            self._sums[name].add(x)
        if "sample" in self._wanted:
            if name not in self._samples:
                self._samples[name] = SampleAccumulator(x.shape[-1], x.device, where, self._expected_batches)
            self._samples[name].add(x)

    def statistics(self) -> dict[str, Statistics]:
        check_inputs(self._sums.values())
        called = [name for name in self._names if name in self._sharing]
        uncalled = [name for name in self._names if name not in self._sharing]
        missing = next((name for name in uncalled if expert_of(name.removesuffix(".weight")) is None), None)
        if missing is not None:
            raise no_tokens(self._prefix + missing)
        done = {
            name: Statistics(
                gram_KK=self._sums[name].gram() if "gram" in self._wanted else None,
                mean_abs_K=self._sums[name].mean_abs() if "mean_abs" in self._wanted else None,
                sample=self._samples[name].sample() if "sample" in self._wanted else None,
                num_tokens=self._num_tokens[name],
            )
            for name in set(self._sharing.values())
        }
        return {name: done[self._sharing[name]] for name in called}
