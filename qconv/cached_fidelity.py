"""Validation against stored distributions of the reference: written in one run, used where the reference is not.

The cache holds the tokens too, so a candidate is judged on exactly the same ones. What it does not hold, it does
not let pass: hidden states are not compared block by block, and the controls are those of the run that wrote it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qconv import __version__, corpus
from qconv.config import ValidationConfig
from qconv.corpus import TokenRows
from qconv.errors import CheckpointError, UsageError
from qconv.evaluation import empty_facts, evaluation_rows, reference_tokenizer
from qconv.fidelity import Fidelity, add_effect, audit_all, measure_fidelity
from qconv.layout import config_dtype
from qconv.lineup import rows_per_batch
from qconv.progress import Progress
from qconv.report.document import finite
from qconv.runners import Candidate, Reference, candidate_model
from qconv.skeleton import text_config
from qconv.validate.cache import CacheWriter, ReferenceCache
from qconv.validate.cached_row import loss_against
from qconv.validate.compare import Entrant, run_candidate
from qconv.validate.distribution import Distribution
from qconv.validate.fingerprint import Digests, candidate_fingerprint, check_fingerprint, fingerprint
from qconv.validate.gates import Measurement
from qconv.validate.logit_chunks import position_chunks
from qconv.validate.statistics import PairStatistics
from qconv.validate.worst import worst_tokens

_CONTROLS = ("merge", "base_without_adapter", "floor")
"""Pairs of the writing run that do not depend on the candidate."""


def write_cached(
    path: Path,
    reference: Reference,
    candidate: Candidate | None,
    config: ValidationConfig,
    device: str,
    progress: Progress,
    digests: Digests,
) -> Fidelity:
    """Runs the reference, its controls and the candidate, when there is one, and stores what the reference predicts.

    Args:
        digests: of the reference's and the adapter's files.

    Raises:
        CheckpointError: the cache cannot be written, or the reference has no tokenizer to know it by.
    """
    check_place(path, reference)
    writer = CacheWriter()
    losses: list[tuple[Tensor, Tensor, Tensor]] = []
    target_logps: list[Tensor] = []

    def observe(distributions: Mapping[str, Distribution], targets_T: Tensor) -> None:
        p = distributions["reference"]
        row = writer.add(p.log_probabilities(), targets_T)
        target_logps.append(row.target_logp_T.cpu())
        q = distributions.get("candidate") or distributions.get("base")
        if q is not None:
            kept = row.statistics(q.log_probabilities())
            losses.append((p.divergences(q)[0].cpu(), kept["kl"].cpu(), kept["kl_lower_bound"].cpu()))

    fidelity = measure_fidelity(reference, candidate, config, device, progress, observe)
    rows = fidelity.rows
    # Without a candidate the pairs have the first rows alone.
    fidelity.facts["reference"]["perplexity"] = float((-torch.cat(target_logps).double().mean()).exp())
    base = fidelity.pairs.get("base_without_adapter")
    header = {
        "fingerprint": _fingerprint(reference, rows, config, digests),
        "tool": f"qconv {__version__}",
        "reference": fidelity.facts["reference"],
        "evaluation": fidelity.facts["evaluation"],
        "controls": {name: finite(fidelity.facts[name]) for name in _CONTROLS},
        "base_kl": None if base is None else [float(f"{kl:.5g}") for kl in base["kl"].tolist()],
    }
    loss = loss_against(*(torch.cat(parts) for parts in zip(*losses, strict=True))) if losses else None
    storage = writer.finish(path, rows.ids_TS, rows.documents_TS, header, loss)
    fidelity.facts["reference"]["cache"] = {"file": str(path), "written": True, **storage}
    for line in _describe_storage(path, storage):
        progress.say(line)
    return fidelity


def check_place(path: Path, reference: Reference) -> None:
    """Raises before the work what would be raised after it: CheckpointErrors of a cache that is to be written."""
    if not path.parent.is_dir():
        raise CheckpointError(
            f"{path}: there is no folder {path.parent} to write the reference cache in; make it first"
        )
    if not os.access(path.parent, os.W_OK):
        raise CheckpointError(f"{path}: the folder is not writable; the reference cache cannot be written there")
    if reference_tokenizer(reference) is None:
        raise CheckpointError(
            f"{reference.source.location}: has no tokenizer, and a reference cache is known by its reference's; "
            "copy the tokenizer files of the base model there"
        )


def _describe_storage(path: Path, storage: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"cached the reference in {path}: {storage['bytes_per_position']:.0f} bytes per position, "
        f"{storage['tail_mass']['mean']:.1%} of its probability on tokens that are sampled, not stored"
    )
    loss = storage["loss"]
    if loss is not None:
        yield (
            f"what that loses: mean KL {loss['kl_mean_cached']:.5f} from the cache, {loss['kl_mean_exact']:.5f} "
            f"exactly, on {loss['positions']} positions"
        )


def open_cache(
    path: Path,
    reference: Reference | None,
    candidate: Candidate | None,
    config: ValidationConfig,
    digests: Digests | None = None,
) -> ReferenceCache:
    """A cache that exists, and that the candidate can be judged by.

    Args:
        digests: of the reference's and the adapter's files; None = these are hashed here.

    Raises:
        CheckpointError: the cache is damaged, or of another model, tokenizer, template or text.
        UsageError: something was asked for that the cache cannot tell, or there is no candidate.
    """
    if candidate is None:
        raise UsageError(f"{path}: exists already; add --candidate to use it, or remove it to write it anew")
    if config.prompts is not None or config.attribution == "always":
        raise UsageError(
            "--prompts and --attribution always need the reference itself: give --reference, without --reference-cache"
        )
    cache = ReferenceCache.open(path)
    vocab_size = getattr(text_config(candidate.view), "vocab_size", None)
    if vocab_size != cache.vocab_size:
        raise CheckpointError(
            f"{candidate.source.location}: has a vocabulary of {vocab_size}, the reference in {path} "
            f"{cache.vocab_size}; they are different models"
        )
    _check_same(cache, reference, candidate, config, digests)
    return cache


def measure_cached(
    path: Path,
    reference: Reference | None,
    candidate: Candidate | None,
    config: ValidationConfig,
    device: str,
    progress: Progress,
    digests: Digests,
) -> Fidelity:
    """Judges the candidate by the stored distributions.

    Args:
        digests: of the reference's and the adapter's files.

    Raises:
        CheckpointError: the cache is damaged, or of another model, tokenizer, template or text.
        UsageError: something was asked for that the cache cannot tell.
    """
    cache = open_cache(path, reference, candidate, config, digests)
    assert candidate is not None  # `open_cache` refuses to judge nothing
    rows = TokenRows(cache.ids_TS, cache.documents_TS)
    model, runs = candidate_model(candidate, candidate.view, device, False, config.engine)
    entrant = Entrant(
        name="candidate", model=model, num_rows=len(rows.ids_TS), rows_per_batch=rows_per_batch(config, device)
    )
    pair = PairStatistics("total")
    lower_bounds: list[Tensor] = []

    def visit(row: int, logits_TV: Tensor) -> None:
        stored = cache.row(row)
        for part in position_chunks(logits_TV):
            q = Distribution(logits_TV[part], "candidate")
            columns = stored[part].statistics(q.log_probabilities())
            lower_bounds.append(columns["kl_lower_bound"].cpu())
            pair.add(columns, rows.documents_TS[row, 1:][part], row)

    run_candidate(entrant, rows, visit, progress)
    summary = pair.summary()
    facts = empty_facts(rows, config) | {"total": summary, "candidate": {"runs": runs, **candidate.cache_facts()}}
    facts |= cache.header.get("controls", {})
    facts["evaluation"] = cache.header.get("evaluation", facts["evaluation"])
    facts["reference"] = {
        **cache.header["reference"],
        "perplexity": summary["reference_perplexity"],
        "cache": {
            "file": str(path),
            "written": False,
            "kl_is_lower_bound": cache.is_lower_bound,
            "kl_lower_bound": float(torch.cat(lower_bounds).double().mean()),
            **cache.storage,
        },
    }
    is_audited = reference is not None and candidate.adapter is None  # an unmerged adapter is not in the weights
    facts["notes"] = _notes(cache, candidate, is_audited) + candidate.cache_notes()
    tokenizer = corpus.load_tokenizer(candidate.source.folder)
    facts["worst_tokens"] = worst_tokens(pair, rows, tokenizer)
    result = CachedFidelity(
        facts=facts,
        findings=[],
        pairs={"total": pair},
        rows=rows,
        precision=torch.finfo(getattr(torch, cache.fingerprint["evaluation"]["dtype"])).eps,
        is_audited=is_audited,
    )
    if reference is not None and is_audited:
        result.findings += audit_all(reference, candidate, device)
    if cache.header.get("base_kl"):
        add_effect(result, _stored_base(cache))
    return result


def _stored_base(cache: ReferenceCache) -> PairStatistics:
    """The KL of the base without the adapter, on the rows where the writing run measured it."""
    pair = PairStatistics("base_without_adapter")
    per_row = cache.ids_TS.shape[1] - 1
    for row, kl_T in enumerate(torch.split(torch.tensor(cache.header["base_kl"]), per_row)):
        pair.add({"kl": kl_T}, cache.documents_TS[row, 1:], row)
    return pair


class CachedFidelity(Fidelity):
    """Measured against a cache: the controls are numbers of the run that wrote it."""

    def measurement(self, metric: str) -> Measurement | None:
        merge = self.facts.get("merge")
        if not merge or not metric.startswith("merge."):
            return super().measurement(metric)
        # A matter of base and adapter alone, so it is what this run would have measured.
        value, interval = _stored(merge, metric.removeprefix("merge."))
        if value is None or interval is None:  # percentiles have no interval in a summary
            return None
        low, high = interval
        return Measurement(
            value, -inf if low is None else low, inf if high is None else high, tokens=merge["positions"]
        )

    def floor(self, metric: str) -> Measurement | None:
        floor = self.facts.get("floor")
        value, _ = _stored(floor, metric.split(".")[-1]) if floor else (None, None)
        return None if value is None else Measurement.exact(value)


def _stored(pair: Mapping[str, Any], name: str) -> tuple[float | None, Sequence[float | None] | None]:
    """Value and interval, as far as they are there, of a pair that was summarised by the run that wrote the cache."""
    if name == "probability_difference_rms":
        return pair["probability_difference"]["rms"], None
    direction, _, statistic = name.rpartition("kl_")
    if statistic != name and direction in ("", "reverse_"):
        summary = pair[f"{direction}kl"]
        value = summary.get(statistic)
        return value, {"mean": summary["interval_95"], "max": (value, value)}.get(statistic)
    found = pair.get(name)
    return (found["value"], found["interval_95"]) if isinstance(found, Mapping) and "value" in found else (None, None)


def _notes(cache: ReferenceCache, candidate: Candidate, is_audited: bool) -> list[str]:
    notes = [
        "the reference comes from a cache: KL is estimated from its most probable tokens and a sample of the others; "
        "hidden states and attribution need the reference itself"
    ]
    if not is_audited:
        why = "that needs --reference" if candidate.adapter is None else "it is served with an unmerged adapter"
        notes.append(f"the candidate's weights were not audited: {why}")
    if cache.is_lower_bound:
        notes.append("the cache holds no sample of the improbable tokens: every KL is a lower bound")
    return notes


def _check_same(
    cache: ReferenceCache,
    reference: Reference | None,
    candidate: Candidate,
    config: ValidationConfig,
    digests: Digests | None,
) -> None:
    """The cache must be of this reference, or, where there is none, of the candidate's tokenizer and template."""
    rows = TokenRows(cache.ids_TS, cache.documents_TS)
    if reference is not None:
        folder = reference_tokenizer(reference) or candidate.source.folder
        own_rows, _ = evaluation_rows(folder, config)
        check_fingerprint(cache.fingerprint, _fingerprint(reference, own_rows, config, digests))
    own_rows, _ = evaluation_rows(candidate.source.folder, config)
    found = candidate_fingerprint(candidate.source.folder, _evaluation(None, config), own_rows.ids_TS)
    found["evaluation"] = {k: v for k, v in found["evaluation"].items() if k != "dtype"}
    expected = dict(cache.fingerprint)
    expected["evaluation"] = {k: v for k, v in expected["evaluation"].items() if k != "dtype"}
    check_fingerprint(expected, found)
    if len(rows.ids_TS) != config.rows:
        raise CheckpointError(f"{cache.path}: holds {len(rows.ids_TS)} rows, {config.rows} were asked for")


def _fingerprint(
    reference: Reference, rows: TokenRows, config: ValidationConfig, digests: Digests | None
) -> dict[str, Any]:
    adapter = Path(reference.adapter.location) if reference.adapter else None
    tokenizer = reference_tokenizer(reference) or reference.source.folder
    evaluation = _evaluation(reference, config)
    return fingerprint(reference.source.folder, adapter, tokenizer, evaluation, rows.ids_TS, digests)


def _evaluation(reference: Reference | None, config: ValidationConfig) -> dict[str, Any]:
    evaluation: dict[str, Any] = {"source": config.source, "seq_len": config.seq_len, "seed": config.seed}
    if reference is not None:
        evaluation["dtype"] = str(config_dtype(reference.base.config)).removeprefix("torch.")
        evaluation["trained_on"] = reference.kind
    return evaluation
