"""Results on their way to standard output or into a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from m3cli.errors import MachineError, OutputClosedError

if TYPE_CHECKING:
    from collections.abc import Iterable


def write_stdout(parts: Iterable[bytes]) -> None:
    """Write bytes to standard output, whatever its encoding. Raises OutputClosedError."""
    try:
        sys.stdout.flush()
        sys.stdout.buffer.writelines(parts)
        sys.stdout.buffer.flush()
    except BrokenPipeError as error:
        raise OutputClosedError("Standard output is closed.") from error


def write_json(value: object) -> None:
    """Write one JSON document in UTF-8 with a final newline; half surrogate pairs become `?`."""
    write_stdout([(json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode("utf-8", "replace")])


def write_file(path: Path, parts: Iterable[bytes]) -> None:
    """Replace the content of `path` by `parts` in one step: a full disk or a kill leaves the old file whole.

    Links are followed, modes stay, and what is no regular file (a pipe, /dev/null) is written into.
    Raises MachineError, naming the file.
    """
    temporary = None
    try:
        target = path.resolve()
        if target.exists() and not target.is_file():
            with target.open("wb") as file:
                file.writelines(parts)
            return
        mode = target.stat().st_mode & 0o7777 if target.exists() else 0o666 & ~_umask()
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}.")
        with os.fdopen(handle, "wb") as file:
            file.writelines(parts)
        Path(temporary).chmod(mode)
        Path(temporary).replace(target)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        words = error.strerror if isinstance(error, OSError) else str(error)
        raise MachineError(f"{path} cannot be written: {words}.", "Choose another place for it.") from error


def write_files(files: Iterable[tuple[Path, Iterable[bytes]]]) -> list[MachineError]:
    """Write each file as `write_file` does, whatever becomes of the others; what went wrong."""
    failures = []
    for path, parts in files:
        try:
            write_file(path, parts)
        except MachineError as error:
            failures.append(error)
    return failures


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def copy_text(text: str) -> None:
    """Put `text` on the clipboard. Raises MachineError where there is none."""
    import pyperclip

    try:
        pyperclip.copy(text)
    except (pyperclip.PyperclipException, OSError, subprocess.SubprocessError) as error:
        raise MachineError(
            "There is no clipboard that m3 can write to.",
            "Install wl-clipboard or xclip, or pipe standard output into a program that copies.",
        ) from error
