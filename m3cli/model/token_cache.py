"""Token ids and counts that were computed before: an unchanged tree is not tokenized again."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING
from zlib import crc32

from m3cli.model.tokens import pack_ids, unpack_ids

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from m3cli.memo import Memo
    from m3cli.model.tokens import Tokenizer

_SHORTEST = 256  # characters; looking a shorter text up takes longer than encoding it
_MOST_IN_GROUP = 256  # texts


class CachingTokenizer:
    """A Tokenizer that remembers the ids of texts, by their content and the vocabulary's name.

    Counts are remembered for groups of neighbouring texts. Where a group ends is decided by the text
    that it ends with, so that an edit changes its own group and not all that follow.
    """

    def __init__(self, tokenizer: Tokenizer, memo: Memo) -> None:
        self._tokenizer = tokenizer
        self._memo = memo
        self.name = tokenizer.name
        self.bos_id = tokenizer.bos_id

    def encode(self, text: str) -> list[int]:
        """Ids of content: special token strings in it are plain text."""
        return self.encode_batch([text])[0]

    def encode_template(self, text: str) -> list[int]:
        """Ids of template text: special token strings in it become their ids."""
        return self._tokenizer.encode_template(text)

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Ids of each text, computed only for those that are not known yet."""
        texts = list(texts)
        keys = [self._key(text) if len(text) >= _SHORTEST else None for text in texts]
        known: dict[bytes, list[int]] = {}
        for found, value in self._memo.get(key for key in keys if key is not None).items():
            if len(value) % 4 == 0:  # else it is damaged
                known[found] = unpack_ids(value).tolist()
        missing = [i for i, key in enumerate(keys) if key is None or key not in known]
        computed = dict(zip(missing, self._tokenizer.encode_batch([texts[i] for i in missing]), strict=True))
        self._memo.put((key, pack_ids(ids)) for i, ids in computed.items() if (key := keys[i]) is not None)
        return [computed[i] if key is None or i in computed else known[key] for i, key in enumerate(keys)]

    def count_batch(self, texts: Iterable[str]) -> list[int]:
        """How many ids each text has; counted only for groups that are not known yet."""
        groups: list[tuple[bytes, int, bytes | None]] = []

        def unknown() -> Iterator[str]:
            for group in _groups(texts):
                key = self._group_key(group)
                value = self._memo.get([key]).get(key)
                if value is not None and len(value) != 4 * len(group):
                    value = None  # damaged
                groups.append((key, len(group), value))
                if value is None:
                    yield from group

        computed = iter(self._tokenizer.count_batch(unknown()))
        counts: list[int] = []
        new: list[tuple[bytes, bytes]] = []
        for key, size, value in groups:
            if value is not None:
                counts.extend(unpack_ids(value))
            else:
                found = [next(computed) for _ in range(size)]
                counts.extend(found)
                new.append((key, pack_ids(found)))
        self._memo.put(new)
        return counts

    def close(self) -> None:
        """Close the memo and the tokenizer; may be called twice."""
        self._memo.close()
        close = getattr(self._tokenizer, "close", None)
        if close is not None:
            close()

    def _key(self, text: str) -> bytes:
        return _digest(f"{self.name}\0{text}".encode("utf-8", "surrogatepass"))

    def _group_key(self, group: list[str]) -> bytes:
        # With their lengths, so that the same text cut elsewhere is another group.
        lengths = ",".join(str(len(text)) for text in group)
        return _digest(f"counts\0{self.name}\0{lengths}\0{''.join(group)}".encode("utf-8", "surrogatepass"))


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    """`texts` in groups of some 16, which end after a text whose checksum says so."""
    group: list[str] = []
    for text in texts:
        group.append(text)
        ends = (text[:32] + text[-32:]).encode("utf-8", "surrogatepass")
        if crc32(ends) % 16 == 0 or len(group) == _MOST_IN_GROUP:
            yield group
            group = []
    if group:
        yield group
