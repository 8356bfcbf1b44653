"""LoRA on fused experts and other bare parameters (peft's ``target_parameters``), seen as LoRA on linears.

Method: peft 0.21 `ParamWrapper`. For a parameter of E experts A is ``[E * R, in]``, expert by expert, and B is
``[out, R * E]``, the expert running fastest; the update of expert e is ``scaling * B_e @ A_e``, whichever way the
parameter is stored. Of ``gate_up_proj`` the rows of B above are the gate's and those below the up projection's, or they
take turns, as in the parameter (`experts.py`), and both share A. Wrappers nest: of two parameters
of one module the one that was wrapped last has its tensors under the module's own name, the other under
``base_layer``. Parameters of two dimensions (a router's ``weight``) have plain A and B.

Nothing is computed: each expert's factors are ranges of stored tensors, every element of which belongs to one of them
or, of A, to the two linears of one expert.

Dimension legend: E = experts, R = rank, H = hidden features, I = inner features of an expert.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NoReturn

from torch import Tensor

from qconv.checkpoint import SafetensorsCheckpoint
from qconv.errors import AdapterError
from qconv.experts import DOWN, FAMILIES, GATE_UP, ExpertNames, expert_of, names_of
from qconv.merge.spellings import BARE, PREFIX, as_peft_spells
from qconv.types import Checkpoint, TensorSpec

NUM_KEPT = 4
_FACTOR = re.compile(
    r"base_model\.model\.(?P<module>.+\.experts)(?P<inner>(\.base_layer)*)\.lora_(?P<factor>[AB])(\.default)?\.weight"
)


@dataclass(frozen=True)
class _Range:
    """Some of the rows and columns of a stored tensor."""

    stored: str
    rows: slice = field(default_factory=lambda: slice(None))
    columns: slice = field(default_factory=lambda: slice(None))

    @property
    def is_whole(self) -> bool:
        return self.rows == self.columns == slice(None)


class ExpertAdapter:
    """An adapter's tensors under the names of linears; what is on no bare parameter is as it is stored.

    Attributes:
        files: the adapter folder.
        pattern_names: module -> parameter, by which ``rank_pattern`` and ``alpha_pattern`` know it.
    """

    def __init__(self, files: SafetensorsCheckpoint, ranges: Mapping[str, _Range], pattern_names: Mapping[str, str]):
        self.files = files
        self.pattern_names = pattern_names
        self._ranges = ranges
        stored = files.specs()
        self._specs = {
            name: TensorSpec(
                name=name,
                shape=tuple(
                    len(range(*part.indices(size)))
                    for part, size in zip((where.rows, where.columns), stored[where.stored].shape, strict=False)
                ),
                dtype=stored[where.stored].dtype,
            )
            for name, where in ranges.items()
        }
        self._read_whole = lru_cache(maxsize=NUM_KEPT)(files.read)  # columns are picked for one expert after the other

    @property
    def location(self) -> str:
        return self.files.location

    @property
    def config(self) -> Mapping[str, Any]:
        return self.files.config

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def read(self, name: str, device: str = "cpu") -> Tensor:
        where = self._ranges[name]
        if where.is_whole:
            return self.files.read(where.stored, device)
        if where.columns == slice(None) and where.rows.step is None:
            begin = where.rows.start * self._specs[name].shape[1]
            return self.files.read_part(where.stored, begin, self._specs[name].shape, device)
        return self._read_whole(where.stored)[where.rows, where.columns].contiguous().to(device)


def expert_adapter(files: SafetensorsCheckpoint, base: Checkpoint, where: str) -> Checkpoint:
    """The adapter's tensors by the linears that they change: the files themselves where that is how they lie.

    Raises:
        AdapterError: fused experts of a family that is not known, or factors that do not fit the base's experts.
    """
    names = names_of(base.config)
    targets = files.config.get("target_parameters") or ()
    if names is None:
        return _without_experts(files, targets, where)
    ranges: dict[str, _Range] = {}
    pattern_names: dict[str, str] = {}
    spelled = as_peft_spells(files.specs(), str(files.config.get("peft_type")), where)
    for stored, name in spelled.names.items():
        found = _FACTOR.fullmatch(name)
        if found is not None:
            new = _ExpertFactor(files, base, names, where, stored, found, pattern_names).ranges()
            if BARE in spelled.rules:  # as all the others are
                new = {part.removeprefix(PREFIX): range_ for part, range_ in new.items()}
        else:
            new = {names.stored_name(stored): _Range(stored)}
            _note_bare(name, names, targets, pattern_names)
        twice = next((part for part in new if part in ranges), None)
        if twice is not None:
            raise AdapterError(
                f"{where}: tensors {ranges[twice].stored!r} and {stored!r} are on the same modules; keep one adapter"
            )
        ranges |= new
    if not pattern_names and all(name == range_.stored for name, range_ in ranges.items()):
        return files
    return ExpertAdapter(files, ranges, pattern_names)


def trained_experts(adapter: Checkpoint) -> Literal["fused", "linears"] | None:
    """How the experts lay in the model that was trained; None where the adapter does not tell."""
    if isinstance(adapter, ExpertAdapter) and any(expert_of(module) for module in adapter.pattern_names):
        return "fused"
    modules = (name.removeprefix(PREFIX).partition(".lora_")[0] for name in adapter.specs())
    return "linears" if any(expert_of(module) for module in modules) else None


def _without_experts(files: SafetensorsCheckpoint, targets: Any, where: str) -> Checkpoint:
    if targets:
        raise AdapterError(
            f"{where}: target_parameters is set ({', '.join(map(str, targets))}): LoRA on bare parameters is read for "
            f"mixtures of experts of the families {', '.join(FAMILIES)}, and the base is none of these, or is not given"
        )
    return files


def _note_bare(name: str, names: ExpertNames, targets: Any, pattern_names: dict[str, str]) -> None:
    """peft looks up patterns for a parameter by its whole name, for a linear without ``weight``."""
    module = name.removeprefix(PREFIX).partition(".lora_")[0]
    if ".lora_" in name and _is_target(f"{module}.weight", targets):
        pattern_names[names.stored_name(module)] = f"{module}.weight"


def _is_target(parameter: str, targets: Any) -> bool:
    return any(parameter == target or parameter.endswith(f".{target}") for target in targets)


class _ExpertFactor:
    """One stored A or B of fused experts."""

    def __init__(
        self,
        files: SafetensorsCheckpoint,
        base: Checkpoint,
        names: ExpertNames,
        where: str,
        stored: str,
        found: re.Match[str],
        pattern_names: dict[str, str],
    ):
        self._where, self._stored, self._base, self._names = where, stored, base, names
        self._factor = found["factor"]
        self._running = found["module"]
        self._experts = names.stored_name(self._running)
        self._shape = files.specs()[stored].shape
        self._pattern_names = pattern_names
        self._parameter = self._wrapped(files.config.get("target_parameters") or (), found["inner"].count("base_layer"))
        self._linears = names.parts[self._parameter]

    def _wrapped(self, targets: Any, depth: int) -> str:
        """The parameter that is ``depth`` wrappers below the outermost."""
        wrapped = [name for name in (GATE_UP, DOWN) if _is_target(f"{self._running}.{name}", targets)]
        if depth >= len(wrapped):
            self._refuse(
                f"belongs to {depth + 1} or more parameters of {self._running}, and target_parameters of the config "
                f"names {' and '.join(wrapped) or 'none'} of {GATE_UP} and {DOWN}"
            )
        return wrapped[-1 - depth]

    def ranges(self) -> dict[str, _Range]:
        """Logical adapter tensor -> range, for the linears of all experts."""
        specs, prefix = self._base.specs(), self._experts + "."
        numbers = {int(name.removeprefix(prefix).partition(".")[0]) for name in specs if name.startswith(prefix)}
        if not numbers:
            self._refuse(f"changes {self._running}, which {self._base.location} does not have")
        num_experts = len(numbers)
        n, k = specs[f"{self._experts}.0.{self._linears[0]}.weight"].shape
        outer = 0 if self._factor == "A" else 1
        features = k if self._factor == "A" else n * len(self._linears)
        if len(self._shape) != 2 or self._shape[1 - outer] != features or self._shape[outer] % num_experts:
            form = f"[{num_experts} * rank, {k}]" if self._factor == "A" else f"[{features}, rank * {num_experts}]"
            self._refuse(
                f"is factor {self._factor} of {num_experts} experts' {self._parameter}: expected shape {form}, found "
                f"{list(self._shape)}; the adapter belongs to another base, or to a model that holds its experts "
                "transposed"
            )
        rank = self._shape[outer] // num_experts
        result = {}
        for number in range(num_experts):
            for linear in self._linears:
                module = f"{self._experts}.{number}.{linear}"
                if self._factor == "A":
                    where = _Range(self._stored, slice(number * rank, (number + 1) * rank))
                else:
                    rows = self._names.outputs(self._parameter, linear, features)
                    where = _Range(self._stored, rows, slice(number, None, num_experts))
                result[f"{PREFIX}{module}.lora_{self._factor}.weight"] = where
                self._pattern_names[module] = f"{self._running}.{self._parameter}"
        return result

    def _refuse(self, message: str) -> NoReturn:
        raise AdapterError(f"{self._where}: tensor {self._stored!r} {message}")
