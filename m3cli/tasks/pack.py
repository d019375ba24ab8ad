"""`m3 pack`: the packed prompt of a corpus, for other tools to read."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from m3cli.corpus.chunks import refine
from m3cli.corpus.corpus import Corpus, CorpusReading, CorpusRequest
from m3cli.errors import UsageError
from m3cli.memo import Memo
from m3cli.model.catalog import demo_model, resolve
from m3cli.prompt.export import FORMATS
from m3cli.prompt.layout import numbered
from m3cli.prompt.pack import Pack, pack_chunks, split_chunks
from m3cli.prompt.template import Template, pack_template
from m3cli.tasks.model import open_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from m3cli.corpus.types import Chunk
    from m3cli.model.tokens import Tokenizer


@dataclass(frozen=True, slots=True)
class PackRequest:
    """What to pack and how. `tokenizer` None estimates tokens at 4 bytes each.

    `counted_by` names the model that `tokenizer` belongs to. With `redact`, secrets are replaced: a pack
    leaves the machine. `memo` remembers where they were found. A `template` takes the place of a format.
    `split_tokens` is the most tokens of a pack, of which there are as many as it takes.
    """

    corpus: CorpusRequest
    format: str = "xml"
    budget: int | None = None
    query: str = ""
    tokenizer: Tokenizer | None = None
    counted_by: str = ""
    redact: bool = True
    memo: Memo | None = None
    line_numbers: bool = False
    template: Template | None = None
    split_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class PackResult:
    """What was packed; `counted_by` is empty where tokens were estimated.

    `redacted` counts the secrets that were replaced, by kind. `split` are the packs that `pack` is the sum
    of, if they were to hold so many tokens each.
    """

    corpus: Corpus
    pack: Pack
    counted_by: str
    redacted: Mapping[str, int]
    split: tuple[Pack, ...] = ()

    @property
    def text(self) -> str:
        """The packed text."""
        return "".join(self.pack.parts)


@contextmanager
def counter(
    model: str | None, aliases: Mapping[str, str], cache_dir: Path | None
) -> Iterator[tuple[Tokenizer | None, str, Memo | None]]:
    """What counts tokens, whose it is, and what remembers counts: the first three facts of a request.

    `model` None is the demo model, or without it no tokenizer; `cache_dir` None remembers nothing.
    """
    with ExitStack() as stack:
        memo = stack.enter_context(Memo.of(cache_dir)) if cache_dir is not None else None
        if model is None and demo_model() is None:
            yield None, "", memo
            return
        opened = stack.enter_context(open_model(resolve(model, aliases), memo))
        yield opened.tokenizer, "the demo model" if opened.ref.origin == "demo" else opened.ref.name, memo


def pack(request: PackRequest, stdin: Callable[[], bytes]) -> PackResult:
    """Pack what `request` names.

    Raises UsageError, CorpusError, and DoesNotFitError when the budget is too small for anything.
    """
    for other, name in ((request.template, "--template"), (request.budget, "--budget")):
        if request.split_tokens is not None and other is not None:
            raise UsageError(f"{name} and --split-tokens exclude each other.", "Leave one of them out.")
    if request.format not in FORMATS:
        raise UsageError(
            f"There is no format {request.format!r}.", f"Choose one of {', '.join(sorted(FORMATS))}."
        )
    reading = CorpusReading(request.corpus, stdin)
    count = request.tokenizer.count_batch if request.tokenizer is not None else _estimate
    redacted: Mapping[str, int] = {}

    def prepared(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        nonlocal redacted
        if not request.redact:
            yield from numbered(chunks) if request.line_numbers else chunks
            return
        from m3cli.prompt.secrets import Redactor  # compiles many patterns

        redactor = Redactor(request.memo)
        chunks = redactor.redact(chunks)
        yield from numbered(chunks) if request.line_numbers else chunks
        redacted = redactor.counts

    def whole() -> Iterator[Chunk]:
        return prepared(reading.chunks())

    def refined() -> Iterator[Chunk]:
        return prepared(refine(reading.corpus.chunks))

    layout = FORMATS[request.format]
    split: list[Pack] = []
    if request.split_tokens is not None:
        split = split_chunks(refined(), count, limit=request.split_tokens, layout=layout)
        packed = _sum(split)
    elif request.template is not None:
        chunks = list(whole() if request.budget is None else refined())
        packed = pack_template(request.template, chunks, count, budget=request.budget, question=request.query)
    else:
        packed = pack_chunks(
            whole(), count, budget=request.budget, question=request.query, layout=layout, refined=refined
        )
    return PackResult(reading.corpus, packed, request.counted_by, redacted, tuple(split))


def _sum(packs: Sequence[Pack]) -> Pack:
    """All of `packs` as one."""
    return Pack(
        strategy="whole",
        chunks=tuple(chunk for pack in packs for chunk in pack.chunks),
        chunk_tokens=tuple(tokens for pack in packs for tokens in pack.chunk_tokens),
        omitted=(),
        spans=tuple(span for pack in packs for span in pack.spans),
        parts=tuple(part for pack in packs for part in pack.parts),
        tokens=sum(pack.tokens for pack in packs),
        tokens_needed=sum(pack.tokens for pack in packs),
    )


def _estimate(texts: Iterable[str]) -> list[int]:
    return [-(-len(text.encode("utf-8", "surrogatepass")) // 4) for text in texts]
