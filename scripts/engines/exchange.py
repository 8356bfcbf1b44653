"""How a reader in an environment of its own is asked and answers: two JSON files, and nothing but the standard library.

A request has ``folder`` (the artifact), ``sha256`` (of its weights, so that no reading outlives them), ``rows`` (token
ids to score, a list of lists), ``prompt``, ``new_tokens``, ``onednn`` (False: PyTorch's matrix products without
oneDNN) and, where an artifact needs any, ``settings`` (environment variables) and ``texts`` (to tokenize).

An answer has ``logprobs`` (natural logarithm of the probability of each token after the first, row by row), ``text``
and ``tokens`` (of a greedy continuation, up to what ends it), where the reader sees them ``gaps`` (by how much the best
logit led, token by token), ``ids`` (of the tokens of each of ``texts``, without what begins a text), ``versions`` (of
those of the reader's packages that are there) and ``seconds``; or ``refusal``, what the engine said.
"""

from __future__ import annotations

import json
import sys
import textwrap
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_REFUSAL_CHARACTERS = 300


def answer(read: Callable[[dict[str, Any]], dict[str, Any]], packages: list[str]) -> None:
    """The whole of a reader's process: ``python READER REQUEST.json ANSWER.json``."""
    request = json.loads(Path(sys.argv[1]).read_text())
    start = time.monotonic()
    try:
        result = read(request)
    except Exception as error:
        traceback.print_exc()
        words = f"{type(error).__name__}: {' '.join(str(error).split())}"
        result = {"refusal": textwrap.shorten(words, _REFUSAL_CHARACTERS, placeholder=" ...")}
    result |= {"versions": _versions(packages), "seconds": time.monotonic() - start}
    Path(sys.argv[2]).write_text(json.dumps(result))


def _versions(packages: list[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
