"""What a command answers: text or one JSON document on stdout, and on stderr why it failed or what comes next."""

from __future__ import annotations

import functools
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from qconv import __version__, errors
from qconv.progress import log_line

if TYPE_CHECKING:
    from qconv.decomposed import Separated
    from qconv.normalise import Normalised
    from qconv.outcome import Outcome
    from qconv.train import TrainResult
    from qconv.unpickle import Unpickled


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Attributes:
    text: for people.
    document: for machines, with ``--json``.
    failure: raised once the answer is out, as when a gate failed.
    following: the command lines that somebody may want next.
    """

    text: str
    document: Mapping[str, Any]
    failure: errors.QconvError | None = None
    following: tuple[str, ...] = ()


def together(parts: Sequence[Answer]) -> Answer:
    """One answer of several: the failure is the worst, a gate that failed before one that is inconclusive, and either
    before a push that failed.

    The document of several is ``{"outputs": [...]}``, each as it would be alone.
    """
    if len(parts) == 1:
        return parts[0]
    failures = [part.failure for part in parts if part.failure is not None]
    return Answer(
        text="\n\n".join(part.text for part in parts),
        document={"outputs": [with_code(part) for part in parts]},
        failure=min(failures, key=_rank, default=None),
        following=tuple(line for part in parts for line in part.following),
    )


def _rank(failure: errors.QconvError) -> tuple[bool, int]:
    return not isinstance(failure, errors.GateError | errors.GateInconclusiveError), failure.exit_code


def with_code(answer: Answer) -> dict[str, Any]:
    """Its document, with the exit code that it alone would end with."""
    return dict(answer.document) | {
        "exit_code": errors.EXIT_DONE if answer.failure is None else answer.failure.exit_code
    }


def answers(command: Callable[..., Answer]) -> Callable[..., None]:
    """Shows what a command answers; under ``--json`` nothing but the document reaches stdout."""

    @functools.wraps(command)
    def run(**options: Any) -> None:
        as_json = options["as_json"]
        with redirect_stdout(sys.stderr) if as_json else nullcontext():  # libraries print there
            answer = command(**options)
        if as_json:
            _show_document(with_code(answer))
        else:
            click.echo(answer.text)
        if answer.failure is not None:
            answer.failure.is_answered = True
            raise answer.failure
        if not as_json and not options["quiet"] and sys.stderr.isatty():
            for line in answer.following:
                click.echo(f"next        {line}", err=True)

    return run


def _show_document(document: Mapping[str, Any]) -> None:
    from qconv.report.document import finite

    click.echo(json.dumps(finite(document), indent=2, ensure_ascii=False, allow_nan=False))


def made(outcome: Outcome) -> str:
    """What became of an output, for people."""
    passed = outcome.verdict in ("pass", "not gated")
    text = f"{'output':<11} {outcome.folder}" if passed else f"{'rejected':<11} {outcome.folder} (kept for inspection)"
    return text if outcome.fidelity is None else f"{text}\n{outcome.summary()}"


def answer_of(outcome: Outcome, text: str, following: tuple[str, ...], is_written: bool = True) -> Answer:
    """A report as an answer; a gate that did not pass is its failure. ``is_written``: the report is in some folder."""
    failure: errors.QconvError | None = None
    shown = "report" if is_written else "summary"
    if outcome.verdict == "fail":
        more = "" if is_written else "; --report DIR writes all that was measured"
        failure = errors.GateError(f"a gate failed: see the {shown}{more}")
    if outcome.verdict == "inconclusive":
        failure = errors.GateInconclusiveError(
            f"a gate is inconclusive: see the {shown} for how many tokens would settle it"
        )
    folder = None if outcome.folder is None else str(outcome.folder)
    document = dict(outcome.document) | {"folder": folder}
    return Answer(text=text, document=document, failure=failure, following=following)


def training_facts(result: TrainResult, base: str) -> tuple[str, dict[str, Any]]:
    """What a training ended with, for people and for machines."""
    text = f"adapter      {result.out}\nloss         {result.first_loss:.3f} -> {result.final_loss:.3f}"
    document = {
        "tool": f"qconv {__version__}",
        "command": "train",
        "folder": str(result.out),
        "base": base,
        "trained_on": result.trained_on,
        "steps": result.num_steps,
        "tokens": result.num_tokens,
        "first_loss": result.first_loss,
        "final_loss": result.final_loss,
        "seconds": result.train_seconds,
    }
    return text, document


def normalised_facts(result: Normalised) -> Answer:
    """A plain LoRA as an answer."""
    before = ", ".join(map(str, result.ranks))
    text = f"adapter     {result.out}\nrank        {result.rank}, lora_alpha {result.rank} ({before} before)\n"
    text += f"modules     {result.num_modules} in {result.dtype}"
    if result.rounding:
        text += f", which rounds their updates by up to {result.rounding:.2e}"
    document = {"tool": f"qconv {__version__}", "command": "convert", "folder": str(result.out)}
    facts = {name: getattr(result, name) for name in ("num_modules", "ranks", "rank", "dtype", "rounding")}
    return Answer(text=text, document=document | facts)


def unpickled_facts(result: Unpickled) -> Answer:
    """An adapter that was pickled as an answer."""
    document = {"tool": f"qconv {__version__}", "command": "convert", "folder": str(result.out)}
    return Answer(
        text=f"adapter     {result.out}\ntensors     {result.num_tensors}, from {result.file}",
        document=document | {"file": result.file, "num_tensors": result.num_tensors},
    )


def separated_facts(result: Separated) -> Answer:
    """What LQ-LoRA saved, as base and adapter, as an answer."""
    bits = ", ".join(f"{count} of {width} bits" for width, count in result.bits.items())
    text = f"base        {result.base}, {result.dtype}; weights had {bits}\n"
    text += f"adapter     {result.adapter}, {result.num_factors} factors"
    document = {"tool": f"qconv {__version__}", "command": "convert", "folder": str(result.base.parent)}
    facts: dict[str, Any] = {"base": str(result.base), "adapter": str(result.adapter), "dtype": result.dtype}
    facts |= {"bits": {str(width): count for width, count in result.bits.items()}, "num_factors": result.num_factors}
    merging = shlex.join(["qconv", "merge", str(result.base), str(result.adapter)])
    return Answer(text=text, document=document | facts, following=(f"{merging} --requant awq -o OUT",))


@dataclass(frozen=True)
class Complaints:
    """How a run says that it failed: in words on stderr, there as a line of JSON, and as the document on stdout.

    Attributes: as_json: ``--json`` was asked for. in_lines: ``--log-json`` was asked for.
    """

    as_json: bool
    in_lines: bool

    def tell(
        self, kind: str, message: str, exit_code: int, *, words: str | Callable[[], None], is_answered: bool = False
    ) -> None:
        """``words``: the message as people read it, or what shows it. ``is_answered``: a document is out already."""
        if self.as_json and not is_answered:
            _show_document({"error": {"kind": kind, "message": message, "exit_code": exit_code}})
        if self.in_lines:
            click.echo(log_line("error", kind=kind, message=message, exit_code=exit_code), err=True, nl=False)
        elif callable(words):
            words()
        else:
            click.echo(words, err=True)
