"""Every error a user can meet, in one tree.

A message says what was expected, what was found, where (file and tensor), and what to do.
`cli.py` alone turns an error into an exit code; no other module calls `sys.exit`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

EXIT_DONE = 0
EXIT_OTHER = 1
EXIT_USAGE = 2
EXIT_BAD_INPUT = 3
EXIT_GATE_FAILED = 4
EXIT_GATE_INCONCLUSIVE = 5
EXIT_INTERRUPTED = 130


class QconvError(Exception):
    """Base of all errors that qconv raises on purpose.

    Attributes:
        is_answered: it ends a command whose answer is out already, as a gate that failed does.
        place: what of a job it is about, as keys of a recipe: ``("outputs", "0")``; empty where nobody has said so.
    """

    exit_code = EXIT_OTHER
    is_answered = False
    place: tuple[str, ...] = ()


@contextmanager
def concerning(*place: str) -> Iterator[None]:
    """Errors within are about this place of a job, unless they know one of their own."""
    try:
        yield
    except QconvError as error:
        error.place = error.place or place
        raise


class UsageError(QconvError):
    """The request itself is incomplete or contradicts itself (a missing or impossible option)."""

    exit_code = EXIT_USAGE


class CheckpointError(QconvError):
    """A model folder, shard, index or tokenizer cannot be read or written as asked."""

    exit_code = EXIT_BAD_INPUT


class AdapterError(QconvError):
    """An adapter cannot be merged exactly into the base it was given."""

    exit_code = EXIT_BAD_INPUT


class SchemeError(QconvError):
    """A quantization scheme does not fit the model or the target format."""

    exit_code = EXIT_BAD_INPUT


class CalibrationError(QconvError):
    """Calibration or evaluation text is missing, empty or too short."""

    exit_code = EXIT_BAD_INPUT


class RecipeError(QconvError):
    """A recipe cannot be read, or asks for what cannot be; names file, line and key."""

    exit_code = EXIT_BAD_INPUT


class CapacityError(QconvError):
    """The job does not fit this machine: the GPU, host memory or a disk; says how much is missing where."""

    exit_code = EXIT_BAD_INPUT


class NumericsError(QconvError):
    """NaN or infinity where a finite number is required; names the tensor."""

    exit_code = EXIT_BAD_INPUT


class HubError(QconvError):
    """The model hub cannot be reached, or does not answer as it should; what was made is complete."""


class HubAccessError(HubError):
    """A push to the hub without a token, with one that may not write there, or to where it was not meant to go."""

    exit_code = EXIT_BAD_INPUT


class GateError(QconvError):
    """A measured value misses the gate that the user set."""

    exit_code = EXIT_GATE_FAILED


class GateInconclusiveError(QconvError):
    """A gate could not be decided from the tokens that were evaluated."""

    exit_code = EXIT_GATE_INCONCLUSIVE
