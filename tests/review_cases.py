"""The measuring set of `m3 review`: changes of small files, each with one known bug or with none.

`tests/data/review/sources` holds the files before the change, a directory for each language;
`tests/data/review/cases` the changes, a file for each language. A case replaces texts of one file: `old`
by `new` brings in the bug, and each of `also` is a harmless edit around it, so that the bug is one of
several changed lines. A case that is `clean` has only the latter. Where `new` takes something away and
leaves no changed line of its own, `oracle` is the text at which a reviewer has to point.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from tests.git_repositories import commit, make_repository

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DATA = Path(__file__).parent / "data" / "review"
SOURCES = DATA / "sources"


@dataclass(frozen=True, slots=True)
class Case:
    """One change of the file `path`, from `base` to `head`.

    `lines` are the lines of `head`, counted from 1, that show the bug; a finding at one of them has found
    it. Cases without a bug have none, and neither rule nor kind. `note` says what is wrong, or what a
    clean change does.
    """

    id: str
    language: str
    path: str
    rule: str
    kind: str
    note: str
    base: str
    head: str
    lines: frozenset[int]
    clean: bool


@dataclass(frozen=True, slots=True)
class Changes:
    """What a line diff says: lines added to `head`, how many left `base`, and where in `head` they were.

    `gaps` are the lines of `head` next to a place where lines were only removed.
    """

    added: frozenset[int]
    removed: int
    gaps: frozenset[int]


def changes(base: str, head: str) -> Changes:
    """The line diff of two texts; lines of `head` count from 1."""
    before, after = base.splitlines(), head.splitlines()
    added: set[int] = set()
    gaps: set[int] = set()
    removed = 0
    for tag, i1, i2, j1, j2 in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if tag != "equal":
            removed += i2 - i1
            added.update(range(j1 + 1, j2 + 1))
            if tag == "delete":
                gaps.update(line for line in (j1, j1 + 1) if 1 <= line <= len(after))
    return Changes(frozenset(added), removed, frozenset(gaps))


def _position(text: str, part: str, case: str) -> int:
    """Where `part` stands in `text`; ValueError unless it is there exactly once."""
    count = text.count(part)
    if not part or count != 1:
        raise ValueError(f"{case}: a text that should be there once is there {count} times: {part!r}")
    return text.index(part)


def _lines(text: str, start: int, end: int) -> range:
    """The lines that the characters from `start` up to and not including `end` stand in, from 1."""
    first = text.count("\n", 0, start) + 1
    return range(first, first + len(text[start:end].splitlines()))


def _edit(base: str, edits: list[tuple[str, str]], case: str) -> tuple[str, list[tuple[int, int]]]:
    """Make all replacements at once; return the new text, and where each replacement stands in it."""
    places = sorted((_position(base, old, case), number) for number, (old, _) in enumerate(edits))
    spans = [(0, 0)] * len(edits)
    parts: list[str] = []
    length = taken = 0
    for start, number in places:
        old, new = edits[number]
        if start < taken:
            raise ValueError(f"{case}: two replacements overlap at {old!r}")
        parts += [base[taken:start], new]
        length += start - taken + len(new)
        spans[number] = (length - len(new), length)
        taken = start + len(old)
    return "".join([*parts, base[taken:]]), spans


def _read(language: str, table: dict[str, Any]) -> Case:
    clean = table.get("clean", False)
    base = (SOURCES / language / table["file"]).read_text("utf-8")
    edits = [(edit["old"], edit["new"]) for edit in table.get("also", ())]
    lines: frozenset[int] = frozenset()
    if clean:
        head, _ = _edit(base, edits, table["id"])
    else:
        head, spans = _edit(base, [(table["old"], table["new"]), *edits], table["id"])
        if "oracle" in table:
            at = _position(head, table["oracle"], table["id"])
            lines = frozenset(_lines(head, at, at + len(table["oracle"])))
        else:
            lines = changes(base, head).added.intersection(_lines(head, *spans[0]))
    return Case(
        id=table["id"],
        language=language,
        path=table["file"],
        rule=table.get("rule", ""),
        kind=table.get("kind", ""),
        note=table["note"],
        base=base,
        head=head,
        lines=lines,
        clean=clean,
    )


def load_cases() -> list[Case]:
    """All cases, by language and then as they stand in their file.

    Raises ValueError if a text that is to be replaced does not stand in its file exactly once.
    """
    return [
        _read(file.stem, table)
        for file in sorted((DATA / "cases").glob("*.toml"))
        for table in tomllib.loads(file.read_text("utf-8"))["case"]
    ]


def make_case_repository(directory: Path, case: Case) -> tuple[str, str]:
    """A git repository with the change of `case` as its second commit; return the ids of both commits.

    The first commit holds all sources of the language, so that there are callers and tests to look at.
    """
    sources = sorted(file for file in (SOURCES / case.language).iterdir() if file.is_file())
    files = {file.name: file.read_bytes() for file in sources}
    make_repository(directory)
    base = commit(directory, files, "Initial version")
    return base, commit(directory, {case.path: case.head}, f"Change {case.path}")
