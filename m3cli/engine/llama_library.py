"""llama_cpp itself, which only the llama modules of the engine use: the library, its log, what this build is.

Only the low-level bindings are used. llama.cpp's log goes to a short memory of its last
warnings, from which the errors quote; nothing is printed.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections import deque
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3cli.errors import MachineError

try:
    import llama_cpp._ggml
    import llama_cpp.llama_cpp
except (ImportError, OSError, RuntimeError, AttributeError) as error:
    raise MachineError(
        f"The library llama-cpp-python cannot be loaded: {str(error).strip().rstrip('.')}.",
        "Reinstall it with 'pip install --force-reinstall --no-cache-dir llama-cpp-python'; building it "
        "needs a C++ compiler.",
    ) from error

lib: Any = llama_cpp.llama_cpp  # the low-level bindings; llama_cpp.Llama is not used
libggml: Any = llama_cpp._ggml.libggml  # what the bindings leave out; see m3cli.engine.devices

if TYPE_CHECKING:
    from collections.abc import Iterator

_WARNING, _ERROR, _CONTINUED = 3, 4, 5  # enum ggml_log_level of ggml.h


class Log:
    """The last warnings and errors that llama.cpp logged; its chatter would push them out."""

    def __init__(self, lines: int = 200) -> None:
        self._lines: deque[tuple[int, str]] = deque(maxlen=lines)
        self._kept = False  # whether the line that may be continued is one of ours
        self.everything: list[str] | None = None  # all that is said, for whoever listens
        self._callback = lib.llama_log_callback(self._add)  # ctypes keeps no reference to it
        lib.llama_log_set(self._callback, ctypes.c_void_p(None))

    def _add(self, level: int, text: bytes, _user_data: object) -> None:
        line = text.decode("utf-8", "replace")
        if self.everything is not None:
            self.everything.append(line)
        if level != _CONTINUED:
            self._kept = level in (_WARNING, _ERROR)
            if self._kept:
                self._lines.append((level, line))
        elif self._kept and self._lines:
            level, begun = self._lines.pop()
            self._lines.append((level, begun + line))

    def clear(self) -> None:
        """Forget all."""
        self._lines.clear()

    def __contains__(self, words: str) -> bool:
        return any(words in line for _, line in self._lines)

    def reason(self, otherwise: str) -> str:
        """Say what went wrong in llama.cpp's words, without its function names and the full stop."""
        errors = [re.sub(r"^\w+: ", "", line.strip()) for level, line in self._lines if level == _ERROR]
        for line in errors:
            words = line.partition("error loading model: ")[2].rstrip(".")
            if words and "failed to load model from" not in words:
                return words
        return errors[0].rstrip(".") if errors else otherwise


LOG = Log()
lib.llama_backend_init()


@contextmanager
def logged() -> Iterator[list[str]]:
    """Collect all that llama.cpp logs meanwhile, down to the level that is meant for debugging."""
    lines: list[str] = []
    outer, LOG.everything = LOG.everything, lines
    try:
        yield lines
    finally:
        LOG.everything = outer
        if outer is not None:
            outer += lines


def version() -> str:
    """Version of the bindings and of the llama.cpp in them."""
    return f"llama-cpp-python {llama_cpp.__version__} (llama.cpp {lib.llama_version().decode()})"


def build() -> str:
    """What decides the last digits of this build's results: its version and the instructions that it uses."""
    return f"{version()} {lib.llama_print_system_info().decode('utf-8', 'replace')}"


def physical_cores() -> int:
    """Cores that this process may run on, hyper-threads counted once."""
    try:
        allowed = os.sched_getaffinity(0)
        siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
        return len({Path(siblings.format(cpu)).read_text(encoding="ascii") for cpu in allowed})
    except (AttributeError, OSError):
        return os.cpu_count() or 1
