"""What a review found: findings, each at lines that exist, and what became of the rest.

The kinds of findings are fixed, so that teams can filter by them and every report can explain them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["info", "warning", "error"]
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "error")


@dataclass(frozen=True, slots=True)
class Rule:
    """A kind of finding. `id` is what reports and ignore comments name; `help` says what to do about it."""

    id: str
    name: str
    summary: str
    help: str


RULES: dict[str, Rule] = {
    rule.id: rule
    for rule in (
        Rule(
            "correctness",
            "Wrong result",
            "The code computes something else than it is meant to.",
            "Check boundaries, conditions, operators, the order of arguments, and empty input.",
        ),
        Rule(
            "security",
            "Security",
            "Somebody can make the code do what they should not be able to.",
            "Pass untrusted values as parameters, not as text of a query, a command, a path or a page; check "
            "who may do what; keep secrets out of code and logs.",
        ),
        Rule(
            "concurrency",
            "Concurrency",
            "The outcome depends on timing, or something waits for ever.",
            "Await what has to be awaited, guard shared state, and take locks in one order.",
        ),
        Rule(
            "resource",
            "Resource",
            "A file, connection, lock or memory is not given back.",
            "Release it on every path, also when something fails.",
        ),
        Rule(
            "error-handling",
            "Error handling",
            "A failure is swallowed, mistaken for success, or handled in the wrong place.",
            "Handle the failures that can be expected, and let the others through with what caused them.",
        ),
        Rule(
            "api-break",
            "Broken interface",
            "Callers, stored data or other programs that worked before do not work any more.",
            "Keep what others rely on, or change it together with them and say so.",
        ),
        Rule(
            "performance",
            "Performance",
            "The code takes far more time or memory than the task needs.",
            "Move work out of loops, avoid repeated queries, and choose a data structure that fits.",
        ),
        Rule(
            "test-gap",
            "Missing test",
            "Changed behaviour that no test would notice if it broke.",
            "Test the changed behaviour, or repair the test that asserts nothing.",
        ),
        Rule(
            "maintainability",
            "Maintainability",
            "The code misleads its next reader.",
            "Rename, simplify or document what does not do what it says.",
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem, at lines of the new version that the change has touched.

    Lines and columns count from 1, columns in characters; the last line is included, the last column is
    not. `frame` are lines around the place with their numbers, those of the finding among them.
    `replacement` is the text that would stand in place of the whole lines. `fingerprint` tells the
    finding from all others of a review and stays the same when lines are added above it; `line_hash` is
    that of the first line as GitHub's code scanning computes it. `confidence` is from 0 to 1.
    """

    rule: str
    severity: Severity
    confidence: float
    path: str
    start_line: int
    end_line: int
    start_column: int
    end_column: int
    message: str
    fingerprint: str
    line_hash: str
    frame: tuple[tuple[int, str], ...] = ()
    replacement: str | None = None

    @property
    def lines(self) -> tuple[str, ...]:
        """The lines of the finding, without their ends."""
        return tuple(text for number, text in self.frame if self.start_line <= number <= self.end_line)


@dataclass(frozen=True, slots=True)
class Unreviewed:
    """A changed file that was not reviewed, or not all of it, and why, without a full stop."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Review:
    """All of a review. `base` and `head` are commit ids, or empty where there are none.

    `dropped` counts findings that did not stay, by reason: `unverified` (the quote is not among the
    touched lines), `refuted` (by the second look), `unchecked` (a cap came before it), `duplicate`,
    `severity` (too low), `ignored` (by a comment or a path rule), `baseline` (known before), `excess`
    (more than were wanted: those are in `excess`). `complete` is false when a cap on time or tokens ended
    the review or an answer. Times in seconds.
    """

    findings: tuple[Finding, ...]
    files: tuple[str, ...]
    unreviewed: tuple[Unreviewed, ...]
    dropped: dict[str, int]
    base: str
    head: str
    model: str
    context: Literal["diff", "related", "repo"]
    complete: bool
    prompt_tokens: int
    restored_tokens: int
    generated_tokens: int
    seconds: float
    warnings: tuple[str, ...] = ()
    excess: tuple[Finding, ...] = ()
    staleness: float = 0.0
