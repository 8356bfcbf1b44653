"""How the command line is read: refusals that name what may have been meant, and what a shell completes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from qconv.gate_rules import METRICS, TASK_PATTERN
from qconv.suggest import did_you_mean

if TYPE_CHECKING:
    _Choice = click.Choice[str]
else:
    _Choice = click.Choice  # not generic before click 8.2

SHELLS = ("bash", "zsh", "fish")
COMPLETE_VARIABLE = "_QCONV_COMPLETE"


class Choice(_Choice):
    """One of a few words; a refusal ends with the nearest of them."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            hint = did_you_mean(str(value), self.choices) or "."
            raise click.BadParameter(error.message.rstrip(".") + hint, ctx, param) from None


class Command(click.Command):
    """A command; an unknown option is refused with the nearest of its own, or with the commands that have it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            _refuse_option(self, ctx, error)


class Group(click.Group):
    """The commands; an unknown one is refused with the nearest."""

    command_class = Command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            _refuse_option(self, ctx, error)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not ctx.resilient_parsing and not name.startswith("-"):
            hint = did_you_mean(name, self.list_commands(ctx)) or f"; there are {', '.join(self.list_commands(ctx))}"
            raise click.UsageError(f"No such command {name!r}{hint}", ctx)
        return super().resolve_command(ctx, args)


def given_options() -> set[str]:
    """Those that were typed for the command that runs, each by its long name without dashes."""
    ctx = click.get_current_context()
    typed = [
        p for p in ctx.command.params if p.name and ctx.get_parameter_source(p.name) is ParameterSource.COMMANDLINE
    ]
    return {max(p.opts, key=len).lstrip("-") for p in typed}


def _options_of(command: click.Command, ctx: click.Context) -> list[str]:
    found = [parameter for parameter in command.get_params(ctx) if isinstance(parameter, click.Option)]
    return [name for option in found for name in (*option.opts, *option.secondary_opts)]


def _refuse_option(command: click.Command, ctx: click.Context, error: click.NoSuchOption) -> NoReturn:
    hint = did_you_mean(error.option_name, [name for name in _options_of(command, ctx) if name.startswith("--")])
    siblings = ctx.parent.command if ctx.parent is not None else command
    if isinstance(siblings, click.Group):
        having = [
            name
            for name, other in siblings.commands.items()
            if other is not command and error.option_name in _options_of(other, ctx)
        ]
        if having:  # spelled right, in the wrong place
            hint = f"; it is an option of {', '.join(having)}"
    raise click.NoSuchOption(error.option_name, f"No such option {error.option_name}{hint}", ctx=ctx) from None


def folders(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completes folders, by the shell itself."""
    return [CompletionItem(incomplete, type="dir")]


def files(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completes files, by the shell itself."""
    return [CompletionItem(incomplete, type="file")]


def recipes(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completes YAML files; where none begins so, the shell completes files."""
    folder, start = os.path.split(incomplete)
    names = sorted(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else []
    found = [name for name in names if name.startswith(start) and name.endswith((".yaml", ".yml"))]
    return [CompletionItem(os.path.join(folder, name)) for name in found] or [CompletionItem(incomplete, type="file")]


def gates(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completes ``kl_mean<=`` and the other metrics, up to their limit."""
    rules = ((name + metric.operator, metric.label) for name, metric in METRICS.items() if name != TASK_PATTERN)
    return [CompletionItem(rule, help=label) for rule, label in rules if rule.startswith(incomplete)]


def devices(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in ("auto", "cpu", "cuda") if name.startswith(incomplete)]


def completion_script(root: click.Command, shell: str) -> str:
    """What makes ``shell`` (one of `SHELLS`) complete ``qconv``: click's own script."""
    from click.shell_completion import get_completion_class

    completer = get_completion_class(shell)
    assert completer is not None  # SHELLS are those that click brings
    made = completer(root, {}, "qconv", COMPLETE_VARIABLE)
    # Not `source()`: for bash it starts one to ask its version, which fails where the script is only made for later.
    return str(made.source_template % made.source_vars())
