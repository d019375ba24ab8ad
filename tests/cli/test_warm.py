"""What is computed once is not computed again, whatever happens to the process, the disk or the files."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from m3cli.errors import ExitCode
from tests.cli.conftest import M3

if TYPE_CHECKING:
    from tests.cli.conftest import Run

KILLS = int(os.environ.get("M3_TEST_KILLS", "5"))
CODE = "".join(f"def function_{i}(value):\n    return value + {i}\n\n\n" for i in range(110))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory that the tiny M3 takes some seconds to read."""
    directory = tmp_path / "tree"
    directory.mkdir()
    (directory / "code.py").write_text(CODE)
    (directory / "last.py").write_text("LAST = 1\n")
    return directory


def answered(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode in (ExitCode.DONE, ExitCode.CAP_REACHED), done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture
def ask(m3: Run, tree: Path, tiny_gguf: Path) -> Any:
    """`ask(question, *more)`: the JSON of an answer about the tree."""

    def run(question: str = "What does function_7 return?", *more: str) -> dict[str, Any]:
        arguments = ["ask", str(tree), question, "-m", str(tiny_gguf), "--max-tokens", "12", "--json"]
        return answered(m3(*arguments, *more))

    return run


def entries(m3: Run) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(m3("cache", "list", "--json").stdout)["entries"]
    return found


def test_a_warm_question_says_what_was_restored(m3: Run, ask: Any, tree: Path, tiny_gguf: Path) -> None:
    """warm, then ask: only the question is read, and the answer is that of a run without a cache."""
    cold = ask("What does function_7 return?", "--no-cache")
    assert entries(m3) == []
    warmed = m3("warm", str(tree), "-m", str(tiny_gguf), "--json")
    assert warmed.returncode == 0, warmed.stderr
    result = json.loads(warmed.stdout)
    assert result["restored_tokens"] == 0
    (entry,) = entries(m3)
    assert (entry["tokens"], entry["label"]) == (result["tokens"], str(tree))
    again = m3("warm", str(tree), "-m", str(tiny_gguf))
    assert f"{result['tokens']:,} of them computed before" in again.stderr
    done = m3("ask", str(tree), "What does function_7 return?", "-m", str(tiny_gguf), "--max-tokens", "12")
    said = re.search(
        r"context: ([\d,]+) tokens, ([\d,]+) restored in [\d.]+ s, ([\d,]+) prefilled", done.stderr
    )
    assert said is not None, done.stderr
    total, restored, prefilled = (int(number.replace(",", "")) for number in said.groups())
    assert (total, restored) == (cold["usage"]["prompt_tokens"], result["tokens"])
    assert total == restored + prefilled
    assert ask()["answer"] == cold["answer"]
    assert len(entries(m3)) == 1


def test_an_edit_costs_its_tail(ask: Any, tree: Path) -> None:
    """A change at the end of the last file leaves almost everything; the answer is as without a cache."""
    ask()
    with (tree / "last.py").open("a") as file:
        file.write("MORE = 2\n")
    edited = ask()
    usage = edited["usage"]
    assert 0 < usage["prompt_tokens"] - usage["restored_tokens"] <= 512 + 100
    assert edited["answer"] == ask("What does function_7 return?", "--no-cache")["answer"]


def test_two_at_once_make_one_entry(
    m3: Run, ask: Any, tree: Path, tiny_gguf: Path, environ: dict[str, str]
) -> None:
    """Two processes that read the same tree at the same time both answer right, and save it once."""
    command = [M3, "ask", str(tree), "What?", "-m", str(tiny_gguf), "--max-tokens", "12", "--json"]
    running = [
        subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=200) for process in running]
    answers = [json.loads(stdout)["answer"] for stdout, _ in outputs]
    assert answers == [ask("What?", "--no-cache")["answer"]] * 2
    assert len(entries(m3)) == 1
    assert all("Traceback" not in stderr for _, stderr in outputs)


def test_kill_9_at_any_moment(
    m3: Run, ask: Any, tree: Path, tiny_gguf: Path, environ: dict[str, str]
) -> None:
    """After each kill the next start goes on from a checkpoint or from nothing, and never fails."""
    cold = ask("What?", "--no-cache")
    chance = random.Random(0)
    for _ in range(KILLS):
        process = subprocess.Popen(
            [M3, "warm", str(tree), "-m", str(tiny_gguf), "--checkpoint-every", "1s"],
            env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(chance.uniform(0.3, 4))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the worker too
        _, stderr = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), stderr
        assert "error" not in stderr
        if process.returncode == 0:  # it was faster; begin again from nothing
            assert len(entries(m3)) == 1
            shutil.rmtree(environ["M3_CACHE_DIR"])
    assert ask("What?")["answer"] == cold["answer"]
    assert [entry["label"] for entry in entries(m3)] == [str(tree)]
    assert m3("cache", "prune").returncode == 0
    assert not list((tree.parent / "home").rglob("*.partial"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_what_is_read(
    m3: Run, ask: Any, tree: Path, tiny_gguf: Path, environ: dict[str, str], number: int
) -> None:
    """Ctrl-C and SIGTERM end with 130 and say what is kept; the next run goes on there."""
    (tree / "code.py").write_text(CODE * 2)
    process = subprocess.Popen(
        [M3, "warm", str(tree), "-m", str(tiny_gguf), "--checkpoint-every", "1s", "--verbose"],
        env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    heard = next(line for line in process.stderr if "saved" in line)  # the first checkpoint
    process.send_signal(number)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == ExitCode.INTERRUPTED, heard + rest
    assert "tokens are saved for the next run" in rest
    assert "Traceback" not in rest
    (entry,) = entries(m3)
    if number == signal.SIGTERM:
        return  # what is kept is the same
    resumed = m3("warm", str(tree), "-m", str(tiny_gguf), "--json")
    assert json.loads(resumed.stdout)["restored_tokens"] == entry["tokens"]
    answer = ask("What?")
    assert answer["usage"]["restored_tokens"] == json.loads(resumed.stdout)["tokens"]
    assert answer["answer"] == ask("What?", "--no-cache")["answer"]


def test_the_cache_can_be_looked_at_and_emptied(
    m3: Run, ask: Any, tree: Path, environ: dict[str, str]
) -> None:
    """list, rm, prune and path do what they say; a wrong id removes nothing."""
    ask()
    (entry,) = entries(m3)
    listed = m3("cache", "list").stdout
    assert entry["id"][:12] in listed
    assert str(tree) in listed.replace("\n", "")
    assert m3("cache", "path").stdout.strip() == environ["M3_CACHE_DIR"]
    for wrong in (["zzz"], [], ["--all", entry["id"]]):
        assert m3("cache", "rm", *wrong).returncode == ExitCode.USAGE
    assert len(entries(m3)) == 1
    assert m3("cache", "rm", entry["id"][:8]).returncode == 0
    assert entries(m3) == []
    ask()
    pruned = m3("cache", "prune", "--max-size", "1K")
    assert "removed 1 saved context" in pruned.stderr
    assert entries(m3) == []


def test_a_git_ref_is_the_same_context(m3: Run, tree: Path, tiny_gguf: Path, environ: dict[str, str]) -> None:
    """Warming a commit serves a question about the clean work tree, and leaves the work tree alone."""
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "1"]):
        subprocess.run([*git, *arguments], cwd=tree, check=True)
    (tree / "last.py").write_text("CHANGED = 1\n")
    warmed = m3("warm", ".", "--ref", "HEAD", "-m", str(tiny_gguf), "--json", cwd=tree)
    assert warmed.returncode == 0, warmed.stderr
    assert (tree / "last.py").read_text() == "CHANGED = 1\n"
    subprocess.run([*git, "checkout", "-q", "."], cwd=tree, check=True)
    # So small a model computes about as fast as it is restored, which depends on what else runs.
    rates = Path(environ["M3_CACHE_DIR"], "snapshots", "v1", "rates.json")
    rates.write_text('{"load_bytes_per_second": 1e12}')
    asked = m3("ask", ".", "What?", "-m", str(tiny_gguf), "--max-tokens", "2", "--json", cwd=tree)
    assert answered(asked)["usage"]["restored_tokens"] == json.loads(warmed.stdout)["tokens"]
    missing = m3("warm", ".", "--ref", "--output=x", "-m", str(tiny_gguf), cwd=tree)
    assert missing.returncode == ExitCode.USAGE


def test_a_full_disk_costs_a_warning(
    m3: Run, tree: Path, tiny_gguf: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    """The answer comes, with a warning, and nothing is left of the attempt."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        # A limit of its own, or it would see before it writes that there is no room.
        code = "from m3cli.engine import snapshots\nsnapshots._KEPT_FREE = -(1 << 40)\n"
        (tmp_path / "sitecustomize.py").write_text(code)
        for more in ({}, {"PYTHONPATH": str(tmp_path), "M3_CACHE_SIZE": str(1 << 40)}):
            done = m3(
                "ask", str(tree), "What?", "-m", str(tiny_gguf), "--max-tokens", "4", "--json",
                **{"M3_CACHE_DIR": str(disk), **more},
            )  # fmt: skip
            warnings = answered(done)["warnings"]
            assert any("is not saved for later" in warning for warning in warnings), warnings
            assert not [path for path in disk.rglob("*") if path.name in ("state.bin", "manifest.json")]
            assert not list(disk.rglob("*.partial"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_chat_answers_lines_of_standard_input(m3: Run, tree: Path, tiny_gguf: Path) -> None:
    """Each line is a question; answers go to stdout, the second one reads only what is new."""
    lines = "What is it?\nAnd why?\n/files\n"
    done = m3("chat", str(tree), "-m", str(tiny_gguf), "--max-tokens", "6", stdin=lines)
    assert done.returncode == 0, done.stderr
    restored = re.findall(r"context: [\d,]+ tokens, ([\d,]+) restored", done.stderr)
    assert len(restored) == 1
    assert "code.py" in done.stderr
    assert len(done.stdout.strip()) > 0
    assert m3("chat", "-", stdin="x").returncode == ExitCode.USAGE


def test_warming_without_a_cache_is_a_contradiction(m3: Run, tree: Path) -> None:
    """What does not fit whole cannot be warmed either: the excerpts depend on the question."""
    done = m3("warm", str(tree), "--ctx", "600")
    assert done.returncode == ExitCode.IMPOSSIBLE
    assert "The whole corpus takes" in done.stderr
    begun = time.monotonic()
    assert m3("warm", str(tree), "--checkpoint-every", "soon").returncode == ExitCode.USAGE
    assert time.monotonic() - begun < 60
