"""What an evaluation found: scores by length and depth with their intervals, and the effective context."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from typing import TYPE_CHECKING, Literal, get_args

from m3cli.tasks.evaluate.trial import GROUPS, Group

if TYPE_CHECKING:
    from collections.abc import Iterable

    from m3cli.engine.events import Attention, KVType

# How the model is shown a corpus; all but `whole` are what m3 does about long contexts.
Mode = Literal["whole", "recap", "quote", "end", "select", "sweep"]
MODES: tuple[Mode, ...] = get_args(Mode)

ABSOLUTE_BAR = 0.856  # RULER's: what Llama-2-7B scores at its 4k tokens
RELATIVE_BAR = 0.85  # of the model's own score at the shortest length
_Z = 1.959964  # of a two-sided interval of 95 %


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one question was answered. `score` is from 0 to 1, `seconds` are those of prefill and decoding.

    `question` is its id and `text` what was asked. `length` is that of the trial; `prompt_tokens` went to the
    model, all prompts together where there are several, and `restored_tokens` of them were not computed.
    """

    task: str
    group: Group
    mode: Mode
    length: int
    question: str
    text: str
    answers: tuple[str, ...]
    depth: float | None
    score: float
    reply: str
    prompt_tokens: int
    restored_tokens: int
    generated_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Score:
    """The mean of `count` scores, and its Wilson interval of 95 %, all from 0 to 1.

    Scores between 0 and 1 (some of several answers) are counted as if each were so many right answers, which
    makes the interval a little too wide.
    """

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, scores: Iterable[float]) -> Score:
        """That of at least one score."""
        values = list(scores)
        count = len(values)
        mean = sum(values) / count
        spread = _Z * sqrt(mean * (1 - mean) / count + _Z**2 / (4 * count**2))
        middle, scale = mean + _Z**2 / (2 * count), 1 + _Z**2 / count
        # But for rounding, they are 0 and 1 where no or each answer was right, and within both elsewhere.
        low = max(0.0, (middle - spread) / scale) if mean > 0 else 0.0
        high = min(1.0, (middle + spread) / scale) if mean < 1 else 1.0
        return cls(mean, low, high, count)


@dataclass(frozen=True, slots=True)
class Bar:
    """What a score is held against. `length` is the longest that clears it with all shorter ones, or 0.

    `undecided` is the first length of which the score clears it and the interval does not: more samples
    would tell. 0 if there is none.
    """

    value: float
    length: int
    undecided: int


@dataclass(frozen=True, slots=True)
class GroupResult:
    """Scores of a group of tasks by length, and the two effective contexts, in tokens."""

    group: Group
    scores: dict[int, Score]
    absolute: Bar
    relative: Bar


@dataclass(frozen=True, slots=True)
class Run:
    """All outcomes of one way to run the model: the types of its KV cache, its attention, and the mode.

    `partial` is the length at which it was ended before all was asked, 0 if none was.
    """

    type_k: KVType
    type_v: KVType
    attention: Attention
    mode: Mode
    outcomes: tuple[Outcome, ...]
    partial: int = 0

    def cells(self, depths: int, group: Group | None = None) -> dict[tuple[int, int], Score]:
        """Scores by (length, row of the depth): row i is of depths from i / `depths` on."""
        found: dict[tuple[int, int], list[float]] = {}
        for outcome in self.outcomes:
            if outcome.depth is not None and group in (None, outcome.group):
                row = min(int(outcome.depth * depths), depths - 1)
                found.setdefault((outcome.length, row), []).append(outcome.score)
        return {place: Score.of(scores) for place, scores in sorted(found.items())}

    def groups(self) -> list[GroupResult]:
        """Results of each group that was asked, in the order of GROUPS.

        Of its tasks those count that its shortest length could hold, and of the lengths those at which all
        was asked: otherwise lengths would be compared that were asked different things.
        """
        results = []
        for group in GROUPS:
            asked = [o for o in self.outcomes if o.group == group and o.length != self.partial]
            shortest = min((outcome.length for outcome in asked), default=0)
            tasks = {outcome.task for outcome in asked if outcome.length == shortest}
            by_length: dict[int, list[float]] = {}
            for outcome in asked:
                if outcome.task in tasks:
                    by_length.setdefault(outcome.length, []).append(outcome.score)
            if by_length:
                scores = {length: Score.of(by_length[length]) for length in sorted(by_length)}
                own = next(iter(scores.values())).mean
                absolute, relative = bar_of(scores, ABSOLUTE_BAR), bar_of(scores, RELATIVE_BAR * own)
                results.append(GroupResult(group, scores, absolute, relative))
        return results

    def tasks(self) -> dict[str, dict[int, Score]]:
        """Scores of each task by length."""
        found: dict[str, dict[int, list[float]]] = {}
        for outcome in self.outcomes:
            found.setdefault(outcome.task, {}).setdefault(outcome.length, []).append(outcome.score)
        return {
            task: {length: Score.of(scores) for length, scores in sorted(lengths.items())}
            for task, lengths in found.items()
        }


def bar_of(scores: dict[int, Score], value: float) -> Bar:
    """Hold scores by rising length against `value`; a score of 0 clears nothing."""
    longest = 0
    for length, score in scores.items():
        if score.low < value or not score.mean:
            undecided = length if score.mean >= value and score.mean else 0
            return Bar(value, longest, undecided)
        longest = length
    return Bar(value, longest, 0)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A task that was not asked at a length, and why, without a full stop."""

    task: str
    length: int
    reason: str


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The whole of it. `complete` is false when a time limit or Ctrl-C ended it.

    `model` is what people call it, `digest` that of its file; `haystack` says what the texts are made of;
    `computed_tokens` are those that this run prefilled, in `seconds` altogether, `known` outcomes come from
    earlier runs.
    """

    model: str
    digest: str
    description: str
    haystack: str
    lengths: tuple[int, ...]
    depths: int
    samples: int
    seed: int
    runs: tuple[Run, ...]
    skipped: tuple[Skipped, ...]
    complete: bool
    computed_tokens: int
    known: int
    seconds: float
    warnings: tuple[str, ...] = field(default=())
