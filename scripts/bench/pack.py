"""Pack a tree with m3 and with every other packer that is installed, and compare them.

python scripts/bench/pack.py PATH [--runs N] [--limit BYTES]

Others are repomix (npm), gitingest, files-to-prompt and code2prompt, found on PATH. Each runs N times, in
turn, and its best time counts; "warm" is with its cache of token counts from the run before. All files of up
to LIMIT bytes are packed by m3 (50 MB, as repomix does, unless given), so that the texts are about the same.
Times are wall and CPU seconds with start-up; memory is the peak of the largest process.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Contender:
    """A command; `{out}` in it is the file to write, else standard output goes there."""

    name: str
    command: list[str]
    cold: bool


@dataclass(frozen=True)
class Measure:
    """Seconds, bytes, and what the program says it counted."""

    wall: float
    cpu: float
    memory: int
    written: int
    tokens: int | None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--limit", type=int, default=50_000_000)
    given = parser.parse_args()
    best: dict[str, Measure] = {}
    contenders = _contenders(given.path.resolve(), given.limit)
    for number in range(given.runs):
        with tempfile.TemporaryDirectory() as place:
            caches = Path(place)
            for contender in contenders:
                measure = _run(contender, caches)
                if measure is None:
                    continue
                known = best.get(contender.name)
                if known is None or measure.wall < known.wall:
                    best[contender.name] = measure
        print(f"run {number + 1} of {given.runs} done", file=sys.stderr)
    _print(best)


def _contenders(path: Path, limit: int) -> list[Contender]:
    m3 = [str(Path(sys.executable).with_name("m3")), "pack", str(path), "--max-file-size", str(limit)]
    found = [
        Contender("m3 cold", [*m3, "-o", "{out}"], cold=True),
        Contender("m3 warm", [*m3, "-o", "{out}"], cold=False),
        Contender("m3 without redaction, cold", [*m3, "--no-redact", "-o", "{out}"], cold=True),
    ]
    if repomix := shutil.which("repomix"):
        command = [repomix, str(path), "-o", "{out}"]
        found += [
            Contender("repomix cold", command, cold=True),
            Contender("repomix warm", command, cold=False),
        ]
    if gitingest := shutil.which("gitingest"):
        found.append(
            Contender("gitingest", [gitingest, str(path), "-s", str(limit), "-o", "{out}"], cold=True)
        )
    if files_to_prompt := shutil.which("files-to-prompt"):
        found.append(Contender("files-to-prompt", [files_to_prompt, str(path), "-o", "{out}"], cold=True))
    if code2prompt := shutil.which("code2prompt"):
        command = [code2prompt, "--path", str(path), "--tokens", "--output", "{out}"]
        found.append(Contender("code2prompt", command, cold=True))
    return found


def _run(contender: Contender, caches: Path) -> Measure | None:
    tool = caches / contender.name.split()[0]
    if contender.cold:
        shutil.rmtree(tool, ignore_errors=True)
    tool.mkdir(exist_ok=True)
    out, log = tool / "out", tool / "log"
    out.unlink(missing_ok=True)
    environment = os.environ | {"TMPDIR": str(tool), "M3_CACHE_DIR": str(tool / "m3"), "HOME": str(tool)}
    command = [part.format(out=out) for part in contender.command]
    with log.open("wb") as file:
        start = time.perf_counter()
        process = os.posix_spawn(
            command[0],
            command,
            environment,
            file_actions=[(os.POSIX_SPAWN_DUP2, file.fileno(), 1), (os.POSIX_SPAWN_DUP2, file.fileno(), 2)],
        )
        _, status, usage = os.wait4(process, 0)
        wall = time.perf_counter() - start
    text = log.read_text("utf-8", "replace")
    if os.waitstatus_to_exitcode(status) or not out.exists():
        print(f"{contender.name} failed: {text[-400:]}", file=sys.stderr)
        return None
    return Measure(
        wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, out.stat().st_size, _tokens(text)
    )


def _tokens(text: str) -> int | None:
    """The number of tokens that a program prints."""
    match = re.search(r"()()[Tt]okens:\s*([\d,.]+)\s*([kM]?)", text)
    match = match or re.search(r"([\d,.]+)\s*([kM]?) tokens()()", text)
    if match is None:
        return None
    number = (match[1] or match[3]).replace(",", "").rstrip(".")
    return int(float(number) * {"": 1, "k": 1e3, "M": 1e6}[match[2] or match[4] or ""])


def _print(best: dict[str, Measure]) -> None:
    print(
        f"{'':28}{'wall s':>8}{'CPU s':>8}{'MB/s':>7}{'peak MB':>9}{'x text':>8}{'MB out':>8}{'tokens':>13}"
        f"{'time, m3 cold = 1':>19}"
    )
    for name, measure in best.items():
        megabytes = measure.written / 1e6
        print(
            f"{name:28}{measure.wall:8.2f}{measure.cpu:8.2f}{megabytes / measure.wall:7.1f}"
            f"{measure.memory / 1e6:9.0f}{measure.memory / measure.written:8.1f}{megabytes:8.1f}"
            f"{measure.tokens if measure.tokens is not None else '-':>13}"
            f"{measure.wall / best['m3 cold'].wall:19.2f}"
        )
    for state in ("cold", "warm"):
        if f"repomix {state}" in best:
            ratio = best[f"repomix {state}"].wall / best[f"m3 {state}"].wall
            print(f"m3 {state} is {ratio:.2f} times as fast as repomix {state}")


if __name__ == "__main__":
    main()
