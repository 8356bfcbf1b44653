"""Settings for a process that is qconv's own, and not that of a program which uses qconv as a library.

`transformers` imports scikit-learn (which imports scipy and pandas) for one metric of assisted generation, and scipy
for one loss of object detection: seconds at every start, for nothing that is used here.

`bitsandbytes` hands a few fallbacks for CPUs to `torch.compile` when it is imported, which imports the whole
compiler; on a GPU they are never called, and uncompiled they compute the same.

glibc gives large blocks of memory back to the system when they are freed, and gets them back page by page, zeroed. A
forward pass on a CPU frees and allocates the same large blocks all the time.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from contextlib import suppress
from unittest import mock

_UNUSED = ("sklearn", "scipy")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


_is_own = False


def leave_out_unused() -> None:
    """Makes imports of these libraries fail as if they were not installed."""
    global _is_own
    _is_own = True
    for name in _UNUSED:
        if name not in sys.modules:
            sys.modules[name] = None  # type: ignore[assignment]


def allow_again() -> None:
    """Undoes `leave_out_unused`, for a library that needs them."""
    for name in _UNUSED:
        if name in sys.modules and sys.modules[name] is None:
            del sys.modules[name]


def import_uncompiled(name: str) -> None:
    """Imports a module without the functions that it would compile; does nothing in somebody else's process."""
    if not _is_own or name in sys.modules:
        return
    import torch

    with mock.patch.object(torch, "compile", lambda model=None, **_: model if model is not None else (lambda f: f)):
        importlib.import_module(name)


def keep_freed_memory() -> None:
    """Lets the process reuse the memory that it freed; does nothing where the C library is not glibc."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
