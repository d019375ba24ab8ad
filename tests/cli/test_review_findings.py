"""From a change to reports with findings in them: all of `m3 review` but the model, which has a script."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from m3cli.cli import values
from m3cli.cli.app import app
from m3cli.engine.fake import FakeEngine
from tests.git_repositories import commit, git, make_repository, write
from tests.report.test_review_formats import DIAGNOSTIC, DIAGNOSTIC_RESULT, REVIEW, SARIF

if TYPE_CHECKING:
    from pathlib import Path

    from m3cli.engine.events import Request

OLD = "def read(path):\n    with open(path) as file:\n        return file.read()\n"
NEW = "def read(path):\n    file = open(path)\n    return eval(file.read())  # é\n"
CLAIMS = [
    {
        "path": "reader.py", "quote": "file = open(path)", "message": "The file stays open.",
        "rule": "resource", "severity": "warning", "confidence": "high",
        "replacement": "with open(path) as file:",
    },
    {
        "path": "reader.py", "quote": "eval(file.read())", "message": "A file\nis run as code.",
        "rule": "security", "severity": "error", "confidence": "medium", "replacement": None,
    },
    {
        "path": "reader.py", "quote": "nothing like this", "message": "Made up.",
        "rule": "correctness", "severity": "error", "confidence": "high", "replacement": None,
    },
]  # fmt: skip


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose work tree has a change, and a model that says what is wrong with it."""
    top = make_repository(tmp_path / "tree", {"reader.py": OLD})
    write(top, {"reader.py": NEW})

    def script(asked: Request) -> str:
        if "findings" in asked.schema:
            return json.dumps({"analysis": "Two lines look wrong to me.", "findings": CLAIMS})
        return json.dumps({"argument": "It is so.", "claim": "right"})

    monkeypatch.setattr(values, "open_engine", lambda *_: FakeEngine(script))
    monkeypatch.setenv("M3_CONFIG", str(tmp_path / "none.toml"))
    monkeypatch.setenv("M3_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(top)
    return top


def review(*arguments: str) -> tuple[int, str]:
    """Exit code and standard output."""
    done = CliRunner().invoke(app, ["review", "--quiet", *arguments])
    return done.exit_code, done.stdout


def found(*arguments: str) -> dict[str, Any]:
    """The object of `--format json`."""
    value: dict[str, Any] = json.loads(review("--format", "json", *arguments)[1])
    REVIEW.validate(value)
    return value


def test_every_format_is_what_its_reader_expects(tree: Path, tmp_path: Path) -> None:
    """SARIF and rdjson by their schemas, at the right place; the others by what they have to hold."""
    names = ("json", "sarif", "rdjson", "rdjsonl", "gitlab", "github", "markdown")
    outputs = [word for name in names for word in ("-o", f"{name}={tmp_path / name}")]
    code, text = review(*outputs)
    assert code == 1
    assert "error[security] reader.py:3" in text
    assert "warning[resource] reader.py:2" in text
    assert "1 not verified" in text
    read = {name: (tmp_path / name).read_text("utf-8") for name in names}
    REVIEW.validate(json.loads(read["json"]))
    sarif = json.loads(read["sarif"])
    SARIF.validate(sarif)
    regions = [result["locations"][0]["physicalLocation"]["region"] for result in sarif["runs"][0]["results"]]
    assert [region["startLine"] for region in regions] == [3, 2]
    rdjson = json.loads(read["rdjson"])
    DIAGNOSTIC_RESULT.validate(rdjson)
    assert rdjson["diagnostics"][0]["location"]["range"]["start"] == {"line": 3, "column": 12}
    for line in read["rdjsonl"].splitlines():
        DIAGNOSTIC.validate(json.loads(line))
    assert len(read["rdjsonl"].splitlines()) == 2
    gitlab = json.loads(read["gitlab"])
    assert len({issue["fingerprint"] for issue in gitlab}) == 2
    assert read["github"].startswith("::error ")
    assert "is run as code" in read["markdown"]


@pytest.mark.parametrize(
    ("arguments", "code", "rules"),
    [
        ((), 1, ["security", "resource"]),
        (("--fail-on", "never"), 0, ["security", "resource"]),
        (("--min-severity", "error"), 1, ["security"]),
        (("--ignore", "*.py:security"), 0, ["resource"]),
        (("--ignore", "*.py:security", "--fail-on", "warning"), 1, ["resource"]),
        (("--max-findings", "1"), 1, ["security"]),
        (("--ignore", "reader.*"), 0, []),
    ],
)
def test_what_fails_a_build(tree: Path, arguments: tuple[str, ...], code: int, rules: list[str]) -> None:
    """Exit code 1 for what is reported at or above the threshold."""
    assert tree.exists()
    assert review(*arguments)[0] == code
    assert [each["rule"] for each in found(*arguments)["findings"]] == rules


def test_a_rebase_changes_no_fingerprint(tree: Path, tmp_path: Path) -> None:
    """The change on top of another history, at other lines: the same findings, so a baseline holds."""
    before = found("--write-baseline", str(tmp_path / "baseline.json"))
    git(tree, "stash", "-q")
    git(tree, "checkout", "-q", "-b", "feature")
    commit(tree, {"reader.py": NEW})
    git(tree, "checkout", "-q", "main")
    commit(tree, {"reader.py": '"""Reading."""\n\nimport os\n\n\n' + OLD})
    git(tree, "checkout", "-q", "feature")
    git(tree, "rebase", "-q", "main")
    after = found("--base", "main", "--head", "feature")
    prints = [[each["fingerprint"] for each in run["findings"]] for run in (before, after)]
    assert prints[0] == prints[1]
    assert [each["start_line"] for each in after["findings"]] == [8, 7]
    code, _ = review("--base", "main", "--head", "feature", "--baseline", str(tmp_path / "baseline.json"))
    assert code == 0
    known = found("--base", "main", "--head", "feature", "--baseline", str(tmp_path / "baseline.json"))
    assert known["findings"] == []
    assert known["dropped"] == {"unverified": 1, "baseline": 2}


def test_settings_of_the_base_count(tree: Path) -> None:
    """What the team has agreed on is in the base commit; flags go before it."""
    git(tree, "stash", "-q")
    commit(tree, {".m3.toml": 'fail_on = "never"\nreview_ignore = ["*:resource"]\n'})
    git(tree, "stash", "pop", "-q")
    assert review()[0] == 0
    assert [each["rule"] for each in found()["findings"]] == ["security"]
    assert review("--fail-on", "error")[0] == 1
    write(tree, {".m3.toml": 'review_ignore = ["*"]\n'})
    assert [each["rule"] for each in found()["findings"]] == ["security"]
