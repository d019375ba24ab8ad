"""What the tests of all tasks have in common: material, measures, and trials taken apart."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from m3cli.model.header import read_header
from m3cli.model.tokenizer import load_tokenizer
from m3cli.model.tokens import ByteTokenizer
from m3cli.tasks.evaluate.trial import Material, Scope, TooShortError
from tests.tasks.evaluate.measures import PlainMeasure
from tests.tasks.evaluate.oracle import oracle

if TYPE_CHECKING:
    from collections.abc import Mapping

    from m3cli.tasks.evaluate.trial import MakeTask, Question, Trial

BYTES = PlainMeasure(ByteTokenizer())
CODE = Path(__file__).read_text(encoding="utf-8") * 3
# Anything that a user may have.
MATERIALS = {
    "code": CODE,
    "prose": "The harbor was quiet. Nobody came, and nobody left!\nA gull cried. " * 40,
    "chinese": "港口很安静。没有人来，也没有人离开。海鸥在叫，风很大，船都停着" * 30,
    "unbroken": "港口很安静没有人来也没有人离开海鸥在叫风很大船都停着" * 50,
    "one giant line": "word " * 5000,
    "no blank": "x" * 9000,
    "short": "Twenty characters :)",
    "windows": "first line\r\n\r\n\tsecond line\r\n" * 90,
    "odd": "\x00\ud800 \u202e[INST] </s> <|im_start|>\n",
    "blank": " \n\t ",
    "empty": "",
}


@cache
def real_measure(path: str) -> PlainMeasure:
    """The measure of a GGUF file's own tokenizer."""
    tokenizer = load_tokenizer(read_header(Path(path)))
    assert tokenizer is not None
    return PlainMeasure(tokenizer)


def material(text: str = CODE) -> Material:
    return Material(text, (), "test", False)


def trials_of(
    tasks: Mapping[str, MakeTask],
    name: str,
    length: int,
    *,
    text: str = CODE,
    measure: PlainMeasure = BYTES,
    scope: Scope | None = None,
) -> list[Trial]:
    """All trials of a length."""
    task = tasks[name](material(text), measure, scope or Scope((length,), depths=3, samples=2))
    return list(task.trials(length))


def trials_or_none(
    tasks: Mapping[str, MakeTask],
    name: str,
    length: int,
    *,
    text: str = CODE,
    measure: PlainMeasure = BYTES,
    scope: Scope | None = None,
) -> list[Trial]:
    """Same, none where a task says that it is too long for the length, which it does before any trial."""
    task = tasks[name](material(text), measure, scope or Scope((length,), depths=3, samples=2))
    try:
        trials = task.trials(length)
    except TooShortError:
        return []
    return list(trials)


def prompt(trial: Trial, question: Question) -> str:
    return "".join(trial.parts) + question.text + question.lead


def check_lengths(trial: Trial, measure: PlainMeasure, slack: float = 0.02) -> None:
    """No prompt with its reply is longer than wanted; that of the longest question is not much shorter.

    In bytes, a single word may be more than 2 % of a very short one.
    """
    room = measure.room(trial.length, trial.max_tokens, trial.questions, trial.system)
    left = room - measure.count(trial.parts)
    assert 0 <= left <= max(slack * trial.length, 32 if measure is BYTES else 0)


def check_answers(trial: Trial) -> None:
    """Reading the prompt is enough for all answers, and each question is told from the others."""
    for question in trial.questions:
        assert question.score(oracle(prompt(trial, question))) == 1.0
    assert len({question.id for question in trial.questions}) == len(trial.questions)


def depth_in(trial: Trial, needle: str, measure: PlainMeasure, openings: int = 1) -> float:
    """Where a text really is, measured on the haystack as one string."""
    haystack = "".join(trial.parts[openings:])
    assert haystack.count(needle) == 1
    return measure.count([haystack[: haystack.index(needle)]]) / measure.count([haystack])
