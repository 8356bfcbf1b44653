"""A recipe with everything decided, as a recipe again: what `qconv run --check` prints. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qconv.gate_rules import Policy, Rule, Waiver
from qconv.recipe import RECIPE_FORMAT, Recipe
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
)


def as_document(recipe: Recipe) -> dict[str, Any]:
    """Plain values that `load_recipe` reads as the same recipe, from the same working folder."""
    job = recipe.job
    top = _shown(JOB, job) | _shown(ADAPTER, job.options)
    document: dict[str, Any] = {"recipe": RECIPE_FORMAT, **top}
    if recipe.train is not None:
        del document["adapter"]  # what training makes
        document["train"] = _shown(TRAIN, recipe.train)
    if job.combination is not None:
        document["combine"] = _shown(COMBINATION, job.combination)
    document["calibration"] = _shown(CALIBRATION, job.calibration)
    document["outputs"] = [
        ({} if output.quantization is None else _shown(QUANTIZATION, output.quantization)) | _shown(OUTPUT, output)
        for output in job.outputs
    ]
    if job.validation is None:
        return document | {"validation": False}
    return document | {"validation": _shown(VALIDATION, job.validation)} | _policy(job.validation.policy)


def _shown(section: Section, config: object) -> dict[str, Any]:
    """The keys of a config; those that are None are left out."""
    values = ((key, getattr(config, key.field)) for key in section.keys)
    return {key.name: _plain(key, value) for key, value in values if value is not None}


def _plain(key: Key, value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(key, item) for item in value]
    if isinstance(key.kind, Section):
        return _shown(key.kind, value)
    return str(value) if isinstance(value, Path) else value


def _policy(policy: Policy) -> dict[str, Any]:
    return {
        "default-gates": policy.defaults,
        "gates": {rule.metric: _limit(rule) for rule in policy.rules},
        "waivers": [_waiver(waiver) for waiver in policy.waivers],
    }


def _limit(rule: Rule) -> dict[str, Any]:
    limit = rule.limit if rule.floor_factor is None else f"{rule.floor_factor!r}x floor"
    return {"max" if rule.upper else "min": limit}


def _waiver(waiver: Waiver) -> dict[str, str]:
    texts = {"gate": waiver.gate, "reason": waiver.reason, "approved_by": waiver.approved_by}
    return texts | {"expires": waiver.expires.isoformat()}
