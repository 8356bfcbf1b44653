"""What a validation runs, on what, and what it found: the reference, the candidate, and the controls between them.

Reference = base + UNMERGED adapter, as training saw it. Candidate = the stored bytes, read back. Controls run on
the first rows only: the merge in 16 bit (so that a failure names its cause), the base without the adapter (what
the adapter changed), and the reference again with another batch shape (the noise floor).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qconv import corpus
from qconv.assemble import config_dtype
from qconv.audits import StreamedAudit
from qconv.config import ValidationConfig
from qconv.corpus import TokenRows
from qconv.errors import CheckpointError, UsageError
from qconv.gate_rules import Rule, artifact_kind, combine, default_rules
from qconv.merge import merge
from qconv.progress import Progress
from qconv.runners import Candidate, Reference, Remembered, candidate_model, reference_model, streamed
from qconv.side_files import VOCABULARY_FILES, tokenizer_folder
from qconv.skeleton import text_config
from qconv.streaming import BlockModel
from qconv.types import Checkpoint
from qconv.validate.attribution import attribute
from qconv.validate.compare import Comparison, Entrant, Observe, Pair, compare
from qconv.validate.gates import Measurement
from qconv.validate.prompts import compare_prompts
from qconv.validate.statistics import PairStatistics, effect_retained
from qconv.validate.tokenizers import compare_tokenizers
from qconv.validate.worst import worst_tokens

CONTROL_SHARE = 8  # one row in so many runs through the controls, unless a gate needs all
LEAST_CONTROL_ROWS = 4
LEAST_FLOOR_ROWS = 2
_ATTRIBUTED_TOKENS = 1024
_KEPT_BYTES = 2_000_000_000  # models this small stay in memory between passes
_PAIRS = {"merge": "merge.", "requantization": "requantization."}


@dataclass(kw_only=True)
class Fidelity:
    """What was measured.

    Attributes:
        facts: the ``fidelity`` part of a report.
        findings: what the audits of weights and tokenizer found.
        pairs: statistics by name: total, merge, requantization, base_without_adapter, floor.
        rows: the evaluated tokens.
        is_audited: whether the candidate's weights were compared with what the merge gives.
    """

    facts: dict[str, Any]
    findings: list[dict[str, Any]]
    pairs: Mapping[str, PairStatistics]
    rows: TokenRows
    is_audited: bool = True
    measured: dict[str, Measurement] = field(default_factory=dict)
    models: tuple[BlockModel, BlockModel] | None = None

    def measurement(self, metric: str) -> Measurement | None:
        """One gateable metric, or None when this run did not measure it."""
        if metric in self.measured:
            return self.measured[metric]
        for name, prefix in (*_PAIRS.items(), ("total", "")):
            if metric.startswith(prefix) and name in self.pairs:
                return measure_pair(self.pairs[name], metric.removeprefix(prefix))
        return None

    def floor(self, metric: str) -> Measurement | None:
        """The same metric between the reference and itself."""
        if "floor" not in self.pairs:
            return None
        return measure_pair(self.pairs["floor"], metric.split(".")[-1])

    def attribute(self, progress: Progress) -> None:
        """Adds which block and which linear costs how much."""
        if self.models is None:
            return
        reference, candidate = self.models
        seq_len = self.rows.ids_TS.shape[1]
        num_rows = max(1, min(len(self.rows.ids_TS), _ATTRIBUTED_TOKENS // seq_len))
        self.facts["attribution"] = attribute(reference, candidate, self.rows.ids_TS[:num_rows], progress).as_dict()


def measure_pair(pair: PairStatistics, metric: str) -> Measurement | None:
    try:
        value, (low, high) = pair.measure(metric)
    except KeyError:
        return None
    return Measurement(value=value, low=low, high=high, tokens=pair.num_positions)


def rules_for(
    candidate: Candidate, has_adapter: bool, config: ValidationConfig, is_audited: bool = True
) -> tuple[Rule, ...]:
    """The defaults for what the candidate is, replaced where a policy file or a flag says otherwise.

    What cannot be measured is no default gate; asked for, it fails.
    """
    scheme = candidate.view.scheme
    if scheme is not None:
        kind = artifact_kind(scheme.bits, scheme.kind == "float")
    else:
        kind = "plain" if candidate.view.kind == "plain" else "int4"  # bitsandbytes 4-bit
    defaults = default_rules(kind, has_adapter) if config.defaults and config.policy.defaults else ()
    if not is_audited:
        defaults = tuple(rule for rule in defaults if rule.metric != "findings")
    return combine(defaults, config.policy.rules, config.rules)


def check_rules(reference: Reference, config: ValidationConfig) -> None:
    """Refuses a gate that nothing could be measured for; to be asked before the work.

    Raises:
        UsageError: a gate on the adapter or the merge without an adapter, and the like.
    """
    for rule in (*config.policy.rules, *config.rules):
        metric = rule.metric
        if reference.adapter is None and (metric == "adapter_effect_retained" or metric.startswith("merge.")):
            raise UsageError(f"the gate on {metric} needs an adapter: without one there is no merge to measure")
        if metric == "adapter_effect_retained" and reference.resizes_vocabulary:
            raise UsageError(
                f"the gate on {metric} compares with the base, and the adapter resizes its vocabulary: drop the gate"
            )
        if metric == "prompts_identical" and config.prompts is None:
            raise UsageError(f"the gate on {metric} needs prompts: add --prompts default, or a file")
        if metric.startswith("task.") and metric.split(".")[1] not in {Path(task).stem for task in config.tasks}:
            raise UsageError(f"the gate on {metric} needs that task: add --tasks {metric.split('.')[1]}")


def control_rows(config: ValidationConfig) -> int:
    """How many of the evaluated rows the controls see: few, unless somebody gates on what they measure."""
    if config.control_tokens is not None:
        return min(config.rows, max(1, config.control_tokens // config.seq_len))
    wanted = ("merge.", "requantization.", "adapter_effect_retained")
    if any(rule.metric.startswith(wanted) for rule in (*config.policy.rules, *config.rules)):
        return config.rows
    return min(config.rows, max(LEAST_CONTROL_ROWS, -(-config.rows // CONTROL_SHARE)))


def evaluation_rows(folder: Path, config: ValidationConfig) -> tuple[TokenRows, list[str]]:
    """Held-out rows through the tokenizer of a folder, and the documents that they are cut from.

    Raises:
        CalibrationError: text that is missing or too short.
        CheckpointError: no tokenizer.
    """
    documents = corpus.load_documents(config.source)
    tokenizer = corpus.load_tokenizer(folder)
    return corpus.pack_rows(documents, tokenizer, config.rows, config.seq_len, config.seed), documents


def describe_rows(rows: TokenRows, config: ValidationConfig) -> dict[str, Any]:
    num_rows, seq_len = rows.ids_TS.shape
    return {
        "source": config.source,
        "seq_len": seq_len,
        "seed": config.seed,
        "sha256": corpus.calibration_digest(rows.ids_TS),
        "rows": num_rows,
        "positions": num_rows * (seq_len - 1),
        "documents": len(torch.unique(rows.documents_TS[:, 1:])),
    }


def reference_tokenizer(reference: Reference) -> Path | None:
    """The folder whose tokenizer the reference is used with; None when neither adapter nor base has one."""
    adapter = Path(reference.adapter.location) if reference.adapter else None
    folder = tokenizer_folder(reference.source.folder, adapter)
    return folder if any((folder / name).is_file() for name in VOCABULARY_FILES) else None


@dataclass(kw_only=True)
class _Setup:
    """The models of one comparison, and the views that they share."""

    reference: Reference
    candidate: Candidate | None
    device: str
    base: Remembered
    merged: Checkpoint
    stored: Remembered | None
    changed: frozenset[str]
    rows_per_batch: int
    entrants: list[Entrant] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    runs: dict[str, str | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def enter(self, name: str, model: BlockModel, num_rows: int, rows_per_batch: int | None = None) -> None:
        batch = rows_per_batch or self.rows_per_batch
        self.entrants.append(Entrant(name=name, model=model, num_rows=num_rows, rows_per_batch=batch))

    def pair(self, name: str, reference: str, other: str) -> None:
        self.pairs.append(Pair(name=name, reference=reference, other=other))

    def forget(self) -> None:
        for view in (self.base, self.merged, self.stored):
            if isinstance(view, Remembered):
                view.forget()


def measure_fidelity(
    reference: Reference,
    candidate: Candidate | None,
    config: ValidationConfig,
    device: str,
    progress: Progress,
    observe: Observe | None = None,
) -> Fidelity:
    """Compares the candidate with the unmerged reference on held-out text, and audits its weights and tokenizer.

    Without a candidate only the controls are measured.

    Raises:
        CheckpointError: the candidate has another vocabulary or depth, or there is no tokenizer.
        NumericsError: NaN or infinity in a model.
    """
    own = reference_tokenizer(reference)
    folder = own or (candidate.source.folder if candidate else reference.source.folder)
    rows, documents = evaluation_rows(folder, config)
    check_vocabulary(rows.ids_TS, reference.merged, folder)
    findings: list[dict[str, Any]] = []
    if candidate is not None:
        check_alike(reference, candidate)
        findings = compare_tokenizers(own, candidate.source.folder, documents) if own else []
    setup = _set_up(reference, candidate, config, device)
    audit = None
    if candidate is not None and candidate.adapter is None:  # an unmerged adapter is not in the weights
        audit = StreamedAudit(reference, candidate, setup.base, setup.merged, setup.changed, device)
    prefix = setup.entrants[0].model.layers_name

    def after_block(index: int) -> None:
        if audit is not None:
            audit.block(f"{prefix}.{index}.")
        setup.forget()

    comparison = compare(setup.entrants, setup.pairs, rows, observe=observe, after_block=after_block, progress=progress)
    if audit is not None:
        audit.rest(setup.forget)
        findings += audit.findings()
    setup.forget()
    result = Fidelity(
        facts=_facts(comparison, rows, config, setup), findings=findings, pairs=comparison.pairs, rows=rows
    )
    if candidate is not None:
        _finish(result, setup, config, folder, progress)
    return result


def audit_all(reference: Reference, candidate: Candidate, device: str) -> list[dict[str, Any]]:
    """Findings of the weights alone, without running a model."""
    base = Remembered(reference.base)
    merged, changed = _merged(reference, base)
    audit = StreamedAudit(reference, candidate, base, merged, changed, device)
    audit.rest(base.forget)
    return audit.findings()


def _merged(reference: Reference, base: Remembered) -> tuple[Checkpoint, frozenset[str]]:
    """The merge over a shared base, and the names of the tensors that it changes."""
    if reference.adapter is None:
        return base, frozenset()
    view = merge(base, [reference.adapter])
    return view, view.changed


def _finish(result: Fidelity, setup: _Setup, config: ValidationConfig, folder: Path, progress: Progress) -> None:
    """Adds what is derived from the comparison, or comes after it."""
    result.models = (setup.entrants[0].model, setup.entrants[1].model)
    worst = min(block["sqnr_db"] for block in result.facts["blocks"])
    result.measured["block_sqnr_db_min"] = Measurement.exact(worst)
    if "base_without_adapter" in result.pairs:
        add_effect(result, result.pairs["base_without_adapter"])
    tokenizer = corpus.load_tokenizer(folder)
    result.facts["worst_tokens"] = worst_tokens(result.pairs["total"], result.rows, tokenizer)
    if config.prompts is not None:
        answers = compare_prompts(*result.models, tokenizer, config.prompts, config.new_tokens, progress)
        result.facts["prompts"] = answers
        low, high = answers["identical_interval_95"]
        share = answers["identical"] / answers["num_prompts"]
        result.measured["prompts_identical"] = Measurement(share, low, high)


def add_effect(result: Fidelity, base: PairStatistics) -> None:
    """Adds the adapter effect retained; ``base`` is the reference against the base without the adapter."""
    effect = effect_retained(result.pairs["total"], base)
    result.facts["adapter_effect_retained"] = effect
    low, high = effect["interval_95"]
    result.measured["adapter_effect_retained"] = Measurement(effect["value"], low, high, base.num_positions)


def _set_up(reference: Reference, candidate: Candidate | None, config: ValidationConfig, device: str) -> _Setup:
    keep = _fits(reference, candidate, device)
    base = Remembered(reference.base)
    merged, changed = _merged(reference, base)
    if reference.adapter is not None:
        merged = Remembered(merged)
    batch = max(1, (4096 if device == "cpu" else 16384) // config.seq_len)
    stored = Remembered(candidate.view) if candidate else None
    setup = _Setup(
        reference=reference,
        candidate=candidate,
        device=device,
        base=base,
        merged=merged,
        stored=stored,
        changed=changed,
        rows_per_batch=batch,
    )
    model, setup.runs["reference"] = reference_model(reference, base, device, keep)
    setup.enter("reference", model, config.rows)
    if candidate is not None and stored is not None:
        other, setup.runs["candidate"] = candidate_model(candidate, stored, device, keep, config.engine)
        setup.enter("candidate", other, config.rows)
        setup.pair("total", "reference", "candidate")
    controls = control_rows(config)
    if reference.adapter is not None:
        setup.enter("merged", streamed(merged, None, None, device), controls)
        setup.pair("merge", "reference", "merged")
        if candidate is not None:
            setup.pair("requantization", "merged", "candidate")
        if reference.resizes_vocabulary:
            setup.notes.append("the adapter resizes the vocabulary of the base: effect retained not measured")
        else:
            setup.enter("base", streamed(base, None, None, device), controls)
            setup.pair("base_without_adapter", "reference", "base")
    setup.enter("floor", model, min(config.rows, max(LEAST_FLOOR_ROWS, controls // 2)), 1 if batch > 1 else 2)
    setup.pair("floor", "reference", "floor")
    return setup


def _fits(reference: Reference, candidate: Candidate | None, device: str) -> bool:
    """Whether both models are small enough to stay in memory for the passes that come after the comparison."""
    total = 0
    for view in (reference.base, *([candidate.view] if candidate else [])):
        width = config_dtype(view.config).itemsize
        total += sum(spec.num_bytes // spec.dtype.itemsize * width for spec in view.specs().values())
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        return total < min(_KEPT_BYTES, free // 4)
    return total < _KEPT_BYTES


def _facts(comparison: Comparison, rows: TokenRows, config: ValidationConfig, setup: _Setup) -> dict[str, Any]:
    summaries = {name: pair.summary() for name, pair in comparison.pairs.items()}
    perplexity = next(iter(summaries.values()))["reference_perplexity"]
    return empty_facts(rows, config) | {
        "reference": {"runs": setup.runs["reference"], "perplexity": perplexity, "cache": None},
        "candidate": {"runs": setup.runs["candidate"]} if setup.candidate else None,
        **summaries,
        "blocks": [block.as_dict() for block in comparison.blocks],
        "notes": setup.notes,
    }


def empty_facts(rows: TokenRows, config: ValidationConfig) -> dict[str, Any]:
    """The ``fidelity`` part of a report before anything is measured."""
    names = ("total", "merge", "requantization", "base_without_adapter", "floor", "adapter_effect_retained")
    return {
        "evaluation": describe_rows(rows, config),
        "reference": None,
        "candidate": None,
        **dict.fromkeys(names),
        "blocks": [],
        "attribution": None,
        "worst_tokens": [],
        "prompts": None,
        "notes": [],
    }


def check_vocabulary(ids_TS: torch.Tensor, view: Checkpoint, tokenizer: Path) -> None:
    """Refuses a tokenizer that makes tokens which the model's embedding does not have."""
    size = view.config.get("vocab_size")
    if isinstance(size, int) and int(ids_TS.max()) >= size:
        raise CheckpointError(
            f"{tokenizer}: its tokenizer gives token {int(ids_TS.max())}, {view.location} has {size}; "
            "the tokenizer is from another model, or its new tokens were never trained"
        )


def check_alike(reference: Reference, candidate: Candidate) -> None:
    """Refuses a pair that cannot be two versions of one model.

    Raises:
        CheckpointError: another depth, width or vocabulary.
    """
    # As transformers reads them: families have names of their own for these, composite models a part for text.
    expected, found = text_config(reference.merged), text_config(candidate.view)
    for key in ("num_hidden_layers", "vocab_size", "hidden_size"):
        wanted, has = getattr(expected, key, None), getattr(found, key, None)
        if wanted != has:
            raise CheckpointError(
                f"{candidate.source.location}: config.json has {key} {has}, the reference "
                f"({reference.source.location}, with its adapter) has {wanted}; they are different models"
            )
