"""Pieces of text that several renderers share."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from m3cli.corpus.types import skip_counts

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console
    from rich.table import Table

    from m3cli.corpus.types import Skip

# What a terminal could take for a command, or for an order to turn text round. Newline and tab stay.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def stderr_console() -> Console:
    """Where everything goes that is not the result."""
    from rich.console import Console

    width = 80 if os.environ.get("COLUMNS") == "0" else None  # rich would print nothing
    return Console(stderr=True, highlight=False, soft_wrap=True, emoji=False, width=width)


def printable(text: str) -> str:
    """`text` with control characters made visible, so that no file can drive the terminal."""
    return _CONTROL.sub("\ufffd", text)


def amount(count: int, noun: str) -> str:
    """`1 file`, `1,234 files`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def size(count: float) -> str:
    """Bytes for people, in powers of 1,000: `98.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def fact_table(rows: Iterable[tuple[str, str] | tuple[str, str, str]]) -> Table:
    """One row a fact: its name, its value, and a style for the value."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value, *style in rows:
        table.add_row(name, Text(printable(value), style=style[0] if style else ""))
    return table


def skip_summary(skips: Sequence[Skip]) -> str:
    """`12 binary, 3 lock file`."""
    return ", ".join(f"{count:,} {reason}" for reason, count in skip_counts(skips).items())


def skip_lines(skips: Sequence[Skip]) -> list[str]:
    """One line a skipped path, with the reason."""
    return [
        printable(f"  skipped {skip.path}: {skip.reason.value}{f' ({skip.detail})' if skip.detail else ''}")
        for skip in skips
    ]
