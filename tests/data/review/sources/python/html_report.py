"""Render the results of a test run as one HTML page."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

STATUSES = ("passed", "failed", "skipped")


@dataclass(frozen=True)
class Result:
    """One test: its full name, its status, seconds, and the message of a failure."""

    name: str
    status: str
    seconds: float
    message: str = ""


def format_duration(seconds: float) -> str:
    """Seconds as people read them: 250 ms, 3.2 s, 2 min 5 s."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of the values do not exceed."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    rank = max(1, math.ceil(share * len(ordered)))
    return ordered[rank - 1]


def summary(results: Sequence[Result]) -> str:
    """One line, such as "3 passed, 1 failed in 2.0 s"."""
    counts = Counter(result.status for result in results)
    parts = [f"{counts[status]} {status}" for status in STATUSES if counts[status]]
    return f"{', '.join(parts) or 'nothing run'} in {format_duration(sum(r.seconds for r in results))}"


def render_row(result: Result) -> str:
    """A table row; names and messages come from tests, so they are escaped."""
    message = f"<pre>{html.escape(result.message)}</pre>" if result.message else ""
    return (
        f'<tr class="{html.escape(result.status)}"><td>{html.escape(result.name)}</td>'
        f"<td>{format_duration(result.seconds)}</td><td>{message}</td></tr>"
    )


def slowest(results: Iterable[Result], count: int = 10) -> list[Result]:
    """The results that took longest, the slowest first."""
    return sorted(results, key=lambda result: (-result.seconds, result.name))[:count]


def render(results: Sequence[Result], title: str = "Test report") -> str:
    """The whole page: failures first, the others by name."""
    ordered = sorted(results, key=lambda result: (result.status != "failed", result.name))
    rows = [render_row(result) for result in ordered]
    slow = [f"<li>{html.escape(r.name)}: {format_duration(r.seconds)}</li>" for r in slowest(results)]
    return "\n".join(
        [
            "<!doctype html>",
            f"<title>{html.escape(title)}</title>",
            f"<h1>{html.escape(title)}</h1>",
            f"<p>{summary(results)}</p>",
            "<table>",
            *rows,
            "</table>",
            "<h2>Slowest</h2>",
            f"<ol>{''.join(slow)}</ol>",
        ]
    )
