"""The values that pass through the corpus stages: Source → Document → Chunk, or a Skip."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class SkipReason(str, Enum):
    """Why something that was seen is not in the corpus; the value is shown to people."""

    IGNORED = "ignored"  # by a .gitignore, .m3ignore, exclude file or --exclude
    NOT_INCLUDED = "not matched by --include"
    HIDDEN = "hidden"
    BINARY = "binary"
    UNDECODABLE = "undecodable"
    TOO_LARGE = "too large"
    GENERATED = "generated or minified"
    LOCK_FILE = "lock file"
    UNREADABLE = "unreadable"
    SPECIAL = "not a regular file"
    LINK = "link out of the tree or in a loop"
    EMPTY = "empty"
    ENCRYPTED = "encrypted"
    NO_TEXT = "without text"  # a document of pictures alone, such as a scan
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Skip:
    """A path that was seen and left out, with the reason; `detail` names the rule or the error."""

    path: str
    reason: SkipReason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Blob:
    """A file as a commit holds it.

    `top` is the work tree's root, absolute and without symbolic links, `path` is relative to it;
    `id` names the content to git, and `size` is its bytes.
    """

    top: bytes
    commit: str
    path: bytes
    id: str
    size: int


@dataclass(frozen=True, slots=True)
class Source:
    """Something to read: a file, a file of a commit (`blob`), or bytes that are already here (`data`).

    `path` is how the model and the user see it: relative, with `/`, printable, unique.
    `argument` says which of the paths that the user named brought it, counted from 0.
    `explicit` sources were named one by one by the user, so the rules that thin out a directory
    walk (ignored, hidden, generated, lock file, default size limit) do not apply to them.
    """

    path: str
    file: Path | None = None
    data: bytes | None = None
    explicit: bool = False
    blob: Blob | None = None
    argument: int = 0


@dataclass(frozen=True, slots=True)
class Document:
    """The decoded text of a source. Lines end at a line feed only, as in editors and git.

    Where lines were left out of the text (`--compress`, `--strip-comments`), `numbers` has for each line
    of it the line of the file that it is, counted from 1, or 0 for a line that only marks a gap. None
    says that the text is all of the file's lines.
    """

    path: str
    text: str
    encoding: str
    numbers: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of whole lines of a document; all chunks of a document joined give its text back.

    Lines are counted from 1, both ends included. A line that is longer than a chunk may be is
    cut, and its parts all carry its number. `digest` is of the text, not of the position.
    `numbers` are those of the document's lines that are in the chunk.
    """

    path: str
    start_line: int
    end_line: int
    text: str
    numbers: tuple[int, ...] | None = None

    @property
    def digest(self) -> str:
        """BLAKE2b of the text, 32 hexadecimal digits."""
        data = self.text.encode("utf-8", "surrogatepass")
        return hashlib.blake2b(data, digest_size=16).hexdigest()


def skip_counts(skips: Sequence[Skip]) -> dict[str, int]:
    """How many paths were left out for each reason, most frequent first."""
    counts: dict[str, int] = {}
    for skip in skips:
        counts[skip.reason.value] = counts.get(skip.reason.value, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
