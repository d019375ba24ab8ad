"""The parent's handle on a worker process: start it, talk to it, say how it died, end it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import m3cli
from m3cli import errors
from m3cli.engine.worker import IGNORED, Message, frame, read_frame, write_frame
from m3cli.errors import EngineCrashError, M3Error, MachineError, OutOfMemoryError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

# The directory m3 is started in may be the very tree that is reviewed, and may hold a llama_cpp.py
# or a json.py. So the child begins isolated (-I: neither the current directory nor PYTHON* count),
# gets m3's own module path without the current directory, and finds m3cli by its location alone:
# a checkout that holds m3cli lends the worker that one package and nothing beside it.
_BOOTSTRAP = """\
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
root, sys.path[:] = sys.argv[1], sys.argv[2].split(sys.argv[3])
spec = PathFinder.find_spec("m3cli", [root])
sys.modules["m3cli"] = package = module_from_spec(spec)
spec.loader.exec_module(package)
from m3cli.engine.worker import main
main()
"""

_CLOSE_SECONDS = 1.0
_TAIL_BYTES = 16_384

# What a dying native library says last before its backtrace.
_LAST_WORDS = re.compile(r"GGML_ASSERT|GGML_ABORT|: fatal error|terminate called|what\(\)|: error: |Error: ")
# Some of them where memory was what lacked.
_LACKS_MEMORY = re.compile(
    r"bad_alloc|mem_buffer != NULL|failed to allocate|[Cc]annot allocate memory|MemoryError"
)


def worker_command() -> list[str]:
    """Build the command that starts a worker, without the arguments that the parent adds."""
    root = str(Path(m3cli.__file__).resolve().parent.parent)
    path = os.pathsep.join(_module_path())
    return [sys.executable, "-I", "-c", _BOOTSTRAP, root, path, os.pathsep]


def _module_path() -> list[str]:
    """m3's module path without relative entries and without the current directory."""
    try:
        here = Path.cwd().resolve()
    except OSError:  # it was deleted: nothing can be imported from it
        here = None
    return [entry for entry in sys.path if Path(entry).is_absolute() and Path(entry).resolve() != here]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have no names of their own
        return f"signal {number}"


class WorkerDiedError(Exception):
    """The worker ended without an answer. `signal_name` is empty when no signal killed it."""

    def __init__(self, returncode: int, last_words: str) -> None:
        super().__init__(returncode, last_words)
        self.returncode = returncode
        self.last_words = last_words
        self.signal_name = _signal_name(-returncode) if returncode < 0 else ""

    def crash(self, doing: str) -> EngineCrashError | OutOfMemoryError:
        """Make the error to show; `doing` is what the worker was at, e.g. `loading the model`."""
        if self.signal_name:
            how = f"was killed by {self.signal_name}"
        else:
            how = f"ended with exit code {self.returncode}"
        words = f": {self.last_words.rstrip('.')}" if self.last_words else ""
        lacks_memory = bool(_LACKS_MEMORY.search(self.last_words))
        if self.signal_name == "SIGKILL" or lacks_memory:
            hint = (
                "Most likely the machine ran out of memory: take a smaller --ctx, a smaller quant of the "
                "model or --kv-type q8_0, or close other programs."
            )
        elif self.signal_name == "SIGTERM":
            hint = "Something on this machine asked it to end; run the command again."
        else:
            hint = (
                "Run the command again; if it happens again, upgrade llama-cpp-python or report it with "
                "this message and the name of the model."
            )
        kind = OutOfMemoryError if lacks_memory else EngineCrashError
        return kind(f"The model process {how} while {doing}{words}.", hint)


class WorkerProcess:
    """One running worker. Ends with `close`, with its owner, and with this process at the latest."""

    def __init__(self, command: Sequence[str] | None = None) -> None:
        try:
            self._output = tempfile.TemporaryFile()  # noqa: SIM115 — closed by _end
        except OSError as error:
            raise MachineError(
                f"The model process needs a temporary file, which cannot be made: {error}.",
                "Make room, or point TMPDIR at a directory that can be written.",
            ) from error
        try:
            request_read, request_write = os.pipe()
            try:
                reply_read, reply_write = os.pipe()
            except OSError:
                os.close(request_read)
                os.close(request_write)
                raise
        except OSError as error:
            self._output.close()
            raise MachineError(
                f"The model process could not be started: {error}.",
                "Have fewer files open, or raise the limit.",
            ) from error
        # Linux would kill the worker with the thread that started it: right for the main thread only.
        die_with_parent = threading.current_thread() is threading.main_thread()
        self._requests = os.fdopen(request_write, "wb")
        self._replies = os.fdopen(reply_read, "rb")
        # What a terminal sends to the whole group waits until the worker has said that it ignores it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
        try:
            self._process = subprocess.Popen(
                [
                    *(command or worker_command()),
                    str(request_read),
                    str(reply_write),
                    str(int(die_with_parent)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                pass_fds=(request_read, reply_write),
                env={**os.environ, "GGML_NO_BACKTRACE": "1"},  # or an abort starts a debugger
            )
        except OSError as error:
            for stream in (self._requests, self._replies, self._output):
                stream.close()
            raise _not_started(error) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(request_read)
            os.close(reply_write)
        self._end = weakref.finalize(self, _end, self._process, self._requests, self._replies, self._output)

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def send(self, message: Message, payload: bytes = b"") -> None:
        """Send a request. Raises WorkerDiedError."""
        try:
            write_frame(self._requests, message, payload)
        except BrokenPipeError:
            raise self._death() from None

    def stop(self) -> None:
        """Ask for the end of the current generation; safe in a signal handler between `send` and the end."""
        with suppress(OSError):
            os.write(self._requests.fileno(), frame({"op": "stop"}))

    def receive(self) -> tuple[Message, bytes]:
        """Wait for the next reply. Raises WorkerDiedError, or the M3Error that the worker raised."""
        frame = read_frame(self._replies)
        if frame is None:
            raise self._death()
        message, payload = frame
        if "error" in message:
            kind = getattr(errors, message["error"], M3Error)
            raise kind(message["message"], message["hint"])
        return message, payload

    def _death(self) -> WorkerDiedError:
        return WorkerDiedError(self._process.wait(), self._last_words())

    def _last_words(self) -> str:
        size = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, size - _TAIL_BYTES))
        lines = [line.strip() for line in self._output.read().decode("utf-8", "replace").splitlines()]
        spoken = [line for line in lines if line]
        telling = [line for line in spoken if _LAST_WORDS.search(line)]
        return (telling or spoken or [""])[-1][:500]

    def close(self) -> None:
        """End the worker, gently at first; may be called twice."""
        if not self._end.alive:
            return
        with suppress(BrokenPipeError):
            self._requests.close()  # the worker ends at the end of its requests
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLOSE_SECONDS)
        self._end()

    def kill(self) -> None:
        """End the worker at once, whatever it is at; may be called twice."""
        self._end()


class WorkerClient:
    """Asks a worker one thing after another; starts it when it is needed. A context manager."""

    def __init__(self, doing: str, command: Sequence[str] | None = None) -> None:
        self._doing = doing  # for the error when it dies
        self._command = command
        self._worker: WorkerProcess | None = None

    def ask(self, message: Message, payload: bytes = b"") -> tuple[Message, bytes]:
        """One request and its reply. Raises EngineCrashError, or the M3Error that the worker raised."""
        if self._worker is None:
            self._worker = WorkerProcess(self._command)
        try:
            self._worker.send(message, payload)
            return self._worker.receive()
        except WorkerDiedError as death:
            self.close()
            raise death.crash(self._doing) from None
        except BaseException:
            self.close()  # an interrupted exchange would answer the next question
            raise

    def close(self) -> None:
        """End the worker; may be called twice. It starts again when needed."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _pipes() -> tuple[int, int, int, int]:
    """The ends of two pipes, those to read from first. Raises OSError, with nothing left open."""
    request_read, request_write = os.pipe()
    try:
        reply_read, reply_write = os.pipe()
    except OSError:
        os.close(request_read)
        os.close(request_write)
        raise
    return request_read, reply_read, request_write, reply_write


def _not_started(error: OSError) -> MachineError:
    return MachineError(
        f"The model process could not be started: {error}.",
        "Free some memory, processes or open files, and check that Python can be run.",
    )


def _end(process: subprocess.Popen[bytes], *streams: BinaryIO) -> None:
    process.kill()  # does nothing when it has ended
    process.wait()
    for stream in streams:
        with suppress(BrokenPipeError):
            stream.close()
