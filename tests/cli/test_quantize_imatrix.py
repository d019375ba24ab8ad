"""`m3 quantize imatrix`: a matrix out of text, told to a person and to a program."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from quantize.importance import read_importance
from tests.cli.conftest import M3

if TYPE_CHECKING:
    from tests.cli.conftest import Run

README = str(Path(__file__).parents[2] / "README.md")


@pytest.fixture
def command(tiny_gguf: Path) -> list[str]:
    return [
        "quantize", "imatrix", str(tiny_gguf), "--data", README, "--out", "m3.imatrix.gguf",
        "--window", "32", "--threads", "1", "--no-sensitivity",
    ]  # fmt: skip


def test_a_matrix_is_computed(m3: Run, tmp_path: Path, command: list[str]) -> None:
    """Stdout has the name of the file, stderr how it went; a second run does not overwrite it."""
    done = m3(*command, "--windows", "3")
    assert (done.returncode, done.stdout) == (0, "m3.imatrix.gguf\n")
    assert "3 windows of 32 tokens, from a text of " in done.stderr
    assert "wrote m3.imatrix.gguf: " in done.stderr
    assert "note: 3 windows are few: with 50 or more" in done.stderr
    importance = read_importance(tmp_path / "m3.imatrix.gguf")
    assert (importance.datasets, importance.chunk_size, importance.chunk_count) == ((README,), 32, 3)
    assert importance.entries["blk.0.attn_q.weight"].counts.tolist() == [96]

    again = m3(*command, "--windows", "3", "--quiet")
    assert (again.returncode, again.stdout) == (2, "")
    assert "m3.imatrix.gguf already exists. Delete it" in " ".join(again.stderr.split())


def test_json_says_what_was_done(m3: Run, command: list[str]) -> None:
    done = m3(*command, "--windows", "2", "--json", "--quiet", "--output-tensor")
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert said["out"] == "m3.imatrix.gguf"
    assert (said["windows"], said["window"], said["tokens"], said["resumed"]) == (2, 32, 64, 0)
    assert said["text_tokens"] > 1000
    assert "few" in said["advice"]
    for unused in said["unused"]:
        assert set(unused) == {"layer", "experts", "total"}


def test_an_interrupted_run_is_resumed(
    m3: Run, tmp_path: Path, environ: dict[str, str], command: list[str]
) -> None:
    """After Ctrl-C the exit code is 130, nothing is lost, and the same command with --resume ends it."""
    process = subprocess.Popen(
        [M3, *command, "--save-every", "1s"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environ,
        start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    assert any("model loaded" in line for line in lines)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert "the same command with --resume goes on from here" in stderr
    assert not (tmp_path / "m3.imatrix.gguf").exists()

    refused = m3(*command)
    assert refused.returncode == 2
    assert "Continue it with --resume" in refused.stderr
    done = m3(*command, "--resume", "--json")
    assert done.returncode == 0
    said = json.loads(done.stdout)
    assert 1 <= said["resumed"] < said["windows"]
    assert f"resuming after {said['resumed']:,} window" in done.stderr
    assert read_importance(tmp_path / "m3.imatrix.gguf").chunk_count == said["windows"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.gguf", "--data", README], "There is no model file or alias 'nothing.gguf'."),
        (["demo", "--data", "nowhere"], "nowhere"),
        (
            ["demo", "--data", README, "--save-every", "often"],
            "The value 'often' of --save-every is",
        ),
        (["demo", "--data", README, "--window", "8"], "A window of 8 tokens cannot be taken"),
    ],
)
def test_wrong_input_is_told(m3: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    """One sentence and a hint, and no file."""
    done = m3("quantize", "imatrix", *arguments, "--out", "out.gguf")
    assert done.returncode in (2, 3)
    assert done.stdout == ""
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.gguf").exists()


def test_help_has_an_example(m3: Run) -> None:
    done = m3("quantize", "imatrix", "--help")
    assert done.returncode == 0
    assert "m3 quantize imatrix" in done.stdout.split("Example:", 1)[1]
