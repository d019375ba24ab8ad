"""What changed between two sequences of tokens, and how much of what each token attends to.

Sequences are cut into pieces where their content says so (a hash of four tokens), as files are by backup
programs: then an insertion moves the pieces behind it and changes none. Pieces are compared by difflib,
and what differs is trimmed at both ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    Ids = NDArray[np.int32]

_WIDTH = 4  # tokens that decide whether a piece ends
_PIECE = 32  # tokens of a piece, on average
_SEED = 0x9E3779B97F4A7C15  # odd; the multiplier of Fibonacci hashing


@dataclass(frozen=True, slots=True)
class Edit:
    """Tokens `old_start` to `old_end` of one sequence became `new_start` to `new_end` of another."""

    old_start: int
    old_end: int
    new_start: int
    new_end: int

    @property
    def size(self) -> int:
        """How many tokens it changes: those it removes or those it adds, whichever are more."""
        return max(self.old_end - self.old_start, self.new_end - self.new_start)


def common_prefix(first: Ids, second: Ids) -> int:
    """Number of leading tokens in which two sequences agree."""
    length = min(len(first), len(second))
    differs = np.nonzero(first[:length] != second[:length])[0]
    return int(differs[0]) if len(differs) else length


def edits_between(old: Ids, new: Ids) -> list[Edit]:
    """The edits that make `new` of `old`, in order; between any two of them there is a token that stays."""
    start = common_prefix(old, new)
    end = common_prefix(old[start:][::-1], new[start:][::-1])
    mine, theirs = old[start : len(old) - end], new[start : len(new) - end]
    edits = []
    for edit in _between_pieces(mine, theirs):
        before, after = mine[edit.old_start : edit.old_end], theirs[edit.new_start : edit.new_end]
        head = common_prefix(before, after)
        tail = common_prefix(before[head:][::-1], after[head:][::-1])
        trimmed = Edit(
            start + edit.old_start + head,
            start + edit.old_end - tail,
            start + edit.new_start + head,
            start + edit.new_end - tail,
        )
        if trimmed.size:
            edits.append(trimmed)
    return edits


def settled(edits: Iterable[Edit], old_size: int, settle: int) -> list[Edit]:
    """`edits` with up to `settle` tokens behind each, which are to be computed with it.

    Those of a sequence of `old_size` tokens; edits that meet become one.
    """
    joined: list[Edit] = []
    for edit in edits:
        more = min(settle, old_size - edit.old_end)
        wide = Edit(edit.old_start, edit.old_end + more, edit.new_start, edit.new_end + more)
        if joined and joined[-1].old_end >= edit.old_start:
            last = joined.pop()
            wide = Edit(last.old_start, wide.old_end, last.new_start, wide.new_end)
        joined.append(wide)
    return joined


def changes_before(
    edits: Sequence[Edit], computed: Iterable[Edit], changed: NDArray[np.int32], new_size: int
) -> NDArray[np.int32]:
    """For each of `new_size` tokens: how many before it have changed since it was computed.

    `changed` says so of the old tokens, `edits` are what has changed, `computed` what is computed again.
    """
    counts = np.zeros(new_size, np.int32)
    old_place = new_place = total = 0
    for edit in [*edits, Edit(len(changed), len(changed), new_size, new_size)]:
        counts[new_place : edit.new_start] = changed[old_place : edit.old_start] + total
        old_place, new_place, total = edit.old_end, edit.new_end, total + edit.size
    for edit in computed:
        counts[edit.new_start : edit.new_end] = 0
    return counts


def staleness(changed: NDArray[np.int32]) -> float:
    """How much of what a token attends to has changed since it was computed, 0 to 1, on average."""
    if not len(changed):
        return 0.0
    return float(np.minimum(changed / np.maximum(np.arange(len(changed)), 1), 1.0).mean())


def runs_of(values: NDArray[np.int32]) -> list[list[int]]:
    """Values as runs: how many, and which."""
    if not len(values):
        return []
    starts = np.concatenate(([0], np.flatnonzero(np.diff(values)) + 1, [len(values)]))
    return [[int(end - start), int(values[start])] for start, end in pairwise(starts)]


def changed_of(runs: Sequence[Sequence[int]], size: int) -> NDArray[np.int32]:
    """The values of `size` tokens that such runs stand for; without runs, nothing has changed."""
    counts, values = [run[0] for run in runs], [run[1] for run in runs]
    return np.repeat(np.asarray(values, np.int32), counts) if runs else np.zeros(size, np.int32)


def _between_pieces(old: Ids, new: Ids) -> Iterator[Edit]:
    """Edits between two sequences, of whole pieces."""
    mine, theirs = _ends(old), _ends(new)
    # What is everywhere is not compared (`autojunk`): without that, repetitive files take hours.
    matcher = SequenceMatcher(None, _pieces(old, mine), _pieces(new, theirs))
    for kind, old_first, old_last, new_first, new_last in matcher.get_opcodes():
        if kind != "equal":
            yield Edit(mine[old_first], mine[old_last], theirs[new_first], theirs[new_last])


def _ends(tokens: Ids) -> list[int]:
    """Where pieces begin, and the end of the last."""
    ids: NDArray[Any] = tokens.astype(np.uint64)
    mixed = np.zeros(max(len(ids) - _WIDTH + 1, 0), np.uint64)
    for place in range(_WIDTH):
        mixed = (mixed ^ ids[place : place + len(mixed)]) * np.uint64(_SEED)
    cuts = np.flatnonzero((mixed >> np.uint64(32)) % np.uint64(_PIECE) == 0) + _WIDTH
    ends = [0, *map(int, cuts), len(tokens)]
    return ends[:-1] if ends[-2] == len(tokens) else ends


def _pieces(tokens: Ids, ends: Sequence[int]) -> list[bytes]:
    return [tokens[start:end].tobytes() for start, end in pairwise(ends)]
