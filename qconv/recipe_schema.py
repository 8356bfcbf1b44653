"""The JSON schema of a recipe (draft 2020-12), for editors and other checkers. Nothing is said here that the keys do
not say (`recipe_fields`, `gate_metrics`), but for the few keys that set no field of a config.

What a schema cannot say, or not well, is left to `load_recipe`: what fits together with what, limits of numbers, and
whether files exist. Imports no torch.
"""

from __future__ import annotations

import re
from typing import Any

from qconv.adapter_configs import CombinationConfig
from qconv.config import CalibrationConfig, MergeJob, OutputConfig, ValidationConfig
from qconv.gate_metrics import METRICS, TASK_NAME, TASK_PATTERN
from qconv.gate_rules import Waiver
from qconv.recipe import EXCLUSIVE, RECIPE_FORMAT, REQUIRED, TOP_KEYS
from qconv.recipe_fields import (
    ADAPTER,
    CALIBRATION,
    COMBINATION,
    JOB,
    OUTPUT,
    QUANTIZATION,
    TRAIN,
    VALIDATION,
    Key,
    Section,
    descriptions,
    first_paragraph,
)
from qconv.training_config import TrainConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema() -> dict[str, Any]:
    """The schema; plain values."""
    job = descriptions(MergeJob)
    quantizing = {key.name: ["target"] for key in QUANTIZATION.keys if key.name != "target"}
    properties = {
        "recipe": {"const": RECIPE_FORMAT, "description": "Version of this format."},
        **_properties(JOB),
        **_properties(ADAPTER),
        "train": {
            **_object(TRAIN),
            "type": ["object", "null"],
            "description": f"{first_paragraph(TrainConfig)} Comes first; the adapter that it makes is merged.",
        },
        "combine": {
            **_object(COMBINATION),
            "type": ["object", "null"],
            "description": f"{first_paragraph(CombinationConfig)} In the place of adapter.",
        },
        "calibration": {**_object(CALIBRATION), "description": first_paragraph(CalibrationConfig)},
        "outputs": {
            "type": "array",
            "minItems": 1,
            "items": {
                **_object(OUTPUT),
                "properties": {**_properties(QUANTIZATION), **_properties(OUTPUT)},
                "dependentRequired": quantizing,
                "description": f"{first_paragraph(OutputConfig)} Without a target its weights are plain.",
            },
            "description": _sentence(job["outputs"]),
        },
        "validation": {
            "oneOf": [{"const": False}, _object(VALIDATION)],
            "description": f"{first_paragraph(ValidationConfig)} false: not validated.",
        },
        "policy": {"type": "string", "minLength": 1, "description": "A policy file with gates and waivers."},
        "gates": _gates(),
        "waivers": {"type": "array", "items": _waiver(), "description": "Gates that may fail until a day."},
        "default-gates": {
            "type": "boolean",
            "default": True,
            "description": "false: only the gates that stand here.",
        },
    }
    return {
        "$schema": DIALECT,
        "title": "qconv recipe",
        "description": "What `qconv run` does: train, merge, quantize, validate, gate.",
        "type": "object",
        "additionalProperties": False,
        "required": list(REQUIRED),
        "properties": {name: properties[name] for name in TOP_KEYS},
        "not": {"anyOf": [_both(one, other) for one, other in EXCLUSIVE]},
        "if": {"required": ["trained-on"]},
        "then": {"anyOf": [{"required": ["adapter"]}, {"required": ["combine"]}]},
    }


def _both(one: str, other: str) -> dict[str, Any]:
    """That two keys are there; train and adapter only when they are not null."""
    given = {name: {"not": {"type": "null"}} for name in (one, other) if name in ("train", "adapter", "combine")}
    return {"required": [one, other], **({"properties": given} if given else {})}


def _object(section: Section) -> dict[str, Any]:
    required = [key.name for key in section.keys if key.required]
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": _properties(section),
        **({"required": required} if required else {}),
    }


def _properties(section: Section) -> dict[str, Any]:
    return {key.name: _property(key) for key in section.keys}


def _property(key: Key) -> dict[str, Any]:
    value = _object(key.kind) if isinstance(key.kind, Section) else dict(key.kind.schema)
    if key.many:
        value = {"type": "array", "items": value}
    if key.nullable:
        if "enum" in value:
            value["enum"] = [*value["enum"], None]
        else:
            types = value["type"] if isinstance(value["type"], list) else [value["type"]]
            value["type"] = [*types, "null"]
    if key.default is not None:
        value["default"] = list(key.default) if key.many else key.default
    return {**value, "description": _sentence(key.description)}


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _gates() -> dict[str, Any]:
    pattern = f"^{re.sub(r'[?]P<[a-z]+>', '', TASK_NAME)}$"  # named groups are Python's
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            metric.name: _rule(metric.larger_is_better, metric.description)
            for metric in METRICS.values()
            if metric.name != TASK_PATTERN
        },
        "patternProperties": {pattern: _rule(False, METRICS[TASK_PATTERN].description)},
        "description": "Limits by metric, as in a policy file; each replaces the default gate of its metric.",
    }


def _rule(larger_is_better: bool, description: str) -> dict[str, Any]:
    side = "min" if larger_is_better else "max"
    limit = {"type": ["number", "string"], "description": "A number, a share such as 90%, or 5x floor."}
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {side: limit},
        "required": [side],
        "description": description,
    }


def _waiver() -> dict[str, Any]:
    described = descriptions(Waiver)
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {name: {"type": "string", "description": words} for name, words in described.items()},
        "required": list(described),
        "description": first_paragraph(Waiver),
    }
