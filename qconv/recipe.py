"""A recipe: one YAML file for a whole release, from training to the gates. `load_recipe` makes of it the same configs
that the flags of `qconv train` and `qconv merge` make, and refuses it by file, line and key before any work.

Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qconv.adapter_configs import AdapterOptions
from qconv.config import CalibrationConfig, MergeJob, OutputConfig, ValidationConfig
from qconv.errors import QconvError, RecipeError, UsageError
from qconv.gate_rules import Policy, load_policy, read_policy
from qconv.nodes import Node, PlaceError, parse_yaml, read_nodes
from qconv.quantization_config import QuantizationConfig
from qconv.recipe_fields import (
    ADAPTER,
    CALIBRATION,
    COMBINATION,
    JOB,
    OUTPUT,
    QUANTIZATION,
    TRAIN,
    VALIDATION,
    at_key,
    built,
    in_words_of_recipe,
)
from qconv.recipe_values import FILE, SWITCH, WHOLE
from qconv.training_config import TrainConfig
from qconv.unused import refuse_unused
from qconv.work_folder import check_beside, check_inputs, check_output, check_place

RECIPE_FORMAT = 1
SECTIONS = ("train", "combine", "calibration", "outputs", "validation")
GATE_KEYS = {"gates": "gates", "waivers": "waivers", "default-gates": "defaults"}  # as a policy file calls them
REQUIRED = ("recipe", "base", "outputs")
EXCLUSIVE = (
    ("adapter", "train"),
    ("adapter", "combine"),
    ("combine", "train"),
    ("trained-on", "train"),
    *(("policy", key) for key in GATE_KEYS),
)
TOP_KEYS = ("recipe", *JOB.names, *ADAPTER.names, *SECTIONS, "policy", *GATE_KEYS)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a recipe asks for.

    Attributes:
        path: its file.
        train: comes first, and the job merges what it makes; None = the adapter exists, or there is none.
        job: merge, quantize, validate.
        top: what stands in the file, with its places.
    """

    path: Path
    train: TrainConfig | None
    job: MergeJob
    top: Node = field(compare=False, repr=False)

    def refusal(self, error: QconvError) -> RecipeError:
        """What the job refuses, in words of the recipe: at its line, where the error knows its place."""
        node = self.top
        for name in error.place:
            if node is self.top and name == "gates" and self.top.child(name) is None:
                name = "policy"
            child = node.child(name)
            if child is None:
                break
            node = child
        if node is self.top:
            return RecipeError(f"{self.path}: {in_words_of_recipe(str(error))}")
        return RecipeError(str(at_key(node, error)))


def load_recipe(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and checks all that can be checked without reading a model.

    Args:
        settings: ``calibration.samples=16`` and the like: values that replace those of the file. Relative paths
            in them count from the working folder.

    Raises:
        RecipeError: it cannot be read, has keys or values that are none of a recipe's, contradicts itself, names files
            that are not there or outputs that are; names file, line and key.
        UsageError: a setting that is not ``key=value``.
    """
    pairs = [_setting(text) for text in settings]
    try:
        top = read_nodes(path, "recipe", aliases=True)
        for keys, value in pairs:
            key = ".".join(keys)
            top = top.with_value(keys, parse_yaml(value, "--set", Path(), path=key, lines=False))
        recipe = _recipe(path, top)
        _check_folders(recipe, top)
    except PlaceError as error:
        raise RecipeError(str(error)) from None
    return recipe


def _setting(text: str) -> tuple[list[str], str]:
    key, equals, value = text.partition("=")
    names = re.sub(r"\[(\d+)\]", r".\1", key).strip().split(".")
    if not equals or not all(names):
        raise UsageError(f"--set takes KEY=VALUE, such as calibration.samples=16 or outputs.0.out=./out, got {text!r}")
    if names[0] == "gates" and len(names) > 2:  # names of metrics have dots
        names = ["gates", ".".join(names[1:-1]), names[-1]]
    return names, value


def _recipe(path: Path, top: Node) -> Recipe:
    keyed = dict(top.keys(TOP_KEYS))
    for name in ("train", "adapter", "combine"):  # null as if it were not there, for --set
        if name in keyed and keyed[name].content is None:
            del keyed[name]
    _check_version(top, keyed)
    for one, other in EXCLUSIVE:
        if one in keyed and other in keyed:
            raise keyed[one].error(f"stands beside {other} ({keyed[other].where}); a recipe has one of the two")
    if "trained-on" in keyed and "adapter" not in keyed and "combine" not in keyed:
        raise keyed["trained-on"].error("says how an adapter saw its base, and there is no adapter")
    job = JOB.values(keyed)
    training = _training(keyed, job) if "train" in keyed else None
    if training is not None:
        job["adapter"] = str(training.out)
    job["options"] = built(AdapterOptions, top, ADAPTER.values(keyed))
    if "combine" in keyed:
        job["combination"] = COMBINATION.read(keyed["combine"])
    outputs = tuple(map(_output, _some(keyed["outputs"])))
    calibration = CALIBRATION.read(keyed["calibration"]) if "calibration" in keyed else CalibrationConfig()
    validation = _validation(keyed)
    values = {**job, "outputs": outputs, "calibration": calibration, "validation": validation}
    made = built(MergeJob, top, values, otherwise=keyed["outputs"])
    try:
        refuse_unused(made, _given(made))
    except UsageError as error:
        raise at_key(top, error) from None
    return Recipe(path=path, train=training, job=made, top=top)


def _given(job: MergeJob) -> set[str]:
    """Options that differ from their defaults: a recipe may spell these out, as ``--check`` does."""
    calibration = replace(job.calibration, seed=CalibrationConfig.seed)
    return {
        name
        for name, is_given in (
            ("calibration", calibration != CalibrationConfig()),
            ("gpu-memory", job.gpu_memory_limit is not None),
        )
        if is_given
    }


def _check_version(top: Node, keyed: Mapping[str, Node]) -> None:
    if "recipe" in keyed:
        version = WHOLE.read(keyed["recipe"])
        if version != RECIPE_FORMAT:
            raise keyed["recipe"].error(f"version {version} of the format; this qconv reads {RECIPE_FORMAT}")
    for name in REQUIRED:
        if name not in keyed:
            value = f" (recipe: {RECIPE_FORMAT} is the version of the format)" if name == "recipe" else ""
            raise top.error(f"{name} is missing{value}")


def _some(outputs: Node) -> list[Node]:
    items = outputs.items()
    if not items:
        raise outputs.error("expected at least one output, got an empty list")
    return items


def _training(keyed: Mapping[str, Node], job: Mapping[str, Any]) -> TrainConfig:
    shared = {name: job[name] for name in ("base", "device", "overwrite", "revision") if name in job}
    return built(TrainConfig, keyed["train"], TRAIN.given(keyed["train"]) | shared)


def _output(node: Node) -> OutputConfig:
    keyed = node.keys(OUTPUT.names + QUANTIZATION.names)
    quantization = None
    if "target" in keyed and keyed["target"].content is not None:
        quantization = built(QuantizationConfig, node, QUANTIZATION.values(keyed))
    else:
        for name in QUANTIZATION.names:
            if name in keyed and name != "target":
                raise keyed[name].error("says how to quantize, and this output has no target")
    OUTPUT.check_required(node)
    return built(OutputConfig, node, OUTPUT.values(keyed) | {"quantization": quantization})


def _validation(keyed: Mapping[str, Node]) -> ValidationConfig | None:
    node = keyed.get("validation")
    gates = [name for name in ("policy", *GATE_KEYS) if name in keyed]
    if node is not None and isinstance(node.content, bool):
        if SWITCH.read(node):
            raise node.error("expected false, or keys with values; without the key everything has its default")
        if gates:
            raise keyed[gates[0]].error(f"there is nothing to gate: validation is false ({node.where})")
        return None
    values = {} if node is None else VALIDATION.given(node)
    policy = _policy(keyed)
    place = node or (keyed[gates[0]] if gates else keyed["outputs"])
    return built(ValidationConfig, place, values | {"policy": policy})


def _policy(keyed: Mapping[str, Node]) -> Policy:
    if "policy" in keyed:
        with keyed["policy"].blamed():
            return load_policy(FILE.read(keyed["policy"]))
    inline: dict[str, Node] = {name: keyed[key] for key, name in GATE_KEYS.items() if key in keyed}
    return read_policy(next(iter(inline.values())).having(inline)) if inline else Policy()


def _check_folders(recipe: Recipe, top: Node) -> None:
    """What `train` and `make_plan` check of folders; here before either begins."""
    job, train, keyed = recipe.job, recipe.train, top.keys()
    if train is not None:
        node = keyed["train"].keys()["out"]
        _check_folder(node, train.out, job.overwrite, [job.base, train.data], [])
    for output, item in zip(job.outputs, keyed["outputs"].items(), strict=True):
        node = item.keys()["out"]
        reports = [job.report_folder(other) for other in job.outputs]
        _check_folder(node, output.out, job.overwrite, [job.base, *job.adapters], reports)
        if train is not None:
            one, other = output.out.absolute(), train.out.absolute()
            if one == other or one in other.parents or other in one.parents:
                raise node.error(f"{output.out} and the adapter's folder, {train.out}, are one or lie in one another")


def _check_folder(node: Node, out: Path, overwrite: bool, inputs: list[str | None], reports: list[Path | None]) -> None:
    try:
        check_output(out, overwrite)
        check_place(out)
        check_inputs(out, inputs)
        for folder in reports:
            check_beside(out, folder)
    except QconvError as error:
        raise at_key(node, error) from None
