"""The cheapest bits within a budget."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdq_export.quantize.bit_allocation import allocate

GROUPS = st.lists(
    st.tuples(
        st.integers(1, 9),
        st.dictionaries(st.sampled_from((2, 3, 4, 8)), st.integers(0, 50).map(float), min_size=1),
    ),
    min_size=1,
    max_size=5,
)


def spent(sizes, bits):
    return sum(size * each for size, each in zip(sizes, bits, strict=True))


@given(GROUPS, st.integers(0, 60))
def test_nothing_within_the_budget_costs_less(groups, above):
    sizes, costs = [size for size, _ in groups], [cost for _, cost in groups]
    budget = spent(sizes, [min(cost) for cost in costs]) + above
    found = allocate(sizes, costs, budget)
    assert spent(sizes, found) <= budget
    best = min(
        sum(cost[bits] for cost, bits in zip(costs, every, strict=True))
        for every in itertools.product(*costs)
        if spent(sizes, every) <= budget
    )
    assert sum(cost[bits] for cost, bits in zip(costs, found, strict=True)) == best


def test_equal_costs_take_fewer_bits():
    assert allocate([3, 5], [{2: 1.0, 4: 1.0, 8: 1.0}] * 2, 64) == [2, 2]


def test_sizes_without_a_common_divisor_still_keep_to_the_budget():
    sizes = [999_983 + 2 * index for index in range(40)]
    costs = [{2: 9.0 * index, 4: 2.0 * index, 8: 0.1 * index} for index in range(40)]
    budget = 4 * sum(sizes)
    found = allocate(sizes, costs, budget)
    assert 0.98 * budget < spent(sizes, found) <= budget
    assert found == sorted(found), "what costs more gets no fewer bits"


def test_a_budget_below_the_least_bits_is_refused():
    with pytest.raises(ValueError, match="least bits of all groups are 20, the budget is 19"):
        allocate([10], [{2: 1.0}], 19)
