"""After a rehearsal there is nothing left to compile; and it has no say in what is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qconv import judging, own_process, pipeline, rehearsal
from qconv.checkpoint import open_checkpoint
from qconv.config import MergeJob, OutputConfig, ValidateJob, ValidationConfig
from qconv.inputs import load_candidate, load_reference
from qconv.quantization_config import QuantizationConfig

TARGETS = ("awq", "w4a16", "fp8")


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory, tiny_nf4: Path, tiny_adapter: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rehearsed")
    outputs = tuple(
        OutputConfig(out=folder / target, quantization=QuantizationConfig(target=target, algorithm=algorithm))
        for target, algorithm in zip(TARGETS, ("rtn", "rtn", "fp8"), strict=True)
    )
    pipeline.run(
        MergeJob(base=str(tiny_nf4), adapter=str(tiny_adapter), outputs=outputs, device="cpu", validation=None)
    )
    return {target: folder / target for target in TARGETS}


def job(base: Path, adapter: Path, candidate: Path, device: str) -> ValidateJob:
    validation = ValidationConfig(tokens=1024, seq_len=128)
    return ValidateJob(
        reference=str(base), adapter=str(adapter), candidate=str(candidate), validation=validation, device=device
    )


@pytest.mark.parametrize("target", TARGETS)
def test_it_changes_nothing(
    target: str, candidates: dict[str, Path], tiny_nf4: Path, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where it works nor where it fails."""
    work = job(tiny_nf4, tiny_adapter, candidates[target], "cpu")
    wanted = judging.validate(work).document
    seen: list[str] = []

    def rehearsed(reference: Any, candidate: Any, device: str) -> None:
        rehearsal.rehearse(reference, candidate, device)
        seen.append(device)

    monkeypatch.setattr("qconv.fidelity.rehearse_while_importing", rehearsed)
    found = judging.validate(work).document
    assert seen == ["cpu"]
    for part in ("total", "merge", "requantization", "blocks"):
        assert found["fidelity"][part] == wanted["fidelity"][part]
    assert found["findings"] == wanted["findings"]


def test_only_on_a_gpu_that_waits(tiny_nf4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def fails(reference: Any, candidate: Any, device: str) -> None:
        calls.append(device)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(rehearsal, "rehearse", fails)
    anything: Any = object()
    rehearsal.rehearse_while_importing(anything, anything, "cuda")  # nothing is being imported
    monkeypatch.setattr(rehearsal, "is_importing", lambda: True)
    rehearsal.rehearse_while_importing(anything, anything, "cpu")
    assert calls == []
    rehearsal.rehearse_while_importing(anything, anything, "cuda")  # and says nothing
    assert calls == ["cuda"]
    assert not own_process.is_importing()


def compiled() -> dict[str, int]:
    """How many variants of each kernel there are in this process."""
    from qconv.validate import audit_kernels, distribution_kernels

    kernels = {
        f"{module.__name__}.{name}": value
        for module in (audit_kernels, distribution_kernels)
        for name, value in vars(module).items()
        if hasattr(value, "device_caches")
    }
    return {name: sum(len(entry[0]) for entry in kernel.device_caches.values()) for name, kernel in kernels.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("target", ["awq", "w4a16"])
def test_on_a_gpu_nothing_is_left_to_compile(
    target: str, candidates: dict[str, Path], tiny_nf4: Path, tiny_adapter: Path
) -> None:
    reference = load_reference(open_checkpoint(str(tiny_nf4)), str(tiny_adapter), None)
    rehearsal.rehearse(reference, load_candidate(str(candidates[target]), None), "cuda")
    before = compiled()
    assert sum(before.values()) >= 5
    judging.validate(job(tiny_nf4, tiny_adapter, candidates[target], "cuda"))
    assert compiled() == before
