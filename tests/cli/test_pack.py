"""`m3 pack`: the same bytes everywhere, the right counts, nothing of its own eaten."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest

from tests.git_repositories import commit, make_repository

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli.conftest import Run

FILES = {
    "README.md": "# Title\n\nText.\n",
    "src/main.py": "def main():\n    print('hi')\n",
    "src/Überlauf.py": "größe = 1\n",
    "src/a/z.txt": "z\n",
    "src/a-b/y.txt": "y\n",
    "Z.txt": "upper\n",
    "a.txt": "lower\n",
    ".gitignore": "*.log\nbuild/\n",
    "debug.log": "no\n",
    "build/out.py": "no\n",
}


def make_tree(root: Path, seed: int) -> Path:
    """The same files, made in another order."""
    names = list(FILES)
    random.Random(seed).shuffle(names)
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FILES[name], encoding="utf-8")
    return root


@pytest.mark.parametrize("form", ["xml", "markdown", "json", "plain"])
def test_a_tree_gives_the_same_bytes_everywhere(m3: Run, tmp_path: Path, form: str) -> None:
    """Order of creation, directory, locale and the way of naming the tree change no byte."""
    first = make_tree(tmp_path / "one" / "tree", 1)
    second = make_tree(tmp_path / "two" / "other", 2)
    outputs = {
        m3("pack", str(first), "--format", form, LC_ALL="C").stdout,
        m3("pack", ".", "--format", form, cwd=second, LC_ALL="C.UTF-8", PYTHONHASHSEED="7").stdout,
        m3("pack", "two/other/", "--format", form, LANG="tr_TR.UTF-8", TZ="Asia/Tokyo").stdout,
    }
    assert len(outputs) == 1
    packed = outputs.pop()
    assert "größe" in packed
    assert "debug.log" not in packed


def test_files_stand_in_path_order(m3: Run, tmp_path: Path) -> None:
    """Files are ordered by the components of their paths, by code point, not by locale."""
    tree = make_tree(tmp_path / "tree", 3)
    packed = json.loads(m3("pack", str(tree), "--format", "json").stdout)
    assert [file["path"] for file in packed["files"]] == [
        "README.md", "Z.txt", "a.txt", "src/a/z.txt", "src/a-b/y.txt", "src/main.py", "src/Überlauf.py",
    ]  # fmt: skip
    assert {file["path"]: file["text"] for file in packed["files"]}.items() <= FILES.items()


def test_a_pack_does_not_eat_its_own_output(m3: Run, tmp_path: Path) -> None:
    """Packing a tree into a file inside that tree twice gives the same file."""
    tree = make_tree(tmp_path / "tree", 4)
    sizes = []
    for _ in range(2):
        assert m3("pack", ".", "-o", "packed.xml", cwd=tree).returncode == 0
        sizes.append((tree / "packed.xml").stat().st_size)
    assert sizes[0] == sizes[1] > 0
    assert (tree / "packed.xml").stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_a_budget_is_kept_and_reported(m3: Run, tmp_path: Path) -> None:
    """Over the budget, what matches the query stays, and what is left out is counted and listed."""
    for i in range(20):
        (tmp_path / f"f{i}.py").write_text(f"def helper_{i}():\n    return {i}\n" * 20)
    (tmp_path / "auth.py").write_text("def check_password(user):\n    return True\n")
    done = m3("pack", ".", "--budget", "600", "--query", "password check", "--verbose")
    assert done.returncode == 0
    assert "check_password" in done.stdout
    tokens = int(re.search(r": ([\d,]+) tokens", done.stderr)[1].replace(",", ""))
    assert 0 < tokens <= 600
    assert re.search(r"left out \d+ chunks over the budget", done.stderr)
    assert "left out f19.py:" in done.stderr

    small = m3("pack", ".", "--budget", "10")
    assert small.returncode == 3
    assert "There is room for 10 tokens" in small.stderr


def test_the_token_tree_adds_up(m3: Run, tmp_path: Path) -> None:
    """--tree shows tokens by directory on stderr, largest first."""
    make_tree(tmp_path / "tree", 5)
    done = m3("pack", "tree", "--tree")
    tree = [line for line in done.stderr.splitlines() if "──" in line or line.startswith("tokens")]
    counts = {line.strip("│├└─ ").split("  ")[0]: int(line.split("  ")[-1].replace(",", "")) for line in tree}
    assert counts["src/"] == sum(counts[name] for name in ("a/", "a-b/", "main.py", "Überlauf.py"))
    assert counts["tokens"] == counts["src/"] + sum(counts[n] for n in ("README.md", "Z.txt", "a.txt"))


def test_skips_are_counted_and_listed(m3: Run, tmp_path: Path) -> None:
    """Every file that is not in the pack is counted by reason, and listed with --verbose."""
    tree = make_tree(tmp_path / "tree", 6)
    (tree / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    (tree / "package-lock.json").write_text("{}\n")
    (tree / "huge.txt").write_text("x" * 3000)
    done = m3("pack", "tree", "--verbose", "--max-file-size", "2000")
    for name in ("image.png", "package-lock.json", "huge.txt", "debug.log", "build/", ".gitignore"):
        assert f"skipped {name}: " in done.stderr
    everything = m3("pack", "tree", "--no-ignore", "--hidden", "--max-file-size", "5000")
    assert "debug.log" in everything.stdout
    assert "build/out.py" in everything.stdout
    assert 'path=".gitignore"' in everything.stdout


def test_a_closed_pipe_is_no_error(m3: Run, tmp_path: Path, environ: dict[str, str]) -> None:
    """`m3 pack . | head -1` ends quietly."""
    import subprocess

    from tests.cli.conftest import M3

    (tmp_path / "big.txt").write_text("line\n" * 200_000)
    read, write = os.pipe()
    process = subprocess.Popen(
        [M3, "pack", "big.txt", "--format", "plain", "--quiet"],
        stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environ,
    )  # fmt: skip
    os.close(write)
    assert os.read(read, 4) == b"==> "
    os.close(read)
    _, stderr = process.communicate(timeout=60)
    assert stderr == ""


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_pages_and_notebooks_by_flag(m3: Run, tmp_path: Path) -> None:
    """HTML is source unless its text is asked for; what cells have printed is left out unless asked for."""
    (tmp_path / "page.html").write_text("<html><body><h1>Title</h1><p>Some text.</p></body></html>\n")
    cell = {
        "cell_type": "code", "source": "print(6 * 7)", "metadata": {}, "execution_count": 1,
        "outputs": [{"output_type": "stream", "name": "stdout", "text": "42\n"}],
    }  # fmt: skip
    notebook = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "book.ipynb").write_text(json.dumps(notebook))
    plain = m3("pack", ".", "--format", "plain").stdout
    assert "<h1>Title</h1>" in plain
    assert "print(6 * 7)" in plain
    assert "42" not in plain
    extracted = m3("pack", ".", "--format", "plain", "--html-text", "--notebook-outputs").stdout
    assert "<h1>" not in extracted
    assert "Title" in extracted
    assert "42" in extracted


def test_a_commit_can_be_packed(m3: Run, tmp_path: Path) -> None:
    """--ref packs a commit without touching the work tree, with the bytes of a checkout of it."""
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "b.py").write_text("y = 1\n")
    for arguments in (["init", "-q"], ["add", "a.py", "b.py"], ["commit", "-qm", "1"]):
        subprocess.run([*git, *arguments], cwd=tmp_path, check=True)
    before = m3("pack", ".", "--include", "*.py").stdout
    (tmp_path / "a.py").write_text("x = 2\n")
    assert m3("pack", ".", "--ref", "HEAD", "--include", "*.py").stdout == before
    churned = m3("pack", ".", "--order", "churn", "--include", "*.py", "--format", "plain").stdout
    assert churned.index("y = 1") < churned.index("x = 2")  # what is not committed stands last


def test_secrets_stay_at_home(m3: Run, tmp_path: Path) -> None:
    """A pack may be sent away: secrets in it are replaced and counted, unless that is switched off."""
    secret = "AKIA" + "QWERTYUIOPASDFGH"  # no literal, or this file would be found
    (tmp_path / "settings.py").write_text(f'KEY = "{secret}"\nOTHER = "{secret}"\nname = "plain"\n')
    done = m3("pack", ".", "--format", "plain")
    assert secret not in done.stdout
    assert done.stdout.count("[REDACTED:") == 2
    assert 'name = "plain"' in done.stdout
    assert "redacted: " in done.stderr
    kept = m3("pack", ".", "--format", "plain", "--no-redact")
    assert kept.stdout.count(secret) == 2
    assert "redacted" not in kept.stderr


def test_a_pack_in_parts(m3: Run, tmp_path: Path) -> None:
    """Parts have numbered names, each is whole XML, and a second run does not read them."""
    tree = make_tree(tmp_path, 1)
    (tree / "big.txt").write_text("".join(f"line {number}\n" for number in range(3000)))
    command = ("pack", ".", "--split-tokens", "5000", "-o", "out.xml")
    done = m3(*command, cwd=tree)
    assert done.returncode == 0
    assert done.stdout == ""
    assert not (tree / "out.xml").exists()
    parts = sorted(tree.glob("out-*.xml"))
    assert len(parts) >= 3
    assert f"written as {len(parts)} files of at most" in done.stderr
    before = [part.read_bytes() for part in parts]
    text = "".join(d.text or "" for part in parts for d in ElementTree.fromstring(part.read_text()))
    assert "".join(f"line {number}\n" for number in range(3000)) in text.replace("\n\n", "\n")
    assert m3(*command, cwd=tree).returncode == 0
    assert [part.read_bytes() for part in sorted(tree.glob("out-*.xml"))] == before
    for more in (["--budget", "9"], ["--template", "a.txt"]):
        assert m3(*command, *more, cwd=tree).returncode == 2
    assert m3(*command[:4], cwd=tree).returncode == 2


def test_a_pack_in_the_form_of_a_template(m3: Run, tmp_path: Path) -> None:
    """A template sees files, tree and query; what it adds counts against the budget."""
    tree = make_tree(tmp_path / "tree", 1)
    template = tmp_path / "t.j2"
    template.write_text(
        "{{ query }}\n{% for f in files %}{{ f.path }}|{{ f.text|tojson }}\n{% endfor %}{{ tree }}"
    )
    done = m3("pack", str(tree), "--template", str(template), "--query", "größe")
    assert done.stdout.startswith("größe\n")
    assert 'a.txt|"lower\\n"\n' in done.stdout
    assert done.stdout.endswith("src/\n main.py\n Überlauf.py\n a/\n  z.txt\n a-b/\n  y.txt\n")
    small = m3("pack", str(tree), "--template", str(template), "--query", "größe", "--budget", "100")
    assert small.returncode == 0
    assert "größe = 1" in small.stdout
    assert "left out" in small.stderr
    template.write_text("{% if %}")
    broken = m3("pack", str(tree), "--template", str(template))
    assert broken.returncode == 2
    assert "line 1" in broken.stderr


def test_numbered_lines(m3: Run, tmp_path: Path) -> None:
    """Numbers stand in front of lines in every form."""
    (tmp_path / "a.txt").write_text("one\ntwo")
    for form in ("xml", "markdown", "plain"):
        assert "1: one\n2: two\n" in m3("pack", ".", "--line-numbers", "-f", form, cwd=tmp_path).stdout
    packed = json.loads(m3("pack", ".", "--line-numbers", "-f", "json", cwd=tmp_path).stdout)
    assert packed["files"][0]["text"] == "1: one\n2: two\n"


def test_a_report_of_the_pack(m3: Run, tmp_path: Path) -> None:
    """The page holds the files and is itself never packed."""
    tree = make_tree(tmp_path, 1)
    for _ in range(2):
        done = m3("pack", ".", "--report", "report.html", "-o", "out.xml", cwd=tree)
        assert done.returncode == 0
        page = (tree / "report.html").read_text()
        assert "src/main.py" in page
        assert "out.xml" not in page
        assert "report.html" not in page


def test_copying_to_the_clipboard(m3: Run, tmp_path: Path) -> None:
    """The text goes to the program that holds the clipboard; without one an error says so."""
    (tmp_path / "a.txt").write_text("größe\n")
    tools = tmp_path / "tools"
    tools.mkdir()
    script = tools / "xclip"
    script.write_text(f"#!/bin/sh\nexec cat > {tmp_path}/clipboard\n")
    script.chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    done = m3("pack", "a.txt", "--copy", "-f", "plain", cwd=tmp_path, PATH=path, DISPLAY=":0")
    assert done.returncode == 0
    assert done.stdout == ""
    assert "größe" in (tmp_path / "clipboard").read_text("utf-8")
    none = m3("pack", "a.txt", "--copy", cwd=tmp_path, PATH=str(tools / "none"), DISPLAY="")
    assert none.returncode == 3
    assert "There is no clipboard" in none.stderr


def test_diff_and_log_sections(m3: Run, tmp_path: Path) -> None:
    """Uncommitted changes and commit messages stand at the end, in every order; without git an error."""
    tree = make_repository(tmp_path / "r", {"a.py": "a = 1\n", "z.py": "z = 1\n"})
    commit(tree, {"a.py": "a = 2\n"}, "Second commit")
    (tree / "a.py").write_text("a = 3\n")
    for order in ("path", "churn"):
        done = m3("pack", ".", "--diff", "--log", "5", "--order", order, "-f", "json", cwd=tree)
        assert done.returncode == 0, done.stderr
        files = json.loads(done.stdout)["files"]
        assert [file["path"] for file in files][2:] == ["git log -5", "git diff HEAD"]
        assert "Second commit" in files[2]["text"]
        assert "-a = 2\n+a = 3\n" in files[3]["text"]
    since = json.loads(m3("pack", ".", "--base", "HEAD~1", "-f", "json", cwd=tree).stdout)["files"]
    assert "-a = 1\n+a = 3\n" in since[-1]["text"]
    (tree / "a.py").write_text("a = 2\n")
    assert "git diff" not in m3("pack", ".", "--diff", cwd=tree).stdout
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.py").write_text("x")
    failed = m3("pack", ".", "--diff", cwd=outside)
    assert failed.returncode == 2
    assert "git work tree" in failed.stderr
    assert m3("pack", ".", "--base", "nothing", cwd=tree).returncode == 2


def test_a_remote_repository_is_packed(m3: Run, tmp_path: Path) -> None:
    """A URL is cloned for the time of packing, at a branch or tag if one is named, and nothing stays."""
    tree = make_repository(tmp_path / "origin", {"src/a.py": "a = 1\n", ".gitignore": "b\n"})
    subprocess.run(["git", "-C", str(tree), "tag", "v1"], check=True)
    commit(tree, {"src/a.py": "a = 2\n"}, "Second commit")
    url = tree.as_uri()
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    place = tmp_path / "elsewhere"
    place.mkdir()
    done = m3("pack", url, "-f", "json", "--log", "2", cwd=place, TMPDIR=str(temporary))
    assert done.returncode == 0, done.stderr
    files = {file["path"]: file["text"] for file in json.loads(done.stdout)["files"]}
    assert files["src/a.py"] == "a = 2\n"
    assert "Second commit" in files["git log -2"]
    old = m3("pack", url, "--ref", "v1", "-f", "json", cwd=place, TMPDIR=str(temporary))
    assert json.loads(old.stdout)["files"][0]["text"] == "a = 1\n"
    assert list(temporary.iterdir()) == []
    missing = m3("pack", (tmp_path / "nothing").as_uri(), cwd=place, TMPDIR=str(temporary))
    assert missing.returncode in (2, 3)
    assert "Traceback" not in missing.stderr


def test_orders_by_import_and_by_question(m3: Run, tmp_path: Path) -> None:
    """Definitions stand before uses; what matches the question best stands last."""
    for name, text in {
        "a.py": "import c\n\nprint(c.retry)\n",
        "b.py": "# nothing\n",
        "c.py": "retry = 3  # retry logic retry\n",
    }.items():
        (tmp_path / name).write_text(text)

    def paths(*options: str) -> list[str]:
        done = m3("pack", ".", "-f", "json", *options, cwd=tmp_path)
        return [file["path"] for file in json.loads(done.stdout)["files"]]

    assert paths("--order", "dependency") == ["b.py", "c.py", "a.py"]
    assert paths("--order", "relevance", "--query", "retry logic") == ["b.py", "a.py", "c.py"]
    assert m3("pack", ".", "--order", "relevance", cwd=tmp_path).returncode == 2
