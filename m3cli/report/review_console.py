"""A review as a person sees it in a terminal or in the log of a build."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from m3cli.corpus import names
from m3cli.report import review_text
from m3cli.report.review_json import whole_lines
from m3cli.report.review_text import by_severity, place, readable, summary

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from m3cli.tasks.findings import Finding, Review

_STYLES = {"error": "bold red", "warning": "bold yellow", "info": "bold blue"}
_WIDTH = 200  # characters of a line of code
_BEFORE = 60  # of them before the place, if the line is longer
_LINES = 20  # of a frame or a suggestion
_CONTEXT = 5  # of them before the place
# Build logs take commands from their text: `::…::` where a line starts, `##[…]` and `##vso[…]` anywhere.
_LOG_COMMAND = re.compile(r"##(?=\w*\[)")


def show_review(review: Review, console: Console) -> None:
    """Every finding with its code, then what was not reviewed and a summary.

    No timings, and no warnings: those are on stderr.
    """
    from rich.text import Text

    def show(text: str, style: str = "") -> None:
        console.print(Text(_LOG_COMMAND.sub("# #", text), style=style), soft_wrap=True)

    for finding in by_severity(review.findings):
        show(f"{finding.severity}[{finding.rule}] {place(finding)}", _STYLES[finding.severity])
        for line in readable(finding.message).split("\n"):
            show(f"  | {line}")
        for line, style in _frame(finding):
            show(line, style)
        for line in _suggestion(finding):
            show(line, "green")
        console.print()
    for unreviewed in review.unreviewed:
        show(f"not reviewed: {names.printable(unreviewed.path)}: {_line(unreviewed.reason)}", "yellow")
    if counts := review_text.dropped(review):
        show(f"findings that did not stay: {counts}", "dim")
    show(summary(review), "bold")


def _frame(finding: Finding) -> Iterator[tuple[str, str]]:
    """The lines around the place, those of the finding marked and bright."""
    width = len(str(finding.frame[-1][0])) if finding.frame else 0
    frame = [(number, text) for number, text in finding.frame if number >= finding.start_line - _CONTEXT]
    for number, text in frame[:_LINES]:
        inside = finding.start_line <= number <= finding.end_line
        column = finding.start_column if number == finding.start_line else 1
        mark = ">" if inside else " "
        yield f"{mark} {number:>{width}} | {_window(text, column)}", "" if inside else "dim"
    if (more := len(frame) - _LINES) > 0:
        yield f"  {'':{width}} | … {more:,} more lines", "dim"


def _suggestion(finding: Finding) -> Iterator[str]:
    if finding.replacement is None:
        return
    if not finding.replacement:
        yield "suggestion: remove these lines"
        return
    lines = whole_lines(finding.replacement).split("\n")
    yield "suggestion:"
    for line in lines[:_LINES]:
        yield f"  + {_window(line, 1)}"
    if (more := len(lines) - _LINES) > 0:
        yield f"  … {more:,} more lines"


def _window(text: str, column: int) -> str:
    """The part of a long line around `column`, which counts from 1."""
    text = text.removesuffix("\r")
    if len(text) > _WIDTH:
        start = min(max(0, column - 1 - _BEFORE), len(text) - _WIDTH)
        end = start + _WIDTH
        text = ("…" if start else "") + text[start:end] + ("…" if end < len(text) else "")
    return _line(text)


def _line(text: str) -> str:
    return readable(text).replace("\n", "\ufffd")
