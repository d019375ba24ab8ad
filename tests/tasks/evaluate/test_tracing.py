"""Variable tracking has RULER's chain in its order, and RULER's words around it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.tasks.evaluate.tracing import TASKS
from m3cli.tasks.evaluate.trial import Scope, TooShortError
from tests.tasks.evaluate.tasks import (
    BYTES,
    check_answers,
    check_lengths,
    prompt,
    real_measure,
    trials_of,
    trials_or_none,
)

OPENING = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"


@settings(max_examples=50)
@given(length=st.integers(512, 16_384), seed=st.integers(0, 3))
def test_laws_in_bytes(length: int, seed: int) -> None:
    """Full, never too long, and the chain is all there."""
    trials = trials_or_none(TASKS, "vt", length, scope=Scope((length,), 5, 2, seed))
    assert trials or length < 2048
    for trial in trials:
        check_lengths(trial, BYTES)
        check_answers(trial)


@pytest.mark.parametrize("length", [1024, 4096, 16_384])
def test_laws_with_a_real_tokenizer(smollm2: str, length: int) -> None:
    """The same with a real vocabulary."""
    measure = real_measure(smollm2)
    for trial in trials_of(TASKS, "vt", length, measure=measure):
        check_lengths(trial, measure)
        check_answers(trial)


def test_the_chain_is_rulers() -> None:
    """A number, then four hops, in order, after a worked example of the same form."""
    trial = trials_of(TASKS, "vt", 8192)[0]
    question = trial.questions[0]
    example, task = prompt(trial, question).split("\n\n" + OPENING)
    assignments = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", task)
    names = [name for name, _ in assignments]
    value = assignments[0][1]
    assert 10000 <= int(value) <= 99998
    assert [before for _, before in assignments] == [value, *names[:-1]]
    assert question.answers == tuple(names)
    assert len(set(names)) == 5
    assert question.text == (
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above."
    )
    assert question.lead == (
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"5 variables are assigned the value {value}, they are: "
    )
    assert (trial.max_tokens, trial.group, question.depth) == (30, "tracing", None)

    assert example.startswith(OPENING)
    assert BYTES.count([example]) <= 500
    in_example = re.findall(r"VAR ([A-Z]{3}) = ", example)
    assert len(in_example) == 5
    assert example.endswith("they are: " + " ".join(in_example))
    assert value not in example


def test_seeds() -> None:
    """The same seed gives the same trials again; another one gives others."""
    first, again, other = (trials_of(TASKS, "vt", 4096, scope=Scope((4096,), 1, 2, s)) for s in (0, 0, 1))
    assert first == again
    assert first[0] != other[0]
    assert first[0].parts != first[1].parts


def test_too_short() -> None:
    """Where the chain does not fit, the length is refused."""
    with pytest.raises(TooShortError):
        trials_of(TASKS, "vt", 700)
