"""Keeps libraries out of the process that transformers would import only because they are installed.

`transformers` imports scikit-learn (which imports scipy and pandas) for one metric of assisted generation, and scipy
for one loss of object detection: seconds at every start, for nothing that is used here.
"""

from __future__ import annotations

import sys

_UNUSED = ("sklearn", "scipy")


def leave_out_unused() -> None:
    """Makes imports of these libraries fail as if they were not installed. For a process that is qconv's own."""
    for name in _UNUSED:
        if name not in sys.modules:
            sys.modules[name] = None  # type: ignore[assignment]


def allow_again() -> None:
    """Undoes `leave_out_unused`, for a library that needs them."""
    for name in _UNUSED:
        if name in sys.modules and sys.modules[name] is None:
            del sys.modules[name]
