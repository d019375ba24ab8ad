"""`m3 review` as a build runs it: a real repository, the real demo model, exit codes and files."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.git_repositories import commit, git, head, make_repository, write

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli.conftest import Run

OLD = "def read(path):\n    with open(path) as file:\n        return file.read()\n"
NEW = "def read(path):\n    file = open(path)\n    return file.read()\n"
SHORT = ("--max-tokens", "160", "--ctx", "4096", "--threads", "1")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository whose work tree has a change."""
    top = make_repository(tmp_path / "tree", {"reader.py": OLD, "other.py": "value = 1\n" * 30})
    write(top, {"reader.py": NEW})
    return top


def test_two_runs_say_the_same(m3: Run, tree: Path, tmp_path: Path) -> None:
    """Every format goes into its file, byte for byte the same in two runs, timings aside."""
    formats = ("json", "sarif", "rdjson", "rdjsonl", "gitlab", "github", "markdown")
    written: list[dict[str, bytes]] = []
    for number in (1, 2):
        out = tmp_path / f"out{number}"
        out.mkdir()
        outputs = [word for name in formats for word in ("-o", f"{name}={out / name}")]
        done = m3("review", *SHORT, *outputs, cwd=tree, M3_CACHE_DIR=str(tmp_path / f"cache{number}"))
        assert done.returncode in (0, 1, 4), done.stderr  # 4: an answer so short is cut off
        assert "reviewing reader.py (1 of 1, " in done.stderr
        found = json.loads((out / "json").read_bytes())
        found.pop("timings")
        written.append(
            {name: (out / name).read_bytes() for name in formats[1:]} | {"json": str(found).encode()}
        )
        written[-1]["text"] = done.stdout.encode()
    assert written[0] == written[1]
    assert found["files"] == ["reader.py"]
    assert found["base"] == head(tree)


def test_a_base_is_computed_once(m3: Run, tree: Path) -> None:
    """After `m3 warm --ref BASE`, a review with the whole repository computes the change and no more."""
    warm = m3(
        "warm", ".", "--ref", "HEAD", "--ctx", "4096", "--threads", "1", "--max-tokens", "160", cwd=tree
    )
    assert warm.returncode == 0, warm.stderr
    review = ("review", *SHORT, "--context", "repo", "--no-check", "--format", "json")
    first = json.loads(m3(*review, cwd=tree).stdout)
    write(tree, {"reader.py": NEW.replace("file", "handle")})
    second = json.loads(m3(*review, cwd=tree).stdout)
    for found in (first, second):
        usage = found["usage"]
        assert usage["restored_tokens"] > 300
        assert usage["prompt_tokens"] - usage["restored_tokens"] < 500
    assert first["usage"]["restored_tokens"] == second["usage"]["restored_tokens"]


def test_a_diff_from_a_pipe(m3: Run, tree: Path, tmp_path: Path) -> None:
    """`git diff | m3 review --diff -`, in the tree and where there are no files at all."""
    diff = git(tree, "diff")
    for place in (tree, tmp_path):
        done = m3("review", "--diff", "-", *SHORT, "--no-check", "--format", "rdjson", stdin=diff, cwd=place)
        assert done.returncode in (0, 1, 4), done.stderr  # 4: an answer so short is cut off
        assert json.loads(done.stdout)["source"] == {"name": "m3"}
        assert "reviewing reader.py" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--base", "nowhere"), 2, "'nowhere' names no commit"),
        (("--head", "nowhere"), 2, "'nowhere' names no commit"),
        (("--staged", "--head", "HEAD"), 2, "cannot be reviewed at once"),
        (("--diff", "nothing.diff"), 2, "cannot be read"),
        (("--ignore", "*.py:style"), 2, "rule style"),
        (("--output", "pdf=x"), 2, "not FORMAT=FILE"),
        (("--baseline", "other.py"), 2, "no baseline"),
        (("--time-limit", "soon"), 2, "'soon'"),
        (("--config", "other.py"), 2, "TOML"),
        (("missing",), 2, "missing"),
    ],
)
def test_what_cannot_be_reviewed(
    m3: Run, tree: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    """Each is one clear message and the right exit code, and no model is loaded for it."""
    done = m3("review", *arguments, cwd=tree)
    assert done.returncode == code, done.stderr
    assert words in done.stderr.replace("\n", " ")
    assert done.stdout == ""


def test_outside_of_a_repository_and_without_history(m3: Run, tree: Path, tmp_path: Path) -> None:
    """No repository, a shallow clone without the merge base, no commits, a diff that does not apply."""
    outside = m3("review", cwd=tmp_path)
    assert outside.returncode == 2
    assert "no git work tree" in outside.stderr
    git(tree, "checkout", "-q", "-b", "feature")
    commit(tree, {"reader.py": NEW})
    git(tree, "checkout", "-q", "main")
    commit(tree, {"other.py": "value = 2\n"})
    shallow = tmp_path / "shallow"
    source = f"file://{tree}"
    subprocess.run(
        ["git", "clone", "-q", "--depth", "1", "--no-single-branch", source, str(shallow)], check=True
    )
    done = m3("review", "--base", "origin/main", "--head", "origin/feature", cwd=shallow)
    assert done.returncode == 3, done.stderr
    assert "unshallow" in done.stderr
    broken = m3(
        "review", "--diff", "-", cwd=tree,
        stdin="--- a/reader.py\n+++ b/reader.py\n@@ -1,2 +1,2 @@\n-nothing\n+like this\n is here\n",
    )  # fmt: skip
    assert broken.returncode == 3
    assert "reader.py" in broken.stderr


def test_no_change_needs_no_model(m3: Run, tree: Path) -> None:
    """An empty diff is no error, and every format is written all the same."""
    git(tree, "checkout", "-q", "reader.py")
    done = m3("review", "--format", "sarif", cwd=tree)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["runs"][0]["results"] == []
    assert "loaded" not in done.stderr


def test_a_cap_on_tokens(m3: Run, tree: Path) -> None:
    """Exit code 4, and what was not reviewed is in the result."""
    done = m3("review", *SHORT, "--token-limit", "10", "--format", "json", cwd=tree)
    assert done.returncode == 4, done.stderr
    found = json.loads(done.stdout)
    assert not found["complete"]
    assert [each["path"] for each in found["unreviewed"]] == ["reader.py"]


def test_the_change_does_not_configure_its_review(m3: Run, tree: Path) -> None:
    """Settings of the work tree are not read, those of the base are, and --config is the user's word."""
    write(tree, {".m3.toml": 'review_ignore = ["*"]\nnonsense = 1\n'})
    assert m3("review", *SHORT, "--token-limit", "10", cwd=tree).returncode == 4
    commit(tree, {})
    write(tree, {"reader.py": OLD})
    refused = m3("review", *SHORT, cwd=tree)
    assert refused.returncode == 2
    assert ".m3.toml sets 'nonsense'" in refused.stderr
    write(tree, {"good.toml": 'fail_on = "never"\n'})
    assert m3("review", *SHORT, "--config", "good.toml", "--token-limit", "10", cwd=tree).returncode == 4
