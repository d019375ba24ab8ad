"""KV caches on disk: find the one that shares the longest prefix, save atomically, evict.

    <root>/v1/<key>/<tokens>/manifest.json    what it is; written last
                             tokens.bin       little-endian int32
                             state.bin        llama.cpp's state file

The key stands for everything that makes one KV cache fit another run: model, llama.cpp, cache types,
attention. An entry is written into a directory of its own (`<tokens>.partial`), brought to the disk, and
renamed; whoever writes holds a lock on that directory, so two processes never write one entry, and what
a dead one left is told from what a living one is at. Nothing that is read is trusted: sizes and digests
are compared before llama.cpp sees a file, because it aborts on a truncated one and believes a flipped
bit. An entry that fails is reported once, and removed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from m3cli.engine.edits import changed_of, common_prefix, staleness
from m3cli.model.tokens import pack_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

_FORMAT = "v1"
_MANIFEST, _TOKENS, _STATE = "manifest.json", "tokens.bin", "state.bin"
_PARTIAL = ".partial"
_RATES = "rates.json"
_LOAD_RATE = 300e6  # bytes a second, until it was measured
_BLOCK = 16 << 20
# Without a limit of its own, the cache may take this share of what the disk could give it.
_AUTOMATIC_SHARE = 4
_KEPT_FREE = 256 << 20  # bytes of the disk that a snapshot does not take


class SnapshotError(Exception):
    """A snapshot that is damaged, or could not be written; the text says why, without a full stop."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an entry is. Sizes in bytes, times in seconds since the epoch.

    `label` is what people know it by (the tree), `model` the model's name. `tokens_per_second` is the
    speed at which the tokens were computed, 0 if unknown: what a restoration has to beat. `cuts` is where
    batches ended before the last token, beside multiples of their size. `changed` is that of
    m3cli.engine.edits, as runs; it is empty for a context that was never updated in place.
    """

    key: str
    label: str
    model: str
    tokens: int
    tokens_digest: str
    state_bytes: int
    state_digest: str
    created: float
    tokens_per_second: float
    cuts: Sequence[int] = ()
    changed: Sequence[Sequence[int]] = ()

    @property
    def staleness(self) -> float:
        """How much of what was computed has changed since; see m3cli.engine.edits."""
        return staleness(changed_of(self.changed, self.tokens))


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry on the disk. `used` is when it was last restored or written, in seconds since the epoch."""

    directory: Path
    manifest: Manifest
    used: float

    @property
    def nbytes(self) -> int:
        """Bytes of its files, about: the manifest is left out."""
        return self.manifest.state_bytes + 4 * self.manifest.tokens

    @property
    def state_file(self) -> Path:
        """The file for llama.cpp; see `check`."""
        return self.directory / _STATE

    def tokens(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """The token ids. Raises SnapshotError when they are not those that were saved."""
        try:
            data = (self.directory / _TOKENS).read_bytes()
        except OSError as error:
            raise SnapshotError(f"its token ids cannot be read ({error.strerror})") from error
        if len(data) != 4 * self.manifest.tokens or _digest(data) != self.manifest.tokens_digest:
            raise SnapshotError("its token ids are damaged")
        return np.frombuffer(data, "<i4")

    def check(self) -> None:
        """Compare the state file with its digest. Raises SnapshotError."""
        try:
            size = self.state_file.stat().st_size
            if size != self.manifest.state_bytes:
                raise SnapshotError(f"its state has {size:,} bytes instead of {self.manifest.state_bytes:,}")
            if _file_digest(self.state_file) != self.manifest.state_digest:
                raise SnapshotError("its state does not match its checksum")
        except OSError as error:
            raise SnapshotError(f"its state cannot be read ({error.strerror})") from error

    def touch(self) -> None:
        """Note that it was used just now."""
        with suppress(OSError):  # a cache that may only be read still serves
            os.utime(self.directory / _MANIFEST)


@dataclass(frozen=True, slots=True)
class Match:
    """An entry whose first `common` tokens are those that were asked for."""

    entry: Entry
    common: int


class SnapshotStore:
    """All entries below `root`; those of `key` can be found and saved.

    `max_bytes` 0 lets the cache have a fourth of what the disk could give it. With `most_of_a_label`, an
    entry takes the place of those of its label that were used longest ago, if there are more. `report` is
    called with a sentence for each entry that was found damaged.
    """

    def __init__(
        self,
        root: Path,
        key: str = "",
        *,
        max_bytes: int = 0,
        most_of_a_label: int = 0,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.root = root / _FORMAT
        self._key = key
        self._max_bytes = max_bytes
        self._most_of_a_label = most_of_a_label
        self._report = report or (lambda _: None)

    def entries(self) -> list[Entry]:
        """Every entry of every key, the one used last first. Damaged manifests are reported and removed."""
        found = [entry for path in sorted(self.root.glob("*/*")) if (entry := self._read(path))]
        return sorted(found, key=lambda entry: (-entry.used, entry.directory.name))

    def find(self, tokens: Sequence[int]) -> list[Match]:
        """Entries of this key that share a prefix with `tokens`, the longest first."""
        wanted = np.asarray(tokens, np.int32)
        matches = []
        for entry, held in self._with_tokens(self._of_key()):
            if common := common_prefix(held, wanted):
                matches.append(Match(entry, common))
        return sorted(matches, key=lambda match: (-match.common, match.entry.manifest.tokens))

    def labelled(self, label: str, most: int) -> list[tuple[Entry, np.ndarray[Any, np.dtype[np.int32]]]]:
        """At most so many entries of this key and this label, with their tokens, the one used last first."""
        return list(self._with_tokens(self._labelled(label)[:most]))

    def _labelled(self, label: str) -> list[Entry]:
        entries = [entry for entry in self._of_key() if entry.manifest.label == label]
        return sorted(entries, key=lambda entry: -entry.used)

    def _of_key(self) -> Iterator[Entry]:
        """Entries of this key; damaged ones are reported and removed."""
        for path in sorted((self.root / self._key).glob("*")):
            if (entry := self._read(path)) is not None:
                yield entry

    def _with_tokens(
        self, entries: Iterable[Entry]
    ) -> Iterator[tuple[Entry, np.ndarray[Any, np.dtype[np.int32]]]]:
        """Entries with their tokens; damaged ones are reported and removed."""
        for entry in entries:
            try:
                tokens = entry.tokens()
            except SnapshotError as error:
                self.discard(entry, str(error))
            else:
                yield entry, tokens

    def pays(self, entry: Entry, tokens: int) -> bool:
        """Whether loading an entry is expected to be faster than computing `tokens`."""
        rate = entry.manifest.tokens_per_second
        return not rate or entry.nbytes / self._load_rate() < tokens / rate

    def note_load(self, nbytes: int, seconds: float) -> None:
        """Remember how fast this machine loads."""
        rate = nbytes / max(seconds, 1e-6)
        with suppress(OSError):
            temporary = self.root / f"{_RATES}.{os.getpid()}"
            temporary.write_text(json.dumps({"load_bytes_per_second": (rate + self._load_rate()) / 2}))
            temporary.replace(self.root / _RATES)

    def _load_rate(self) -> float:
        """Bytes a second, as measured on this machine."""
        try:
            return max(float(json.loads((self.root / _RATES).read_bytes())["load_bytes_per_second"]), 1.0)
        except (OSError, ValueError, TypeError, LookupError):
            return _LOAD_RATE

    def save(
        self,
        tokens: Sequence[int],
        state_bytes: int,
        write_state: Callable[[Path], int],
        *,
        label: str,
        model: str,
        tokens_per_second: float,
        cuts: Sequence[int] = (),
        changed: Sequence[Sequence[int]] = (),
    ) -> Entry | None:
        """Save the KV cache of `tokens`; None if another process is at the same one.

        `state_bytes` is how large the state is going to be; `write_state` writes it into a file and
        returns its size, or 0. An entry that is there already is left as it is. Entries whose tokens
        only begin these are removed afterwards: the new one serves wherever they did. Where there is a most
        of a label, it is those beyond that. Raises SnapshotError when there is no room, or the disk refuses;
        nothing is left behind then.
        """
        data = pack_ids(tokens)
        name = _digest(data)
        directory = self.root / self._key / name
        if (entry := self._read(directory)) is not None:
            entry.touch()
            return self._read(directory)
        try:
            self._make_room(state_bytes + len(data))
            with self._claim(directory) as partial:
                if partial is None:
                    return self._read(directory)
                _write(partial / _TOKENS, data)
                written = write_state(partial / _STATE)
                if not written or (partial / _STATE).stat().st_size != written:
                    raise SnapshotError("llama.cpp could not write its state; the disk may be full")
                _sync(partial / _STATE)
                manifest = Manifest(
                    key=self._key,
                    label=label,
                    model=model,
                    tokens=len(tokens),
                    tokens_digest=name,
                    state_bytes=written,
                    state_digest=_file_digest(partial / _STATE),
                    created=time.time(),
                    tokens_per_second=tokens_per_second,
                    cuts=cuts,
                    changed=changed,
                )
                _write(partial / _MANIFEST, _encode(manifest))
                partial.rename(directory)
                _sync(directory.parent)
        except OSError as error:
            raise SnapshotError(error.strerror or str(error)) from error
        saved = self._read(directory)
        if self._most_of_a_label:
            others = self._labelled(label)[self._most_of_a_label :] if label else []
        else:
            others = [
                match.entry
                for match in self.find(tokens)
                if match.common == match.entry.manifest.tokens < len(tokens)
            ]
        for entry in others:
            if entry.directory != directory:
                self.remove(entry)
        return saved

    def discard(self, entry: Entry, why: str) -> None:
        """Remove a damaged entry, and say so."""
        self._report(f"The saved context {entry.directory.name[:12]} is ignored and removed: {why}.")
        self.remove(entry)

    def remove(self, entry: Entry) -> None:
        """Remove an entry: its manifest first, so that half of one is none."""
        with suppress(OSError):
            (entry.directory / _MANIFEST).unlink()
        shutil.rmtree(entry.directory, ignore_errors=True)

    def prune(self, max_bytes: int | None = None, *, keep: int = 0) -> list[Entry]:
        """Remove the entries used longest ago until `max_bytes` hold the rest and `keep` bytes more.

        Also what dead processes left half written. Returns the entries that were removed.
        """
        for path in self.root.glob(f"*/*{_PARTIAL}"):
            with _locked(path) as ours:
                if ours:
                    shutil.rmtree(path, ignore_errors=True)
        for path in self.root.glob("*/*"):
            if path.is_dir() and not path.name.endswith(_PARTIAL) and not (path / _MANIFEST).is_file():
                shutil.rmtree(path, ignore_errors=True)
        entries = self.entries()
        total = sum(entry.nbytes for entry in entries)
        limit = self.limit(total) if max_bytes is None else max_bytes
        removed = []
        while entries and total + keep > limit:
            entry = entries.pop()
            self.remove(entry)
            total -= entry.nbytes
            removed.append(entry)
        return removed

    def limit(self, total: int) -> int:
        """Bytes that the cache may take, of which `total` are taken now."""
        if self._max_bytes:
            return self._max_bytes
        return (self._free() + total) // _AUTOMATIC_SHARE

    def _free(self) -> int:
        place = next(path for path in (self.root, *self.root.parents) if path.exists())
        return shutil.disk_usage(place).free

    def _make_room(self, needed: int) -> None:
        self.prune(keep=needed)
        total = sum(entry.nbytes for entry in self.entries())
        limit, free = self.limit(total), self._free()
        if needed > limit - total:
            raise SnapshotError(f"it takes {_mb(needed)}, and the cache may hold {_mb(limit)}")
        if needed + _KEPT_FREE > free:
            raise SnapshotError(f"it takes {_mb(needed)}, and the disk has {_mb(free)} free")

    @contextmanager
    def _claim(self, directory: Path) -> Iterator[Path | None]:
        """A directory to write `directory` in; None if another process does, or has done by now."""
        partial = directory.with_name(directory.name + _PARTIAL)
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds what the user's files say
        partial.mkdir(parents=True, exist_ok=True)
        with _locked(partial) as ours:
            if not ours or (directory / _MANIFEST).is_file():
                yield None
                return
            try:
                for left in partial.iterdir():  # by a process that died
                    left.unlink()
                shutil.rmtree(directory, ignore_errors=True)  # half of an entry that was removed
                yield partial
            finally:
                shutil.rmtree(partial, ignore_errors=True)  # gone already if all went well

    def _read(self, directory: Path) -> Entry | None:
        """The entry in `directory`, None if there is none; a damaged manifest is reported and removed."""
        if directory.name.endswith(_PARTIAL):
            return None
        path = directory / _MANIFEST
        try:
            data, used = path.read_bytes(), path.stat().st_mtime
        except OSError:
            return None
        manifest = _decode(data)
        if manifest is None or manifest.tokens_digest != directory.name:
            self._report(
                f"The saved context {directory.name[:12]} is ignored and removed: its manifest is damaged."
            )
            shutil.rmtree(directory, ignore_errors=True)
            return None
        return Entry(directory, manifest, used)


@contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Lock a directory, if it still is the one of its name and no other process holds it."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(handle), os.stat(directory))  # noqa: PTH116
        except OSError:
            ours = False
        yield ours
    finally:
        os.close(handle)


def _encode(manifest: Manifest) -> bytes:
    body = json.dumps(asdict(manifest), sort_keys=True)
    return json.dumps({"manifest": asdict(manifest), "digest": _digest(body.encode())}, indent=1).encode()


def _decode(data: bytes) -> Manifest | None:
    try:
        outer = json.loads(data)
        body = json.dumps(outer["manifest"], sort_keys=True)
        if outer["digest"] != _digest(body.encode()):
            return None
        return Manifest(**outer["manifest"])
    except (ValueError, TypeError, LookupError, RecursionError):
        return None


def _digest(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def _file_digest(path: Path) -> str:
    """Faster than any disk: 6 GB/s on one core."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"
