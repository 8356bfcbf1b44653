"""What a run says while it works: bars on a terminal, messages on stderr, nothing on stdout."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Progress:
    """Attributes: verbosity: 0 = errors only, 1 = stages and bars, 2 = every decision."""

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
