"""Draw the terminal picture of the README: one real run of `m3 ask`, exported by rich as SVG.

usage: python scripts/screenshot.py OUT.svg [m3 ask arguments…]

The run is piped, so there are no progress bars; what goes to stderr is dimmed.
"""

from __future__ import annotations

import io
import shlex
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.text import Text

WIDTH = 100


def main() -> None:
    out, *arguments = sys.argv[1:]
    command = [str(Path(sysconfig.get_path("scripts")) / "m3"), "ask", *arguments]
    lines: list[tuple[float, str, str]] = []  # when, style, text
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def collect(stream: IO[str], style: str) -> None:
        lines.extend((time.monotonic(), style, line.rstrip()) for line in stream)

    assert process.stdout is not None
    assert process.stderr is not None
    notes = threading.Thread(target=collect, args=(process.stderr, "dim"))
    notes.start()
    collect(process.stdout, "")
    notes.join()
    if process.wait() not in (0, 4):
        sys.exit("\n".join(text for _, _, text in lines))
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text.assemble(("$ ", "bold green"), ("m3 ask " + shlex.join(arguments), "bold")))
    for _, style, text in sorted(lines, key=lambda line: line[0]):
        console.print(Text(text, style=style))
    Path(out).write_text(console.export_svg(title="m3"), encoding="utf-8")
    print(out)


if __name__ == "__main__":
    main()
