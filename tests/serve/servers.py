"""Running `m3 serve` as a process of its own, which never outlives the test."""

from __future__ import annotations

import os
import signal
import subprocess
import sysconfig
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

M3 = str(Path(sysconfig.get_path("scripts")) / "m3")
DEADLINE = 120.0  # seconds; only to fail rather than hang
Found = TypeVar("Found")


def poll(condition: Callable[[], Found]) -> Found:
    """What `condition` gives as soon as that is true; fails at the deadline."""
    deadline = time.monotonic() + DEADLINE
    while not (found := condition()):
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)
    return found


def environ_of(home: Path) -> dict[str, str]:
    """An environment without the developer's settings, with a cache of its own in `home`."""
    home.mkdir(parents=True, exist_ok=True)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("M3_", "GIT_", "HF_"))}
    return {
        **kept,
        "HOME": str(home),
        "XDG_CONFIG_HOME": str(home / ".config"),
        "XDG_CACHE_HOME": str(home / ".cache"),
        "M3_CONFIG": str(home / "config.toml"),
        "M3_CACHE_DIR": str(home / "cache"),
        # llama.cpp's threads wait for each other by spinning, which is slow on a busy machine.
        "M3_THREADS": "1",
        "PYTHONWARNINGS": "error",
    }


class Server:
    """A running `m3 serve`. `environ` has the commands that share its cache find it."""

    def __init__(
        self, process: subprocess.Popen[bytes], environ: Mapping[str, str], stdout: Path, stderr: Path
    ) -> None:
        self.process = process
        self.environ = dict(environ)
        self.cache = Path(environ["M3_CACHE_DIR"])
        self._stdout = stdout
        self._stderr = stderr
        poll(lambda: self._listens() or self.ended)
        assert self._listens(), self.stderr
        self.url = self._stdout.read_text().strip()
        """The base of its API, e.g. `http://127.0.0.1:8303/v1`."""

    def _listens(self) -> bool:
        return self._stdout.read_text().endswith("\n")

    @property
    def root(self) -> str:
        """The address without the API's `/v1`."""
        return self.url.removesuffix("/v1")

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.root.rpartition(":")[2])

    @property
    def stderr(self) -> str:
        """What it has written to stderr so far."""
        return self._stderr.read_text()

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return self.process.poll() is not None

    @property
    def file(self) -> Path:
        """That by which m3's commands find it, whether it is there or not."""
        return self.cache / "servers" / f"{self.process.pid}-{self.port}.json"

    def answers(self) -> int:
        """How many answers it has reported, whole and stopped ones."""
        lines = self.stderr.splitlines()
        return sum(" generated; " in line or " saved; " in line for line in lines)

    def stop(self, number: int = signal.SIGTERM, *, group: bool = False) -> int:
        """Send a signal, to all its processes if `group`, as a terminal does; give the exit code."""
        if group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        return self.process.wait(DEADLINE)


@contextmanager
def serving(
    *arguments: str, environ: Mapping[str, str], cwd: Path | None = None, ignoring: int = 0
) -> Iterator[Server]:
    """Run `m3 serve --port 0` with some arguments until the block ends, in a process group of its own.

    What it writes is kept beside its cache. `ignoring` is a signal that it ignores, as by nohup.
    """
    directory = Path(environ["M3_CACHE_DIR"]).parent / "servers"
    directory.mkdir(parents=True, exist_ok=True)
    stem = f"{time.monotonic_ns()}"
    stdout, stderr = directory / f"{stem}.out", directory / f"{stem}.err"
    with stdout.open("wb") as out, stderr.open("wb") as err, _ignored(ignoring):
        process = subprocess.Popen(
            [M3, "serve", "--port", "0", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=cwd or directory,
            env=dict(environ),
            start_new_session=True,
        )
    try:
        yield Server(process, environ, stdout, stderr)
    finally:
        # The worker is in the same group.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def _ignored(number: int) -> Iterator[None]:
    """Ignore a signal meanwhile, which processes that are started then inherit."""
    if not number:
        yield
        return
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)
