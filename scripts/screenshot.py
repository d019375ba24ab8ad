"""Draw the terminal picture of the README: one real run of `m3 ask`, exported by rich as SVG.

usage: python scripts/screenshot.py OUT.svg [m3 ask arguments…]

The run is piped, so there are no progress bars: notes of stderr dimmed, then the answer of stdout.
"""

from __future__ import annotations

import io
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 100


def main() -> None:
    out, *arguments = sys.argv[1:]
    command = [str(Path(sysconfig.get_path("scripts")) / "m3"), "ask", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 4):
        sys.exit(f"m3 failed with exit code {done.returncode}:\n{done.stderr}")
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text.assemble(("$ ", "bold green"), ("m3 ask " + shlex.join(arguments), "bold")))
    console.print(Text(done.stderr.rstrip(), style="dim"))
    console.print(Text("\n" + done.stdout.rstrip()))
    Path(out).write_text(console.export_svg(title="m3"), encoding="utf-8")
    print(out)


if __name__ == "__main__":
    main()
