"""The estimate of ``qconv validate``, after the checks that it makes before its work."""

from __future__ import annotations

from dataclasses import replace

import torch

from qconv.cached_fidelity import check_place, open_cache
from qconv.checkpoint import open_checkpoint
from qconv.config import ValidateJob, ValidationConfig
from qconv.disk_room import rooms_for
from qconv.estimate import Estimate, Stage
from qconv.estimate_compare import comparison_stage, decompositions
from qconv.estimate_machine import file_bytes, machine_of, notes_of, tokenizer_bytes, usable_on_gpu
from qconv.estimate_memory import process
from qconv.evaluation import check_alike, check_vocabulary, evaluation_rows, reference_tokenizer
from qconv.gating import check_rules
from qconv.inputs import load_candidate, load_reference
from qconv.layout import config_dtype
from qconv.outcome import check_report_folder
from qconv.runners import Candidate, Reference, streamed

CACHE_BYTES = 588  # for a position; `validate/cache.py` with its defaults


def estimate_validation(job: ValidateJob, device: str) -> Estimate:
    """What a validation takes.

    Raises:
        QconvError: what the validation itself would raise before its work.
    """
    config, cache = job.validation, job.reference_cache
    check_report_folder(job.report_dir)
    reference = None
    if job.reference is not None:
        reference = load_reference(open_checkpoint(job.reference), job.adapter, job.trained_on, options=job.options)
        check_rules(reference, config, reference.adapter is not None)
    candidate = None if job.candidate is None else load_candidate(job.candidate, job.candidate_adapter)
    written: dict[str, int] = {}
    if cache is not None and (reference is None or cache.exists()):
        open_cache(cache, reference, candidate, config)
        assert candidate is not None  # `open_cache` refuses to judge nothing
        reference = Reference(source=candidate.source, base=candidate.view, adapter=None, kind="16bit")
        folder, candidate = candidate.source.folder, None
    else:
        assert reference is not None  # the job checked it
        if cache is not None:
            check_place(cache, reference)
            written = {str(cache): CACHE_BYTES * config.rows * (config.seq_len - 1)}
        folder = reference_tokenizer(reference) or (candidate or reference).source.folder
        _check_comparison(reference, candidate, config, device)
    stage = _stage(reference, candidate, config, device, sum(written.values()))
    return Estimate(
        command="validate",
        device=device,
        stages=[Stage(name="prepare", units={"start running": 1.0}), stage],
        process=process(True, 2 * tokenizer_bytes(folder), device.startswith("cuda")),  # the candidate has one, too
        rooms=[] if cache is None or not written else rooms_for({cache: sum(written.values())}),
        machine=machine_of(device),
        cores=torch.get_num_threads(),
        gpu_usable=usable_on_gpu(device),
        notes=notes_of(device),
    )


def _check_comparison(reference: Reference, candidate: Candidate | None, config: ValidationConfig, device: str) -> None:
    """What `measure_fidelity` refuses before it runs anything."""
    folder = reference_tokenizer(reference) or (candidate or reference).source.folder
    rows, _ = evaluation_rows(folder, config)
    check_vocabulary(rows.ids_TS, reference.merged, folder)
    streamed(reference.base, reference.adapter, None, "cpu")
    if candidate is not None:
        check_alike(reference, candidate)
        streamed(candidate.view, candidate.adapter, None, "cpu")


def _stage(
    reference: Reference, candidate: Candidate | None, config: ValidationConfig, device: str, written: int
) -> Stage:
    stage = comparison_stage(
        "validate",
        reference,
        candidate_specs=None if candidate is None else candidate.source.specs(),
        candidate_dtype=config_dtype((candidate.view if candidate else reference.base).config),
        config=config,
        device=device,
        merges=reference.adapter is not None,
        candidate_bytes=0 if candidate is None else file_bytes(candidate.source),
    )
    return replace(stage, writes=written, units={**stage.units, **decompositions(reference, looks_for_intruders=True)})
