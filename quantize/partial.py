"""Files that are written for hours: in a directory of their own until all are complete.

`OUT.partial/` holds the files under their final names and a journal of how much of them is known to
be on the disk. A killed process loses what came after the last entry of the journal. When the last
byte is written, the files move to where they belong, the first one last, so that a name that can
be opened means a model that is whole.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from m3cli.errors import MachineError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from quantize.events import OutputFile

_JOURNAL, _NEW_JOURNAL = "journal.json", "journal.new"
_SYNC_BYTES = 256 << 20


class Source(NamedTuple):
    """A file that goes in: what tells it from a changed one, and the first byte that is made of it."""

    identity: str
    first: int


class PartialFiles:
    """Writes `files` beside `out`, one after the other, each from its beginning to its end.

    `what` they are the result of, and how to `go_on` with it, is for messages. `fingerprint` stands for
    everything that the bytes depend on but the contents of the `sources`; unfinished files with another one
    are not gone on with. Of a source that has changed since, everything is written again from the first
    byte on that came from it.
    `done` counts the bytes of all files that are written, in the order of `files`; after a resumption it is
    more than 0. A context manager: leaving it keeps what was written. Raises UsageError when the files
    exist, when there are unfinished ones and `resume` is off, when they were of something else, and when
    another process is at it; MachineError when the disk is too full or does not let itself be written.
    """

    def __init__(
        self,
        out: Path,
        files: Sequence[OutputFile],
        fingerprint: str,
        sources: Mapping[str, Source] | None = None,
        *,
        resume: bool = False,
        what: str = "conversion",
        go_on: str = "continue with --resume",
    ) -> None:
        self._what, self._go_on = what, go_on
        self.directory = out.with_name(out.name + ".partial")
        self.total = sum(file.nbytes for file in files)
        self.done = 0
        self._files = files
        self._fingerprint = fingerprint
        self._sources = sources or {}
        self._file: BinaryIO | None = None
        self._unsynced = 0
        self._lock = -1
        try:
            with self._writing():
                self._begin(out, resume=resume)
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> PartialFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._writing():
            if self._file is not None and kind is not None and not isinstance(error, MachineError):
                self.sync()  # an interrupt loses nothing
            self._close()

    def append(self, data: bytes | memoryview) -> None:
        """Write `data` behind what is there; it has to end within one file."""
        with self._writing():
            if self._file is None:
                self._file = self._open()
            self._file.write(data)
            self.done += len(data)
            self._unsynced += len(data)
            ends = self.done in self._ends()
            if ends or self._unsynced >= _SYNC_BYTES:
                self.sync()
            if ends:
                self._file.close()
                self._file = None

    def sync(self) -> None:
        """Bring what was written to the disk, then say so in the journal."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._write_journal()
        self._unsynced = 0

    def publish(self) -> list[Path]:
        """Give the complete files their final names, and return these."""
        with self._writing():
            for file in reversed(self._files):
                path, target = self.directory / file.name, self._target(file)
                if path.exists():  # else a run that was killed just here did it
                    self._refuse_existing(target)
                    path.rename(target)
            _sync_directory(self.directory.parent)
            self._close()
            for name in (_JOURNAL, _NEW_JOURNAL):
                (self.directory / name).unlink(missing_ok=True)
            self.directory.rmdir()
        return [self._target(file) for file in self._files]

    def _begin(self, out: Path, *, resume: bool) -> None:
        # 1. Refuse what would lose something.
        unfinished = os.path.lexists(self.directory)
        if unfinished:
            if self.directory.is_symlink() or not self.directory.is_dir():
                raise UsageError(
                    f"{self.directory} is in the way: an unfinished {self._what} would be a directory.",
                    "Remove or rename it.",
                )
            self._take_lock()
            self._read_journal(resume=resume)
        for file in self._files:
            if self.done < self.total or (self.directory / file.name).exists():
                self._refuse_existing(self._target(file))
        # 2. Go on where the journal ends, if the disk has room for the rest.
        for file, kept in self._kept():
            path = self.directory / file.name
            if path.exists():
                os.truncate(path, kept)
        needed, free = self.total - self.done, shutil.disk_usage(out.parent).free
        if free < needed:
            raise MachineError(
                f"The {self._what} needs {needed / 1e9:,.2f} GB more in {out.parent}, which has "
                f"{free / 1e9:,.2f} GB free.",
                "Free some space, name another place with --out, or make a smaller model.",
            )
        if not unfinished:
            self.directory.mkdir()
            self._take_lock()
        self._write_journal()

    def _refuse_existing(self, target: Path) -> None:
        if os.path.lexists(target):
            raise UsageError(f"{target} already exists.", "Delete it, or name another file with --out.")

    def _target(self, file: OutputFile) -> Path:
        return self.directory.parent / file.name

    def _ends(self) -> list[int]:
        """`done` after each file."""
        ends = [0]
        for file in self._files:
            ends.append(ends[-1] + file.nbytes)
        return ends[1:]

    def _kept(self) -> Iterator[tuple[OutputFile, int]]:
        """How many bytes of each file the journal vouches for."""
        for file, end in zip(self._files, self._ends(), strict=True):
            yield file, min(max(self.done - (end - file.nbytes), 0), file.nbytes)

    def _open(self) -> BinaryIO:
        file = next(file for file, end in zip(self._files, self._ends(), strict=True) if self.done < end)
        return (self.directory / file.name).open("ab")

    def _take_lock(self) -> None:
        self._lock = os.open(self.directory, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._close()
            raise UsageError(
                f"Another process is writing {self.directory}.",
                "Wait for it, or name another file with --out.",
            ) from error

    def _read_journal(self, *, resume: bool) -> None:
        path = self.directory / _JOURNAL
        restart = f"Delete {self.directory} to start anew."
        try:
            journal = json.loads(path.read_bytes())
            fingerprint, done = str(journal["fingerprint"]), int(journal["done"])
            sources = dict(journal["sources"])
        except FileNotFoundError as error:
            if any(entry.name != _NEW_JOURNAL for entry in self.directory.iterdir()):
                raise UsageError(
                    f"{self.directory} is no unfinished {self._what}: it holds no {_JOURNAL}.",
                    "Remove or rename it.",
                ) from error
            return  # killed before the first entry
        except (ValueError, TypeError, LookupError) as error:
            raise UsageError(f"{path} is no journal of an unfinished {self._what}.", restart) from error
        if fingerprint != self._fingerprint:
            raise UsageError(
                f"The unfinished {self._what} in {self.directory} is of another model, or was begun with "
                "other options or another version.",
                f"Use the options that it was begun with. {restart}",
            )
        if not resume:
            raise UsageError(
                f"There is an unfinished {self._what} in {self.directory}, {done / self.total:.0%} of it "
                "done.",
                f"Continue it with --resume. {restart}",
            )
        self.done = done
        for file, kept in self._kept():
            here = self.directory / file.name
            if done == self.total and not here.exists():
                here = self._target(file)
            if kept and (not here.exists() or here.stat().st_size < kept):
                self.done = 0
                raise UsageError(
                    f"{here} is shorter than the journal beside it says, so it was changed or damaged.",
                    restart,
                )
        if done < self.total:
            changed = [s.first for name, s in self._sources.items() if sources.get(name) != s.identity]
            self.done = min([done, *changed])

    def _write_journal(self) -> None:
        path = self.directory / _JOURNAL
        temporary = self.directory / _NEW_JOURNAL
        journal = {
            "fingerprint": self._fingerprint,
            "done": self.done,
            "sources": {name: source.identity for name, source in self._sources.items()},
        }
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(journal, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._close()
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            raise MachineError(
                f"{self.directory} cannot be written: {error.strerror or error}.",
                f"{'Free some space' if full else 'Check the path, its permissions and its disk'}, then "
                f"{self._go_on}: what was on the disk is kept.",
            ) from error

    def _close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # what it could not write is written again on resumption
                self._file.close()
            self._file = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not every file system knows how
            os.fsync(handle)
    finally:
        os.close(handle)
