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
from typing import TYPE_CHECKING

from m3cli.errors import ModelError
from m3cli.model.pretokenizers import BOS_BY_DEFAULT, PATTERNS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from m3cli.model.header import Header

# tokenizer.ggml.token_type; a vocabulary without types has normal tokens only.
_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6
_NAMED_SPECIALS = ("bos", "eos", "eot", "eom")
_SURROGATE = re.compile("[\ud800-\udfff]")
# Below this, starting threads takes longer than the work.
_PARALLEL_CHARACTERS = 200_000
# tiktoken's regex engine gives up, with a panic, on a piece of about a million characters.
_LONGEST_PART = 200_000
# Where every pattern ends a piece, whatever stands around: text can be cut here without changing ids.
_EDGE = re.compile(r"(?<=[A-Za-z])(?=[ \n0-9])|(?<=[^\W_])(?=\n)")


class BPETokenizer:
    """Implements `m3cli.model.tokens.Tokenizer` for one vocabulary.

    `special_tokens` maps the text of control and user-defined tokens to their ids; `eos_id` is the
    id that ends a text, if the model names one.
    """

    def __init__(
        self,
        name: str,
        vocabulary: Vocabulary,
        bos_id: int | None = None,
        eos_id: int | None = None,
    ) -> None:
        import tiktoken

        self.name = name
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.special_tokens: Mapping[str, int] = vocabulary.specials
        self._tokens = vocabulary.tokens
        self._encoding = tiktoken.Encoding(
            name, pat_str=vocabulary.pattern, mergeable_ranks=vocabulary.ranks, special_tokens={}
        )
        self._ids = vocabulary.ids
        self._undone = vocabulary.undone
        self._missing = vocabulary.missing_bytes
        self._pattern = vocabulary.pattern
        # The longest first, so that <|im_end|> wins over a token that begins like it.
        longest_first = sorted(self.special_tokens, key=lambda text: (-len(text), text))
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def encode(self, text: str) -> list[int]:
        """Ids of content: what looks like a special token in it is plain text.

        Characters that the vocabulary has no byte for are left out, as Hugging Face's tokenizers do,
        and lone surrogates become U+FFFD.
        """
        if len(text) <= _LONGEST_PART:
            return self._encode_part(text)
        return [i for part in _cut(text) for i in self._encode_part(part)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Same as `encode` for each text, on all cores when there is enough to do."""
        from concurrent.futures import ThreadPoolExecutor

        cores = os.cpu_count() or 1
        if cores == 1 or sum(map(len, texts)) < _PARALLEL_CHARACTERS:
            return [self.encode(text) for text in texts]
        # Some groups per core even out their sizes; a task per text would cost more than short texts do.
        size = len(texts) // (32 * cores) + 1
        groups = [texts[i : i + size] for i in range(0, len(texts), size)]
        pool = ThreadPoolExecutor(cores)
        try:
            encoded = pool.map(lambda group: list(map(self.encode, group)), groups)
            return [ids for group in encoded for ids in group]
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupt does not wait for what has not begun

    def encode_template(self, text: str) -> list[int]:
        """Ids of template text: the strings of special tokens become their ids."""
        ids: list[int] = []
        position = 0
        for match in self._special.finditer(text):
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
        if not 0 <= token_id < len(self._tokens):
            raise ValueError(f"{self.name} has no token {token_id}.")
        text = self._tokens[token_id]
        if text in self.special_tokens:
            return text.encode("utf-8")
        decoded = _decode(text)
        return text.encode("utf-8") if decoded is None else decoded

    def _encode_part(self, text: str) -> list[int]:
        if self._missing or not text.isascii():
            try:
                data = text.encode("utf-8")
            except UnicodeEncodeError:
                text = _SURROGATE.sub("\ufffd", text)
                data = text.encode("utf-8")
            if self._missing and len(data.translate(None, self._missing)) != len(data):
                return self._to_ids(self._encode_holed(text))
        return self._to_ids(self._encoding.encode_ordinary(text))

    def _encode_holed(self, text: str) -> list[int]:
        """Encode piece by piece, leaving out the bytes that the vocabulary lacks.

        They have to go after the split and before the merges, where tiktoken cannot be reached; so
        the pieces are cut here. Rare: such bytes are control characters and unused planes.
        """
        import regex

        ranks: list[int] = []
        for match in regex.finditer(self._pattern, text, regex.V1):
            piece = match.group().encode("utf-8").translate(None, self._missing)
            if piece:
                ranks += self._encoding._encode_single_piece(piece)
        return ranks

    def _to_ids(self, ranks: list[int]) -> list[int]:
        ids = self._ids
        if self._undone and not self._undone.keys().isdisjoint(ranks):
            return [i for rank in ranks for i in self._undone.get(rank, (ids[rank],))]
        return [ids[rank] for rank in ranks]


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
        self.ids = [content.get(letter, -1) for letter in _LETTERS]
        self.missing_bytes = bytes(b for b in _UTF_8_BYTES if self.ids[b] < 0)
        self.ranks = {bytes([b]): b for b in range(256)}
        unusable: dict[int, str] = {}
        for text in merged:
            data = _decode(text)
            if data is None or len(data) < 2:
                continue
            rank = len(self.ids)
            self.ranks[data] = rank
            self.ids.append(content.get(text, -1))
            if text not in content:
                unusable[rank] = text
        self.undone = _undo(unusable, merges, content) if unusable else {}


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
    vocabulary = Vocabulary(
        [token.decode("utf-8", "replace") for token in tokens],
        types,
        b"\n".join(merges).decode("utf-8", "replace"),
        set(known.values()),
        PATTERNS[pre],
    )
    adds_bos = header.get_bool("tokenizer.ggml.add_bos_token")
    wants_bos = pre in BOS_BY_DEFAULT if adds_bos is None else adds_bos
    digest = hashlib.sha256(b"\0".join((*tokens, *merges, repr(types).encode()))).hexdigest()
    return BPETokenizer(
        f"{pre}:{digest[:16]}", vocabulary, known.get("bos") if wants_bos else None, known.get("eos")
    )


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
