"""`m3 eval`, as a person and as CI run it, with a real model."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import jsonschema
import pytest

from m3cli.report.eval_json import eval_schema
from tests.cli.conftest import M3

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli.conftest import Run

# Short ones: what is asked and how it is kept does not depend on the length.
SMALL = (
    "--tasks",
    "niah_multikey_2,meaning",
    "--lengths",
    "512",
    "--samples",
    "1",
    "--depths",
    "2",
    "--threads",
    "1",
)


def test_a_whole_evaluation(m3: Run, tmp_path: Path) -> None:
    """Tables on stdout, a page and a picture in files; the second run asks nothing and says the same."""
    first = m3("eval", *SMALL, "--report", "eval.html", "--plot", "eval.png")
    assert first.returncode == 0, first.stderr
    for words in ("Effective context", "retrieval", "meaning", "scores by depth and length", "512"):
        assert words in first.stdout
    assert (tmp_path / "eval.html").read_text("utf-8").startswith("<!DOCTYPE html>")
    assert (tmp_path / "eval.png").read_bytes().startswith(b"\x89PNG")
    again = m3("eval", *SMALL, "--json")
    assert again.returncode == 0, again.stderr
    result = json.loads(again.stdout)
    jsonschema.validate(result, eval_schema())
    asked = sum(len(run["outcomes"]) for run in result["runs"])
    assert f"{asked} questions" in again.stderr
    assert f"{asked} of them answered in earlier runs" in again.stderr
    assert " 0 tokens prefilled" in again.stderr


def test_the_whole_run_costs_little_more_than_its_longest_prefill(m3: Run, tmp_path: Path) -> None:
    """Tasks about code share a haystack, which the next length goes on from: only questions are read anew."""
    for number in range(40):
        limits = "".join(f"LIMIT_{number}_{i} = {1000 + 37 * number + i}\n" for i in range(4))
        (tmp_path / f"module_{number:02}.py").write_text(f"{limits}\n\ndef work_{number}(items):\n    pass\n")
    code = ("--tasks", "code_file,code_constant", "--lengths", "512,1k", "--samples", "1", "--depths", "2")
    done = m3("eval", ".", *code, "--threads", "1", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    (run,) = result["runs"]
    computed = [outcome["prompt_tokens"] - outcome["restored_tokens"] for outcome in run["outcomes"]]
    assert sum(computed) == result["computed_tokens"]
    assert len(computed) >= 4
    questions = sum(tokens for tokens in computed if tokens < 128)
    assert sum(tokens < 128 for tokens in computed) == len(computed) - 2
    # A batch is computed as a whole, so what a length goes on from is cut back to one.
    assert result["computed_tokens"] - questions <= 1024 + 512


def test_the_gate_of_a_build(m3: Run) -> None:
    """An effective context below what is required is exit code 1; SmolLM2 does not use 512 tokens well."""
    done = m3("eval", *SMALL, "--require", "512")
    assert done.returncode == 1, done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--tasks", "juggling"), 2, "There is no task juggling."),
        (("--lengths", "long"), 2, "'long' of --lengths is no length"),
        (("--lengths", ","), 2, "--lengths names no length"),
        (("--kv", "q9"), 2, "'q9' is no type of KV cache"),
        (("--compare", "magic"), 2, "There is no mode magic."),
        (("--lengths", "1M"), 3, "the model has a context of 8,192"),
        (("--plot", "eval.txt"), 2, "named neither *.png nor *.svg"),
        (("--report", "no/such/eval.html"), 2, "There is no directory no/such"),
        (("nowhere",), 2, "nowhere"),
        (("--time-limit", "never"), 2, "'never' of --time-limit"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    m3: Run, arguments: tuple[str, ...], code: int, words: str
) -> None:
    """Before any work, with what to do instead."""
    done = m3("eval", *arguments)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_time_limit_is_a_cap(m3: Run) -> None:
    """What was measured until then is printed, with exit code 4."""
    done = m3("eval", *SMALL, "--time-limit", "1")
    assert done.returncode == 4, done.stderr
    assert "the time limit was reached" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_keeps_the_answers(environ: dict[str, str], tmp_path: Path, m3: Run) -> None:
    """Exit code 130, what was measured is printed, and the same command goes on from there."""
    process = subprocess.Popen(
        [M3, "eval", *SMALL, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=environ,
    )
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in (tmp_path / "home").rglob("*.jsonl")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "the answers so far are kept" in stderr
    kept = sum(len(run["outcomes"]) for run in json.loads(stdout)["runs"])
    assert kept >= 1
    again = json.loads(m3("eval", *SMALL, "--json").stdout)
    assert again["known_answers"] >= kept
    assert again["complete"]
