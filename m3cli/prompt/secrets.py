"""Secrets out of a text that leaves the machine: each becomes a placeholder such as `[REDACTED:jwt:1]`."""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from m3cli.prompt.secret_scan import SCAN_VERSION, scan

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from m3cli.corpus.types import Chunk
    from m3cli.memo import Memo
    from m3cli.prompt.secret_scan import Hit

_PRIVATE_KEY = "Private Key"
# Kinds that say least about a secret: where findings overlap, another kind names the placeholder.
_VAGUE = ("secret-keyword", "hex-high-entropy-string", "base64-high-entropy-string")

# Kinds of which detect-secrets reports the first part only, and what the whole token is made of.
_TOKENS = {
    "GitHub Token": re.compile(r"[\w-]+"),
    "GitLab Token": re.compile(r"[\w-]+"),
    "JSON Web Token": re.compile(r"[\w.+/=-]+"),
}

# What follows the first line of a private key: one word of base64 a line, in quotes and comment signs
# perhaps, or a header. `\n` may be written out.
_ARMOUR_LINE = re.compile(
    r"[\W_]*[A-Za-z0-9+/=\\]*[\W_]*\r?"
    r"|[\W_]*(?:Proc-Type|DEK-Info|Version|Comment|Hash|Subject|Encryption|Public-Lines|Private-Lines"
    r"|Private-MAC): [^\n]*"
)
_ARMOUR_END = re.compile(r"END [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?[ -]*|Private-MAC: *\w*")
_ARMOUR_BODY = re.compile(r"[A-Za-z0-9+/=]{40,}")
_ARMOUR_START = re.compile(r"-*[ ]?\Z")
_MOST_ARMOUR_LINES = 400

_SHORT = 8  # characters; a shorter secret is taken out where it stands alone, not from within words


@dataclass(frozen=True, slots=True)
class Finding:
    """A secret that was taken out: where it began, and its kind in detect-secrets' words as a slug."""

    path: str
    line: int
    kind: str


class _Span(NamedTuple):
    """A piece of a text that has to go, in characters."""

    start: int
    end: int
    kind: str


class Redactor:
    """Replaces every secret that detect-secrets knows by a placeholder; `findings` says what was taken out.

    A placeholder is `[REDACTED:kind:number]`. Numbers count the different secrets of a kind in the order
    in which they appear, so the same secret has the same number all over the pack, the same chunks
    give the same text, and nothing about the secret can be worked out from it. (A digest would stay
    the same between packs, but a short password could be found by trying.)

    `memo` keeps where in a document secrets stand, by a digest of its text; of the secrets themselves
    nothing.
    `prefilter` off takes the slow way to the same result; it is there to be measured and tested.
    """

    def __init__(self, memo: Memo | None = None, *, prefilter: bool = True) -> None:
        self.findings: list[Finding] = []
        self._memo = memo
        self._prefilter = prefilter
        self._numbers: dict[tuple[str, str], int] = {}
        self._numbered: Counter[str] = Counter()

    @property
    def counts(self) -> dict[str, int]:
        """How many secrets of each kind, the most frequent first."""
        counts = Counter(finding.kind for finding in self.findings)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def redact(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """`chunks` without their secrets, each document as soon as all of it was seen.

        Paths, line numbers and the number of lines stay. Give all chunks of a document, in order: a
        private key that is cut into two chunks is found by its first line.
        """
        new: list[tuple[bytes, bytes]] = []
        for run in _runs(chunks):
            path = run[0].path
            text = "".join([chunk.text for chunk in run]) if len(run) > 1 else run[0].text
            key = _memo_key(path, text) if self._memo is not None else b""
            spans = (
                _known_spans(self._memo.get([key]).get(key), len(text)) if self._memo is not None else None
            )
            if spans is None:
                spans = list(_merged(_spans(text, scan(path, text, prefilter=self._prefilter))))
                new.append((key, json.dumps(spans).encode()))
            yield from self._replaced(run, text, spans) if spans else run
        if self._memo is not None:
            self._memo.put(new)

    def _replaced(self, run: Sequence[Chunk], text: str, spans: Sequence[_Span]) -> Iterator[Chunk]:
        named = [(span, self._placeholder(span.kind, text[span.start : span.end])) for span in spans]
        lines = _line_numbers(run)
        ends = [match.start() for match in re.finditer("\n", text)]
        self.findings += [
            Finding(run[0].path, lines[bisect_left(ends, span.start)], span.kind) for span in spans
        ]
        start = 0
        for chunk in run:
            yield replace(chunk, text=_without(chunk.text, start, named))
            start += len(chunk.text)

    def _placeholder(self, kind: str, secret: str) -> str:
        if (kind, secret) not in self._numbers:
            self._numbered[kind] += 1
            self._numbers[kind, secret] = self._numbered[kind]
        return f"[REDACTED:{kind}:{self._numbers[kind, secret]}]"


def _memo_key(path: str, text: str) -> bytes:
    """What a verdict depends on: the detectors, the file's name, and its text."""
    digest = hashlib.blake2b(
        f"secrets\0{_versions()}\0{path}\0".encode("utf-8", "surrogatepass"), digest_size=16
    )
    digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.digest()


def _known_spans(value: bytes | None, length: int) -> list[_Span] | None:
    """What was remembered; None if nothing was, or it is damaged."""
    try:
        spans = [_Span(int(start), int(end), str(kind)) for start, end, kind in json.loads(value or b"")]
    except (TypeError, ValueError):
        return None
    edges = [edge for span in spans for edge in span[:2]]
    return spans if edges == sorted(edges) and all(0 <= edge <= length for edge in edges) else None


@lru_cache(maxsize=1)
def _versions() -> str:
    from importlib.metadata import version

    return f"{SCAN_VERSION} {version('detect-secrets')}"


def _runs(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Chunks that follow one another in a document, each run on its own."""
    run: list[Chunk] = []
    for chunk in chunks:
        if run:
            last = run[-1]
            follows = last.numbers is not None or chunk.start_line == (
                last.end_line + 1 if last.text.endswith("\n") else last.end_line
            )
            if chunk.path != last.path or not follows:
                yield run
                run = []
        run.append(chunk)
    if run:
        yield run


def _line_numbers(run: Sequence[Chunk]) -> list[int]:
    """The line of the file that each line of a run of chunks is."""
    numbers: list[int] = []
    for chunk in run:
        cut = bool(numbers) and numbers[-1] == chunk.start_line  # a long line goes on here
        if chunk.numbers is not None:
            numbers += chunk.numbers[cut:]
        else:
            numbers += range(chunk.start_line + cut, chunk.end_line + 1)
    return numbers


def _spans(text: str, hits: Iterable[Hit]) -> Iterator[_Span]:
    """Where the secrets of `hits` stand in `text`."""
    starts = [0, *(match.end() for match in re.finditer("\n", text))]
    for hit in hits:
        kind = re.sub(r"[^a-z0-9]+", "-", hit.kind.lower()).strip("-")
        line = min(hit.line, len(starts) - 1)
        start = starts[line]
        end = starts[line + 1] if line + 1 < len(starts) else len(text)
        if hit.kind == _PRIVATE_KEY:
            at = text.find(hit.secret, start, end)
            if at >= 0:
                yield _Span(*_key_block(text, at, at + len(hit.secret)), kind)
                continue
        found = False
        for piece in filter(None, map(str.strip, hit.secret.replace('\\"', '"').splitlines())):
            places = list(_places(text, piece, start, end)) or list(_elsewhere(text, piece))
            token = _TOKENS.get(hit.kind)
            if token:
                whole = [match.span() for match in token.finditer(text, start, end)]
                places = [place for place in whole if any(place[0] <= at < place[1] for at, _ in places)]
            found = found or bool(places)
            yield from (_Span(at, to, kind) for at, to in places)
        if not found:  # written otherwise than the detector saw it, with escapes: the whole line goes
            content = text[start:end]
            yield _Span(start + len(content) - len(content.lstrip()), start + len(content.rstrip()), kind)


def _places(text: str, secret: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Where `secret` stands between `start` and `end`; a short one, if it can be, as a word of its own."""
    if len(secret) < _SHORT:
        alone = re.compile(rf"(?<![^\W_]){re.escape(secret)}(?![^\W_])")
        if alone.search(text, start, end):
            yield from (match.span() for match in alone.finditer(text, start, end))
            return
    yield from _occurrences(text, secret, start, end)


def _occurrences(text: str, secret: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Where `secret` stands; it may be very long, which is too much for a pattern."""
    while (at := text.find(secret, start, end)) >= 0:
        start = at + len(secret)
        yield at, start


def _elsewhere(text: str, secret: str) -> Iterator[tuple[int, int]]:
    """Where a part of a value of several lines stands: a short one only as a line of its own."""
    if len(secret) < _SHORT:
        pattern = rf"(?m)(?<=[ \t\n]){re.escape(secret)}(?=\s*$)"
        yield from (match.span() for match in re.finditer(pattern, text))
    else:
        yield from _occurrences(text, secret, 0, len(text))


def _key_block(text: str, start: int, end: int) -> tuple[int, int]:
    """The whole of the private key that is announced by `text[start:end]`, as far as it goes.

    To its end mark; without one to the last line of base64, for a key may be cut off; or only the
    announcement, if no key follows it, as in the source of a program that reads keys.
    """
    before = _ARMOUR_START.search(text, max(0, start - 8), start)
    start = before.start() if before else start
    limit = end
    for _ in range(_MOST_ARMOUR_LINES):
        line_end = text.find("\n", limit)
        line_end = len(text) if line_end < 0 else line_end
        mark = _ARMOUR_END.search(text, limit, line_end)
        if mark:
            return start, mark.end()
        first = limit == end
        if not first and not _ARMOUR_LINE.fullmatch(text, limit, line_end):
            line_end = limit
            break
        if line_end == len(text):
            break
        limit = line_end + 1
    bodies = [match.end() for match in _ARMOUR_BODY.finditer(text, end, line_end)]
    return start, bodies[-1] if bodies else end


def _merged(spans: Iterable[_Span]) -> Iterator[_Span]:
    """`spans` in order, those that overlap made one."""
    vague = {kind: rank for rank, kind in enumerate(_VAGUE, start=1)}
    merged: list[_Span] = []
    for span in sorted(span for span in spans if span.start < span.end):
        if merged and span.start < merged[-1].end:
            last = merged.pop()
            kind = min((last.kind, span.kind), key=lambda kind: (vague.get(kind, 0), kind))
            merged.append(_Span(last.start, max(last.end, span.end), kind))
        else:
            merged.append(span)
    yield from merged


def _without(text: str, offset: int, named: Sequence[tuple[_Span, str]]) -> str:
    """`text`, which stands at `offset`, with the spans replaced; their line feeds stay.

    A span that began in an earlier chunk leaves nothing but its line feeds here.
    """
    parts: list[str] = []
    at = 0
    begin = max(0, bisect_right(named, offset, key=lambda entry: entry[0].start) - 1)
    for span, name in named[begin:]:
        start, end = max(span.start - offset, 0), min(span.end - offset, len(text))
        if start >= len(text):
            break
        if end <= 0:
            continue
        parts += [text[at:start], name if span.start >= offset else "", "\n" * text.count("\n", start, end)]
        at = end
    return "".join([*parts, text[at:]])
