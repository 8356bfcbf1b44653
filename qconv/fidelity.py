"""How far a candidate is from the reference, measured and explained.

Reference = base + UNMERGED adapter, as training saw it. Candidate = the stored bytes, read back.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qconv import corpus
from qconv.audits import StreamedAudit
from qconv.config import ValidationConfig
from qconv.corpus import TokenRows
from qconv.errors import NumericsError
from qconv.evaluation import check_alike, check_vocabulary, empty_facts, evaluation_rows, reference_tokenizer
from qconv.finite import putting_off
from qconv.layout import config_dtype
from qconv.lineup import Lineup, Views, line_up
from qconv.progress import Progress
from qconv.rehearsal import rehearse_while_importing
from qconv.runners import Candidate, Reference
from qconv.streaming import BlockModel
from qconv.timeline import TIMELINE
from qconv.validate.attribution import attribute
from qconv.validate.compare import CANDIDATE, REFERENCE, Comparison, Observe, compare
from qconv.validate.gates import Measurement
from qconv.validate.prompts import compare_prompts
from qconv.validate.statistics import PairStatistics, effect_retained
from qconv.validate.tokenizers import compare_tokenizers
from qconv.validate.worst import worst_tokens

_ATTRIBUTED_TOKENS = 1024
_PREFIXES = {"merge": "merge.", "requantization": "requantization.", "total": ""}


@dataclass(kw_only=True)
class Fidelity:
    """What was measured.

    Attributes:
        facts: the ``fidelity`` part of a report.
        findings: what the audits of weights and tokenizer found.
        pairs: statistics by name: total, merge, requantization, base_without_adapter, floor.
        rows: the evaluated tokens.
        precision: epsilon of the dtype that the reference computes in.
        is_audited: whether the candidate's weights were compared with what the merge gives.
    """

    facts: dict[str, Any]
    findings: list[dict[str, Any]]
    pairs: Mapping[str, PairStatistics]
    rows: TokenRows
    precision: float
    is_audited: bool = True
    measured: dict[str, Measurement] = field(default_factory=dict)
    models: tuple[BlockModel, BlockModel] | None = None

    def measurement(self, metric: str) -> Measurement | None:
        """One gateable metric, or None when this run did not measure it."""
        if metric in self.measured:
            return self.measured[metric]
        for name, prefix in _PREFIXES.items():
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
        try:
            found = attribute(reference, candidate, self.rows.ids_TS[:num_rows], progress)
        except (NumericsError, torch.OutOfMemoryError) as error:  # an explanation must not cost the measurement
            self.facts["notes"].append(f"no attribution: {type(error).__name__}: {error}")
            return
        self.facts["attribution"] = found.as_dict()


def measure_pair(pair: PairStatistics, metric: str) -> Measurement | None:
    try:
        value, (low, high) = pair.measure(metric)
    except KeyError:
        return None
    return Measurement(value=value, low=low, high=high, tokens=pair.num_positions)


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
    if candidate is not None:
        rehearse_while_importing(reference, candidate, device)
    own = reference_tokenizer(reference)
    folder = own or (candidate.source.folder if candidate else reference.source.folder)
    with TIMELINE.stage("tokenizers"):
        rows, documents = evaluation_rows(folder, config)
        check_vocabulary(rows.ids_TS, reference.merged, folder)
    with ThreadPoolExecutor(1, "qconv-tokenizers") as pool:  # beside the models, which are loaded meanwhile
        judged, is_file = None, candidate is not None and candidate.source.folder.is_file()
        if candidate is not None:
            check_alike(reference, candidate)
            if own is not None and not is_file:
                judged = pool.submit(compare_tokenizers, own, candidate.source.folder, documents)
        lineup = line_up(reference, candidate, config, device)
        if is_file:
            lineup.notes.append("the tokenizer inside a GGUF file was not compared: no tokenizer lies beside it")
        comparison, found = _compare(lineup, rows, observe, progress)
        findings = judged.result() if judged is not None else []
    with TIMELINE.stage("statistics"):
        facts = _facts(comparison, rows, config, lineup)
    result = Fidelity(
        facts=facts,
        findings=findings + (found or []),
        pairs=comparison.pairs,
        rows=rows,
        precision=torch.finfo(config_dtype(reference.base.config)).eps,
        is_audited=found is not None,
    )
    if candidate is not None:
        result.models = (lineup.entrants[0].model, lineup.decoded or lineup.entrants[1].model)
        _finish(result, config, folder, progress)
    return result


def _compare(
    lineup: Lineup, rows: TokenRows, observe: Observe | None, progress: Progress
) -> tuple[Comparison, list[dict[str, Any]] | None]:
    """Runs all models, and audits the candidate's weights beside them; findings are None where they were not."""
    if lineup.candidate is None:
        return _compare_beside(None, lineup, rows, observe, progress)
    if lineup.candidate.adapter is not None:
        lineup.notes.append("the candidate's weights were not audited: it is served with an unmerged adapter")
        return _compare_beside(None, lineup, rows, observe, progress)
    with StreamedAudit(lineup.reference, lineup.candidate, lineup.views, lineup.device) as audit:
        return _compare_beside(audit, lineup, rows, observe, progress)


def _compare_beside(
    audit: StreamedAudit | None, lineup: Lineup, rows: TokenRows, observe: Observe | None, progress: Progress
) -> tuple[Comparison, list[dict[str, Any]] | None]:
    def after_embedding() -> None:
        lineup.read_ahead(0)
        if audit is not None:
            with TIMELINE.stage("audit"):
                audit.compare_embedding()
        lineup.tidy()

    def after_block(index: int) -> None:
        lineup.read_ahead(index + 1)
        if audit is not None:
            with TIMELINE.stage("audit"):
                audit.block(f"{lineup.layers_name}.{index}.")
        lineup.views.forget()
        if index + 1 == lineup.entrants[0].model.num_blocks:
            lineup.tidy()

    found = None
    try:
        with putting_off():
            comparison = compare(
                lineup.entrants,
                lineup.pairs,
                rows,
                observe=observe,
                after_embedding=after_embedding,
                before_blocks=lineup.let_embedding_go,
                after_block=after_block,
                progress=progress,
            )
        if audit is not None:
            with TIMELINE.stage("audit"):
                audit.rest()
            with TIMELINE.stage("audit findings"):
                found = audit.findings()
    except NumericsError as error:
        raise _with_culprit(error, lineup, audit) from error
    finally:
        lineup.end()
    return comparison, found


def _with_culprit(error: NumericsError, lineup: Lineup, audit: StreamedAudit | None) -> NumericsError:
    """The same error, naming the stored tensors that are not finite, where there are such."""
    if audit is None or lineup.candidate is None:
        return error
    with suppress(NumericsError):
        audit.rest()
        for finding in audit.findings():
            if finding["code"] == "not-finite":
                return NumericsError(f"{lineup.candidate.source.location}: {finding['message']} ({error})")
    return error


def audit_all(reference: Reference, candidate: Candidate, device: str) -> list[dict[str, Any]]:
    """Findings of the weights alone, without running a model."""
    with StreamedAudit(reference, candidate, Views.of(reference, candidate, device), device) as audit:
        audit.rest()
        return audit.findings()


def _finish(result: Fidelity, config: ValidationConfig, folder: Path, progress: Progress) -> None:
    """Adds what is derived from the comparison, or comes after it."""
    if result.facts["blocks"]:  # an engine that runs the candidate whole shows none
        worst = min(block["sqnr_db"] for block in result.facts["blocks"])
        result.measured["block_sqnr_db_min"] = Measurement.exact(worst)
    if "base_without_adapter" in result.pairs:
        add_effect(result, result.pairs["base_without_adapter"])
    tokenizer = corpus.load_tokenizer(folder)
    result.facts["worst_tokens"] = worst_tokens(result.pairs["total"], result.rows, tokenizer)
    if config.prompts is not None and result.models is not None:
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


def _facts(comparison: Comparison, rows: TokenRows, config: ValidationConfig, lineup: Lineup) -> dict[str, Any]:
    summaries = {name: pair.summary() for name, pair in comparison.pairs.items()}
    perplexity = next(iter(summaries.values()))["reference_perplexity"]
    return empty_facts(rows, config) | {
        "reference": {"runs": lineup.runs[REFERENCE], "perplexity": perplexity, "cache": None},
        "candidate": {"runs": lineup.runs[CANDIDATE], **lineup.candidate.cache_facts()} if lineup.candidate else None,
        **summaries,
        "blocks": [block.as_dict() for block in comparison.blocks],
        "notes": lineup.notes + (lineup.candidate.cache_notes() if lineup.candidate else []),
    }
