"""The report in GitHub-flavoured Markdown, for a step summary and beside the artifact."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qconv.report import content
from qconv.report.content import Document
from qconv.report.markdown_text import code, escape, folded, table
from qconv.report.values import at, count, fact, items, number, number_at, percent, rows_of, shorten, span, visible

_SYMBOLS = {"pass": "✅", "fail": "❌", "inconclusive": "⚠️", "waived": "⏸️", "not gated": "➖"}
_SEVERITY_SYMBOLS = {"error": "❌", "warning": "⚠️", "note": "💬"}


def to_markdown(document: Document) -> str:
    """The whole report, verdict first."""
    parts: list[str] = []
    for section in (
        _head,
        _gates,
        _findings,
        _budgets,
        _statistics,
        _confidence,
        _attribution,
        _blocks,
        _worst_tokens,
        _tasks,
        _prompts,
        _notes,
        _stages,
        _environment,
    ):
        lines = list(section(document))
        if lines:
            parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _head(document: Document) -> Iterator[str]:
    verdict = content.verdict(document)
    yield f"# {_SYMBOLS.get(verdict, '')} qconv: {content.verdict_word(verdict)}"
    yield ""
    for reason in document.get("reasons") or ():
        yield f"- {escape(reason)}"
    if document.get("reasons"):
        yield ""
    subject = document.get("subject") or {}
    yield from table(("subject", ""), ((escape(_label(key)), code(value)) for key, value in subject.items() if value))
    line = content.evaluation_line(document)
    if line:
        yield ""
        yield f"Measured over {escape(line)}."


def _gates(document: Document) -> Iterator[str]:
    gates = content.gates(document)
    if not gates:
        return
    yield "## Gates"
    yield ""
    rows = [
        (
            f"{_SYMBOLS.get(str(gate.get('verdict')), '')} {content.verdict_word(gate.get('verdict'))}".strip(),
            code(gate.get("name")),
            code(gate.get("rule")),
            content.gate_value(gate),
            content.gate_interval(gate) or "–",
            escape(gate.get("origin") or ""),
            escape(content.gate_note(gate)),
        )
        for gate in gates
    ]
    yield from table(("verdict", "gate", "limit", "measured", "95% interval", "set by", "note"), rows, (3, 4))


def _findings(document: Document) -> Iterator[str]:
    found = content.findings(document)
    if not found:
        return
    yield "## Findings"
    for finding in found:
        severity = str(finding.get("severity"))
        yield ""
        title = f"{_SEVERITY_SYMBOLS.get(severity, '')} **{escape(severity)}: {escape(finding.get('title'))}**"
        yield f"- {title} ({code(finding.get('code'))})  "
        yield f"  {escape(finding.get('message'))}"
        if waived := content.waiver_of(document, finding):
            yield f"  *{escape(waived)}*"
        for label, key in (("Tensors", "tensors"), ("Files", "files")):
            if finding.get(key):
                yield f"  {label}: {', '.join(code(name) for name in finding[key])}"


def _budgets(document: Document) -> Iterator[str]:
    found = content.budgets(document)
    if not found:
        return
    yield "## Where the error comes from"
    yield ""
    effect = at(document, "fidelity", "adapter_effect_retained")
    if number_at(effect, "value") is not None:
        interval = span(effect.get("interval_95"), "share")
        yield f"Adapter effect retained: **{percent(effect['value'])}**" + (f" ({interval})" if interval else "")
        yield ""
    rows = [
        (
            f"*{budget.label}*" if budget.is_context else f"**{budget.label}**",
            number(budget.kl),
            span([budget.low, budget.high]) or "–",
            percent(at(budget.pair, "top1_agreement", "value")),
            number(at(budget.pair, "perplexity"), 4),
            budget.meaning,
        )
        for budget in found
    ]
    headings = ("distance", "KL mean (nats/token)", "95% interval", "top-1", "perplexity", "what it compares")
    yield from table(headings, rows, (1, 2, 3, 4))


def _statistics(document: Document) -> Iterator[str]:
    rows = content.statistics(at(document, "fidelity", "total"))
    if not rows:
        return
    yield "## Statistics"
    yield ""
    cells = ((row.label, row.value, row.interval or "–", row.meaning.replace("|", "&#124;")) for row in rows)
    yield from table(("candidate against reference", "value", "95% interval", "meaning"), cells, (1, 2))


def _confidence(document: Document) -> Iterator[str]:
    rows = items(document, "fidelity", "total", "by_confidence")
    if not rows:
        return
    yield "## By confidence of the reference"
    yield ""
    cells = (
        (
            content.confidence_label(row),
            count(row.get("positions")),
            number(row.get("kl_mean")),
            percent(row.get("top1_agreement")),
        )
        for row in rows
    )
    yield from table(("probability of its first choice", "positions", "KL mean", "top-1 agreement"), cells, (1, 2, 3))


def _attribution(document: Document) -> Iterator[str]:
    attribution = at(document, "fidelity", "attribution")
    if not attribution:
        return
    yield "## Attribution"
    yield ""
    yield content.attribution_line(attribution)
    for kind, heading in (("blocks", "block"), ("linears", "linear")):
        units = content.top_units(document, kind, 8)
        if units:
            yield ""
            cells = ((code(u["name"]), number(u["kl_mean"]), percent(u.get("share"))) for u in units)
            yield from table((heading, "KL mean (nats/token)", "share"), cells, (1, 2))


def _blocks(document: Document) -> Iterator[str]:
    worst = content.worst_blocks(document)
    if not worst:
        return
    yield "## Blocks with the largest accumulated error"
    yield ""
    cells = (
        (
            str(block.get("block")),
            number(block.get("relative_error")),
            f"{number(block.get('sqnr_db'))} dB",
            number(block.get("cosine"), 5),
        )
        for block in worst
    )
    yield from table(("block", "relative error of hidden states", "SQNR", "cosine"), cells, (0, 1, 2, 3))


def _worst_tokens(document: Document) -> Iterator[str]:
    tokens = items(document, "fidelity", "worst_tokens")
    if not tokens:
        return

    def choices(pairs: Any) -> str:
        return ", ".join(f"{code(text)} {percent(probability)}" for text, probability in pairs or ()) or "–"

    cells = [
        (
            number(token.get("kl")),
            code(_tail(visible(token.get("context") or ""), 60)),
            code(token.get("target")),
            choices(token.get("reference_top")),
            choices(token.get("candidate_top")),
        )
        for token in tokens[:10]
    ]
    lines = table(("KL (nats)", "context", "actual next", "reference says", "candidate says"), cells, (0,))
    yield from folded("Tokens with the largest KL", lines)


def _tasks(document: Document) -> Iterator[str]:
    tasks = items(document, "tasks")
    if not tasks:
        return
    yield "## Tasks"
    yield ""
    cells = (
        (
            escape(task.get("name")),
            escape(task.get("metric")),
            count(task.get("num_samples")),
            *content.task_values(task),
            f"{count(task.get('better_to_worse'))} / {count(task.get('worse_to_better'))}",
            number(task.get("mcnemar_p")),
        )
        for task in tasks
    )
    headings = ("task", "metric", "samples", "reference", "candidate", "difference", "95% interval")
    yield from table((*headings, "worse / better", "McNemar p"), cells, range(2, 9))


def _prompts(document: Document) -> Iterator[str]:
    prompts = at(document, "fidelity", "prompts")
    if not prompts:
        return
    yield "## Greedy generation"
    yield ""
    yield content.prompts_line(prompts)
    cells = [
        (
            code(shorten(visible(example.get("prompt") or ""), 60)),
            code(shorten(visible(example.get("reference") or ""), 160)),
            code(shorten(visible(example.get("candidate") or ""), 160)),
            "none" if example.get("first_divergence") is None else count(example["first_divergence"]),
        )
        for example in items(prompts, "examples")[:5]
    ]
    if cells:
        yield ""
        yield from folded("Examples", table(("prompt", "reference", "candidate", "diverges at token"), cells, (3,)))


def _notes(document: Document) -> Iterator[str]:
    notes = items(document, "fidelity", "notes")
    runs = [(key, at(document, "fidelity", key, "runs")) for key in ("reference", "candidate")]
    lines = [f"- {key}: {escape(text)}" for key, text in runs if text] + [f"- {escape(note)}" for note in notes]
    if lines:
        yield "## How it was measured"
        yield ""
        yield from lines


def _stages(document: Document) -> Iterator[str]:
    for stage, facts in (document.get("stages") or {}).items():
        title = f"Stage: {escape(_label(stage))}"
        tables = {key: found for key, value in (facts or {}).items() if (found := rows_of(value)) is not None}
        rows = [(escape(_label(key)), escape(fact(value))) for key, value in (facts or {}).items() if key not in tables]
        if rows:
            yield from folded(title, table(("fact", "value"), rows))
        for key, (headings, records) in tables.items():
            label = escape(_label(key))
            cells = [tuple(escape(cell) for cell in record) for record in records]
            yield from folded(f"{title}, {label}", table((label, *(escape(heading) for heading in headings)), cells))


def _environment(document: Document) -> Iterator[str]:
    environment = document.get("environment") or {}
    rows = [(escape(key), escape(fact(value))) for key, value in environment.items()]
    yield from folded("Environment", table(("what", "version"), rows))
    provenance = document.get("provenance") or {}
    digests = [
        (escape(_label(role)), code(name), code(digest))
        for role, known in provenance.items()
        for name, digest in (known or {}).items()
    ]
    if digests:
        yield from folded("Provenance (sha256)", table(("of", "file", "sha256"), digests))
    if rows or digests:
        yield ""
    tool, created = document.get("tool") or "qconv", document.get("created") or "an unknown day"
    yield f"Made with {escape(tool)} on {escape(created)}."


def _label(key: Any) -> str:
    return str(key).replace("_", " ")


def _tail(text: str, limit: int) -> str:
    return text if len(text) <= limit else "…" + text[-(limit - 1) :]
