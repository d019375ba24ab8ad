"""A change in groups of files that each fit one prompt, with what a reviewer has to know around them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from m3cli.corpus.chunks import refine
from m3cli.corpus.search import rank
from m3cli.corpus.types import Chunk
from m3cli.errors import DoesNotFitError
from m3cli.prompt.pack import pack_chunks
from m3cli.tasks.findings import Unreviewed
from m3cli.tasks.review_prompt import review_task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from m3cli.corpus.patch import FileChange
    from m3cli.tasks.context import Context
    from m3cli.tasks.prompts import Prompt

Mode = Literal["diff", "related", "repo"]

# Tokens: of the diffs of one group, however large the context is, since attention thins out; of the parts
# of files around the changes, and of what is related to them.
_GROUP = 6000
_AROUND = 4000
_RELATED = 3000
_LEAST = 500  # of a diff, for which there has to be room beside a repository


@dataclass(frozen=True, slots=True)
class Group:
    """Files that are reviewed in one prompt: their changes, the diff as it is shown, and what is around."""

    changes: tuple[FileChange, ...]
    diff: str
    parts: tuple[str, ...]
    prompt: Prompt


def groups_of(
    mode: Mode, context: Context, changes: Sequence[FileChange]
) -> tuple[list[Group], list[Unreviewed]]:
    """The changes in as few prompts as hold them, and what no prompt can hold.

    A change that is too large goes in parts. Raises DoesNotFitError, with the numbers, when the
    whole repository leaves no room for the change.
    """
    count = context.model.tokenizer.count_batch
    room = context.room(len(context.prompt((), review_task("")).tokens))
    whole: tuple[str, ...] | None = None
    if mode == "repo":
        pack = pack_chunks(context.corpus.chunks, count, strategy="whole")
        if (needed := pack.tokens + _LEAST) > room:
            raise DoesNotFitError(
                f"With the whole repository the review takes {needed:,} tokens, and there is room for "
                f"{room:,}.",
                "Use --context related, or a larger --ctx.",
            )
        whole, room = pack.parts, room - pack.tokens
    beside = 0 if whole is not None else min(_AROUND + _RELATED, room // 2)
    limit = min(_GROUP, room - beside)
    pieces: list[tuple[FileChange, int]] = []
    unreviewed: list[Unreviewed] = []
    for change in changes:
        for piece in _pieces(change, limit, count):
            size = count([piece.diff])[0]
            if size <= limit:
                pieces.append((piece, size))
                continue
            first = piece.hunks[0].start
            unreviewed.append(
                Unreviewed(
                    change.path,
                    f"line {first} takes {size:,} tokens, and there is room for {limit:,}",
                )
            )
    groups: list[list[FileChange]] = []
    used = limit + 1
    for piece, size in pieces:
        # A path stands once in a group: findings are told apart by it.
        if used + size > limit or piece.path in {other.path for other in groups[-1]}:
            groups.append([])
            used = 0
        groups[-1].append(piece)
        used += size
    related = _Related(context) if mode == "related" else None
    return [_group(context, group, whole, related, beside) for group in groups], unreviewed


def _pieces(
    change: FileChange, limit: int, count: Callable[[Sequence[str]], list[int]]
) -> Iterator[FileChange]:
    """`change` in parts that take at most `limit` tokens each, as far as single lines allow."""
    hunks = list(change.hunks)
    while hunks:
        taken = len(hunks)
        while count([replace(change, hunks=tuple(hunks[:taken])).diff])[0] > limit:
            if taken > 1:
                taken = (taken + 1) // 2
            elif len(hunks[0].lines) > 1:
                hunks[:1] = hunks[0].halves()
            else:
                break
        yield replace(change, hunks=tuple(hunks[:taken]))
        del hunks[:taken]


def _group(
    context: Context,
    changes: Sequence[FileChange],
    whole: tuple[str, ...] | None,
    related: _Related | None,
    beside: int,
) -> Group:
    diff = "\n".join(change.diff.rstrip("\n") for change in changes) + "\n"
    diff = diff.replace("\r\n", "\n").replace("\r", "\\r")  # alone, it would begin a line of its own
    parts = whole
    if parts is None:
        around = _around(changes)
        chunks = [*(related.to(changes, around) if related else []), *around]
        parts = _within(context, chunks, beside)
    return Group(tuple(changes), diff, parts, context.prompt(parts, review_task(diff)))


def _around(changes: Sequence[FileChange]) -> list[Chunk]:
    """The new version of what encloses the changes."""
    chunks = []
    for change in changes:
        lines = change.head_lines()
        for first, last in change.enclosing():
            text = "".join(f"{lines[number]}\n" for number in range(first, last + 1) if number in lines)
            if text:
                chunks.append(Chunk(change.path, first, last, text))
    return chunks


def _within(context: Context, chunks: Sequence[Chunk], budget: int) -> tuple[str, ...]:
    """As many of `chunks`, from the last to the first, as `budget` tokens hold, packed in order."""
    count = context.model.tokenizer.count_batch
    taken: list[Chunk] = []
    used = 0
    for chunk in reversed(chunks):
        pack = pack_chunks([chunk], count, strategy="whole")
        if used + pack.tokens <= budget:
            taken.insert(0, chunk)
            used += pack.tokens
    return pack_chunks(taken, count, strategy="whole").parts if taken else ()


class _Related:
    """The chunks of the tree that have to do with what was changed: definitions, callers, tests."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._chunks: list[Chunk] | None = None

    def to(self, changes: Sequence[FileChange], around: Sequence[Chunk]) -> list[Chunk]:
        """The best of them, in the order of the tree."""
        symbols = list(dict.fromkeys(symbol for change in changes for symbol in change.changed_symbols()))
        if not symbols:
            return []
        if self._chunks is None:
            self._chunks = list(refine(self._context.corpus.chunks))
        names = re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, symbols)) + r")(?!\w)")
        shown = {(chunk.path, number) for chunk in around for number in (chunk.start_line, chunk.end_line)}
        candidates = [
            chunk
            for chunk in self._chunks
            if names.search(chunk.text)
            and not any(
                path == chunk.path and chunk.start_line <= number <= chunk.end_line for path, number in shown
            )
        ]
        best = [candidates[index] for index in rank(candidates, " ".join(symbols))]
        count = self._context.model.tokenizer.count_batch
        taken: set[int] = set()
        used = 0
        for chunk in best[:50]:
            size = count([chunk.text])[0]
            if used + size <= _RELATED:
                taken.add(id(chunk))
                used += size
        return [chunk for chunk in candidates if id(chunk) in taken]
