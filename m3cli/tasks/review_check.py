"""From what a model claims to findings: located in the new version, each once, and only those wanted."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from pathspec import GitIgnoreSpec

from m3cli.errors import UsageError
from m3cli.tasks.findings import RULES, SEVERITIES, Finding, Severity
from m3cli.tasks.line_hash import line_hashes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from m3cli.corpus.patch import FileChange
    from m3cli.tasks.review_prompt import Claim

_AROUND = 3  # lines of a frame on either side
_TELLING = 3  # letters and digits that a quote has to have at least: a brace alone is everywhere
_MARKS = re.compile(r"^(?:\d+:|\+(?![+=]))\s?")  # a line's number or the sign of a diff, copied along
_IGNORE = re.compile(r"m3:\s*ignore\[([^\]\n]*)\]([^\n]*)")
_COMMENT_END = re.compile(r"(\*/|-->|\*\)|#\}|%>)\s*$")
_LARGEST_BASELINE = 50_000_000  # bytes


@dataclass(frozen=True, slots=True)
class PathRule:
    """Files, as a pattern of .gitignore, and the rules that nobody wants to hear of there; none is all."""

    pattern: str
    rules: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, text: str) -> PathRule:
        """`GLOB` or `GLOB:RULE,RULE`. Raises UsageError for a rule that does not exist, or no glob."""
        pattern, separator, names = text.rpartition(":")
        if not separator or re.search(r"[/*.?\[]", names):
            matches((text,), "")
            return cls(text)
        matches((pattern,), "")
        rules = frozenset(name.strip() for name in names.split(",") if name.strip())
        if unknown := sorted(rules - RULES.keys()):
            raise UsageError(
                f"{text!r} names a rule {unknown[0]}, which does not exist.",
                f"The rules are {', '.join(RULES)}.",
            )
        return cls(pattern, rules)

    def covers(self, finding: Finding) -> bool:
        """Whether it is about `finding`."""
        return (not self.rules or finding.rule in self.rules) and matches((self.pattern,), finding.path)


def matches(globs: tuple[str, ...], path: str) -> bool:
    """Whether `globs`, patterns of .gitignore, are about `path`. Raises UsageError for what is none."""
    return _matcher(globs).match_file(path)


@lru_cache
def _matcher(globs: tuple[str, ...]) -> GitIgnoreSpec:
    try:
        return GitIgnoreSpec.from_lines(globs)
    except ValueError as error:
        raise UsageError(
            f"Among {', '.join(globs)} is no pattern for paths: {error}.", "Write them as in .gitignore."
        ) from error


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which findings are worth a team's time. `baseline` holds the fingerprints of those known before."""

    min_severity: Severity = "info"
    max_findings: int | None = None
    ignore: tuple[PathRule, ...] = ()
    baseline: frozenset[str] = field(default_factory=frozenset)


class Sieve:
    """Takes claims about files and keeps findings; `dropped` counts the rest by reason."""

    def __init__(self, wanted: Wanted) -> None:
        self.dropped: Counter[str] = Counter()
        self._wanted = wanted
        self._kept: list[Finding] = []

    def take(self, claim: Claim, change: FileChange, lines: Mapping[int, str]) -> Finding | None:
        """The finding that `claim` is, if it is one and wanted; `lines` are those of the new version."""
        finding = located(claim, change, lines)
        reason = "unverified" if finding is None else self._objection(finding, lines)
        if finding is None or reason:
            self.dropped[reason] += 1
            return None
        return finding

    def is_duplicate(self, finding: Finding) -> bool:
        """Whether what is kept says the same; then it is counted."""
        is_known = self._knows(finding)
        if is_known:
            self.dropped["duplicate"] += 1
        return is_known

    def _knows(self, finding: Finding) -> bool:
        return any(_same(finding, kept) for kept in self._kept)

    def _objection(self, finding: Finding, lines: Mapping[int, str]) -> str:
        if self._knows(finding):
            return "duplicate"
        if SEVERITIES.index(finding.severity) < SEVERITIES.index(self._wanted.min_severity):
            return "severity"
        if is_ignored(finding, lines) or any(rule.covers(finding) for rule in self._wanted.ignore):
            return "ignored"
        return ""

    def keep(self, finding: Finding) -> None:
        """Count `finding` as one; later ones that say the same are duplicates."""
        self._kept.append(finding)

    def findings(self) -> tuple[tuple[Finding, ...], tuple[Finding, ...]]:
        """What was kept, the most severe first, and what of it is more than is wanted.

        Each has its fingerprint; known ones are left out.
        """
        kept = sorted(self._kept, key=lambda f: (f.path, f.start_line, f.start_column, f.rule))
        seen: Counter[str] = Counter()
        fresh = []
        for finding in kept:
            plain = _fingerprint(finding)
            seen[plain] += 1
            number = seen[plain]
            fingerprint = plain if number == 1 else f"{plain[:-4]}{number:04x}"
            if fingerprint in self._wanted.baseline:
                self.dropped["baseline"] += 1
            else:
                fresh.append(replace(finding, fingerprint=fingerprint))
        fresh.sort(key=lambda f: (-SEVERITIES.index(f.severity), -f.confidence))
        most = self._wanted.max_findings or len(fresh)
        if excess := fresh[most:]:
            self.dropped["excess"] += len(excess)
        return tuple(fresh[:most]), tuple(excess)


def located(claim: Claim, change: FileChange, lines: Mapping[int, str]) -> Finding | None:
    """`claim` at the lines that it quotes, of which `change` has to have touched one.

    Of several places the first with new lines is taken, else the first beside a line that is gone. White
    space at the ends of lines does not count, nor what stands in front of them in a prompt.
    """
    quoted = [_MARKS.sub("", line).strip() for line in claim.quote.strip().split("\n")]
    if len(re.findall(r"\w", "".join(quoted))) < _TELLING:
        return None
    places: list[tuple[int, int, int]] = []
    for hunk in change.hunks:
        for start in range(hunk.start, hunk.start + hunk.length - len(quoted) + 1):
            shown = [lines.get(start + offset) for offset in range(len(quoted))]
            if None not in shown and (columns := _columns([line or "" for line in shown], quoted)):
                places.append((start, *columns))
    last = len(quoted) - 1

    def among(numbers: frozenset[int]) -> list[tuple[int, int, int]]:
        return [place for place in places if numbers.intersection(range(place[0], place[0] + last + 1))]

    if not (touched := among(change.added) or among(change.touched)):
        return None
    start, first_column, end_column = touched[0]
    frame = range(start - _AROUND, start + last + _AROUND + 1)
    return Finding(
        rule=claim.rule,
        severity=claim.severity,
        confidence=claim.confidence,
        path=change.path,
        start_line=start,
        end_line=start + last,
        start_column=first_column,
        end_column=end_column,
        message=claim.message,
        fingerprint="",
        line_hash=_line_hash(change, lines, start),
        frame=tuple((number, lines[number]) for number in frame if number in lines),
        replacement=_replacement(claim, lines, start, start + last),
    )


def _columns(shown: Sequence[str], quoted: Sequence[str]) -> tuple[int, int] | None:
    """Where the quote begins in the first line and ends in the last, from 1; None if it is not there."""
    if len(quoted) == 1:
        place = shown[0].find(quoted[0])
        return None if place < 0 else (place + 1, place + 1 + len(quoted[0]))
    stripped = [line.strip() for line in shown]
    if stripped != list(quoted):
        return None
    return len(shown[0]) - len(shown[0].lstrip()) + 1, len(shown[-1].rstrip()) + 1


def _line_hash(change: FileChange, lines: Mapping[int, str], number: int) -> str:
    """GitHub's hash of a line; where only parts of the file are known, as if these were all of it."""
    if change.head is not None:
        return _hashes(change.head)[number - 1]
    known = sorted(lines)
    return _hashes("".join(f"{lines[each]}\n" for each in known))[known.index(number)]


@lru_cache(maxsize=32)
def _hashes(text: str) -> list[str]:
    return line_hashes(text)


def _replacement(claim: Claim, lines: Mapping[int, str], first: int, last: int) -> str | None:
    """The lines that the model would write instead; None if they are what stands there.

    If none of them is indented although the place is, all are meant to be.
    """
    if claim.replacement is None or not claim.replacement.strip():
        return None
    wanted = claim.replacement.strip("\n").split("\n")
    before = [lines[number] for number in range(first, last + 1)]
    indent = before[0][: len(before[0]) - len(before[0].lstrip())]
    if not wanted[0][:1].isspace():
        wanted = [indent + line if line.strip() else line for line in wanted]
    return None if wanted == before else "\n".join(wanted)


def is_ignored(finding: Finding, lines: Mapping[int, str]) -> bool:
    """Whether a comment on the lines of `finding`, or right above, says so and why.

    `m3: ignore[correctness] checked by the caller`; several rules stand with commas, `*` is all of them.
    Without a reason it does not count.
    """
    for number in range(finding.start_line - 1, finding.end_line + 1):
        for rules, reason in _IGNORE.findall(lines.get(number, "")):
            names = {name.strip() for name in rules.split(",")}
            if names & {finding.rule, "*"} and re.search(r"\w", _COMMENT_END.sub("", reason)):
                return True
    return False


def _same(one: Finding, other: Finding) -> bool:
    overlap = one.start_line <= other.end_line and other.start_line <= one.end_line
    return one.path == other.path and overlap and (one.rule == other.rule or one.message == other.message)


def _fingerprint(finding: Finding) -> str:
    """Of the rule, the path and the text of the lines: the same wherever these lines are moved to."""
    text = "\n".join(" ".join(line.split()) for line in finding.lines)
    data = "\0".join((finding.rule, finding.path, text)).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def read_baseline(path: Path) -> dict[str, dict[str, str]]:
    """What a file that `baseline_bytes` made knows, by fingerprint. Raises UsageError."""
    try:
        if path.stat().st_size > _LARGEST_BASELINE:
            raise ValueError("it is too large")
        found = json.loads(path.read_bytes())
        return {str(entry["fingerprint"]): dict(entry) for entry in found["findings"]}
    except OSError as error:
        raise UsageError(
            f"The baseline {path} cannot be read: {error.strerror}.", "Make one with --write-baseline FILE."
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{path} is no baseline: {error}.", "Make one with --write-baseline FILE."
        ) from error


def baseline_bytes(findings: Iterable[Finding], known: Mapping[str, dict[str, str]]) -> bytes:
    """A baseline file of `findings` and of what was `known` before."""
    entries = dict(known)
    for finding in findings:
        entries[finding.fingerprint] = {
            "fingerprint": finding.fingerprint,
            "rule": finding.rule,
            "path": finding.path,
            "message": finding.message,
        }
    ordered = [entries[fingerprint] for fingerprint in sorted(entries)]
    return (json.dumps({"version": 1, "findings": ordered}, indent=1) + "\n").encode()
