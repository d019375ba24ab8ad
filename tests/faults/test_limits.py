"""Too little of what a system gives to processes: files, memory, streams, a home, room for a cache."""

from __future__ import annotations

import http.client
import os
import resource
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from m3cli.errors import ExitCode
from tests.faults.drills import FINE, Done, check, limited, lines, run
from tests.serve import servers
from tests.serve.servers import DEADLINE, M3, poll, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MEGABYTE = 1 << 20


@pytest.mark.parametrize("files", [8, 10, 16, 64])
def test_few_open_files(
    m3: Callable[..., Done], warmed: dict[str, str], ask: tuple[str, ...], cold: str, files: int
) -> None:
    """With enough of them there is an answer, with fewer a sentence about them, and nothing is left open."""
    limits = {resource.RLIMIT_NOFILE: files}
    commands = [ask]
    if files in (10, 16):  # a command that has three processes more at a time, each with pipes
        commands.append(("plan", ask[1], "-m", ask[4]))
    for command in commands:
        done = check(m3(*command, limits=limits), *FINE, ExitCode.IMPOSSIBLE)
        assert "Exception ignored" not in done.stderr
        if done.returncode == ExitCode.IMPOSSIBLE:
            assert done.stdout == ""
            assert files < 32
            assert "open files" in done.stderr or "temporary" in done.stderr
        elif command is ask:
            assert done.stdout == cold


def starts(limits: dict[int, int]) -> bool:
    """Whether Python gets as far as to m3 under limits."""
    code = f"import resource\n{lines(limits)}\nimport m3cli.__main__"
    return not subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not heed a limit on the address space")
@pytest.mark.parametrize("megabytes", [48, 100, 180, 240, 300, 400, 16_000])
def test_little_memory(
    m3: Callable[..., Done], warmed: dict[str, str], ask: tuple[str, ...], cold: str, megabytes: int
) -> None:
    """A sentence about memory, whichever process lacks it, or the answer."""
    limits = {resource.RLIMIT_AS: megabytes * MEGABYTE}
    if not starts(limits):
        pytest.skip("not even Python starts")
    done = m3(*ask, "--kv-type", "f16", limits=limits)
    if "OpenBLAS error" in done.stderr:  # which ends the process that has loaded it, here m3's own
        assert done.stdout == ""
        return
    check(done, *FINE, ExitCode.IMPOSSIBLE, ExitCode.INTERNAL)
    if done.returncode in FINE:
        assert done.stdout == cold
        return
    assert megabytes < 16_000
    assert done.stdout == ""
    assert "memory" in done.stderr
    if done.returncode == ExitCode.INTERNAL:  # llama.cpp's own end, which is of a process of its own
        assert "The model process" in done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(
    warmed: dict[str, str], ask: tuple[str, ...], cold: str, place: Path, closed: str
) -> None:
    """A stream that is not there is done without; no file takes its place and is written into."""
    shell = ["sh", "-c", f'exec "$0" "$@" {closed}', M3, *ask]
    done = subprocess.run(shell, capture_output=True, env=warmed, cwd=place, timeout=DEADLINE, check=False)
    check(Done(ask, done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode()), *FINE)
    assert done.stdout.decode("utf-8", "replace") == ("" if ">&-" in closed.split() else cold)
    assert bool(done.stderr) == ("2>&-" not in closed)
    memo = Path(warmed["M3_CACHE_DIR"]) / "memo.sqlite"
    assert memo.read_bytes().startswith(b"SQLite format 3")


def without_a_home(environ: Mapping[str, str], **more: str) -> dict[str, str]:
    """An environment in which nothing says where m3's own files are, but what `more` says."""
    of_a_home = ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "M3_CONFIG", "M3_CACHE_DIR")
    return {**{name: value for name, value in environ.items() if name not in of_a_home}, **more}


@pytest.mark.parametrize("home", ["missing", "file", "read-only"])
def test_a_home_that_is_none(
    environ: dict[str, str], ask: tuple[str, ...], cold: str, tmp_path: Path, home: str
) -> None:
    """Nothing is kept, and there is an answer."""
    file = tmp_path / "file"
    file.touch()
    path = {"missing": file / "nobody", "file": file, "read-only": tmp_path / "closed"}[home]
    if home == "read-only":
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        path.mkdir(mode=0o500)
    done = run(*ask, environ=without_a_home(environ, HOME=str(path)), cwd=tmp_path)
    assert check(done, *FINE).stdout == cold
    assert file.read_bytes() == b""


def test_no_home_at_all(environ: dict[str, str], tmp_path: Path, tiny: str) -> None:
    """The system knows one; commands that only read it do not care."""
    check(run("model", "list", environ=without_a_home(environ), cwd=tmp_path), 0)
    kept_nowhere = without_a_home(environ, M3_CACHE_DIR=str(tmp_path / "cache"))
    check(run("plan", "-m", tiny, environ=kept_nowhere, cwd=tmp_path), 0)


@pytest.mark.parametrize("directory", ["missing", "file"])
def test_no_place_for_temporary_files(
    warmed: dict[str, str], ask: tuple[str, ...], cold: str, tmp_path: Path, directory: str
) -> None:
    """Another is found, or it is said what there is none for."""
    (tmp_path / "file").touch()
    done = run(*ask, environ={**warmed, "TMPDIR": str(tmp_path / directory)}, cwd=tmp_path)
    check(done, *FINE, ExitCode.IMPOSSIBLE)
    assert done.stdout == cold or "temporary file" in done.stderr


def test_a_cache_that_has_no_place(
    environ: dict[str, str], ask: tuple[str, ...], cold: str, tiny: str
) -> None:
    """A file is where the directory should be: answers come, and what is only for the cache is refused."""
    place = Path(environ["M3_CACHE_DIR"])
    place.write_text("in the way")

    def here(*arguments: str) -> Done:
        return run(*arguments, environ=environ, cwd=place.parent)

    asked = check(here(*ask), *FINE)
    assert asked.stdout == cold
    assert "The context is not saved for later" in asked.stderr.replace("\n", " ")
    assert "The context is not saved" in check(here("warm", ask[1], "-m", tiny), ExitCode.IMPOSSIBLE).stderr
    evaluated = check(here("eval", "--lengths", "1k", "-m", tiny), ExitCode.IMPOSSIBLE)
    assert "The results cannot be kept" in evaluated.stderr.replace("\n", " ")
    check(here("cache", "list"), 0)
    check(here("cache", "prune"), 0)
    with serving("-m", tiny, environ=environ) as server:
        assert answers(server.port) == 200
        assert server.stop() == 0
    assert place.read_text() == "in the way"


def answers(port: int) -> int:
    """The status of a plain request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    try:
        connection.request(
            "POST", "/v1/completions", '{"model": "tiny.gguf", "prompt": "a", "max_tokens": 1}'
        )
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize("when", ["while the model is loaded", "at rest"])
def test_more_connections_than_files(
    environ: dict[str, str], tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """A server takes what it can of a hundred at once, keeps what it needs itself, and answers afterwards."""
    monkeypatch.setattr(servers, "M3", limited(tmp_path, {resource.RLIMIT_NOFILE: 64}))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"  # and no body
    with serving("-m", tiny, environ=environ) as server, ExitStack() as stack:
        if when == "at rest":
            assert answers(server.port) == 200
        for number in range(100):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), DEADLINE))
            with suppress(OSError):  # it may have been closed already
                connection.sendall(head if number % 2 else head[:20])
        stack.close()
        assert answers(server.port) == 200
        if Path("/proc/self/fd").exists():
            poll(lambda: len(list(Path(f"/proc/{server.process.pid}/fd").iterdir())) < 32)
        assert server.stop() == 0
        assert "error" not in server.stderr
        assert "Traceback" not in server.stderr
