"""A byte-pair vocabulary as tiktoken takes it: ranks for bytes, and what ids they stand for."""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING, NamedTuple

from m3cli.model.pretokenizers import grouped

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    import tiktoken
    from numpy.typing import NDArray

# tokenizer.ggml.token_type; a vocabulary without types has normal tokens only.
NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6
_SURROGATE = re.compile("[\ud800-\udfff]")
# tiktoken's special token, of no model: it never comes out, and text that holds it is encoded apart. It
# ends in nothing that it begins with, so two texts around it cannot make another one with it.
SEPARATOR = "\x00m3\x01"
# After so much, tiktoken of its own makes up to a thread for the time that it takes to make.
_OWN_ENCODING = 3_000_000  # characters
# tiktoken's regex engine gives up, with a panic, on a piece of about a million characters.
_LONGEST_PART = 200_000
# Where every pattern ends a piece, whatever stands around: text can be cut here without changing ids.
_EDGE = re.compile(r"(?<=[A-Za-z])(?=[ \n0-9])|(?<=[^\W_])(?=\n)")


class Vocabulary:
    """Tokens and merges of a GGUF, in tiktoken's terms; `merges` holds one pair a line.

    `ranks` maps bytes to ranks: 0-255 are the single bytes, then come the merged tokens in merge
    order. `ids[rank]` is the id. A merged token that content may not use (a special token has its
    text, or the vocabulary lacks it) still takes part in merging; `undone[rank]` are the ids of what
    it is merged from. `missing_bytes` can occur in UTF-8, but have no token.
    """

    def __init__(
        self, tokens: list[str], types: Sequence[float], merges: str, named: set[int], pattern: str
    ) -> None:
        import numpy as np

        merged = dict.fromkeys(merges.replace(" ", "").split("\n"))
        self.tokens = tokens
        self.pattern = pattern
        self.specials: dict[str, int] = {}
        content: dict[str, int] = {}
        for i, (text, kind) in enumerate(zip(tokens, types, strict=True)):
            # Some files call their end token a normal one; no merge makes it, so it is none.
            if kind in (_CONTROL, _USER_DEFINED) or (i in named and len(text) > 1 and text not in merged):
                if text:
                    self.specials[text] = i
            elif kind in (NORMAL, _BYTE):
                content[text] = i
        ids = [content.get(letter, -1) for letter in LETTERS]
        self.missing_bytes = bytes(b for b in _UTF_8_BYTES if ids[b] < 0)
        ranks = {bytes([b]): b for b in range(256)}
        unusable: dict[int, str] = {}
        for text in merged:
            data = token_bytes(text)
            if data is None or len(data) < 2:
                continue
            rank = len(ids)
            ranks[data] = rank
            ids.append(content.get(text, -1))
            if text not in content:
                unusable[rank] = text
        self.ids: NDArray[np.int32] = np.asarray(ids, np.int32)
        self.undone = _undo(unusable, merges, content) if unusable else {}
        self.separator = len(ids)
        self._sizes = np.ones(len(ids) + 1, np.int32)  # ids that a rank stands for
        self._sizes[self.separator] = 0
        for rank, undone in self.undone.items():
            self._sizes[rank] = len(undone)
        self._ranks = ranks
        self._encoding = self._make_encoding()
        self._owner: int | None = None  # the thread that `_encoding` is fast in
        self._local = threading.local()
        # The longest first, so that <|im_end|> wins over a token that begins like it.
        longest_first = sorted(self.specials, key=lambda text: (-len(text), text))
        self.special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def join(self, texts: Sequence[str]) -> tuple[str, Group]:
        """`texts` as one, with tiktoken's special token between, at which it cuts.

        A call of tiktoken for each text would cost as much again in waiting for Python's lock.
        """
        parts: list[str] = []
        counts: list[int] = []
        odd: dict[int, list[int]] = {}
        for number, text in enumerate(texts):
            plain = self._plain(text)
            if plain is None:
                odd[number] = self._odd_ids(text)
                counts.append(0)
            elif len(plain) > _LONGEST_PART:
                before = len(parts)
                parts.extend(_cut(plain))
                counts.append(len(parts) - before)
            else:
                parts.append(plain)
                counts.append(1)
        return SEPARATOR.join(parts), Group(counts, odd)

    def ranks(self, text: str) -> NDArray[np.uint32]:
        """The ranks of texts that were joined, with separators."""
        import numpy as np

        encoding = self._encoding_for(len(text))
        return np.frombuffer(encoding._core_bpe.encode_to_tiktoken_buffer(text, {SEPARATOR}), np.uint32)

    def lengths(self, text: str) -> NDArray[np.int64]:
        """How many ids each of texts has that were joined."""
        import numpy as np

        joined = self.ranks(text)
        ends = np.append((joined == self.separator).nonzero()[0], len(joined))
        sizes = self._sizes[joined] if self.undone else None
        lengths: NDArray[np.int64] = np.diff(ends, prepend=-1) - 1
        if sizes is not None and (sizes > 1).any():
            lengths = np.diff(np.append(0, np.cumsum(sizes))[ends], prepend=0)
        return lengths

    def ids_of(self, ranks: NDArray[np.uint32]) -> list[int]:
        """The ids that `ranks` stand for."""
        if self.undone and (self._sizes[ranks] > 1).any():
            return [i for rank in ranks.tolist() for i in self.undone.get(rank, (int(self.ids[rank]),))]
        ids: list[int] = self.ids[ranks].tolist()
        return ids

    def _encoding_for(self, characters: int) -> tiktoken.Encoding:
        """The encoder for so much text in this thread.

        Its regex engine keeps a cache for the thread that uses it first, and is half as fast again there as
        in others. So a thread with much to do gets one of its own.
        """
        thread, local = threading.get_ident(), self._local
        if self._owner is None:
            self._owner = thread
        if self._owner == thread:
            return self._encoding
        local.characters = getattr(local, "characters", 0) + characters
        if local.characters > _OWN_ENCODING and not hasattr(local, "encoding"):
            local.encoding = self._make_encoding()
        encoding: tiktoken.Encoding = getattr(local, "encoding", self._encoding)
        return encoding

    def _make_encoding(self) -> tiktoken.Encoding:
        import tiktoken

        return tiktoken.Encoding(
            "m3",
            pat_str=grouped(self.pattern),
            mergeable_ranks=self._ranks,
            special_tokens={SEPARATOR: self.separator},
        )

    def _plain(self, text: str) -> str | None:
        """`text` without lone surrogates; None if it cannot be encoded together with others."""
        if text.isascii() and not self.missing_bytes:
            return text if SEPARATOR not in text else None
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError:
            text = _SURROGATE.sub("\ufffd", text)
            data = text.encode("utf-8")
        holed = self.missing_bytes and len(data.translate(None, self.missing_bytes)) != len(data)
        return None if holed or SEPARATOR in text else text

    def _odd_ids(self, text: str) -> list[int]:
        """Encode piece by piece, leaving out the bytes that the vocabulary lacks.

        They have to go after the split and before the merges, where tiktoken cannot be reached; so
        the pieces are cut here. Rare: such bytes are control characters and unused planes.
        """
        import numpy as np
        import regex

        ranks: list[int] = []
        for part in _cut(_SURROGATE.sub("\ufffd", text)):
            for match in regex.finditer(self.pattern, part, regex.V1):
                piece = match.group().encode("utf-8").translate(None, self.missing_bytes)
                if piece:
                    ranks += self._encoding._encode_single_piece(piece)
        return self.ids_of(np.asarray(ranks, np.uint32))


class Group(NamedTuple):
    """Texts that were joined: the parts of each, and the ids of those that are not among them."""

    counts: list[int]
    odd: dict[int, list[int]]


def _cut(text: str) -> Iterator[str]:
    """Yield parts of at most _LONGEST_PART characters, cut at edges of pieces.

    Where a part holds no such edge (a file of a million blanks, say), its end is cut as it comes, which
    may cost a token or two.
    """
    start = 0
    while len(text) - start > _LONGEST_PART:
        end = start + _LONGEST_PART
        edges = [match.start() for match in _EDGE.finditer(text, end - _LONGEST_PART // 64, end)]
        edges = edges or [match.start() for match in _EDGE.finditer(text, start + 1, end)]
        cut = edges[-1] if edges else end
        yield text[start:cut]
        start = cut
    yield text[start:]


def _undo(unusable: Mapping[int, str], merges: str, content: Mapping[str, int]) -> dict[int, list[int]]:
    pairs: dict[str, list[str]] = {}
    for merge in merges.split("\n"):
        parts = merge.split(" ")
        if all(parts):
            pairs.setdefault("".join(parts), parts)
    result: dict[int, list[int]] = {}
    for rank, text in unusable.items():
        ids: list[int] = []
        left = [text]
        while left:
            part = left.pop()
            if part in content:
                ids.append(content[part])
            elif len(part) > 1:
                left += reversed(pairs.get(part) or list(part))
        result[rank] = ids
    return result


def _letters() -> list[str]:
    """Give the letter that stands for each byte in the tokens of byte-level BPE (GPT-2's encoder.py).

    Printable Latin-1 stands for itself; the rest got the letters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b if b in printable else next(others)) for b in range(256)]


LETTERS = _letters()
_UTF_8_BYTES = sorted({*range(0xF5)} - {0xC0, 0xC1})
# Latin-1 characters that are no letters go where Latin-1 cannot follow.
_BYTES = dict.fromkeys(range(256), 65535) | {ord(letter): b for b, letter in enumerate(LETTERS)}


def token_bytes(text: str) -> bytes | None:
    """Return the bytes that a token stands for, or None if it is not spelled in byte letters."""
    try:
        return text.translate(_BYTES).encode("latin-1")
    except UnicodeEncodeError:
        return None
