"""Recipes: they are the flags in a file, wrong ones are refused at their line, and the schema says the same.

Oracles: the configs that click and `cli_jobs` make of flags, and jsonschema.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qconv import cli_jobs
from qconv.cli import cli, main
from qconv.config import MergeJob
from qconv.errors import RecipeError, UsageError
from qconv.gate_rules import load_policy, today_utc
from qconv.recipe import TOP_KEYS, Recipe, load_recipe
from qconv.recipe_schema import recipe_schema
from qconv.recipe_show import as_document
from qconv.training_config import TrainConfig
from tests.cli_cases import calibrates

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "docs" / "examples" / "recipes").glob("*.yaml"))
SCHEMA = recipe_schema()


def is_valid(document: Any) -> bool:
    return jsonschema.Draft202012Validator(SCHEMA).is_valid(document)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a recipe lies, with what it names; nothing here is read."""
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "train.jsonl").write_text("{}")
    return tmp_path


def load(folder: Path, text: str, *values: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, values)


def flags_to_job(*arguments: str) -> MergeJob:
    """As `qconv merge` makes it."""
    command = cli.commands["merge"]
    options = dict(command.make_context("merge", list(arguments)).params)
    base, adapters, targets = (options.pop(name) for name in ("base", "adapters", "targets"))
    return cli_jobs.merge_job(base, adapters, targets, not options.pop("no_validate"), options)


def flags_to_training(*arguments: str) -> TrainConfig:
    options = dict(cli.commands["train"].make_context("train", list(arguments)).params)
    return cli_jobs.train_config(options.pop("base"), options.pop("data"), options)


# The same as flags

PATTERNS = ["*.layers.0.*", "re:.*(gate|up)_proj$", "re:a:b=1,c", "lm_head", "true", "7"]


def overrides() -> st.SearchStrategy[dict[str, Any]]:
    settings = {
        "bits": st.sampled_from([4, 8]),
        "group-size": st.sampled_from([-1, 8, 96]),
        "symmetric": st.booleans(),
    }
    changes = st.fixed_dictionaries({}, optional=settings).filter(bool)
    return st.builds(lambda pattern, changed: {"pattern": pattern, **changed}, st.sampled_from(PATTERNS), changes)


def typed(override: dict[str, Any]) -> str:
    """As the flag has it."""
    words = {True: "sym", False: "asym"}
    settings = [words[v] if k == "symmetric" else f"{k}={v}" for k, v in override.items() if k != "pattern"]
    return f"{override['pattern']}:{','.join(settings)}"


def in_floats() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({
        "pattern": st.sampled_from(PATTERNS), "target": st.sampled_from(["nvfp4a16", "mxfp4a16"])
    })  # fmt: skip


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """Some keys of a recipe with one output, by path."""
    target = draw(st.sampled_from([None, "gptq", "gptq_v2", "awq", "w4a16", "w8a16", "fp8", "int8", "nf4"]))
    possible: dict[str, Any] = {
        "device": st.sampled_from(["cpu", "auto"]),
        "gpu-memory": st.sampled_from(["24GB", "500MiB", "8g"]),
        "overwrite": st.booleans(),
        "revision": st.sampled_from(["main", "1e5", "0123456"]),
        "trained-on": st.sampled_from(["nf4-dq", "fp4", "16bit"]),
        "report": st.just("reports"),
        "tp": st.integers(1, 8),
        "outputs.0.dtype": st.sampled_from(["bf16", "fp32"]),
        "outputs.0.max-shard-size": st.sampled_from(["20MB", "5GB"]),
        "calibration.samples": st.integers(1, 999),
        "calibration.seq-len": st.integers(8, 4096),
        "calibration.sources": st.lists(
            st.sampled_from(["default", "train.jsonl:0.7", "org/set:train[:1%]", "org/set/sub:test:2"]),
            min_size=1,
            unique=True,
        ),
        "validation.data": st.sampled_from(["default-eval", "org/set:test", "train.jsonl"]),
        "validation.control-tokens": st.integers(512, 4096),
        "validation.attribution": st.sampled_from(["auto", "always", "never"]),
        "validation.prompts": st.just("default"),
        "validation.new-tokens": st.integers(1, 100),
        "validation.tasks": st.lists(st.sampled_from(["arc_easy", "piqa"]), unique=True),
        "validation.task-limit": st.integers(1, 50),
    }
    if target is not None:
        possible |= {"outputs.0.ignore": st.lists(st.sampled_from(PATTERNS))}
    if target == "fp8":
        possible |= {"outputs.0.activations": st.sampled_from(["dynamic", "static"])}
    if target in ("gptq", "gptq_v2", "w4a16", "w8a16"):
        settings = overrides() | in_floats() if target in ("w4a16", "w8a16") else overrides()
        possible |= {"outputs.0.lm-head": st.booleans(), "outputs.0.overrides": st.lists(settings)}
        possible |= {"outputs.0.budget": st.sampled_from(["4.5bpw", 5, "6 bpw", 4.75])}
    if target in ("gptq", "gptq_v2", "awq", "w4a16", "w8a16"):
        possible |= {
            "outputs.0.algorithm": st.sampled_from(["gptq", "awq+gptq", "awq", "rtn"]),
            "outputs.0.group-size": st.sampled_from([-1, 32, 64, 128]),
            "outputs.0.symmetric": st.booleans(),
            "outputs.0.damping": st.floats(1e-6, 0.9),
        }
    chosen = draw(st.fixed_dictionaries({}, optional=possible))
    if "outputs.0.budget" in chosen and target in ("w4a16", "w8a16"):
        chosen["outputs.0.budget-bits"] = draw(st.permutations([4, 8, "nvfp4a16", "mxfp4a16"]))
    default = "awq" if target == "awq" else "gptq"
    if "gptq" not in chosen.get("outputs.0.algorithm", default):
        chosen.pop("outputs.0.damping", None)
    for key, what in (("new-tokens", "prompts"), ("task-limit", "tasks")):
        if not chosen.get(f"validation.{what}"):
            chosen.pop(f"validation.{key}", None)
    made = [
        *as_flags({key: chosen[key] for key in chosen if key.startswith("outputs.")}, Path()),
        "--requant",
        str(target),
    ]
    if not calibrates(made) or chosen.get("device") == "cpu":
        chosen.pop("gpu-memory", None)
    if not calibrates(made):
        chosen = {key: value for key, value in chosen.items() if not key.startswith("calibration.")}
    return chosen | ({} if target is None else {"outputs.0.target": target})


FLAGS = {
    "outputs.0.target": "requant",
    "validation.data": "eval-data",
    "calibration.sources": "calibration",
}


def as_flags(chosen: dict[str, Any], folder: Path) -> list[str]:
    flags = []
    for path, value in chosen.items():
        name = FLAGS.get(path, path.rpartition(".")[2])
        if path == "outputs.0.symmetric":
            flags.append("--sym" if value else "--asym")
        elif path == "outputs.0.budget-bits":
            flags += ["--budget-bits", ",".join(map(str, value))]
        elif path == "outputs.0.overrides":
            flags += [word for override in value for word in ("--override", typed(override))]
        elif isinstance(value, bool):
            flags += [f"--{name}"] if value else []
        elif isinstance(value, list):
            flags += [word for item in value for word in (f"--{name}", located(str(item), folder))]
        else:
            flags += [f"--{name}", located(str(value), folder)]
    return flags


def located(text: str, folder: Path) -> str:
    """What is beside the recipe, as a flag names it from elsewhere."""
    return str(folder / text) if text.startswith(("train.jsonl", "reports")) else text


def nested(chosen: dict[str, Any]) -> dict[str, Any]:
    document: dict[str, Any] = {"recipe": 1, "base": "base", "adapter": "./adapter", "outputs": [{"out": "out"}]}
    for path, value in chosen.items():
        *parents, last = path.split(".")
        place: Any = document
        for name in parents:
            place = place[0] if name == "0" else place.setdefault(name, {})
        place[last] = value
    return document


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(chosen=options())
def test_a_recipe_makes_the_job_that_flags_make(folder: Path, chosen: dict[str, Any]) -> None:
    paths = [str(folder / name) for name in ("base", "adapter")]
    expected = flags_to_job(*paths, "-o", str(folder / "out"), *as_flags(chosen, folder))
    document = nested(chosen)
    assert load(folder, yaml.safe_dump(document)).job == expected
    assert is_valid(document)
    values = [f"{path}={json.dumps(value)}" for path, value in chosen.items()]
    # A path in a setting counts from the working folder.
    values = [re.sub(r'"(train\.jsonl|reports)', f'"{folder}/\\1', value) for value in values]
    assert load(folder, yaml.safe_dump(nested({})), *values).job == expected
    recipe = load(folder, yaml.safe_dump(document))
    shown = as_document(recipe)
    assert load(folder, yaml.safe_dump(shown)) == recipe
    assert is_valid(json.loads(json.dumps(shown)))


def test_train_makes_the_config_that_flags_make(folder: Path) -> None:
    text = """
recipe: 1
base: base
device: cpu
overwrite: true
revision: main
train: {data: train.jsonl, out: new, steps: 7, rank: 4, alpha: 8, learning-rate: 1e-4, schedule: cosine, dropout: .5,
        batch-size: 2, gradient-accumulation: 3, quantize: fp4, seq-len: 64, seed: 5}
outputs: [{out: out}]
"""
    flags = "--steps 7 --rank 4 --alpha 8 --learning-rate 1e-4 --schedule cosine --dropout .5 --batch-size 2 --seed 5"
    flags += " --gradient-accumulation 3 --quantize fp4 --seq-len 64 --device cpu --overwrite --revision main"
    names = [str(folder / name) for name in ("base", "train.jsonl")]
    recipe = load(folder, text)
    assert recipe.train == flags_to_training(*names, "-o", str(folder / "new"), *flags.split())
    assert recipe.job.adapter == str(folder / "new")
    assert load(folder, yaml.safe_dump(as_document(recipe))) == recipe


def test_several_outputs_are_those_of_their_flags(folder: Path) -> None:
    text = """
recipe: 1
base: base
adapter: adapter
outputs:
  - {target: awq, out: a, group-size: 64}
  - {target: fp8, out: b}
  - {dtype: bf16, out: c}
"""
    flags = (["--requant", "awq", "--group-size", "64"], ["--requant", "fp8"], ["--dtype", "bf16"])
    names = [str(folder / name) for name in ("base", "adapter")]
    same = "recipe: 1\nbase: base\nadapter: adapter\noutputs: [{target: awq, out: o/awq}, {target: fp8, out: o/fp8}]\n"
    together = flags_to_job(*names, "--requant", "awq", "--requant", "fp8", "-o", str(folder / "o"))
    assert load(folder, same).job == together
    jobs = [flags_to_job(*names, *one, "-o", str(folder / out)) for one, out in zip(flags, "abc", strict=True)]
    assert load(folder, text).job.outputs == tuple(output for job in jobs for output in job.outputs)


POLICY = """
gates:
  kl_mean: {max: 1e-1}
  merge.kl_mean: {max: 5x floor}
  adapter_effect_retained: {min: 75%}
  task.arc.acc_drop: {max: 0.02}
waivers:
  - {gate: kl_p99, reason: because, approved_by: me, expires: "DAY"}
""".replace("DAY", (today_utc() + timedelta(days=9)).isoformat())


def test_gates_are_those_of_a_policy_file(folder: Path) -> None:
    (folder / "policy.yaml").write_text(POLICY + "defaults: false\n")
    head = "recipe: 1\nbase: base\nadapter: adapter\noutputs: [{out: out}]\n"
    expected = load_policy(folder / "policy.yaml")
    inline = load(folder, head + POLICY + "default-gates: false\n")
    for recipe in (inline, load(folder, head + "policy: policy.yaml\n")):
        assert recipe.job.validation is not None
        assert recipe.job.validation.policy == expected
    names = [str(folder / name) for name in ("base", "adapter")]
    assert inline.job == flags_to_job(*names, "-o", str(folder / "out"), "--policy", str(folder / "policy.yaml"))
    assert load(folder, yaml.safe_dump(as_document(inline), sort_keys=False)) == inline
    assert is_valid(yaml.safe_load(head + POLICY))
    changed = load(folder, head + POLICY, "gates.merge.kl_mean.max=7x floor").job.validation
    assert changed is not None
    assert "merge.kl_mean <= 7.0x floor" in map(str, changed.policy.rules)


# Paths


def test_paths_count_from_the_recipe_and_those_of_settings_from_the_working_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = folder / "elsewhere"
    (elsewhere / "base").mkdir(parents=True)
    text = "recipe: 1\nbase: base\nadapter: org/adapter\noutputs: [{out: ../x/out}, {out: /abs}]\nreport: r\n"
    load(folder, text)
    monkeypatch.chdir(elsewhere)
    job = load_recipe(Path("../recipe.yaml")).job
    assert (job.base, job.adapter) == ("../base", "org/adapter")
    assert [output.out for output in job.outputs] == [Path("../../x/out"), Path("/abs")]
    assert job.report_dir == Path("../r")
    job = load_recipe(Path("../recipe.yaml"), ["base=base", "outputs.1.out=there"]).job
    assert (job.base, job.outputs[1].out) == ("base", Path("there"))
    monkeypatch.chdir(folder)
    assert load_recipe(Path("recipe.yaml")).job.base == "base"  # as it would be typed


def test_a_folder_wins_over_a_hub_id_and_variables_stay_as_they_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAME", "x")
    text = "recipe: 1\nbase: org/model\noutputs: [{out: $NAME}]\n"
    job = load(folder, text).job
    assert (job.base, job.outputs[0].out.name) == ("org/model", "$NAME")
    (folder / "org" / "model").mkdir(parents=True)
    assert load(folder, text).job.base == str(folder / "org" / "model")
    monkeypatch.setenv("HOME", str(folder))
    assert load(folder, text, "base=~/base").job.base == str(folder / "base")


# Documents


def tables() -> dict[str, str]:
    """By heading of the document: its table, from the schema."""
    top = SCHEMA["properties"]
    sections = {
        "The recipe": SCHEMA,
        "`train`": top["train"],
        "`combine`": top["combine"],
        "`calibration`": top["calibration"],
        "`outputs`, each": top["outputs"]["items"],
        "`overrides`, each": top["outputs"]["items"]["properties"]["overrides"]["items"],
        "`validation`": top["validation"]["oneOf"][1],
    }
    return {
        heading: "\n".join(["| key | default | what |", "|---|---|---|", *rows(s)]) for heading, s in sections.items()
    }


def rows(schema: dict[str, Any]) -> list[str]:
    made = []
    for name, key in schema["properties"].items():
        default = json.dumps(key["default"]).strip('"') if "default" in key else ""
        default = "**required**" if name in schema.get("required", ()) else default and f"`{default}`"
        words = key["description"]
        if "enum" in key:
            words += " " + ", ".join(f"`{word}`" for word in key["enum"] if word is not None)
        made.append(f"| `{name}` | {default} | {words} |")
    return made


def test_the_document_has_the_keys_of_the_schema() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for heading, table in tables().items():
        section = text.partition(f"\n### {heading}\n")[2].partition("\n#")[0]
        assert table in section, f"expected under {heading}:\n{table}"


# Refusals

HEAD = "recipe: 1\nbase: base\nadapter: adapter\noutputs:\n  - {target: awq, out: out}\n"
MIXED = HEAD + "  - out: b\n    target: w4a16\n"
TRAINED = "recipe: 1\nbase: base\noutputs: [{out: out}]\n"

# By name: the text, the line that is named, words of the message. What the schema refuses, too:
STRUCTURAL: dict[str, tuple[str, int, list[str]]] = {
    "misspelt key": (HEAD + "calibration:\n  sampels: 3\n", 7, ["calibration.sampels: unknown key", "mean samples?"]),
    "key of the top": (HEAD + "calibraton: {}\n", 6, ["calibraton: unknown key", "did you mean calibration"]),
    "key of an output": (HEAD + "  - out: b\n    group_size: 64\n", 7, ["outputs[1].group_size", "mean group-size?"]),
    "key of an override": (MIXED + "    overrides: [{pattern: a, bit: 8}]\n", 8, ["overrides[0].bit", "mean bits?"]),
    "override without pattern": (MIXED + "    overrides: [{bits: 8}]\n", 8, ["overrides[0]: pattern is missing"]),
    "override as text": (MIXED + "    overrides: ['a:bits=8']\n", 8, ["overrides[0]", "expected keys with values"]),
    "ignore as text": (MIXED + "    ignore: a\n", 8, ["outputs[1].ignore", "expected a list"]),
    "empty pattern": (MIXED + "    ignore: ['']\n", 8, ["outputs[1].ignore[0]", "expected text, got none"]),
    "ignore without target": (HEAD + "  - {out: b, ignore: [a]}\n", 6, ["outputs[1].ignore", "no target"]),
    "key of train": (TRAINED + "train: {out: a, base: b}\n", 4, ["train.base: unknown key"]),
    "key of validation": (HEAD + "validation: {rules: []}\n", 6, ["validation.rules: unknown key"]),
    "key of a waiver": (HEAD + "waivers:\n - gates: x\n", 7, ["waivers[0].gates: unknown key", "mean gate?"]),
    "text for a number": (HEAD + "calibration: {samples: many}\n", 6, ["calibration.samples", "whole number", "many"]),
    "fraction": (HEAD + "calibration: {samples: 1.5}\n", 6, ["calibration.samples", "whole number", "1.5"]),
    "quoted number": (HEAD + 'calibration: {samples: "16"}\n', 6, ["calibration.samples", "in quotes"]),
    "list for a number": (HEAD + "calibration: {samples: [1]}\n", 6, ["calibration.samples", "a list"]),
    "nothing for a number": (HEAD + "calibration: {samples: }\n", 6, ["calibration.samples", "nothing"]),
    "text for a list": (HEAD + "calibration: {sources: default}\n", 6, ["calibration.sources", "expected a list"]),
    "number for true": (HEAD + "overwrite: 1\n", 6, ["overwrite", "true or false"]),
    "text for true": (HEAD + 'overwrite: "true"\n', 6, ["overwrite", "true or false"]),
    "true for text": (HEAD + "report: on\n", 6, ["report", "expected text", "put on in quotes"]),
    "no section": (HEAD + "calibration:\n", 6, ["calibration", "keys with values", "nothing"]),
    "section as a list": (HEAD + "calibration: [1]\n", 6, ["calibration", "keys with values"]),
    "outputs without a list": ("recipe: 1\nbase: base\noutputs: {out: out}\n", 3, ["outputs", "expected a list"]),
    "no output": ("recipe: 1\nbase: base\noutputs: []\n", 3, ["outputs", "at least one"]),
    "output without out": (HEAD + "  - target: fp8\n", 6, ["outputs[1]: out is missing"]),
    "train without out": (TRAINED + "train: {steps: 3}\n", 4, ["train: out is missing"]),
    "no version": ("base: base\noutputs: [{out: out}]\n", 1, ["recipe is missing", "recipe: 1"]),
    "other version": ("recipe: 2\nbase: base\noutputs: [{out: out}]\n", 1, ["version 2", "reads 1"]),
    "no base": ("recipe: 1\noutputs: [{out: out}]\n", 1, ["base is missing"]),
    "no outputs": ("recipe: 1\nbase: base\n", 1, ["outputs is missing"]),
    "a list": ("- recipe: 1\n", 1, ["the file: expected keys with values"]),
    "empty": ("", 1, ["the file: expected keys with values, got nothing"]),
    "unknown target": (HEAD.replace("awq", "gpqt"), 5, ["outputs[0].target", "'gpqt'", "did you mean gptq?"]),
    "unknown dtype": (HEAD + "  - {dtype: bf6, out: b}\n", 6, ["outputs[1].dtype", "did you mean bf16?"]),
    "unknown choice": (HEAD + "validation: {attribution: allways}\n", 6, ["validation.attribution", "mean always?"]),
    "no size": (HEAD + "gpu-memory: 24 apples\n", 6, ["gpu-memory", "24 apples", "5GB"]),
    "validation true": (HEAD + "validation: true\n", 6, ["validation", "expected false"]),
    "bits without target": (HEAD + "  - out: b\n    bits: 4\n", 7, ["outputs[1].bits", "no target"]),
    "adapter and train": (HEAD + "train: {out: new}\n", 3, ["adapter: stands beside train", "recipe.yaml:6"]),
    "trained-on and train": (TRAINED + "train: {out: a}\ntrained-on: nf4\n", 5, ["trained-on", "beside train"]),
    "trained-on alone": (TRAINED + "trained-on: nf4\n", 4, ["trained-on", "no adapter"]),
    "policy and gates": (HEAD + "policy: p\ngates: {}\n", 6, ["policy: stands beside gates"]),
    "unknown metric": (HEAD + "gates:\n  kl_men: {max: 1}\n", 7, ["gates.kl_men", "did you mean kl_mean"]),
    "wrong side": (HEAD + "gates: {kl_mean: {min: 1}}\n", 6, ["gates.kl_mean", "max: LIMIT"]),
    "bare limit": (HEAD + "gates: {kl_mean: 1}\n", 6, ["gates.kl_mean", "keys with values"]),
    "waiver without reason": (HEAD + "waivers: [{gate: flips}]\n", 6, ["waivers[0]: reason is missing"]),
}
OTHER: dict[str, tuple[str, int, list[str]]] = {
    "key twice": (HEAD + "base: base\n", 6, ["'base' stands there twice"]),
    "octal": (HEAD + "calibration: {samples: 010}\n", 6, ["calibration.samples", "whole number", "010"]),
    "yes": (HEAD + "overwrite: yes\n", 6, ["overwrite", "write true", "yes"]),
    "tag": (HEAD + "device: !!python/name:os.system\n", 6, ["tags", "not read here"]),
    "broken": (HEAD + "calibration: {\n", 0, ["not YAML", "line 7"]),
    "within itself": (HEAD + "calibration: &a {sources: [*a]}\n", 0, ["nested too deep, or within itself"]),
    "many aliases": (
        "a: &a [x,x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
        "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\n",
        1,
        ["more than 10000 values"],
    ),
    "desc-act on awq": (HEAD.replace("out}", "out,\n     desc-act: true}"), 6, ["outputs[0].desc-act", "target gptq"]),
    "group size of fp8": (HEAD + "  - {out: b, target: fp8, group-size: 64}\n", 6, ["[1].group-size", "one scheme"]),
    "damping of awq": (
        HEAD.replace("out}", "out,\n     damping: 0.05}"),
        6,
        ["outputs[0].damping", "awq by awq does not use it", "algorithm awq+gptq or gptq"],
    ),
    "damping of fp8": (HEAD + "  - {out: b, target: fp8, damping: 0.03}\n", 6, ["[1].damping", "fp8 by fp8 does not"]),
    "algorithm of awq": (
        HEAD + "  - {out: b, target: fp8, algorithm: gptq}\n",
        6,
        ["algorithm", "takes algorithm fp8"],
    ),
    "one folder for two": (HEAD + "  - {out: ./out}\n", 4, ["outputs", "is the folder of two outputs"]),
    "one within the other": (HEAD + "  - {out: out/b}\n", 4, ["outputs", "lies in"]),
    "adapter in an output": (TRAINED + "train: {out: out/a}\n", 3, ["outputs[0].out", "adapter's folder"]),
    "output in the adapter": (TRAINED + "train: {out: .}\n", 4, ["train.out", "exists already"]),
    "validation false with gates": (HEAD + "validation: false\ngates: {}\n", 7, ["gates", "nothing to gate"]),
    "validation false with policy": (HEAD + "policy: p\nvalidation: false\n", 6, ["policy", "nothing to gate"]),
    "few tokens": (HEAD + "validation:\n  tokens: 100\n", 7, ["validation.tokens", "tokens >= seq-len >= 8"]),
    "no steps": (TRAINED + "train: {out: a, steps: 0}\n", 4, ["train.steps", "steps must be positive"]),
    "no samples": (HEAD + "calibration: {samples: 0}\n", 6, ["calibration.samples", "samples >= 1"]),
    "calibration of nothing": (
        HEAD.replace("awq", "fp8") + "calibration: {samples: 16}\n",
        6,
        ["calibration", "nothing is calibrated here (fp8 by fp8); drop it"],
    ),
    "memory without calibration": (HEAD.replace("awq", "nf4") + "gpu-memory: 5GB\n", 6, ["gpu-memory", "nf4 by "]),
    "memory of no GPU": (HEAD + "device: cpu\ngpu-memory: 5GB\n", 7, ["gpu-memory", "of a GPU, and device is cpu"]),
    "length of no answers": (HEAD + "validation:\n  new-tokens: 8\n", 7, ["validation.new-tokens", "to prompts"]),
    "limit of no tasks": (HEAD + "validation:\n  task-limit: 8\n", 7, ["validation.task-limit", "no task"]),
    "folder of tasks alone": (HEAD + "validation: {task-folder: base}\n", 6, ["validation.task-folder", "no task"]),
    "no such base": (HEAD.replace("base: base", "base: ./bass"), 2, ["base: ", "no such folder", "did you mean"]),
    "no such adapter": (HEAD.replace("adapter: adapter", "adapter: adaptor"), 3, ["adapter: ", "no such folder"]),
    "no such text": (
        HEAD + "calibration: {sources: [train.json:1]}\n",
        6,
        ["sources[0]", "no such file", "train.jsonl"],
    ),
    "no embedded text": (HEAD + "validation: {data: defalt-eval}\n", 6, ["validation.data", "mean default-eval"]),
    "no such data to train on": (TRAINED + "train: {out: a, data: ./x.txt}\n", 4, ["train.data", "no such file"]),
    "weight of nothing": (HEAD + "calibration: {sources: ['default:0']}\n", 6, ["sources[0]", "positive"]),
    "no such prompts": (HEAD + "validation: {prompts: p.txt}\n", 6, ["validation.prompts", "no such file"]),
    "no such task": (HEAD + "validation: {tasks: [t.yaml]}\n", 6, ["validation.tasks[0]", "no such file"]),
    "overrides of awq": (
        HEAD.replace("out}", "out,\n     overrides: [{pattern: a, bits: 8}]}"),
        6,
        ["outputs[0].overrides: overrides: awq has one scheme", "; target w4a16 algorithm awq"],
    ),
    "head of fp8": (HEAD + "  - {out: b, target: fp8, lm-head: true}\n", 6, ["[1].lm-head", "readers of fp8"]),
    "bits of an override": (
        MIXED + "    overrides:\n      - {pattern: a, bits: 2}\n",
        8,
        ["outputs[1].overrides: overrides 'a': w4a16 has bits 3 or 4 or 5 or 6 or 8, got 2"],
    ),
    "a budget beside bits": (
        MIXED + "    bits: 4\n    budget: 4.5bpw\n",
        9,
        ["outputs[1].budget: budget chooses the bits"],
    ),
    "a budget of one width": (
        MIXED + "    budget: 4.5\n    budget-bits: [4]\n",
        9,
        ["outputs[1].budget-bits: budget-bits takes two widths or more"],
    ),
    "group of an override": (
        MIXED + "    overrides:\n      - {pattern: a, bits: 8}\n      - {pattern: b, group-size: 4}\n",
        10,
        ["outputs[1].overrides[1]", "group-size is at least 8"],
    ),
    "override of nothing": (
        MIXED + "    overrides:\n      - pattern: a\n",
        9,
        ["outputs[1].overrides[0]", "changes nothing: no bits, group-size, symmetric or target"],
    ),
    "broken pattern": (MIXED + "    ignore:\n      - a\n      - 're:('\n", 10, ["[1].ignore[1]", "regular expression"]),
    "broken pattern of an override": (
        MIXED + "    overrides:\n      - bits: 8\n        pattern: 're:['\n",
        10,
        ["outputs[1].overrides[0].pattern", "regular expression"],
    ),
    "star without quotes": (MIXED + "    ignore: [*.o_proj]\n", 0, ["line 8", "begins with * stands in quotes"]),
    "no such policy": (HEAD + "policy: p.yaml\n", 6, ["policy", "no such file"]),
    "output exists": (HEAD + "  - {out: base}\n", 6, ["outputs[1].out", "exists already", "overwrite"]),
    "output is an input": (HEAD + "  - {out: base}\noverwrite: true\n", 6, ["outputs[1].out", "base"]),
    "report in an output": (HEAD + "report: out/r\n", 5, ["outputs[0].out", "report"]),
    "two reports": (HEAD + "  - {out: b/out}\nreport: r\n", 7, ["report", "two outputs are called out"]),
    "reports in an output": (HEAD + "  - {out: b}\nreport: .\n", 5, ["outputs[0].out", "report", "lies in"]),
    "limit of a metric": (HEAD + "gates: {kl_mean: {max: -1}}\n", 6, ["gates.kl_mean", "never below 0"]),
    "waived twice": (HEAD + POLICY + POLICY.partition("waivers:")[2], 15, ["waivers[1].gate", "waived twice"]),
}


@pytest.mark.parametrize("case", [*STRUCTURAL, *OTHER])
def test_a_wrong_recipe_is_refused_at_its_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    text, line, words = (STRUCTURAL | OTHER)[case]
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    before = sorted(folder.rglob("*"))
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stop:
        main(["run", "recipe.yaml"])
    captured = capsys.readouterr()
    assert (stop.value.code, captured.out) == (3, "")
    place = f"recipe.yaml:{line}: " if line else "recipe.yaml: "
    assert captured.err.startswith(f"error: {place}"), captured.err
    for word in words:
        assert word in captured.err
    assert captured.err.count("\n") == 1
    assert " --" not in captured.err  # keys, not flags
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("case", STRUCTURAL)
def test_the_schema_refuses_it_too(case: str) -> None:
    assert not is_valid(yaml.safe_load(STRUCTURAL[case][0]))


@pytest.mark.parametrize("case", ["key twice", "yes", "one folder for two", "no such text", "no steps"])
def test_what_the_schema_leaves_to_the_reader(case: str) -> None:
    """It knows nothing of files and combinations, nor of what a YAML reader makes of a text before it is asked."""
    assert is_valid(yaml.safe_load(OTHER[case][0]))


SETTINGS: dict[str, tuple[str, type[Exception], str]] = {
    "no value": ("calibration.samples", UsageError, "KEY=VALUE"),
    "no key": ("=3", UsageError, "KEY=VALUE"),
    "misspelt": (
        "calibration.sampels=3",
        RecipeError,
        "--set: calibration.sampels: unknown key; did you mean samples?",
    ),
    "wrong type": ("calibration.samples=x", RecipeError, "--set: calibration.samples: expected a whole number"),
    "no such item": ("outputs.3.out=x", RecipeError, "outputs has items 0 to 0, no '3'"),
    "no item": ("outputs.x=3", RecipeError, "no 'x'"),
    "below a value": ("base.x=3", RecipeError, "base is text ('base'), which has no 'x'"),
    "not YAML": ("calibration={", RecipeError, "--set: not YAML"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_wrong_setting_is_refused(folder: Path, case: str) -> None:
    value, kind, words = SETTINGS[case]
    with pytest.raises(kind) as caught:
        load(folder, HEAD, value)
    assert words in str(caught.value)


def test_settings_replace_add_and_take_away(folder: Path) -> None:
    text = HEAD + "calibration: {samples: 9, seed: 4}\ntrain: null\n"
    recipe = load(folder, text, "calibration.samples=3", "outputs[0].group-size=64", "validation={tokens: 1000}")
    job = recipe.job
    assert (job.calibration.samples, job.calibration.seed) == (3, 4)
    assert job.outputs[0].quantization is not None
    assert job.outputs[0].quantization.group_size == 64
    assert job.validation is not None
    assert job.validation.tokens == 1000
    trained = load(folder, text, "train.out=new", "train.steps=3", "adapter=null")
    assert trained.train is not None
    assert (trained.train.steps, trained.job.adapter) == (3, str(Path("new")))
    assert load(folder, text, "validation=false").job.validation is None


def test_an_alias_repeats_a_value(folder: Path) -> None:
    outputs = "[{out: a, target: gptq, damping: &d 5e-2}, {out: b, target: w4a16, damping: *d}]"
    job = load(folder, f"recipe: 1\nbase: base\noutputs: {outputs}\n").job
    assert [output.quantization and output.quantization.damping for output in job.outputs] == [0.05, 0.05]


def test_the_device_of_the_command_line_wins(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "recipe.yaml").write_text(HEAD + "device: cuda\n", encoding="utf-8")
    main(["run", str(folder / "recipe.yaml"), "--check", "--device", "cpu"])
    assert yaml.safe_load(capsys.readouterr().out)["device"] == "cpu"


def test_a_shell_completes_recipes(folder: Path) -> None:
    for name in ("recipe.yaml", "release.yml", "readme.md"):
        (folder / name).touch()
    argument = next(parameter for parameter in cli.commands["run"].params if parameter.name == "recipe")

    def completed(incomplete: str) -> list[tuple[str, str]]:
        items = argument.shell_complete(click.Context(cli.commands["run"]), incomplete)
        return [(item.value, item.type) for item in items]

    assert completed(f"{folder}/re") == [(f"{folder}/recipe.yaml", "plain"), (f"{folder}/release.yml", "plain")]
    assert completed(f"{folder}/ba") == [(f"{folder}/ba", "file")]  # folders on the way to one: the shell knows them


# Schema


def test_the_schema_is_one_and_names_every_key() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert list(SCHEMA["properties"]) == list(TOP_KEYS)

    def nameless(schema: dict[str, Any], path: str) -> list[str]:
        found = []
        for part in [schema, schema.get("items", {}), *schema.get("oneOf", [])]:
            for name, child in part.get("properties", {}).items():
                if len(child.get("description", "")) < 5:
                    found.append(f"{path}.{name}")
                found += nameless(child, f"{path}.{name}")
        return found

    assert nameless(SCHEMA, "") == []


def test_defaults_of_the_schema_are_those_that_are_taken(folder: Path) -> None:
    """Every default, written out, changes nothing."""
    plain = load(folder, HEAD)
    document = yaml.safe_load(HEAD)

    def fill(properties: dict[str, Any], values: dict[str, Any]) -> None:
        for name, child in properties.items():
            if "default" in child:
                values.setdefault(name, child["default"])

    properties = SCHEMA["properties"]
    fill(properties, document)
    fill(properties["outputs"]["items"]["properties"], document["outputs"][0])
    for section, part in (
        ("calibration", properties["calibration"]),
        ("validation", properties["validation"]["oneOf"][1]),
    ):
        fill(part["properties"], document.setdefault(section, {}))
    assert len(str(document)) > len(str(yaml.safe_load(HEAD))) + 300
    assert is_valid(document)
    assert load(folder, yaml.safe_dump(document)) == plain


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_fits_the_schema_and_nothing_more_does(path: Path) -> None:
    document = yaml.safe_load(path.read_text(encoding="utf-8").replace("2e-4", "0.0002"))  # YAML 1.1 reads text
    assert is_valid(document)
    for section in [
        document,
        *(value for value in document.values() if isinstance(value, dict)),
        document["outputs"][0],
    ]:
        section["no-such-key"] = 1
        assert not is_valid(document)
        del section["no-such-key"]
    assert not is_valid({key: value for key, value in copy.deepcopy(document).items() if key != "outputs"})


def test_the_command_prints_the_schema_without_torch() -> None:
    code = "import sys; from qconv.cli import main\ntry: main(['schema'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == json.loads(json.dumps(SCHEMA))


def test_check_prints_the_recipe_with_its_defaults_and_makes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "recipe.yaml").write_text(HEAD, encoding="utf-8")
    before = sorted(folder.rglob("*"))
    expected = as_document(load_recipe(folder / "recipe.yaml"))
    main(["run", str(folder / "recipe.yaml"), "--check"])
    assert yaml.safe_load(capsys.readouterr().out) == expected
    main(["run", str(folder / "recipe.yaml"), "--check", "--json"])
    assert json.loads(capsys.readouterr().out) == {"recipe": expected, "exit_code": 0}
    assert sorted(folder.rglob("*")) == before
