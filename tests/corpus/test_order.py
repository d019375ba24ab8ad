"""The orders of documents: what stands first, and what a commit may move."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from m3cli.corpus.order import (
    Standing,
    State,
    by_argument,
    by_churn,
    by_dependency,
    by_relevance,
    path_key,
)


def test_path_order_is_by_components() -> None:
    """A directory's files stand together, whatever bytes sort before the slash."""
    paths = [b"a/z", b"a-b/c", b"a.b", b"B", b"a/B/c", b"\xff", b"a\n"]
    assert sorted(paths, key=path_key) == [b"B", b"a/B/c", b"a/z", b"a\n", b"a-b/c", b"a.b", b"\xff"]


def test_given_order_keeps_path_order_within_an_argument() -> None:
    """Arguments stand in the order in which they were named, each in path order."""
    assert by_argument([1, 0, 2, 1, 0]) == [1, 4, 0, 3, 2]


def test_churn_order_is_by_the_last_change_then_by_the_one_before() -> None:
    """What was changed longest ago stands first; among equals, what was changed longer ago before."""
    touches = [0b1000, 0b1001, 0b0111, 0b0000, 0b1000, 0b0100]
    assert by_churn([Standing(State.COMMITTED, 0, bits) for bits in touches]) == [3, 5, 2, 0, 4, 1]


def test_churn_order_puts_what_is_not_committed_last() -> None:
    """Committed, uncommitted, outside of git, standard input; repositories stand one after the other."""
    standings = [
        Standing(State.STREAM),
        Standing(State.OUTSIDE),
        Standing(State.UNCOMMITTED, 0, 0b10),
        Standing(State.UNCOMMITTED, 0, 0b01),
        Standing(State.COMMITTED, 1, 0b01),
        Standing(State.COMMITTED, 0, 0b11),
    ]
    assert by_churn(standings) == [5, 4, 3, 2, 1, 0]


commits = st.lists(st.frozensets(st.integers(0, 7), min_size=1), max_size=12)


def touches_of(history: list[frozenset[int]]) -> list[int]:
    return [sum(1 << n for n, changed in enumerate(history) if file in changed) for file in range(8)]


def committed(history: list[frozenset[int]]) -> list[int]:
    return by_churn([Standing(State.COMMITTED, 0, touches) for touches in touches_of(history)])


@given(commits, st.frozensets(st.integers(0, 7), min_size=1))
def test_a_commit_moves_only_what_it_changes_and_to_the_end(
    history: list[frozenset[int]], changed: frozenset[int]
) -> None:
    """After any commit the other files keep their relative order, and stand in front of the changed ones."""
    before, after = committed(history), committed([*history, changed])
    untouched = [file for file in before if file not in changed]
    assert after[: len(untouched)] == untouched
    assert after[len(untouched) :] == [file for file in before if file in changed]


@given(commits, st.frozensets(st.integers(0, 7), min_size=1))
def test_committing_what_is_uncommitted_moves_nothing(
    history: list[frozenset[int]], changed: frozenset[int]
) -> None:
    """The order with uncommitted files at the end is the order after they are committed."""
    states = [State.UNCOMMITTED if file in changed else State.COMMITTED for file in range(8)]
    standings = zip(states, touches_of(history), strict=True)
    assert by_churn([Standing(state, 0, touches) for state, touches in standings]) == committed(
        [*history, changed]
    )


def test_dependency_order_puts_definitions_before_uses() -> None:
    """What a file depends on stands in front of it; what is free to stand anywhere keeps path order."""
    paths = ["a", "b", "c", "d", "e"]
    needs = {"a": {"d"}, "b": {"a", "elsewhere"}, "d": {"c", "d"}, "elsewhere": {"b"}}
    assert [paths[i] for i in by_dependency(paths, needs)] == ["c", "d", "a", "b", "e"]
    assert by_dependency([], {}) == []


def test_files_of_a_cycle_stand_together() -> None:
    """Files that depend on each other stand side by side in path order, between what they need and users."""
    paths = ["a", "b", "c", "d", "e"]
    needs = {"a": {"d"}, "d": {"a", "e"}, "b": {"a"}}
    assert [paths[i] for i in by_dependency(paths, needs)] == ["c", "e", "a", "d", "b"]


def test_long_chains_and_cycles_are_survived() -> None:
    """100,000 files that depend each on the next, closed to a ring or not, need no recursion."""
    paths = [f"{number:06}" for number in range(100_000)]
    chain = {user: {need} for user, need in pairwise(paths)}
    assert by_dependency(paths, chain) == list(range(99_999, -1, -1))
    assert by_dependency(paths, {**chain, paths[-1]: {paths[0]}}) == list(range(100_000))


graphs = st.dictionaries(st.integers(0, 9), st.frozensets(st.integers(0, 9)), max_size=10)


def reached(graph: dict[int, frozenset[int]], start: int) -> set[int]:
    seen: set[int] = set()
    todo = [start]
    while todo:
        for need in graph.get(todo.pop(), frozenset()) - seen:
            seen.add(need)
            todo.append(need)
    return seen


@given(graphs)
def test_every_dependency_outside_of_cycles_stands_first(graph: dict[int, frozenset[int]]) -> None:
    """Each file is there once, behind all that it needs and that does not need it; cycles are unbroken."""
    paths = [f"p{number}" for number in range(10)]
    needs = {paths[user]: {paths[need] for need in some} for user, some in graph.items()}
    order = by_dependency(paths, needs)
    assert sorted(order) == list(range(10))
    reach = [reached(graph, number) for number in range(10)]
    for user in range(10):
        for need in reach[user]:
            assert user in reach[need] or order.index(need) < order.index(user)
        cycle = sorted(other for other in reach[user] if user in reach[other])
        if cycle:
            start = order.index(cycle[0])
            assert order[start : start + len(cycle)] == cycle
    free = [number for number in order if not reach[number] and all(number not in some for some in reach)]
    assert free == sorted(free)


@given(graphs, st.lists(st.text("abc/", max_size=4), min_size=10, max_size=10, unique=True))
def test_names_matter_to_the_dependency_order_by_their_rank_alone(
    graph: dict[int, frozenset[int]], names: list[str]
) -> None:
    """Renaming files so that their path order stays moves none of them."""
    orders = [
        by_dependency(some, {some[user]: {some[need] for need in needs} for user, needs in graph.items()})
        for some in ([f"p{number}" for number in range(10)], sorted(names))
    ]
    assert orders[0] == orders[1]


@given(st.lists(st.floats(0, 9)))
def test_relevance_order_ends_with_the_best(scores: list[float]) -> None:
    """Scores rise along the order, and equal ones keep path order."""
    order = by_relevance(scores)
    assert sorted(order) == list(range(len(scores)))
    assert [(scores[i], i) for i in order] == sorted((score, i) for i, score in enumerate(scores))
