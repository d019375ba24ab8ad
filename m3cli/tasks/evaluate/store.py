"""What evaluations found, by model: outcomes, so that none is measured twice, and what follows from them.

A file of outcomes has one line of JSON each. It is written at its end only, a line at a time, so a killed
process loses at most the answer that it was at, and a line that is cut off is passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from m3cli.errors import MachineError
from m3cli.model.tokens import pack_ids
from m3cli.tasks.evaluate.results import Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from m3cli.engine.events import Attention, KVType
    from m3cli.tasks.evaluate.results import GroupResult, Mode, Score

_FORMAT = "v1"
_FIELDS = {field.name for field in fields(Outcome)}


@dataclass(frozen=True, slots=True)
class Variant:
    """How a model was run, as far as that changes what it answers. `digest` is that of the model file."""

    digest: str
    type_k: KVType
    type_v: KVType
    attention: Attention

    def file(self, state_dir: Path, name: str) -> Path:
        """A file of what is known of it."""
        return (
            state_dir
            / "eval"
            / _FORMAT
            / self.digest
            / f"{self.type_k}-{self.type_v}-{self.attention}.{name}"
        )


def outcome_key(mode: Mode, tokens: Sequence[int], max_tokens: int, more: str = "") -> str:
    """What an outcome depends on beside the variant: the prompt, the mode, how long a reply may be."""
    digest = hashlib.blake2b(f"{mode} {max_tokens} {more}\n".encode(), digest_size=16)
    digest.update(pack_ids(tokens))
    return digest.hexdigest()


class Outcomes:
    """Outcomes of a variant by key. Raises MachineError, naming the file, where they cannot be kept."""

    def __init__(self, state_dir: Path, variant: Variant) -> None:
        self._path = variant.file(state_dir, "jsonl")
        self._known = dict(_read_lines(self._path))

    def get(self, key: str) -> Outcome | None:
        """The outcome that was measured earlier, if it was."""
        return self._known.get(key)

    def add(self, key: str, outcome: Outcome) -> None:
        """Keep an outcome."""
        self._known[key] = outcome
        line = json.dumps({"key": key, **asdict(outcome)}, ensure_ascii=False).encode("utf-8", "replace")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                ended = _ends_a_line(handle)
                os.write(handle, (b"" if ended else b"\n") + line + b"\n")
            finally:
                os.close(handle)
        except OSError as error:
            raise MachineError(
                f"The results cannot be kept in {self._path}: {error.strerror}.",
                "Make room, or name another directory with M3_CACHE_DIR.",
            ) from error


def _ends_a_line(handle: int) -> bool:
    """Whether the file is empty or its last line complete: a process may have died in the middle of it."""
    size = os.fstat(handle).st_size
    return size == 0 or os.pread(handle, 1, size - 1) == b"\n"


def _read_lines(path: Path) -> list[tuple[str, Outcome]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            values = json.loads(line)
            key = values.pop("key")
            if isinstance(key, str) and values.keys() == _FIELDS:
                found.append((key, Outcome(**values)))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            continue
    return found


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a variant: scores of its groups by length, and those of modes on the same questions.

    Values are those of `m3cli.tasks.evaluate.results` in plain form.
    """

    groups: dict[str, dict[str, Any]]
    modes: dict[str, dict[str, Any]]


def remember(
    state_dir: Path, variant: Variant, groups: Sequence[GroupResult], modes: dict[Mode, Score]
) -> None:
    """Keep results; those of other groups and modes stay. Raises MachineError."""
    path = variant.file(state_dir, "json")
    known = recall(state_dir, variant) or Known({}, {})
    for result in groups:
        known.groups[result.group] = {
            "relative": asdict(result.relative),
            "absolute": asdict(result.absolute),
            "longest": max(result.scores),
            "scores": {str(length): asdict(score) for length, score in result.scores.items()},
        }
    if len(modes) > 1:  # a score says something beside those of others, on the same questions
        known.modes.clear()
        known.modes.update({mode: asdict(score) for mode, score in modes.items()})
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary.write_text(json.dumps(asdict(known), indent=1))
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise MachineError(
            f"The results cannot be kept in {path}: {error.strerror}.",
            "Make room, or name another directory with M3_CACHE_DIR.",
        ) from error


def recall(state_dir: Path, variant: Variant) -> Known | None:
    """What is known; None if nothing is, or the file is damaged."""
    try:
        values = json.loads(variant.file(state_dir, "json").read_bytes())
        known = Known(values["groups"], values["modes"])
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None
    return known if isinstance(known.groups, dict) and isinstance(known.modes, dict) else None
