"""What a run ends with: the report document, judged, and where it lies."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qconv import __version__, corpus
from qconv.account import environment
from qconv.config import ValidationConfig
from qconv.errors import CheckpointError
from qconv.fidelity import Fidelity
from qconv.gate_rules import Rule, today_utc
from qconv.progress import Progress
from qconv.report.document import REPORT_FORMAT, finite
from qconv.report.terminal import summary
from qconv.streaming import BlockModel
from qconv.timeline import TIMELINE
from qconv.validate import tasks as task_accuracy
from qconv.validate.fingerprint import file_digests
from qconv.validate.gates import GateResult, Measurement, count_findings, judge, overall, reasons

_NAMED_FINDINGS = 3


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished run.

    Attributes:
        document: the report, format 2; see ``report.schema.json``.
        folder: what was made, when something was.
    """

    document: Mapping[str, Any]
    folder: Path | None = None

    @property
    def verdict(self) -> str:
        return str(self.document["verdict"])

    @property
    def fidelity(self) -> Mapping[str, Any] | None:
        """The measured distance from the reference, or None when it was not asked for."""
        part: Mapping[str, Any] | None = self.document["fidelity"]
        return part

    @property
    def stages(self) -> Mapping[str, Any]:
        """What each stage did and how often it fell back."""
        part: Mapping[str, Any] = self.document["stages"]
        return part

    def summary(self) -> str:
        """A few lines for the terminal."""
        return summary(self.document)


def conclude(
    command: str,
    subject: Mapping[str, Any],
    device: str,
    *,
    config: ValidationConfig | None = None,
    fidelity: Fidelity | None = None,
    rules: Sequence[Rule] = (),
    stages: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    tasks: Sequence[Mapping[str, Any]] = (),
    progress: Progress,
) -> dict[str, Any]:
    """Judges what was measured, looks for the culprit when it does not pass, and writes the document down."""
    results: list[GateResult] = []
    if fidelity is not None and config is not None:
        results = _judge(fidelity, rules, config, tasks)
        verdict = overall(results)
        wanted = config.attribution == "always" or (
            config.attribution == "auto" and verdict in ("fail", "inconclusive")
        )
        if wanted:
            fidelity.attribute(progress)
    document = {
        "format": REPORT_FORMAT,
        "tool": f"qconv {__version__}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "verdict": overall(results),
        "reasons": reasons(results) + _culprits(results, fidelity),
        "subject": dict(subject),
        "environment": environment(device),
        "provenance": dict(provenance or {}),
        "stages": dict(stages or {}),
        "fidelity": None if fidelity is None else fidelity.facts,
        "findings": [] if fidelity is None else fidelity.findings,
        "tasks": [dict(task) for task in tasks],
        "gates": [result.as_dict() for result in results],
    }
    result: dict[str, Any] = finite(document)
    return result


def _culprits(results: Sequence[GateResult], fidelity: Fidelity | None) -> list[str]:
    """The findings behind a findings gate that does not pass, as sentences."""
    if fidelity is None or not any(r.rule.metric == "findings" and r.verdict == "fail" for r in results):
        return []
    errors = [finding for finding in fidelity.findings if finding["severity"] == "error"]
    return [f"{finding['title']} ({finding['code']})" for finding in errors[:_NAMED_FINDINGS]]


def _judge(
    fidelity: Fidelity, rules: Sequence[Rule], config: ValidationConfig, tasks: Sequence[Mapping[str, Any]]
) -> list[GateResult]:
    codes = [finding["code"] for finding in fidelity.findings if finding["severity"] == "error"]
    measured = count_findings(codes) if fidelity.is_audited or codes else {}
    for name, item in task_accuracy.measurements(tasks).items():
        low, high = item["interval_95"]
        measured[name] = Measurement(item["value"], low, high)
    floor = {}
    for rule in rules:
        value = fidelity.measurement(rule.metric)
        if value is not None:
            measured[rule.metric] = value
        own_floor = fidelity.floor(rule.metric) if rule.floor_factor is not None else None
        if own_floor is not None:
            floor[rule.metric] = own_floor
    return judge(
        rules,
        measured,
        floor=floor or None,
        precision=fidelity.precision,
        waivers=config.policy.waivers,
        today=today_utc(),
    )


def run_tasks(
    models: Mapping[str, Callable[[], BlockModel]],
    tokenizer_folder: Path,
    config: ValidationConfig,
    device: str,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Task accuracy of reference and candidate, or nothing when no task was asked for."""
    if not config.tasks:
        return []
    return task_accuracy.evaluate_tasks(
        {name: _whole(make) for name, make in models.items()},
        corpus.load_tokenizer(tokenizer_folder),
        config.tasks,
        include=config.task_folder,
        limit=config.task_limit,
        batch_size=8,
        device=device,
        seed=config.seed,
        progress=progress,
    )


def _whole(make: Callable[[], BlockModel]) -> Callable[[], Any]:
    return lambda: make().whole()


def check_report_folder(folder: Path | None) -> None:
    """Refuses a folder for reports that cannot be made, and makes nothing.

    Raises:
        CheckpointError: a file is in its way, or what is there of the way to it cannot be written.
    """
    if folder is None:
        return
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    reason = "not a folder" if not there.is_dir() else "" if os.access(there, os.W_OK) else "not writable"
    if reason:
        raise CheckpointError(f"{folder}: the report cannot be written there ({there}: {reason}); choose a folder")


def make_report_folder(folder: Path | None) -> None:
    """Makes the folder for reports before the work that they would be lost with.

    Raises:
        CheckpointError: it cannot be made, or is there and cannot be written.
    """
    if folder is None:
        return
    check_report_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: the report cannot be written there ({error}); choose a folder") from error


class Provenance:
    """SHA-256 of what is read and made, computed beside the other work (hashing releases the interpreter lock).

    Use as a context manager: what is not finished when the work ends is given up.
    """

    def __init__(self, folders: Mapping[str, Path | None]):
        self._digests: dict[str, dict[str, str]] = {}
        self._errors: list[Exception] = []
        self._threads: dict[str, threading.Thread] = {}
        self._stop = threading.Event()
        for name, folder in folders.items():
            if folder is not None:
                self.add(name, folder)

    def __enter__(self) -> Provenance:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def add(self, name: str, folder: Path, known: Mapping[str, str] | None = None) -> None:
        """Begins with a folder whose files do not change any more; ``known``: see `file_digests`."""
        self._digests[name] = {}  # in the order of the report
        self._threads[name] = threading.Thread(
            target=self._hash, args=(name, folder, known), name=f"provenance-{name}", daemon=True
        )
        self._threads[name].start()

    def _hash(self, name: str, folder: Path, known: Mapping[str, str] | None) -> None:
        try:
            with TIMELINE.stage("hash"):
                self._digests[name] = file_digests(folder, self._stop, known)
        except Exception as error:  # raised where the result is asked for
            self._errors.append(error)

    def result(self) -> dict[str, dict[str, str]]:
        """The digests by file name.

        Raises:
            CheckpointError: a folder cannot be read any more.
        """
        return {name: self.of(name) for name in self._digests}

    def of(self, name: str) -> dict[str, str]:
        """The digests of one folder; see `result`."""
        with TIMELINE.stage("wait for hashes"):
            self._threads[name].join()
        if self._errors:
            raise self._errors[0]
        return self._digests[name]
