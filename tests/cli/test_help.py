"""Help and version: what they say, and what they must not load."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from m3cli import __version__

if TYPE_CHECKING:
    from tests.cli.conftest import Run

HEAVY = {
    "torch",
    "llama_cpp",
    "numpy",
    "tiktoken",
    "jinja2",
    "regex",
    "pathspec",
    "gguf",
    "charset_normalizer",
}


@pytest.mark.parametrize("arguments", [["--help"], ["ask", "--help"], ["pack", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str], environ: dict[str, str]) -> None:
    """Help answers without importing any of the libraries that do the work."""
    program = (
        "import sys\n"
        "from m3cli.__main__ import main\n"
        f"sys.argv = ['m3', *{arguments!r}]\n"
        "try:\n    main()\n"
        "finally:\n    print('LOADED', *sorted({name.split('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environ, check=True
    )
    loaded = set(done.stdout.rsplit("LOADED", 1)[1].split())
    assert "m3cli" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("command", [["ask"], ["pack"], ["model", "list"], ["model", "info"], ["doctor"]])
def test_every_command_shows_an_example(m3: Run, command: list[str]) -> None:
    """The help of each command holds an example that begins with the command itself."""
    done = m3(*command, "--help")
    assert done.returncode == 0
    assert f"m3 {' '.join(command)}" in done.stdout.split("Example:", 1)[1]


def test_version(m3: Run) -> None:
    """`--version` prints one line on stdout."""
    done = m3("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"m3 {__version__}\n", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(m3: Run, shell: str) -> None:
    """The completion script of a shell is printed, and what it asks for is answered."""
    assert f"complete_{shell}" in m3(_M3_COMPLETE=f"source_{shell}").stdout
    words = {
        "COMP_WORDS": "m3 mod",
        "COMP_CWORD": "1",
        "_TYPER_COMPLETE_ARGS": "m3 mod",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    assert "model" in m3(_M3_COMPLETE=f"complete_{shell}", **words).stdout
