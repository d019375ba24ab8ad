"""Which context to update in place for a prompt, and whether that is worth what it costs in truth.

What is kept behind an edit was computed with the old text before it. A few tokens behind each edit are
computed again, as they attend most to what is near; how much of what the others attend to has changed is
their staleness, which grows from update to update and is kept with the context.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from m3cli.engine.edits import changes_before, edits_between, settled, staleness

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from m3cli.engine.edits import Edit
    from m3cli.engine.events import Update
    from m3cli.engine.snapshots import Entry

STALEST = 0.5  # beyond, what would be kept of a context is computed anew
_SETTLE = 64  # tokens behind each edit that are computed with it
# `auto` updates in place only what is less stale than this, for a saving of so many tokens and so many
# times what is computed.
_AUTO_STALEST = 0.1
_AUTO_TOKENS, _AUTO_TIMES = 512, 3
_WEIGHT = 0.1  # of a token that is all stale, beside one that is computed


@dataclass(frozen=True, slots=True)
class Base:
    """A context that was computed: on the disk, or in the KV cache if there is no `entry`.

    The first `exact` tokens are as a run without reuse would have them; `changed` is that of
    m3cli.engine.edits.
    """

    tokens: NDArray[np.int32]
    changed: NDArray[np.int32]
    exact: int
    entry: Entry | None = None


@dataclass(frozen=True)
class Plan:
    """How to make one context of another: `edits` with what is computed behind each, of `count` edits."""

    base: Base
    edits: Sequence[Edit]
    count: int
    changed: NDArray[np.int32]

    @property
    def computed(self) -> int:
        """How many tokens are to be computed."""
        return self.computed_before(len(self.changed))

    def computed_before(self, place: int) -> int:
        """How many tokens before one are to be computed."""
        return sum(max(min(edit.new_end, place) - edit.new_start, 0) for edit in self.edits)

    @property
    def kept(self) -> int:
        """How many tokens are not."""
        return len(self.changed) - self.computed

    @property
    def exact(self) -> int:
        """How many of the first tokens are as they were computed exactly."""
        return min([self.base.exact, len(self.changed), *(edit.new_start for edit in self.edits[:1])])

    @cached_property
    def staleness(self) -> float:
        """That of the context afterwards."""
        return staleness(self.changed)

    @property
    def kept_staleness(self) -> float:
        """That of the tokens that are not computed, alone."""
        return self.staleness * len(self.changed) / max(self.kept, 1)


def plan_from(base: Base, wanted: NDArray[np.int32]) -> Plan:
    """How to make the context of `wanted` tokens of another one."""
    edits = edits_between(base.tokens, wanted)
    wide = settled(edits, len(base.tokens), _SETTLE)
    return Plan(base, wide, len(edits), changes_before(edits, wide, base.changed, len(wanted)))


def choose(
    bases: Iterable[Base], wanted: NDArray[np.int32], exactly: int, update: Update, n_ctx: int
) -> Plan | None:
    """The plan that costs least, if it computes less than `exactly` so many tokens.

    What is stale is a cost, too. A plan that is too stale is given if there is no other; see STALEST.
    """
    plans = [plan_from(base, wanted) for base in bases if len(base.tokens) <= n_ctx]
    # Where nothing is kept but what is exact, to compute the rest exactly costs no more.
    plans = [plan for plan in plans if plan.computed < exactly and plan.kept > plan.exact]
    if update == "auto":
        plans = [
            plan
            for plan in plans
            if plan.kept_staleness <= _AUTO_STALEST
            and exactly - plan.computed >= max(_AUTO_TOKENS, _AUTO_TIMES * plan.computed)
        ]

    def cost(plan: Plan) -> tuple[bool, float]:
        stale = plan.staleness * len(plan.changed)
        return plan.kept_staleness > STALEST, plan.computed + _WEIGHT * stale

    return min(plans, key=cost, default=None)
