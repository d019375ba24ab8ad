"""A request is made four times in a conversation, and each of its replies can be asked for."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.tasks.evaluate.coreference import TASKS
from m3cli.tasks.evaluate.trial import Scope, TooShortError
from tests.tasks.evaluate.tasks import (
    BYTES,
    check_answers,
    check_lengths,
    depth_in,
    prompt,
    real_measure,
    trials_of,
    trials_or_none,
)

EXCHANGE = re.compile(
    r"User: Write a ([a-z ]+) about the ([a-z]+)\.\n\nAssistant: ([^\n]+) Its code is ([0-9a-f]{8})\.\n\n"
)


@settings(max_examples=40)
@given(length=st.integers(512, 16_384), seed=st.integers(0, 3))
def test_laws_in_bytes(length: int, seed: int) -> None:
    """Full, never too long, whole exchanges only, and the codes are as deep as said."""
    trials = trials_or_none(TASKS, "mrcr", length, scope=Scope((length,), 3, 2, seed))
    assert trials or length < 6000
    for trial in trials:
        check_lengths(trial, BYTES)
        check_answers(trial)
        text = "".join(trial.parts[1:])
        assert EXCHANGE.sub("", text) == ""
        codes = [match[4] for match in EXCHANGE.finditer(text)]
        assert len(set(codes)) == len(codes)
        for question in trial.questions:
            needle = next(m[0] for m in EXCHANGE.finditer(text) if m[4] == question.answers[0])
            assert abs(depth_in(trial, needle, BYTES) - (question.depth or 0)) <= 0.01


@pytest.mark.parametrize("length", [1024, 4096, 16_384])
def test_laws_with_a_real_tokenizer(smollm2: str, length: int) -> None:
    """The same with a real vocabulary."""
    measure = real_measure(smollm2)
    for trial in trials_of(TASKS, "mrcr", length, measure=measure):
        check_lengths(trial, measure)
        check_answers(trial)


def test_the_same_request_is_made_four_times() -> None:
    """Four replies to it, the questions name them by their order, and other requests share form or topic."""
    trial = trials_of(TASKS, "mrcr", 65_536, scope=Scope((65_536,), 4, 1))[0]
    exchanges = EXCHANGE.findall("".join(trial.parts))
    asked = re.search(r"code of the (\w+) ([a-z ]+) about the (\w+)\?$", trial.questions[0].text)
    assert asked is not None
    form, topic = asked[2], asked[3]
    same = [code for f, t, _, code in exchanges if (f, t) == (form, topic)]
    assert len(same) == 4
    ordinals = dict(zip(same, ("first", "second", "third", "fourth"), strict=True))
    assert {question.answers[0] for question in trial.questions} == set(same)
    for question in trial.questions:
        subject = f"the {ordinals[question.answers[0]]} {form} about the {topic}"
        assert question.text == f"What is the code of {subject}?"
        assert prompt(trial, question).endswith(f"The code of {subject} is")
    assert sum(f == form for f, *_ in exchanges) > 8
    assert trial.group == "coreference"


@pytest.mark.parametrize(("depths", "samples"), [(5, 5), (3, 2), (7, 1)])
def test_each_depth_row_has_its_samples(depths: int, samples: int) -> None:
    """Each row of depths is asked about equally often."""
    trials = trials_of(TASKS, "mrcr", 16_384, scope=Scope((16_384,), depths, samples))
    rows = [int((question.depth or 0) * depths) for trial in trials for question in trial.questions]
    assert sorted(rows) == sorted(list(range(depths)) * samples)
    ids = [question.id for trial in trials for question in trial.questions]
    assert len(set(ids)) == len(ids)


def test_seeds() -> None:
    """The same seed gives the same trials again; another one gives others."""
    first, again, other = (trials_of(TASKS, "mrcr", 8192, scope=Scope((8192,), 4, 1, s)) for s in (0, 0, 1))
    assert first == again
    assert first != other


def test_too_short() -> None:
    """Where four replies do not fit, the length is refused."""
    with pytest.raises(TooShortError):
        trials_of(TASKS, "mrcr", 1024)
