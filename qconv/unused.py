"""Options that nothing in a job takes: somebody who gave one expects what will not happen. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection

from qconv.config import MergeJob
from qconv.errors import UsageError

CALIBRATION = ("calibration", "samples", "seq-len")
COMPARISON = ("eval-data", "eval-tokens", "eval-seq-len", "control-tokens", "attribution", "no-default-gates")
GATES = ("gate", "max-kl", "min-effect", "policy", "prompts", "new-tokens", "tasks", "task-folder", "task-limit")


def refuse_unused(job: MergeJob, given: Collection[str]) -> None:
    """Refuses what was given for a step that the job does not have.

    Args:
        given: options by their names on the command line, without dashes.

    Raises:
        UsageError: names them, and what lacks.
    """
    calibrated = any(output.is_calibrated for output in job.outputs)
    targets = [output.quantization for output in job.outputs if output.quantization is not None]
    made = ", ".join(f"{config.target} by {config.resolved_algorithm}" for config in targets) or "plain weights"
    no_calibration = f"nothing is calibrated here ({made})"
    for names, is_taken, reason in (
        (CALIBRATION, calibrated, no_calibration),
        (("gpu-memory",), calibrated, f"it is for calibrating, and {no_calibration}"),
        (("gpu-memory",), job.device != "cpu", "it limits what is taken of a GPU, and --device is cpu"),
        ((*GATES, "task-data", *COMPARISON), job.validation is not None, "--no-validate leaves nothing to compare"),
    ):
        unused = [name for name in names if name in given]
        if unused and not is_taken:
            raise UsageError(f"{', '.join(f'--{name}' for name in unused)}: {reason}; drop {_it(unused)}")


def _it(names: Collection[str]) -> str:
    return "it" if len(names) == 1 else "them"
