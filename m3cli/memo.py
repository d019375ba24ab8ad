"""What was computed before, kept on the disk: small values by digest."""

from __future__ import annotations

import sqlite3
import time
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_SCHEMA = """
CREATE TABLE IF NOT EXISTS memo
    (key BLOB PRIMARY KEY, value BLOB NOT NULL, used INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_use ON memo (used);
PRAGMA user_version = 2;
"""
_AT_ONCE = 500  # keys in one query
_DAY = 86_400  # seconds; `used` counts days, so that reading seldom writes
_CHECKSUM = 4  # bytes behind each value
_LARGEST = 1 << 30  # bytes of the file; beyond, what was used longest ago goes


class Memo:
    """Values by key, for the next run of the program; a key is a digest of all that a value depends on.

    A context manager. A memo that cannot be opened, read or written is done without, as is a value that is
    not what was put: it only ever saves time. It may be used by one thread at a time.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database: sqlite3.Connection | None = None
        self._opened = False

    @classmethod
    def of(cls, cache_dir: Path) -> Memo:
        """The one in a cache directory."""
        return cls(cache_dir / "memo.sqlite")

    def __enter__(self) -> Memo:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def get(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """The values that are known."""
        wanted = sorted(set(keys))
        database = self._open() if wanted else None
        if database is None:
            return {}
        today = int(time.time()) // _DAY
        found: dict[bytes, bytes] = {}
        try:
            for some in _in_parts(wanted):
                marks = ",".join("?" * len(some))
                rows = database.execute(f"SELECT key, value, used FROM memo WHERE key IN ({marks})", some)
                old = []
                for key, kept, used in rows:
                    value = kept[:-_CHECKSUM] if isinstance(kept, bytes) else b""
                    if kept != value + _checksum(key, value):
                        continue  # the file is damaged, in a place that tells SQLite nothing
                    found[key] = value
                    if used != today:
                        old.append((today, key))
                if old:
                    with database:
                        database.executemany("UPDATE memo SET used = ? WHERE key = ?", old)
        except sqlite3.Error:
            self.close()
        return found

    def put(self, entries: Iterable[tuple[bytes, bytes]]) -> None:
        """Keep the value of each key."""
        today = int(time.time()) // _DAY
        rows = [(key, value + _checksum(key, value), today) for key, value in entries]
        database = self._open() if rows else None
        if database is None:
            return
        try:
            with database:
                database.executemany("INSERT OR REPLACE INTO memo VALUES (?, ?, ?)", rows)
            if self._path.stat().st_size > _LARGEST:
                with database:  # what seems to be used in the future is of a clock that was wrong
                    database.execute(
                        "DELETE FROM memo WHERE key IN (SELECT key FROM memo ORDER BY used > ? DESC, used "
                        "LIMIT (SELECT count(*) / 2 FROM memo))",
                        (today,),
                    )
                database.execute("VACUUM")
        except (sqlite3.Error, OSError):
            self.close()

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._database is not None:
            self._database.close()
            self._database = None

    def _open(self) -> sqlite3.Connection | None:
        if self._opened:
            return self._database
        self._opened = True
        for _ in range(2):
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._path.touch(mode=0o600)  # what is kept is as private as what it was made of
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


def _checksum(key: bytes, value: bytes) -> bytes:
    return zlib.crc32(value, zlib.crc32(key)).to_bytes(_CHECKSUM, "big")


def _in_parts(keys: list[bytes]) -> Iterator[list[bytes]]:
    for start in range(0, len(keys), _AT_ONCE):
        yield keys[start : start + _AT_ONCE]
