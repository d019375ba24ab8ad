"""The orders of documents: what stands first, and what a commit may move."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from m3cli.corpus.order import Standing, State, by_argument, by_churn, path_key


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
