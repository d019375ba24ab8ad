"""An evaluation as tables in a terminal. Colours only repeat what the numbers say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from m3cli.corpus.names import printable
from m3cli.report.eval_parts import (
    colours,
    comparisons,
    depth_name,
    interval,
    percent,
    run_names,
    step,
)
from m3cli.report.text import amount, duration, fact_table
from m3cli.tasks.evaluate.results import ABSOLUTE_BAR, RELATIVE_BAR

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table

    from m3cli.report.eval_parts import Comparison
    from m3cli.tasks.evaluate.results import Bar, Evaluation, Run, Score, Skipped
    from m3cli.tasks.evaluate.trial import Group

EFFECTIVE = (
    f"the longest length up to which a group scores at least {100 * ABSOLUTE_BAR:g} % (absolute), or "
    f"{100 * RELATIVE_BAR:g} % of what it scores at its shortest (relative), its whole interval too"
)
UNDECIDED = "undecided: the score clears the bar, its interval does not; more samples would tell"
INCOMPLETE = "It was ended before all questions were asked: scores are those of the answers so far."
NO_DEPTH = "No question here stands at a depth."
NOT_FINISHED = "No length was finished."
COMPARED = "Scores, tokens and seconds are those of the questions that all runs with answers have in common."


def length_name(tokens: int) -> str:
    """`512`, `4k`, `1M` in powers of 1,024; what is none of them is written out: `6,000`."""
    for unit, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if tokens and tokens % unit == 0:
            return f"{tokens // unit:,}{letter}"
    return f"{tokens:,}"


def bar_text(bar: Bar, scores: Mapping[int, Score]) -> str:
    """The effective context against a bar: `32k`, `none`, or `32k, undecided at 64k`."""
    length, undecided = bar_words(bar, scores)
    if undecided and not bar.length:
        return undecided
    return f"{length}, {undecided}" if undecided else length


def bar_words(bar: Bar, scores: Mapping[int, Score]) -> tuple[str, str]:
    """The same in two parts: `32k`, `32k or more` or `none`, and `undecided at 64k` or nothing."""
    more = " or more" if bar.length == max(scores) else ""
    length = f"{length_name(bar.length)}{more}" if bar.length else "none"
    return length, f"undecided at {length_name(bar.undecided)}" if bar.undecided else ""


def unfinished(run: Run) -> str:
    """`64k was not finished, …`: the length at which the run ended early; empty if none."""
    return f"{length_name(run.partial)} was not finished: it counts for no group." if run.partial else ""


def points(share: float) -> str:
    """`+3.1`: a difference in percentage points."""
    return f"{100 * share:+.1f}"


def facts(evaluation: Evaluation) -> list[tuple[str, str]]:
    """What was evaluated, and how: name and value, of which nothing can drive a terminal."""
    runs = evaluation.runs
    answers = sum(len(run.outcomes) for run in runs)
    old = f", {evaluation.known:,} of them from earlier runs" if evaluation.known else ""
    rows = [
        ("model", evaluation.model),
        ("", evaluation.description),
        ("runs", ", ".join(run_names(evaluation)) or "none"),
        ("attention", ", ".join(dict.fromkeys(run.attention for run in runs))),
        ("haystack", evaluation.haystack),
        ("lengths", ", ".join(map(length_name, evaluation.lengths))),
        ("asked", f"{amount(evaluation.samples, 'sample')} at each of {amount(evaluation.depths, 'depth')}"),
        ("seed", str(evaluation.seed)),
        ("answers", f"{answers:,}{old}"),
        ("computed", f"{amount(evaluation.computed_tokens, 'token')} in {duration(evaluation.seconds)}"),
    ]
    return [(name, printable(value)) for name, value in rows if value]


def skip_rows(skipped: Iterable[Skipped]) -> list[tuple[str, str, str]]:
    """Task, lengths and reason; the lengths at which a task was skipped for one reason together."""
    found: dict[tuple[str, str], list[str]] = {}
    for skip in skipped:
        found.setdefault((skip.task, skip.reason), []).append(length_name(skip.length))
    return [
        (printable(task), ", ".join(lengths), printable(reason)) for (task, reason), lengths in found.items()
    ]


def heatmap(run: Run, depths: int, group: Group | None = None) -> RenderableType:
    """Mean scores in percent, a row a part of the haystack, a column a length.

    Of `group` alone if one is given. Only questions that are about one place of the haystack have a depth.
    """
    from rich.text import Text

    cells = run.cells(depths, group)
    if not cells:
        return Text(NO_DEPTH, style="dim")
    lengths = sorted({length for length, _ in cells})
    rows = [
        (depth_name(row, depths), [_cell(cells.get((length, row))) for length in lengths])
        for row in range(depths)
    ]
    return _Columns("depth", [length_name(length) for length in lengths], rows)


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Print all there is to say, one table after the other."""

    def say(line: str, style: str = "") -> None:
        console.print(line, style=style, markup=False, highlight=False)

    console.print(fact_table(facts(evaluation)))
    names = run_names(evaluation)
    if rows := _effective(evaluation.runs, names):
        say(f"\nEffective context: {EFFECTIVE}")
        table = _table("run", "group", "absolute", "relative")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        results = [result for run in evaluation.runs for result in run.groups()]
        if any(result.absolute.undecided or result.relative.undecided for result in results):
            say(UNDECIDED, "dim")
    for run, name in zip(evaluation.runs, names, strict=True):
        if not run.outcomes:
            say(f"\n{name}: nothing was answered")
            continue
        say(f"\n{name}: scores by length, in percent, with their intervals of 95 %")
        console.print(_scores(run) if run.groups() else NOT_FINISHED)
        if run.partial:
            say(unfinished(run))
        if run.cells(evaluation.depths):
            say(f"\n{name}: scores by depth and length, in percent")
            console.print(heatmap(run, evaluation.depths))
    compared = comparisons(evaluation)
    for comparison in compared:
        say(f"\n{comparison.title} compared, {comparison.at}; differences to {comparison.base}, in points")
        console.print(_compared(comparison))
    if compared:
        say(COMPARED, "dim")
    if evaluation.skipped:
        say("\nSkipped:")
        table = _table("task", "lengths", "reason")
        for row in skip_rows(evaluation.skipped):
            table.add_row(*row)
        console.print(table)
    if not evaluation.complete:
        say(f"\n{INCOMPLETE}", "yellow")
    for warning in evaluation.warnings:
        say(f"warning: {printable(warning)}", "yellow")


def _effective(runs: Sequence[Run], names: Sequence[str]) -> list[tuple[str, ...]]:
    """A row for each group of each run; only the first names the run."""
    return [
        (
            "" if number else name,
            result.group,
            bar_text(result.absolute, result.scores),
            bar_text(result.relative, result.scores),
        )
        for run, name in zip(runs, names, strict=True)
        for number, result in enumerate(run.groups())
    ]


def _scores(run: Run) -> _Columns:
    results = run.groups()
    lengths = sorted({length for result in results for length in result.scores})
    rows = [
        (result.group, [_cell(result.scores.get(length), spread=True) for length in lengths])
        for result in results
    ]
    return _Columns("group", [length_name(length) for length in lengths], rows)


def _compared(comparison: Comparison) -> Table:
    name = "mode" if comparison.of == "modes" else "kv"
    numbers = ("questions", "score", "difference", "tokens", "computed", "seconds")
    table = _table(name, *numbers, numbers=numbers)
    for row in comparison.rows:
        gain = row.difference
        if row.score is None:
            table.add_row(row.name, "0", *["-"] * 5)
            continue
        table.add_row(
            row.name,
            f"{row.score.count:,}",
            f"{percent(row.score.mean, 1)}\n{interval(row.score)}",
            f"{points(gain.value)}\n{points(gain.low)} to {points(gain.high)}" if gain else "-",
            f"{row.prompt_tokens:,.0f}",
            f"{row.computed_tokens:,.0f}",
            f"{row.seconds:,.1f}",
        )
    return table


def _table(*columns: str, numbers: Sequence[str] = ()) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
    return table


def _cell(score: Score | None, *, spread: bool = False) -> tuple[list[str], str]:
    """Lines and style of a cell."""
    if score is None:
        return ["-"], "dim"
    back, ink = colours(step(score.mean))
    lines = [percent(score.mean, 1), interval(score)] if spread else [percent(score.mean)]
    return lines, f"{ink} on {back}"


class _Columns:
    """A table that goes on below itself where the console has no room for all of its columns."""

    def __init__(
        self, corner: str, heads: Sequence[str], rows: Sequence[tuple[str, list[tuple[list[str], str]]]]
    ) -> None:
        self._corner = corner
        self._heads = heads
        self._rows = rows
        self._widths = [
            2 + max(len(head), *(len(line) for _, cells in rows for line in cells[place][0]))
            for place, head in enumerate(heads)
        ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        room = options.max_width - max(len(self._corner), *(len(name) for name, _ in self._rows)) - 1
        start = 0
        while start < len(self._heads):
            end = start + 1
            while end < len(self._heads) and sum(self._widths[start : end + 1]) <= room:
                end += 1
            if start:
                yield ""
            yield self._block(start, end)
            start = end

    def _block(self, start: int, end: int) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid()
        table.add_column(no_wrap=True)
        for width in self._widths[start:end]:
            table.add_column(no_wrap=True, min_width=width)
        places = range(start, end)
        heads = [Text(f"{self._heads[place]:>{self._widths[place] - 1}}", "bold") for place in places]
        table.add_row(Text(f"{self._corner} ", "bold"), *heads)
        for name, row in self._rows:
            table.add_row(f"{name} ", *(self._padded(row[place], self._widths[place]) for place in places))
        return table

    @staticmethod
    def _padded(cell: tuple[list[str], str], width: int) -> RenderableType:
        from rich.text import Text

        lines, style = cell
        return Text("\n".join(f"{line:>{width - 1}} " for line in lines), style)
