"""What all reports of an evaluation share: names, colours of scores, and runs held against each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from m3cli.tasks.evaluate.difference import Difference
from m3cli.tasks.evaluate.results import Score

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from m3cli.tasks.evaluate.results import Evaluation, Outcome, Run

STEPS = 20  # of the scale of colours; step 0 is a score of 0, step 20 one of 1

# Colours of the scores 0, 1/4, 1/2, 3/4 and 1: from rust over cream to a pale blue on paper, from amber to a
# deep blue in the dark. Lightness alone tells them apart, and what went wrong stands out on both.
_LIGHT = ("#7a1f05", "#c4501b", "#ef9a4e", "#f6d6a6", "#d9ecf8")
_DARK = ("#ffc08a", "#e58a45", "#a85a24", "#5a4534", "#16354a")
_INKS = ("#000000", "#ffffff")


@dataclass(frozen=True, slots=True)
class Compared:
    """A run beside others: its score, and what a question took on average, at the questions of all of them.

    Runs without any answer are not among these all. `score` is None if there is no such question,
    `difference` for what the others are held against, and where no question was asked in both.
    """

    run: Run
    name: str
    score: Score | None
    difference: Difference | None
    prompt_tokens: float
    computed_tokens: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs that differ in one thing. `of` says in what, `at` what they have in common, `base` is a name."""

    of: Literal["modes", "kv"]
    at: str
    base: str
    rows: tuple[Compared, ...]

    @property
    def title(self) -> str:
        """`Modes` or `KV caches`."""
        return "Modes" if self.of == "modes" else "KV caches"


def kv_name(run: Run) -> str:
    """`q8_0`, or `f16/q8_0` where keys and values are not of the same type."""
    return run.type_k if run.type_k == run.type_v else f"{run.type_k}/{run.type_v}"


def run_names(evaluation: Evaluation) -> list[str]:
    """`q8_0 · whole` for each run; the attention too, where it is not the same in all."""
    return [f"{kv} · {run.mode}" for kv, run in zip(_caches(evaluation), evaluation.runs, strict=True)]


def depth_name(row: int, depths: int) -> str:
    """`20–40 %`: the part of the haystack that a row of depths covers."""
    return f"{100 * row / depths:.3g}–{100 * (row + 1) / depths:.3g} %"


def percent(share: float, digits: int = 0) -> str:
    """`87`: only what is all or nothing is 100 or 0, however near it comes."""
    least = 10.0**-digits
    value = 100 * share
    if 0 < share < 1:
        value = min(max(value, least), 100 - least)
    return f"{value:.{digits}f}"


def interval(score: Score) -> str:
    """`80–93`, in percent."""
    return f"{percent(score.low)}–{percent(score.high)}"


def step(score: float) -> int:
    """The place of a score on the scale of colours; the ends are for 0 and 1 alone."""
    nearest = round(score * STEPS)
    return min(max(nearest, 1), STEPS - 1) if 0 < score < 1 else nearest


def colours(number: int, *, dark: bool = False) -> tuple[str, str]:
    """Background and ink, as `#rrggbb`, of a step of the scale."""
    anchors = _DARK if dark else _LIGHT
    place = number / STEPS * (len(anchors) - 1)
    low = min(int(place), len(anchors) - 2)
    pairs = zip(_channels(anchors[low]), _channels(anchors[low + 1]), strict=True)
    mixed = [round(a + (b - a) * (place - low)) for a, b in pairs]
    back = f"#{mixed[0]:02x}{mixed[1]:02x}{mixed[2]:02x}"
    return back, max(_INKS, key=lambda ink: contrast(ink, back))


def contrast(a: str, b: str) -> float:
    """The contrast of two colours as WCAG 2 defines it, from 1 to 21."""
    low, high = sorted(
        0.2126 * _linear(red) + 0.7152 * _linear(green) + 0.0722 * _linear(blue)
        for red, green, blue in (_channels(a), _channels(b))
    )
    return (high + 0.05) / (low + 0.05)


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _linear(channel: int) -> float:
    """Of sRGB."""
    value = channel / 255
    return value / 12.92 if value <= 0.04045 else float(((value + 0.055) / 1.055) ** 2.4)


def comparisons(evaluation: Evaluation) -> list[Comparison]:
    """Modes with the same KV cache, and KV caches in the same mode, wherever there are several.

    Modes are held against `whole`, KV caches against f16; against the first where there is no such run.
    """
    caches = _caches(evaluation)
    numbered = list(enumerate(evaluation.runs))
    found = []
    for cache, members in _grouped(numbered, lambda item: caches[item[0]]).items():
        runs = [run for _, run in members]
        names: list[str] = [run.mode for run in runs]
        found.append(_compare("modes", f"KV {cache}", runs, names, [run.mode == "whole" for run in runs]))
    for mode, members in _grouped(numbered, lambda item: item[1].mode).items():
        runs = [run for _, run in members]
        names = [caches[number] for number, _ in members]
        plain = [run.type_k == run.type_v == "f16" for run in runs]
        found.append(_compare("kv", f"mode {mode}", runs, names, plain))
    return [comparison for comparison in found if len(comparison.rows) > 1]


def _caches(evaluation: Evaluation) -> list[str]:
    several = len({run.attention for run in evaluation.runs}) > 1
    return [f"{kv_name(run)} · {run.attention}" if several else kv_name(run) for run in evaluation.runs]


def _grouped(
    items: Sequence[tuple[int, Run]], key: Callable[[tuple[int, Run]], Hashable]
) -> dict[Hashable, list[tuple[int, Run]]]:
    groups: dict[Hashable, list[tuple[int, Run]]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _compare(
    of: Literal["modes", "kv"],
    at: str,
    runs: Sequence[Run],
    names: Sequence[str],
    is_base: Sequence[bool],
) -> Comparison:
    first = is_base.index(True) if True in is_base else 0
    asked = [{_asked(outcome) for outcome in run.outcomes} for run in runs if run.outcomes]
    common = set.intersection(*asked) if asked else set()
    rows = []
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        outcomes = [outcome for outcome in run.outcomes if _asked(outcome) in common]
        count = max(len(outcomes), 1)
        rows.append(
            Compared(
                run,
                name,
                Score.of(outcome.score for outcome in outcomes) if outcomes else None,
                None if number == first else Difference.of(run.outcomes, runs[first].outcomes),
                sum(outcome.prompt_tokens for outcome in outcomes) / count,
                sum(outcome.prompt_tokens - outcome.restored_tokens for outcome in outcomes) / count,
                sum(outcome.seconds for outcome in outcomes) / count,
            )
        )
    return Comparison(of, at, names[first], tuple(rows))


def _asked(outcome: Outcome) -> tuple[str, int, str]:
    """What tells a question from all others."""
    return outcome.task, outcome.length, outcome.question
