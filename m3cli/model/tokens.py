"""The tokenizer contract, the byte tokenizer that tests run on, and token ids as bytes."""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable


class Tokenizer(Protocol):
    """Text to the ids of one vocabulary.

    There are two ways in, because there are two kinds of text. Template text is ours and may hold
    special tokens. Content comes from files, standard input and questions, and whatever it
    spells is encoded as plain text: no id of a special or user-defined token ever comes out. (Some
    vocabularies keep their runs of blanks and newlines as user-defined tokens. Those are text.)
    """

    @property
    def name(self) -> str:
        """Which vocabulary this is, for messages and cache keys."""
        ...

    @property
    def bos_id(self) -> int | None:
        """The id that every prompt of this model has to begin with, if it wants one."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of content: special token strings in it are plain text."""
        ...

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Same as `encode` for each text, in parallel where that pays."""
        ...

    def count_batch(self, texts: Iterable[str]) -> list[int]:
        """How many ids `encode_batch` gives for each text."""
        ...

    def encode_template(self, text: str) -> list[int]:
        """Ids of template text: special token strings in it become their ids."""
        ...


class ByteTokenizer:
    """One token a byte, ids 0–255, no special tokens: exact and obvious, for tests."""

    name = "bytes"
    bos_id: int | None = None

    def encode(self, text: str) -> list[int]:
        """Ids of the UTF-8 bytes of `text`."""
        return list(text.encode("utf-8", "surrogatepass"))

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Ids of each text."""
        return [self.encode(text) for text in texts]

    def count_batch(self, texts: Iterable[str]) -> list[int]:
        """Bytes of each text."""
        return [len(self.encode(text)) for text in texts]

    def encode_template(self, text: str) -> list[int]:
        """Same as `encode`: there are no special tokens."""
        return self.encode(text)


def pack_ids(ids: Iterable[int]) -> bytes:
    """Token ids as little-endian int32."""
    values = array("i", ids)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()


def unpack_ids(payload: bytes) -> array[int]:
    """Inverse of `pack_ids`."""
    values = array("i")
    values.frombytes(payload)
    if sys.byteorder == "big":
        values.byteswap()
    return values
