"""Running text of a wanted number of tokens, and needles put into it at wanted depths.

A depth is the share of a haystack's tokens that stand before a needle; instructions before the haystack
are not part of it. Text is cut into blocks that are counted once and tokenized each on its own, so that
the tokens before any place are the blocks' sum and one count of a short text.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from m3cli.tasks.evaluate.trial import TooShortError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from m3cli.tasks.evaluate.trial import Measure, Scope

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

_BLOCK = 4000  # characters
_FIRST_BLOCKS = 4
# A needle may be so far from its aim, as a share of the haystack. Sentence ends are looked for a little
# closer, because the end of the text is not known to the token while needles are placed.
_TOLERANCE = 0.01
_REACHES = (0.008, 0.003, 0.0)
_EDGE = 0.005  # aims keep so far from the ends of a depth row, so that the needles stay in it
_DRAWS = 500
_SEARCHED = 20_000  # characters around an aim in which a sentence end is looked for

_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=[ \t])|[。！？]|\n")
_WORD_END = re.compile(r"(?<=\S)(?=\s)")

Row = tuple[float, float]
ANYWHERE: Row = (0.0, 1.0)


def random_of(scope: Scope, task: str, length: int, sample: object) -> random.Random:
    """The random numbers of one trial: the same on any machine."""
    return random.Random(f"{scope.seed} {task} {length} {sample}")


def rows_of(scope: Scope) -> list[Row]:
    """The depth rows: row i of n is [i / n, (i + 1) / n)."""
    return [(row / scope.depths, (row + 1) / scope.depths) for row in range(scope.depths)]


def batches(scope: Scope, size: int) -> list[list[tuple[int, int]]]:
    """All (row, sample), `size` at a time, so that those of a batch are of different rows if rows suffice."""
    pairs = [(row, sample) for sample in range(scope.samples) for row in range(scope.depths)]
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]


def draw_aims(rng: random.Random, rows: Sequence[Row], sizes: Sequence[int], room: int) -> list[float]:
    """A depth in each of `rows`, so that needles of `sizes` tokens do not overlap in `room` tokens.

    Raises TooShortError when there seem to be none.
    """
    free = room - sum(sizes)
    if free >= 0 and all(row == ANYWHERE for row in rows):
        # Any order of needles, and any room before each, is as likely as any other.
        gaps = sorted(rng.uniform(0, free) for _ in sizes)
        order = rng.sample(range(len(sizes)), len(sizes))
        places = {
            index: gap + sum(sizes[other] for other in order[:position])
            for position, (index, gap) in enumerate(zip(order, gaps, strict=True))
        }
        return [places[index] / max(1, room) for index in range(len(sizes))]
    for _ in range(_DRAWS):
        aims = [rng.uniform(low + _EDGE, high - _EDGE) for low, high in rows]
        end = 0.0
        for aim, size in sorted(zip(aims, sizes, strict=True)):
            if aim * room < end:
                break
            end = aim * room + size
        else:
            if end <= room:
                return aims
    raise TooShortError("its needles do not fit into the depth rows")


class Filler:
    """Text to read on in, again from its beginning when it ends; the noise sentences if there is none.

    A place in it is a number of characters before. `text` is as much of it as was wanted so far.
    """

    def __init__(self, text: str, measure: Measure) -> None:
        unit = text if text.strip() else NOISE
        self.unit = unit if unit.endswith("\n") else unit + "\n"
        self.text = ""
        self._measure = measure
        self._starts = [0]  # places of the blocks, and the end of the last one
        self._sums = [0]  # tokens before each of these

    def grow(self, tokens: int) -> None:
        """Have more than so many tokens."""
        while self._sums[-1] <= tokens:
            known = len(self._sums) - 1
            missing = (tokens - self._sums[-1]) * known // max(1, self._sums[-1]) + 1 if known else 0
            for _ in range(max(_FIRST_BLOCKS, missing)):
                self._add_block()

    def _add_block(self) -> None:
        start = self._starts[-1]
        if len(self.text) < start + _BLOCK:
            # Twice as much each time, for adding to a long text copies it.
            wanted = max(2 * _BLOCK, len(self.text))
            self.text += self.unit * -(-wanted // len(self.unit))
        end = start + _BLOCK
        # Tokens of most vocabularies begin with the blank before a word.
        words = list(_WORD_END.finditer(self.text, end - _BLOCK // 10, end))
        end = words[-1].start() if words else end
        self._starts.append(end)
        self._sums.append(self._sums[-1] + self._measure.count([self.text[start:end]]))

    def pieces(self, start: int, end: int) -> list[str]:
        """The text between two places, cut where blocks end."""
        first, last = bisect_right(self._starts, start), bisect_right(self._starts, end)
        places = [start, *self._starts[first:last], end]
        return [self.text[a:b] for a, b in pairwise(places) if a < b]

    def count(self, start: int, end: int) -> int:
        """Tokens of the pieces between two places."""
        first, last = bisect_right(self._starts, start), bisect_right(self._starts, end) - 1
        if first > last:
            return self._measure.count([self.text[start:end]])
        ends = [self.text[start : self._starts[first]], self.text[self._starts[last] : end]]
        return self._sums[last] - self._sums[first] + self._measure.count([text for text in ends if text])

    def after(self, start: int, tokens: int) -> int:
        """The last place with at most so many tokens between `start` and it."""
        next_block = bisect_right(self._starts, start)
        self.grow(self._sums[min(next_block, len(self._sums) - 1)] + tokens)
        next_block = bisect_right(self._starts, start)
        head = self._measure.count([self.text[start : self._starts[next_block]]])
        if tokens < head:
            return self._within(start, self._starts[next_block], tokens)
        wanted = self._sums[next_block] + tokens - head
        block = bisect_right(self._sums, wanted) - 1
        return self._within(self._starts[block], self._starts[block + 1], wanted - self._sums[block])

    def _within(self, start: int, end: int, tokens: int) -> int:
        """The last place in a piece with at most so many tokens between its start and it."""
        low, high = start, end
        while high - low > 1:
            middle = (low + high) // 2
            if self._measure.count([self.text[start:middle]]) <= tokens:
                low = middle
            else:
                high = middle
        return low

    def ends_near(self, ends: re.Pattern[str], place: int, floor: int) -> list[int]:
        """The places nearest to `place`, not before `floor`, where a sentence or a word ends."""
        first = max(floor, place - _SEARCHED)
        found = [match.end() for match in ends.finditer(self.text, first, place + _SEARCHED)]
        if floor == 0:
            found.append(0)
        return sorted(found, key=lambda end: (abs(end - place), end))[:4]

    def word_end(self, start: int, end: int) -> int:
        """The last place up to `end` where a word ends; `end` if none does after `start`."""
        words = list(_WORD_END.finditer(self.text, max(start, end - _BLOCK), end + 1))
        return words[-1].start() if words else end


@dataclass(frozen=True, slots=True)
class Needle:
    """A sentence to be put where the share `aim` of the haystack is before it, within `row`."""

    text: str
    aim: float
    row: Row = ANYWHERE


@dataclass(frozen=True, slots=True)
class Haystack:
    """Texts, each tokenized on its own, and the depth of each needle in them, in the order given."""

    parts: tuple[str, ...]
    depths: tuple[float, ...]


def needle_size(text: str, measure: Measure) -> int:
    """Tokens that a needle takes, at most: blanks or newlines around it may be more."""
    return measure.count([f" {text}\n"]) + 2


def bury(
    filler: Filler, needles: Sequence[Needle], room: int, measure: Measure, tolerance: float = _TOLERANCE
) -> Haystack:
    """`filler` from its beginning with `needles` in it, as near below `room` tokens as words end.

    A needle goes to the end of a sentence or line if one is near enough, else to that of a word, else,
    where words are not told apart, between two characters: at most `tolerance`, a share of the haystack,
    from its aim. Needles of about the same aim stand in the order given. Raises TooShortError when that
    cannot be.
    """
    if room < sum(needle_size(needle.text, measure) for needle in needles):
        raise TooShortError("its needles alone are longer")
    filler.grow(room)
    for reach in _REACHES:
        haystack = _bury(filler, needles, room, measure, reach)
        if haystack and all(
            abs(depth - needle.aim) <= tolerance and needle.row[0] <= depth < needle.row[1]
            for depth, needle in zip(haystack.depths, needles, strict=True)
        ):
            return haystack
    raise TooShortError("its needles cannot be placed so exactly")


def _bury(
    filler: Filler, needles: Sequence[Needle], room: int, measure: Measure, reach: float
) -> Haystack | None:
    """A haystack with needles at most the share `reach` from where they ought to be, None if they overlap."""
    order = sorted(range(len(needles)), key=lambda index: needles[index].aim)
    sizes = [needle_size(needles[index].text, measure) for index in order]
    parts: list[str] = []
    before = [0] * len(needles)
    place, tokens = 0, 0
    for position, index in enumerate(order):
        needle = needles[index]
        latest = min(needle.row[1] * room - 1, room - sum(sizes[position:]))
        earliest = needle.row[0] * room
        bounds = (int(max(0, earliest - tokens)), int(latest - tokens))
        if bounds[1] < 0:
            return None
        start, place = place, _place(filler, place, needle.aim * room - tokens, bounds, reach * room)
        parts += filler.pieces(start, place)
        tokens += filler.count(start, place)
        before[index] = tokens
        text = _in_place(needle.text, filler.text, place)
        parts.append(text)
        tokens += measure.count([text])
    if tokens > room:
        return None
    end = filler.after(place, room - tokens)
    word_end = filler.word_end(place, end)
    if filler.count(word_end, end) <= reach / 2 * room:
        end = word_end
    parts += filler.pieces(place, end)
    total = tokens + filler.count(place, end)
    return Haystack(tuple(parts), tuple(count / total for count in before))


def _place(filler: Filler, start: int, tokens: float, bounds: tuple[int, int], reach: float) -> int:
    """The place about `tokens` after `start` where a needle goes, within bounds that are tokens, too."""
    wanted = min(max(tokens, bounds[0], 0), bounds[1])
    nearest = filler.after(start, round(wanted))
    for ends in (_SENTENCE_END, _WORD_END):
        for place in filler.ends_near(ends, nearest, start):
            count = filler.count(start, place)
            if abs(count - wanted) <= reach and bounds[0] <= count <= bounds[1]:
                return place
    return nearest


def _in_place(needle: str, text: str, place: int) -> str:
    """A needle with what sets it off from its neighbours: a line of its own where a line begins."""
    if place == 0 or text[place - 1] == "\n":
        return needle + "\n"
    left = "" if text[place - 1].isspace() else " "
    return left + needle + ("" if text[place].isspace() else " ")


def largest(tokens: Callable[[int], int], room: int, least: int) -> int:
    """The largest number, from `least` on, with `tokens` of at most `room`; to 0.1 % of the room.

    `tokens` rises about evenly. Raises TooShortError when that of `least` is more.
    """
    low, low_tokens = least, tokens(least)
    if low_tokens > room:
        raise TooShortError("its smallest text is longer")
    # 1. A number that is too large.
    high, high_tokens = max(2 * least, 16), tokens(max(2 * least, 16))
    while high_tokens <= room:
        low, low_tokens = high, high_tokens
        high = max(high + 1, min(4 * high, high * room // max(1, high_tokens) * 51 // 50 + 8))
        high_tokens = tokens(high)
    # 2. Between the two, as if tokens rose on a line; every other time in the middle, for they do not.
    halve = False
    while high - low > 1 and room - low_tokens > room // 1000:
        share = 0.5 if halve else (room - low_tokens) / (high_tokens - low_tokens)
        number = min(max(low + int((high - low) * share), low + 1), high - 1)
        number_tokens = tokens(number)
        if number_tokens <= room:
            low, low_tokens = number, number_tokens
        else:
            high, high_tokens = number, number_tokens
        halve = not halve
    return low
