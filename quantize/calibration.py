"""Text for measuring a model: read as any corpus is, tokenized, cut into windows of equal length."""

from __future__ import annotations

import hashlib
import sys
from array import array
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from m3cli.corpus.corpus import CorpusReading, CorpusRequest
from m3cli.corpus.documents import DocumentLimits
from m3cli.corpus.names import printable
from m3cli.engine.local import LocalTokenizer
from m3cli.errors import CorpusError, UsageError
from m3cli.model.header import read_header
from m3cli.model.tokenizer import load_tokenizer
from m3cli.model.tokens import pack_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from m3cli.corpus.types import Chunk
    from m3cli.model.tokens import Tokenizer

_FILE_BYTES = 1_000_000_000  # of a file in a directory: measuring wants the large texts too
# Of a longer text so much is tokenized, in so many stretches: some 8 million tokens.
_MOST_CHARACTERS = 1 << 25
_STRETCHES = 32
_PIECE = 1 << 18  # characters that are tokenized as one
_BATCH = 1 << 22  # characters whose ids are lists at a time


@dataclass(frozen=True, slots=True)
class Windows:
    """Token ids in windows of one length, and how many `tokens` they were chosen from.

    The order spreads them: however many are taken from the front, they stand evenly in the text. So a run
    that goes on with more windows begins with those that it had. `digest` is of the ids: 32 hexadecimal
    digits.
    """

    ids: tuple[array[int], ...]
    tokens: int
    digest: str


def token_windows(
    paths: Sequence[str],
    model: Path,
    window: int,
    most: int | None = None,
    *,
    skip: int = 0,
    stdin: Callable[[], bytes] | None = None,
) -> Windows:
    """Cut the text under `paths` into windows of `window` tokens for `model`, and take `most` of them.

    Documents stand in path order, a newline between two where the first does not end in one. They are
    tokenized as content: no special token comes out of them. Where the model wants a token in front of every
    prompt (BOS), it is the first of the `window`. What is left at the end is shorter than a window, and left
    out.

    Windows are numbered by their place in the text alone, and taken in an order that spreads them, whatever
    `most` is, so those of `skip=n` are none of those of `most=n`. Of a text of more than 33.5 million
    characters, 32 evenly spread stretches of a million are tokenized and stand for all of it.

    Raises UsageError for a path that does not exist, for nonsensical numbers, and when `skip` leaves none;
    CorpusError when there is no text, or not enough for one window; ModelError for a model without
    a vocabulary.
    """
    _check(window, most, skip)
    ids: array[int] = array("i")
    header = read_header(model)
    pieces = list(_pieces(CorpusReading(_request(paths), stdin or _read_stdin).chunks()))
    own = load_tokenizer(header)
    if own is not None:
        bos = own.bos_id
        _encode(own, pieces, ids)
    else:
        with LocalTokenizer(str(header.path)) as tokenizer:
            bos = tokenizer.bos_id
            _encode(tokenizer, pieces, ids)
    front = array("i", () if bos is None else (bos,))
    step = window - len(front)
    count = len(ids) // step
    if not count:
        raise CorpusError(
            f"The text in {_named(paths)} has {len(ids):,} tokens, and a window takes {step:,}.",
            "Name more text, or ask for shorter windows.",
        )
    if skip >= count:
        raise UsageError(
            f"The text in {_named(paths)} has {count:,} windows of {window:,} tokens, and the first {skip:,} "
            "are left out.",
            "Name more text, or leave out fewer.",
        )
    chosen = _spread(count)[skip : None if most is None else skip + most]
    windows = tuple(front + ids[i * step : (i + 1) * step] for i in chosen)
    return Windows(windows, len(ids), _digest(windows, window))


def _check(window: int, most: int | None, skip: int) -> None:
    if window < 2:
        raise UsageError(f"A window has at least 2 tokens, not {window:,}.", "Ask for 512, as is usual.")
    if (most is not None and most < 1) or skip < 0:
        raise UsageError("At least one window has to be taken.", "Ask for more windows, or for all.")


def _read_stdin() -> bytes:
    if sys.stdin is None:
        raise UsageError("Standard input is closed.", "Pipe or redirect some text into m3.")
    return sys.stdin.buffer.read()


def _request(paths: Sequence[str]) -> CorpusRequest:
    return CorpusRequest(tuple(paths), limits=DocumentLimits(max_bytes=_FILE_BYTES), order="path")


def _named(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(map(printable, paths[:3])) + more


@dataclass(frozen=True, slots=True)
class _Piece:
    """Neighbouring chunks of a document; the text is made when it is needed, and ends as a document does."""

    chunks: tuple[Chunk, ...]
    is_last: bool

    @property
    def text(self) -> str:
        text = "".join(chunk.text for chunk in self.chunks)
        return text + "\n" if self.is_last and not text.endswith("\n") else text

    @property
    def size(self) -> int:
        """Characters."""
        return sum(len(chunk.text) for chunk in self.chunks)


def _pieces(chunks: Iterable[Chunk]) -> Iterator[_Piece]:
    for _, group in groupby(chunks, key=lambda chunk: chunk.path):
        some: list[Chunk] = []
        size = 0
        for chunk in group:
            if size >= _PIECE:
                yield _Piece(tuple(some), is_last=False)
                some, size = [], 0
            some.append(chunk)
            size += len(chunk.text)
        yield _Piece(tuple(some), is_last=True)


def _sampled(pieces: Sequence[_Piece]) -> Iterator[_Piece]:
    """All pieces, or of too long a text those that begin in the front part of each of equal stretches."""
    total = sum(piece.size for piece in pieces)
    stretch = -(-total // _STRETCHES)
    wanted = _MOST_CHARACTERS // _STRETCHES
    start = 0
    for piece in pieces:
        if total <= _MOST_CHARACTERS or start % stretch < wanted:
            yield piece
        start += piece.size


def _encode(tokenizer: Tokenizer, pieces: Sequence[_Piece], ids: array[int]) -> None:
    """Append the ids of `pieces`."""
    batch: list[str] = []
    size = 0
    for piece in _sampled(pieces):
        batch.append(piece.text)
        size += piece.size
        if size >= _BATCH:
            _append(tokenizer.encode_batch(batch), ids)
            batch, size = [], 0
    _append(tokenizer.encode_batch(batch), ids)


def _append(encoded: Iterable[Sequence[int]], ids: array[int]) -> None:
    for each in encoded:
        ids.extend(each)


def _spread(count: int) -> list[int]:
    """The numbers below `count` in bit-reversed order, of which any first few are evenly spread.

    The van der Corput sequence in base 2, without what is not below `count`.
    """
    bits = (count - 1).bit_length()
    order = [0]
    for bit in reversed(range(bits)):
        order += [number + (1 << bit) for number in order]
    return [number for number in order if number < count]


def _digest(windows: Iterable[array[int]], length: int) -> str:
    digest = hashlib.blake2b(length.to_bytes(8, "little"), digest_size=16)
    for window in windows:
        digest.update(pack_ids(window))
    return digest.hexdigest()
