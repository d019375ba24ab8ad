"""Needles that share no word with the question about them: what links the two has to be known or inferred.

All questions of a length are asked of one haystack, or of a few where there are too few pairs for one, and
a longer haystack begins with the shorter one. So a haystack consists of spans: the shortest one, and what
each length adds to it. Needles stay where they are, and come to be in other depth rows as the haystack grows;
new ones are added for the rows that lack some.
"""

from __future__ import annotations

import random
import re
import sys
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal, get_args

from m3cli.tasks.evaluate.placing import Filler
from m3cli.tasks.evaluate.trial import Question, TooShortError, Trial

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from m3cli.tasks.evaluate.trial import Group, Material, Measure, Scope

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Language = Literal["en", "zh", "ja", "ar", "ru", "es", "hi"]
LANGUAGES: tuple[Language, ...] = get_args(Language)

MAX_TOKENS = 24
OPENING = "The following text contains facts about people to memorize.\n"
QUESTION = "\n\nInfer it from one of the facts in the text above: {question} Answer with the name alone."

# A needle may be so far from its aim, as a share of the haystack, of a depth row, and in tokens.
_TOLERANCE = 0.01
_ROW_TOLERANCE = 0.1
_MOST_TOLERANCE = 64
_DRAWS = 200

_ENDS = (re.compile(r"\n|[.!?](?=\s)|[。！？।؟]"), re.compile(r"(?<=\S)(?=\s)"))  # of sentences, of words


@dataclass(frozen=True, slots=True)
class Pair:
    """A question, and what answers it in each language, with `{name}` where the answer stands.

    No other pair is about the same topic, and none answers the question of another one.
    """

    topic: str
    question: str
    needles: dict[Language, str]


@cache
def pairs() -> tuple[Pair, ...]:
    """All pairs, in the order of the file they come in."""
    return tuple(
        Pair(entry["topic"], entry["question"], {language: entry[language] for language in LANGUAGES})
        for entry in _data()["pair"]
    )


@cache
def names() -> tuple[str, ...]:
    """The names of the people, at least as many as there are pairs."""
    return tuple(_data()["names"])


@cache
def _data() -> dict[str, Any]:
    file = resources.files("m3cli.tasks.evaluate") / "meaning.toml"
    data: dict[str, Any] = tomllib.loads(file.read_text("utf-8"))
    return data


@dataclass(frozen=True, slots=True)
class Spot:
    """A needle with the name in it, and the haystack's tokens that ought to stand before it."""

    pair: Pair
    name: str
    text: str
    aim: int


@dataclass(frozen=True, slots=True)
class Asked:
    """A needle that is asked for as the `sample` of a depth row."""

    row: int
    sample: int
    spot: Spot


@dataclass(frozen=True, slots=True)
class Plan:
    """What stands in a haystack: by length its tokens, how exactly they are met, and what is asked.

    The opening does not count.
    """

    rooms: dict[int, int]
    slacks: dict[int, int]
    asked: dict[int, tuple[Asked, ...]]
    spots: tuple[Spot, ...]


class MeaningTask:
    """Questions about needles in one language. No needle comes twice in a haystack."""

    group: Group = "meaning"

    def __init__(self, language: Language, material: Material, measure: Measure, scope: Scope) -> None:
        self.name = "meaning" if language == "en" else f"meaning_{language}"
        self._language = language
        self._measure = measure
        self._scope = scope
        self._filler = Filler(material.text, measure)

    def trials(self, length: int) -> Iterator[Trial]:
        """The trials of one of the scope's lengths. Raises TooShortError."""
        if not self._haystacks or length not in self._haystacks[0].plan.rooms:
            raise TooShortError("needles would take more than half of it")
        return map(partial(self._trial, length), self._haystacks)

    def _trial(self, length: int, haystack: _Haystack) -> Trial:
        parts, tokens = haystack.up_to(length)
        questions = tuple(
            _question(
                asked.spot.pair,
                asked.spot.name,
                f"{asked.row}.{asked.sample} {asked.spot.pair.topic}",
                haystack.before[asked.spot.aim] / tokens,
            )
            for asked in haystack.plan.asked[length]
        )
        return Trial(
            self.name, self.group, length, MAX_TOKENS, questions, parts=(OPENING, *parts), nested=True
        )

    @cached_property
    def plans(self) -> list[Plan]:
        """Those of as few haystacks as will do; without the shortest lengths if these are too short."""
        lengths, asked = self._scope.lengths, self._scope.depths * self._scope.samples
        for first in range(len(lengths)):
            for count in range(1, asked + 1):
                planned: list[Plan] = []
                while len(planned) < count and (plan := self._plan(lengths[first:], len(planned), count)):
                    planned.append(plan)
                if len(planned) == count:
                    return planned
        return []

    @cached_property
    def _haystacks(self) -> list[_Haystack]:
        return [_Haystack(plan, self._filler, self._measure) for plan in self.plans]

    def _plan(self, lengths: Sequence[int], number: int, count: int) -> Plan | None:
        """The plan of one of `count` haystacks, None if that needs too many needles."""
        rng = random.Random(f"{self._scope.seed} {self.name} {number}")
        order = rng.sample(pairs(), len(pairs()))
        people = rng.sample(names(), len(order))
        depths, samples = self._scope.depths, self._scope.samples
        wanted = [
            [sample for sample in range(samples) if (row * samples + sample) % count == number]
            for row in range(depths)
        ]
        spots: list[Spot] = []
        rooms: dict[int, int] = {}
        slacks: dict[int, int] = {}
        by_length: dict[int, tuple[Asked, ...]] = {}
        for length in lengths:
            # 1. The tokens of the haystack: how many depends on the questions, which are not known yet.
            least, most = self._room(length, pairs()), self._room(length, [self._shortest])
            start = max(rooms.values(), default=0)
            if self._longest * max(map(len, wanted)) > least / depths / 2:
                return None
            slack = _slack(least, depths)
            gap = self._longest + 2 * slack
            # 2. Needles for the rows that lack some.
            found: list[Asked] = []
            for row, numbers in enumerate(wanted):
                # The end of the haystack may be as far from its aim as a needle.
                low, high = row * most / depths + slack, (row + 1) * least / depths - 2 * slack
                inside = [spot for spot in spots if low <= spot.aim < high]
                while len(inside) < len(numbers):
                    taken = [spot.aim for spot in spots]
                    ends = [*rooms.values(), least]
                    # Where shorter haystacks do not reach, if the row does.
                    aim = _draw(rng, max(low, start), high, gap, taken, ends)
                    if aim is None:
                        aim = _draw(rng, low, high, gap, taken, ends)
                    if aim is None or len(spots) == len(order):
                        return None
                    pair, name = order[len(spots)], people[len(spots)]
                    spots.append(Spot(pair, name, pair.needles[self._language].format(name=name), aim))
                    inside.append(spots[-1])
                found += [Asked(row, *both) for both in zip(numbers, inside, strict=False)]
            # 3. The tokens of the haystack, now that the questions are known.
            room = self._room(length, [asked.spot.pair for asked in found])
            if room < start:
                return None
            rooms[length], slacks[length], by_length[length] = room, slack, tuple(found)
        return Plan(rooms, slacks, by_length, tuple(spots))

    def _room(self, length: int, asked: Sequence[Pair]) -> int:
        """Tokens of a haystack without its opening, beside the longest of these questions."""
        longest = max(self._asking[pair.topic] for pair in asked)
        return length - MAX_TOKENS - longest - self._measure.count([OPENING])

    @cached_property
    def _asking(self) -> dict[str, int]:
        """By topic, tokens of a prompt that has no haystack."""
        return {pair.topic: -self._measure.room(0, 0, [_question(pair, "", "", None)]) for pair in pairs()}

    @cached_property
    def _shortest(self) -> Pair:
        """The pair with the question of the fewest tokens."""
        return min(pairs(), key=lambda pair: self._asking[pair.topic])

    @cached_property
    def _longest(self) -> int:
        """Tokens of the longest needle, about."""
        name = max(names(), key=lambda name: self._measure.count([name]))
        texts = [pair.needles[self._language].format(name=name) for pair in pairs()]
        return max(self._measure.count([f"\n{text}\n"]) for text in texts) + 2


class _Haystack:
    """The text of a plan, as far as it was wanted. `before` has, by aim, the tokens before needles."""

    def __init__(self, plan: Plan, filler: Filler, measure: Measure) -> None:
        self.plan = plan
        self.before: dict[int, int] = {}
        self._filler = filler
        self._measure = measure
        self._parts: list[str] = []
        self._place = 0  # in the filler
        self._tokens = 0
        self._ends: dict[int, tuple[int, int]] = {}  # by length: parts and their tokens

    def up_to(self, length: int) -> tuple[list[str], int]:
        """The parts of the haystack of a length, and their tokens."""
        for planned in self.plan.rooms:
            if planned <= length and planned not in self._ends:
                self._add_span(planned)
        parts, tokens = self._ends[length]
        return self._parts[:parts], tokens

    def _add_span(self, length: int) -> None:
        room = self.plan.rooms[length]
        start = max((self.plan.rooms[shorter] for shorter in self._ends), default=0)
        slack = self.plan.slacks[length]
        inside = [spot for spot in self.plan.spots if start <= spot.aim < room]
        for spot in sorted(inside, key=lambda spot: spot.aim):
            self._fill(spot.aim, slack, slack)
            self.before[spot.aim] = self._tokens
            own_line = not self._parts or self._parts[-1].endswith("\n")
            self._parts.append(spot.text + "\n" if own_line else f"\n{spot.text}\n")
            self._tokens += self._measure.count(self._parts[-1:])
        self._fill(room, slack // 2, 0)
        self._ends[length] = len(self._parts), self._tokens

    def _fill(self, aim: int, below: int, above: int) -> None:
        """Add filler up to `aim` tokens, or to where a line, sentence or word ends so few below or above."""
        filler, start, tokens = self._filler, self._place, max(0, aim - self._tokens)
        nearest = filler.after(start, tokens)
        places = [place for ends in _ENDS for place in filler.ends_near(ends, nearest, start)]
        fitting = (place for place in places if -below <= filler.count(start, place) - tokens <= above)
        self._place = next(fitting, nearest)
        self._parts += filler.pieces(start, self._place)
        self._tokens += filler.count(start, self._place)


def _question(pair: Pair, name: str, identity: str, depth: float | None) -> Question:
    text = QUESTION.format(question=pair.question)
    return Question(identity, text, (name,), depth, scoring="words")


def _slack(room: int, depths: int) -> int:
    """Tokens that a needle, and the end of the haystack, may be from their aims."""
    return int(min(_TOLERANCE * room, _ROW_TOLERANCE * room / depths, _MOST_TOLERANCE))


def _draw(
    rng: random.Random, low: float, high: float, gap: int, taken: Sequence[int], ends: Sequence[int]
) -> int | None:
    """A random aim in a range, `gap` from those taken and before the ends of spans, or None."""
    for _ in range(_DRAWS if low < high else 0):
        aim = int(rng.uniform(low, high))
        if all(abs(aim - other) >= gap for other in taken) and not any(0 < end - aim < gap for end in ends):
            return aim
    return None


TASKS: dict[str, Callable[[Material, Measure, Scope], MeaningTask]] = {
    "meaning" if language == "en" else f"meaning_{language}": partial(MeaningTask, language)
    for language in LANGUAGES
}
