"""Every way in which m3 fails, and the exit code of each.

    M3Error                     70   something m3 did not foresee
    ├── UsageError               2   the command line contradicts itself or lacks something
    ├── ImpossibleError          3   cannot be done with these inputs, model or machine
    │   ├── CorpusError              a path that is missing, unreadable or holds no text
    │   ├── ModelError               a file that is no usable model
    │   ├── DoesNotFitError          the prompt is larger than the context it has to fit
    │   └── MachineError             not enough disk, a library that does not load
    │       └── OutOfMemoryError     what the model needs could not be allocated
    ├── EngineCrashError        70   the worker process died: native crash, out of memory, killed
    └── OutputClosedError        0   whoever read our output has gone, as `head` does: nothing is wrong

The other exit codes are not errors: 0 done, 1 findings or below the bar, 4 a time or token cap was
reached, 130 interrupted.

An error is two sentences: what happened and where, then what to do about it.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit codes of every m3 command."""

    DONE = 0
    FINDINGS = 1
    USAGE = 2
    IMPOSSIBLE = 3
    CAP_REACHED = 4
    INTERNAL = 70  # EX_SOFTWARE of sysexits.h: an internal error or a native crash
    INTERRUPTED = 130  # 128 + SIGINT, the shells' convention


class M3Error(Exception):
    """Base of all errors that m3 raises on purpose.

    `message` says what happened and where, `hint` what to do; both are whole sentences.
    """

    exit_code = ExitCode.INTERNAL

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class UsageError(M3Error):
    """The command line contradicts itself or lacks something."""

    exit_code = ExitCode.USAGE


class ImpossibleError(M3Error):
    """Cannot be done with these inputs, this model or this machine."""

    exit_code = ExitCode.IMPOSSIBLE


class CorpusError(ImpossibleError):
    """A path that is missing, cannot be read, or holds no text."""


class ModelError(ImpossibleError):
    """A file that is no usable model: broken, truncated, not GGUF, unknown architecture."""


class DoesNotFitError(ImpossibleError):
    """The prompt is larger than the context that it has to fit."""


class MachineError(ImpossibleError):
    """This machine lacks what is needed: memory, disk, a native library."""


class OutOfMemoryError(MachineError):
    """Weights, KV cache or compute buffers did not fit into memory."""


class EngineCrashError(M3Error):
    """The worker process that runs the model died."""

    exit_code = ExitCode.INTERNAL


class OutputClosedError(M3Error):
    """Whoever read our output has gone; nothing is wrong, and there is nothing left to do."""

    exit_code = ExitCode.DONE
