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
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

from m3cli.errors import ModelError
from m3cli.model.pretokenizers import BOS_BY_DEFAULT, PATTERNS
from m3cli.model.vocabulary import NORMAL, Vocabulary, token_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from m3cli.model.header import Header
    from m3cli.model.vocabulary import Group

_T = TypeVar("_T")

_NAMED_SPECIALS = ("bos", "eos", "eot", "eom")
# What a thread encodes at a time: an interrupt waits for it, and Python's lock is taken once for it.
_GROUP_CHARACTERS = 500_000


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
    ) -> Iterator[tuple[Group, _T]]:
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
        decoded = token_bytes(text)
        return text.encode("utf-8") if decoded is None else decoded


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
    types = header.array("tokenizer.ggml.token_type") or (NORMAL,) * len(tokens)
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
