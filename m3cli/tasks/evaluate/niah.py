"""RULER's eight retrieval tasks: needles in a haystack, by kind of haystack, of key and of value.

Sentences, questions and parameters are those of RULER (Hsieh et al. 2024, "RULER: What's the Real Context
Size of Your Long-Context Language Models?"). Other than there, the running text is the material as it is
instead of Paul Graham's essays, needles are put at depths that cover the haystack evenly, and as many
questions as RULER's definition of a task allows are asked of one haystack:

- single: the haystacks of a length differ in the needle only, and the deepest comes first, so that what
  stands before the needle is the same as in the haystack before;
- multikey with running text: each of the four keys is asked for;
- multikey with a haystack of needles: each needle can be asked for, so one haystack serves all depths,
  unless it has fewer lines at a depth than questions are wanted there.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from m3cli.tasks.evaluate.placing import (
    ANYWHERE,
    NOISE,
    Filler,
    Needle,
    batches,
    bury,
    draw_aims,
    needle_size,
    random_of,
    rows_of,
)
from m3cli.tasks.evaluate.trial import Question, TooShortError, Trial
from m3cli.tasks.evaluate.words import Names, number, pair, uuid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Literal

    from m3cli.tasks.evaluate.trial import Group, MakeTask, Material, Measure, Scope, Task

_MAX_TOKENS = 128
_MAKERS = {"words": pair, "numbers": number, "uuids": uuid}
_SAMPLE_LINES = 50  # of which the tokens of a line are known well enough


@dataclass(frozen=True, slots=True)
class Kind:
    """A row of RULER's table: what haystack, keys and values are, and how many are in it and asked for."""

    haystack: Literal["noise", "text", "needles"]
    key: Literal["words", "uuids"]
    value: Literal["numbers", "uuids"]
    keys: int = 1
    values: int = 1
    queries: int = 1

    @property
    def needles(self) -> int:
        """How many needles are in a haystack of running text."""
        return max(self.keys, self.queries) * self.values


KINDS: Mapping[str, Kind] = {
    "niah_single_1": Kind("noise", "words", "numbers"),
    "niah_single_2": Kind("text", "words", "numbers"),
    "niah_single_3": Kind("text", "words", "uuids"),
    "niah_multikey_1": Kind("text", "words", "numbers", keys=4),
    "niah_multikey_2": Kind("needles", "words", "numbers"),
    "niah_multikey_3": Kind("needles", "uuids", "uuids"),
    "niah_multivalue": Kind("text", "words", "numbers", values=4),
    "niah_multiquery": Kind("text", "words", "numbers", queries=4),
}


def needle_of(kind: Kind, key: str, value: str) -> str:
    """The sentence that says what is asked for; its plural is RULER's."""
    return f"One of the special magic {kind.value} for {key} is: {value}."


def opening_of(kind: Kind) -> str:
    """What stands before the haystack."""
    if kind.queries * kind.values == 1:
        return (
            f"A special magic {kind.value[:-1]} is hidden within the following text. "
            f"Make sure to memorize it. I will quiz you about the {kind.value[:-1]} afterwards.\n"
        )
    return (
        f"Some special magic {kind.value} are hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {kind.value} afterwards.\n"
    )


def question_of(kind: Kind, name: str, keys: Sequence[str], answers: Sequence[str]) -> Question:
    """The question for the values of `keys`, on a new line."""
    query = ", ".join(keys[:-1]) + f", and {keys[-1]}" if len(keys) > 1 else keys[0]
    if kind.queries * kind.values == 1:
        subject = f"special magic {kind.value[:-1]} for {query} mentioned in the provided text"
        text, lead = f"\nWhat is the {subject}?", f" The {subject} is"
    else:
        subject = f"special magic {kind.value} for {query} mentioned in the provided text"
        text, lead = f"\nWhat are all the {subject}?", f" The {subject} are"
    return Question(name, text, tuple(answers), lead=lead)


class _Niah:
    """What the tasks have in common. `filler` is the running text, the same for all trials."""

    group: Group = "retrieval"

    def __init__(self, name: str, material: Material, measure: Measure, scope: Scope) -> None:
        self.name = name
        self._kind = KINDS[name]
        self._measure = measure
        self._scope = scope
        self._filler = Filler(material.text if self._kind.haystack == "text" else NOISE, measure)

    def _room(self, length: int, questions: Sequence[Question]) -> int:
        """Tokens of the haystack itself."""
        opening = self._measure.count([opening_of(self._kind)])
        return self._measure.room(length, _MAX_TOKENS, questions) - opening

    def _trial(self, length: int, questions: Sequence[Question], parts: Sequence[str]) -> Trial:
        parts = (opening_of(self._kind), *parts)
        return Trial(self.name, self.group, length, _MAX_TOKENS, tuple(questions), parts)

    def _needles(self, names: Names) -> list[tuple[str, str]]:
        """Keys and values of the needles, those of a key together."""
        kind = self._kind
        keys = [names.new(_MAKERS[kind.key]) for _ in range(max(kind.keys, kind.queries))]
        return [(key, names.new(_MAKERS[kind.value])) for key in keys for _ in range(kind.values)]


class _ByDepth(_Niah):
    """single_* and multikey_1: each question is for one needle, of a wanted depth."""

    def trials(self, length: int) -> Iterator[Trial]:
        """One trial for every so many depths as there are needles, deepest first where it is one."""
        trials = [self._buried(length, batch) for batch in batches(self._scope, self._kind.needles)]
        if self._kind.needles == 1:
            trials.sort(key=lambda trial: -(trial.questions[0].depth or 0.0))
        return iter(trials)

    def _buried(self, length: int, batch: Sequence[tuple[int, int]]) -> Trial:
        row, sample = batch[0]
        rng = random_of(self._scope, self.name, length, f"{row}.{sample}")
        needles = self._needles(Names(rng, self._filler.unit))
        asked = [
            question_of(self._kind, f"{row}.{sample}", [key], [value])
            for (row, sample), (key, value) in zip(batch, needles, strict=False)
        ]
        # The last trial may have needles that nobody asks for.
        rows = [rows_of(self._scope)[row] for row, _ in batch] + [ANYWHERE] * (len(needles) - len(batch))
        room = self._room(length, asked)
        texts = [needle_of(self._kind, key, value) for key, value in needles]
        aims = draw_aims(rng, rows, [needle_size(text, self._measure) for text in texts], room)
        haystack = bury(
            self._filler,
            [Needle(*parts) for parts in zip(texts, aims, rows, strict=True)],
            room,
            self._measure,
        )
        questions = [
            replace(question, depth=depth) for question, depth in zip(asked, haystack.depths, strict=False)
        ]
        return self._trial(length, questions, haystack.parts)


class _Together(_Niah):
    """multivalue and multiquery: one question for all needles, which are anywhere."""

    def trials(self, length: int) -> Iterator[Trial]:
        """One trial for each sample."""
        return iter([self._buried(length, sample) for sample in range(self._scope.samples)])

    def _buried(self, length: int, sample: int) -> Trial:
        rng = random_of(self._scope, self.name, length, sample)
        needles = self._needles(Names(rng, self._filler.unit))
        keys = list(dict.fromkeys(key for key, _ in needles))
        question = question_of(self._kind, str(sample), keys, [value for _, value in needles])
        room = self._room(length, [question])
        texts = [needle_of(self._kind, key, value) for key, value in needles]
        sizes = [needle_size(text, self._measure) for text in texts]
        aims = draw_aims(rng, [ANYWHERE] * len(texts), sizes, room)
        hidden = [Needle(*parts) for parts in zip(texts, aims, strict=True)]
        haystack = bury(self._filler, hidden, room, self._measure, tolerance=1.0)
        return self._trial(length, [question], haystack.parts)


class _Lines(_Niah):
    """multikey_2 and multikey_3: a haystack of needles, one a line, of which some are asked for.

    Unlike RULER's, the last line is cut off where the room ends: whole lines would leave too much of it.
    """

    def trials(self, length: int) -> Iterator[Trial]:
        """One trial, or more where its depth rows have fewer lines than samples are wanted."""
        wanted = [self._scope.samples] * self._scope.depths
        trials: list[Trial] = []
        while any(wanted):
            trial, asked = self._asked(length, len(trials), wanted)
            wanted = [left - found for left, found in zip(wanted, asked, strict=True)]
            trials.append(trial)
        return iter(trials)

    def _asked(self, length: int, sample: int, wanted: Sequence[int]) -> tuple[Trial, list[int]]:
        """A trial, and how many of the wanted questions of each depth row are in it."""
        rng = random_of(self._scope, self.name, length, sample)
        names = Names(rng)
        needles = [self._needles(names)[0] for _ in range(_SAMPLE_LINES)]
        lines = [needle_of(self._kind, key, value) + "\n" for key, value in needles]
        longest = max((key for key, _ in needles), key=len)
        room = self._room(length, [question_of(self._kind, "", [longest], [longest])])
        if room < self._measure.count(lines[:1]):
            raise TooShortError("one line alone is longer")
        missing = room * _SAMPLE_LINES // self._measure.count(lines) * 21 // 20
        for _ in range(missing):
            needles += self._needles(names)
        text = "".join(needle_of(self._kind, key, value) + "\n" for key, value in needles)
        filler = Filler(text, self._measure)
        while True:
            trial, asked = self._ask(length, rng.uniform, filler, needles, room, sample, wanted)
            # What is asked for is known only now, and may be longer than the longest of the first lines.
            over = self._measure.count(trial.parts[1:]) - self._room(length, trial.questions)
            if over <= 0:
                return trial, asked
            room -= over

    def _ask(
        self,
        length: int,
        uniform: Callable[[float, float], float],
        filler: Filler,
        needles: Sequence[tuple[str, str]],
        room: int,
        sample: int,
        wanted: Sequence[int],
    ) -> tuple[Trial, list[int]]:
        starts = [0]
        for key, value in needles:
            starts.append(starts[-1] + len(needle_of(self._kind, key, value)) + 1)
        end = filler.after(0, room)  # in the middle of a line, which is not asked for
        starts = starts[: bisect_left(starts, end + 1)]
        total = filler.count(0, end)
        questions: list[Question] = []
        counts = []
        for row, (low, high) in enumerate(rows_of(self._scope)):
            first = bisect_left(starts, filler.after(0, max(0, int(low * total) - 1)))
            last = bisect_left(starts, filler.after(0, int(high * total)) + 1, 0, len(starts) - 1)
            depths = {line: filler.count(0, starts[line]) / total for line in (first, last - 1)}
            free = [line for line in range(first, last) if low <= depths.get(line, low) < high]
            if not free and wanted[row]:
                raise TooShortError("no line begins in one of the depth rows")
            counts.append(min(wanted[row], len(free)))
            for number_in_row in range(counts[-1]):
                place = filler.after(0, int(uniform(low, high) * total))
                line = min(free, key=lambda line: abs(starts[line] - place))
                free.remove(line)
                key, value = needles[line]
                question = question_of(self._kind, f"{sample}.{row}.{number_in_row}", [key], [value])
                depth = filler.count(0, starts[line]) / total
                questions.append(replace(question, text=question.text[1:], depth=depth))
        return self._trial(length, questions, filler.pieces(0, end)), counts


def _make(name: str, material: Material, measure: Measure, scope: Scope) -> Task:
    kind = KINDS[name]
    if kind.haystack == "needles":
        return _Lines(name, material, measure, scope)
    if kind.queries * kind.values > 1:
        return _Together(name, material, measure, scope)
    return _ByDepth(name, material, measure, scope)


TASKS: Mapping[str, MakeTask] = {name: partial(_make, name) for name in KINDS}
