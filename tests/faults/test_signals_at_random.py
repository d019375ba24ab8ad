"""Commands that are told to end at any moment: nothing half-done is shown, kept or left running."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from m3cli.errors import ExitCode
from tests.faults.drills import Done, check, children, files
from tests.git_repositories import make_repository, write
from tests.serve.servers import DEADLINE, M3, poll

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="looks at processes through /proc"
)

MOMENTS = int(os.environ.get("M3_TEST_SIGNALS", "3"))  # of each command
FINE = (ExitCode.DONE, ExitCode.FINDINGS, ExitCode.CAP_REACHED)
SIGNALS = {
    signal.SIGINT: (ExitCode.INTERRUPTED, -signal.SIGINT),  # the latter before and behind what is m3
    signal.SIGTERM: (ExitCode.INTERRUPTED, -signal.SIGTERM),
    signal.SIGHUP: (-signal.SIGHUP,),
}


class Command:
    """A command that can be run again and again, and ended in between; `output` is a file that it writes."""

    def __init__(
        self, arguments: tuple[str, ...], environ: dict[str, str], place: Path, stdin: str = ""
    ) -> None:
        self.environ = environ
        self.output = place / "output"
        self._arguments = [word.format(output=self.output) for word in arguments]
        self._place = place
        self._stdin = place / "stdin"
        self._stdin.write_text(stdin)

    def start(self) -> subprocess.Popen[bytes]:
        """In a group of processes of its own, as a shell does."""
        self.output.unlink(missing_ok=True)
        with self._stdin.open("rb") as stdin:
            return subprocess.Popen(
                [M3, *self._arguments],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=self.environ,
                cwd=self._place,
                start_new_session=True,
            )

    def end(self, process: subprocess.Popen[bytes]) -> Done:
        """Wait for its end, after which none of its processes is left."""
        stdout, stderr = process.communicate(timeout=DEADLINE)
        poll(lambda: not alive(process.pid))
        code = process.returncode
        return Done(self._arguments, code, stdout.decode("utf-8", "replace"), stderr.decode())


def said(done: Done) -> list[str]:
    """What a command has said, in pieces of which it may have said the first ones only."""
    if done.args[0] != "eval":
        return list(done.stdout)
    runs = json.loads(done.stdout)["runs"] if done.stdout else []
    return [f"{outcome['question']}: {outcome['reply']}" for run in runs for outcome in run["outcomes"]]


def is_whole(output: bytes) -> bool:
    """Whether a page or an object has been written to its end."""
    return output.rstrip().endswith(b"</html>") or bool(json.loads(output))


def alive(group: int) -> bool:
    """Whether there is a process in a group that has not ended."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended while we looked
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                return True
    return False


def computed(pid: int) -> float:
    """Seconds that a process and its children have computed, those that have ended included."""
    ticks = 0
    for each in (pid, *children(pid)):
        with suppress(OSError):
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


@pytest.fixture(params=["ask", "warm", "review", "eval", "chat"])
def command(
    request: pytest.FixtureRequest,
    environ: dict[str, str],
    tmp_path: Path,
    ask: tuple[str, ...],
    tiny: str,
) -> Command:
    name, corpus, model = request.param, ask[1], ("-m", tiny)
    stdin = ""
    if name == "ask":
        # The model that answers in words: it computes for some seconds, of which the signals get their share.
        arguments: tuple[str, ...] = ("ask", corpus, "What is it?", "--max-tokens", "8")
    elif name == "warm":
        arguments = ("warm", corpus, *model)
    elif name == "review":
        top = make_repository(tmp_path / "top", {"reader.py": "def read(path):\n    return open(path)\n"})
        write(top, {"reader.py": "def read(path):\n    return open(path).read()\n"})
        options = ("--context", "diff", "--max-tokens", "24", "-o", "sarif={output}")
        arguments = ("review", str(top), *options, *model)
    elif name == "eval":
        options = ("--tasks", "niah_single_1", "--lengths", "2k", "--samples", "2", "--depths", "2")
        arguments = ("eval", *options, "--json", "--report", "{output}", *model)
    else:
        stdin = "What is it?\nAnd why?\n"
        arguments = ("chat", corpus, *ask[3:])
    return Command(arguments, environ, tmp_path, stdin)


def computed_by_children() -> float:
    """Seconds, of those that have ended and were waited for."""
    times = os.times()
    return times.children_user + times.children_system


@pytest.fixture(scope="module")
def starting() -> float:
    """Seconds of computing, amply, in which Python starts, and tells of an interrupt in its own way."""
    before = computed_by_children()
    subprocess.run([sys.executable, "-c", "import m3cli.__main__"], check=True)
    return 2 * (computed_by_children() - before)


def test_a_signal_at_any_moment(command: Command, starting: float) -> None:
    """The command ends as the signal says, or because it is done; the next one works as if undisturbed."""
    before = computed_by_children()
    whole = check(command.end(command.start()), *FINE)
    cost = computed_by_children() - before
    wrote = command.output.exists()
    cache = Path(command.environ["M3_CACHE_DIR"])
    shutil.rmtree(cache)
    chance = random.Random(0)
    for number in range(MOMENTS):
        # One moment in each part of the time that it takes.
        moment = starting + (number + chance.random()) / MOMENTS * (cost - starting)
        kind = chance.choice(list(SIGNALS))
        process = command.start()
        poll(partial(is_at, process, moment))
        with suppress(ProcessLookupError):
            if kind is signal.SIGTERM:  # as supervisors send it; the others come from a terminal, to all
                process.send_signal(kind)
            else:
                os.killpg(process.pid, kind)
        done = check(command.end(process), *FINE, *SIGNALS[kind])
        assert not command.output.exists() or is_whole(command.output.read_bytes())
        forgotten = "the question is forgotten" in done.stderr  # in a conversation, which goes on
        if done.returncode in FINE and not forgotten:
            assert said(done) == said(whole)
            shutil.rmtree(cache)  # or the next one would soon be done, too
        elif not forgotten:
            assert said(done) == said(whole)[: len(said(done))]
    again = check(command.end(command.start()), whole.returncode)
    assert said(again) == said(whole)
    assert command.output.exists() == wrote
    assert not [name for name in files(cache) if ".partial" in name or name.endswith(".tmp")]


def is_at(process: subprocess.Popen[bytes], moment: float) -> bool:
    return process.poll() is not None or computed(process.pid) > moment
