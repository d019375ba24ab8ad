"""Evaluations for the tests of their reports."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from m3cli.tasks.evaluate.results import Evaluation, Outcome, Run

if TYPE_CHECKING:
    from m3cli.engine.events import Attention, KVType
    from m3cli.tasks.evaluate.results import Mode
    from m3cli.tasks.evaluate.trial import Group

HOSTILE = (
    "<script>document.title='owned'</script>",
    "</style></script><img src=x onerror=\"document.title='owned'\">",
    "<!-- &lt;b&gt; {{ 7 * 7 }} {% raw %} [bold red]markup[/] ]]>",
    "right\u202eto-left\u200f\u2066 end",
    "\x1b[2J\x07\x9bcontrols\x00",
    "half\udcff pair\ud800, line\u2028end",
    "$\\frac{1$ _hidden 日本",
    "x" * 400,
)
TASKS: dict[str, Group] = {"niah_single_2": "retrieval", "niah_multikey_1": "retrieval", "vt": "tracing"}


def outcome(
    score: float,
    *,
    task: str = "niah_single_2",
    group: Group = "retrieval",
    mode: Mode = "whole",
    length: int = 4096,
    question: str = "0",
    text: str = "\nWhat is it?",
    answers: tuple[str, ...] = ("7",),
    depth: float | None = 0.5,
    reply: str = "No idea.",
    seconds: float = 2.0,
    prompt_tokens: int = 4000,
    restored_tokens: int = 3000,
) -> Outcome:
    """One answer, of which a test says what it is about."""
    return Outcome(
        task,
        group,
        mode,
        length,
        question,
        text,
        answers,
        depth,
        score,
        reply,
        prompt_tokens,
        restored_tokens,
        20,
        seconds,
    )


def run_of(
    *outcomes: Outcome,
    kv: tuple[KVType, KVType] = ("f16", "f16"),
    mode: Mode = "whole",
    attention: Attention = "sparse",
    partial: int = 0,
) -> Run:
    """A run, by default of the whole corpus with an f16 cache."""
    return Run(kv[0], kv[1], attention, mode, outcomes, partial)


def evaluation_of(*runs: Run, **changes: Any) -> Evaluation:
    """An evaluation of these runs; lengths are those that they have."""
    lengths = {answer.length for run in runs for answer in run.outcomes}
    values: dict[str, Any] = {
        "model": "tiny-m3",
        "digest": "ab" * 32,
        "description": "minimax-m3, 1.2 B parameters, Q4_K",
        "haystack": "Python's standard library",
        "lengths": tuple(sorted(lengths)),
        "depths": 5,
        "samples": 4,
        "seed": 0,
        "runs": runs,
        "skipped": (),
        "complete": True,
        "computed_tokens": 1_234_567,
        "known": 0,
        "seconds": 4000.0,
    }
    return Evaluation(**{**values, **changes})


def varied(
    seed: int,
    *,
    kv: tuple[KVType, KVType] = ("f16", "f16"),
    mode: Mode = "whole",
    attention: Attention = "sparse",
    lengths: tuple[int, ...] = (512, 1024, 4096, 32_768, 131_072, 1_048_576),
    decline: float = 0.12,
) -> Run:
    """Two tasks with depths and one without; scores fall with the length and in the middle."""
    rng = random.Random(f"{seed} {kv} {mode}")
    answers = []
    for place, length in enumerate(lengths):
        for task, group in TASKS.items():
            for number in range(20):
                depth = None if task == "vt" else (number + rng.random()) / 20
                middle = 0.0 if depth is None else 0.6 * depth * (1 - depth)
                good = rng.random() > decline * place * (0.5 + middle)
                score = 1.0 if good else rng.choice((0.0, 0.0, 0.5) if task != "vt" else (0.2, 0.6))
                reply = f"The answer to {number} is {rng.randrange(10**6)}."
                answers.append(
                    outcome(
                        score,
                        task=task,
                        group=group,
                        mode=mode,
                        length=length,
                        question=str(number),
                        depth=depth,
                        reply=reply,
                        prompt_tokens=length - 20,
                        restored_tokens=length // 2,
                        seconds=rng.random() * length / 1000,
                    )
                )
    return run_of(*answers, kv=kv, mode=mode, attention=attention)
