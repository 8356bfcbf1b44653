"""The keys of a recipe, from the fields of the configs that it builds: names, kinds, defaults and descriptions.

`config.py` is where all of that is said, in fields, types and the "Attributes:" of docstrings. Here stands only what a
type does not say: which texts are paths, what a flag calls otherwise than its field, and what is not a recipe's.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from qconv.adapter_configs import AdapterOptions, CombinationConfig
from qconv.config import BNB_KINDS, CalibrationConfig, MergeJob, OutputConfig, ValidationConfig
from qconv.errors import QconvError
from qconv.nodes import Node, PlaceError
from qconv.overrides import OverrideConfig
from qconv.quantization_config import QuantizationConfig
from qconv.recipe_values import (
    BUDGET,
    FOLDER,
    MODEL,
    NUMBER,
    PATH,
    PATTERN,
    PROMPTS,
    RANK,
    SIZE,
    SOURCE,
    SWITCH,
    TASK,
    TEXT,
    WEIGHTED_SOURCE,
    WHOLE,
    WIDTH,
    Kind,
    choice,
)
from qconv.targets import MIXED_TARGETS, PLAIN_DTYPES, TARGETS
from qconv.training_config import TrainConfig

# What errors of the configs call by their flags, and a recipe otherwise.
_KEY_OF_FLAG = {
    "requant": "target",
    "sym": "symmetric",
    "asym": "symmetric",
    "override": "overrides",
    "eval-tokens": "tokens",
    "eval-seq-len": "seq-len",
    "eval-data": "data",
    "combine": "method",
    "combine-rank": "rank",
    "combine-factors": "factors",
    "o": "out",
}
_FLAG = re.compile(r"(?<![\w-])--?([a-z][a-z-]*)")

_KIND_OF_TYPE: Mapping[Any, Kind] = {bool: SWITCH, int: WHOLE, float: NUMBER, str: TEXT, Path: PATH}

Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a recipe, and the field that it sets.

    Attributes:
        name: in the recipe.
        field: of the config.
        kind: of its value, or of each value of a list; a section, when these have keys of their own.
        many: it is a list.
        nullable: it may be null.
        required: it has no default.
        default: of the field.
        description: from the config's docstring.
    """

    name: str
    field: str
    kind: Kind | Section
    many: bool
    nullable: bool
    required: bool
    default: Any
    description: str

    def read(self, node: Node) -> Any:
        """The field's value.

        Raises:
            PlaceError: it is not of this kind.
        """
        if node.content is None and self.nullable:
            return None
        return tuple(map(self.kind.read, node.items())) if self.many else self.kind.read(node)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A config and those of its fields that a recipe sets."""

    config: type
    keys: tuple[Key, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(key.name for key in self.keys)

    def values(self, keyed: Mapping[str, Node]) -> dict[str, Any]:
        """Those fields that are given, read.

        Raises:
            PlaceError: a value is not of the kind of its key.
        """
        return {key.field: key.read(keyed[key.name]) for key in self.keys if key.name in keyed}

    def given(self, node: Node) -> dict[str, Any]:
        """As `values`, of a node that has these keys and no others.

        Raises:
            PlaceError: see `values`; an unknown key, or a required one that is missing.
        """
        keyed = node.keys(self.names)
        self.check_required(node)
        return self.values(keyed)

    def check_required(self, node: Node) -> None:
        keyed = node.keys()
        for key in self.keys:
            if key.required and key.name not in keyed:
                raise node.error(f"{key.name} is missing")

    def read(self, node: Node) -> Any:
        """The config that a node makes.

        Raises:
            PlaceError: see `given`; what the config refuses.
        """
        return built(self.config, node, self.given(node))


def built(config: type[Config], node: Node, values: Mapping[str, Any], otherwise: Node | None = None) -> Config:
    """A config; what it refuses is said at the key of ``node`` that it names, or else at ``otherwise``, or ``node``."""
    try:
        return config(**values)
    except QconvError as error:
        raise at_key(node, error, otherwise) from None


def at_key(node: Node, error: QconvError, otherwise: Node | None = None) -> PlaceError:
    """The same error, at the key that it names."""
    named = [_KEY_OF_FLAG.get(flag, flag) for flag in _FLAG.findall(str(error))]
    keyed = node.content if isinstance(node.content, dict) else {}
    place = next((keyed[name] for name in named if name in keyed), otherwise or node)
    return place.error(in_words_of_recipe(str(error)))


def in_words_of_recipe(message: str) -> str:
    """A message about flags as one about keys."""
    return _FLAG.sub(lambda flag: _KEY_OF_FLAG.get(flag[1], flag[1]), message)


def first_paragraph(config: type) -> str:
    """What a config is, from its docstring."""
    return _without_code(" ".join((inspect.getdoc(config) or "").partition("\n\n")[0].split()))


def descriptions(config: type) -> dict[str, str]:
    """By field: what the "Attributes:" of its docstring say."""
    _, _, text = (inspect.getdoc(config) or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    for entry in re.findall(r"^ {4}(?=\S)(.*(?:\n {8}.*)*)", text, re.MULTILINE):
        names, _, words = entry.partition(":")
        for name in names.split(","):
            found[name.strip()] = _without_code(" ".join(words.split()))
    return found


def _without_code(text: str) -> str:
    """Without what is about the code, and with YAML's names for values."""
    text = re.sub(r"\s*\((?:see )?`[^`]*`\)", "", text)
    text = re.sub(r"``?([^`]*)``?", r"\1", text)
    for python, yaml in (("None", "null"), ("True", "true"), ("False", "false")):
        text = re.sub(rf"\b{python}\b", yaml, text)
    return text


def _section(
    config: type,
    *,
    without: Iterable[str] = (),
    names: Mapping[str, str] | None = None,
    kinds: Mapping[str, Kind | Section] | None = None,
) -> Section:
    hints, described = get_type_hints(config), descriptions(config)
    keys = []
    for field in dataclasses.fields(config):
        if field.name in without:
            continue
        hint, many, nullable = _unpacked(hints[field.name])
        keys.append(
            Key(
                name=(names or {}).get(field.name, field.name.replace("_", "-")),
                field=field.name,
                kind=(kinds or {}).get(field.name) or _kind(hint),
                many=many,
                nullable=nullable,
                required=field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING,
                default=None if field.default is dataclasses.MISSING else field.default,
                description=described.get(field.name, ""),
            )
        )
    return Section(config=config, keys=tuple(keys))


def _unpacked(hint: Any) -> tuple[Any, bool, bool]:
    """The type of a value, whether there is a list of them, and whether it may be None."""
    nullable = False
    if get_origin(hint) in (Union, types.UnionType):
        nullable = type(None) in get_args(hint)
        hint = next(one for one in get_args(hint) if one is not type(None))  # of several, a kind is given
    many = get_origin(hint) is tuple
    if many:
        hint = get_args(hint)[0]
    return hint, many, nullable


def _kind(hint: Any) -> Kind:
    return choice(get_args(hint)) if get_origin(hint) is Literal else _KIND_OF_TYPE[hint]


JOB = _section(
    MergeJob,
    without=("combination", "options", "outputs", "calibration", "validation"),
    names={"report_dir": "report", "gpu_memory_limit": "gpu-memory", "tensor_parallel": "tp"},
    kinds={"base": MODEL, "adapter": MODEL, "gpu_memory_limit": SIZE, "trained_on": choice(BNB_KINDS)},
)
ADAPTER = _section(AdapterOptions, kinds={"rank": RANK})  # whose keys stand beside those of the job
TRAIN = _section(
    TrainConfig,
    without=("base", "device", "overwrite", "revision"),  # those of the job
    kinds={"data": SOURCE},
)
COMBINATION = _section(CombinationConfig, kinds={"adapters": MODEL})
CALIBRATION = _section(CalibrationConfig, kinds={"sources": WEIGHTED_SOURCE})
OUTPUT = _section(
    OutputConfig,
    without=("quantization", "not_taken"),  # whose keys stand beside these; here each output has its own options
    names={"max_shard_bytes": "max-shard-size"},
    kinds={"max_shard_bytes": SIZE, "dtype": choice(PLAIN_DTYPES)},
)
OVERRIDE = _section(OverrideConfig, kinds={"pattern": PATTERN, "target": choice(MIXED_TARGETS)})
QUANTIZATION = _section(
    QuantizationConfig,
    kinds={
        "target": choice(TARGETS),
        "ignore": PATTERN,
        "overrides": OVERRIDE,
        "budget": BUDGET,
        "budget_bits": WIDTH,
    },
)
VALIDATION = _section(
    ValidationConfig,
    without=("rules", "policy", "defaults", "engine"),  # gates stand at the top; only `qconv validate` has engines
    names={"source": "data"},
    kinds={"source": SOURCE, "task_data": SOURCE, "prompts": PROMPTS, "tasks": TASK, "task_folder": FOLDER},
)
