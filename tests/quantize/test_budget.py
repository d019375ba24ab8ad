"""The knapsack against trying everything out."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.budget import Option, allocate, smallest

sizes = st.integers(1, 50)
costs = st.floats(0, 100, allow_nan=False).map(lambda cost: round(cost, 2))
tables = st.dictionaries(
    st.sampled_from("abcd"),
    st.lists(
        st.builds(Option, st.sampled_from(["Q2_K", "Q4_K", "Q8_0"]), sizes, costs), min_size=1, max_size=4
    ),
    min_size=1,
)


@given(tables, st.integers(0, 120))
def test_against_every_choice(options: dict[str, list[Option]], spare: int) -> None:
    """The choice fits; none that fits costs less than the bound; it is off by less than one step."""
    budget = smallest(options) + spare
    found = allocate(options, budget)
    assert set(found.chosen) == set(options)
    assert all(found.chosen[name] in options[name] for name in options)
    assert found.nbytes == sum(option.nbytes for option in found.chosen.values()) <= budget
    assert found.cost == pytest.approx(sum(option.cost for option in found.chosen.values()))
    possible = [
        sum(option.cost for option in choice)
        for choice in itertools.product(*options.values())
        if sum(option.nbytes for option in choice) <= budget
    ]
    assert found.bound <= min(possible) + 1e-9
    assert min(possible) <= found.cost + 1e-9
    largest_step = max(max(o.cost for o in each) - min(o.cost for o in each) for each in options.values())
    assert found.cost - min(possible) <= largest_step + 1e-9


@given(tables)
def test_without_a_limit_each_gets_its_best(options: dict[str, list[Option]]) -> None:
    """A budget for everything buys the least cost, and one more byte is worth nothing."""
    found = allocate(options, 10_000)
    assert found.cost == pytest.approx(sum(min(o.cost for o in each) for each in options.values()))
    assert (found.bound, found.price) == (pytest.approx(found.cost), 0)


def test_many_equal_tensors() -> None:
    """With hundreds of tensors the result is as good as the bound: what one step costs is nothing."""
    options = {
        str(i): [Option("Q2_K", 100, 8.0 + i % 7), Option("Q4_K", 200, 2.0 + i % 3), Option("Q8_0", 400, 0.1)]
        for i in range(600)
    }
    found = allocate(options, 130_001)
    assert 130_001 - 100 <= found.nbytes <= 130_001
    assert found.bound <= found.cost <= found.bound * 1.005


def test_too_small_a_budget() -> None:
    """A budget under the smallest choice has no solution."""
    with pytest.raises(ValueError, match="1 bytes too few"):
        allocate({"a": [Option("Q2_K", 10, 1.0)]}, 9)
