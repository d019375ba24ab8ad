"""Words are as frequent as RULER defines, counted in the texts that come out."""

from __future__ import annotations

import re
from collections import Counter
from math import pi

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.tasks.evaluate.aggregation import TASKS
from m3cli.tasks.evaluate.placing import largest
from m3cli.tasks.evaluate.trial import Scope, TooShortError
from m3cli.tasks.evaluate.words import words
from tests.tasks.evaluate.tasks import (
    BYTES,
    check_answers,
    check_lengths,
    prompt,
    real_measure,
    trials_of,
    trials_or_none,
)


@pytest.mark.parametrize("name", TASKS)
@settings(max_examples=40)
@given(length=st.integers(512, 16_384), seed=st.integers(0, 3))
def test_laws_in_bytes(name: str, length: int, seed: int) -> None:
    """Full, never too long, and counting gives the answers."""
    trials = trials_or_none(TASKS, name, length, scope=Scope((length,), 5, 2, seed))
    assert trials or length < 8000
    for trial in trials:
        check_lengths(trial, BYTES)
        check_answers(trial)


@pytest.mark.parametrize("length", [1024, 4096, 16_384])
@pytest.mark.parametrize("name", TASKS)
def test_laws_with_a_real_tokenizer(smollm2: str, name: str, length: int) -> None:
    """The same with a real vocabulary."""
    measure = real_measure(smollm2)
    for trial in trials_of(TASKS, name, length, measure=measure):
        check_lengths(trial, measure)
        check_answers(trial)


def numbered(text: str) -> Counter[str]:
    """The words of a list, whose numbers have to be without a gap."""
    entries = re.findall(r"(\d+)\. ([a-z-]+)", text)
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    return Counter(word for _, word in entries)


@pytest.mark.parametrize(
    ("length", "common", "uncommon", "example"), [(3000, 6, 1, (20, 3, 1)), (16_384, 30, 3, (40, 10, 3))]
)
def test_common_words_are_as_common_as_rulers(
    length: int, common: int, uncommon: int, example: tuple[int, int, int]
) -> None:
    """Ten words so often and all others so rarely, after a worked example; fewer below 4096 tokens."""
    trial = trials_of(TASKS, "cwe", length)[0]
    question = trial.questions[0]
    ask = "\nQuestion: What are the 10 most common words in the above list?"
    lead = " Answer: The top 10 words that appear most often in the list are:"
    shown, task, last = prompt(trial, question).split(ask)
    opening = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
    )
    assert shown.startswith(opening)
    assert last == lead
    answer, task = task.split("\n" + opening)
    assert answer.startswith(lead + " 1. ")

    counts = numbered(task)
    assert {word for word, count in counts.items() if count == common} == set(question.answers)
    assert Counter(counts.values()) == {common: 10, uncommon: len(counts) - 10}
    many, often, rarely = example
    counts = numbered(shown.removeprefix(opening))
    assert Counter(counts.values()) == {often: 10, rarely: many - 10}
    assert {word for word, count in counts.items() if count == often} == set(numbered(answer))
    assert (trial.max_tokens, trial.group, question.depth) == (120, "aggregation", None)


def test_long_lists_are_of_pairs() -> None:
    """Where there are too few words, all of them are pairs, the common ones, too."""
    trial = trials_of(TASKS, "cwe", 200_000, scope=Scope((200_000,), 1, 1))[0]
    check_lengths(trial, BYTES)
    check_answers(trial)
    counts = numbered("".join(trial.parts[2:]))
    assert all("-" in word for word in counts)
    assert set(counts.values()) == {30, 3}


@pytest.mark.parametrize("length", [3000, 16_384, 200_000])
def test_no_other_word_answers(length: int) -> None:
    """Who says all words but the common ones, and repeats the question, has found none."""
    kinds = ("adjectives", "nouns", "verbs")
    for seed in range(3):
        (trial,) = trials_of(TASKS, "cwe", length, scope=Scope((length,), 1, 1, seed))
        question, opening = trial.questions[0], trial.parts[1]
        said = {*numbered("".join(trial.parts[2:])), *(word for kind in kinds for word in words(kind))}
        others = " ".join(said - set(question.answers))
        assert question.score(f"{opening} {question.text} {question.lead} {others}") == 0
        assert question.score(" ".join(question.answers)) == 1


def test_coded_words_follow_zipf() -> None:
    """Rank r of the vocabulary appears int(N / (r^2 zeta(2))) times; rank 1 is the dots."""
    trial = trials_of(TASKS, "fwe", 16_384)[0]
    question = trial.questions[0]
    opening, *parts = trial.parts
    counts = [count for _, count in Counter("".join(parts).split()).most_common()]
    words = [word for word, _ in Counter("".join(parts).split()).most_common(4)]
    assert words[0] == "..."
    assert tuple(words[1:]) == question.answers
    # N is not told: it is any number that gives the first count.
    number = counts[0] * pi**2 / 6
    expected = [int(number / (rank**2 * pi**2 / 6)) for rank in range(1, len(counts) + 1)]
    assert all(0 <= count - least <= 1 for count, least in zip(counts, expected, strict=True))
    assert len(set(counts[:5])) == 5
    assert all(re.fullmatch("[a-z]{6}", word) for word in question.answers)
    assert opening == (
        "Read the following coded text and track the frequency of each coded word. "
        "Find the three most frequently appeared coded words. "
    )
    assert question.text + question.lead == (
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?"
        " Answer: According to the coded text above, the three most frequently appeared words are:"
    )
    assert (trial.max_tokens, trial.group, question.depth) == (50, "aggregation", None)


@pytest.mark.parametrize("name", TASKS)
def test_seeds(name: str) -> None:
    """The same seed gives the same trials again; another one gives others."""
    first, again, other = (trials_of(TASKS, name, 8192, scope=Scope((8192,), 1, 2, s)) for s in (0, 0, 1))
    assert first == again
    assert first[0] != other[0]
    assert first[0].parts != first[1].parts


@pytest.mark.parametrize("name", TASKS)
def test_too_short(name: str) -> None:
    """Where the words do not fit, the length is refused."""
    with pytest.raises(TooShortError):
        trials_of(TASKS, name, 512)


@given(
    room=st.integers(1, 10**6),
    step=st.integers(1, 50),
    least=st.integers(1, 9),
    power=st.sampled_from([1, 1.3]),
)
def test_largest(room: int, step: int, least: int, power: float) -> None:
    """The number found fits, and the next one does not, or it is within 0.1 %."""

    def tokens(number: int) -> int:
        return int(step * number**power)

    if tokens(least) > room:
        with pytest.raises(TooShortError):
            largest(tokens, room, least)
    else:
        found = largest(tokens, room, least)
        assert tokens(found) <= room
        assert tokens(found + 1) > room or room - tokens(found) <= room / 1000
