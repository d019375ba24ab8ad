"""Whole stories with a real model: what a person types, what comes out where."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import jsonschema
import pytest

from m3cli.errors import ExitCode
from m3cli.report.ask_json import ask_schema

if TYPE_CHECKING:
    from tests.cli.conftest import Run

REPOSITORY = Path(__file__).parents[2]
ERRORS = str(REPOSITORY / "m3cli" / "errors.py")
SHORT = ["--max-tokens", "24", "--ctx", "1536"]


def test_json_is_one_documented_object(m3: Run) -> None:
    """`--json` prints nothing but the object that the schema describes, and counts add up."""
    done = m3(
        "ask",
        ERRORS,
        "Which exit code means a native crash?",
        "--json",
        "--ctx",
        "3072",
        "--max-tokens",
        "200",
    )
    answer = json.loads(done.stdout)
    jsonschema.validate(answer, ask_schema())
    assert done.returncode == (ExitCode.CAP_REACHED if answer["finish_reason"] == "length" else ExitCode.DONE)
    assert answer["answer"]
    assert answer["pack"]["files"] == 1
    assert answer["pack"]["tokens"] < answer["usage"]["prompt_tokens"]
    assert (
        answer["usage"]["prompt_tokens"] + answer["usage"]["generated_tokens"] <= answer["usage"]["n_ctx"] + 1
    )
    assert answer["model"]["architecture"] == "llama"
    assert answer["timings"]["prefill"] > 0
    assert "demo model" in done.stderr


def test_the_answer_alone_is_on_stdout(m3: Run, tmp_path: Path) -> None:
    """Without --json, stdout holds the answer and its sources, stderr the rest; --quiet silences that."""
    (tmp_path / "notes.txt").write_text("The launch code of the rocket is 4711.\n")
    loud = m3("ask", "notes.txt", "What is the launch code?", *SHORT)
    quiet = m3("ask", "notes.txt", "What is the launch code?", *SHORT, "--quiet")
    assert loud.stdout == quiet.stdout
    assert loud.stdout.strip()
    assert "read 1 file" in loud.stderr
    assert "context: all of it" in loud.stderr
    assert quiet.stderr == ""


def test_a_diff_on_standard_input(m3: Run) -> None:
    """`git diff | m3 ask - "…"` answers about what came in."""
    diff = "--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n-timeout = 10\n+timeout = 30\n"
    done = m3("ask", "-", "Summarize this change in one sentence.", "--json", *SHORT, stdin=diff)
    answer = json.loads(done.stdout)
    assert answer["pack"]["files"] == 1
    assert answer["answer"]


def test_two_runs_agree(m3: Run, tmp_path: Path) -> None:
    """Greedy by default: the same question on the same files gives the same answer."""
    (tmp_path / "a.py").write_text("def area(r):\n    return 3.14159 * r * r\n")
    first, second = (
        json.loads(m3("ask", "a.py", "What does it do?", "--json", *SHORT).stdout) for _ in range(2)
    )
    assert first["answer"] == second["answer"]


def test_what_does_not_fit_is_selected_and_reported(m3: Run, tmp_path: Path) -> None:
    """Over the context, the relevant file is read, and the others are listed as left out."""
    for i in range(12):
        (tmp_path / f"module{i}.py").write_text(f"def helper_{i}(value):\n    return value + {i}\n" * 30)
    (tmp_path / "retry.py").write_text(
        "def retry(call):\n    '''Retry a call three times.'''\n    return call()\n"
    )
    done = m3("ask", ".", "where is the retry logic?", "--json", *SHORT, "--verbose")
    answer = json.loads(done.stdout)
    assert answer["pack"]["strategy"] == "select"
    assert "retry.py" not in {omission["path"] for omission in answer["pack"]["omitted"]}
    assert answer["pack"]["tokens_needed"] > 1536
    assert answer["pack"]["omitted"]
    assert "left out" in done.stderr
    omission = answer["pack"]["omitted"][0]
    assert f"left out {omission['path']}:{omission['start_line']}-{omission['end_line']}" in done.stderr

    whole = m3("ask", ".", "where is the retry logic?", "--strategy", "whole", *SHORT)
    assert whole.returncode == ExitCode.IMPOSSIBLE
    assert f"The whole corpus takes {answer['pack']['tokens_needed']:,} tokens" in whole.stderr
    assert whole.stdout == ""


def test_a_list_of_paths(m3: Run, tmp_path: Path) -> None:
    """`git ls-files -z | m3 ask --files-from - -0 "…"` reads exactly the listed files."""
    subprocess.run(["git", "init", "-q", str(tmp_path / "r")], check=True)
    for name in ("one.py", "two\nlines.py", "three.py"):
        (tmp_path / "r" / name).write_text("x = 1\n")
    done = m3(
        "ask", "--files-from", "-", "-0", "What is x?", "--json", *SHORT,
        stdin=b"one.py\0two\nlines.py\0", cwd=tmp_path / "r",
    )  # fmt: skip
    assert json.loads(done.stdout)["pack"]["files"] == 2


def test_a_list_may_name_what_is_gone_or_leads_out(m3: Run, tmp_path: Path) -> None:
    """Of a list such as git's, a deleted file and a link out of the tree are left out with a reason."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "one.py").write_text("x = 1\n")
    (tmp_path / "secret").write_text("y = 2\n")
    (tree / "link").symlink_to(tmp_path / "secret")
    done = m3(
        "pack", "--files-from", "-", "-v", "--format", "plain", stdin="one.py\ngone.py\nlink\n", cwd=tree
    )
    assert "x = 1" in done.stdout
    assert "y = 2" not in done.stdout
    assert "skipped gone.py: unreadable (does not exist)" in done.stderr
    assert "skipped link: link out of the tree or in a loop (leads out of the tree)" in done.stderr


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
def test_quantized_kv_caches(m3: Run, tmp_path: Path, kv_type: str) -> None:
    """A quantized KV cache answers too; without flash attention it is refused."""
    (tmp_path / "a.py").write_text("x = 1\n")
    assert m3("ask", "a.py", "What is x?", "--kv-type", kv_type, *SHORT).stdout.strip()
    refused = m3("ask", "a.py", "What is x?", "--kv-type", kv_type, "--flash-attention", "off")
    assert refused.returncode == ExitCode.USAGE
    assert "needs flash attention" in refused.stderr


def test_a_seed_makes_sampling_repeatable(m3: Run, tmp_path: Path) -> None:
    """With a temperature, one seed gives one answer, and another seed another."""
    (tmp_path / "a.py").write_text("x = 1\n")
    answers = [
        m3("ask", "a.py", "Tell a story about x.", "--temperature", "1.5", "--seed", seed, *SHORT).stdout
        for seed in ("1", "1", "2")
    ]
    assert answers[0] == answers[1] != answers[2]


def test_a_thinking_mode_that_the_model_cannot_take(m3: Run, tmp_path: Path) -> None:
    """Asked for by flag, environment or file, it is a note and a warning; the default says nothing."""
    (tmp_path / "a.py").write_text("x = 1\n")
    asked = ["ask", "a.py", "What is x?", "--max-tokens", "1", "--json"]
    silent = m3(*asked)
    config = tmp_path / "thinking.toml"
    config.write_text('think = "off"\n')
    for mode, done in (
        ("on", m3(*asked, "--think", "on")),
        ("adaptive", m3(*asked, M3_THINK="adaptive")),
        ("off", m3(*asked, M3_CONFIG=str(config))),
    ):
        note = f"Thinking '{mode}' was asked for, but the chat template of the model demo has no switch"
        assert f"note: {note}" in done.stderr
        assert json.loads(done.stdout)["warnings"][0].startswith(note)
        assert json.loads(done.stdout)["usage"] == json.loads(silent.stdout)["usage"]
    assert "Thinking" not in silent.stdout + silent.stderr


def test_there_are_three_thinking_modes(m3: Run, tmp_path: Path) -> None:
    """Another word, as a flag or from the environment, is a usage error that names the three."""
    (tmp_path / "a.py").write_text("x = 1\n")
    for done in (m3("ask", "a.py", "x?", "--think", "often"), m3("ask", "a.py", "x?", M3_THINK="often")):
        assert (done.returncode, done.stdout) == (ExitCode.USAGE, "")
        assert "often" in done.stderr
        assert all(mode in done.stderr for mode in ("off", "on", "adaptive"))
