"""What evaluations found, by model: outcomes, so that none is measured twice, and what follows from them.

A file of outcomes has one line of JSON each. It is written at its end only, a line at a time, so a killed
process loses at most the answer that it was at, and a line that is cut off is passed over.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from m3cli.errors import MachineError
from m3cli.model.tokens import pack_ids
from m3cli.tasks.evaluate.difference import Difference
from m3cli.tasks.evaluate.results import Outcome, Score

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from m3cli.engine.events import Attention, KVType
    from m3cli.tasks.evaluate.results import GroupResult, Mode

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
    """What an outcome depends on beside the variant: the prompt, the mode, how long a reply may be, `more`.

    And the build of llama.cpp.
    """
    build = version("llama-cpp-python")
    digest = hashlib.blake2b(f"{build} {mode} {max_tokens} {more}\n".encode(), digest_size=16)
    digest.update(pack_ids(tokens))
    return digest.hexdigest()


class Outcomes:
    """Outcomes of a variant by key. Raises MachineError, naming the file, where they cannot be kept."""

    def __init__(self, state_dir: Path, variant: Variant) -> None:
        self._path = variant.file(state_dir, "jsonl")
        self._append(b"")
        self._known = dict(_read_lines(self._path))

    def get(self, key: str) -> Outcome | None:
        """The outcome that was measured earlier, if it was."""
        return self._known.get(key)

    def add(self, key: str, outcome: Outcome) -> None:
        """Keep an outcome."""
        self._known[key] = outcome
        line = json.dumps({"key": key, **asdict(outcome)}, ensure_ascii=False).encode("utf-8", "replace")
        self._append(line + b"\n")

    def _append(self, data: bytes) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                data = data if _ends_a_line(handle) else b"\n" + data
                if os.write(handle, data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(handle)
        except OSError as error:
            raise _not_kept(self._path, error) from error


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
                found.append((key, Outcome(**{**values, "answers": tuple(values["answers"])})))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            continue
    return found


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a variant: scores of its groups by length, and what modes gain over a selection."""

    scores: dict[str, dict[int, Score]]
    gains: dict[str, Difference]


def remember(
    state_dir: Path, variant: Variant, groups: Sequence[GroupResult], gains: dict[str, Difference]
) -> None:
    """Keep results, beside those of other groups, lengths and modes. Raises MachineError.

    Of a length that was measured before, the score of more questions stays.
    """
    path = variant.file(state_dir, "json")
    known = recall(state_dir, variant)
    for result in groups:
        scores = known.scores.setdefault(result.group, {})
        for length, score in result.scores.items():
            if length not in scores or score.count >= scores[length].count:
                scores[length] = score
    known.gains.update(gains)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary.write_text(json.dumps(asdict(known), indent=1))
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _not_kept(path, error) from error


def recall(state_dir: Path, variant: Variant) -> Known:
    """What is known; nothing if the file is damaged."""
    try:
        values = json.loads(variant.file(state_dir, "json").read_bytes())
        return Known(
            {
                str(group): {int(length): Score(**score) for length, score in _by_length(scores)}
                for group, scores in values["scores"].items()
            },
            {str(mode): Difference(**gain) for mode, gain in values["gains"].items()},
        )
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return Known({}, {})


def _by_length(scores: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The scores of a group, by rising length."""
    return sorted(scores.items(), key=lambda item: int(item[0]))


def _not_kept(path: Path, error: OSError) -> MachineError:
    return MachineError(
        f"The results cannot be kept in {path}: {error.strerror}.",
        "Make room, or name another directory with M3_CACHE_DIR.",
    )
