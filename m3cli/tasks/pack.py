"""`m3 pack`: the packed prompt of a corpus, for other tools to read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from m3cli.corpus.corpus import Corpus, CorpusRequest, read_corpus
from m3cli.prompt.export import FORMATS
from m3cli.prompt.pack import Pack, pack_chunks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from m3cli.model.tokens import Tokenizer


@dataclass(frozen=True, slots=True)
class PackRequest:
    """What to pack and how. `tokenizer` None estimates tokens at 4 bytes each.

    `counted_by` names the model that `tokenizer` belongs to.
    """

    corpus: CorpusRequest
    format: str = "xml"
    budget: int | None = None
    query: str = ""
    tokenizer: Tokenizer | None = None
    counted_by: str = ""


@dataclass(frozen=True, slots=True)
class PackResult:
    """The text, and what went into it; `counted_by` is empty where tokens were estimated."""

    text: str
    corpus: Corpus
    pack: Pack
    counted_by: str


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

    packed = pack_chunks(
        corpus.chunks, count, budget=request.budget, question=request.query, layout=FORMATS[request.format]
    )
    return PackResult("".join(packed.parts), corpus, packed, counted_by=request.counted_by)
