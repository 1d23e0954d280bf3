"""Bits for each of several groups of weights, so that the summed cost is least and the bits fit into a budget.

A multiple-choice knapsack, solved exactly by dynamic programming over the bits that a group takes above its least
choice, in units of their greatest common divisor. Sizes of real models share large divisors: the blocks of
SmolLM2-135M are 960 units. Where more than `_MOST_UNITS` would be needed, sizes are rounded up to larger units: the
budget still holds, and what is lost is less than one unit a group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

_MOST_UNITS = 1 << 16

Costs = Mapping[int, float]
"""Bits -> cost of giving them to a group."""


def allocate(sizes: Sequence[int], costs: Sequence[Costs], budget: int) -> list[int]:
    """The bits of each group: least sum of costs with `sum(size * bits) <= budget`.

    Equal sums take fewer bits; the result depends on nothing but the arguments.

    Args:
        sizes: number of weights of each group, positive.
        costs: the choices of each group, not empty.
        budget: bits for all groups.

    Raises:
        ValueError: even the least choices exceed the budget.
    """
    choices = [sorted(each) for each in costs]
    least = sum(size * bits[0] for size, bits in zip(sizes, choices, strict=True))
    if least > budget:
        raise ValueError(f"the least bits of all groups are {least}, the budget is {budget}")
    extras = [[size * (bits - each[0]) for bits in each] for size, each in zip(sizes, choices, strict=True)]
    capacity = min(budget - least, sum(each[-1] for each in extras))
    unit = math.gcd(*(extra for each in extras for extra in each)) or 1
    unit *= max(1, -(-(capacity // unit) // _MOST_UNITS))
    taken = _solve([[-(-extra // unit) for extra in each] for each in extras], choices, costs, capacity // unit)
    return [bits[index] for bits, index in zip(choices, taken, strict=True)]


def _solve(
    extras: Sequence[Sequence[int]], choices: Sequence[Sequence[int]], costs: Sequence[Costs], capacity: int
) -> list[int]:
    """Index of each group's choice; `extras` and `capacity` in units."""
    best = np.zeros(capacity + 1)  # least cost of the groups so far within so many units
    decided = []
    for extra, bits, cost in zip(extras, choices, costs, strict=True):
        found = np.full(capacity + 1, np.inf)
        index = np.zeros(capacity + 1, np.int8)
        for number, (units, value) in enumerate(zip(extra, bits, strict=True)):
            if units > capacity:
                break
            candidate = best[: capacity + 1 - units] + cost[value]
            better = candidate < found[units:]
            found[units:][better] = candidate[better]
            index[units:][better] = number
        best = found
        decided.append(index)
    left, taken = capacity, []
    for index, extra in zip(reversed(decided), reversed(extras), strict=True):
        number = int(index[left])
        taken.append(number)
        left -= extra[number]
    return taken[::-1]
