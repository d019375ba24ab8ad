"""Wrong input: each kind has its own sentence and its exit code, and no traceback."""

from __future__ import annotations

import os
import subprocess
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from m3cli.model.catalog import demo_model
from tests.cli.conftest import M3
from tests.gguf_files import LLAMA_KEYS, write_gguf

if TYPE_CHECKING:
    from tests.cli.conftest import Run


def check(done: subprocess.CompletedProcess[str], code: int, *sentences: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") or "\nerror: " in done.stderr
    for sentence in sentences:
        assert sentence in done.stderr


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_a_missing_path(m3: Run, tree: Path) -> None:
    """A path that is not there is a usage error that names it."""
    check(m3("ask", "nowhere", "What?"), 2, "nowhere")


def test_an_empty_directory(m3: Run, tree: Path) -> None:
    """A directory without files says so."""
    check(m3("ask", "empty", "What?"), 3, "There is no text to read in empty.")


def test_a_directory_without_text(m3: Run, tree: Path) -> None:
    """A directory of which everything is skipped counts the reasons."""
    (tree / "empty" / "a.bin").write_bytes(bytes(range(256)))
    (tree / "empty" / "b.bin").write_bytes(bytes(range(256)))
    check(m3("ask", "empty", "What?"), 3, "There is no text to read in empty: left out were 2 binary.")


def test_an_unreadable_file(m3: Run, tree: Path) -> None:
    """A file that the system will not give us is named with the system's words."""
    check(m3("ask", "/proc/self/mem", "What?"), 3, "/proc/self/mem", os.strerror(5))


def test_a_binary_file(m3: Run, tree: Path) -> None:
    """A file that is no text says what it is."""
    (tree / "b.bin").write_bytes(bytes(range(256)))
    check(m3("ask", "b.bin", "What?"), 3, "b.bin", "binary")


@pytest.mark.parametrize("question", ["", "   ", "\t\n"])
def test_a_blank_question(m3: Run, tree: Path, question: str) -> None:
    """A question of blanks is refused before anything is read."""
    check(m3("ask", "a.py", question), 2, "The question is blank.")


def test_a_forgotten_question_or_path(m3: Run, tree: Path) -> None:
    """The message says which of the two is missing."""
    check(m3("ask", "a.py"), 2, "There is a path, a.py, but no question.")
    check(m3("ask", "What is x?"), 2, "There is a question, but nothing to read.")
    check(m3("ask", "What is x?", "a.py"), 2, "The last argument, a.py, is a path")


def test_a_model_cut_in_half(m3: Run, tree: Path) -> None:
    """A truncated download is told from a whole file before llama.cpp sees it."""
    demo = demo_model()
    assert demo
    data = demo.path.read_bytes()
    (tree / "half.gguf").write_bytes(data[: len(data) // 2])
    check(m3("ask", "a.py", "What?", "--model", "half.gguf"), 3, "half.gguf", f"{len(data) // 2:,}")
    (tree / "stub.gguf").write_bytes(data[:5000])
    check(m3("ask", "a.py", "What?", "--model", "stub.gguf"), 3, "stub.gguf")


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"PK\x03\x04rest", b"version https://git-lfs.github.com/spec/v1\n", b"<html>" * 99],
)
def test_a_file_that_is_no_gguf(m3: Run, tree: Path, content: bytes) -> None:
    """A file of another kind is named as such."""
    (tree / "not.gguf").write_bytes(content)
    check(m3("ask", "a.py", "What?", "--model", "not.gguf"), 3, "not.gguf")


def test_an_unsupported_architecture(m3: Run, tree: Path) -> None:
    """A model that this llama.cpp does not know is named with its architecture."""
    keys = {key.replace("llama.", "llama99."): value for key, value in LLAMA_KEYS.items()}
    tensors = {"token_embd.weight": np.zeros((8, 64), np.float32)}
    write_gguf(tree / "new.gguf", keys, tensors, arch="llama99")
    check(m3("ask", "a.py", "What?", "--model", "new.gguf"), 3, "llama99")


def test_an_unknown_model_name(m3: Run, tree: Path) -> None:
    """A name that stands for nothing gets the nearest names."""
    check(m3("ask", "a.py", "What?", "--model", "dem"), 3, "There is no model file or alias 'dem'.", "demo")


def test_a_context_too_small_for_the_question(m3: Run, tree: Path) -> None:
    """The numbers of window, question and answer are in the message."""
    check(m3("ask", "a.py", "What is x? " * 40, "--ctx", "128"), 3, "A context of 128 tokens is too small")


def test_a_context_larger_than_the_model_has(m3: Run, tree: Path) -> None:
    """Both numbers are in the message."""
    check(m3("ask", "a.py", "What is x?", "--ctx", "9000"), 3, "9,000 tokens was asked for", "8,192")


def test_a_broken_settings_file(m3: Run, tree: Path, environ: dict[str, str]) -> None:
    """The file is named."""
    Path(environ["M3_CONFIG"]).write_text("ctx = \n")
    check(m3("ask", "a.py", "What is x?"), 2, "config.toml is not valid TOML")


def test_standard_input_twice(m3: Run, tree: Path) -> None:
    """Standard input is one thing only."""
    check(m3("ask", "-", "--files-from", "-", "What?"), 2, "Standard input cannot be both")


def test_debug_shows_the_traceback(m3: Run, tree: Path) -> None:
    """--debug anywhere on the line gives the traceback that is otherwise kept away."""
    done = m3("ask", "nowhere", "What?", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "UsageError" in done.stderr


def test_an_output_that_cannot_be_written(m3: Run, tree: Path) -> None:
    """A pack that has no place to go is an error, and leaves nothing behind."""
    check(m3("pack", "a.py", "-o", "nowhere/out.xml"), 3, "nowhere/out.xml cannot be written")
    assert sorted(p.name for p in tree.iterdir() if p.name != "home") == ["a.py", "empty"]


@pytest.mark.parametrize("question", ["Что это такое? " * 20, "漢" * 120, "why? " * 100])
def test_a_question_longer_than_a_path_may_be(m3: Run, tree: Path, question: str) -> None:
    """A long question is a question, in any script, also with its path forgotten."""
    check(m3("ask", question), 2, "There is a question, but nothing to read.")
    check(m3("ask", "nowhere", question), 2, "There is no file or directory nowhere.")


def test_git_s_own_data(m3: Run, tree: Path) -> None:
    """.git is not read, not even when it is named."""
    (tree / ".git").mkdir()
    (tree / ".git" / "config").write_text("[core]\n")
    check(m3("pack", ".git"), 2, "git's own data")
    check(m3("pack", ".git/config"), 2, "git's own data")


def test_closed_standard_streams(m3: Run, tree: Path, environ: dict[str, str]) -> None:
    """Without standard input it can still run; what needs it says so; a full disk is named."""
    run = partial(
        subprocess.run, shell=True, cwd=tree, env=environ, capture_output=True, text=True, check=False
    )
    assert run(f"{M3} pack a.py -q <&-").stdout.count("x = 1") == 1
    closed = run(f"{M3} pack - <&-")
    assert (closed.returncode, closed.stdout) == (2, "")
    assert "Standard input is closed." in closed.stderr
    full = run(f"{M3} pack a.py > /dev/full")
    assert full.returncode == 3
    assert os.strerror(28) in full.stderr
    assert run(f"{M3} pack a.py -q >&-").returncode == 0


def test_names_are_shown_as_they_are(m3: Run, tree: Path) -> None:
    """A name that spells an emoji code or markup is not turned into something else."""
    check(m3("pack", ":smile:[bold]x"), 2, "There is no file or directory :smile:[bold]x.")


def test_a_directory_that_is_gone(m3: Run, environ: dict[str, str], tree: Path) -> None:
    """From a deleted directory the message says that, and facts can still be had."""
    run = partial(
        subprocess.run, shell=True, cwd=tree, env=environ, capture_output=True, text=True, check=False
    )
    gone = "mkdir gone && cd gone && rmdir ../gone && "
    packed = run(f"{gone}{M3} pack {tree}/a.py")
    assert packed.returncode == 2
    assert "The current directory does not exist any more." in packed.stderr
    assert run(f"{gone}{M3} model list").returncode == 0
