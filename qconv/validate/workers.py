"""Threads for many small operations, which would mostly wait for one another if each were divided among threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch


def one_worker(name: str) -> ThreadPoolExecutor:
    """One thread with operations of one thread, for work beside the main thread's; shut it down."""
    num = torch.get_num_threads()
    pool = ThreadPoolExecutor(1, name, initializer=torch.set_num_threads, initargs=(1,))
    pool.submit(int).result()  # it has begun
    torch.set_num_threads(num)  # what the worker sets is the default of threads that come later
    return pool


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
