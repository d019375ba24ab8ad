"""What changed between two sequences of tokens: right whatever they are, and small where the change is."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3cli.engine.edits import (
    Edit,
    changed_of,
    changes_before,
    edits_between,
    runs_of,
    settled,
    staleness,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    Ids = np.ndarray[Any, np.dtype[np.int32]]

AROUND = 2 * 32 + 4  # tokens of the pieces that an edit may touch at both of its ends, on average


def array(tokens: Sequence[int]) -> Ids:
    return np.array(tokens, np.int32)


def text(count: int, seed: int = 0, vocabulary: int = 50_000) -> Ids:
    return np.random.default_rng(seed).integers(0, vocabulary, count).astype(np.int32)


def apply(edits: Sequence[Edit], old: Ids, new: Ids) -> list[int]:
    """What edits make of `old`, with the tokens of `new` where they put any."""
    made: list[int] = []
    place = 0
    for edit in edits:
        made += [*old[place : edit.old_start].tolist(), *new[edit.new_start : edit.new_end].tolist()]
        place = edit.old_end
    return [*made, *old[place:].tolist()]


def check(edits: Sequence[Edit], old: Ids, new: Ids) -> None:
    """They make `new` of `old`, are in order, and between any two of them a token stays."""
    assert apply(edits, old, new) == new.tolist()
    for edit in edits:
        assert 0 <= edit.old_start <= edit.old_end <= len(old)
        assert 0 <= edit.new_start <= edit.new_end <= len(new)
        assert edit.size > 0
    for first, second in pairwise(edits):
        assert second.old_start - first.old_end == second.new_start - first.new_end > 0


@st.composite
def changed_texts(draw: st.DrawFn) -> tuple[Ids, Ids]:
    """A text, and another that has parts of it in some order, with other tokens between them."""
    vocabulary = draw(st.sampled_from([1, 2, 5, 50_000]))
    old = text(draw(st.integers(0, 400)), draw(st.integers(0, 20)), vocabulary)
    parts: list[Ids] = []
    for _ in range(draw(st.integers(0, 5))):
        start = draw(st.integers(0, len(old)))
        parts.append(old[start : draw(st.integers(start, len(old)))])
        parts.append(text(draw(st.integers(0, 40)), draw(st.integers(0, 20)), vocabulary))
    return old, np.concatenate([*parts, array([])]).astype(np.int32)


small = st.lists(st.integers(0, 2), max_size=30).map(array)


@given(st.one_of(changed_texts(), st.tuples(small, small)))
def test_edits_make_the_new_of_the_old(texts: tuple[Ids, Ids]) -> None:
    """Whatever the two are."""
    old, new = texts
    check(edits_between(old, new), old, new)


@given(st.one_of(changed_texts(), st.tuples(small, small)))
def test_what_is_equal_has_no_edits(texts: tuple[Ids, Ids]) -> None:
    """And what is not has some."""
    old, new = texts
    assert edits_between(old, old.copy()) == []
    assert (edits_between(old, new) == []) == np.array_equal(old, new)


@given(st.integers(0, 3000), st.integers(0, 200), st.integers(0, 200), st.integers(0, 30))
def test_one_change_is_found_alone(place: int, removed: int, added: int, seed: int) -> None:
    """An insertion, a deletion or a replacement costs what it changes, whatever follows."""
    old = text(3000, seed)
    new = np.concatenate([old[:place], text(added, seed + 100), old[place + removed :]])
    edits = edits_between(old, new)
    check(edits, old, new)
    # Found exactly, but for a token at its end that happens to be the same.
    assert sum(edit.new_end - edit.new_start for edit in edits) <= added
    assert len(edits) <= 1


@given(st.integers(1, 6), st.integers(0, 30))
def test_several_changes_are_told_apart(count: int, seed: int) -> None:
    """Between edits far from each other, what stays is kept, but for the pieces that they touch."""
    old = text(6000, seed)
    places = [900 * number + 50 for number in range(1, count + 1)]
    parts = [old[start:end] for start, end in pairwise([0, *places, len(old)])]
    new = parts[0]
    for number, part in enumerate(parts[1:]):
        new = np.concatenate([new, text(7, number + 500), part[number % 3 :]])
    edits = edits_between(old, new)
    check(edits, old, new)
    assert len(edits) == count
    assert sum(edit.new_end - edit.new_start for edit in edits) == 7 * count


@pytest.mark.parametrize(("start", "length", "to"), [(300, 200, 2500), (2500, 200, 300), (1000, 900, 100)])
def test_a_block_that_moved_costs_about_itself(start: int, length: int, to: int) -> None:
    """It is computed at its new place, and nothing else is."""
    old = text(4000)
    rest = np.concatenate([old[:start], old[start + length :]])
    new = np.concatenate([rest[:to], old[start : start + length], rest[to:]])
    edits = edits_between(old, new)
    check(edits, old, new)
    assert sum(edit.new_end - edit.new_start for edit in edits) <= length + AROUND


@pytest.mark.parametrize("vocabulary", [1, 2])
def test_texts_that_repeat_themselves_are_compared(vocabulary: int) -> None:
    """However few tokens there are, of which pieces are alike."""
    old = text(20_000, 1, vocabulary)
    new = np.concatenate([old[:5000], text(3, 2, vocabulary), old[5010:15_000], old[15_001:]])
    edits = edits_between(old, new)
    check(edits, old, new)
    assert edits[0].new_start >= 5000
    assert sum(edit.new_end - edit.new_start for edit in edits) <= 10_003  # not more than all between them


@given(st.one_of(changed_texts(), st.tuples(small, small)), st.integers(0, 100))
def test_settled_edits_hold_those_that_they_settle(texts: tuple[Ids, Ids], settle: int) -> None:
    """They make the same of the old, do not meet, and have so many more tokens behind each."""
    old, new = texts
    edits = edits_between(old, new)
    wide = settled(edits, len(old), settle)
    check(wide, old, new)
    for edit in edits:
        (around,) = [each for each in wide if each.old_start <= edit.old_start <= each.old_end]
        assert around.new_start <= edit.new_start
        assert around.old_end >= min(edit.old_end + settle, len(old))
        assert around.new_end >= min(edit.new_end + settle, len(new))
    assert {edit.old_start for edit in wide} <= {edit.old_start for edit in edits}
    computed = sum(edit.new_end - edit.new_start for edit in wide)
    assert computed <= sum(edit.new_end - edit.new_start + settle for edit in edits)
    if settle == 0:
        assert wide == edits


def changes_by_token(
    edits: Sequence[Edit], computed: Sequence[Edit], changed: Sequence[int], size: int
) -> list[int]:
    """The same as `changes_before`, token by token."""
    counts = []
    for place in range(size):
        if any(edit.new_start <= place < edit.new_end for edit in [*computed, *edits]):
            counts.append(0)
            continue
        before = [edit for edit in edits if edit.new_end <= place]
        came_from = place - sum(
            (edit.new_end - edit.new_start) - (edit.old_end - edit.old_start) for edit in before
        )
        counts.append(changed[came_from] + sum(edit.size for edit in before))
    return counts


@given(st.one_of(changed_texts(), st.tuples(small, small)), st.integers(0, 100), st.data())
def test_changes_are_counted_token_by_token(texts: tuple[Ids, Ids], settle: int, data: st.DataObject) -> None:
    """What was there before and what this update adds; none for what is computed again."""
    old, new = texts
    changed = text(len(old), data.draw(st.integers(0, 9)), 30)
    edits = edits_between(old, new)
    wide = settled(edits, len(old), settle)
    counts = changes_before(edits, wide, changed, len(new))
    assert counts.tolist() == changes_by_token(edits, wide, changed.tolist(), len(new))
    assert counts.dtype == np.int32
    assert 0.0 <= staleness(counts) <= 1.0


@given(st.lists(st.integers(0, 2), max_size=40))
def test_runs_stand_for_their_values(values: list[int]) -> None:
    """There and back, and as short as can be."""
    runs = runs_of(array(values))
    assert changed_of(runs, len(values)).tolist() == values
    assert all(first[1] != second[1] for first, second in pairwise(runs))
    assert all(count > 0 for count, _ in runs)
    assert all(type(number) is int for run in runs for number in run)


def test_without_runs_nothing_has_changed() -> None:
    """As in a context that was never updated."""
    assert changed_of([], 3).tolist() == [0, 0, 0]
    assert runs_of(array([])) == []


@given(st.lists(st.integers(0, 10**6), max_size=40))
def test_staleness_is_a_share(changed: list[int]) -> None:
    """From nothing to all, and nothing only where nothing has changed."""
    share = staleness(array(changed))
    assert 0.0 <= share <= 1.0
    assert (share == 0.0) == (not any(changed))


def test_staleness_by_hand() -> None:
    """Each token counts with the share of those before it that have changed, at most all of them."""
    assert staleness(array([])) == 0.0
    assert staleness(array([0, 0, 1, 1, 2])) == pytest.approx((1 / 2 + 1 / 3 + 2 / 4) / 5)
    assert staleness(array([0, 5])) == 0.5


def test_an_edit_is_as_large_as_its_larger_side() -> None:
    """What is added or what is removed."""
    assert [Edit(3, 5, 3, 10).size, Edit(3, 9, 3, 4).size, Edit(1, 1, 1, 2).size] == [7, 6, 1]
