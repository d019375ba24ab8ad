"""A review as workflow commands: annotations of GitHub Actions, printed by the step that ran m3."""

from __future__ import annotations

from typing import TYPE_CHECKING

from m3cli.report.review_text import by_severity, counted, cut, encodable, readable, severity_counts, summary
from m3cli.report.text import amount
from m3cli.tasks.findings import RULES

if TYPE_CHECKING:
    from m3cli.tasks.findings import Finding, Review

PER_STEP = 10  # of each kind; GitHub drops those after them without a word
_KINDS = {"error": "error", "warning": "warning", "info": "notice"}
_MESSAGE = 2000  # characters; the runner cuts at 4,096 UTF-16 units


def github_lines(review: Review) -> list[str]:
    """A workflow command a line, the most severe findings first, and a last line for the log.

    The last line holds numbers only: the runner looks for commands in it, too.
    """
    lines = []
    shown = []
    room = dict.fromkeys(_KINDS, PER_STEP)
    for finding in by_severity(review.findings):
        if room[finding.severity]:
            room[finding.severity] -= 1
            shown.append(finding)
            lines.append(_command(finding))
    lines.append(_last_line(review, shown))
    return lines


def _command(finding: Finding) -> str:
    rule = RULES[finding.rule]
    properties = {
        "file": _path(finding.path),
        "line": str(finding.start_line),
        "endLine": str(finding.end_line),
        "title": f"m3: {rule.name}",
    }
    listed = ",".join(f"{name}={_property(value)}" for name, value in properties.items())
    return f"::{_KINDS[finding.severity]} {listed}::{_data(cut(readable(finding.message), _MESSAGE))}"


def _last_line(review: Review, shown: list[Finding]) -> str:
    total, annotated = severity_counts(review.findings), severity_counts(shown)
    hidden = counted({severity: total[severity] - annotated[severity] for severity in total})
    line = summary(review)
    if hidden:
        line += f" Not shown as annotations, as GitHub takes {PER_STEP} of a kind: {hidden}."
    if review.unreviewed:
        line += f" Not reviewed: {amount(len(review.unreviewed), 'file')}."
    if count := sum(review.dropped.values()):
        line += f" Left out: {amount(count, 'finding')}."
    return line


def _path(path: str) -> str:
    # Annotations are matched by path, so only what would end the line or drive the log's terminal is changed.
    return readable(encodable(path))


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
