"""Which option of each item to take, under a limit on the bytes of all: the multiple-choice knapsack problem.

Method: dynamic programming over bytes (Kellerer, Pferschy, Pisinger 2004, section 11.5), in cells of their greatest
common divisor. Weights of a model share large factors, so these are few and the result is optimal. Where they would be
more than `MAX_CELLS`, cells are larger and what an option takes is rounded up to them: the limit holds all the same,
and at most one cell for each item is left unused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np

MAX_CELLS = 50_000


@dataclass(frozen=True, kw_only=True)
class Option:
    """Attributes:
    num_bytes: what it takes.
    cost: what it does harm.
    """

    num_bytes: int
    cost: float


def allocate(items: Sequence[Sequence[Option]], max_bytes: int) -> list[int]:
    """The number of the option to take of each item, for the smallest sum of costs; of equal ones the earlier.

    Raises:
        ValueError: even the smallest options take more than ``max_bytes``.
    """
    smallest = [min(option.num_bytes for option in options) for options in items]
    largest = sum(max(option.num_bytes for option in options) for options in items)
    room = min(max_bytes, largest) - sum(smallest)
    if room < 0:
        raise ValueError(f"the smallest options take {sum(smallest)} bytes, and there are {max_bytes}")
    extras = [[option.num_bytes - least for option in options] for options, least in zip(items, smallest, strict=True)]
    cell = max(gcd(*(extra for row in extras for extra in row)), -(-room // MAX_CELLS), 1)
    num_cells = room // cell
    cost_C = np.zeros(num_cells + 1)  # of the items so far, within so many cells
    taken_IC = np.empty((len(items), num_cells + 1), dtype=np.uint8)
    for item, options in enumerate(items):
        best_C = np.full(num_cells + 1, np.inf)
        for number, option in enumerate(options):
            size = -(-extras[item][number] // cell)
            if size > num_cells:
                continue
            new_C = cost_C[: num_cells + 1 - size] + option.cost
            better_C = new_C < best_C[size:]
            best_C[size:][better_C] = new_C[better_C]
            taken_IC[item, size:][better_C] = number
        cost_C = best_C
    result: list[int] = []
    left = num_cells
    for item in reversed(range(len(items))):
        result.append(int(taken_IC[item, left]))
        left -= -(-extras[item][result[-1]] // cell)
    return result[::-1]
