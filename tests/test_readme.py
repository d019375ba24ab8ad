"""The README: every command in it is run, every file it links to is there."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import signal
import subprocess
import sysconfig
from pathlib import Path

import pytest

from m3cli.errors import ExitCode
from m3cli.model.catalog import demo_model

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text("utf-8")
COMMANDS = [
    line.removeprefix("$ ").split("  #")[0].strip()
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("$ ") and not line.startswith(("$ bash scripts/", "$ export "))
]

COMMANDS = list(dict.fromkeys(COMMANDS))
RECIPES = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
COMMANDS += [
    line.strip()
    for recipe in RECIPES
    for line in re.findall(r"(?:run:|entry:|^ *-) (m3 .*)", recipe, re.MULTILINE)
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_m3: Path) -> Path:
    """A git repository with all that the commands name."""
    place = tmp_path_factory.mktemp("workplace")
    demo = demo_model()
    assert demo
    for path, text in {
        "m3cli/errors.py": (REPOSITORY / "m3cli/errors.py").read_text("utf-8"),
        "src/cache.py": "CACHE = {}\n",
        "docs/plugins.md": "# Plugins\n\nPut a file into plugins/.\n",
        # what other commands write is no change to review
        ".gitignore": "/*\n!/src\n!/docs\n!/repo\n!/m3cli\n",
        "repo/net.py": "def retry(call):\n    return call()\n",
        "texts/readme.md": README,
        "held-out/changes.md": (REPOSITORY / "CHANGELOG.md").read_text("utf-8"),
    }.items():
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_text(text, "utf-8")
    models = place / "home" / "models"
    models.mkdir(parents=True)
    for line in re.findall(r"~/models/([\w.-]+\.gguf)", README):
        (models / line).unlink(missing_ok=True)
        (models / line).symlink_to(demo.path)
    (place / "model.gguf").symlink_to(demo.path)
    (place / "MiniMax-M3").symlink_to(tiny_m3)
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for arguments in (
        ["init", "-q"],
        ["add", "src", "m3cli"],
        ["commit", "-qm", "1"],
        ["add", "docs"],
        ["commit", "-qm", "2"],
        ["add", "repo"],
    ):
        subprocess.run(
            ["git", *identity, *arguments], cwd=place, check=True, env={**os.environ, "HOME": str(place)}
        )
    return place


# M3's sizes, and those that ask as much of the tiny one; one question of each kind.
SIZES = {"138GB": "5MB", "4k,16k,64k": "512 --samples 1"}


@pytest.fixture(scope="module")
def environ(workplace: Path) -> dict[str, str]:
    """A small window and short answers."""
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith(("M3_", "GIT_"))},
        "HOME": str(workplace / "home"),
        "PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}",
        "M3_CONFIG": str(workplace / "none.toml"),
        "M3_CACHE_DIR": str(workplace / "home" / "cache"),
        "M3_CTX": "640",
        "M3_MAX_TOKENS": "8",
        "GITHUB_STEP_SUMMARY": str(workplace / "summary.md"),
    }


@pytest.mark.parametrize("command", [line for line in COMMANDS if not line.startswith("m3 serve")])
def test_a_command_of_the_readme_works(command: str, workplace: Path, environ: dict[str, str]) -> None:
    """Each line with a prompt runs as it stands."""
    done = subprocess.run(
        [
            "bash",
            "-o",
            "pipefail",
            "-c",
            re.sub(r"(?<=--budget |-lengths )[\w,]+", lambda size: SIZES.get(size[0], size[0]), command),
        ],
        cwd=workplace,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode in (ExitCode.DONE, ExitCode.CAP_REACHED), done.stderr
    assert done.stdout or any(words in command for words in ("-o ", "/dev/null", "m3 warm"))


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("m3 serve")])
def test_a_server_of_the_readme_runs(command: str, workplace: Path, environ: dict[str, str]) -> None:
    """It prints its address, and ends well when it is told to."""
    with subprocess.Popen(
        shlex.split(command), cwd=workplace, env=environ, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline().startswith("http://127.0.0.1:")
        server.send_signal(signal.SIGINT)
        assert server.wait(240) == ExitCode.DONE


def test_the_readme_has_commands() -> None:
    """The pattern above still finds the commands."""
    assert len(COMMANDS) >= 10
    assert len(RECIPES) >= 3
    assert all(any(command in recipe for command in COMMANDS) for recipe in RECIPES)


def test_links_lead_somewhere() -> None:
    """Every relative link and picture is a file of the repository."""
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (REPOSITORY / link).exists()] == []


FEATURES = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in itertools.takewhile(
        lambda line: line.startswith("|"), README.partition("| shown by |")[2].splitlines()[2:]
    )
]
TESTS = {
    name
    for file in (REPOSITORY / "tests").rglob("test_*.py")
    for name in re.findall(r"^def (test_\w+)", file.read_text("utf-8"), re.MULTILINE)
}


@pytest.mark.parametrize("row", FEATURES, ids=lambda row: row[0])
def test_a_feature_of_the_table_has_a_test_or_a_reason(row: list[str]) -> None:
    """What the comparison claims names the test that shows it; what m3 lacks says why."""
    _, _, how, shown = row
    if shown:
        assert shown.strip("`") in TESTS
    else:
        assert how.startswith("no, because ")
