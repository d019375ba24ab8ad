"""A place in an untrusted binary file, moved forwards through a window with every step checked."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from m3cli.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO, NoReturn

DOWNLOAD_AGAIN = "Download the file again."

# Far above every published model, low enough that a hostile file neither stalls nor fills memory.
_MAX_HEADER = 1 << 29
_MAX_NAME = 1 << 16
_MAX_STRING = 1 << 24
_MAX_STRINGS = 1 << 23
_WINDOW = 1 << 18


class Cursor:
    """Reads the `size` bytes of `file` forwards; what goes wrong is a ModelError that names `path`.

    The argument `what` says in words which thing is being read.
    """

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path = path
        self.size = size
        self._file = file
        self._window = b""
        self._at = 0  # in the window
        self._origin = 0  # of the window in the file

    @property
    def position(self) -> int:
        """Bytes from the start of the file."""
        return self._origin + self._at

    def fail(self, what: str, problem: str) -> NoReturn:
        """Raise the ModelError for a `what` at this place that has a `problem`."""
        raise ModelError(
            f"{self.path} is a broken GGUF file: {what}, at byte {self.position:,}, {problem}.",
            DOWNLOAD_AGAIN,
        )

    def peek(self, n: int) -> bytes:
        """Return up to `n` of the next bytes and stay here."""
        self._fill(n)
        return self._window[self._at : self._at + n]

    def take(self, n: int, what: str) -> bytes:
        """Read `n` bytes."""
        self._check(n, what)
        self._fill(n)
        start = self._at
        if len(self._window) - start < n:
            self.fail(what, "cannot be read: the file became shorter")
        self._at += n
        return self._window[start : self._at]

    def skip(self, n: int, what: str) -> None:
        """Move on by `n` bytes."""
        self._check(n, what)
        self._at += n
        if self._at > len(self._window):
            self._origin, self._at, self._window = self.position, 0, b""

    def scalar(self, code: str, what: str) -> int | float | bool:
        """Read one number of the struct code `code`, little-endian."""
        value: int | float | bool = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]
        return value

    def number(self, code: str, what: str, limit: int = 1 << 64) -> int:
        """Read one unsigned number that is at most `limit`."""
        value = int(self.scalar(code, what))
        if value > limit:
            self.fail(what, f"is {value:,}, which cannot be")
        return value

    def string(self, what: str, limit: int = _MAX_STRING) -> bytes:
        """Read a string: its length in 8 bytes, then its bytes."""
        return self.take(self.number("Q", f"the length of {what}", limit), what)

    def name(self, what: str) -> str:
        """Read a string that is a name, in UTF-8."""
        try:
            return self.string(what, _MAX_NAME).decode("utf-8")
        except UnicodeDecodeError:
            self.fail(what, "is not UTF-8")

    def skip_strings(self, count: int, what: str) -> None:
        """Walk over `count` strings; a long vocabulary is the larger part of a header's reading time."""
        if count > min(_MAX_STRINGS, (self.size - self.position) // 8):
            self.fail(what, f"is an array of {count:,} strings, which cannot be")
        length = struct.Struct("<Q").unpack_from
        left = count
        while left:
            self._fill(8)
            window, at, last = self._window, self._at, len(self._window) - 8
            while left and at <= last:
                at += 8 + length(window, at)[0]
                left -= 1
            self._at = min(at, len(window))
            self.skip(at - self._at, what)
            if left and last < 0:
                self.fail(what, f"ends with the file, {left:,} strings too early")

    def _check(self, n: int, what: str) -> None:
        left = self.size - self.position
        if n > left:
            self.fail(what, f"takes {n:,} bytes, and only {left:,} are left")
        if self.position + n > _MAX_HEADER:
            self.fail(what, f"takes {n:,} bytes, more than any real header")

    def _fill(self, n: int) -> None:
        """Have at least `n` bytes in the window, unless the file ends before."""
        if len(self._window) - self._at >= n:
            return
        self._origin, self._at = self.position, 0
        self._file.seek(self._origin)
        parts = []
        wanted = max(n, _WINDOW)
        while wanted > 0 and (part := self._file.read(wanted)):
            parts.append(part)
            wanted -= len(part)
        self._window = b"".join(parts)
