"""What fault drills share: commands in processes of their own, and what holds however one of them ends."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from m3cli.__main__ import main
from m3cli.errors import ExitCode
from tests.serve.servers import DEADLINE, M3

if TYPE_CHECKING:
    from collections.abc import Mapping

Done = subprocess.CompletedProcess[str]
# Exit codes of a command that has done what it was asked; 1 and 4 are of what it has found.
FINE = (ExitCode.DONE, ExitCode.CAP_REACHED)
# Python's own way to do this in a child warns where there are threads.
_LIMITER = "import os, resource, sys\n{lines}\nos.execv({m3!r}, [{m3!r}, *sys.argv[1:]])\n"


def lines(limits: Mapping[int, int]) -> str:
    """Lines of Python that set limits of the system's (`resource.RLIMIT_…`)."""
    return "\n".join(f"resource.setrlimit({kind}, ({most}, {most}))" for kind, most in limits.items())


def _limiter(limits: Mapping[int, int]) -> str:
    return _LIMITER.format(lines=lines(limits), m3=M3)


def limited(directory: Path, limits: Mapping[int, int]) -> str:
    """A command in `directory` that is m3 under limits of the system's (`resource.RLIMIT_…`)."""
    path = directory / "limited-m3"
    path.write_text(f"#!{sys.executable} -IS\n{_limiter(limits)}")
    path.chmod(0o700)
    return str(path)


def run(
    *arguments: str,
    environ: Mapping[str, str],
    cwd: Path,
    stdin: str = "",
    limits: Mapping[int, int] | None = None,
) -> Done:
    """A command of m3's, run to its end, under `limits` as `limited` takes them."""
    begin = [sys.executable, "-ISc", _limiter(limits)] if limits else [M3]
    done = subprocess.run(
        [*begin, *arguments],
        input=stdin.encode(),
        capture_output=True,
        cwd=cwd,
        env=dict(environ),
        timeout=DEADLINE,
        check=False,
    )
    return Done(
        arguments, done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8")
    )


def run_here(*arguments: str, environ: Mapping[str, str]) -> Done:
    """A command of m3's in this very process, where a drill has changed what it stands on."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("M3_")]:
            patch.delenv(name)
        for name, value in environ.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["m3", *arguments])
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        with pytest.raises(SystemExit) as ended:
            main()
    texts = [stream.buffer.getvalue().decode("utf-8", "replace") for stream in streams]  # type: ignore[attr-defined]
    return Done(arguments, int(ended.value.code or 0), *texts)


def check(done: Done, *codes: int) -> Done:
    """A command has ended as it may: with one of `codes`, and with one sentence if it has failed."""
    assert done.returncode in codes, (done.args, done.returncode, done.stderr)
    assert "Traceback" not in done.stderr, (done.args, done.stderr)
    assert "unexpectedly" not in done.stderr, (done.args, done.stderr)
    failed = done.returncode in (ExitCode.USAGE, ExitCode.IMPOSSIBLE, ExitCode.INTERNAL)
    assert done.stderr.count("error: ") == failed, (done.args, done.stderr)
    return done


def children(pid: int) -> set[int]:
    """Living processes whose parent is `pid`."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it ended while we looked
            continue
        if int(parent) == pid and state != "Z":
            found.add(int(stat.parent.name))
    return found


def gone(pid: int) -> bool:
    """Whether a process has ended; one that only waits to be collected has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def held(pid: int) -> tuple[int, int, int]:
    """Bytes of resident memory, open files and threads of a process."""
    proc = Path(f"/proc/{pid}")
    pages = int((proc / "statm").read_text().split()[1])
    return (
        pages * os.sysconf("SC_PAGE_SIZE"),
        len(list((proc / "fd").iterdir())),
        len(list((proc / "task").iterdir())),
    )


def files(directory: Path) -> dict[str, bytes]:
    """The files below a directory with their content, by name."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
