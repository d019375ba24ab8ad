"""Chunks in order, within a budget, with a record of everything that was left out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from m3cli.corpus.search import rank
from m3cli.errors import DoesNotFitError
from m3cli.prompt.layout import Layout, PromptLayout, Span
from m3cli.prompt.tree import compact_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from m3cli.corpus.types import Chunk

    CountBatch = Callable[[Iterable[str]], list[int]]

Strategy = Literal["auto", "whole", "select"]

# The file tree on top of a selection may take this share of the budget.
_TREE_SHARE = 0.08
_LONGEST_TOKEN = 32  # characters; only a bound that saves counting what is far too long


@dataclass(frozen=True, slots=True)
class Pack:
    """What goes to the model, exactly, and what does not.

    `parts` joined is the packed text; each part is tokenized on its own, and `tokens` is the sum.
    `spans` are the runs of neighbours among `chunks`, the tokens of whose bodies are `chunk_tokens`.
    `omitted` chunks were left out because the budget ended, in corpus order; `tokens_needed` is what the
    whole corpus would have taken.
    """

    strategy: Literal["whole", "select"]
    chunks: tuple[Chunk, ...]
    chunk_tokens: tuple[int, ...]
    omitted: tuple[Chunk, ...]
    spans: tuple[Span, ...]
    parts: tuple[str, ...]
    tokens: int
    tokens_needed: int

    @property
    def paths(self) -> list[str]:
        """Paths of the documents that are in the pack, at least in part."""
        return list(dict.fromkeys(chunk.path for chunk in self.chunks))


def pack_chunks(
    chunks: Iterable[Chunk],
    count: CountBatch,
    *,
    budget: int | None = None,
    strategy: Strategy = "auto",
    question: str = "",
    layout: Layout | None = None,
    refined: Callable[[], Iterable[Chunk]] | None = None,
) -> Pack:
    """Pack `chunks` (in corpus order) into at most `budget` tokens as `count` counts them.

    Whole, if the corpus fits; else, or with `select`, the chunks that match `question` best, in
    corpus order under a compact tree of all files. Without a question the beginnings of all files
    come before the middle of any. `refined` gives the same texts in chunks that end between
    definitions; it is asked for if there is something to choose, since only then their edges are seen.

    `count` is given an iterable, so that it can count some texts while others are still being read.
    Raises DoesNotFitError, with the numbers, when `whole` was asked for and does not fit, or when not
    even one chunk does.
    """
    layout = layout or PromptLayout()
    packer = _Packer(chunks, count, layout)
    if strategy != "select":
        pack = packer.whole
        if budget is None or pack.tokens <= budget:
            return pack
        if strategy == "whole":
            raise DoesNotFitError(
                f"The whole corpus takes {pack.tokens:,} tokens, and there is room for {budget:,}.",
                "Ask for a larger context with --ctx, leave files out with --exclude, or let m3 choose "
                "with --strategy select.",
            )
    needed = packer.whole.tokens
    if refined is not None:
        packer = _Packer(refined(), count, layout)
    return replace(packer.select(budget, question), tokens_needed=needed)


def split_chunks(
    chunks: Iterable[Chunk], count: CountBatch, *, limit: int, layout: Layout | None = None
) -> list[Pack]:
    """Pack all `chunks` into as many packs, in corpus order, as it takes to hold `limit` tokens in each.

    A document that does not fit into what is left of a pack begins the next one, if it fits there.
    Raises DoesNotFitError when a chunk alone takes more than `limit`.
    """
    return _Packer(chunks, count, layout or PromptLayout()).split(limit)


class _Packer:
    """The chunks of one corpus with their token counts."""

    def __init__(self, chunks: Iterable[Chunk], count: CountBatch, layout: Layout) -> None:
        self.chunks: list[Chunk] = []
        self.bodies: list[str] = []
        self.chunks_of: dict[str, int] = {}
        self.count = count
        self.layout = layout

        def bodies() -> Iterator[str]:
            for chunk in chunks:
                self.chunks.append(chunk)
                self.chunks_of[chunk.path] = self.chunks_of.get(chunk.path, 0) + 1
                body = layout.body(chunk)
                self.bodies.append(body)
                yield body

        self.body_tokens = count(bodies())

    @cached_property
    def whole(self) -> Pack:
        return self._pack("whole", range(len(self.chunks)), "")

    def select(self, budget: int | None, question: str) -> Pack:
        # 1. the tree, so that the model knows what else there is
        budget = self.whole.tokens if budget is None else budget
        tree_budget = int(budget * _TREE_SHARE)
        paths = sorted(self.chunks_of, key=lambda path: path.split("/"))  # whatever order the chunks have
        tree = compact_tree(paths, lambda text: self._tree_fits(text, tree_budget))
        # 2. chunks by relevance, each at the price that it has on its own
        order = rank(self.chunks, question) if question else self._breadth_first()
        prices = [body + frame for body, frame in zip(self.body_tokens, self._frames(), strict=True)]
        taken = _fill(order, prices, budget - self._overhead(tree))
        if not taken and tree:
            tree = ""
            taken = _fill(order, prices, budget - self._overhead(tree))
        # 3. neighbours share a frame, which nearly always saves tokens: check all the same
        pack = self._pack("select", sorted(taken), tree)
        while taken and pack.tokens > budget:
            taken.pop()
            pack = self._pack("select", sorted(taken), tree)
        if not taken:
            smallest = min(prices) + self._overhead("")
            raise DoesNotFitError(
                f"There is room for {budget:,} tokens of context; the smallest excerpt takes {smallest:,}.",
                "Make more room (--ctx, --max-tokens or --budget), or use a model with a larger context.",
            )
        return pack

    def split(self, limit: int) -> list[Pack]:
        if self.whole.tokens <= limit:
            return [self.whole]
        prices = self._frames()
        room = limit - self._overhead("")
        packs: list[Pack] = []
        taken: list[int] = []
        used = 0

        def close() -> None:
            nonlocal used
            left: list[int] = []
            pack = self._pack("whole", taken, "")
            while pack.tokens > limit and len(taken) > 1:  # the frame of a long run may take more
                left.insert(0, taken.pop())
                pack = self._pack("whole", taken, "")
            if pack.tokens > limit:
                chunk = self.chunks[taken[0]]
                raise DoesNotFitError(
                    f"{chunk.path}:{chunk.start_line}-{chunk.end_line} takes {pack.tokens:,} tokens alone, "
                    f"more than the {limit:,} of a part.",
                    "Ask for larger parts.",
                )
            packs.append(pack)
            taken[:] = left
            used = sum(self.body_tokens[i] + prices[i] for i in left)

        for path, indices in groupby(range(len(self.chunks)), key=lambda i: self.chunks[i].path):
            document = list(indices)
            whole = sum(self.body_tokens[i] for i in document) + prices[document[0]]
            if taken and used + whole > room >= whole:
                close()
            for i in document:
                begins = not taken or self.chunks[taken[-1]].path != path
                price = self.body_tokens[i] + (prices[i] if begins else 0)
                if taken and used + price > room:
                    close()
                    price = self.body_tokens[i] + prices[i]
                taken.append(i)
                used += price
        while taken:
            close()
        return packs

    def _pack(self, strategy: Literal["whole", "select"], taken: Sequence[int], tree: str) -> Pack:
        layout, chosen = self.layout, set(taken)
        omitted = (chunk for i, chunk in enumerate(self.chunks) if i not in chosen)
        frames: list[str] = []
        parts: list[str] = []

        def frame(text: str) -> None:
            if text:
                frames.append(text)
                parts.append(text)

        frame(layout.opening)
        frame(layout.tree(tree) if tree else "")
        spans = []
        for number, run in enumerate(self._runs(taken)):
            span = self._span(run)
            spans.append(span)
            frame((layout.separator if number else "") + layout.header(span))
            parts.extend(self.bodies[i] for i in run)
            frame(layout.footer(span))
        frame(layout.closing)
        tokens = sum(self.count(frames)) + sum(self.body_tokens[i] for i in taken)
        return Pack(
            strategy=strategy,
            chunks=tuple(self.chunks[i] for i in taken),
            chunk_tokens=tuple(self.body_tokens[i] for i in taken),
            omitted=tuple(omitted) if strategy == "select" else (),
            spans=tuple(spans),
            parts=tuple(parts),
            tokens=tokens,
            tokens_needed=tokens,
        )

    def _runs(self, taken: Sequence[int]) -> list[list[int]]:
        """`taken` in runs of neighbours of one document."""
        keyed = [(self.chunks[i].path, i - position, i) for position, i in enumerate(taken)]
        return [[i for _, _, i in group] for _, group in groupby(keyed, key=lambda entry: entry[:2])]

    def _span(self, run: Sequence[int]) -> Span:
        chunks = tuple(self.chunks[i] for i in run)
        return Span(chunks, whole=len(chunks) == self.chunks_of[chunks[0].path])

    def _frames(self) -> list[int]:
        """Tokens of header and footer that each chunk takes on its own."""
        spans = [Span((chunk,), whole=False) for chunk in self.chunks]
        headers = self.count([self.layout.separator + self.layout.header(span) for span in spans])
        footers = self.count([self.layout.footer(span) for span in spans])
        return [header + footer for header, footer in zip(headers, footers, strict=True)]

    def _overhead(self, tree: str) -> int:
        parts = [self.layout.opening, self.layout.tree(tree) if tree else "", self.layout.closing]
        return sum(self.count([part for part in parts if part]))

    def _tree_fits(self, text: str, budget: int) -> bool:
        written = self.layout.tree(text)
        return len(written) <= budget * _LONGEST_TOKEN and sum(self.count([written])) <= budget

    def _breadth_first(self) -> list[int]:
        seen: dict[str, int] = {}
        depth: list[int] = []
        for chunk in self.chunks:
            depth.append(seen.get(chunk.path, 0))
            seen[chunk.path] = depth[-1] + 1
        return sorted(range(len(self.chunks)), key=lambda i: (depth[i], i))


def _fill(order: Sequence[int], prices: Sequence[int], room: int) -> list[int]:
    """Take from `order` whatever still fits into `room`."""
    taken = []
    for i in order:
        if prices[i] <= room:
            taken.append(i)
            room -= prices[i]
    return taken
