"""Death and interruption: one sentence, the right exit code, and nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cli.conftest import M3

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="looks at processes through /proc"
)

DEADLINE = 60.0  # seconds; only to fail rather than hang


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def gone(pid: int) -> bool:
    """Whether the process has ended; one that only waits to be collected has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until(condition: object) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def reading(tmp_path: Path, environ: dict[str, str]) -> tuple[subprocess.Popen[str], int]:
    """`m3 ask` in the middle of a long prefill, and the pid of its worker."""
    (tmp_path / "long.txt").write_text("".join(f"line {i} of a long text\n" for i in range(2000)))
    process = subprocess.Popen(
        [M3, "ask", "long.txt", "What is it about?", "--strategy", "select"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environ,
        start_new_session=True,
    )  # fmt: skip
    # Not the first child: where llama.cpp crashes on this CPU, that one has been replaced.
    wait_until(lambda: any(cpu_seconds(child) > 4 for child in children(process.pid)))
    return process, children(process.pid)[0]


@pytest.mark.parametrize("fatal", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_worker_that_dies_is_one_sentence(reading: tuple[subprocess.Popen[str], int], fatal: int) -> None:
    """A native crash or a kill in mid-prefill names the signal, exits 70 and leaves no process."""
    process, worker = reading
    os.kill(worker, fatal)
    stdout, stderr = process.communicate(timeout=DEADLINE)
    assert process.returncode == 70
    assert stdout == ""
    assert signal.Signals(fatal).name in stderr
    assert stderr.count("error: ") == 1
    assert "Traceback" not in stderr
    wait_until(lambda: gone(worker))


def test_ctrl_c_ends_both_processes(reading: tuple[subprocess.Popen[str], int]) -> None:
    """An interrupt from the terminal, which reaches the whole group, exits 130 without a traceback."""
    process, worker = reading
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    wait_until(lambda: gone(worker))


@pytest.mark.parametrize("fatal", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_worker_does_not_outlive_m3(reading: tuple[subprocess.Popen[str], int], fatal: int) -> None:
    """When m3 itself is killed, its worker ends too."""
    process, worker = reading
    process.send_signal(fatal)
    process.communicate(timeout=DEADLINE)
    wait_until(lambda: gone(worker))
    assert gone(worker)
