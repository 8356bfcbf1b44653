"""The commands that look and tell, and change no model: report, inspect, doctor, completion."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from qconv import errors
from qconv.cli_options import json_option, trained_on_option
from qconv.cli_parsing import SHELLS, Choice, Command, completion_script, devices, folders
from qconv.types import BnbKind


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
    _write(out, text)


def _write(out: Path, text: str) -> None:
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise errors.CheckpointError(f"{out}: cannot be written ({error})") from error


@click.command(cls=Command)
@click.argument("path", shell_complete=folders)
@click.option("--spectral", is_flag=True, help="Of an adapter: singular vectors of merged weights that the base lacks.")
@click.option("--base", shell_complete=folders, help="--spectral: the adapter's base.")
@trained_on_option
@click.option(
    "--plot", metavar="FILE", type=click.Path(path_type=Path), help="--spectral: a page with maps by block and linear."
)
@click.option("--device", shell_complete=devices, help="--spectral: cpu, cuda, or auto [default: auto]")
@json_option
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def inspect(
    path: str,
    spectral: bool,
    base: str | None,
    trained_on: BnbKind | None,
    plot: Path | None,
    device: str | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Say what a checkpoint or adapter is: kind, scheme, sizes. Reads headers only, but with --spectral.

    \b
    qconv inspect ./out
    qconv inspect ./adapter --json
    qconv inspect ./adapter --base ./base-nf4 --spectral --plot spectrum.html
    """
    from qconv.describe import describe, describe_spectrum

    if spectral != (base is not None) or (not spectral and (trained_on or plot or device)):
        raise errors.UsageError(
            "--spectral needs --base, and --base, --trained-on, --plot and --device are for --spectral alone"
        )
    if plot is not None and plot.suffix != ".html":
        raise errors.UsageError(f"--plot: expected a name that ends in .html, got {plot}")
    facts = describe_spectrum(path, base, trained_on, device or "auto") if base is not None else describe(path)
    if plot is not None:
        from qconv.report.html import spectrum_to_html

        _write(plot, spectrum_to_html(path, facts))
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    rows = facts.pop("spectrum", [])
    width = max(map(len, facts))
    for key, value in facts.items():
        click.echo(f"{key:<{width}}  {value}")
    width = max((len(row["module"]) for row in rows), default=0)
    for row in rows:
        click.echo(f"  {row['module']:<{width}}  {_spectrum(row)}")


def _spectrum(row: dict[str, Any]) -> str:
    found = ", ".join(f"{one['place'] + 1} (cosine {one['cosine']:.2f})" for one in row["intruders"])
    return (
        f"changed by {row['change']:.2%}, largest singular value {row['largest_before']:.3g} -> "
        f"{row['largest_after']:.3g}, intruders {found or 'none'}"
    )


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
