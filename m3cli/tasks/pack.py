"""`m3 pack`: the packed prompt of a corpus, for other tools to read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from m3cli.corpus.corpus import Corpus, CorpusRequest, read_corpus
from m3cli.prompt.export import FORMATS
from m3cli.prompt.pack import Pack, pack_chunks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from m3cli.corpus.types import Chunk
    from m3cli.memo import Memo
    from m3cli.model.tokens import Tokenizer
    from m3cli.prompt.secrets import Redactor


@dataclass(frozen=True, slots=True)
class PackRequest:
    """What to pack and how. `tokenizer` None estimates tokens at 4 bytes each.

    `counted_by` names the model that `tokenizer` belongs to. With `redact`, secrets are replaced: a pack
    leaves the machine. `memo` remembers what was found to hold none.
    """

    corpus: CorpusRequest
    format: str = "xml"
    budget: int | None = None
    query: str = ""
    tokenizer: Tokenizer | None = None
    counted_by: str = ""
    redact: bool = True
    memo: Memo | None = None


@dataclass(frozen=True, slots=True)
class PackResult:
    """What was packed; `counted_by` is empty where tokens were estimated.

    `redacted` counts the secrets that were replaced, by kind.
    """

    corpus: Corpus
    pack: Pack
    counted_by: str
    redacted: Mapping[str, int]

    @property
    def text(self) -> str:
        """The packed text."""
        return "".join(self.pack.parts)


def pack(request: PackRequest, stdin: Callable[[], bytes]) -> PackResult:
    """Pack what `request` names into one text.

    Raises UsageError, CorpusError, and DoesNotFitError when the budget is too small for anything.
    """
    tokenizer = request.tokenizer
    corpus = read_corpus(request.corpus, stdin)

    chunks: Iterable[Chunk] = corpus.chunks
    redactor: Redactor | None = None
    if request.redact:
        from m3cli.prompt.secrets import Redactor  # compiles many patterns

        redactor = Redactor(request.memo)
        chunks = redactor.redact(chunks)
    packed = pack_chunks(
        chunks,
        tokenizer.count_batch if tokenizer is not None else _estimate,
        budget=request.budget,
        question=request.query,
        layout=FORMATS[request.format],
    )
    redacted = redactor.counts if redactor is not None else {}
    return PackResult(corpus, packed, counted_by=request.counted_by, redacted=redacted)


def _estimate(texts: Iterable[str]) -> list[int]:
    return [-(-len(text.encode("utf-8", "surrogatepass")) // 4) for text in texts]
