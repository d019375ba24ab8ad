"""RULER's needles are in the haystack as often, as deep and in the words that RULER defines."""

from __future__ import annotations

import random
import re
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.tasks.evaluate.niah import TASKS
from m3cli.tasks.evaluate.trial import Scope, TooShortError
from m3cli.tasks.evaluate.words import Names, words
from tests.tasks.evaluate.tasks import (
    BYTES,
    CODE,
    MATERIALS,
    check_answers,
    check_lengths,
    prompt,
    real_measure,
    trials_of,
    trials_or_none,
)

if TYPE_CHECKING:
    from m3cli.tasks.evaluate.trial import Trial
    from tests.tasks.evaluate.measures import PlainMeasure

NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for ([\w-]+) is: ([\w-]+)\.")
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
WORDS = r"[a-z]+-[a-z]+"
NUMBER = r"[1-9][0-9]{6}"
# RULER's table (scripts/synthetic.yaml): key, value, distinct keys, values of each, keys in a question
TABLE = {
    "niah_single_1": (WORDS, NUMBER, 1, 1, 1),
    "niah_single_2": (WORDS, NUMBER, 1, 1, 1),
    "niah_single_3": (WORDS, UUID, 1, 1, 1),
    "niah_multikey_1": (WORDS, NUMBER, 4, 1, 1),
    "niah_multikey_2": (WORDS, NUMBER, None, 1, 1),
    "niah_multikey_3": (UUID, UUID, None, 1, 1),
    "niah_multivalue": (WORDS, NUMBER, 1, 4, 1),
    "niah_multiquery": (WORDS, NUMBER, 4, 1, 4),
}
LINES = ("niah_multikey_2", "niah_multikey_3")
DEPTHS = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", *LINES)


def test_tasks_are_rulers() -> None:
    """There are eight of them, under RULER's names."""
    assert list(TASKS) == list(TABLE)


@pytest.mark.parametrize("name", TABLE)
@settings(max_examples=30)
@given(length=st.integers(512, 16_384), seed=st.integers(0, 3), kind=st.sampled_from(sorted(MATERIALS)))
def test_laws_in_bytes(name: str, length: int, seed: int, kind: str) -> None:
    """Of any length and any text: full, never too long, as many needles as RULER has, all to be found."""
    scope = Scope((length,), depths=2, samples=2, seed=seed)
    trials = trials_or_none(TASKS, name, length, text=MATERIALS[kind], scope=scope)
    assert trials or length < 1000
    for trial in trials:
        check_lengths(trial, BYTES, 0.02)
        check_answers(trial)
        check_needles(name, trial.parts)
        check_depths(trial)


def check_needles(name: str, parts: tuple[str, ...]) -> None:
    key, value, keys, values, _ = TABLE[name]
    haystack = "".join(parts[1:])
    found = [(match[2], match[3]) for match in NEEDLE.finditer(haystack)]
    assert all(re.fullmatch(key, k) and re.fullmatch(value, v) for k, v in found)
    assert len({v for _, v in found}) == len(found)
    distinct = {k for k, _ in found}
    if keys is None:
        assert len(distinct) == len(found)
        assert len(found) - haystack.count("\n") in (0, 1)  # the last line may be cut right at its end
        cut = NEEDLE.sub("", haystack).strip("\n")
        assert cut.startswith("One of"[: len(cut)])
        assert "\n" not in cut
    else:
        assert (len(distinct), len(found)) == (keys, keys * values)
        assert all(haystack.count(v) == 1 for _, v in found)


def check_depths(trial: Trial, measure: PlainMeasure = BYTES) -> None:
    for question in trial.questions:
        if question.depth is not None:
            needle = f" is: {question.answers[0]}."
            haystack = "".join(trial.parts[1:])
            start = haystack.rindex("One of", 0, haystack.index(needle))
            assert haystack.count(needle) == 1
            depth = measure.count([haystack[:start]]) / measure.count([haystack])
            assert abs(depth - question.depth) <= 0.01


@pytest.mark.parametrize("length", [512, 1024, 4096, 16_384])
@pytest.mark.parametrize("name", TABLE)
def test_laws_with_a_real_tokenizer(smollm2: str, name: str, length: int) -> None:
    """The same with a real vocabulary, from 512 tokens on; lines of UUIDs are too long for that."""
    measure = real_measure(smollm2)
    trials = trials_or_none(TASKS, name, length, measure=measure)
    assert trials or (name, length) == ("niah_multikey_3", 512)
    for trial in trials:
        check_lengths(trial, measure, 0.02)
        check_answers(trial)
        check_needles(name, trial.parts)
        check_depths(trial, measure)


@pytest.mark.parametrize("name", DEPTHS)
@pytest.mark.parametrize(("depths", "samples"), [(5, 5), (3, 2), (1, 6), (7, 1)])
def test_each_depth_row_has_its_samples(name: str, depths: int, samples: int) -> None:
    """However many needles a haystack has, each row of depths is asked about equally often."""
    trials = trials_of(TASKS, name, 8192, scope=Scope((8192,), depths, samples))
    rows = [int((question.depth or 0) * depths) for trial in trials for question in trial.questions]
    assert sorted(rows) == sorted(list(range(depths)) * samples)
    ids = [question.id for trial in trials for question in trial.questions]
    assert len(set(ids)) == len(ids)


def test_haystacks_are_shared() -> None:
    """Four questions to a haystack of four keys, all of them to one of needles."""
    scope = Scope((8192,), 5, 4)
    found = {name: trials_of(TASKS, name, 8192, scope=scope) for name in DEPTHS}
    assert [len(trial.questions) for trial in found["niah_multikey_1"]] == [4] * 5
    assert [len(trial.questions) for trial in found["niah_multikey_2"]] == [20]
    assert [len(trial.questions) for trial in found["niah_multikey_3"]] == [20]


def test_short_haystacks_of_needles_are_several() -> None:
    """Where a depth row has fewer lines than samples, the rest is asked of further haystacks."""
    trials = trials_of(TASKS, "niah_multikey_2", 2048, scope=Scope((2048,), 5, 5))
    assert len(trials) > 1
    for trial in trials:
        assert len({question.answers for question in trial.questions}) == len(trial.questions)


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2", "niah_single_3"])
def test_what_stands_before_a_needle_was_there_before(name: str) -> None:
    """The deepest needle comes first, so that each haystack begins with what its predecessor began with."""
    trials = trials_of(TASKS, name, 8192, scope=Scope((8192,), 5, 3))
    depths = [trial.questions[0].depth or 0 for trial in trials]
    assert depths == sorted(depths, reverse=True)
    texts = ["".join(trial.parts) for trial in trials]
    for earlier, later in pairwise(texts):
        start = later.index("One of the special magic")
        assert earlier.startswith(later[: start - 1])


@pytest.mark.parametrize("name", TABLE)
def test_seeds(name: str) -> None:
    """The same seed gives the same trials again; another one gives others."""
    first, again, other = (
        trials_of(TASKS, name, 4096, scope=Scope((4096,), 2, 2, seed)) for seed in (0, 0, 1)
    )
    assert first == again
    assert {t.questions[0].answers for t in first}.isdisjoint(t.questions[0].answers for t in other)


def test_prompts_are_rulers() -> None:
    """Singular for one needle, plural for several, as the published templates say."""
    trial = trials_of(TASKS, "niah_single_3", 4096)[0]
    text, question = prompt(trial, trial.questions[0]), trial.questions[0]
    key = NEEDLE.findall(text)[0][1]
    assert text.startswith(
        "A special magic uuid is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the uuid afterwards.\n" + CODE[:20]
    )
    assert question.text == f"\nWhat is the special magic uuid for {key} mentioned in the provided text?"
    assert question.lead == f" The special magic uuid for {key} mentioned in the provided text is"
    assert (trial.max_tokens, trial.group, question.scoring) == (128, "retrieval", "contains")

    trial = trials_of(TASKS, "niah_multiquery", 4096)[0]
    text, question = prompt(trial, trial.questions[0]), trial.questions[0]
    assert text.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the numbers afterwards.\n"
    )
    values = {key: value for _, key, value in NEEDLE.findall(text)}
    asked = re.search(r"for (\S+), (\S+), (\S+), and (\S+) mentioned in the provided text\?$", question.text)
    assert asked is not None
    assert [values[key] for key in asked.groups()] == list(question.answers)
    assert question.text.startswith("\nWhat are all the special magic numbers for ")
    assert question.lead.endswith(" mentioned in the provided text are")
    assert question.depth is None


def test_noise_is_rulers() -> None:
    """The first task's haystack is the noise sentences, a line each time, with the needle between lines."""
    trial = trials_of(TASKS, "niah_single_1", 16_384)[0]
    lines = "".join(trial.parts[1:]).split("\n")
    noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    assert set(lines[:-1]) - {noise} == {line for line in lines if line.startswith("One of")}
    assert noise.startswith(lines[-1])


def test_names_that_are_in_the_text_are_not_used() -> None:
    """No name is given twice, nor one that stands in the material."""
    names = Names(random.Random(0), "ab")
    assert {names.new(lambda rng: rng.choice("abcde")) for _ in range(3)} == {"c", "d", "e"}


def test_too_short() -> None:
    """A length that the questions alone fill is refused with a reason."""
    for name in TABLE:
        with pytest.raises(TooShortError):
            trials_of(TASKS, name, 300)


@pytest.mark.parametrize("kind", ["adjectives", "nouns", "verbs"])
def test_words_are_single_and_distinct(kind: str) -> None:
    """Word lists are lower-case words, sorted, none twice."""
    found = words(kind)
    assert list(found) == sorted(set(found))
    assert all(re.fullmatch("[a-z]+", word) for word in found)
    assert len(found) >= {"adjectives": 250, "nouns": 700, "verbs": 250}[kind]
