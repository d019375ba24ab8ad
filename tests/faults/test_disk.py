"""A disk that is full at any write: what was asked for comes; what could not be kept is told, not half kept.

The system refuses to write beyond a size of a file, which fails as a full disk does: first with fewer bytes
than were given, then with an error. A file system that is full is in tests/cli/test_warm.py, a model that
finds no room in tests/cli/test_quantize_run.py.
"""

from __future__ import annotations

import json
import os
import pty
import resource
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

import pytest

from m3cli.errors import ExitCode
from tests.faults.drills import FINE, check, files, limited
from tests.git_repositories import make_repository, write
from tests.serve import servers
from tests.serve.servers import DEADLINE, poll, serving

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.drills import Done


def no_more_than(nbytes: int) -> dict[int, int]:
    """Limits under which no file gets larger."""
    return {resource.RLIMIT_FSIZE: nbytes}


def kept(environ: dict[str, str]) -> list[str]:
    """Names of what is kept of contexts."""
    return list(files(Path(environ["M3_CACHE_DIR"]) / "snapshots"))


@pytest.mark.parametrize("nbytes", [1, 5000, 100_000])
def test_an_answer_that_cannot_be_kept(
    m3: Callable[..., Done], environ: dict[str, str], ask: tuple[str, ...], cold: str, nbytes: int
) -> None:
    """It is the answer all the same; nothing of the context is kept, and the next run is well."""
    done = check(m3(*ask, limits=no_more_than(nbytes)), *FINE)
    assert done.stdout == cold
    assert "The context is not saved for later" in done.stderr.replace("\n", " ")
    assert kept(environ) == []
    if nbytes == 5000:  # of a database there is more than nothing
        assert check(m3(*ask), *FINE).stdout == cold
        assert len(kept(environ)) == 3


def test_a_disk_on_which_nothing_fits(m3: Callable[..., Done], ask: tuple[str, ...]) -> None:
    """The model process needs a file, and says which it cannot have."""
    done = check(m3(*ask, limits=no_more_than(0)), ExitCode.IMPOSSIBLE)
    assert done.stdout == ""
    assert "temporary file" in done.stderr


def test_what_is_kept_serves_where_nothing_can_be_written(
    m3: Callable[..., Done], warmed: dict[str, str], ask: tuple[str, ...], cold: str
) -> None:
    """A full disk is no reason to compute again what is on it."""
    before = kept(warmed)
    answer = json.loads(check(m3(*ask, "--json", limits=no_more_than(1)), *FINE).stdout)
    assert answer["answer"] == cold.strip()
    assert answer["usage"]["restored_tokens"] > 0
    assert [name for name in kept(warmed) if "rates" not in name] == [n for n in before if "rates" not in n]


def test_warming_that_cannot_be_kept_is_an_error(
    m3: Callable[..., Done], environ: dict[str, str], ask: tuple[str, ...], tiny: str
) -> None:
    """To keep something is all that it is for."""
    done = check(m3("warm", ask[1], "-m", tiny, limits=no_more_than(5000)), ExitCode.IMPOSSIBLE)
    assert "The context is not saved for later" in done.stderr.replace("\n", " ")
    assert kept(environ) == []


@pytest.mark.parametrize("there", [False, True])
def test_a_pack_that_has_no_room(
    m3: Callable[..., Done], ask: tuple[str, ...], tmp_path: Path, there: bool
) -> None:
    """The file that was there stays as it was, one that was not does not appear; nothing lies beside."""
    output = tmp_path / "out" / "pack.xml"
    output.parent.mkdir()
    if there:
        output.write_text("what was there before")
    done = check(m3("pack", ask[1], "-o", str(output), limits=no_more_than(100)), ExitCode.IMPOSSIBLE)
    assert "pack.xml cannot be written" in done.stderr.replace("\n", "")
    assert files(output.parent) == ({"pack.xml": b"what was there before"} if there else {})


def test_a_review_that_has_no_room(m3: Callable[..., Done], tmp_path: Path, tiny: str) -> None:
    """What fits is written, what does not is named, and the review itself is shown: it took a while."""
    top = make_repository(tmp_path / "top", {"reader.py": "def read(path):\n    return open(path)\n"})
    write(top, {"reader.py": "def read(path):\n    return open(path).read()\n"})
    output = tmp_path / "out"
    output.mkdir()
    arguments = ("--context", "diff", "--no-check", "--max-tokens", "12", "--format", "json", "-m", tiny)
    named = [f"--output={form}={output / form}" for form in ("sarif", "markdown")]
    done = m3("review", str(top), *arguments, *named, limits=no_more_than(2000))
    check(done, ExitCode.IMPOSSIBLE)
    assert "sarif cannot be written" in done.stderr.replace("\n", "")
    assert "reader.py" in json.dumps(json.loads(done.stdout))
    assert list(files(output)) == ["markdown"]


EVALUATION = (
    "eval",
    "--tasks",
    "niah_single_1",
    "--lengths",
    "1k",
    "--samples",
    "1",
    "--depths",
    "2",
    "--json",
)


def test_an_evaluation_that_has_no_room(
    m3: Callable[..., Done], environ: dict[str, str], tmp_path: Path, tiny: str
) -> None:
    """It ends, with what it has found until then; an answer that was kept is not asked for again."""
    page = f"--report={tmp_path / 'report.html'}"
    first = m3(*EVALUATION, page, "-m", tiny, limits=no_more_than(700))
    check(first, ExitCode.IMPOSSIBLE)
    (path,) = Path(environ["M3_CACHE_DIR"]).glob("eval/*/*/*.jsonl")
    assert path.stat().st_size == 700
    assert path.read_bytes().count(b"\n") == 1
    assert not (tmp_path / "report.html").exists()
    # The page alone has no room now, and the results are shown in spite of that.
    again = m3(*EVALUATION, page, "-m", tiny, limits=no_more_than(20_000))
    check(again, ExitCode.IMPOSSIBLE)
    assert "report.html cannot be written" in again.stderr.replace("\n", "")
    result = json.loads(again.stdout)
    assert len(result["runs"][0]["outcomes"]) == 2
    assert "1 of them answered in earlier runs" in again.stderr.replace("\n", " ")
    assert [json.loads(line)["length"] for line in path.read_bytes().splitlines() if line.endswith(b"}")] == [
        1024,
        1024,
    ]


def test_a_question_that_cannot_be_remembered(
    warmed: dict[str, str], ask: tuple[str, ...], tmp_path: Path
) -> None:
    """In a terminal, questions are kept for the next time; one that cannot be is answered like any other."""
    history = Path(warmed["M3_CACHE_DIR"]) / "chat-history"
    terminal, inner = pty.openpty()
    process = subprocess.Popen(
        [limited(tmp_path, no_more_than(1)), "chat", ask[1], *ask[3:]],
        stdin=inner, stdout=inner, stderr=inner, env={**warmed, "TERM": "dumb"}, start_new_session=True,
    )  # fmt: skip
    os.close(inner)
    said = b""

    def prompts(count: int) -> bool:
        nonlocal said
        said += os.read(terminal, 65536)
        return said.count(b"\x1b[?2004h") >= count  # how the terminal is told that a line is read now

    try:
        poll(lambda: prompts(1))
        os.write(terminal, f"{ask[2]}\r".encode())
        poll(lambda: prompts(2))
        os.write(terminal, b"\x04")
        code = process.wait(DEADLINE)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert code == 0, said
    assert said.count(b"wrote 8 in") == 1
    assert b"Traceback" not in said
    assert history.stat().st_size <= 1


def test_a_server_whose_disk_is_full(
    environ: dict[str, str], tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers, although it can neither be announced, nor keep what it computes, nor write its log."""
    # Enough for the address, and for the beginning of the log.
    monkeypatch.setattr(servers, "M3", limited(tmp_path, no_more_than(512)))

    def complete(server: servers.Server) -> Any:
        body = {"model": server_model, "prompt": "one, two, three", "max_tokens": 4}
        request = Request(f"{server.url}/completions", json.dumps(body).encode())
        with urlopen(request, timeout=DEADLINE) as response:
            return json.loads(response.read())["choices"][0]["text"]

    with serving("-m", tiny, environ=environ) as server:
        with urlopen(f"{server.url}/models", timeout=DEADLINE) as response:
            server_model = json.loads(response.read())["data"][0]["id"]
        assert len({complete(server) for _ in range(20)}) == 1
        assert not list((server.cache / "servers").glob("*"))
        assert server.stop() == 0
        assert len(server.stderr) <= 512
    assert kept(environ) == []
