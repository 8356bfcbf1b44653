"""Reading an output back from its bytes, comparing it with base + unmerged adapter, and judging it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qconv.account import subject
from qconv.cached_fidelity import measure_cached, write_cached
from qconv.checkpoint import open_checkpoint
from qconv.config import MergeJob, OutputConfig, ValidateJob, ValidationConfig
from qconv.evaluation import reference_tokenizer
from qconv.fidelity import Fidelity, measure_fidelity
from qconv.gating import check_rules, rules_for
from qconv.inputs import load_candidate, load_reference, resolve_device
from qconv.outcome import Outcome, Provenance, conclude, make_report_folder, run_tasks
from qconv.progress import QUIET, Progress
from qconv.report.document import write_reports
from qconv.runners import Candidate, Reference, candidate_model, reference_model
from qconv.validate.fingerprint import Digests


def validate(job: ValidateJob, progress: Progress = QUIET) -> Outcome:
    """Compares an existing candidate folder with base + unmerged adapter, or with a cache of their outputs.

    Raises:
        QconvError: any of its kinds; see `errors`.
    """
    device = resolve_device(job.device)
    config = job.validation
    make_report_folder(job.report_dir)
    reference = None
    if job.reference is not None:
        reference = load_reference(open_checkpoint(job.reference), job.adapter, job.trained_on, options=job.options)
        check_rules(reference, config, reference.adapter is not None)
    candidate = None if job.candidate is None else load_candidate(job.candidate, job.candidate_adapter)
    with Provenance(hashed(reference) | {"candidate": candidate.source.folder if candidate else None}) as digests:
        fidelity = _measure(job, reference, candidate, device, progress, digests.of)
        tasks = _tasks(reference, candidate, fidelity, config, device, progress) if reference and candidate else []
        has_merge = fidelity.facts["merge"] is not None
        has_findings = fidelity.is_audited or any(finding["severity"] == "error" for finding in fidelity.findings)
        document = conclude(
            "validate",
            {
                "reference": job.reference or f"cached in {job.reference_cache}",
                "adapter": job.adapter,
                "candidate": job.candidate,
                "candidate_adapter": job.candidate_adapter,
                "target": candidate.view.kind if candidate else None,
            },
            device,
            config=config,
            fidelity=fidelity,
            rules=rules_for(candidate, has_merge, config, has_findings) if candidate else (),
            provenance=digests.result(),
            tasks=tasks,
            progress=progress,
        )
    if job.report_dir is not None:
        write_reports(job.report_dir, document)
    return Outcome(document=document)


def judge_output(
    job: MergeJob,
    output: OutputConfig,
    reference: Reference,
    stored: Path,
    facts: Mapping[str, Any],
    digests: Provenance,
    device: str,
    progress: Progress,
) -> dict[str, Any]:
    """The report on what was just written into the folder ``stored``."""
    command = "merge" if job.adapters else "quantize" if output.is_quantized else "convert"
    config = job.validation
    if config is None:
        return conclude(
            command, subject(job, output), device, stages=facts, provenance=digests.result(), progress=progress
        )
    name = f"{output.out} " if len(job.outputs) > 1 else ""
    progress.say(f"validating {name}on {config.tokens} tokens of {config.source}")
    candidate = Candidate.of(open_checkpoint(stored))
    fidelity = measure_fidelity(reference, candidate, config, device, progress)
    return conclude(
        command,
        subject(job, output),
        device,
        config=config,
        fidelity=fidelity,
        rules=rules_for(candidate, reference.adapter is not None, config),
        stages=facts,
        provenance=digests.result(),
        tasks=_tasks(reference, candidate, fidelity, config, device, progress),
        progress=progress,
    )


def _measure(
    job: ValidateJob,
    reference: Reference | None,
    candidate: Candidate | None,
    device: str,
    progress: Progress,
    digests: Digests,
) -> Fidelity:
    cache, config = job.reference_cache, job.validation
    if cache is None:
        assert reference is not None  # the job checked it
        assert candidate is not None
        return measure_fidelity(reference, candidate, config, device, progress)
    if reference is not None and not cache.exists():
        return write_cached(cache, reference, candidate, config, device, progress, digests)
    return measure_cached(cache, reference, candidate, config, device, progress, digests)


def _tasks(
    reference: Reference,
    candidate: Candidate,
    fidelity: Fidelity,
    config: ValidationConfig,
    device: str,
    progress: Progress,
) -> list[dict[str, Any]]:
    ready = fidelity.models  # the same models that were compared; none when the reference came from a cache
    models = {
        "reference": lambda: ready[0] if ready else reference_model(reference, reference.base, device, False)[0],
        "candidate": lambda: (
            ready[1] if ready else candidate_model(candidate, candidate.view, device, False, config.engine)[0]
        ),
    }
    tokenizer = reference_tokenizer(reference) or candidate.source.folder
    return run_tasks(models, tokenizer, config, device, progress)


def hashed(reference: Reference | None) -> dict[str, Path | None]:
    """The folders of a reference whose files go into the report as digests, by their names there."""
    if reference is None:
        return {"reference": None, "adapter": None}
    folders = reference.adapter_folders
    names = [f"adapter_{number}" for number in range(1, len(folders) + 1)] if len(folders) > 1 else ["adapter"]
    return {"reference": reference.source.folder, **dict(zip(names, folders, strict=False))}
