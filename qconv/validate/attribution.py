"""Which part of the candidate costs how much KL, when it alone is swapped into the reference.

A unit (a block, one linear, the embedding, the output head) of the candidate takes the place of the
reference's; everything else stays. KL(reference || reference with that unit) is the unit's cost.
Costs of small independent errors add up, so the sum over the units is compared with the KL of the
whole candidate on the same tokens: far from 1, errors compensate or amplify one another, and single
costs say less.

Blocks first, each alone: every swapped stream is carried through the reference's later blocks, half
the model on average, so L blocks cost L / 2 forward passes. Then the linears of the costliest blocks.
A candidate whose scales were folded between modules (AWQ) cannot have one linear swapped; there a
unit is a part of the block that is closed under the folds: attention or MLP with the norm before it.

Dimension legend: B = rows, S = tokens per row, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qconv.experts import EXPERTS, RUNNING, expert_of
from qconv.progress import QUIET, Progress
from qconv.skeleton import block_linears
from qconv.streaming import BlockModel
from qconv.validate.divergences import divergences

TOP_BLOCKS = 3  # whose linears are measured one by one
_FOLDED = 2**-7  # relative difference of a norm's weight that no rounding to bfloat16 explains
_FEW_EXPERTS = 16  # in a layer, to swap them one by one
_AMPLIFIED = 10  # linears that cost this much more than their block are scaled against one another
EMBEDDING, HEAD = "embedding", "output head and final norm"

Modules = tuple[str, ...]
"""Names inside a block of the modules that are swapped together; empty = the whole block."""


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """Costs in nats per token on ``num_positions`` positions.

    Attributes:
        total: KL of the whole candidate on the same positions.
        blocks: cost of each block, and of the parts outside the blocks, by name.
        linears: cost of the parts of the costliest blocks, by name.
    """

    num_positions: int
    total: float
    blocks: Mapping[str, float]
    linears: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        parts = sum(self.blocks.values())

        def units(costs: Mapping[str, float]) -> list[dict[str, Any]]:
            return [
                {"name": name, "kl_mean": kl, "share": kl / parts if parts > 0 else 0.0} for name, kl in costs.items()
            ]

        return {
            "positions": self.num_positions,
            "total_kl": self.total,
            "sum_of_parts": parts,
            "additivity": parts / self.total if self.total > 0 else None,
            "blocks": units(self.blocks),
            "linears": units(self.linears),
        }


def attribute(reference: BlockModel, candidate: BlockModel, ids_BS: Tensor, progress: Progress = QUIET) -> Attribution:
    """Measures the cost of every block, and of the linears of the costliest ones, on a few rows.

    Args:
        ids_BS: int64 ``[B, S]``; all rows run together, so a few hundred to a few thousand tokens.
    """
    run = _Swaps(reference, candidate, ids_BS)
    whole: Mapping[int, Sequence[Modules]] = {index: [()] for index in range(reference.num_blocks)}
    costs = run.measure(whole, outside=True, label="attribute", progress=progress)
    total = costs.pop("candidate")
    top = sorted((name for name in costs if name.startswith(run.prefix)), key=lambda name: -costs[name])[:TOP_BLOCKS]
    indices = [int(name.removeprefix(run.prefix)) for name in top if costs[name] > 0]
    linears = run.measure(
        {index: _units(run, index) for index in indices}, outside=False, label="attribute linears", progress=progress
    )
    amplified = [
        index
        for index in indices
        if max((kl for name, kl in linears.items() if name.startswith(f"{run.prefix}{index}.")), default=0)
        > _AMPLIFIED * costs[f"{run.prefix}{index}"]
    ]
    if amplified:
        parts = {index: _closed_units(run, index) for index in amplified}
        linears = {
            name: kl for name, kl in linears.items() if int(name[len(run.prefix) :].split(".")[0]) not in amplified
        } | run.measure(parts, outside=False, label="attribute parts", progress=progress)
    order = sorted(linears, key=lambda name: -linears[name])
    return Attribution(
        num_positions=ids_BS.shape[0] * (ids_BS.shape[1] - 1),
        total=total,
        blocks=costs,
        linears={name: linears[name] for name in order},
    )


class _Swaps:
    def __init__(self, reference: BlockModel, candidate: BlockModel, ids_BS: Tensor):
        self.reference = reference
        self.candidate = candidate
        self.ids_BS = ids_BS
        self.prefix = reference.layers_name + "."

    def measure(
        self, units: Mapping[int, Sequence[Modules]], outside: bool, label: str, progress: Progress
    ) -> dict[str, float]:
        """Mean KL of the reference with each unit swapped in, by the unit's name.

        Args:
            units: what to swap, by block.
            outside: also the embedding, the head, and the whole candidate (named ``"candidate"``).
        """
        if not units and not outside:
            return {}
        (plain_BSH,) = self.reference.embed([self.ids_BS])
        (own_BSH,) = self.candidate.embed([self.ids_BS])
        streams: dict[str, Tensor] = {EMBEDDING: own_BSH} if outside else {}
        num = self.reference.num_blocks
        for index in progress.track(range(num), label, num):
            block = self.reference.load_block(index)
            later = {name: _run(self.reference, index, block, h_BSH) for name, h_BSH in streams.items()}
            if outside or index in units:
                other = self.candidate.load_block(index)
                for modules in units.get(index, ()):
                    later[self._name(index, modules)] = self._swapped(index, block, other, modules, plain_BSH)
                if outside:
                    own_BSH = self.candidate.run_block(index, other, own_BSH)
                del other
            plain_BSH = self.reference.run_block(index, block, plain_BSH)
            streams = later
        return self._costs(plain_BSH, streams, own_BSH if outside else None)

    def _name(self, index: int, modules: Modules) -> str:
        name = f"{self.prefix}{index}"
        if not modules:
            return name
        first, *rest = modules
        return f"{name}.{first}" + (f" with {', '.join(rest)}" if rest else "")

    def _swapped(self, index: int, block: nn.Module, other: nn.Module, modules: Modules, h_BSH: Tensor) -> Tensor:
        if not modules:
            return _run(self.candidate, index, other, h_BSH)
        with _replaced(block, other, modules):
            return self.reference.run_block(index, block, h_BSH)

    def _costs(self, plain_BSH: Tensor, streams: Mapping[str, Tensor], own_BSH: Tensor | None) -> dict[str, float]:
        head = self.reference.head()
        others = {name: (head, h_BSH.to(plain_BSH.dtype)) for name, h_BSH in streams.items()}
        if own_BSH is not None:
            own_head = self.candidate.head()
            others[HEAD] = own_head, plain_BSH.to(own_BSH.dtype)
            others["candidate"] = own_head, own_BSH
        return divergences(head, plain_BSH, others)


def _run(model: BlockModel, index: int, block: nn.Module, h_BSH: Tensor) -> Tensor:
    """A block on hidden states of the other model, which may compute in another dtype."""
    return model.run_block(index, block, h_BSH.to(_dtype_of(block, h_BSH.dtype)))


def _dtype_of(module: nn.Module, default: torch.dtype) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), default)


class _InOwnDtype(nn.Module):
    """A module of the other model, within a block that may compute in another dtype."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **options: Any) -> Any:
        given = next(x for x in (*args, *options.values()) if isinstance(x, Tensor) and x.is_floating_point())
        own = _dtype_of(self.module, given.dtype)
        if own == given.dtype:
            return self.module(*args, **options)
        return _cast(self.module(*_cast(args, own), **_cast(options, own)), given.dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """All tensors of floats inside, in another dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_cast(part, dtype) for part in value)
    return {key: _cast(part, dtype) for key, part in value.items()} if type(value) is dict else value


@contextmanager
def _replaced(block: nn.Module, other: nn.Module, modules: Modules) -> Iterator[None]:
    """Within this context ``block`` runs with ``modules`` of ``other``."""
    own = {name: block.get_submodule(name) for name in modules}
    try:
        for name in modules:
            _set(block, name, _InOwnDtype(other.get_submodule(name)))
        yield
    finally:
        for name, module in own.items():
            _set(block, name, module)


def _set(block: nn.Module, name: str, module: nn.Module) -> None:
    *path, leaf = name.split(".")
    parent = block.get_submodule(".".join(path))
    before, parent._modules[leaf] = parent._modules.get(leaf), module
    for alias, value in list(parent.__dict__.items()):  # of layers of experts, see `expert_modules`
        if value is before:
            parent.__dict__[alias] = module


def _units(run: _Swaps, index: int) -> list[Modules]:
    block, other = run.reference.load_block(index), run.candidate.load_block(index)
    if _is_folded(block, other):
        return _closed_units(run, index)
    return list(dict.fromkeys((_unit(block, other, name),) for name in block_linears(other)))


def _unit(block: nn.Module, other: nn.Module, name: str) -> str:
    """What is swapped to swap a linear: itself, or of experts one of a few, or all of a layer.

    A model that transformers runs holds all experts in two parameters, under a name of its own.
    """
    expert = expert_of(name)
    if expert is None:
        return name
    ways = [expert.experts, f"{RUNNING}.{EXPERTS}"]
    if len(other.get_submodule(expert.experts)._modules) <= _FEW_EXPERTS:
        ways.insert(0, f"{expert.experts}.{expert.number}")
    return next(way for way in ways if _has(block, way))


def _has(block: nn.Module, name: str) -> bool:
    try:
        block.get_submodule(name)
    except AttributeError:
        return False
    return True


def _is_folded(block: nn.Module, other: nn.Module) -> bool:
    """Whether a norm has other weights than the reference's: then scales were folded into it."""
    linears = tuple(block_linears(other))
    own = dict(block.named_parameters())
    for name, weight in other.named_parameters():
        if weight.ndim == 1 and not name.startswith(linears) and name in own:
            norm, expected = weight.float(), own[name].float().to(weight.device)
            if float((norm - expected).detach().abs().max()) > _FOLDED * float(expected.detach().abs().max()):
                return True
    return False


def _closed_units(run: _Swaps, index: int) -> list[Modules]:
    """The children of a block that hold linears, each with the norms that run just before it."""
    order: list[str] = []
    other = run.candidate.load_block(index)
    handles = [
        child.register_forward_pre_hook(lambda _, __, name=name: order.append(name))
        for name, child in other.named_children()
    ]
    (h_BSH,) = run.candidate.embed([run.ids_BS])
    run.candidate.run_block(index, other, h_BSH)
    for handle in handles:
        handle.remove()
    units: list[Modules] = []
    waiting: list[str] = []
    reference = run.reference.load_block(index)
    for name in dict.fromkeys(order):
        if not _has(reference, name):  # a model that transformers runs, whose experts have a name of its own
            units.append((RUNNING, *waiting))
            waiting = []
        elif block_linears(other.get_submodule(name)) or isinstance(other.get_submodule(name), nn.Linear):
            units.append((name, *waiting))
            waiting = []
        else:
            waiting.append(name)
    return units
