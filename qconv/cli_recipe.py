"""The commands for recipes: run one, and print the schema of all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from qconv import __version__, cli_jobs
from qconv.cli_answers import Answer, answer_of, answers, made, together, training_facts, with_code
from qconv.cli_options import dry_run_option, json_option, message_options
from qconv.cli_parsing import Command, devices, recipes
from qconv.cli_plans import estimate_before_training, planned_recipe
from qconv.errors import CapacityError, QconvError, SchemeError, UsageError
from qconv.own_process import begin, without_collections
from qconv.recipe import Recipe, load_recipe
from qconv.recipe_schema import recipe_schema
from qconv.recipe_show import as_document


@click.command(cls=Command)
@click.argument("recipe", type=click.Path(path_type=Path), shell_complete=recipes)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Replace one value, e.g. calibration.samples=16, outputs.0.out=./out. Repeatable.",
)
@click.option("--check", is_flag=True, help="Only check the recipe, and print it with every default filled in.")
@dry_run_option
@click.option("--device", shell_complete=devices, help="cpu, cuda or auto, whatever the recipe says.")
@json_option
@message_options
@answers
def run(
    recipe: Path, settings: tuple[str, ...], check: bool, dry_run: bool, device: str | None, **options: Any
) -> Answer:
    """Do all that a RECIPE says: train, merge, quantize to several targets, validate, gate, report.

    \b
    qconv run release.yaml
    qconv run release.yaml --check --set base=./base-nf4
    """
    asked = load_recipe(recipe, (*settings, *([f"device={device}"] if device is not None else [])))
    if check:
        return _checked(asked)
    with _refused_in_words_of_recipe(asked):
        if dry_run:
            return planned_recipe(asked.train, asked.job, cli_jobs.progress_of(options))
        return _run(asked, options)


@click.command(cls=Command)
def schema() -> None:
    """Print the JSON schema of a recipe, for editors and checkers.

    \b
    qconv schema > recipe.schema.json
    """
    click.echo(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))


def _checked(recipe: Recipe) -> Answer:
    import yaml

    document = as_document(recipe)
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=10_000).rstrip()
    return Answer(text=text, document={"recipe": document})


def _run(recipe: Recipe, options: dict[str, Any]) -> Answer:
    job, progress = recipe.job, cli_jobs.progress_of(options)
    texts, trained = [], None
    solves = cli_jobs.solves(job)
    begin(job.device, [job.base, *job.adapters], solves, runs=solves)
    with without_collections():
        from qconv import pipeline
    if recipe.train is not None:
        from qconv.train import train

        for line in estimate_before_training(recipe.train, job).check():
            progress.say(f"warning: {line}")
        result = train(recipe.train, progress)
        text, trained = training_facts(result, job.base)
        texts.append(text)
    outcomes = pipeline.run(job, progress)
    parts = [
        answer_of(outcome, made(outcome), cli_jobs.following_a_merge(job, output))
        for output, outcome in zip(job.outputs, outcomes, strict=True)
    ]
    whole = together(parts)
    return replace(
        whole,
        text="\n\n".join([*texts, whole.text]),
        document={
            "tool": f"qconv {__version__}",
            "command": "run",
            "recipe": str(recipe.path),
            "train": trained,
            "outputs": list(map(with_code, parts)),
        },
    )


@contextmanager
def _refused_in_words_of_recipe(recipe: Recipe) -> Iterator[None]:
    """What only models can tell of a recipe is bad input, too, and says keys instead of flags, and their lines."""
    try:
        yield
    except QconvError as error:
        if error.place or isinstance(error, UsageError | SchemeError | CapacityError):
            raise recipe.refusal(error) from error
        raise
