"""From a MiniMax-M3 checkpoint to an answer, through the commands."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

import jsonschema
import pytest

from m3cli.errors import ExitCode
from m3cli.report.ask_json import ask_schema

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli.conftest import Run

NOT_RUN_THAT_WAY = "needs its sparse attention"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A file of more tokens than the tiny model attends."""
    lines = "".join(f"def function_{i}():\n    return {i}\n" for i in range(40))
    (tmp_path / "code.py").write_text(lines)
    return tmp_path


def test_from_checkpoint_to_answer(m3: Run, tiny_m3: Path, tree: Path) -> None:
    """Plan, convert into three files, look inside, ask: stdout holds the result and nothing else."""
    asked = ["quantize", "convert", str(tiny_m3), "--out", "tiny.gguf", "--split-max-size", "6M"]
    planned = m3(*asked, "--dry-run", "--json")
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    assert (plan["written"], plan["skipped"], plan["license"]) == (None, {"vision": 27}, "minimax-community")
    assert not list(tree.glob("*.gguf*"))
    table = m3(*asked, "--dry-run").stdout
    for fact in ("27 vision tensors", "minimax-community", "tiny-00003-of-00003.gguf", "free there"):
        assert fact in table

    done = m3(*asked)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "tiny-00001-of-00003.gguf\n"
    assert sorted(path.name for path in tree.glob("*.gguf*")) == [file["name"] for file in plan["files"]]
    assert sum(path.stat().st_size for path in tree.glob("*.gguf")) == plan["total_bytes"]

    info = m3("model", "info", "tiny-00001-of-00003.gguf")
    for fact in ("4 (1 dense, 3 sparse)", "8, of which a token uses 2, and 1 shared", "minimax-community"):
        assert fact in info.stdout
    assert "a query attends 64 tokens, the top 4 blocks of 16" in info.stdout

    answer = m3("ask", "code.py", "What?", "-m", "tiny-00001-of-00003.gguf", "--max-tokens", "8", "--json")
    assert answer.returncode in (ExitCode.DONE, ExitCode.CAP_REACHED), answer.stderr
    result = json.loads(answer.stdout)
    jsonschema.validate(result, ask_schema())
    assert result["model"]["architecture"] == "minimax-m3"
    assert result["usage"]["prompt_tokens"] > 64
    assert not any("dense" in warning for warning in result["warnings"])
    second = m3("ask", "code.py", "What?", "-m", "tiny-00002-of-00003.gguf", "--max-tokens", "8", "--json")
    assert json.loads(second.stdout)["answer"] == result["answer"]


def test_dense_attention_is_an_error_or_a_warning(m3: Run, tiny_gguf: Path, tree: Path) -> None:
    """Exit 3 and what to do, or, with --allow-dense, an answer with a warning in both outputs."""
    asked = ["ask", "code.py", "What?", "-m", str(tiny_gguf), "--max-tokens", "2", "--flash-attention", "off"]
    refused = m3(*asked)
    assert (refused.returncode, refused.stdout) == (ExitCode.IMPOSSIBLE, "")
    assert NOT_RUN_THAT_WAY in refused.stderr
    assert "--allow-dense" in refused.stderr
    allowed = m3(*asked, "--allow-dense", "--json")
    assert allowed.returncode in (ExitCode.DONE, ExitCode.CAP_REACHED), allowed.stderr
    assert "runs with dense attention" in allowed.stderr
    assert any("dense attention" in warning for warning in json.loads(allowed.stdout)["warnings"])


def test_thinking_modes_are_taken(m3: Run, tiny_gguf: Path, tree: Path) -> None:
    """M3's template has the switch, so no mode is answered with a note; off is what ask does by itself."""
    asked = ["ask", "code.py", "What?", "-m", str(tiny_gguf), "--max-tokens", "2", "--json"]
    answers = {}
    for mode in ("off", "on", "adaptive"):
        done = m3(*asked, "--think", mode)
        assert "no switch" not in done.stderr
        answers[mode] = json.loads(done.stdout)
    # 'on' leaves the model in its reasoning, which is no part of the answer
    assert answers["on"]["answer"] != answers["off"]["answer"]
    silent = json.loads(m3(*asked).stdout)
    assert silent["answer"] == answers["off"]["answer"]
    assert silent["usage"]["prompt_tokens"] == answers["off"]["usage"]["prompt_tokens"]


def test_wrong_input_is_a_sentence(m3: Run, tiny_m3: Path, tree: Path) -> None:
    """What, where, what to do; and the exit code of its kind."""
    convert = ["quantize", "convert"]
    cases = [
        ([str(tree / "nothing"), "-o", "m.gguf"], ExitCode.IMPOSSIBLE, "no config.json in"),
        ([str(tree / "code.py"), "-o", "m.gguf"], ExitCode.IMPOSSIBLE, "code.py"),
        ([str(tree), "-o", "m.gguf"], ExitCode.IMPOSSIBLE, "no config.json in"),
        ([str(tiny_m3), "-o", "m.bin"], ExitCode.USAGE, "not named *.gguf"),
        ([str(tiny_m3), "-o", "no/m.gguf"], ExitCode.USAGE, "no directory no"),
        ([str(tiny_m3), "-o", "m.gguf", "--split-max-size", "much"], ExitCode.USAGE, "'much'"),
        ([str(tiny_m3), "-o", "m.gguf", "--split-max-size", "0G"], ExitCode.USAGE, "'0G'"),
        ([str(tiny_m3), "-o", "m.gguf", "--type", "q4_0"], ExitCode.USAGE, "q4_0"),
        ([str(tiny_m3)], ExitCode.USAGE, "--out"),
    ]
    for arguments, code, words in cases:
        done = m3(*convert, *arguments)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert words in done.stderr
        assert "Traceback" not in done.stderr
    assert not list(tree.glob("m.*"))


def test_quiet_says_nothing_but_the_result(m3: Run, tiny_m3: Path, tree: Path) -> None:
    """A pipeline gets the name of the file, and a second run is refused without harm."""
    done = m3("quantize", "convert", str(tiny_m3), "--out", "m.gguf", "--type", "q8_0", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "m.gguf\n", "")
    before = (tree / "m.gguf").read_bytes()
    again = m3("quantize", "convert", str(tiny_m3), "--out", "m.gguf", "--quiet")
    assert (again.returncode, again.stdout) == (ExitCode.USAGE, "")
    assert "m.gguf already exists" in again.stderr
    assert (tree / "m.gguf").read_bytes() == before


@pytest.mark.parametrize("package", ["torch", "safetensors", "gguf"])
def test_a_missing_package_is_named(m3: Run, tiny_m3: Path, tmp_path: Path, package: str) -> None:
    """Without the quantize extra, the command says what to install."""
    missing = tmp_path / "path" / package
    missing.mkdir(parents=True)
    (missing / "__init__.py").write_text(f"raise ModuleNotFoundError('gone', name={package!r})\n")
    environment = os.pathsep.join([str(missing.parent), *filter(None, sys.path)])
    done = m3("quantize", "convert", str(tiny_m3), "--out", "m.gguf", PYTHONPATH=environment)
    assert (done.returncode, done.stdout) == (ExitCode.IMPOSSIBLE, "")
    assert f"a package that is not installed: {package}." in done.stderr
    assert "pip install 'm3cli[quantize]'" in done.stderr
