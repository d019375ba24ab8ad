"""`--update`: contexts that are brought up to date after edits, exactly or in place, through the commands."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from m3cli.cli import values
from m3cli.corpus.corpus import read_corpus
from m3cli.errors import ExitCode
from m3cli.report.ask_json import ask_schema
from m3cli.tasks.context import Context
from tests.cli.conftest import M3
from tests.git_repositories import commit, make_repository
from tests.serve.servers import environ_of, serving

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.cli.conftest import Run

QUESTION = "What is the secret number?"
SERVED = "note: the m3 server at {} answers"
SAID = "of what this context was computed from has changed since"


def rules(topic: str, count: int, first: int = 1) -> str:
    """Lines of a little more than 20 tokens each."""
    numbers = range(first, first + count)
    return "".join(f"Rule {i} of the {topic}: number {i * 7} goes before number {i * 9}.\n" for i in numbers)


FILES = {f"{topic}.md": rules(topic, 5) for topic in ("bread", "rivers", "stars", "trains")}
EDIT = ("Rule 3 of the rivers:", "The secret number of the rivers is 4711:")


def set_up(tree: Path) -> None:
    """Make `tree` hold FILES and nothing else."""
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir()
    for name, text in FILES.items():
        (tree / name).write_text(text)


def edit(tree: Path, old: str = EDIT[0], new: str = EDIT[1]) -> None:
    """Change one line in the middle."""
    text = (tree / "rivers.md").read_text()
    assert old in text
    (tree / "rivers.md").write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def warmed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """A tree, the home of a cache that holds its context, and how many tokens that has."""
    top = tmp_path_factory.mktemp("update")
    tree, home = top / "tree", top / "home"
    set_up(tree)
    done = subprocess.run(
        [M3, "warm", str(tree), "--json"], env=environ_of(home), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return tree, home, json.loads(done.stdout)["tokens"]


@pytest.fixture
def tree(warmed: tuple[Path, Path, int]) -> Path:
    """The tree as it was warmed; its place is part of what a saved context is known by."""
    set_up(warmed[0])
    return warmed[0]


@pytest.fixture
def environ(warmed: tuple[Path, Path, int], tmp_path: Path) -> dict[str, str]:
    """An environment with a warm cache of its own."""
    home = tmp_path / "home"
    shutil.copytree(warmed[1] / "cache", home / "cache")
    return environ_of(home)


def object_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What a command prints that answers, or answers up to the cap."""
    assert done.returncode in (ExitCode.DONE, ExitCode.CAP_REACHED), done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture
def ask(m3: Run, tree: Path) -> Any:
    """`ask(*options)`: the object of an answer about the tree, and stderr."""

    def run(*options: str, **environ: str) -> tuple[dict[str, Any], str]:
        done = m3("ask", str(tree), QUESTION, "--max-tokens", "8", "--json", *options, **environ)
        found = object_of(done)
        jsonschema.validate(found, ask_schema())
        assert found["answer"]
        return found, done.stderr

    return run


def entries(m3: Run) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(m3("cache", "list", "--json").stdout)["entries"]
    return found


# An edit, and what is done about it


def test_an_edit_is_updated_as_it_is_asked_for(m3: Run, tree: Path, ask: Any, tmp_path: Path) -> None:
    """In place computes about the edit and says so; else the answer is that of a run that knows nothing."""
    edit(tree)
    found, stderr = ask("--update", "inplace")
    usage = found["usage"]
    assert usage["prompt_tokens"] > usage["restored_tokens"] > usage["prompt_tokens"] * 2 / 3
    assert 0 < usage["staleness"] < 0.1
    assert "updated in place: 1 edit, " in stderr
    told = re.search(rf"^([\d.]+)% {SAID}$", stderr, re.MULTILINE)
    assert told is not None, stderr
    assert float(told[1]) / 100 == pytest.approx(usage["staleness"], rel=0.2)  # with question and answer
    assert [entry["staleness"] for entry in entries(m3)] == [0]  # so little is not worth another one

    auto, stderr = ask("--update", "auto")  # which would save less than 512 tokens
    assert auto["usage"]["staleness"] == auto["usage"]["restored_tokens"] == 0
    assert SAID not in stderr
    assert not any("updated" in warning for warning in auto["warnings"])
    exact, stderr = ask("--update", "exact")
    assert exact["usage"]["staleness"] == 0
    assert SAID not in stderr
    cold, _ = ask(M3_CACHE_DIR=str(tmp_path / "cold"))
    assert cold["usage"] == auto["usage"] == {**exact["usage"], "restored_tokens": 0}
    assert cold["answer"] == auto["answer"] == exact["answer"]
    assert [entry["staleness"] for entry in entries(m3)] == [0, 0]


def lines_come(tree: Path) -> None:
    (tree / "bread.md").write_text(rules("salt", 2) + FILES["bread.md"])


def file_goes(tree: Path) -> None:
    (
        tree / "rivers.md"
    ).unlink()  # what is left needs 512 tokens with an answer, and more than that was saved


def file_comes(tree: Path) -> None:
    (tree / "night.md").write_text(rules("night", 2))


def file_moves(tree: Path) -> None:
    (tree / "bread.md").rename(tree / "yeast.md")


@pytest.mark.parametrize("change", [lines_come, file_goes, file_comes, file_moves])
def test_whatever_has_changed(tree: Path, ask: Any, change: Callable[[Path], None]) -> None:
    """Lines and files come, go and move; what is behind is kept, and the answer comes."""
    change(tree)
    found, stderr = ask("--update", "inplace")
    usage = found["usage"]
    assert usage["restored_tokens"] > usage["prompt_tokens"] / 3
    assert 0 < usage["staleness"] < 0.5
    assert "updated in place: " in stderr


def test_a_context_that_is_too_large_now_is_kept(m3: Run, tiny_gguf: Path, tmp_path: Path) -> None:
    """It is whole, and serves whoever asks about all the files again; nobody is told that it is damaged."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("a.md", "b.md"):
        (tree / name).write_text(rules(name, 30))
    asked = ["ask", str(tree), QUESTION, "-m", str(tiny_gguf), "--max-tokens", "2", "--json"]
    warmed = m3("warm", str(tree), "-m", str(tiny_gguf), "--json")
    assert warmed.returncode == 0, warmed.stderr
    (tree / "b.md").unlink()
    fewer = object_of(m3(*asked))
    assert fewer["usage"]["prompt_tokens"] > 512  # of these a batch is shared
    assert fewer["usage"]["n_ctx"] < json.loads(warmed.stdout)["tokens"]
    assert not any("removed" in warning for warning in fewer["warnings"])
    assert json.loads(warmed.stdout)["tokens"] in [entry["tokens"] for entry in entries(m3)]


def test_another_spelling_of_a_path_is_the_same_tree(
    tree: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was saved of a tree is found wherever the command is typed, as it is without an edit."""
    monkeypatch.setenv("M3_CONFIG", environ["M3_CONFIG"])
    monkeypatch.setenv("M3_CACHE_DIR", environ["M3_CACHE_DIR"])
    monkeypatch.chdir(tree)
    labels = set()
    for path in (str(tree), ".", "../tree", "../tree/"):
        settings = values.settings({"update": "inplace"})
        corpus = values.corpus_request([path], settings, files_from=None, null=False, no_ignore=False)
        with Context(values.context_request(corpus, settings, allow_dense=False), lambda: b"") as context:
            labels.add(context.label)
    assert labels == {str(tree)}


# What is saved of it


def test_an_update_is_saved_until_it_is_made_exact(
    m3: Run, tree: Path, ask: Any, warmed: tuple[Path, Path, int]
) -> None:
    """It is listed as stale, and the next one goes on from it; warm --exact takes its place for asks."""
    quarries = tree / "quarries.md"
    quarries.write_text(rules("quarries", 10))  # to compute more than 256 tokens
    first, stderr = ask("--update", "inplace")
    assert "updated in place: " in stderr
    stale, exact = sorted(entries(m3), key=lambda entry: -entry["staleness"])
    assert stale["staleness"] == pytest.approx(first["usage"]["staleness"], rel=0.2)
    assert (exact["staleness"], exact["tokens"]) == (0, warmed[2])
    rows = m3("cache", "list").stdout.splitlines()
    assert re.search(r"\bstale\b", rows[0])
    shown = {row.split()[0]: re.findall(r"(\d+\.\d)%", row) for row in rows if str(tree) in row}
    assert shown[exact["id"][:12]] == []
    assert [float(number) / 100 for number in shown[stale["id"][:12]]] == [
        pytest.approx(stale["staleness"], abs=0.0006)
    ]

    quarries.write_text(rules("quarries", 10).replace("Rule 5", "Law 5"))
    second, stderr = ask(M3_UPDATE="inplace")  # a setting as the flag
    assert "updated in place: 1 edit, " in stderr
    assert second["usage"]["restored_tokens"] > warmed[2]
    assert second["usage"]["staleness"] > first["usage"]["staleness"]

    quarries.write_text(rules("quarries", 10))
    again, stderr = ask("--update", "inplace")
    assert again["usage"]["restored_tokens"] == stale["tokens"]
    assert "updated in place" not in stderr
    assert SAID in stderr
    done = m3("warm", str(tree), "--exact", "--json", M3_UPDATE="inplace")
    anew = json.loads(done.stdout)
    assert (anew["tokens"], anew["staleness"]) == (stale["tokens"], 0)
    assert anew["restored_tokens"] < anew["tokens"]
    found, stderr = ask("--update", "inplace")
    assert (found["usage"]["staleness"], found["usage"]["restored_tokens"]) == (0, anew["tokens"])
    assert SAID not in stderr

    same = [entry["staleness"] for entry in entries(m3) if entry["id"] == stale["id"]]
    assert sorted(map(bool, same)) == [False, True]
    assert m3("cache", "rm", stale["id"][:12]).returncode == 0
    assert [entry["id"] for entry in entries(m3)] == [exact["id"]]


def test_what_is_warmed_exactly_is_what_updates_ask_for(m3: Run, tmp_path: Path) -> None:
    """Who has set `update` to inplace asks for files in path order, and warm --exact computes them in it."""
    top = make_repository(tmp_path / "top", {"a.md": rules("ants", 4), "b.md": rules("bees", 4)})
    commit(top, {"a.md": rules("apes", 4)})  # by churn it would be the last
    setting = {"M3_UPDATE": "inplace"}
    exact = m3("warm", ".", "--exact", "--json", cwd=top, **setting)
    assert exact.returncode == 0, exact.stderr
    again = json.loads(m3("warm", ".", "--json", cwd=top, **setting).stdout)
    assert (again["staleness"], again["restored_tokens"]) == (0, again["tokens"])


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({}, "b.md"),
        ({"update": "exact"}, "b.md"),
        ({"update": "inplace"}, "a.md"),
        ({"update": "auto"}, "b.md"),
        ({"update": "inplace", "order": "churn"}, "b.md"),
    ],
)
def test_files_that_are_updated_stay_in_their_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], first: str
) -> None:
    """By churn an edit moves a file, which updates in place would have to compute; any order can be named."""
    monkeypatch.setenv("M3_CONFIG", str(tmp_path / "none.toml"))
    top = make_repository(tmp_path / "top", {"a.md": "one\n", "b.md": "two\n"})
    commit(top, {"a.md": "three\n"})
    settings = values.settings(options)
    request = values.corpus_request(
        [str(top)], settings, files_from=None, null=False, no_ignore=False, order=values.order(settings)
    )
    assert read_corpus(request, lambda: b"").chunks[0].path == first


# Conversations and servers


def test_a_conversation_is_updated_once(m3: Run, tree: Path) -> None:
    """Before the first answer; what later questions find is up to date, and not told of again."""
    edit(tree)
    done = m3(
        "chat", str(tree), "--update", "inplace", "--max-tokens", "6", stdin=f"{QUESTION}\nWhat else?\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert done.stderr.count("updated in place: ") == 1
    assert done.stderr.count(SAID) == 1
    assert done.stderr.count("wrote ") == 2


def test_a_server_updates_for_those_who_ask_for_it(
    tree: Path, ask: Any, environ: dict[str, str], warmed: tuple[Path, Path, int]
) -> None:
    """It updates in place and computes exactly, as each command says; one without updates is passed over."""
    with serving(str(tree), "--update", "inplace", environ=environ) as server:
        edit(tree)
        found, stderr = ask("--update", "inplace")
        assert SERVED.format(server.root) in stderr
        assert found["usage"]["staleness"] > 0
        assert "updated in place: 1 edit, " in stderr
        set_up(tree)
        exact, stderr = ask("--update", "exact")
        assert SERVED.format(server.root) in stderr
        assert exact["usage"]["staleness"] == 0
        assert exact["usage"]["restored_tokens"] == warmed[2]  # from the disk
        assert SAID not in stderr
        assert server.stop() == 0
        assert "error" not in server.stderr
    with serving(environ=environ) as server:
        edit(tree, "Rule 4", "Law 4")
        found, stderr = ask("--update", "inplace")
        assert "the m3 server at" not in stderr
        assert found["usage"]["staleness"] > 0
        assert server.answers() == 0


# What cannot be


@pytest.mark.parametrize("option", ["", "--kv-type"])
def test_what_cannot_be_updated_in_place_is_refused_or_exact(
    m3: Run, tiny_gguf: Path, tmp_path: Path, option: str
) -> None:
    """Exit 3 with the reason for who insists; for who leaves the choice, an answer with it as a note."""
    (tmp_path / "a.md").write_text("The secret number is 4711.\n")
    how = [option, "q8_0"] if option else ["-m", str(tiny_gguf)]
    words = "keys of type q8_0" if option else "sparse attention"
    asked = ["ask", "a.md", QUESTION, "--max-tokens", "2", "--json", *how]
    refused = m3(*asked, "--update", "inplace")
    assert (refused.returncode, refused.stdout) == (ExitCode.IMPOSSIBLE, "")
    assert words in refused.stderr
    assert "Leave out --update inplace" in refused.stderr
    left = m3(*asked, "--update", "auto")
    assert words in left.stderr
    found = object_of(left)
    assert any(words in warning for warning in found["warnings"])
    assert found["usage"]["staleness"] == 0


@pytest.mark.parametrize(
    ("arguments", "environ", "words"),
    [
        (("ask", "a.md", QUESTION, "--update", "sometimes"), {}, "'sometimes'"),
        (("warm", "a.md"), {"M3_UPDATE": "sometimes"}, "M3_UPDATE sets 'update' to 'sometimes'"),
        (
            ("ask", "a.md", QUESTION, "--endpoint", "http://127.0.0.1:1/v1", "--update", "inplace"),
            {},
            "it is not told --update.",
        ),
    ],
)
def test_what_contradicts_is_a_sentence(
    m3: Run, tmp_path: Path, arguments: tuple[str, ...], environ: dict[str, str], words: str
) -> None:
    """An update that there is not, two at once, or one where another machine decides, is not begun with."""
    (tmp_path / "a.md").write_text("The secret number is 4711.\n")
    done = m3(*arguments, cwd=tmp_path, **environ)
    assert (done.returncode, done.stdout) == (ExitCode.USAGE, "")
    assert words in " ".join(done.stderr.replace("│", " ").split())


def test_a_project_does_not_decide_about_truth(m3: Run, tmp_path: Path) -> None:
    """A repository that somebody else has written may not have contexts updated in place."""
    (tmp_path / ".m3.toml").write_text('update = "inplace"\n')
    (tmp_path / "a.md").write_text("The secret number is 4711.\n")
    for command in (["ask", "a.md", QUESTION], ["warm", "a.md"]):
        done = m3(*command, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (ExitCode.USAGE, "")
        assert "sets 'update', which a project file may not" in done.stderr
