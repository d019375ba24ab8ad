"""Token ids that were computed before, kept on the disk: an unchanged tree is not tokenized again."""

from __future__ import annotations

import hashlib
import sqlite3
import time
from typing import TYPE_CHECKING

from m3cli.model.tokens import pack_ids, unpack_ids

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from m3cli.model.tokens import Tokenizer

_SCHEMA = """
CREATE TABLE IF NOT EXISTS ids (key BLOB PRIMARY KEY, ids BLOB NOT NULL, used INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_use ON ids (used);
PRAGMA user_version = 1;
"""
_SHORTEST = 256  # characters; looking a shorter text up takes longer than encoding it
_AT_ONCE = 500  # keys in one query
_DAY = 86_400  # seconds; `used` counts days, so that reading seldom writes
_LARGEST = 1 << 30  # bytes of the file; beyond, what was used longest ago goes


class CachingTokenizer:
    """A Tokenizer that remembers the ids of texts, by their content and the vocabulary's name.

    A cache that cannot be opened, read or written is done without: it only ever saves time.
    """

    def __init__(self, tokenizer: Tokenizer, path: Path) -> None:
        self._tokenizer = tokenizer
        self._path = path
        self._database: sqlite3.Connection | None = None
        self._opened = False
        self.name = tokenizer.name
        self.bos_id = tokenizer.bos_id

    def encode(self, text: str) -> list[int]:
        """Ids of content: special token strings in it are plain text."""
        return self.encode_batch([text])[0]

    def encode_template(self, text: str) -> list[int]:
        """Ids of template text: special token strings in it become their ids."""
        return self._tokenizer.encode_template(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, computed only for those that are not known yet."""
        keys = [self._key(text) if len(text) >= _SHORTEST else None for text in texts]
        known = self._look_up({key for key in keys if key is not None})
        missing = [i for i, key in enumerate(keys) if key is None or key not in known]
        computed = dict(zip(missing, self._tokenizer.encode_batch([texts[i] for i in missing]), strict=True))
        self._store((key, ids) for i, ids in computed.items() if (key := keys[i]) is not None)
        return [computed[i] if key is None or i in computed else known[key] for i, key in enumerate(keys)]

    def close(self) -> None:
        """Close the database and the tokenizer; may be called twice."""
        if self._database is not None:
            self._database.close()
            self._database = None
        close = getattr(self._tokenizer, "close", None)
        if close is not None:
            close()

    def _key(self, text: str) -> bytes:
        data = f"{self.name}\0{text}".encode("utf-8", "surrogatepass")
        return hashlib.blake2b(data, digest_size=16).digest()

    def _look_up(self, keys: set[bytes]) -> dict[bytes, list[int]]:
        database = self._open() if keys else None
        if database is None:
            return {}
        today = int(time.time()) // _DAY
        found: dict[bytes, list[int]] = {}
        try:
            for some in _in_parts(sorted(keys)):
                marks = ",".join("?" * len(some))
                rows = database.execute(f"SELECT key, ids, used FROM ids WHERE key IN ({marks})", some)
                old = []
                for key, data, used in rows:
                    found[key] = unpack_ids(data).tolist()
                    if used != today:
                        old.append((today, key))
                if old:
                    with database:
                        database.executemany("UPDATE ids SET used = ? WHERE key = ?", old)
        except (sqlite3.Error, ValueError):
            self._give_up()
        return found

    def _store(self, entries: Iterable[tuple[bytes, list[int]]]) -> None:
        today = int(time.time()) // _DAY
        rows = [(key, pack_ids(ids), today) for key, ids in entries]
        database = self._open() if rows else None
        if database is None:
            return
        try:
            with database:
                database.executemany("INSERT OR REPLACE INTO ids VALUES (?, ?, ?)", rows)
            if self._path.stat().st_size > _LARGEST:
                with database:
                    database.execute(
                        "DELETE FROM ids WHERE key IN (SELECT key FROM ids ORDER BY used LIMIT "
                        "(SELECT count(*) / 2 FROM ids))"
                    )
                database.execute("VACUUM")
        except (sqlite3.Error, OSError):
            self._give_up()

    def _open(self) -> sqlite3.Connection | None:
        if self._opened:
            return self._database
        self._opened = True
        for _ in range(2):
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._path.touch(mode=0o600)  # ids are as private as the texts
                database = sqlite3.connect(self._path, timeout=5, check_same_thread=False)
                database.execute("PRAGMA journal_mode = WAL")
                database.execute("PRAGMA synchronous = NORMAL")
                database.executescript(_SCHEMA)
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):  # locked, read-only, a full disk
                    return None
                self._path.unlink(missing_ok=True)  # no database, or a broken one: begin a new one
            except OSError:
                return None
            else:
                self._database = database
                return database
        return None

    def _give_up(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None


def _in_parts(keys: list[bytes]) -> Iterator[list[bytes]]:
    for start in range(0, len(keys), _AT_ONCE):
        yield keys[start : start + _AT_ONCE]
