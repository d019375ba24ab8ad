"""The model process is killed at every moment of its life: nothing hangs, and nothing half-done is believed.

A kill in mid-prefill by other signals is in tests/cli/test_signals.py, one of m3 itself in test_warm.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from m3cli.errors import ExitCode
from tests.faults.drills import FINE, check, children, files, gone
from tests.serve.servers import DEADLINE, M3, environ_of, poll, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tests.faults.drills import Done
    from tests.serve.servers import Server

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="looks at processes through /proc"
)

# Has a worker kill itself right behind an event or a step of saving, if there is a file of that name in a
# directory; the file goes, so that one file is one death.
DEADLY = """
import os, pathlib, signal
from m3cli.engine import snapshots, worker
def die(name):
    for path in sorted(pathlib.Path({deaths!r}).glob(name + ".*")):
        path.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
def behind(owner, name, named):
    whole = getattr(owner, name)
    def deadly(*arguments):
        whole(*arguments)
        die(named(*arguments))
    setattr(owner, name, deadly)
def event(_, event):
    return type(event).__name__ + " at 0" * (getattr(event, "done", 1) == 0)
behind(worker.Worker, "_send_event", event)
behind(snapshots, "_write", lambda path, data: path.name)
behind(snapshots, "_sync", lambda path: "entry" if path.is_dir() else path.name)
"""
SITE = """
from m3cli.engine import process
process._BOOTSTRAP = process._BOOTSTRAP.replace("\\nmain()", "\\n" + {code!r} + "main()")
"""


class Deaths:
    """What the workers of commands with `environ` are going to die of."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "deaths"
        self._directory.mkdir()
        code = DEADLY.format(deaths=str(self._directory))
        (directory / "site").mkdir()
        (directory / "site" / "sitecustomize.py").write_text(SITE.format(code=code))
        self.environ = {"PYTHONPATH": str(directory / "site")}

    def add(self, name: str, times: int = 1) -> None:
        """The next worker dies behind this, and the one after it, so many times."""
        for number in range(times):
            (self._directory / f"{name}.{number}").touch()

    @property
    def left(self) -> list[Path]:
        """Those that nobody has died of."""
        return list(self._directory.iterdir())


@pytest.fixture
def deaths(tmp_path: Path, environ: dict[str, str]) -> Deaths:
    """In the environment of `m3`."""
    deaths = Deaths(tmp_path)
    environ.update(deaths.environ)
    return deaths


@pytest.mark.parametrize(
    ("moment", "times", "doing", "restores"),
    [
        ("LoadProgress", 2, "loading the model", False),
        ("Prefilled", 1, "reading the prompt (32 of ", False),
        ("Token", 1, "generating (after 1 tokens)", True),
        ("state.bin", 1, "reading the prompt (", False),
        ("manifest.json", 1, "reading the prompt (", False),
        ("entry", 1, "reading the prompt (", True),
    ],
)
def test_an_answer_that_a_worker_dies_over(
    m3: Callable[..., Done],
    deaths: Deaths,
    environ: dict[str, str],
    ask: tuple[str, ...],
    cold: str,
    moment: str,
    times: int,
    doing: str,
    restores: bool,
) -> None:
    """It is one sentence that says what was going on; the next run goes on from what is whole."""
    deaths.add(moment, times)
    done = check(m3(*ask), ExitCode.INTERNAL)
    assert f"was killed by SIGKILL while {doing}" in done.stderr.replace("\n", " ")
    assert "Most likely the machine ran out of memory" in done.stderr.replace("\n", " ")
    assert deaths.left == []
    again = json.loads(check(m3(*ask, "--json"), *FINE).stdout)
    assert again["answer"] == cold.strip()
    assert (again["usage"]["restored_tokens"] > 0) == restores
    kept = files(Path(environ["M3_CACHE_DIR"]) / "snapshots")
    assert [name.rpartition("/")[2] for name in kept if name.count("/") > 1] == [
        "manifest.json",
        "state.bin",
        "tokens.bin",
    ]


def test_a_worker_that_dies_before_it_computes_gets_a_second_chance(
    m3: Callable[..., Done], deaths: Deaths, ask: tuple[str, ...]
) -> None:
    """It may have been too large: one with less memory takes its place, and that is told."""
    deaths.add("LoadProgress")
    done = check(m3(*ask), *FINE)
    assert done.stdout.strip()
    assert "was killed by SIGKILL while loading the model" in done.stderr.replace("\n", " ")
    assert "Trying once more" in done.stderr


def test_a_conversation_outlives_its_worker(
    deaths: Deaths, environ: dict[str, str], place: Path, ask: tuple[str, ...], cold: str
) -> None:
    """One that was killed while nobody asked anything is not missed; one that dies over an answer ends it."""
    process = subprocess.Popen(
        [M3, "chat", *(ask[1], *ask[3:])],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ, cwd=place,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{ask[2]}\n".encode())
    process.stdin.flush()
    assert process.stdout.read(len(cold.encode())).decode() == cold
    (worker,) = children(process.pid)
    os.kill(worker, signal.SIGKILL)
    poll(lambda: gone(worker))
    process.stdin.write(b"And why?\n")
    process.stdin.flush()
    assert process.stdout.read(1)
    deaths.add("Token")
    _, stderr = process.communicate(b"And where?\n", timeout=DEADLINE)
    check(subprocess.CompletedProcess([], process.returncode, "", stderr.decode()), ExitCode.INTERNAL)
    assert b"killed by SIGKILL while generating" in stderr.replace(b"\n", b" ")


# The server, with a model that answers in words

QUESTION = "Say hello."


@contextmanager
def server_with(deaths: Deaths, directory: Path) -> Iterator[Server]:
    environ = {**environ_of(directory / "home"), **deaths.environ}
    with serving("--ctx", "1024", environ=environ) as server:
        yield server
        assert not server.ended
        assert server.stop() == 0
        assert "Traceback" not in server.stderr


def asked(server: Server, content: str, **more: Any) -> tuple[int, Any]:
    """Status and body of an answer; of a stream, the list of its events."""
    body = {"model": "demo", "messages": [{"role": "user", "content": content}], "max_tokens": 6, **more}
    request = Request(f"{server.url}/chat/completions", json.dumps(body).encode())
    try:
        with urlopen(request, timeout=DEADLINE) as response:
            data = response.read().decode()
            if "stream" not in more:
                return response.status, json.loads(data)
            events = [line.removeprefix("data: ") for line in data.splitlines() if line.startswith("data: ")]
            return response.status, [json.loads(event) for event in events if event != "[DONE]"]
    except HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def kill(server: Server) -> None:
    (worker,) = children(server.process.pid)
    os.kill(worker, signal.SIGKILL)
    poll(lambda: gone(worker))


def text_of(answer: tuple[int, Any]) -> str:
    status, body = answer
    assert status == 200, body
    text: str = body["choices"][0]["message"]["content"]
    return text


def about(error: Mapping[str, Any]) -> str:
    """What an error of the engine says that died."""
    assert error["code"] == "engine_failed", error
    assert error["type"] == "server_error"
    assert "was killed by SIGKILL while" in error["message"]
    return str(error["message"])


def test_a_server_outlives_its_workers(tmp_path: Path) -> None:
    """The request that a worker dies over fails; the next one has another worker, and the same answer."""
    deaths = Deaths(tmp_path)
    with server_with(deaths, tmp_path) as server:
        said = text_of(asked(server, QUESTION))
        workers = children(server.process.pid)

        def answers_again() -> None:
            assert text_of(asked(server, QUESTION)) == said
            workers.update(children(server.process.pid))

        # 1. over an answer
        for moment, doing in (("Prefilled", "reading the prompt"), ("Token", "generating (after 1 tokens)")):
            deaths.add(moment)
            status, body = asked(server, QUESTION)
            assert status == 500
            assert doing in about(body["error"])
            answers_again()
        # 2. over a stream, whose beginning has been sent
        deaths.add("Token")
        status, events = asked(server, QUESTION, stream=True)
        assert status == 200
        about(events[-1]["error"])
        answers_again()
        # 3. at rest
        kill(server)
        answers_again()
        # 4. over loading the model
        kill(server)
        deaths.add("LoadProgress")
        status, body = asked(server, QUESTION)
        assert status == 500
        assert "loading the model" in about(body["error"])
        answers_again()
        assert len(workers) == 6
        assert deaths.left == []


def test_a_server_whose_first_worker_dies_twice_ends(tmp_path: Path) -> None:
    """It has nothing to serve with: one sentence, not a server that answers nobody."""
    deaths = Deaths(tmp_path)
    deaths.add("LoadProgress", 2)
    with serving("--ctx", "1024", environ={**environ_of(tmp_path / "home"), **deaths.environ}) as server:
        code = server.process.wait(DEADLINE)
        stderr = server.stderr
    assert code == ExitCode.INTERNAL
    assert stderr.count("error: ") == 1
    assert "was killed by SIGKILL while loading the model" in stderr.replace("\n", " ")
    assert "Traceback" not in stderr
