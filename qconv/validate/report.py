"""The report: one JSON document, and the same in Markdown for people."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qconv.config import ValidationConfig
from qconv.validate.compare import Comparison
from qconv.validate.gates import Gate, Verdict, overall
from qconv.validate.statistics import effect_retained

REPORT_FORMAT = 1
JSON_NAME = "qconv-report.json"
MARKDOWN_NAME = "qconv-report.md"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything a run has to say about its output.

    Attributes:
        subject: what was made or compared: base, adapter, out, versions.
        stages: what each stage did and how often it fell back: merge, quantization, calibration.
        fidelity: measured distance from the reference, or None when validation was not asked for.
        gates: the limits that were set, each with its verdict.
    """

    subject: Mapping[str, Any]
    stages: Mapping[str, Any] = field(default_factory=dict)
    fidelity: Mapping[str, Any] | None = None
    gates: list[Gate] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        return overall(self.gates)

    def as_dict(self) -> dict[str, Any]:
        return {
            "format": REPORT_FORMAT,
            "verdict": self.verdict if self.gates else "not gated",
            **self.subject,
            "stages": dict(self.stages),
            "fidelity": self.fidelity,
            "gates": [gate.as_dict() for gate in self.gates],
        }

    def to_json(self) -> str:
        return json.dumps(_finite(self.as_dict()), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def summary(self, out: Path | None) -> str:
        """A few lines for the terminal."""
        lines = []
        if out is not None:
            done = self.verdict == "pass"
            lines.append(f"output     {out}" if done else f"rejected   {out}.rejected (kept for inspection)")
        if self.fidelity is not None:
            pair = self.fidelity["candidate"]
            lines.append(f"KL mean    {pair['kl_mean']:.5f} nats (p99 {pair['kl_p99']:.4f}) to the unmerged reference")
            lines.append(f"top-1      {pair['top1_agreement']:.1%} agreement")
            lines.append(f"perplexity {pair['perplexity']:.2f} (reference {self.fidelity['reference_perplexity']:.2f})")
            if "adapter_effect_retained" in self.fidelity:
                effect = self.fidelity["adapter_effect_retained"]["value"]
                lines.append(f"effect     {effect:.2%} of the adapter retained")
        for gate in self.gates:
            row = gate.as_dict()
            lines.append(f"gate       {gate.name} {row['rule']}: {gate.value:.6g} -> {gate.verdict}")
        return "\n".join(lines)

    def to_markdown(self) -> str:
        lines = ["# qconv report", "", *(f"- **{key}**: {_inline(value)}" for key, value in self.subject.items()), ""]
        if self.fidelity is not None:
            lines += _fidelity_lines(self.fidelity)
        if self.gates:
            lines += [
                "## Gates",
                "",
                f"**{self.verdict.upper()}**",
                "",
                "| gate | rule | value | 95% interval | verdict |",
            ]
            lines += ["|---|---|---|---|---|"]
            for gate in self.gates:
                row = gate.as_dict()
                span = f"{gate.low:.6g} to {gate.high:.6g}"
                lines.append(f"| {gate.name} | {row['rule']} | {gate.value:.6g} | {span} | {gate.verdict} |")
            lines.append("")
        for stage, facts in self.stages.items():
            lines += [
                f"## {stage.capitalize()}",
                "",
                *(f"- {key}: {_inline(value)}" for key, value in facts.items()),
                "",
            ]
        return "\n".join(lines)


def measure(comparison: Comparison, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The ``fidelity`` part of a report, from a comparison whose models are named candidate and base."""
    candidate = comparison.pairs["candidate"]
    fidelity: dict[str, Any] = {
        "evaluation": {**evaluation, "positions": comparison.num_positions, "rows": comparison.num_rows},
        "reference_perplexity": comparison.reference_perplexity,
        "candidate": candidate.summary(),
        "blocks": [
            {"block": e.index, "relative_error": e.relative_error, "sqnr_db": e.sqnr_db}
            for e in comparison.blocks["candidate"]
        ],
    }
    if "base" in comparison.pairs:
        base = comparison.pairs["base"]
        fidelity["base_without_adapter"] = base.summary()
        fidelity["adapter_effect_retained"] = effect_retained(candidate.kl_row_means, base.kl_row_means)
    return fidelity


def judge(fidelity: Mapping[str, Any], config: ValidationConfig) -> list[Gate]:
    """The gates that the config sets, applied to measured fidelity."""
    gates = []
    if config.max_kl is not None:
        low, high = fidelity["candidate"]["kl_mean_interval_95"]
        value = fidelity["candidate"]["kl_mean"]
        gates.append(Gate(name="kl_mean", limit=config.max_kl, upper=True, value=value, low=low, high=high))
    if config.min_effect is not None:
        effect = fidelity["adapter_effect_retained"]
        low, high = effect["interval_95"]
        gates.append(
            Gate(
                name="adapter_effect_retained",
                limit=config.min_effect,
                upper=False,
                value=effect["value"],
                low=low,
                high=high,
            )
        )
    return gates


def _fidelity_lines(fidelity: Mapping[str, Any]) -> list[str]:
    rows = [("candidate", fidelity["candidate"])]
    if "base_without_adapter" in fidelity:
        rows.append(("base without adapter", fidelity["base_without_adapter"]))
    lines = ["## Fidelity to the unmerged model", ""]
    if "adapter_effect_retained" in fidelity:
        effect = fidelity["adapter_effect_retained"]
        low, high = effect["interval_95"]
        lines += [f"Adapter effect retained: **{effect['value']:.1%}** (95% interval {low:.1%} to {high:.1%})", ""]
    lines += ["| model | KL mean (nats) | KL p99 | top-1 agreement | perplexity |", "|---|---|---|---|---|"]
    lines.append(f"| reference (base + unmerged adapter) | 0 | 0 | 100% | {fidelity['reference_perplexity']:.2f} |")
    for name, summary in rows:
        lines.append(
            f"| {name} | {summary['kl_mean']:.5f} | {summary['kl_p99']:.4f} "
            f"| {summary['top1_agreement']:.1%} | {summary['perplexity']:.2f} |"
        )
    evaluation = fidelity["evaluation"]
    lines += ["", f"Over {evaluation['positions']} positions of {evaluation['source']}.", ""]
    worst = sorted(fidelity["blocks"], key=lambda block: -block["relative_error"])[:5]
    lines += [
        "Blocks with the largest relative error of hidden states:",
        "",
        "| block | relative error | SQNR |",
        "|---|---|---|",
    ]
    lines += [f"| {b['block']} | {b['relative_error']:.4f} | {b['sqnr_db']:.1f} dB |" for b in worst]
    return [*lines, ""]


def _inline(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_inline(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(_inline(item) for item in value) or "none"
    return str(value)


def _finite(value: Any) -> Any:
    """Infinities (an interval that one row cannot bound, the SQNR of no error) become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
