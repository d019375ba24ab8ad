"""Scores, their intervals, and the effective context that follows from them."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from m3cli.tasks.evaluate.results import ABSOLUTE_BAR, RELATIVE_BAR, Outcome, Run, Score
from m3cli.tasks.evaluate.trial import Question

SHARES = st.lists(st.floats(0, 1), min_size=1, max_size=300)


def outcomes(scores: dict[int, list[float]], depth: float | None = 0.5) -> tuple[Outcome, ...]:
    return tuple(
        Outcome(
            "niah_single_1",
            "retrieval",
            "whole",
            length,
            f"{i}",
            "?",
            ("x",),
            depth,
            score,
            "",
            10,
            0,
            1,
            0.1,
        )
        for length, values in scores.items()
        for i, score in enumerate(values)
    )


def run_of(scores: dict[int, list[float]], depth: float | None = 0.5) -> Run:
    return Run("f16", "f16", "full", "whole", outcomes(scores, depth))


@given(SHARES)
@example([2.7e-10, 2.7e-10])  # whose lower end is 0 but for rounding
def test_the_interval_solves_wilsons_equation(scores: list[float]) -> None:
    """At both ends, the mean is as many standard errors away as the confidence asks for."""
    score = Score.of(scores)
    assert 0 <= score.low <= score.mean + 1e-9
    assert score.mean - 1e-9 <= score.high <= 1
    for end in (score.low, score.high):
        if 1e-9 < end < 1 - 1e-9:  # beyond, the difference of two numbers holds nothing but rounding
            distance = abs(score.mean - end) / sqrt(end * (1 - end) / len(scores))
            assert distance == pytest.approx(1.959964, rel=1e-4)


def test_published_intervals() -> None:
    """Newcombe's (1998) examples of Wilson's method without continuity correction."""
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (right, of), (low, high) in published.items():
        score = Score.of([1.0] * right + [0.0] * (of - right))
        assert (score.low, score.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_the_effective_context_ends_where_the_lower_bound_falls_below_the_bar() -> None:
    """Both bars are held against the lower ends, and a longer length does not make up for a shorter one."""
    result = run_of(
        {512: [1.0] * 40, 1024: [1.0] * 40, 2048: [1.0] * 20 + [0.0] * 20, 4096: [1.0] * 40}
    ).groups()[0]
    assert (result.absolute.value, result.absolute.length) == (ABSOLUTE_BAR, 1024)
    assert (result.relative.value, result.relative.length) == (RELATIVE_BAR, 1024)
    assert result.absolute.undecided == 0


def test_too_few_samples_are_told_from_a_bad_score() -> None:
    """Twenty right answers of twenty are no proof of 85.6 %; that is undecided, not failed."""
    result = run_of({512: [1.0] * 20}).groups()[0]
    assert (result.absolute.length, result.absolute.undecided) == (0, 512)
    failed = run_of({512: [0.5] * 20}).groups()[0]
    assert (failed.absolute.length, failed.absolute.undecided) == (0, 0)


def test_a_model_that_answers_nothing_uses_nothing() -> None:
    """With a score of zero at the shortest length, the relative bar is zero too, and still not cleared."""
    result = run_of({512: [0.0] * 30, 1024: [0.0] * 30}).groups()[0]
    assert (result.relative.value, result.relative.length, result.relative.undecided) == (0, 0, 0)


def test_lengths_are_compared_on_the_same_tasks() -> None:
    """A task that the shortest length could not hold says nothing of how scores fall with length."""
    hard = [replace(outcome, task="cwe") for outcome in outcomes({1024: [0.0] * 40})]
    run = Run("f16", "f16", "full", "whole", (*outcomes({512: [1.0] * 40, 1024: [1.0] * 40}), *hard))
    (result,) = run.groups()
    assert {length: score.mean for length, score in result.scores.items()} == {512: 1.0, 1024: 1.0}
    assert run.tasks()["cwe"][1024].mean == 0.0


def test_a_length_that_was_not_finished_does_not_count() -> None:
    """The questions of a run come depth by depth: those of a part say nothing of the whole."""
    run = replace(run_of({512: [1.0] * 40, 1024: [1.0] * 40}), partial=1024)
    (result,) = run.groups()
    assert list(result.scores) == [512]


@pytest.mark.parametrize("count", range(1, 201))
def test_all_or_nothing_reaches_the_end_of_the_interval(count: int) -> None:
    """Also after rounding: all right may mean always right."""
    assert Score.of([1.0] * count).high == 1.0
    assert Score.of([0.0] * count).low == 0.0


def test_cells_are_rows_of_depths() -> None:
    """A depth of 1 is in the last row, and questions without a depth are in none."""
    run = Run("f16", "f16", "full", "whole", (*outcomes({512: [1.0]}, 0.0), *outcomes({512: [0.0]}, 1.0)))
    assert {place: score.mean for place, score in run.cells(4).items()} == {(512, 0): 1.0, (512, 3): 0.0}
    assert run_of({512: [1.0]}, None).cells(4) == {}


@pytest.mark.parametrize(
    ("answer", "reply", "score"),
    [
        ("30", "It is 30.", 1),
        ("30", "It is 300.", 0),
        ("30", "It is 0.30", 0),
        ("30", "see client.py:12-30", 0),
        ("30", "30 (client.py:12-14)", 1),
        ("0.5", "timeout=0.5,", 1),
        ("client.py", "in src/client.py.", 1),
        ("fetch", "`fetch_all` does", 0),
        ("fetch", "`Client.fetch()` does", 1),
        ("fetch", "`fetch()` does", 1),
        ("UTF-8", "It is utf-8", 1),
        ("a+b", "The value a+b is", 1),
        ("10", "It is -10.", 0),
        ("234", "1,234", 0),
        ("10", "10,000", 0),
        ("10", "10, or so", 1),
    ],
)
def test_words_are_found_as_words(answer: str, reply: str, score: float) -> None:
    """A number is not found within another, nor in the lines of a citation."""
    assert Question("", "", (answer,), scoring="words").score(reply) == score


def test_rulers_score_is_the_share_of_references_in_the_reply() -> None:
    """Anywhere in the reply, whatever the case."""
    assert Question("", "", ("ABCDE", "FGHIJ")).score("they are: abcde") == 0.5
