"""Haystacks of source files, in m3's own layout, and the facts of the code that is in them.

A haystack is the beginning of the corpus, so that of a shorter length begins that of a longer one, and all
tasks about code have the same.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby
from typing import TYPE_CHECKING
from weakref import WeakSet

from m3cli.corpus.syntax import code_facts, is_available
from m3cli.errors import MachineError
from m3cli.prompt.layout import PromptLayout, Span, number_lines
from m3cli.prompt.pack import pack_chunks
from m3cli.tasks.evaluate.trial import TooShortError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from m3cli.corpus.facts import Call, Constant, Facts, Function
    from m3cli.corpus.types import Chunk
    from m3cli.tasks.evaluate.trial import Material, Measure

_SHARE = 0.02  # of the room, that a haystack may leave
# What may define, call or set something, where nothing is known of the language.
_LOOSE = re.compile(r"([^\W\d]\w*)\s*[(=:{]")
_DEFINED = re.compile(
    r"\b(?:class|module|interface|trait|struct|enum|type|def|fn|func|fun|function|sub|object|protocol)"
    r"\s+(?:self\.)?([^\W\d]\w*)"
)
_CALLED = re.compile(r"([^\W\d]\w*)\s*\(")
_BLOCKS = 256  # blocks in which chunks are counted, before they double


@dataclass(frozen=True, slots=True)
class Place:
    """A line of a haystack: `line` of chunk number `chunk`, both counted from 0, and its text."""

    chunk: int
    line: int
    text: str


class CodeFile:
    """A document of the corpus, the first chunk of which has the number `first`.

    `facts` are None where nothing is known of the language, or the text does not parse.
    """

    def __init__(self, first: int, chunks: Sequence[Chunk]) -> None:
        self.path = chunks[0].path
        self.first = first
        self.chunks = chunks
        self.text = "".join(chunk.text for chunk in chunks)
        self.facts: Facts | None = code_facts(self.path, self.text)
        self._rows = [0, *accumulate(chunk.text.count("\n") for chunk in chunks)]

    @property
    def functions(self) -> tuple[Function, ...]:
        """The functions in the order of the text."""
        return self.facts.functions if self.facts is not None else ()

    @cached_property
    def lines(self) -> list[str]:
        """The lines, which end at a line feed only."""
        return self.text.split("\n")

    @cached_property
    def loose_names(self) -> frozenset[str]:
        """Names that this text may define, call or set, if its language is not known."""
        if self.facts is not None:
            return frozenset()
        return frozenset((*_LOOSE.findall(self.text), *_DEFINED.findall(self.text)))

    @cached_property
    def calls_in_text(self) -> Counter[str]:
        """How often each name stands before a bracket: what a parser did not understand is among them."""
        return Counter(_CALLED.findall(self.text))

    def place(self, row: int) -> Place:
        """Where a line is; of one that several chunks share, the part in the first."""
        number = max(bisect_left(self._rows, row) - 1, 0)
        line = row - self._rows[number]
        text = self.chunks[number].text
        if row and self._rows[number + 1] == row and text.endswith("\n") and number + 1 < len(self.chunks):
            number, line = number + 1, 0
            text = self.chunks[number].text
        return Place(self.first + number, line, text.split("\n")[line])

    def rows_in(self, chunks: int) -> int:
        """Whole rows in the first `chunks` of all chunks of the corpus."""
        inside = min(max(chunks - self.first, 0), len(self.chunks))
        return self._rows[inside] if inside < len(self.chunks) else len(self.lines)


class Known:
    """What is defined and called in a haystack."""

    def __init__(self, haystack: CodeHaystack) -> None:
        self.loose = haystack.loose_names
        self.functions: list[tuple[CodeFile, int, Function]] = []
        self.constants: list[tuple[CodeFile, int, Constant]] = []
        self.types: list[tuple[CodeFile, str, int]] = []
        self.calls: dict[str, list[tuple[CodeFile, Call]]] = defaultdict(list)
        self.files = haystack.files
        for file, rows in haystack.files:
            if file.facts is None:
                continue
            self.functions += ((file, rows, f) for f in file.facts.functions if f.row < rows)
            self.constants += ((file, rows, c) for c in file.facts.constants if c.row < rows)
            self.types += ((file, t.name, t.row) for t in file.facts.types if t.row < rows)
            for call in file.facts.calls:
                if call.row < rows:
                    self.calls[call.name].append((file, call))

    @cached_property
    def names(self) -> Counter[str]:
        """How often each name is defined, whatever it is in."""
        return Counter(
            [
                *(function.name for _, _, function in self.functions),
                *(constant.name for _, _, constant in self.constants),
                *(name for _, name, _ in self.types),
            ]
        )

    @cached_property
    def calls_in_text(self) -> Counter[str]:
        """How often each name stands before a bracket, in the whole of all files."""
        found: Counter[str] = Counter()
        for file, _ in self.files:
            found.update(file.calls_in_text)
        return found

    @cached_property
    def qualified(self) -> Counter[tuple[str, str]]:
        """How often each name is defined in the same file and type."""
        return Counter(
            [
                *((file.path, qualified(function)) for file, _, function in self.functions),
                *((file.path, qualified(constant)) for file, _, constant in self.constants),
            ]
        )

    @cached_property
    def constants_of(self) -> dict[tuple[str, str], Constant]:
        """The constants by file and qualified name that are defined once."""
        found = {(file.path, qualified(constant)): constant for file, _, constant in self.constants}
        return {key: constant for key, constant in found.items() if self.qualified[key] == 1}

    @cached_property
    def constant_of(self) -> dict[str, tuple[CodeFile, Constant]]:
        """Those by name that are defined nowhere else in the haystack."""
        return {
            constant.name: (file, constant)
            for file, _, constant in self.constants
            if self.names[constant.name] == 1 and not constant.owner and constant.name not in self.loose
        }

    def clear_functions(self) -> Iterator[tuple[CodeFile, int, Function]]:
        """Functions that their file and name tell from all others."""
        for file, rows, function in self.functions:
            clear = function.name and not function.nested
            if clear and self.qualified[file.path, qualified(function)] == 1:
                yield file, rows, function


class CodeHaystack:
    """The first `whole` chunks of a corpus and the beginning of one more, in `tokens` tokens."""

    def __init__(self, corpus: CodeCorpus, whole: int, cut: Chunk | None, tokens: int) -> None:
        self.chunks = (*corpus.chunks[:whole], *([cut] if cut is not None else []))
        self.tokens = tokens
        self._corpus = corpus
        self._whole = whole
        self._rows_cut = 0 if cut is None else cut.text.count("\n")

    @cached_property
    def files(self) -> list[tuple[CodeFile, int]]:
        """The files, and how many rows of each are in the haystack, only whole ones."""
        found = []
        for file in self._corpus.files(len(self.chunks)):
            rows = file.rows_in(self._whole)
            if file.first <= self._whole < file.first + len(file.chunks):
                rows += self._rows_cut
            found.append((file, rows))
        return found

    @cached_property
    def known(self) -> Known:
        """What all tasks may ask of."""
        return Known(self)

    @cached_property
    def loose_names(self) -> frozenset[str]:
        """Names that files in other languages may define, call or set."""
        return frozenset().union(*(file.loose_names for file, _ in self.files))

    def depth(self, place: Place, *, exact: bool = False) -> float:
        """Share of the tokens that stand before a line, estimated from its chunk's unless `exact`."""
        return self._corpus.before(place, exact) / self.tokens


class CodeCorpus:
    """The chunks of a corpus, counted and parsed as far as haystacks need them.

    Raises MachineError without parsers.
    """

    def __init__(self, material: Material, measure: Measure) -> None:
        if not is_available():
            raise MachineError(
                "Questions about code need parsers that are not installed.",
                "Install them: pip install 'm3cli[code]'.",
            )
        self.material = material
        self.chunks = material.chunks
        self.measure = measure
        self._parts = _parts_of(self.chunks)
        self._characters = [0, *accumulate(sum(map(len, parts)) for parts in self._parts)]
        self._starts = [0]  # chunks at which blocks of counted ones begin
        self._before = [0]  # tokens before each block
        self._files: list[CodeFile] = []
        self._haystacks: dict[int, CodeHaystack] = {}

    def haystack(self, room: int) -> CodeHaystack:
        """The longest that has at most `room` tokens. Raises TooShortError where there is none."""
        if room not in self._haystacks:
            self._haystacks[room] = self._cut(room)
        return self._haystacks[room]

    def files(self, chunks: int) -> list[CodeFile]:
        """The files of which something is in so many first chunks, parsed in as many processes as cores."""
        known = self._files[-1].first + len(self._files[-1].chunks) if self._files else 0
        missing: list[tuple[int, list[Chunk]]] = []
        numbered = enumerate(self.chunks[known:], known)
        for _, group in groupby(numbered, key=lambda item: item[1].path):
            document = list(group)
            if document[0][0] >= chunks:
                break
            missing.append((document[0][0], [chunk for _, chunk in document]))
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            self._files += pool.map(lambda document: CodeFile(*document), missing)
        return [file for file in self._files if file.first < chunks]

    def before(self, place: Place, exact: bool) -> float:
        """Tokens before a line of what was counted, estimated from characters unless `exact`."""
        block = bisect_right(self._starts, place.chunk) - 1
        start, end = self._starts[block], self._starts[block + 1]
        chunk = self.chunks[place.chunk]
        if exact:
            parts = [part for parts in self._parts[start : place.chunk] for part in parts]
            parts += self._header(place.chunk)
            parts.append(number_lines(_beginning(chunk, _first_lines(chunk.text, place.line))))
            return self._before[block] + self.measure.count(parts)
        known = self._characters
        inside = known[place.chunk + 1] - known[place.chunk]
        characters = known[place.chunk] - known[start] + inside * place.line / (chunk.text.count("\n") + 1)
        tokens = self._before[block + 1] - self._before[block]
        return self._before[block] + tokens * characters / max(known[end] - known[start], 1)

    def _header(self, chunk: int) -> list[str]:
        """What stands before the first chunk of a file; nothing before others."""
        begins = chunk == 0 or self.chunks[chunk - 1].path != self.chunks[chunk].path
        return self._parts[chunk][:1] if begins else []

    def _count_to(self, room: int) -> None:
        """Count blocks of chunks, which grow with what is before them, until there is more than `room`."""
        while self._before[-1] <= room and self._starts[-1] < len(self.chunks):
            start = self._starts[-1]
            end = min(start + 1 + start // _BLOCKS, len(self.chunks))
            self._starts.append(end)
            self._before.append(self._before[-1] + self._count(start, end))

    def _count(self, start: int, end: int) -> int:
        return self.measure.count([part for parts in self._parts[start:end] for part in parts])

    def _cut(self, room: int) -> CodeHaystack:
        if room < 0:
            raise TooShortError("a question and its answer take all of it")
        self._count_to(room)
        if self._before[-1] <= room:
            if not self.chunks or self._before[-1] < (1 - _SHARE) * room:
                raise TooShortError(f"the corpus has only {self._before[-1]:,} tokens")
            return CodeHaystack(self, len(self.chunks), None, self._before[-1])
        # 1. blocks, and then chunks, that fit with a file's last line behind
        footer = self.measure.count([_footer(self.chunks[0])])
        block = bisect_right(self._before, room - footer) - 1
        if block < 0:
            raise TooShortError("a question and its answer take all of it")
        whole, tokens = self._starts[block], self._before[block]
        while (more := tokens + self._count(whole, whole + 1)) <= room - footer:
            whole, tokens = whole + 1, more
        # 2. of the next chunk what fits
        chunk = self.chunks[whole]
        fixed = tokens + footer + self.measure.count(self._header(whole))

        def total(text: str) -> int:
            return fixed + self.measure.count([number_lines(_beginning(chunk, text))])

        text = _longest_fit(chunk.text, total, room)
        if text:
            return CodeHaystack(self, whole, _beginning(chunk, text), total(text))
        if whole == 0:
            raise TooShortError("a question and its answer take nearly all of it")
        ends = self.chunks[whole - 1].path != chunk.path
        return CodeHaystack(self, whole, None, tokens + (0 if ends else footer))


def qualified(what: Function | Constant) -> str:
    """The name with the types that it is in."""
    return f"{what.owner}.{what.name}" if what.owner else what.name


_shared: WeakSet[CodeCorpus] = WeakSet()  # those that a task still has


def code_corpus(material: Material, measure: Measure) -> CodeCorpus:
    """The corpus that all tasks of a run share. Raises MachineError without parsers."""
    for corpus in _shared:
        if corpus.material is material and corpus.measure is measure:
            return corpus
    corpus = CodeCorpus(material, measure)
    _shared.add(corpus)
    return corpus


def _longest_fit(text: str, total: Callable[[str], int], room: int) -> str:
    """The longest beginning of `text` that keeps the `total` tokens within `room`, and leaves little of it.

    It ends with a line, or with a word where lines are too long for that.
    """
    ends = [0, *(match.end() for match in re.finditer("\n", text))]
    if ends[-1] < len(text):
        ends.append(len(text))
    number = bisect_left(ends, True, lo=1, key=lambda end: total(text[:end]) > room) - 1
    start = ends[number]
    if number + 1 == len(ends) or (start and total(text[:start]) >= (1 - _SHARE) * room):
        return text[:start]
    positions = range(start + 1, ends[number + 1])
    end = start + bisect_left(positions, True, key=lambda position: total(text[:position]) > room)
    word = text.rfind(" ", start, end) + 1
    if word > start and total(text[:word]) >= (1 - _SHARE) * room:
        end = word
    return text[:end]


def _parts_of(chunks: Sequence[Chunk]) -> list[list[str]]:
    """The pieces of m3's layout by the chunk with which they stand."""
    pack = pack_chunks(chunks, lambda texts: [0 for _ in texts], strategy="whole")
    pieces = iter(pack.parts)
    parts: list[list[str]] = []
    for span in pack.spans:
        header = next(pieces)
        bodies = [[next(pieces)] for _ in span.chunks]
        bodies[0].insert(0, header)
        bodies[-1].append(next(pieces))
        parts += bodies
    return parts


def _footer(chunk: Chunk) -> str:
    return PromptLayout().footer(Span((chunk,), whole=False))


def _beginning(chunk: Chunk, text: str) -> Chunk:
    """The chunk with only the beginning `text` of its own."""
    lines = text.count("\n") + (not text.endswith("\n") and bool(text))
    if chunk.numbers is None:
        return replace(chunk, text=text, end_line=chunk.start_line + max(lines, 1) - 1)
    numbers = chunk.numbers[:lines]
    last = max(numbers, default=0) or chunk.start_line
    return replace(chunk, text=text, end_line=last, numbers=numbers)


def _first_lines(text: str, count: int) -> str:
    return "".join(re.findall("[^\n]*\n", text)[:count])
