"""RULER's variable tracking: which variables have a value, by a chain of assignments.

Template, number of hops and the worked example before the task are RULER's. Other than there, an assignment
stands on a line of its own where it follows a line, and the worked example is shorter than 500 tokens where
that would be more than a quarter of the length.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_uppercase
from typing import TYPE_CHECKING

from m3cli.tasks.evaluate.placing import (
    ANYWHERE,
    NOISE,
    Filler,
    Needle,
    bury,
    draw_aims,
    needle_size,
    random_of,
)
from m3cli.tasks.evaluate.trial import Question, Trial
from m3cli.tasks.evaluate.words import Names

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Mapping

    from m3cli.tasks.evaluate.trial import Group, MakeTask, Material, Measure, Scope, Task

HOPS = 4
_MAX_TOKENS = 30
_EXAMPLE_TOKENS = 500
_OPENING = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"


@dataclass(frozen=True, slots=True)
class Chain:
    """A value and the variables that have it, in the order of their assignments."""

    value: str
    names: tuple[str, ...]

    @classmethod
    def draw(cls, names: Names, letters: int) -> Chain:
        """One of HOPS + 1 variables whose names have so many letters."""

        def name(rng: random.Random) -> str:
            return "".join(rng.choice(ascii_uppercase) for _ in range(letters))

        value = names.new(lambda rng: str(rng.randint(10000, 99998)))
        return cls(value, tuple(names.new(name) for _ in range(HOPS + 1)))

    @property
    def assignments(self) -> list[str]:
        """The first gets the value, each other that of the one before; the blank at the end is RULER's."""
        followers = zip(self.names[1:], self.names, strict=False)
        first = f"VAR {self.names[0]} = {self.value}"
        return [first, *(f"VAR {name} = VAR {before} " for name, before in followers)]

    @property
    def question(self) -> str:
        """The question, on a new line."""
        return f"\nQuestion: Find all variables that are assigned the value {self.value} in the text above."

    @property
    def lead(self) -> str:
        """How the answer begins."""
        return (
            " Answer: According to the chain(s) of variable assignment in the text above, "
            f"{len(self.names)} variables are assigned the value {self.value}, they are: "
        )


class _Tracing:
    name = "vt"
    group: Group = "tracing"

    def __init__(self, _material: Material, measure: Measure, scope: Scope) -> None:
        self._measure = measure
        self._scope = scope
        self._filler = Filler(NOISE, measure)

    def trials(self, length: int) -> Iterator[Trial]:
        """One trial with one question for each sample."""
        return iter([self._trial(length, sample) for sample in range(self._scope.samples)])

    def _trial(self, length: int, sample: int) -> Trial:
        rng = random_of(self._scope, self.name, length, sample)
        names = Names(rng)
        chain, example_chain = Chain.draw(names, 5), Chain.draw(names, 3)
        # 1. The worked example, with its answer.
        question = Question("", example_chain.question, example_chain.names, lead=example_chain.lead)
        answer = " ".join(example_chain.names)
        around = [_OPENING, question.text, question.lead, answer]
        room = min(_EXAMPLE_TOKENS, length // 4) - self._measure.count(around)
        parts = self._context(rng, example_chain, room)
        example = _OPENING + "".join(parts) + question.text + question.lead + answer + "\n\n"
        # 2. The task itself.
        question = Question(str(sample), chain.question, chain.names, lead=chain.lead)
        opening = (example, _OPENING)
        room = self._measure.room(length, _MAX_TOKENS, [question]) - self._measure.count(opening)
        parts = opening + self._context(rng, chain, room)
        return Trial(self.name, self.group, length, _MAX_TOKENS, (question,), parts)

    def _context(self, rng: random.Random, chain: Chain, room: int) -> tuple[str, ...]:
        """Noise with the assignments in it, anywhere, in their order."""
        sizes = [needle_size(text, self._measure) for text in chain.assignments]
        aims = sorted(draw_aims(rng, [ANYWHERE] * len(sizes), sizes, room))
        needles = [Needle(text, aim) for text, aim in zip(chain.assignments, aims, strict=True)]
        return bury(self._filler, needles, room, self._measure, tolerance=1.0).parts


def _make(material: Material, measure: Measure, scope: Scope) -> Task:
    return _Tracing(material, measure, scope)


TASKS: Mapping[str, MakeTask] = {"vt": _make}
