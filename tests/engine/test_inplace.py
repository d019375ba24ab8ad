"""Which context is updated in place for a prompt, and when none is."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from m3cli.engine import inplace
from m3cli.engine.edits import Edit, changes_before, edits_between, settled, staleness
from m3cli.engine.inplace import Base, Plan, choose, plan_from

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

    from m3cli.engine.events import Update

    Ids = np.ndarray[Any, np.dtype[np.int32]]

SETTLE = inplace._SETTLE
FAR = 1 << 20  # tokens of a context that holds everything


def text(count: int, seed: int = 0) -> Ids:
    return np.random.default_rng(seed).integers(0, 50_000, count).astype(np.int32)


def joined(*parts: Ids) -> Ids:
    return np.concatenate(parts)


def base_of(tokens: Ids, changed: int = 0, exact: int | None = None) -> Base:
    counts = np.full(len(tokens), changed, np.int32)
    return Base(tokens, counts, len(tokens) if exact is None else exact)


OLD = text(2000)


def chosen(
    bases: Sequence[Base], wanted: Ids, exactly: int, update: Update = "inplace", n_ctx: int = FAR
) -> Plan:
    plan = choose(bases, wanted, exactly, update, n_ctx)
    assert plan is not None
    return plan


@given(st.integers(0, 1900), st.integers(0, 100), st.integers(0, 100), st.integers(0, 2000))
def test_a_plan_adds_up(place: int, removed: int, added: int, exact: int) -> None:
    """What is kept and what is computed is all; the exact part ends before the first edit."""
    wanted = joined(OLD[:place], text(added, 1), OLD[place + removed :])
    plan = plan_from(base_of(OLD, exact=exact), wanted)
    assert plan.kept + plan.computed == len(wanted) == len(plan.changed)
    assert 0 <= plan.exact <= min(exact, plan.kept)
    assert plan.staleness == staleness(plan.changed)
    if np.array_equal(wanted, OLD):
        assert (plan.count, plan.computed, plan.exact) == (0, 0, exact)
    else:
        assert plan.count == 1
        assert plan.computed <= added + SETTLE
        assert plan.exact == min(exact, plan.edits[0].new_start)
        assert plan.edits[0].new_start >= min(place, len(wanted))


def test_the_raw_edits_count_and_those_behind_them_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two edits that are near each other are computed at once, and still are two."""
    monkeypatch.setattr(inplace, "_SETTLE", 400)
    wanted = joined(OLD[:500], text(3, 1), OLD[500:800], text(4, 2), OLD[800:])
    plan = plan_from(base_of(OLD), wanted)
    assert plan.count == 2
    assert [*plan.edits] == [Edit(500, 1200, 500, 1207)]
    assert (plan.computed, plan.exact) == (707, 500)
    assert plan.changed[1207:].tolist() == [7] * (len(wanted) - 1207)


def test_a_shorter_prompt_is_all_kept() -> None:
    """What is cut off costs nothing, and makes nothing stale."""
    plan = plan_from(base_of(OLD), OLD[:700])
    assert (plan.computed, plan.kept, plan.exact, plan.staleness) == (0, 700, 700, 0.0)


def test_the_context_that_computes_least_is_taken() -> None:
    """Of some that were edited more and less, and of one that has nothing to do with it."""
    wanted = joined(OLD[:300], text(40, 3), OLD[300:])
    near = base_of(joined(OLD[:300], text(40, 3), OLD[310:]))
    bases = [base_of(OLD[::-1]), base_of(OLD), near, base_of(joined(text(100, 4), OLD[:1500]))]
    assert chosen(bases, wanted, 1700).base is near


def test_of_two_that_compute_the_same_the_fresher_is_taken() -> None:
    """Not the one that was updated more before."""
    wanted = joined(OLD[:300], text(40, 3), OLD[300:])
    fresh = base_of(OLD, changed=1)
    assert chosen([base_of(OLD, changed=9), fresh, base_of(OLD, changed=5)], wanted, 1700).base is fresh


def test_what_is_not_cheaper_is_not_updated() -> None:
    """To compute exactly what is not shared is better then."""
    wanted = joined(OLD[:300], text(40, 3), OLD[300:])
    assert choose([base_of(OLD)], wanted, 40 + SETTLE, "inplace", FAR) is None
    assert chosen([base_of(OLD)], wanted, 40 + SETTLE + 1).computed == 40 + SETTLE
    assert choose([], wanted, 1700, "inplace", FAR) is None
    assert choose([base_of(text(500, 9))], wanted, len(wanted), "inplace", FAR) is None


def test_contexts_that_do_not_fit_are_passed_over() -> None:
    """One that another process made in a larger context cannot be loaded into this one."""
    wanted = joined(OLD[:300], text(4, 3), OLD[300:1000])
    long, short = base_of(OLD), base_of(OLD[:900])
    assert chosen([long, short], wanted, 700, n_ctx=1999).base is short
    assert chosen([long, short], wanted, 700, n_ctx=2000).base is long
    assert choose([long], wanted, 700, "inplace", 1999) is None


def test_too_stale_a_plan_comes_only_without_another() -> None:
    """Even if it computes less."""
    wanted = joined(OLD[:300], text(4, 3), OLD[300:])
    stale = base_of(OLD, changed=len(OLD))
    dear = base_of(joined(OLD[:300], OLD[900:]))
    assert plan_from(stale, wanted).staleness > inplace.STALEST
    assert plan_from(stale, wanted).computed < plan_from(dear, wanted).computed
    assert chosen([stale, dear], wanted, 1700).base is dear
    assert chosen([stale], wanted, 1700).base is stale
    assert choose([stale], wanted, 1700, "auto", FAR) is None


def test_auto_wants_to_save_many_tokens() -> None:
    """Those that are not computed have to be 512 at least."""
    wanted = joined(OLD[:300], text(1, 3), OLD[300:])
    computed = 1 + SETTLE
    assert computed * inplace._AUTO_TIMES < inplace._AUTO_TOKENS
    enough = computed + inplace._AUTO_TOKENS
    assert chosen([base_of(OLD)], wanted, enough, "auto").computed == computed
    assert choose([base_of(OLD)], wanted, enough - 1, "auto", FAR) is None
    assert choose([base_of(OLD)], wanted, enough - 1, "inplace", FAR) is not None


def test_auto_wants_to_save_a_large_share() -> None:
    """Three times what is computed, at least."""
    added = 160
    wanted = joined(OLD[:1700], text(added, 3), OLD[1700:])
    computed = added + SETTLE
    assert computed * inplace._AUTO_TIMES > inplace._AUTO_TOKENS
    enough = computed + inplace._AUTO_TIMES * computed
    assert chosen([base_of(OLD)], wanted, enough, "auto").computed == computed
    assert choose([base_of(OLD)], wanted, enough - 1, "auto", FAR) is None


def test_auto_wants_a_context_that_is_not_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is just as stale as may be is taken, one that is staler is not."""
    wanted = joined(OLD[:300], text(1, 3), OLD[300:])
    share = plan_from(base_of(OLD, changed=50), wanted).kept_staleness
    monkeypatch.setattr(inplace, "_AUTO_STALEST", share)
    assert chosen([base_of(OLD, changed=50)], wanted, 1700, "auto").kept_staleness == share
    assert choose([base_of(OLD, changed=51)], wanted, 1700, "auto", FAR) is None
    assert choose([base_of(OLD, changed=51)], wanted, 1700, "inplace", FAR) is not None


def test_auto_takes_another_context_if_the_cheapest_is_too_stale() -> None:
    """The bounds hold for each, not for the best alone."""
    wanted = joined(OLD[:300], text(4, 3), OLD[300:])
    stale, dear = base_of(OLD, changed=120), base_of(joined(OLD[:300], OLD[350:]))
    assert chosen([stale, dear], wanted, 1700, "inplace").base is stale
    assert chosen([stale, dear], wanted, 1700, "auto").base is dear


@given(st.lists(st.tuples(st.integers(0, 1900), st.integers(0, 60), st.integers(0, 60)), max_size=5))
def test_updates_of_updates_add_up(steps: list[tuple[int, int, int]]) -> None:
    """What was changed before is remembered by each token until it is computed again."""
    base = base_of(OLD)
    for number, (place, removed, added) in enumerate(steps):
        wanted = joined(base.tokens[:place], text(added, number + 1), base.tokens[place + removed :])
        plan = plan_from(base, wanted)
        edits = edits_between(base.tokens, wanted)
        wide = settled(edits, len(base.tokens), SETTLE)
        assert plan.changed.tolist() == changes_before(edits, wide, base.changed, len(wanted)).tolist()
        total = sum(edit.size for edit in edits)
        assert plan.changed.max(initial=0) <= base.changed.max(initial=0) + total
        for edit in plan.edits:
            assert not plan.changed[edit.new_start : edit.new_end].any()
        base = replace(base, tokens=wanted, changed=plan.changed, exact=plan.exact)
        assert not base.changed[: base.exact].any()


def test_staleness_grows_from_update_to_update() -> None:
    """Until the context is too stale to be updated again."""
    base, shares = base_of(OLD), []
    for number in range(8):
        wanted = joined(base.tokens[:100], text(200, number + 1), base.tokens[300:])
        plan = plan_from(base, wanted)
        shares.append(plan.staleness)
        base = Base(wanted, plan.changed, plan.exact)
    assert shares == sorted(shares)
    assert shares[0] < inplace.STALEST < shares[-1]


def test_what_is_only_appended_is_computed_exactly() -> None:
    """Nothing is kept behind it, so an update would save nothing, and leave a context that is not exact."""
    assert choose([base_of(OLD)], joined(OLD, text(100, 3)), 436, "inplace", FAR) is None
    updated = replace(base_of(OLD, changed=3), exact=0)
    assert chosen([updated], joined(OLD, text(100, 3)), 2100).computed == 100


def test_a_plan_is_too_stale_by_what_it_keeps() -> None:
    """What is computed anew does not make up for the rest."""
    half = len(OLD) // 2
    plan = plan_from(base_of(OLD), joined(OLD[half:], OLD[:half]))
    assert plan.staleness < inplace.STALEST < plan.kept_staleness


def test_less_stale_is_worth_some_computing() -> None:
    """A stale context that needs nothing is not taken in place of one that is exact but for a line."""
    stale, near = base_of(OLD, changed=1500), base_of(joined(OLD[:300], text(20, 3), OLD[320:]))
    assert chosen([stale, near], OLD, 1700).base is near
