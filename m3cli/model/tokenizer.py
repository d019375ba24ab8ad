"""The tokenizer of a GGUF with a byte-pair vocabulary, run by tiktoken.

A GGUF holds what tiktoken needs: tokens, merges in order, and the name of the split pattern.
tiktoken's rank of a token is the place of its first merge; ids are looked up afterwards. The ids are
those of Hugging Face's tokenizers for the same vocabulary, at several times the speed, with two
differences on purpose: special tokens never come out of content, and text is taken as it is
(tokenizers that normalize to NFC would change what the user's files say).
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from m3cli.errors import ModelError
from m3cli.model.pretokenizers import BOS_BY_DEFAULT, PATTERNS, grouped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import numpy as np
    import tiktoken
    from numpy.typing import NDArray

    from m3cli.model.header import Header

_T = TypeVar("_T")

# tokenizer.ggml.token_type; a vocabulary without types has normal tokens only.
_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6
_NAMED_SPECIALS = ("bos", "eos", "eot", "eom")
_SURROGATE = re.compile("[\ud800-\udfff]")
# What a thread encodes at a time: an interrupt waits for it, and Python's lock is taken once for it.
_GROUP_CHARACTERS = 500_000
# tiktoken's special token, of no model: it never comes out, and text that holds it is encoded apart. It
# ends in nothing that it begins with, so two texts around it cannot make another one with it.
_SEPARATOR = "\x00m3\x01"
# After so much, tiktoken of its own makes up to a thread for the time that it takes to make.
_OWN_ENCODING = 3_000_000  # characters
# tiktoken's regex engine gives up, with a panic, on a piece of about a million characters.
_LONGEST_PART = 200_000
# Where every pattern ends a piece, whatever stands around: text can be cut here without changing ids.
_EDGE = re.compile(r"(?<=[A-Za-z])(?=[ \n0-9])|(?<=[^\W_])(?=\n)")


class BPETokenizer:
    """Implements `m3cli.model.tokens.Tokenizer` for one vocabulary, which is built when first needed.

    `eos_id` is the id that ends a text, if the model names one.
    """

    def __init__(
        self,
        name: str,
        vocabulary: Callable[[], Vocabulary],
        bos_id: int | None = None,
        eos_id: int | None = None,
    ) -> None:
        self.name = name
        self.bos_id = bos_id
        self.eos_id = eos_id
        self._make_vocabulary = vocabulary

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return self._make_vocabulary()

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """The texts of control and user-defined tokens and their ids."""
        return self._vocabulary.specials

    def encode(self, text: str) -> list[int]:
        """Ids of content: what looks like a special token in it is plain text.

        Characters that the vocabulary has no byte for are left out, as Hugging Face's tokenizers do,
        and lone surrogates become U+FFFD.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Same as `encode` for each text, on all cores when there is enough to do."""
        ids: list[list[int]] = []
        for group, joined in self._in_parallel(Vocabulary.ranks, texts):
            pieces = _split(joined, self._vocabulary.separator)
            for number, count in enumerate(group.counts):
                found = [each for _ in range(count) for each in self._vocabulary.ids_of(next(pieces))]
                ids.append(group.odd.get(number, found))
        return ids

    def count_batch(self, texts: Iterable[str]) -> list[int]:
        """How many ids each text has; `texts` are taken one by one while others are counted."""
        counted: list[int] = []
        for group, lengths in self._in_parallel(Vocabulary.lengths, texts):
            parts = iter(lengths.tolist())
            for number, count in enumerate(group.counts):
                found = sum(next(parts) for _ in range(count))
                counted.append(len(group.odd[number]) if number in group.odd else found)
        return counted

    def _in_parallel(
        self, work: Callable[[Vocabulary, str], _T], texts: Iterable[str]
    ) -> Iterator[tuple[_Group, _T]]:
        """The groups of `texts`, in order, and for each the `work` done on its joined text.

        With threads if there is more than one group. They do nothing else, since Python's lock is held by
        the thread that takes the texts, which may be busy making them.
        """
        from concurrent.futures import ThreadPoolExecutor

        groups = _groups(texts)
        first = next(groups, None)
        if first is None:
            return
        vocabulary = self._vocabulary
        second = next(groups, None)
        if second is None:
            text, group = vocabulary.join(first)
            yield group, work(vocabulary, text)
            return
        pool = ThreadPoolExecutor(os.cpu_count() or 1)
        try:
            running = []
            for some in chain((first, second), groups):
                text, group = vocabulary.join(some)
                running.append((group, pool.submit(work, vocabulary, text)))
            for group, future in running:
                yield group, future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupt does not wait for what has not begun

    def encode_template(self, text: str) -> list[int]:
        """Ids of template text: the strings of special tokens become their ids."""
        ids: list[int] = []
        position = 0
        for match in self._vocabulary.special.finditer(text):
            ids += self.encode(text[position : match.start()])
            ids.append(self.special_tokens[match.group()])
            position = match.end()
        return ids + self.encode(text[position:])

    def special_id(self, text: str) -> int | None:
        """The id of the special token whose text is `text`."""
        return self.special_tokens.get(text)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; of a special token, its text.

        Raises ValueError for an id that the vocabulary does not have.
        """
        tokens = self._vocabulary.tokens
        if not 0 <= token_id < len(tokens):
            raise ValueError(f"{self.name} has no token {token_id}.")
        text = tokens[token_id]
        if text in self.special_tokens:
            return text.encode("utf-8")
        decoded = _decode(text)
        return text.encode("utf-8") if decoded is None else decoded


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
            elif kind in (_NORMAL, _BYTE):
                content[text] = i
        ids = [content.get(letter, -1) for letter in _LETTERS]
        self.missing_bytes = bytes(b for b in _UTF_8_BYTES if ids[b] < 0)
        ranks = {bytes([b]): b for b in range(256)}
        unusable: dict[int, str] = {}
        for text in merged:
            data = _decode(text)
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

    def join(self, texts: Sequence[str]) -> tuple[str, _Group]:
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
        return _SEPARATOR.join(parts), _Group(counts, odd)

    def ranks(self, text: str) -> NDArray[np.uint32]:
        """The ranks of texts that were joined, with separators."""
        import numpy as np

        encoding = self._encoding_for(len(text))
        return np.frombuffer(encoding._core_bpe.encode_to_tiktoken_buffer(text, {_SEPARATOR}), np.uint32)

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
            special_tokens={_SEPARATOR: self.separator},
        )

    def _plain(self, text: str) -> str | None:
        """`text` without lone surrogates; None if it cannot be encoded together with others."""
        if text.isascii() and not self.missing_bytes:
            return text if _SEPARATOR not in text else None
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError:
            text = _SURROGATE.sub("\ufffd", text)
            data = text.encode("utf-8")
        holed = self.missing_bytes and len(data.translate(None, self.missing_bytes)) != len(data)
        return None if holed or _SEPARATOR in text else text

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


class _Group(NamedTuple):
    """Texts that were joined: the parts of each, and the ids of those that are not among them."""

    counts: list[int]
    odd: dict[int, list[int]]


def load_tokenizer(header: Header) -> BPETokenizer | None:
    """Build the tokenizer of a GGUF, or return None where llama.cpp has to tokenize.

    That is when the vocabulary is not byte-level BPE (`tokenizer.ggml.model` other than `gpt2`), has
    no merges, or is split in a way that m3 does not know (`tokenizer.ggml.pre`). Raises ModelError
    when the vocabulary contradicts itself.
    """
    pre = header.get_str("tokenizer.ggml.pre")
    if header.get_str("tokenizer.ggml.model") != "gpt2" or pre not in PATTERNS:
        return None
    tokens = header.strings("tokenizer.ggml.tokens")
    merges = header.strings("tokenizer.ggml.merges")
    if not tokens or not merges:
        return None
    types = header.array("tokenizer.ggml.token_type") or (_NORMAL,) * len(tokens)
    if len(types) != len(tokens):
        raise ModelError(
            f"The vocabulary of {header.path} has {len(tokens)} tokens, but types for {len(types)}.",
            "Choose another file of this model.",
        )
    named = {name: header.get_int(f"tokenizer.ggml.{name}_token_id") for name in _NAMED_SPECIALS}
    known = {name: i for name, i in named.items() if i is not None and 0 <= i < len(tokens)}
    pattern = PATTERNS[pre]

    def vocabulary() -> Vocabulary:
        return Vocabulary(
            [token.decode("utf-8", "replace") for token in tokens],
            types,
            b"\n".join(merges).decode("utf-8", "replace"),
            set(known.values()),
            pattern,
        )

    adds_bos = header.get_bool("tokenizer.ggml.add_bos_token")
    wants_bos = pre in BOS_BY_DEFAULT if adds_bos is None else adds_bos
    digest = hashlib.sha256(b"\0".join((*tokens, *merges, repr(types).encode()))).hexdigest()
    return BPETokenizer(
        f"{pre}:{digest[:16]}", vocabulary, known.get("bos") if wants_bos else None, known.get("eos")
    )


def _split(ranks: NDArray[np.uint32], separator: int) -> Iterator[NDArray[np.uint32]]:
    """The runs of `ranks` between separators."""
    start = 0
    for end in (*(ranks == separator).nonzero()[0].tolist(), len(ranks)):
        yield ranks[start:end]
        start = end + 1


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= _GROUP_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


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


_LETTERS = _letters()
_UTF_8_BYTES = sorted({*range(0xF5)} - {0xC0, 0xC1})
# Latin-1 characters that are no letters go where Latin-1 cannot follow.
_BYTES = dict.fromkeys(range(256), 65535) | {ord(letter): b for b, letter in enumerate(_LETTERS)}


def _decode(text: str) -> bytes | None:
    """Return the bytes that a token stands for, or None if it is not spelled in byte letters."""
    try:
        return text.translate(_BYTES).encode("latin-1")
    except UnicodeEncodeError:
        return None
