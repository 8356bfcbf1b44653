"""A model card for the folder that was made: README.md with the YAML front matter that model hubs read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from qconv.report import content
from qconv.report.card_serving import FORMATS, library, serving
from qconv.report.content import Document
from qconv.report.markdown_text import code, escape, table
from qconv.report.values import at, items, number, number_at, one_line, percent, shorten, span

_HUB_ID = re.compile(r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?/[A-Za-z0-9](?:[\w.-]*[\w])?", re.ASCII)
_MAX_HUB_ID = 96
_WORDS = {"quantized": "merged with its adapter and quantized", "merge": "merged with its adapter"}


def model_card(
    document: Document,
    *,
    base_model: str | None,
    adapter: str | None,
    license: str | None,
    relation: Literal["quantized", "merge"],
    tags: Sequence[str] = (),
    gguf_file: str | None = None,
    in_vllm: bool = True,
) -> str:
    """README.md of a model folder.

    Args:
        document: the report of the run that made the folder.
        base_model: where the base came from; named in the front matter only when it is a hub id ``org/name``.
        adapter: where the adapter came from; likewise.
        license: identifier of the licence, or None when it is not known: none is ever guessed.
        relation: of the folder to its base, as hubs know it.
        tags: further tags.
        gguf_file: the file's name in a folder of llama.cpp.
        in_vllm: whether vLLM loads the folder.
    """
    sections = (
        _front_matter(base_model, adapter, license, relation, tags, document),
        _what(document, base_model, adapter, relation),
        serving(document, gguf_file, in_vllm),
        _fidelity(document),
        _gates(document),
        _origin(document),
    )
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def is_hub_id(text: str | None) -> bool:
    """Whether a string looks like ``org/name`` and not like a path."""
    if text is None or len(text) > _MAX_HUB_ID or "--" in text or ".." in text:
        return False
    return _HUB_ID.fullmatch(text) is not None


def _front_matter(
    base_model: str | None,
    adapter: str | None,
    license: str | None,
    relation: str,
    tags: Sequence[str],
    document: Document,
) -> Iterator[str]:
    yield "---"
    if is_hub_id(base_model):
        yield "base_model:"
        # Hubs read several parents as a merge of them; a quantized model has one.
        parents = (base_model, adapter) if relation == "merge" else (base_model,)
        yield from (f"- {yaml_scalar(parent)}" for parent in parents if is_hub_id(parent))
        yield f"base_model_relation: {relation}"
    yield f"library_name: {library(document)}"
    if license:
        yield f"license: {yaml_scalar(license)}"
    target = at(document, "subject", "target")
    known = [*tags, "qconv", *([target] if target in FORMATS else [])]
    yield "tags:"
    yield from (f"- {yaml_scalar(tag)}" for tag in dict.fromkeys(known))
    yield "---"


def yaml_scalar(text: Any) -> str:
    """A YAML scalar that is this string whatever it holds: JSON strings are YAML double-quoted scalars.

    Plain only where YAML 1.1 and 1.2 cannot read a number, a date, a boolean or null into it.
    """
    found = one_line(text)
    is_plain = re.fullmatch(r"[A-Za-z][\w./-]*", found, re.ASCII) and not re.fullmatch(
        r"(?i)y|n|yes|no|on|off|true|false|null|none", found
    )
    return found if is_plain else json.dumps(found, ensure_ascii=True)


def _what(document: Document, base_model: str | None, adapter: str | None, relation: str) -> Iterator[str]:
    base = base_model or at(document, "subject", "reference")
    name = base.rstrip("/").rpartition("/")[2] if isinstance(base, str) and base.strip("/.") else "model"
    yield f"# {escape(shorten(one_line(name), 80))}, {'quantized' if relation == 'quantized' else 'merged'}"
    yield ""
    with_adapter = adapter or at(document, "subject", "adapter")
    words = _WORDS[relation] if with_adapter else "quantized" if relation == "quantized" else "converted"
    text = f"{code(base) if base else 'A model'}, {words}"
    text += f" ({code(with_adapter)})" if with_adapter else ""
    target = at(document, "subject", "target")
    facts = at(document, "stages", "quantization") or {}
    layouts = str(facts.get("format")).split("+")
    if len(layouts) > 1:
        text += f", stored as compressed-tensors mixed-precision ({' and '.join(layouts)})"
    elif target in FORMATS:
        text += f", stored as {FORMATS[target][0]}"
    details = [f"{label} {escape(facts[key])}" for key, label in _DETAILS if facts.get(key) is not None]
    yield f"{text}: {', '.join(details)}." if details else f"{text}."
    if at(document, "stages", "key-value cache"):
        yield ""
        yield (
            "It holds calibrated scales for an FP8 cache of keys and values; what is measured below is with the "
            "rounding of such a cache."
        )
    if with_adapter:
        yield ""
        combined = at(document, "stages", "combination", "method")
        yield (
            f"The adapters were combined ({escape(combined)}) and merged into the base as training saw it."
            if combined
            else "The adapter was merged into the base as training saw it, so that what it corrects is what is there."
        )


_DETAILS = (("algorithm", "algorithm"), ("bits", "bits"), ("group_size", "group size"))


def _fidelity(document: Document) -> Iterator[str]:
    total = at(document, "fidelity", "total")
    yield "## Fidelity"
    yield ""
    if not total:
        yield "Not measured."
        return
    reference = "the model it was made from"
    if at(document, "subject", "adapter"):
        is_measured = at(document, "stages", "combination", "merge budget") is None
        reference = "the base with the unmerged adapter" if is_measured else "the merged 16-bit model, unquantized"
    yield f"How close this folder is to {reference}, over {escape(content.evaluation_line(document))}:"
    yield ""
    yield from table(("measure", "value", "95% interval"), _fidelity_rows(document, total), (1, 2))
    digest = at(document, "fidelity", "evaluation", "sha256")
    if digest:
        yield ""
        yield f"The evaluated tokens have the sha256 {code(digest)}."
    tasks = [
        (
            escape(task.get("name")),
            escape(task.get("metric")),
            *content.task_values(task),
        )
        for task in items(document, "tasks")
    ]
    if tasks:
        yield ""
        headings = ("task", "metric", "reference", "this model", "difference", "95% interval")
        yield from table(headings, tasks, (2, 3, 4, 5))


def _fidelity_rows(document: Document, total: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    kl, top1 = at(total, "kl"), at(total, "top1_agreement")
    ratio, effect = at(total, "perplexity_ratio"), at(document, "fidelity", "adapter_effect_retained")
    yield "KL divergence, mean (nats per token)", number(at(kl, "mean")), span(at(kl, "interval_95")) or "–"
    yield "KL divergence, p99 (nats)", number(at(kl, "p99")), "–"
    yield "Top-1 agreement", percent(at(top1, "value")), span(at(top1, "interval_95"), "share") or "–"
    yield "Perplexity", number(at(total, "perplexity"), 4), "–"
    yield "Perplexity of the reference", number(at(total, "reference_perplexity"), 4), "–"
    yield "Perplexity ratio", number(at(ratio, "value"), 4), content.span4(at(ratio, "interval_95")) or "–"
    if number_at(effect, "value") is not None:
        yield "Adapter effect retained", percent(effect["value"]), span(at(effect, "interval_95"), "share") or "–"


def _gates(document: Document) -> Iterator[str]:
    yield "## Release verdict"
    yield ""
    yield f"**{content.verdict_word(content.verdict(document))}**"
    yield ""
    for reason in document.get("reasons") or ():
        yield f"- {escape(reason)}"
    rows = [
        (
            code(gate.get("name")),
            code(gate.get("rule")),
            content.gate_value(gate),
            content.verdict_word(gate.get("verdict")),
            escape(content.gate_note(gate)),
        )
        for gate in content.gates(document)
    ]
    if rows:
        yield ""
        yield from table(("gate", "limit", "measured", "verdict", "note"), rows, (2,))


def _origin(document: Document) -> Iterator[str]:
    command = f" Command: {code(document['command'])}." if document.get("command") else ""
    yield f"Made with {escape(document.get('tool') or 'qconv')}.{command}"
