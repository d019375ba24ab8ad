"""A review as Markdown, for a comment on a pull request.

The texts come from a model that has read files which anybody may have written: they may hold Markdown, HTML,
mentions and commands, and none of it may work.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from m3cli.corpus import names
from m3cli.report import review_text
from m3cli.report.review_json import whole_lines
from m3cli.report.review_text import by_severity, cut, place, readable, severity_counts, summary, unlinked
from m3cli.report.text import amount
from m3cli.tasks.findings import RULES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from m3cli.tasks.findings import Finding, Review

MARKER = "<!-- m3 review -->"  # the first line, by which a bot finds the comment that it has to replace
LIMIT = 65_536  # UTF-16 units that GitHub takes in a comment
_UNREVIEWED, _WARNINGS = 8000, 4000  # units of the lists after the findings
_MESSAGE, _PATH, _REASON = 3000, 1000, 500  # characters of one text
_SUGGESTION = 6000  # characters; a longer one would leave no room for the others
_SPECIAL = re.compile(r"[\\`*_\[\]()#+\-!|~$]")
_CODE = re.compile(r"`([^`\n]+)`")


def markdown(review: Review) -> str:
    """A comment of at most LIMIT units that says how many findings did not fit."""
    findings = by_severity(review.findings)
    head = f"{MARKER}\n**{summary(review)}**\n\n"
    tail = _tail(review)
    # The sentence about what did not fit is shorter than 200.
    blocks = _fitting([_block(finding) for finding in findings], LIMIT - _units(head + tail) - 200)
    more = ""
    if len(blocks) < len(findings):
        left = review_text.counted(severity_counts(findings[len(blocks) :]))
        more = f"Not shown, as a comment holds no more: {left}.\n\n"
    return head + "".join(blocks) + more + tail


def _block(finding: Finding) -> str:
    rule = RULES[finding.rule]
    where = _code(place(finding), _PATH)
    # On one line with words of ours before it, no text can be a heading, a list, a quote or a command.
    message = _inline(finding.message, _MESSAGE)
    block = f"**{finding.severity.capitalize()}** ({rule.name}) in {where}: {message}\n\n"
    if finding.replacement is None:
        return block
    text = readable(whole_lines(finding.replacement))
    if len(text) > _SUGGESTION:
        return f"{block}_A suggestion of {len(text):,} characters is left out here._\n\n"
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{block}{fence}suggestion\n{text}{chr(10) if finding.replacement else ''}{fence}\n\n"


def _tail(review: Review) -> str:
    parts = []
    if review.unreviewed:
        title = f"Not reviewed, or not all of it: {amount(len(review.unreviewed), 'file')}"
        lines = [f"- {_code(u.path, _PATH)}: {_inline(u.reason, _REASON)}\n" for u in review.unreviewed]
        listed = _list(lines, _UNREVIEWED)
        parts.append(f"<details><summary>{title}</summary>\n\n{listed}\n</details>\n")
    if review.warnings:
        lines = [f"- note: {_inline(warning, _REASON)}\n" for warning in review.warnings]
        parts.append(_list(lines, _WARNINGS))
    if counts := review_text.dropped(review):
        parts.append(f"Findings that did not stay: {_inline(counts, _REASON)}.\n")
    model = _code(review.model, _PATH)
    parts.append(f"<sub>Found by {model}, a language model: check before you change the code.</sub>\n")
    return "\n".join(parts)


def _list(lines: Sequence[str], room: int) -> str:
    shown = _fitting(lines, room)
    more = len(lines) - len(shown)
    return "".join(shown) + (f"- and {more:,} more\n" if more else "")


def _fitting(texts: Sequence[str], room: int) -> list[str]:
    """The first of `texts` that fit into `room` units together."""
    shown = []
    for text in texts:
        room -= _units(text)
        if room < 0:
            break
        shown.append(text)
    return shown


def _units(text: str) -> int:
    return len(text.encode("utf-16-le")) // 2


def _inline(text: str, limit: int) -> str:
    """Text on one line of the source; spans in backticks stay code, all other markup is shown as it is."""
    lines = (line.strip() for line in cut(readable(text), limit).split("\n"))
    return "<br>".join(_escape_line(line) for line in lines if line)


def _escape_line(line: str) -> str:
    # Every second piece stood between backticks.
    pieces = _CODE.split(line)
    return "".join(f"`{piece}`" if i % 2 else _escape(piece) for i, piece in enumerate(pieces))


def _escape(text: str) -> str:
    text = unlinked(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\g<0>", text)


def _code(text: str, limit: int) -> str:
    """A code span that holds `text` on one line, whatever backticks are in it."""
    text = cut(names.printable(text), limit)
    ticks = "`" * (_longest_run(text) + 1)
    pad = " " if not text or text[0] in "` " or text[-1] in "` " else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
