"""`m3 pack`: the packed prompt of a corpus, for other tools to read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from m3cli.corpus.corpus import Corpus, CorpusRequest, read_corpus
from m3cli.prompt.export import FORMATS
from m3cli.prompt.pack import Pack, pack_chunks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from m3cli.corpus.types import Chunk
    from m3cli.model.tokens import Tokenizer


@dataclass(frozen=True, slots=True)
class PackRequest:
    """What to pack and how. `tokenizer` None estimates tokens at 4 bytes each.

    `counted_by` names the model that `tokenizer` belongs to. With `redact`, secrets are replaced: a pack
    leaves the machine.
    """

    corpus: CorpusRequest
    format: str = "xml"
    budget: int | None = None
    query: str = ""
    tokenizer: Tokenizer | None = None
    counted_by: str = ""
    redact: bool = True


@dataclass(frozen=True, slots=True)
class PackResult:
    """The text, and what went into it; `counted_by` is empty where tokens were estimated.

    `redacted` counts the secrets that were replaced, by kind.
    """

    text: str
    corpus: Corpus
    pack: Pack
    counted_by: str
    redacted: Mapping[str, int]


def pack(request: PackRequest, stdin: Callable[[], bytes]) -> PackResult:
    """Pack what `request` names into one text.

    Raises UsageError, CorpusError, and DoesNotFitError when the budget is too small for anything.
    """
    tokenizer = request.tokenizer
    corpus = read_corpus(request.corpus, stdin)

    def count(texts: Sequence[str]) -> list[int]:
        if tokenizer is None:
            return [-(-len(text.encode("utf-8", "surrogatepass")) // 4) for text in texts]
        return [len(ids) for ids in tokenizer.encode_batch(texts)]

    chunks: Sequence[Chunk] = corpus.chunks
    redacted: Mapping[str, int] = {}
    if request.redact:
        from m3cli.prompt.secrets import redact  # compiles many patterns

        result = redact(chunks)
        chunks, redacted = result.chunks, result.counts
    packed = pack_chunks(
        chunks, count, budget=request.budget, question=request.query, layout=FORMATS[request.format]
    )
    return PackResult("".join(packed.parts), corpus, packed, counted_by=request.counted_by, redacted=redacted)
