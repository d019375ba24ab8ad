"""RULER's two aggregation tasks: the most common words of a list, the most frequent words of a coded text.

Templates, frequencies and the worked example before the list are RULER's. Its list is made longer by more
of the uncommon words. Where there are no more in the word lists, all words of the list are pairs of an
adjective and a noun, so that the common ones do not stand out. No common word is a part of any other one, nor
in the question, for whoever repeats those would have answered.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from itertools import islice
from math import pi
from string import ascii_lowercase
from typing import TYPE_CHECKING

from m3cli.tasks.evaluate.placing import largest, random_of
from m3cli.tasks.evaluate.trial import Question, TooShortError, Trial
from m3cli.tasks.evaluate.words import Names, words

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from m3cli.tasks.evaluate.trial import Group, MakeTask, Material, Measure, Scope, Task

COMMON = 10  # words to be found in a list
_LIST_TOKENS = 120
_LIST_OPENING = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
_LIST_QUESTION = "\nQuestion: What are the 10 most common words in the above list?"
_LIST_LEAD = " Answer: The top 10 words that appear most often in the list are:"

ALPHA = 2.0  # of the Zipf distribution of coded words
_ZETA = pi**2 / 6  # zeta(ALPHA)
_LETTERS = 6
_TOKENS_A_WORD = 50  # the vocabulary of coded words is the length divided by this
_NOISE = "..."
_TEXT_TOKENS = 50
_TEXT_OPENING = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. "
)
_TEXT_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
_TEXT_LEAD = " Answer: According to the coded text above, the three most frequently appeared words are:"

_PIECE = 1000  # words that are tokenized together


@dataclass(frozen=True, slots=True)
class Repeats:
    """How often common and uncommon words stand in a list, and the same of its worked example."""

    common: int
    uncommon: int
    example_words: int
    example_common: int
    example_uncommon: int

    @classmethod
    def of(cls, length: int) -> Repeats:
        """RULER's numbers for a length."""
        return cls(6, 1, 20, 3, 1) if length < 4096 else cls(30, 3, 40, 10, 3)


def _pieces(entries: Sequence[str]) -> tuple[str, ...]:
    """The entries with blanks between them, cut before blanks."""
    starts = range(0, len(entries), _PIECE)
    return tuple((" " if start else "") + " ".join(entries[start : start + _PIECE]) for start in starts)


def _list_of(seed: str, common: Sequence[str], uncommon: Sequence[str], often: int, rarely: int) -> list[str]:
    """Numbered entries: the words so often, in random order."""
    repeated = [*common] * often + [*uncommon] * rarely
    random.Random(seed).shuffle(repeated)
    return [f"{number}. {word}" for number, word in enumerate(repeated, 1)]


@cache
def _single() -> tuple[str, ...]:
    """All words of the lists, sorted."""
    return tuple(sorted({*words("adjectives"), *words("nouns"), *words("verbs")}))


@cache
def _distinct() -> frozenset[str]:
    """Those that are a part of no other one, nor of what stands around a list."""
    around = (_LIST_OPENING + _LIST_QUESTION + _LIST_LEAD).lower()
    everything = " ".join(_single())
    return frozenset(word for word in _single() if everything.count(word) == 1 and word not in around)


def _take_common(shuffled: list[str]) -> list[str]:
    """Take so many words out that are distinct, or pairs of such."""
    distinct = _distinct()
    fitting = (word for word in shuffled if distinct.issuperset(word.split("-")))
    common = list(islice(fitting, COMMON))
    for word in common:
        shuffled.remove(word)
    return common


class _CommonWords:
    name = "cwe"
    group: Group = "aggregation"

    def __init__(self, _material: Material, measure: Measure, scope: Scope) -> None:
        self._measure = measure
        self._scope = scope

    def trials(self, length: int) -> Iterator[Trial]:
        """One trial with one question for each sample."""
        return iter([self._trial(length, sample) for sample in range(self._scope.samples)])

    def _trial(self, length: int, sample: int) -> Trial:
        rng = random_of(self._scope, self.name, length, sample)
        repeats = Repeats.of(length)
        single = list(_single())
        rng.shuffle(single)
        seed = f"{self._scope.seed} {self.name} {length} {sample} order"

        # 1. The worked example, of words of its own.
        example_common = _take_common(single)
        rest = repeats.example_words - COMMON
        example_uncommon, single = single[:rest], single[rest:]
        entries = _list_of(
            seed, example_common, example_uncommon, repeats.example_common, repeats.example_uncommon
        )
        answer = "".join(f" {number}. {word}" for number, word in enumerate(example_common, 1))
        example = _LIST_OPENING + " ".join(entries) + _LIST_QUESTION + _LIST_LEAD + answer + "\n"

        # 2. As long a list as there is room for.
        asked = Question(str(sample), _LIST_QUESTION, (), lead=_LIST_LEAD)
        opening = (example, _LIST_OPENING)
        room = self._measure.room(length, _LIST_TOKENS, [asked]) - self._measure.count(opening)
        common = _take_common(single)
        parts = self._list(seed, common, single, repeats, room)
        if parts is None:
            pairs = _pairs(rng, room)
            common = _take_common(pairs)
            parts = self._list(seed, common, pairs, repeats, room)
        if parts is None:
            raise AssertionError("more pairs than there is room for")
        question = Question(str(sample), _LIST_QUESTION, tuple(common), lead=_LIST_LEAD)
        return Trial(self.name, self.group, length, _LIST_TOKENS, (question,), opening + parts)

    def _list(
        self, seed: str, common: Sequence[str], uncommon: Sequence[str], repeats: Repeats, room: int
    ) -> tuple[str, ...] | None:
        """The longest list for the room, None if there are too few words for it."""

        def parts(number: int) -> tuple[str, ...]:
            # A number beyond the words is asked for on the way to the right one.
            chosen = uncommon[:number]
            return _pieces(_list_of(seed, common, chosen, repeats.common, repeats.uncommon))

        def tokens(number: int) -> int:
            return self._measure.count(parts(number)) + max(0, number - len(uncommon)) * room

        if self._measure.count(parts(len(uncommon))) <= room:
            return None
        return parts(largest(tokens, room, 1))


def _pairs(rng: random.Random, room: int) -> list[str]:
    """Distinct pairs of an adjective and a noun, in random order, more than a list of `room` tokens needs."""
    adjectives, nouns = words("adjectives"), words("nouns")
    number = min(len(adjectives) * len(nouns), room // 5)  # of the five or more that an entry has
    chosen = rng.sample(range(len(adjectives) * len(nouns)), number)
    return [f"{adjectives[index // len(nouns)]}-{nouns[index % len(nouns)]}" for index in chosen]


def frequencies(number: int, vocabulary: int) -> list[int]:
    """How often the word of each rank appears, of about `number` words: int(number / (rank^a zeta(a)))."""
    return [int(number * rank**-ALPHA / _ZETA) for rank in range(1, vocabulary + 1)]


class _FrequentWords:
    name = "fwe"
    group: Group = "aggregation"

    def __init__(self, _material: Material, measure: Measure, scope: Scope) -> None:
        self._measure = measure
        self._scope = scope

    def trials(self, length: int) -> Iterator[Trial]:
        """One trial with one question for each sample."""
        return iter([self._trial(length, sample) for sample in range(self._scope.samples)])

    def _trial(self, length: int, sample: int) -> Trial:
        rng = random_of(self._scope, self.name, length, sample)
        names = Names(rng)
        vocabulary = [_NOISE, *(names.new(_coded) for _ in range(length // _TOKENS_A_WORD - 1))]
        answers = tuple(vocabulary[1:4])
        if len(vocabulary) < 5:
            raise TooShortError("it has too few coded words")
        question = Question(str(sample), _TEXT_QUESTION, answers, lead=_TEXT_LEAD)
        room = self._measure.room(length, _TEXT_TOKENS, [question]) - self._measure.count([_TEXT_OPENING])
        seed = f"{self._scope.seed} {self.name} {length} {sample} order"

        def parts(number: int) -> tuple[str, ...]:
            counts = frequencies(number, len(vocabulary))
            text = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
            random.Random(seed).shuffle(text)
            return _pieces(text)

        number = largest(lambda number: self._measure.count(parts(number)), room, 1)
        counts = frequencies(number, len(vocabulary))
        if len(set(counts[:5])) < 5:
            raise TooShortError("the most frequent words would be as frequent as others")
        return Trial(
            self.name, self.group, length, _TEXT_TOKENS, (question,), (_TEXT_OPENING, *parts(number))
        )


def _coded(rng: random.Random) -> str:
    return "".join(rng.choice(ascii_lowercase) for _ in range(_LETTERS))


def _make_common(material: Material, measure: Measure, scope: Scope) -> Task:
    return _CommonWords(material, measure, scope)


def _make_frequent(material: Material, measure: Measure, scope: Scope) -> Task:
    return _FrequentWords(material, measure, scope)


TASKS: Mapping[str, MakeTask] = {"cwe": _make_common, "fwe": _make_frequent}
