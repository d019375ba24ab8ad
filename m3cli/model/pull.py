"""Download a published model: resumed after whatever broke it, and kept only with the right checksum.

huggingface_hub's own downloader deletes what a process leaves unfinished and compares no checksums, which
100 GB over a home connection need; so the bytes are fetched here, into the library's cache layout.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from m3cli.errors import MachineError, ModelError
from m3cli.model import preflight
from m3cli.model.header import read_header
from m3cli.model.hub import ATTEMPTS, OtherFileError, TransientError, gave_up, pause
from m3cli.model.shape import ModelShape

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from typing import BinaryIO

    from m3cli.model.header import Header
    from m3cli.model.hub import Quant, RemoteFile, Repository

_CHUNK = 1 << 20
# Bytes of the first request for a header: a vocabulary of 200,000 tokens takes about 8 MB in the first
# shard; later shards have none. What is still no header at the limit is broken.
_FIRST_HEADER, _LATER_HEADER, _MOST_HEADER = 1 << 20, 1 << 16, 1 << 26


@dataclass(frozen=True, slots=True)
class Transferred:
    """`done` bytes of the file `name` are there; `received` of them over the network in this run."""

    name: str
    done: int
    received: int


@dataclass(frozen=True, slots=True)
class Trouble:
    """Something went wrong and is tried again; `sentence` says what."""

    sentence: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What a quant's header says, read before its weights are: `problem` is why it cannot be run."""

    license: str | None
    problem: str


class Target:
    """Where the files of a repository go: into the hub's cache, or into `directory`, named as published."""

    def __init__(self, repository: Repository, directory: Path | None = None) -> None:
        self._directory = directory
        self._repository = repository
        if directory is None:
            from huggingface_hub import constants

            root = Path(constants.HF_HUB_CACHE).expanduser()
            self._storage = root / f"models--{repository.name.replace('/', '--')}"
            self.root = self._storage / "snapshots" / repository.commit
        else:
            self.root = directory

    def path(self, file: RemoteFile) -> Path:
        """The path by which a file is used."""
        return self.root / file.name

    def part(self, file: RemoteFile) -> Path:
        """Where the bytes of an unfinished download are."""
        if self._directory is None:
            return self._storage / "blobs" / f"{file.digest}.m3.incomplete"
        return self.path(file).with_name(f"{self.path(file).name}.part")

    def finished(self, file: RemoteFile) -> Path | None:
        """The file that is there already with the right size; its content was not looked at."""
        for path in (self._blob(file), self.path(file)):
            if path.is_file() and path.stat().st_size == file.nbytes:
                return path
        return None

    def missing(self, quant: Quant) -> int:
        """Bytes that are still to be downloaded."""
        return sum(file.nbytes - self._there(file) for file in quant.files)

    def free(self) -> int:
        """Bytes free on the disk that the files go to."""
        place = self.root
        while not place.exists() and place != place.parent:
            place = place.parent
        return shutil.disk_usage(place).free

    def place(self, file: RemoteFile, source: Path) -> None:
        """Give the verified file `source` its place, in one step."""
        path, blob = self.path(file), self._blob(file)
        if source != path:
            blob.parent.mkdir(parents=True, exist_ok=True)
            source.replace(blob)
        if blob == path or source == path:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        link = path.with_name(f".{file.digest}.{os.getpid()}.link")
        try:
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(blob, path.parent))
            link.replace(path)
        except OSError:  # a file system without links, as on many removable disks
            blob.replace(path)

    def finish(self) -> None:
        """Have the hub's tools find the commit by the name that was asked for."""
        revision, commit = self._repository.revision, self._repository.commit
        if self._directory is None and revision != commit:
            ref = self._storage / "refs" / revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(commit, encoding="ascii")

    def _blob(self, file: RemoteFile) -> Path:
        return self._storage / "blobs" / file.digest if self._directory is None else self.path(file)

    def _there(self, file: RemoteFile) -> int:
        if self.finished(file):
            return file.nbytes
        part = self.part(file)
        return min(part.stat().st_size, file.nbytes) if part.is_file() else 0


def check_space(target: Target, quant: Quant) -> None:
    """Raise MachineError unless the disk has room for what is missing, 1 % and 16 MiB."""
    missing, free = target.missing(quant), target.free()
    needed = missing + missing // 100 + (1 << 24) if missing else 0
    if needed > free:
        raise MachineError(
            f"The disk of {target.root} has {free / 1e9:,.1f} GB free; {quant.name} needs "
            f"{needed / 1e9:,.1f} GB more.",
            "Make room, choose a smaller quant with --quant, or another disk with --dir.",
        )


def remote_facts(repository: Repository, quant: Quant) -> Facts:
    """Read the headers of a quant's files over the network, and none of their weights.

    They are put at the front of files that are otherwise holes, as long as the real ones, for
    m3cli.model.header to read: some MB for the first shard, some 100 kB for another. A header that is
    broken is a `problem`; errors of the connection are raised. MachineError without room for holes.
    """
    try:
        return _read_facts(repository, quant)
    except OtherFileError as error:
        return Facts(None, error.message)
    except OSError as error:
        raise MachineError(
            f"The headers of {quant.name} cannot be kept in {tempfile.gettempdir()}: {error.strerror}.",
            "Set TMPDIR to a directory on a disk that takes sparse files of this size.",
        ) from error


def _read_facts(repository: Repository, quant: Quant) -> Facts:
    with tempfile.TemporaryDirectory(prefix="m3-") as directory:
        paths = [Path(directory) / Path(file.name).name for file in quant.files]
        sizes = [0] * len(paths)
        wanted = [_FIRST_HEADER, *[_LATER_HEADER] * (len(paths) - 1)]
        while True:
            for number, (path, file) in enumerate(zip(paths, quant.files, strict=True)):
                if (end := min(wanted[number], file.nbytes)) > sizes[number]:
                    if not _front(repository, file, path, sizes[number], end):
                        return Facts(None, f"{file.name} is not a GGUF file.")
                    sizes[number] = end
            try:
                header = read_header(paths[0])
                short = _short(header, sizes)
                if not short:
                    shape = ModelShape.from_header(header)
                    found = preflight.problem(header, shape)
                    return Facts(shape.license, _without(directory, found.message) if found else "")
            except ModelError as error:
                # A hole was read, or the file is broken: more bytes tell.
                short = [i for i, file in enumerate(quant.files) if sizes[i] < min(file.nbytes, _MOST_HEADER)]
                if not short:
                    return Facts(None, _without(directory, error.message))
            for number in short:
                wanted[number] *= 4


def _short(header: Header, sizes: list[int]) -> list[int]:
    """Numbers of the files whose header may reach into the hole: tensor data starts behind what was read."""
    starts = [size + 1 for size in sizes]
    for tensor in header.tensors:
        starts[tensor.file] = min(starts[tensor.file], tensor.offset)
    files = zip(header.files, starts, sizes, strict=True)
    return [
        i
        for i, (path, start, size) in enumerate(files)
        if start > size < min(path.stat().st_size, _MOST_HEADER)
    ]


def _without(directory: str, message: str) -> str:
    return message.replace(f"{directory}/", "")


def _front(repository: Repository, file: RemoteFile, path: Path, start: int, end: int) -> bool:
    """Have the bytes up to `end` in `path`, which is as long as `file`; False if they are no GGUF file's."""
    failures = 0
    with path.open("r+b" if start else "wb") as out:
        out.truncate(file.nbytes)
        while True:
            try:
                out.seek(start)
                for chunk in repository.read(file, start, end):
                    if not chunk and start:  # no ranges: from the start again
                        start = out.seek(0)
                    if chunk and not start and chunk[:4] != b"GGUF":
                        return False
                    out.write(chunk)
                    start += len(chunk)
                return True
            except TransientError as error:
                failures += 1
                if failures == ATTEMPTS:
                    raise gave_up(f"The header of {file.name}", error) from error
                repository.wait(pause(failures, error))


def download(repository: Repository, quant: Quant, target: Target) -> Iterator[Transferred | Trouble]:
    """Fetch and verify all files of a quant; what is there already is verified and kept.

    Raises MachineError for a full disk, a connection that stays broken or another process at the same
    file, ModelError for content that is wrong twice, with the bytes deleted. After any other end, Ctrl-C
    and kill -9 too, the next call goes on where this one was.
    """
    try:
        for file in quant.files:
            source = target.finished(file)
            if source is not None and (yield from _verify(file, source)):
                target.place(file, source)
                continue
            if source is not None:
                yield Trouble(f"{file.name} is there with a wrong checksum, and is downloaded again")
            part = target.part(file)
            part.parent.mkdir(parents=True, exist_ok=True)
            with _locked(part) as out:
                try:
                    yield from _fetch(repository, file, out)
                except ModelError:
                    if not part.stat().st_size:
                        part.unlink()
                    raise
                target.place(file, part)
        target.finish()
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise MachineError(
            f"{error.filename or target.root} cannot be written: {error.strerror}.",
            "Make room and run the same command again: it goes on from here."
            if full
            else "Choose another place with --dir.",
        ) from error


def _verify(file: RemoteFile, path: Path) -> Generator[Transferred, None, bool]:
    """Read a file and return whether its checksum is right."""
    hasher, done = file.hasher(), 0
    with path.open("rb") as source:
        while chunk := source.read(_CHUNK):
            hasher.update(chunk)
            done += len(chunk)
            yield Transferred(file.name, done, 0)
    return bool(hasher.hexdigest() == file.digest)


@contextmanager
def _locked(part: Path) -> Iterator[BinaryIO]:
    """Open a part for reading and writing, for this process alone."""
    while True:
        with part.open("a+b") as opened:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise MachineError(
                    f"Another process is downloading {part}.", "Wait until it is done."
                ) from error
            # The process that had it may have finished in between, and moved it.
            if part.exists() and os.path.samestat(part.stat(), os.fstat(opened.fileno())):
                with part.open("r+b", buffering=0) as out:
                    yield out
                return


def _fetch(repository: Repository, file: RemoteFile, out: BinaryIO) -> Iterator[Transferred | Trouble]:
    """Complete the part `out` and compare its checksum; a wrong one is fetched anew once."""
    received = 0
    for attempt in (1, 2):
        # 1. what an earlier run has left
        hasher = file.hasher()
        out.seek(0)
        done = 0
        while done < file.nbytes and (chunk := out.read(min(_CHUNK, file.nbytes - done))):
            hasher.update(chunk)
            done += len(chunk)
            yield Transferred(file.name, done, received)
        out.truncate(done)
        # 2. the rest
        failures, furthest, wrong = 0, done, ""
        while done < file.nbytes and not wrong:
            try:
                for chunk in repository.read(file, done, file.nbytes):
                    if not chunk and done:
                        yield Trouble(f"the server cannot resume {file.name}, which starts over")
                    if not chunk:
                        hasher, done = file.hasher(), 0
                        out.seek(0)
                        out.truncate()
                        continue
                    if not done and chunk[:4] != b"GGUF":
                        wrong = f"is not a GGUF file{_looks_like(chunk)}"
                        break
                    _write(out, chunk)
                    hasher.update(chunk)
                    done += len(chunk)
                    received += len(chunk)
                    if done > furthest:
                        furthest, failures = done, 0
                    yield Transferred(file.name, done, received)
            except TransientError as error:
                failures += 1
                if failures == ATTEMPTS:
                    raise gave_up(file.name, error) from error
                seconds = pause(failures, error)
                yield Trouble(f"{error.message}; trying again in {seconds:.0f} s")
                repository.wait(seconds)
        # 3. the verdict
        if not wrong and hasher.hexdigest() == file.digest:
            os.fsync(out.fileno())
            return
        wrong = wrong or "has a wrong checksum"
        out.seek(0)
        out.truncate()
        if attempt == 1:
            yield Trouble(f"{file.name} {wrong}, and is downloaded again")
    raise ModelError(
        f"{file.name} of {repository.name} was downloaded twice, and both times it {wrong}.",
        "What was downloaded is deleted; try again later, or choose another repository.",
    )


def _write(out: BinaryIO, chunk: bytes) -> None:
    """Write all of `chunk` to an unbuffered file, whose own write may take a part of it."""
    view = memoryview(chunk)
    while view:
        view = view[out.write(view) :]


def _looks_like(chunk: bytes) -> str:
    page = chunk.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml"))
    return ": it looks like a web page" if page else ""


def checked_header(target: Target, quant: Quant) -> tuple[Header, ModelShape]:
    """Read the header of the files on the disk. Raises ModelError if they cannot be run."""
    header = read_header(target.path(quant.files[0]))
    shape = ModelShape.from_header(header)
    if found := preflight.problem(header, shape):
        raise found
    return header, shape
