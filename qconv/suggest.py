"""What somebody may have meant: the nearest known names and paths.

Method: Ratcliff/Obershelp similarity of `difflib`, without regard to case. The same word and names give the same answer
in the same order on every machine. Imports nothing heavy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

_CUTOFF = 0.6
_MOST_NAMES = 10_000  # of a folder; a listing must not take longer than the message is worth


def nearest(word: str, names: Iterable[str], count: int = 2) -> list[str]:
    """The names that look most like ``word``, best first; the dashes of options are no likeness."""
    known = {_core(name): name for name in sorted(names, reverse=True)}
    return [known[near] for near in difflib.get_close_matches(_core(word), known, n=count, cutoff=_CUTOFF)]


def _core(name: str) -> str:
    return name.lower().lstrip("-")


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """``"; did you mean a or b?"``, for the end of a message, or nothing where no name is near."""
    near = nearest(word, names)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def did_you_mean_path(path: Path) -> str:
    """The same for a path that does not exist: its first missing part among what lies beside it."""
    here, missing = path, []
    while not here.exists() and here != here.parent:
        missing.append(here.name)
        here = here.parent
    if not missing or not here.is_dir():
        return ""
    try:
        names = sorted(entry.name for entry in islice(here.iterdir(), _MOST_NAMES) if not entry.name.startswith("."))
    except OSError:
        return ""
    rest = missing[-2::-1]
    found = [here.joinpath(near, *rest) for near in nearest(missing[-1], names)]
    paths = [str(candidate) for candidate in found if candidate.exists()]
    return f"; did you mean {' or '.join(paths)}?" if paths else ""
