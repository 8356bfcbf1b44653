"""The report in a few lines for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qconv.report import content
from qconv.report.content import Document
from qconv.report.values import at, number, number_at, one_line, percent, shorten, span

_MAX_REASONS = 3
_MAX_FINDINGS = 3
_MAX_GATES = 6


def summary(document: Document) -> str:
    """Verdict, why, the headline figures, findings and gates: about 15 lines without control characters."""
    lines = [f"{label:<11} {text}".rstrip() for label, text in _rows(document)]
    return "\n".join(lines)


def _rows(document: Document) -> Iterator[tuple[str, str]]:
    yield "verdict", content.verdict_word(content.verdict(document))
    reasons = [one_line(reason) for reason in document.get("reasons") or ()]
    for reason in reasons[:_MAX_REASONS]:
        yield "", reason
    if len(reasons) > _MAX_REASONS:
        yield "", f"and {len(reasons) - _MAX_REASONS} more in the report"
    yield from _fidelity_rows(document)
    found = content.findings(document)
    shown = [finding for finding in found if finding.get("severity") == "error"][:_MAX_FINDINGS]
    shown += [finding for finding in found if finding not in shown][: _MAX_FINDINGS - len(shown)]
    for finding in shown:
        yield str(finding.get("severity")), _finding(finding)
    if len(found) > len(shown):
        yield "", f"and {len(found) - len(shown)} more in the report"
    yield from _detail_rows(document)
    yield from _gate_rows(document)


def _fidelity_rows(document: Document) -> Iterator[tuple[str, str]]:
    fidelity = document.get("fidelity")
    total = at(fidelity, "total")
    if not total:
        return
    kl = at(total, "kl")
    interval = _bracket(at(kl, "interval_95"))
    yield "KL mean", f"{number(at(kl, 'mean'))} nats per token{interval}, p99 {number(at(kl, 'p99'))}"
    parts = [budget for budget in content.budgets(document) if not budget.is_context]
    if len(parts) > 1:
        yield "budgets", ", ".join(f"{part.label.lower()} {number(part.kl)}" for part in parts)
    top1 = at(total, "top1_agreement")
    yield "top-1", f"{percent(at(top1, 'value'))} agreement{_bracket(at(top1, 'interval_95'), 'share')}"
    reference = at(total, "reference_perplexity")
    if reference is None:
        reference = at(fidelity, "reference", "perplexity")
    yield "perplexity", f"{number(at(total, 'perplexity'), 4)} (reference {number(reference, 4)})"
    effect = at(fidelity, "adapter_effect_retained")
    if number_at(effect, "value") is not None:
        yield "effect", f"{percent(effect['value'])} of the adapter retained{_bracket(effect['interval_95'], 'share')}"


def _detail_rows(document: Document) -> Iterator[tuple[str, str]]:
    """What was asked for beside the comparison: attribution, answers to prompts, tasks."""
    fidelity = document.get("fidelity")
    units = [*(at(fidelity, "attribution", "blocks") or ()), *(at(fidelity, "attribution", "linears") or ())]
    if units:
        worst = sorted(units, key=lambda unit: -(unit.get("kl_mean") or 0))[:3]
        yield "costliest", ", ".join(f"{one_line(unit['name'])} {number(unit['kl_mean'])}" for unit in worst)
    prompts = at(fidelity, "prompts")
    if prompts:
        same = f"{prompts['identical']} of {prompts['num_prompts']} answers identical"
        yield "prompts", f"{same}, median first difference at token {number(prompts['median_first_divergence'])}"
    for task in document.get("tasks") or ():
        scores = f"{number(task.get('candidate'))} (reference {number(task.get('reference'))})"
        yield "task", f"{one_line(task.get('name'))} {one_line(task.get('metric'))} {scores}"


def _gate_rows(document: Document) -> Iterator[tuple[str, str]]:
    gates = content.gates(document)
    passed = [gate for gate in gates if gate.get("verdict") == "pass"]
    folded = passed if len(gates) > _MAX_GATES else []
    for gate in gates:
        if gate in folded:
            continue
        word = content.verdict_word(gate.get("verdict")).lower()
        text = f"{word}: {one_line(gate.get('name'))} {one_line(gate.get('rule'))}, measured {content.gate_value(gate)}"
        interval = content.gate_interval(gate)
        text += f" [{interval}]" if interval else ""
        note = content.gate_note(gate)
        yield "gate", text + (f"; {note}" if note else "")
    if folded:
        yield "gate", f"pass: {', '.join(one_line(gate.get('name')) for gate in folded)}"


def _finding(finding: Any) -> str:
    where = finding.get("tensors") or finding.get("files") or ()
    text = f"{one_line(finding.get('title') or finding.get('code'))} ({one_line(finding.get('code'))})"
    return shorten(text + (f": {content.names(where)}" if where else ""), 240)


def _bracket(interval: Any, unit: str = "number") -> str:
    text = span(interval, unit)
    return f" [{text}]" if text else ""
