"""An evaluation as one HTML page that needs nothing else.

The page loads nothing and runs nothing but its own script, which its Content-Security-Policy names by hash:
replies are what a model says about other people's texts. The same evaluation gives the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from m3cli.corpus.names import printable
from m3cli.report.eval_parts import (
    STEPS,
    colours,
    comparisons,
    depth_name,
    interval,
    percent,
    run_names,
    step,
)
from m3cli.report.eval_text import (
    COMPARED,
    EFFECTIVE,
    INCOMPLETE,
    NO_DEPTH,
    NOT_FINISHED,
    bar_words,
    facts,
    length_name,
    points,
    skip_rows,
    unfinished,
)
from m3cli.report.page import own, page
from m3cli.tasks.evaluate.trial import GROUPS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from m3cli.report.eval_parts import Comparison
    from m3cli.tasks.evaluate.results import Bar, Evaluation, Outcome, Run, Score
    from m3cli.tasks.evaluate.trial import Group

WRONG_LISTED = 40  # replies of a run that are shown
_LONGEST_REPLY = 2000  # characters, and of a question
_RIGHT = 1.0


@dataclass(frozen=True, slots=True)
class _Cell:
    """A score in a table; `words` and `place` say all of it to who sees neither place nor colour."""

    mean: str
    interval: str
    step: int
    words: str = ""
    place: str = ""


@dataclass(frozen=True, slots=True)
class _Heat:
    """A table with a column a length. `group` is empty for all groups together."""

    group: str
    lengths: Sequence[str]
    rows: Sequence[tuple[str, Sequence[_Cell | None]]]


def render(evaluation: Evaluation) -> str:
    """The page about `evaluation`."""
    style = f"{own('pack_report.css')}\n{own('eval_report.css')}\n{_scale()}"
    return page(
        "eval_report.html.jinja",
        script=own("eval_report.js"),
        style=style,
        title=printable(evaluation.model),
        facts=[(name, value) for name, value in facts(evaluation) if name != "model"],
        notes=[] if evaluation.complete else [INCOMPLETE],
        warnings=[printable(warning) for warning in evaluation.warnings],
        effective=EFFECTIVE,
        no_depth=NO_DEPTH,
        not_finished=NOT_FINISHED,
        compared=COMPARED,
        steps=range(STEPS + 1),
        runs=[_run(evaluation, *named) for named in zip(evaluation.runs, run_names(evaluation), strict=True)],
        comparisons=[_comparison(comparison) for comparison in comparisons(evaluation)],
        skipped=skip_rows(evaluation.skipped),
        wrong_listed=WRONG_LISTED,
    )


def _scale() -> str:
    """Style rules for each step of the scale of colours, on a light and on a dark page."""
    rules = []
    for around, dark in (("{}", False), ("@media (prefers-color-scheme: dark) {{\n{}\n}}", True)):
        steps = (
            f".s{number} {{ background: {back}; color: {ink}; }}"
            for number in range(STEPS + 1)
            for back, ink in [colours(number, dark=dark)]
        )
        rules.append(around.format("\n".join(steps)))
    return "\n".join(rules)


def _run(evaluation: Evaluation, run: Run, name: str) -> dict[str, Any]:
    results = run.groups()
    wrong = [outcome for outcome in run.outcomes if outcome.score < _RIGHT]
    maps = [_map(run, evaluation.depths, group) for group in (None, *GROUPS)]
    tables = (
        _table("group", {result.group: result.scores for result in results}),
        _table("task", run.tasks()),
    )
    return {
        "name": name,
        "answers": len(run.outcomes),
        "groups": [
            {
                "name": result.group,
                "bars": [_bar(bar, result.scores) for bar in (result.absolute, result.relative)],
            }
            for result in results
        ],
        "maps": [heat for heat in maps if heat.rows],
        "unfinished": unfinished(run),
        "scores": [table for table in tables if table.rows],
        "wrong": [_wrong(outcome) for outcome in _sample(wrong)],
        "wrong_count": len(wrong),
    }


def _bar(bar: Bar, scores: Mapping[int, Score]) -> dict[str, str]:
    """An effective context in words: the length, the bar, and what is undecided."""
    length, undecided = bar_words(bar, scores)
    return {
        "length": length,
        "bar": f"needs {percent(bar.value, 1)} %",
        "undecided": f"{undecided}: more samples would tell" if undecided else "",
    }


def _map(run: Run, depths: int, group: Group | None) -> _Heat:
    """Scores by depth and length; without rows if nothing in it has a depth."""
    cells = run.cells(depths, group)
    lengths = sorted({length for length, _ in cells})
    rows = []
    for row in range(depths) if cells else ():
        name = depth_name(row, depths)
        rows.append((name, [_cell(cells.get((at, row)), at, f"depth {name}") for at in lengths]))
    return _Heat(group or "", [length_name(length) for length in lengths], rows)


def _table(of: str, scores: Mapping[str, Mapping[int, Score]]) -> _Heat:
    lengths = sorted({length for by_length in scores.values() for length in by_length})
    rows = []
    for raw, by_length in scores.items():
        name = printable(raw)
        rows.append((name, [_cell(by_length.get(at), at, name) for at in lengths]))
    return _Heat(of, [length_name(length) for length in lengths], rows)


def _cell(score: Score | None, length: int, where: str) -> _Cell | None:
    if score is None:
        return None
    low, high = percent(score.low), percent(score.high)
    answers = "1 answer" if score.count == 1 else f"{score.count:,} answers"
    words = f"{percent(score.mean, 1)} %, interval {low} to {high} %, {answers}"
    place = f"{length_name(length)}, {where}"
    return _Cell(percent(score.mean), interval(score), step(score.mean), words, place)


def _comparison(comparison: Comparison) -> dict[str, Any]:
    rows = [
        {
            "name": row.name,
            "count": score.count if score else 0,
            "answered": bool(row.run.outcomes),
            "cell": score and _Cell(percent(score.mean, 1), interval(score), step(score.mean)),
            "difference": row.difference and points(row.difference.value),
            "between": row.difference and f"{points(row.difference.low)} to {points(row.difference.high)}",
            "common": row.difference and row.difference.count,
            "prompt_tokens": f"{row.prompt_tokens:,.0f}",
            "computed_tokens": f"{row.computed_tokens:,.0f}",
            "seconds": f"{row.seconds:,.1f}",
        }
        for row in comparison.rows
        for score in [row.score]
    ]
    return {"of": comparison.title, "at": comparison.at, "base": comparison.base, "rows": rows}


def _sample(wrong: Sequence[Outcome]) -> list[Outcome]:
    """Some of all tasks and lengths: one of each first, then a second of each, up to the limit."""
    kinds: dict[tuple[str, int], list[Outcome]] = {}
    for outcome in wrong:
        kinds.setdefault((outcome.task, outcome.length), []).append(outcome)
    turns = zip_longest(*kinds.values())
    chosen = [outcome for turn in turns for outcome in turn if outcome is not None][:WRONG_LISTED]
    return sorted(chosen, key=lambda outcome: (outcome.length, outcome.task))


def _wrong(outcome: Outcome) -> dict[str, Any]:
    reply, more = _cut(outcome.reply)
    asked, more_asked = _cut(outcome.text.strip())
    return {
        "task": printable(outcome.task),
        "length": length_name(outcome.length),
        "depth": "" if outcome.depth is None else f"{100 * outcome.depth:.0f} %",
        "score": percent(outcome.score),
        "step": step(outcome.score),
        "question": printable(outcome.question),
        "asked": asked,
        "more_asked": more_asked,
        "expected": [printable(answer) for answer in outcome.answers],
        "reply": reply,
        "more": more,
    }


def _cut(text: str) -> tuple[str, int]:
    """The beginning of a text, in which lines stay lines, and how many more characters it has."""
    cut = text[:_LONGEST_REPLY]
    return "\n".join(printable(line) for line in cut.split("\n")), len(text) - len(cut)
