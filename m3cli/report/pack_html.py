"""A pack as one HTML page that needs nothing else: where its tokens are, and what is not in it.

The page loads nothing and runs nothing but its own script, which its Content-Security-Policy names by
hash: paths and reasons come from other people's trees. The same pack gives the same bytes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from m3cli.corpus.names import printable
from m3cli.corpus.types import skip_counts
from m3cli.report.page import own, page

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from m3cli.corpus.types import Chunk, Skip
    from m3cli.tasks.pack import PackResult

FILES_LISTED = 50  # in the table of the biggest files; a search looks through all of them
OMITTED_LISTED = 1000  # files with chunks over the budget
SKIPS_LISTED = 1000  # for each reason
_GROUPS_LISTED = 12  # rows of the tables of directories and file types
_RANGES_LISTED = 20  # runs of lines of one file
_DEEPEST = 64  # levels of directories; what lies deeper keeps the rest of its path in its name
_LONGEST_SUFFIX = 12  # characters; what is longer is part of a name, not a type of file


@dataclass(slots=True)
class _File:
    """A file in the pack; `tokens` and `chunks` are what the pack has of it."""

    name: str
    path: str
    tokens: int = 0
    chunks: int = 0
    omitted: int = 0


@dataclass(slots=True)
class _Directory:
    """`entries` are sorted by tokens once the tree is complete; `files` counts those at any depth."""

    name: str
    entries: list[_Directory | _File] = field(default_factory=list)
    tokens: int = 0
    files: int = 0


@dataclass(frozen=True, slots=True)
class _Group:
    """A row of the table of directories or file types."""

    name: str
    files: int
    tokens: int


def render(result: PackResult, *, title: str, budget: int | None = None) -> str:
    """The page about `result`; `title` says what was packed, `budget` is the limit in tokens if one was set.

    Files whose chunks were all left out are not in the treemap: they stand in the list of what was
    left out.
    """
    pack, corpus = result.pack, result.corpus
    root = _tree(pack.chunks, pack.chunk_tokens, pack.omitted)
    files = sorted(_files(root), key=lambda file: -file.tokens)
    types = _types(files)
    omitted = _omitted(pack.chunks, pack.omitted)
    return page(
        "pack_report.html.jinja",
        script=own("pack_report.js"),
        style=own("pack_report.css"),
        filters={"percent": percent},
        title=printable(title),
        facts=_facts(result, budget),
        notes=[printable(note) for note in corpus.notes],
        order=corpus.order,
        content=root.tokens,
        frame=pack.tokens - root.tokens,
        files=files[:FILES_LISTED],
        file_count=len(files),
        tables=[("Directories", _entries(root)), ("File types", types)],
        groups_listed=_GROUPS_LISTED,
        omitted=omitted[:OMITTED_LISTED],
        omitted_files=len(omitted),
        omitted_chunks=len(pack.omitted),
        skipped=_skipped(corpus.skips),
        skip_count=len(corpus.skips),
        data=_json(_data(root, types)),
    )


def _tree(chunks: Sequence[Chunk], tokens: Sequence[int], omitted: Sequence[Chunk]) -> _Directory:
    files: dict[str, _File] = {}
    for chunk, count in zip(chunks, tokens, strict=True):
        file = files.get(chunk.path)
        if file is None:
            path = printable(chunk.path)
            file = files[chunk.path] = _File(path.split("/", _DEEPEST)[-1], path)
        file.tokens += count
        file.chunks += 1
    for chunk in omitted:
        if chunk.path in files:
            files[chunk.path].omitted += 1
    root = _Directory("")
    directories: dict[tuple[str, ...], _Directory] = {(): root}
    for file in files.values():
        parts = tuple(file.path.split("/", _DEEPEST)[:-1])
        above = root
        for depth in range(len(parts) + 1):
            directory = directories.get(parts[:depth])
            if directory is None:
                directory = directories[parts[:depth]] = _Directory(parts[depth - 1])
                above.entries.append(directory)
            directory.tokens += file.tokens
            directory.files += 1
            above = directory
        above.entries.append(file)
    return _tidy(root)


def _tidy(directory: _Directory) -> _Directory:
    """Sort by tokens, and make one directory of those that hold nothing but another: `src/main/java`."""
    while len(directory.entries) == 1 and isinstance(only := directory.entries[0], _Directory):
        directory.name = f"{directory.name}/{only.name}" if directory.name else only.name
        directory.entries = only.entries
    for entry in directory.entries:
        if isinstance(entry, _Directory):
            _tidy(entry)
    directory.entries.sort(key=lambda entry: (-entry.tokens, entry.name, isinstance(entry, _File)))
    return directory


def _files(directory: _Directory) -> Iterator[_File]:
    for entry in directory.entries:
        if isinstance(entry, _File):
            yield entry
        else:
            yield from _files(entry)


def _entries(root: _Directory) -> list[_Group]:
    """The root's directories, and its own files as one, the largest first."""
    own = [entry for entry in root.entries if isinstance(entry, _File)]
    groups = [_Group(f"{e.name}/", e.files, e.tokens) for e in root.entries if isinstance(e, _Directory)]
    if own:
        groups.append(_Group("files at the top", len(own), sum(file.tokens for file in own)))
    return sorted(groups, key=lambda group: (-group.tokens, group.name))


def _types(files: Sequence[_File]) -> list[_Group]:
    totals: dict[str, list[int]] = {}
    for file in files:
        total = totals.setdefault(_type(file.name), [0, 0])
        total[0] += 1
        total[1] += file.tokens
    groups = [_Group(name, count, tokens) for name, (count, tokens) in totals.items()]
    return sorted(groups, key=lambda group: (-group.tokens, group.name))


def _type(name: str) -> str:
    """`.py` for `a.py` and for `a.PY`; a name without an extension, such as `Makefile`, is its own type."""
    stem, dot, extension = name.rpartition(".")
    if dot and stem and 0 < len(extension) <= _LONGEST_SUFFIX:
        return f".{extension.lower()}"
    return name if len(name) <= _LONGEST_SUFFIX else "no extension"


def _facts(result: PackResult, budget: int | None) -> list[tuple[str, str, str]]:
    """What stands at the top: name, number, remark."""
    pack, corpus = result.pack, result.corpus
    how = f"counted as {result.counted_by} does" if result.counted_by else "estimated at 4 bytes each"
    facts = [("Tokens", f"{'' if result.counted_by else '≈ '}{pack.tokens:,}", how)]
    if budget is not None:
        used = f"{percent(pack.tokens / budget)} used" if budget else ""
        facts.append(("Budget", f"{budget:,}", used))
    if pack.strategy == "select":
        whole = percent(pack.tokens / pack.tokens_needed) if pack.tokens_needed else percent(0)
        facts.append(("Whole corpus", f"{pack.tokens_needed:,}", f"tokens, {whole} packed"))
    read = len({chunk.path for chunk in (*pack.chunks, *pack.omitted)})
    some = f"of {read:,} that were read" if read != len(pack.paths) else ""
    facts.append(("Files", f"{len(pack.paths):,}", some))
    left = f"{len(pack.omitted):,} more over the budget" if pack.omitted else ""
    facts.append(("Chunks", f"{len(pack.chunks):,}", left))
    if result.redacted:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in result.redacted.items())
        facts.append(("Secrets redacted", f"{sum(result.redacted.values()):,}", kinds))
    if corpus.skips:
        facts.append(("Skipped", f"{len(corpus.skips):,}", "listed below, with reasons"))
    return [(name, number, printable(remark)) for name, number, remark in facts]


def _omitted(chunks: Sequence[Chunk], omitted: Sequence[Chunk]) -> list[Mapping[str, Any]]:
    """A row for each file with chunks over the budget, in corpus order."""
    packed: dict[str, int] = {}
    for chunk in chunks:
        packed[chunk.path] = packed.get(chunk.path, 0) + 1
    left: dict[str, list[Chunk]] = {}
    for chunk in omitted:
        left.setdefault(chunk.path, []).append(chunk)
    return [
        {
            "path": printable(path),
            "chunks": len(gone),
            "of": len(gone) + packed.get(path, 0),
            "lines": _ranges(gone),
        }
        for path, gone in left.items()
    ]


def _ranges(chunks: Sequence[Chunk]) -> str:
    """`1-40, 81-120`: the lines of the file that `chunks` hold, neighbours joined."""
    runs: list[list[int]] = []
    for chunk in chunks:
        numbers = [number for number in chunk.numbers or () if number]
        first, last = (numbers[0], numbers[-1]) if numbers else (chunk.start_line, chunk.end_line)
        if runs and first <= runs[-1][1] + 1:
            runs[-1][1] = max(last, runs[-1][1])
        else:
            runs.append([first, last])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in runs[:_RANGES_LISTED]]
    if len(runs) > _RANGES_LISTED:
        words.append(f"{len(runs) - _RANGES_LISTED:,} more")
    return ", ".join(words)


def _skipped(skips: Sequence[Skip]) -> list[Mapping[str, Any]]:
    """A list for each reason, the most frequent first, and how many more there are than it shows."""
    groups: list[Mapping[str, Any]] = []
    for reason, count in skip_counts(skips).items():
        listed = islice((skip for skip in skips if skip.reason.value == reason), SKIPS_LISTED)
        rows = [(printable(skip.path), printable(skip.detail)) for skip in listed]
        groups.append({"reason": reason, "count": count, "rows": rows, "more": count - len(rows)})
    return groups


def _data(root: _Directory, types: Sequence[_Group]) -> dict[str, Any]:
    """What the script draws from: the tree in nested lists, and the types that its files point to.

    A directory is [name, tokens, files, entries]; a file is [name, tokens, chunks, omitted, type].
    """
    number = {group.name: i for i, group in enumerate(types)}

    def node(entry: _Directory | _File) -> list[Any]:
        if isinstance(entry, _File):
            return [entry.name, entry.tokens, entry.chunks, entry.omitted, number[_type(entry.name)]]
        return [entry.name, entry.tokens, entry.files, [node(child) for child in entry.entries]]

    return {"root": node(root), "types": [group.name for group in types]}


def _json(value: object) -> Any:
    """`value` for a script element: nothing in it can end the element or begin a comment."""
    from markupsafe import Markup

    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def percent(share: float) -> str:
    """`12.3%`, rounded as the page's script does; what is there but rounds to nothing is `<0.1%`."""
    rounded = math.floor(share * 1000 + 0.5) / 10
    return f"{rounded:.1f}%" if rounded or not share else "<0.1%"
