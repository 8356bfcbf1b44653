"""Whether a tensor holds NaN or infinity, in one pass and without temporaries.

A sum over NaN or infinity is never finite again, so a finite sum proves that all is finite. The sum of finite numbers
may overflow; only then each of them is looked at.

To ask a GPU for one answer is to wait for all that it was given before. Within `putting_off`, checks of tensors on
their way through a model are therefore collected, and `settle` asks for all at once, before anybody relies on them.
Between, `settle_before` asks for those since it was called last, and reads what it asked for then: by that time the
answers are there, and the device has had work meanwhile.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

from qconv.errors import NumericsError
from qconv.on_the_way import mark, to_host

Check: TypeAlias = Callable[[], object]
_Doubts: TypeAlias = list[tuple[Tensor, Check]]
_Asked: TypeAlias = tuple[Tensor, Callable[[], None], list[Check]]  # flags on their way, until when, and of what
_here = threading.local()  # of the thread that is inside `putting_off`: ``doubts``, and what was ``asked``


def is_surely_finite(x: Tensor) -> Tensor:
    """bool [] on the device of ``x``, which is not waited for; False may also mean that the sum overflowed."""
    return x.sum().isfinite()


def all_finite(x: Tensor) -> bool:
    """Whether no element of a floating-point tensor, any shape, is NaN or infinite; waits for the device."""
    return math.isfinite(float(x.sum())) or bool(torch.isfinite(x).all())


@contextmanager
def putting_off() -> Iterator[None]:
    """Inside, this thread's checks may be put off until `settle`, at the latest until the end.

    An error of the numbers inside may come from what was not checked: then that is told in its place.
    """
    _here.doubts, _here.asked = [], []
    try:
        yield
        settle()
    except NumericsError:
        settle()
        raise
    finally:
        _here.doubts = None


def put_off(is_fine: Tensor, check: Check) -> bool:
    """Puts a check off, where that is allowed; False where it is not, and the caller has to look at once.

    Args:
        is_fine: bool [], on any device; False = ``check`` decides.
        check: raises the error if there is one. It is kept until then, so it should hold no large tensor.
    """
    doubts: _Doubts | None = getattr(_here, "doubts", None)
    if doubts is None:
        return False
    doubts.append((is_fine, check))
    return True


def settle() -> None:
    """Does all that was put off in this thread; waits for the device."""
    if getattr(_here, "doubts", None) is not None:
        _here.asked += _ask()
        _read(len(_here.asked))


def settle_before() -> None:
    """Does what was put off in this thread until the last call; waits for the device to get there."""
    if getattr(_here, "doubts", None) is not None:
        before = len(_here.asked)
        _here.asked += _ask()
        _read(before)


def _ask() -> list[_Asked]:
    doubts: _Doubts = _here.doubts
    _here.doubts = []
    asked = []
    for device in {flag.device for flag, _ in doubts}:
        own = [(flag, check) for flag, check in doubts if flag.device == device]
        [flags] = to_host([torch.stack([flag for flag, _ in own])])
        asked.append((flags, mark(device), [check for _, check in own]))
    return asked


def _read(count: int) -> None:
    """The first ``count`` answers that were asked for."""
    asked: list[_Asked] = _here.asked
    _here.doubts = None  # what is checked now is checked at once
    try:
        for _ in range(count):
            flags, wait, checks = asked.pop(0)
            wait()
            for is_fine, check in zip(flags.tolist(), checks, strict=True):
                if not is_fine:
                    check()
    finally:
        _here.doubts = []
