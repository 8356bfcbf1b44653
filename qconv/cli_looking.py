"""The commands that look and tell, and change no model: report, inspect, doctor, completion."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import click

from qconv import errors
from qconv.cli_options import json_option
from qconv.cli_parsing import SHELLS, Choice, Command, completion_script, folders


@click.command(cls=Command)
@click.argument("reports", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=Choice(["text", "markdown", "html", "junit", "json"]),
    default="text",
    show_default=True,
    help="Two reports are compared as text, markdown or json.",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Write there instead of to stdout.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def report(reports: tuple[Path, ...], form: str, out: Path | None, debug: bool) -> None:
    """Show one report (a qconv-report.json, or a folder with one) in another form, or compare two.

    \b
    qconv report ./out --format html -o report.html
    qconv report ./release-1 ./release-2
    """
    from qconv.report.render import render

    text = render(reports, form)
    if out is None:
        click.echo(text)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise errors.CheckpointError(f"{out}: cannot be written ({error})") from error


@click.command(cls=Command)
@click.argument("path", shell_complete=folders)
@json_option
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def inspect(path: str, as_json: bool, debug: bool) -> None:
    """Say what a checkpoint or adapter is: kind, scheme, sizes. Reads headers only.

    \b
    qconv inspect ./out
    qconv inspect ./adapter --json
    """
    from qconv.describe import describe

    facts = describe(path)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        width = max(map(len, facts))
        for key, value in facts.items():
            click.echo(f"{key:<{width}}  {value}")


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def doctor(context: click.Context, as_json: bool, debug: bool) -> None:
    """Say what this machine has of what qconv needs: packages, GPU, memory, disk. Exit code 3: qconv cannot run.

    \b
    qconv doctor
    qconv doctor --json > machine.json
    """
    from qconv.doctor import as_text, examine

    with redirect_stdout(sys.stderr):  # what libraries print when they are imported
        facts = examine()
    code = errors.EXIT_BAD_INPUT if facts["problems"] else errors.EXIT_DONE
    click.echo(json.dumps(facts | {"exit_code": code}, indent=2, ensure_ascii=False) if as_json else as_text(facts))
    context.exit(code)


@click.command(cls=Command)
@click.argument("shell", type=Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what makes SHELL (bash, zsh or fish) complete commands, options, targets, metrics and paths.

    \b
    eval "$(qconv completion bash)"                                      # in ~/.bashrc
    eval "$(qconv completion zsh)"                                       # in ~/.zshrc
    qconv completion fish > ~/.config/fish/completions/qconv.fish
    """
    click.echo(completion_script(context.find_root().command, shell))
