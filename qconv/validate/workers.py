"""Threads for many small operations, which would mostly wait for one another if each were divided among threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Operations of one thread each."""
    num = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num)


@contextmanager
def workers() -> Iterator[Callable[..., Iterator[Any]]]:
    """``map``, by one thread for each core, each with operations of one thread."""
    num = torch.get_num_threads()
    if num == 1:
        yield map
        return
    try:
        with ThreadPoolExecutor(num, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(num)  # what the workers set is the default of threads that come later
