"""A budget for the size of the quantized linears: what each choice takes, what can be reached, and what is chosen.

A choice is a width and a group size, or 4-bit floats, which have groups of their own. Groups are part of it since their
scales are bits, too: with one for each row a weight takes a quarter of a bit less than with groups of 64, which is
worth it for some linears and not for others.

Bits per weight are those of all tensors that a format stores for the quantized linears (codes, scales, zero points,
shapes, a group index), divided by the number of their weights. What is not quantized does not count.

Linears that engines run as one get one choice (`fused_linears`). What an override is about keeps what it would have
without a budget, and counts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, log, prod

import torch

from qconv.allocation import Option, allocate
from qconv.convert import Format, format_for
from qconv.errors import SchemeError, UsageError
from qconv.overrides import OverrideConfig, fused_linears, matches
from qconv.quantization_config import GROUP_SIZES, QuantizationConfig
from qconv.selection import HEAD, schemes_of
from qconv.targets import target_scheme
from qconv.types import Checkpoint, QuantizedLinear, Scheme

FLOATS_LIKE: Mapping[str | None, int] = {"nvfp4a16": 32, "mxfp4a16": 1024}
"""Groups of 4-bit integers that round normal numbers with as large a squared error, grids searched."""


@dataclass(frozen=True)
class Choice:
    """What a unit may get.

    Attributes:
        bits: of a weight.
        group_size: inputs that share a scale; -1 = the whole row.
        target: whose 4-bit floats these are; None = integers.
    """

    bits: int
    group_size: int
    target: str | None = None

    @classmethod
    def floats(cls, target: str) -> Choice:
        """The only one that a target of 4-bit floats has."""
        scheme = target_scheme(target)
        return cls(scheme.bits, scheme.group_size, target)

    def __str__(self) -> str:
        return self.target or f"{self.bits} bits {_in_words(self.group_size)}"

    @property
    def width(self) -> str:
        """Without the groups of integers."""
        return self.target or f"{self.bits} bits"

    def of(self, scheme: Scheme) -> Scheme:
        """A scheme with this width and these groups, or these floats in the same order of columns."""
        if self.target is not None:
            return replace(target_scheme(self.target), activation_order=scheme.activation_order)
        return replace(scheme, bits=self.bits, group_size=self.group_size)


def _in_words(group_size: int) -> str:
    return "with one scale for each row" if group_size == -1 else f"in groups of {group_size}"


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Linears that get one choice.

    Attributes:
        name: of the linear, or what engines call those that they run as one.
        modules: all of them.
        num_weights: of all of them.
        num_bytes: what they take on disk, by choice.
    """

    name: str
    modules: tuple[str, ...]
    num_weights: int
    num_bytes: Mapping[Choice, int]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Attributes:
    units: whose width and groups are to be chosen.
    kept: modules whose scheme is given.
    kept_bytes: what those take on disk.
    num_weights: of all quantized linears.
    group_size: that all units have where nothing chooses one.
    """

    units: tuple[Unit, ...]
    kept: tuple[str, ...]
    kept_bytes: int
    num_weights: int
    group_size: int

    def num_bytes(self, chosen: Mapping[str, Choice]) -> int:
        """Of all quantized linears on disk, with what is ``chosen`` for the units by name."""
        return self.kept_bytes + sum(unit.num_bytes[chosen[unit.name]] for unit in self.units)

    def everywhere(self, choice: Choice) -> dict[str, Choice]:
        """All units alike."""
        return dict.fromkeys((unit.name for unit in self.units), choice)

    def alike(self, config: QuantizationConfig) -> list[Choice]:
        """What all units could have: each width in the groups that nothing chooses, and floats that fit all."""
        found = [Choice(bits, self.group_size) for bits in config.widths]
        found += [Choice.floats(target) for target in config.budget_targets]
        return [choice for choice in found if all(choice in unit.num_bytes for unit in self.units)]

    def bits_per_weight(self, num_bytes: int) -> float:
        return 8 * num_bytes / self.num_weights

    @property
    def reach(self) -> tuple[float, float]:
        """The fewest and the most bits per weight, rounded up to four decimals: budgets that hold them."""
        least = self.kept_bytes + sum(min(unit.num_bytes.values()) for unit in self.units)
        most = self.kept_bytes + sum(max(unit.num_bytes.values()) for unit in self.units)
        return ceil(1e4 * self.bits_per_weight(least)) / 1e4, ceil(1e4 * self.bits_per_weight(most)) / 1e4


def meta_quantized(n: int, k: int, scheme: Scheme, desc_act: bool) -> QuantizedLinear:
    """A quantized weight ``[n, k]`` without data."""
    scales_shape = scheme.scales_shape(n, k)
    code_dtype = torch.float8_e4m3fn if scheme.kind == "float" and scheme.bits == 8 else torch.uint8
    return QuantizedLinear(
        codes_NK=torch.empty(n, k, dtype=code_dtype, device="meta"),
        scales_NG=torch.empty(scales_shape, device="meta"),
        zeros_NG=None if scheme.symmetric else torch.empty(scales_shape, dtype=torch.uint8, device="meta"),
        group_index_K=torch.empty(k, dtype=torch.int32, device="meta") if desc_act else None,
        scheme=scheme,
        input_scale=torch.empty(1, device="meta") if scheme.stores_input_scale else None,
        global_scale=torch.empty(1, device="meta") if scheme.has_global_scale else None,
    )


def sizes_of(
    view: Checkpoint, weights: Sequence[str], config: QuantizationConfig, fmt: Format, storage: torch.dtype
) -> Sizes:
    """What the linears of an output with a budget take.

    Args:
        weights: full names of the weights to quantize.

    Raises:
        UsageError: the budget is out of reach; says what can be reached. Nothing is left to choose.
        SchemeError: a width that does not fit a linear.
    """
    specs, modules = view.specs(), [name.removesuffix(".weight") for name in weights]
    default, schemes = schemes_of(view, weights, config)
    kept = tuple(
        module
        for module in modules
        if module == HEAD or any(matches(override.pattern, module) for override in config.overrides)
    )
    free = [module for module in modules if module not in set(kept)]
    if not free:
        raise UsageError(f"{_given(config)}: overrides are about all linears, and leave nothing to choose")

    def shape(module: str) -> tuple[int, ...]:
        return specs[f"{module}.weight"].shape

    def num_bytes(module: str, scheme: Scheme) -> int:
        n, k = shape(module)
        own = format_for(fmt, scheme)
        own.check_shapes(module, n, k, scheme)
        packed = own.pack(meta_quantized(n, k, scheme, config.desc_act), module, storage)
        return sum(tensor.numel() * tensor.element_size() for tensor in packed.values())

    def of_unit(name: str, members: Sequence[str]) -> Unit:
        choices = _choices(config, [shape(module)[1] for module in members])
        if not choices:
            raise SchemeError(
                f"{view.location}: {name}: {_given(config)}: none of {', '.join(config.budget_targets)} divides its "
                "input features; give widths of integers, too, with --budget-bits"
            )
        return Unit(
            name=name,
            modules=tuple(members),
            num_weights=sum(prod(shape(module)) for module in members),
            num_bytes={
                choice: sum(num_bytes(module, choice.of(schemes[f"{module}.weight"])) for module in members)
                for choice in choices
            },
        )

    sizes = Sizes(
        units=tuple(of_unit(name, members) for name, members in together(free).items()),
        kept=kept,
        kept_bytes=sum(num_bytes(module, schemes[f"{module}.weight"]) for module in kept),
        num_weights=sum(prod(specs[name].shape) for name in weights),
        group_size=default.group_size,
    )
    _check_reach(sizes, config, view.location)
    return sizes


def _choices(config: QuantizationConfig, in_features: Collection[int]) -> list[Choice]:
    """Those for linears with these K, in the order in which equal ones are preferred."""
    found = [Choice(bits, size) for bits in config.widths for size in _group_sizes(config, in_features)]
    floats = map(Choice.floats, config.budget_targets)
    return found + [choice for choice in floats if all(k % choice.group_size == 0 for k in in_features)]


def _group_sizes(config: QuantizationConfig, in_features: Collection[int]) -> tuple[int, ...]:
    """Those to choose from for linears with these K: what was given, or all that engines have kernels for."""
    if config.group_size is not None:
        return (config.group_size,)
    fitting = [size for size in GROUP_SIZES if all(k % size == 0 for k in in_features)]
    return (*fitting, *(() if config.desc_act else (-1,)))  # an order of columns is stored for the sake of groups


def _given(config: QuantizationConfig) -> str:
    return f"--budget {config.budget:g}bpw"


def _check_reach(sizes: Sizes, config: QuantizationConfig, location: str) -> None:
    assert config.budget is not None
    least, most = sizes.reach
    if least <= config.budget <= most:
        return
    kept = f", {len(sizes.kept)} linears of which keep what --override or --lm-head says" if sizes.kept else ""
    groups = "" if config.group_size is None else f" {_in_words(config.group_size)}"
    raise UsageError(
        f"{_given(config)}: {location}: with {_widths_in_words(config, groups)} for each linear{kept}, the "
        f"quantized linears take {least:.4f} to {most:.4f} bits per weight, scales included; give a budget in between, "
        "or other widths with --budget-bits"
    )


def _widths_in_words(config: QuantizationConfig, groups: str) -> str:
    """What a budget chooses from."""
    *others, last = [*map(str, config.widths), *config.budget_targets]
    if config.budget_targets:
        return f"{', '.join(others)} or {last}{f' (integers{groups})' if groups and config.widths else ''}"
    return f"{', '.join(others)} or {last} bits{groups}"


def together(modules: Collection[str]) -> dict[str, list[str]]:
    """Units by name, in the order of the model."""
    # All experts of a layer are one, and gate and up of each one of them, too: the larger counts.
    found = sorted(fused_linears(modules).items(), key=lambda fused: len(fused[1]))
    unit_of = {module: name for name, members in found for module in members}
    units: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        units[unit_of.get(module, module)].append(module)
    return units


def choose(sizes: Sizes, config: QuantizationConfig, costs: Mapping[str, Mapping[Choice, float]]) -> dict[str, Choice]:
    """What each unit gets, by name: the smallest sum of ``costs`` (by name and choice) within the budget."""
    assert config.budget is not None
    items = [
        [Option(num_bytes=num_bytes, cost=costs[unit.name][choice]) for choice, num_bytes in unit.num_bytes.items()]
        for unit in sizes.units
    ]
    numbers = allocate(items, int(config.budget * sizes.num_weights / 8) - sizes.kept_bytes)
    return {unit.name: list(unit.num_bytes)[number] for unit, number in zip(sizes.units, numbers, strict=True)}


def without_budget(config: QuantizationConfig, sizes: Sizes, chosen: Mapping[str, Choice]) -> QuantizationConfig:
    """The same output with a group size and overrides in the place of the budget."""
    default = Choice(config.default_bits, sizes.group_size)  # of what no override is about
    groups: dict[tuple[Choice, str], set[str]] = defaultdict(set)
    for unit in sizes.units:
        for module in unit.modules:
            if chosen[unit.name] != default:
                role, number = _role(module)
                groups[chosen[unit.name], role].add(number)
    overrides = [
        OverrideConfig(
            pattern=f"re:{role.replace('#', _alternatives(numbers))}$",
            bits=choice.bits if choice.target is None and choice.bits != default.bits else None,
            group_size=choice.group_size if choice.target is None and choice.group_size != default.group_size else None,
            target=choice.target,
        )
        for (choice, role), numbers in groups.items()
    ]
    return replace(
        config,
        budget=None,
        budget_bits=(),
        group_size=sizes.group_size,
        overrides=(*config.overrides, *overrides),
    )


def _role(module: str) -> tuple[str, str]:
    """A regular expression for a linear with ``#`` for the number of its block, and that number."""
    parts = module.split(".")
    place = next(i for i, part in enumerate(parts) if part.isdecimal())
    pattern = [r"\d+" if part.isdecimal() else re.escape(part) for part in parts]
    pattern[place] = "#"
    return r"\.".join(pattern), parts[place]


def _alternatives(numbers: Collection[str]) -> str:
    ordered = sorted(numbers, key=int)
    return ordered[0] if len(ordered) == 1 else f"({'|'.join(ordered)})"


def before_measuring(
    view: Checkpoint, weights: Sequence[str], config: QuantizationConfig, fmt: Format, storage: torch.dtype
) -> QuantizationConfig:
    """An output of the size that the budget allows, for plans: as if all weights did the same harm.

    The squared range of g normal numbers grows with log(2 g); of 4-bit floats see `FLOATS_LIKE`.
    """
    sizes = sizes_of(view, weights, config, fmt, storage)

    def cost(unit: Unit, choice: Choice) -> float:
        k = max(view.specs()[f"{module}.weight"].shape[1] for module in unit.modules)
        size = k if choice.group_size == -1 else choice.group_size
        return unit.num_weights * 4.0**-choice.bits * log(2 * FLOATS_LIKE.get(choice.target, size))

    costs = {unit.name: {choice: cost(unit, choice) for choice in unit.num_bytes} for unit in sizes.units}
    return without_budget(config, sizes, choose(sizes, config, costs))
