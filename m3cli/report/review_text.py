"""Pieces of text that the formats of a review share."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from m3cli.corpus import names
from m3cli.report.text import amount, printable
from m3cli.tasks.findings import SEVERITIES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from m3cli.tasks.findings import Finding, Review

# What `printable` leaves, as it is rare in texts that m3 has written itself: halves of surrogate pairs, which
# no encoding takes, and line ends that only some programs know.
_NO_TEXT = re.compile("[\u2028\u2029\ud800-\udfff]")
# Where Markdown, or GitHub or GitLab behind it, would make of a text a mention, a reference, a link, an
# image, an entity, HTML or a fence.
_LIVE = re.compile(
    r"(?<=[@#!~%&^$])(?=[\w\"#])|(?<=\bGH-)(?=\d)|(?<=:)(?=//)|(?<=\bwww)(?=\.)|(?<=\])(?=[(\[:])"
    r"|(?<=\[)(?=[!^])|(?<=<)(?=[a-z/!?])|(?<=``)(?=`)|(?<=~~)(?=~)",
    re.IGNORECASE,
)
# What JSON leaves in a string, and a terminal, or a program that splits lines, would act on.
_ESCAPED = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
INCOMPLETE = "The review is not complete: a cap on time or tokens ended it."
_REASONS = {
    "unverified": "not verified",
    "unchecked": "not checked in time",
    "refuted": "refuted by the second look",
    "duplicate": "found twice",
    "severity": "below the wanted severity",
    "ignored": "ignored by a comment or a path rule",
    "baseline": "known before",
    "excess": "more than were wanted",
}


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """The most severe first; those of one severity by place. The order does not depend on that given."""
    return sorted(
        findings,
        key=lambda f: (-SEVERITIES.index(f.severity), f.path, f.start_line, f.start_column, f.fingerprint),
    )


def severity_counts(findings: Iterable[Finding]) -> dict[str, int]:
    """How many findings there are of each severity, the highest first."""
    counts: dict[str, int] = dict.fromkeys(reversed(SEVERITIES), 0)
    for finding in findings:
        counts[finding.severity] += 1
    return counts


def readable(text: str) -> str:
    """`text` without what could drive a terminal or cannot be encoded; newlines and tabs stay."""
    return _NO_TEXT.sub("\ufffd", printable(text.replace("\r\n", "\n")))


def unlinked(text: str) -> str:
    """`text` with zero-width spaces where it would mention, refer to, link or embed something as Markdown."""
    return _LIVE.sub("\u200b", text)


def cut(text: str, limit: int) -> str:
    """`text` in at most `limit` characters, which are at least 50; says how long it was if it is cut."""
    if len(text) <= limit:
        return text
    note = f"… (cut, {len(text):,} characters in all)"
    return text[: limit - len(note)] + note


def place(finding: Finding) -> str:
    """`src/a.py:10-12`, on one line whatever the path holds."""
    last = f"-{finding.end_line}" if finding.end_line != finding.start_line else ""
    return f"{names.printable(finding.path)}:{finding.start_line}{last}"


def encodable(path: str) -> str:
    r"""`path` for a JSON document: as it is, or with `\xff` for bytes that are no UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return names.printable(path)
    return path


def json_bytes(value: object, indent: int | None = 2) -> bytes:
    """One JSON document in UTF-8, with a final newline and no character that could drive a terminal.

    Half surrogate pairs become `?`; all else reads back as it was.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    text = _ESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    return f"{text}\n".encode("utf-8", "replace")


def counted(counts: dict[str, int]) -> str:
    """`1 error, 2 warnings, 1 remark`; empty without any."""
    nouns = {"error": "error", "warning": "warning", "info": "remark"}
    return ", ".join(amount(count, nouns[severity]) for severity, count in counts.items() if count)


def summary(review: Review) -> str:
    """One or two sentences: how many findings in how many files, and whether the review is complete."""
    files = amount(len(review.files), "file")
    found = counted(severity_counts(review.findings))
    first = f"m3 found {found} in {files}." if found else f"m3 found nothing in {files}."
    return first if review.complete else f"{first} {INCOMPLETE}"


def dropped(review: Review) -> str:
    """`3 not verified, 2 known before`: the findings that did not stay; empty without any."""
    order = [*_REASONS, *sorted(review.dropped.keys() - _REASONS.keys())]
    return ", ".join(
        f"{count:,} {_REASONS.get(reason, names.printable(reason))}"
        for reason in order
        if (count := review.dropped.get(reason, 0))
    )
