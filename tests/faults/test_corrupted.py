"""Each file that m3 keeps is damaged in every way: it is done without, and answers are those of cold runs."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from m3cli.engine.workarounds import remember_extra_buffers_crash
from m3cli.errors import ExitCode
from tests.faults.conftest import TEXT
from tests.faults.drills import FINE, check, run_here
from tests.serve.servers import environ_of, serving

if TYPE_CHECKING:
    from collections.abc import Callable


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def noise(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "something").write_text("in it")


def link_to_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere/at-all")


DAMAGES: tuple[Callable[[Path], None], ...] = (truncate, empty, zeros, noise, directory, link_to_nowhere)
EVALUATION = (
    "eval",
    "--tasks",
    "niah_single_1",
    "--lengths",
    "1k",
    "--samples",
    "1",
    "--depths",
    "1",
    "--json",
)


@dataclass(frozen=True)
class Used:
    """A cache directory that all commands have used, the contexts of some trees in it, and what was said."""

    cache: Path
    trees: list[Path]
    answer: str
    evaluation: str


@pytest.fixture(scope="module")
def question(ask: tuple[str, ...]) -> tuple[str, ...]:
    return ask[2:]


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory, question: tuple[str, ...], tiny: str) -> Used:
    """Trees begin alike, so that the context of one serves the others for the most part."""
    place = tmp_path_factory.mktemp("used")
    environ = environ_of(place)
    trees = [place / f"tree{number}" for number in range(3)]
    for tree in trees:
        tree.mkdir()
        (tree / "text.txt").write_text(f"{TEXT}The end of {tree.name}.\n")
    cold = check(run_here("ask", str(trees[0]), *question, "--no-cache", environ=environ), *FINE).stdout
    for tree in trees:
        check(run_here("warm", str(tree), "-m", tiny, environ=environ), 0)
    assert check(run_here("ask", str(trees[0]), *question, environ=environ), *FINE).stdout == cold
    check(run_here("plan", str(trees[0]), "-m", tiny, environ=environ), 0)
    evaluated = json.loads(check(run_here(*EVALUATION, "-m", tiny, environ=environ), 0).stdout)
    with serving("-m", tiny, environ=environ) as server:
        server.process.kill()
    cache = Path(environ["M3_CACHE_DIR"])
    # Of a terminal, of a host on the network, of a machine whose processor lies.
    (cache / "chat-history").write_text("\n# 2026-01-01 00:00:00.000000\n+What is it?\n")
    (cache / "hosts").write_text("llm.example\n")
    remember_extra_buffers_crash(cache)
    return Used(cache, trees, cold, str(evaluated["runs"][0]["outcomes"][0]["reply"]))


def damaged(cache: Path, turn: int) -> dict[str, str]:
    """Damage every file, in another way with every turn; of a context one file, or it hides the others."""
    done = {}
    contexts: set[Path] = set()
    for number, path in enumerate(sorted(path for path in cache.rglob("*") if path.is_file())):
        if path.name in ("manifest.json", "tokens.bin", "state.bin"):
            names = sorted(each.name for each in path.parent.iterdir())
            contexts.add(path.parent)
            if path.name != names[len(contexts) % len(names)]:
                continue
        damage = DAMAGES[(number + turn) % len(DAMAGES)]
        damage(path)
        done[path.relative_to(cache).as_posix()] = damage.__name__
    return done


def test_everything_that_is_kept_is_damaged_here(used: Used, tmp_path: Path) -> None:
    """What the drill below does, each way of damage to each file at some turn."""
    seen: dict[str, set[str]] = {}
    for turn in range(len(DAMAGES)):
        copy = tmp_path / f"{turn}"
        shutil.copytree(used.cache, copy)
        for name, damage in damaged(copy, turn).items():
            seen.setdefault(Path(name).name, set()).add(damage)
    assert {"memo.sqlite", "manifest.json", "tokens.bin", "state.bin", "rates.json", "hosts"} <= seen.keys()
    assert len(seen) >= 11
    assert {len(damages) for damages in seen.values()} == {len(DAMAGES)}


@pytest.mark.parametrize("turn", range(len(DAMAGES)))
def test_damaged_files_are_done_without(
    environ: dict[str, str], used: Used, question: tuple[str, ...], tiny: str, turn: int
) -> None:
    """Commands work as without them, and what they keep then is whole; only an evaluation may refuse."""
    cache = Path(environ["M3_CACHE_DIR"])
    shutil.copytree(used.cache, cache)
    assert damaged(cache, turn)
    check(run_here("cache", "list", environ=environ), 0)
    check(run_here("plan", str(used.trees[0]), "-m", tiny, environ=environ), 0)
    restored = []
    for _ in range(2):
        asked = run_here("ask", str(used.trees[0]), *question, "--json", environ=environ)
        answer = json.loads(check(asked, *FINE).stdout)
        assert answer["answer"] == used.answer.strip()
        restored.append(answer["usage"]["restored_tokens"])
    assert restored[0] == 0 < restored[1]
    for tree in used.trees[1:]:
        check(run_here("warm", str(tree), "-m", tiny, environ=environ), 0)
    kept = json.loads(check(run_here("cache", "list", "--json", environ=environ), 0).stdout)["entries"]
    assert {entry["label"] for entry in kept} == set(map(str, used.trees))
    evaluated = check(run_here(*EVALUATION, "-m", tiny, environ=environ), 0, ExitCode.IMPOSSIBLE)
    if evaluated.returncode == 0:
        (outcome,) = json.loads(evaluated.stdout)["runs"][0]["outcomes"]
        assert outcome["reply"] == used.evaluation
    else:
        assert "The results cannot be kept in" in evaluated.stderr.replace("\n", " ")
    check(run_here("cache", "prune", environ=environ), 0)


@pytest.mark.parametrize("value", ["zeroblob(length(value))", "substr(value, 2)", "7", "'text'"])
def test_a_database_that_is_whole_and_holds_other_values(
    warmed: dict[str, str], ask: tuple[str, ...], cold: str, value: str
) -> None:
    """Token ids that were not put there are not taken for those of a text, nor speeds for measured ones."""
    with sqlite3.connect(Path(warmed["M3_CACHE_DIR"]) / "memo.sqlite") as database:
        assert database.execute(f"UPDATE memo SET value = {value}").rowcount > 0
    database.close()
    answer = json.loads(check(run_here(*ask, "--json", environ=warmed), *FINE).stdout)
    assert answer["answer"] == cold.strip()
    assert answer["usage"]["restored_tokens"] > 0


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_settings_are_named(
    environ: dict[str, str], used: Used, question: tuple[str, ...], damage: Callable[[Path], None]
) -> None:
    """A person wrote them: they are not passed over, but every command says which file it is."""
    path = Path(environ["M3_CONFIG"])
    path.write_text('seed = 7\nthink = "off"\n')
    damage(path)
    fine = damage in (empty, link_to_nowhere)
    for command in (("cache", "list"), ("ask", str(used.trees[0]), *question), ("plan",), ("doctor",)):
        done = run_here(*command, environ=environ)
        if fine:
            check(done, 0)
            break
        check(done, ExitCode.USAGE)
        assert str(path) in done.stderr.replace("\n", "")
    assert os.path.lexists(path)
