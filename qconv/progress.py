"""What a run says while it works: bars on a terminal, messages on stderr, nothing on stdout."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Progress:
    """Attributes: verbosity: 0 = errors only, 1 = stages and bars, 2 = each solve and training step."""

    verbosity: int = 0

    def track(self, items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
        """The items, with a bar on stderr when that is a terminal."""
        if self.verbosity < 1 or not sys.stderr.isatty():
            yield from items
            return
        from tqdm import tqdm

        yield from tqdm(items, desc=label, total=total, file=sys.stderr, leave=False, dynamic_ncols=True)

    def say(self, message: str) -> None:
        if self.verbosity >= 1:
            print(message, file=sys.stderr, flush=True)

    def detail(self, message: str) -> None:
        if self.verbosity >= 2:
            print(message, file=sys.stderr, flush=True)


QUIET = Progress()


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without noise that asks nothing of the user: an absent CPU kernel for inference (training calls
    none), a deprecated name that peft reads, and a loading bar where no terminal shows it."""
    from transformers.utils import logging as transformers_logging

    kernels = logging.getLogger("bitsandbytes.backends.cpu.ops")
    kernels.addFilter(_is_not_about_kernels)
    bars = transformers_logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
            yield
    finally:
        kernels.removeFilter(_is_not_about_kernels)
        if bars:
            transformers_logging.enable_progress_bar()


def _is_not_about_kernels(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in record.getMessage()
