"""What goes into a conversion and what it streams out: `Planned Progress+ Converted`.

Kept apart from what converts, so that a renderer does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pathlib import Path

OutType = Literal["bf16", "f16", "f32", "q8_0"]


@dataclass(frozen=True, slots=True)
class ConvertRequest:
    """What to convert, into which file. `split_max_bytes` 0 makes one file.

    A larger model becomes `OUT-0000I-of-0000N.gguf`, each of at most so many bytes of tensors, unless
    one tensor alone has more.
    """

    source: Path
    out: Path
    type: OutType = "bf16"
    split_max_bytes: int = 0
    resume: bool = False


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file to be made; `nbytes` is what it will have."""

    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Planned:
    """What will be written; nothing is yet. Sizes are in bytes.

    `tensors` has (type, count, bytes) for each type, `skipped` the number of the checkpoint's tensors
    by the reason why the text model does not need them, `license` what the file will state,
    `free_bytes` what the disk has left now.
    """

    files: tuple[OutputFile, ...]
    source_bytes: int
    parameters: int
    tensors: tuple[tuple[str, int, int], ...]
    skipped: dict[str, int]
    license: str | None
    free_bytes: int
    notes: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` bytes are written; `resumed` of them by an earlier run."""

    done: int
    total: int
    resumed: int
    tensor: str


@dataclass(frozen=True, slots=True)
class Converted:
    """The model is complete in `files`, the first of which is the one to name; `seconds` of this run."""

    files: tuple[Path, ...]
    seconds: float


ConvertEvent = Planned | Progress | Converted
