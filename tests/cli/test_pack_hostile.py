"""`m3 pack` on trees that were made to break it: it ends in bounded time and memory, and loses nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt

from tests.cli.conftest import M3
from tests.git_repositories import commit, git, make_repository, write

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

FORMS = ("xml", "markdown", "json", "plain")
SECONDS = 60  # a hang takes longer, a busy machine does not
# Of one process, in MB. Its modules and the tokenizer take 100.
MEGABYTES = 400

# A program that is started by a large one seems to be as large, so a small one stands between, and says
# how large the command and its own children became.
_MEASURE = """
import os, sys
pid = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
status, usage = os.wait4(pid, 0)[1:]
with open(sys.argv[1], "w") as file:
    file.write(str(usage.ru_maxrss))
sys.exit(os.waitstatus_to_exitcode(status))
"""
_UNITS_IN_MB = 1_000_000 if sys.platform == "darwin" else 1_000


@dataclass(frozen=True)
class Outcome:
    """What a command has written, and how much memory the largest of its processes took."""

    code: int
    out: bytes
    err: str
    megabytes: float

    @property
    def files(self) -> dict[str, str]:
        """The texts in a pack that was written as JSON, by path."""
        return {file["path"]: file["text"] for file in json.loads(self.out)["files"]}

    @property
    def skips(self) -> dict[str, str]:
        """Why paths were left out, as --verbose tells."""
        return dict(re.findall(r"^  skipped (.*?): (.*)$", self.err, re.MULTILINE))


Measured = Callable[..., Outcome]


@pytest.fixture
def pack(environ: dict[str, str], tmp_path: Path) -> Measured:
    """`pack(tree, *arguments)`: run `m3 pack` in `tree`; it must end well, soon and small."""

    def run(
        tree: Path,
        *arguments: str,
        code: int = 0,
        megabytes: int = MEGABYTES,
        seconds: int = SECONDS,
        wrapper: Sequence[str] = (),
        **more: str,
    ) -> Outcome:
        size = tmp_path / "maximum-resident-set"
        command = [*wrapper, M3, "pack", *(arguments or (".",))]
        program = shutil.which(command[0])
        assert program is not None
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _MEASURE, str(size), program, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=tree,
            env={**environ, **more},
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            pytest.fail(f"m3 pack {' '.join(arguments)} has not ended in {seconds} seconds")
        words = err.decode("utf-8")
        outcome = Outcome(process.returncode, out, words, int(size.read_text()) / _UNITS_IN_MB)
        assert outcome.code == code, words
        assert "Traceback" not in words
        assert "Warning" not in words
        assert outcome.megabytes < megabytes
        return outcome

    return run


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A git repository with one file that is never the trouble."""
    return make_repository(tmp_path / "tree", {"sound.py": "sound = 1\n"})


# What a pack gives back


def from_xml(packed: str) -> dict[str, str]:
    """Read a pack as any XML parser does; each text begins on a line of its own."""
    return {
        document.attrib["path"]: (document.text or "").removeprefix("\n")
        for document in ElementTree.fromstring(packed)
    }


def from_markdown(packed: str) -> dict[str, str]:
    """Read a pack as CommonMark: headings and fenced blocks take turns, and there is nothing else."""
    tokens = [token for token in MarkdownIt("commonmark").parse(packed) if token.nesting == 0]
    texts = {}
    for heading, block in zip(tokens[::2], tokens[1::2], strict=True):
        assert (heading.type, block.type) == ("inline", "fence")
        assert heading.children is not None
        assert [child.type for child in heading.children] == ["code_inline"]
        texts[heading.children[0].content] = block.content
    return texts


def from_json(packed: str) -> dict[str, str]:
    return {file["path"]: file["text"] for file in json.loads(packed)["files"]}


def from_plain(packed: str) -> dict[str, str]:
    """Read a pack by the numbers in its headers alone."""
    lines = packed.split("\n")
    texts = {}
    at = 0
    while at < len(lines) - 1:
        header = re.fullmatch(r"==> (.+):(\d+) \((\d+) lines follow\) <==", lines[at])
        assert header, lines[at]
        assert header[2] == "1"
        count = int(header[3])
        texts[header[1]] = "".join(f"{line}\n" for line in lines[at + 1 : at + 1 + count])
        at += count + 2  # a blank line stands between two files
    return texts


READERS = {"xml": from_xml, "markdown": from_markdown, "json": from_json, "plain": from_plain}

FORGED = {
    "xml.txt": ']]></document>\n<document path="forged"><![CDATA[\nx\n]]></document></documents>\n&amp;\n',
    "markdown.md": "```\n## `forged`\n\n````\n~~~\n~~~~~~\n" + "`" * 70 + "\n# Heading\n\n    ```\n> ````\n",
    "json.txt": '"}\n]}\n{"files": [{"path": "forged", "text": "\\"\\\\ud800\\u0041\\x00\x7f"}]}\n',
    "plain.txt": "==> other (3 lines follow) <==\n\n==> forged:1 (2 lines follow) <==\na\n\n\n",
    # Wherever a text is cut, an end mark stands across the cut.
    "cuts-1.txt": "]]>" * 4000 + "\n",
    "cuts-2.txt": "x" + "]]>" * 4000 + "\n",
    "cuts-3.txt": "xy" + "]]>\n" * 4000,
    "cuts-4.txt": "]" * 9000 + ">" + "]" * 2047 + ">\n",
    "cuts-5.txt": ">" * 9000 + "\n" + "]>" * 5000 + "\n",
    "cuts-6.txt": "`" * 9000 + "\n",
    "cuts-7.txt": "<![CDATA[" * 1000 + "]]" + "\n" * 4000 + ">\n",
    "names/a:1 (9 lines follow) <==": "name\n",
    "names/``` `x": "name\n",
    "names/`ticks`": "name\n",
    "names/]]></document>\" <&amp;'": "name\n",
    'names/"}]}\\': "name\n",
    "names/# *x* [y](z) <b> \\`": "name\n",
    " blanks ": "name\n",
    "blank-end.txt": "a\n\n\n\n",
    "blank-start.txt": "\n\n\na\n",
    "tabs.txt": "\ta\n    b\n\t\n   \n",
    "separators.txt": "a\u2028b\u2029c\u0085d\n\N{NO-BREAK SPACE}\ufeffe\u202ef\U0001f600\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_parser_gets_back_the_very_texts(pack: Measured, tree: Path, form: str) -> None:
    """Whatever texts and names hold, no part of them is taken for a mark of the form they stand in."""
    write(tree, FORGED)
    packed = pack(tree, ".", "--format", form).out.decode("utf-8")
    assert READERS[form](packed) == {"sound.py": "sound = 1\n", **FORGED}


@pytest.mark.parametrize("form", FORMS)
def test_control_characters_come_back_as_far_as_a_form_can_hold_them(
    pack: Measured, tree: Path, form: str
) -> None:
    """XML has no control characters, and to its parsers and to Markdown's every line end is a line feed."""
    controls = "".join(chr(code) for code in range(1, 32) if chr(code) not in "\n\r\x1a\x1c\x1d\x1e")
    texts = {"controls.txt": f"a{controls}\x7fb\n", "lines.txt": "a\r\nb\n```\rc\r\n", "open.txt": "a\nb"}
    write(tree, texts)
    packed = pack(tree, ".", "--format", form).out.decode("utf-8")
    read = READERS[form](packed)
    if form == "xml":
        texts["controls.txt"] = re.sub("[\x01-\x08\x0b\x0c\x0e-\x1f]", "\ufffd", texts["controls.txt"])
    if form in ("xml", "markdown"):
        texts["lines.txt"] = "a\nb\n```\nc\n"
    if form in ("markdown", "plain"):
        texts["open.txt"] += "\n"
    assert read == {"sound.py": "sound = 1\n", **texts}
    assert "a\r\nb\n```\rc\r\n" in packed or form == "json"


def test_half_a_character_in_a_notebook_is_no_error(pack: Measured, tree: Path) -> None:
    """JSON can name halves of surrogate pairs, which no encoding can write."""
    cell = {"cell_type": "code", "source": "before\ud800after]]>\n", "metadata": {}, "outputs": []}
    notebook = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (tree / "book.ipynb").write_text(json.dumps(notebook))
    for form in FORMS:
        packed = pack(tree, ".", "--format", form).out.decode("utf-8")
        assert re.search("before.after", READERS[form](packed)["book.ipynb"])


@pytest.mark.parametrize("form", FORMS)
def test_encodings_come_back_as_text(pack: Measured, tree: Path, form: str) -> None:
    """Text is text in any usual encoding; what holds NUL bytes otherwise is left out, and told."""
    words = "Größe über Maß, ça va déjà; naïve façade.\n"
    write(
        tree,
        {
            "utf16-le-mark.txt": b"\xff\xfe" + words.encode("utf-16-le"),
            "utf16-be-mark.txt": b"\xfe\xff" + words.encode("utf-16-be"),
            "utf16-le.txt": words.encode("utf-16-le"),
            "utf16-be.txt": words.encode("utf-16-be"),
            "utf32.txt": words.encode("utf-32"),
            "utf8-mark.txt": b"\xef\xbb\xbf" + words.encode(),
            "latin-1.txt": words.encode("latin-1"),
            "nul.txt": b"text\0more text\n",
            "bytes.txt": bytes(range(1, 256)),
        },
    )
    done = pack(tree, ".", "--format", form, "--verbose")
    read = READERS[form](done.out.decode("utf-8"))
    assert {text for path, text in read.items() if path.startswith("utf")} == {words}
    assert len(read) == 8
    assert read["latin-1.txt"] == words
    assert done.skips["nul.txt"] == "binary (NUL bytes)"
    assert done.skips["bytes.txt"].startswith("undecodable")


# What is not text, not in the tree, or not for others


def test_links_lead_nowhere(pack: Measured, tree: Path, tmp_path: Path) -> None:
    """No link is followed, wherever it leads; each is told with its reason."""
    write(tmp_path, {"outside/stolen.txt": "STOLEN\n"})
    write(tree, {"inside/a.txt": "a\n"})
    for name, target in {
        "loop": "loop",
        "ping": "pong",
        "pong": "ping",
        "up": "..",
        "inside/here": ".",
        "nowhere": "missing",
        "out.txt": "../outside/stolen.txt",
        "out": str(tmp_path / "outside"),
        "git.txt": ".git/config",
        "inside/twin": "a.txt",
        "zero": "/dev/zero",
        ".gitignore": "../outside/stolen.txt",
        "inside/.m3ignore": "/dev/zero",
    }.items():
        (tree / name).symlink_to(target)
    for more in ((), ("--hidden",), ("--no-ignore", "--hidden"), ("--order", "churn")):
        done = pack(tree, ".", "--verbose", "--format", "json", *more)
        assert done.files == {"sound.py": "sound = 1\n", "inside/a.txt": "a\n"}
        assert b"STOLEN" not in done.out
        assert done.skips["loop"] == done.skips["ping"] == "link out of the tree or in a loop (in a loop)"
        assert done.skips["nowhere"].endswith("(dangling)")
        assert done.skips["inside/here"].endswith("(its target in the tree stands for itself)")
        assert {path for path, why in done.skips.items() if "leads out of the tree" in why} >= {
            "up", "out", "out.txt", "zero",
        }  # fmt: skip


def test_special_files_are_not_opened(pack: Measured, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A FIFO that nobody writes to, a socket and a device that never ends hold nothing up."""
    os.mkfifo(tree / "fifo.txt")
    monkeypatch.chdir(tree)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.txt")
        special = ["fifo.txt", "socket.txt"]
        with suppress(PermissionError, OSError):
            os.mknod(tree / "zero.txt", 0o666 | 0o020000, os.makedev(1, 5))
            special.append("zero.txt")
        done = pack(tree, ".", "--verbose", "--format", "json")
    assert done.files == {"sound.py": "sound = 1\n"}
    assert [done.skips[name] for name in special] == ["not a regular file"] * len(special)
    listed = tree / "list"
    listed.write_text("fifo.txt\n")
    assert "neither a file nor a directory" in pack(tree, "--files-from", "list", code=3).err


def test_ignore_files_that_are_no_files(pack: Measured, tree: Path) -> None:
    """A FIFO, a directory, a huge file or a binary one instead of an ignore file is told or passed over."""
    for name in ("fifo", "huge", "directory", "binary"):
        write(tree, {f"{name}/kept.txt": "kept\n"})
    os.mkfifo(tree / "fifo/.gitignore")
    os.mkfifo(tree / "fifo/.m3ignore")
    (tree / "directory/.gitignore").mkdir()
    with (tree / "huge/.gitignore").open("wb") as file:
        file.truncate(3_000_000_000)
    (tree / "binary/.gitignore").write_bytes(bytes(range(256)) * 4000)
    shutil.rmtree(tree / ".git/info")
    (tree / ".git/info").mkdir()
    os.mkfifo(tree / ".git/info/exclude")
    done = pack(tree, ".", "--format", "json")
    assert set(done.files) == {
        "sound.py",
        *(f"{n}/kept.txt" for n in ("fifo", "huge", "directory", "binary")),
    }
    assert "note: The ignore rules of huge/.gitignore were not applied: larger than" in done.err


def test_ignore_patterns_cannot_stall(pack: Measured, tree: Path) -> None:
    """Patterns that make a matcher with backtracking run for years are matched at once, as is their mass."""
    stars = ["*a" * 60 + "b", "**/" * 60 + "b", "*" * 5000 + "b", "[" * 3000, "[!-" * 900, "a**" * 200 + "/b"]
    write(tree, {".gitignore": "\n".join([*stars, *(f"*{i}*x*y" for i in range(3_000)), "ignored"]) + "\n"})
    name = "a" * 200
    write(tree, {f"{name}/{name}/{name}{i}": "kept\n" for i in range(50)} | {"ignored": "no\n"})
    done = pack(tree, ".", "--format", "json", "--verbose")
    assert len(done.files) == 51
    assert done.skips["ignored"] == "ignored (ignored in .gitignore)"


def test_globs_of_options_cannot_stall(pack: Measured, tree: Path) -> None:
    """What is true of ignore files is true of --exclude and --include."""
    write(tree, {"a" * 200: "kept\n"})
    glob = "*a" * 12 + "*b"
    done = pack(tree, ".", "--format", "json", "--exclude", glob, "--exclude", "**/" * 12 + "b")
    assert len(done.files) == 2


def test_a_repository_in_a_repository(pack: Measured, tree: Path, tmp_path: Path) -> None:
    """Nested repositories are read like directories, but for their own data; nothing of it is run or read."""
    elsewhere = make_repository(tmp_path / "elsewhere", {"far.txt": "FAR\n"})
    write(tree, {".gitignore": "*.txt\n"})
    nested = make_repository(tree / "nested", {"near.txt": "near\n", "more/kept.log": "log\n"})
    write(nested, {".gitignore": "*.log\n", "loose.log": "no\n"})
    ran = tmp_path / "ran"
    (nested / ".git/hooks/post-index-change").write_text(f"#!/bin/sh\ntouch {ran}\n")
    (nested / ".git/hooks/post-index-change").chmod(0o755)
    for key, value in {
        "core.fsmonitor": f"touch {ran}",
        "core.pager": f"touch {ran}",
        "core.sshCommand": f"touch {ran}",
        "filter.x.clean": f"touch {ran}; cat",
        "filter.x.process": f"touch {ran}",
        "alias.ls-files": f"!touch {ran}",
        "core.worktree": str(elsewhere),
        "core.excludesFile": "/dev/zero",
    }.items():
        git(nested, "config", key, value)
    write(nested, {".gitattributes": "* filter=x\n"})
    write(tree, {"pointer/.git": f"gitdir: {elsewhere}/.git\n", "pointer/here.txt": "here\n"})
    write(tree, {"broken/.git": "gitdir: ../missing\n", "broken/lost.py": "lost\n"})
    write(tree, {"empty/.git/config": "[core\n", "empty/odd.py": "odd\n"})
    for more in ((), ("--hidden",), ("--order", "churn")):
        done = pack(tree, ".", "--verbose", "--format", "json", *more)
        files = {path for path in done.files if "/." not in f"/{path}"}
        assert files == {
            "sound.py", "nested/near.txt", "pointer/here.txt", "broken/lost.py", "empty/odd.py",
        } or files == {
            "sound.py", "nested/near.txt", "nested/more/kept.log", "pointer/here.txt", "broken/lost.py",
            "empty/odd.py",
        }  # fmt: skip
        assert b"FAR" not in done.out
        assert b"repositoryformatversion" not in done.out
        for path in (".git/", "nested/.git/", "pointer/.git", "broken/.git", "empty/.git/"):
            assert done.skips[path] == "hidden (git's own data is never read)"
    assert not ran.exists()


@pytest.mark.parametrize("name", ["config", "index", "HEAD", "packed-refs", "commondir"])
def test_git_data_that_never_ends(pack: Measured, tree: Path, name: str) -> None:
    """A FIFO among the data of a nested repository does not keep git waiting for long."""
    nested = make_repository(tree / "nested", {"a.txt": "a\n"})
    (nested / ".git" / name).unlink(missing_ok=True)
    os.mkfifo(nested / ".git" / name)
    done = pack(tree, ".", "--format", "json")
    assert done.files == {"sound.py": "sound = 1\n", "nested/a.txt": "a\n"}


def test_secrets_in_hidden_files(pack: Measured, tree: Path) -> None:
    """Hidden files stay at home; when asked for, what is secret in them still does."""
    body = ["".join(chr(65 + (i * j * 7 + i) % 26) for i in range(64)) for j in range(1, 25)]
    dashes = "-" * 5
    kind = "OPENSSH PRIVATE KEY"
    key = "\n".join([f"{dashes}BEGIN {kind}{dashes}", *body, f"{dashes}END {kind}{dashes}", ""])
    token = "ghp_" + "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bD1fG3hJ5"
    write(
        tree,
        {
            ".env": f"GITHUB_TOKEN={token}\nDB_PASSWORD='correct-horse-battery-staple'\nDEBUG=1\n",
            ".ssh/id_ed25519": key,
            "deploy/server.pem": key,
        },
    )
    secrets = [*body, token, "correct-horse-battery-staple"]
    for form in FORMS:
        done = pack(tree, ".", "--verbose", "--format", form)
        assert {".env", ".ssh/"} <= done.skips.keys()
        shown = pack(tree, ".", "--hidden", "--format", form, "--budget", "100000", "--query", "token key")
        for text in (done.out, done.err.encode(), shown.out, shown.err.encode()):
            assert [secret for secret in secrets if secret.encode() in text] == []
        assert b"DEBUG=1" in shown.out


def test_a_pack_leaves_itself_out(pack: Measured, tree: Path) -> None:
    """However the output is named, a second run gives the same bytes and does not read the first one's."""
    write(tree, {"docs/a.md": "# A\n"})
    (tree / "link.xml").symlink_to("docs/real.xml")
    for number, name in enumerate(("packed.xml", "docs/../docs/packed.md", str(tree / "p.json"), "link.xml")):
        form = FORMS[number]
        runs = []
        for _ in range(3):
            pack(tree, ".", "--format", form, "-o", name, "--report", "report.html")
            runs.append((tree / name).read_bytes())
        assert len(set(runs)) == 1
        read = READERS[form](runs[0].decode())
        assert set(read) == {"sound.py", "docs/a.md"}
        (tree / name).resolve().unlink()
    assert (tree / "link.xml").is_symlink()


def test_directories_without_permission(pack: Measured, tree: Path) -> None:
    """What may not be read is told, and the rest is packed."""
    write(tree, {"locked/a.txt": "a\n", "blind/b.txt": "b\n", "closed.txt": "c\n", "rules/.gitignore": "x\n"})
    write(tree, {"rules/kept.txt": "kept\n"})
    wrapper: tuple[str, ...] = ()
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may read everything, and there is no setpriv to take that from it")
        wrapper = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
    modes = {"locked": 0o000, "blind": 0o444, "closed.txt": 0o000, "rules/.gitignore": 0o000}
    for name, mode in modes.items():
        (tree / name).chmod(mode)
    try:
        done = pack(tree, ".", "--verbose", "--format", "json", wrapper=wrapper)
    finally:
        for name in modes:
            (tree / name).chmod(0o755)
    assert set(done.files) == {"sound.py", "rules/kept.txt"}
    for path in ("locked/", "blind/b.txt", "closed.txt"):
        assert done.skips[path] == "unreadable (Permission denied)"
    assert "The ignore rules of rules/.gitignore were not applied: Permission denied." in done.err


def test_names_that_are_no_text(pack: Measured, tree: Path) -> None:
    """Names with line ends, controls and bytes that are no UTF-8 are shown escaped, and do not collide."""
    names = [b"a\nb.txt", b"\xff\xfe.txt", b"\\xff\\xfe.txt", b"\x1b]0;title\x07.txt", b"\xe2\x80\xaeexe.txt"]
    for name in names:
        with suppress(OSError):  # macOS takes no name that is not UTF-8
            (tree / os.fsdecode(name)).write_bytes(b"text\n")
            (tree / os.fsdecode(name + b".png")).write_bytes(b"\0")
    count = len(list(tree.iterdir())) // 2
    for form in FORMS:
        done = pack(tree, ".", "--verbose", "--format", form, "--tree", "--order", "churn", LC_ALL="C")
        read = READERS[form](done.out.decode("utf-8"))
        assert len(read) == count
        assert {"a\\nb.txt", "\\x1b]0;title\\x07.txt", "\\u202eexe.txt"} <= read.keys()
        assert not set("\x1b\x07\r\u202e") & set(done.err + done.out.decode("utf-8"))
        assert "a\nb.txt" not in done.err


# What is too large, too many or too deep


@pytest.mark.parametrize("name", ["huge.txt", "huge.bin", "huge.py", "huge.pdf", "huge"])
def test_a_file_of_3_gigabytes(pack: Measured, tree: Path, name: str) -> None:
    """It is not read: left out by its size in a tree, seen to be binary by its beginning when named."""
    with (tree / name).open("wb") as file:
        file.truncate(3_000_000_000)
    done = pack(tree, ".", "--verbose", "--format", "json")
    assert done.files == {"sound.py": "sound = 1\n"}
    assert done.skips[name] == "too large (3,000,000,000 bytes, the limit is 2,000,000)"
    assert "binary" in pack(tree, name, code=3).err


def test_a_named_file_that_is_text_only_at_its_beginning(pack: Measured, tree: Path) -> None:
    """NUL bytes further on are found before the whole file is in memory."""
    with (tree / "log.txt").open("wb") as file:
        file.write(b"a line of a log\n" * 1000)
        file.truncate(3_000_000_000)
    assert "binary" in pack(tree, "log.txt", code=3).err


def test_a_large_document_is_not_taken_for_a_sparse_file(pack: Measured, tree: Path) -> None:
    """A PDF may begin with kilobytes of text, and has NUL bytes in its streams."""
    content = b"BT /F1 24 Tf 20 100 Td (Found in the document) Tj ET"
    fonts = b"/Resources<</Font<</F1<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>>>>>"
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 300]%s/Contents 4 0 R>>" % fonts,
        b"<</Length %d>>stream\n%s\nendstream" % (len(content), content),
        b"<</Length %d>>stream\n%s\nendstream" % (60_000_000, bytes(60_000_000)),
    ]
    data = bytearray(b"%PDF-1.4\n%" + b"comment " * 2_000 + b"\n")
    places = []
    for number, text in enumerate(objects, 1):
        places.append(b"%010d 00000 n \n" % len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, text)
    start = len(data)
    data += b"xref\n0 6\n0000000000 65535 f \n%s" % b"".join(places)
    data += b"trailer<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF\n" % start
    write(tree, {"large.pdf": bytes(data)})
    done = pack(tree, "large.pdf", "--format", "json", megabytes=600)
    assert "Found in the document" in done.files["large.pdf"]


def test_a_large_text_in_16_bits_is_not_taken_for_a_sparse_file(pack: Measured, tree: Path) -> None:
    """Half of a line feed is a NUL byte, and a text may have its first one late."""
    text = "漢字" * 5_000 + "\n" + "漢字の文\n" * 5_200_000
    write(tree, {"large.txt": text.encode("utf-16")})
    assert pack(tree, "large.txt", "--format", "json", megabytes=1_500).files == {"large.txt": text}


def test_a_hundred_thousand_files(pack: Measured, tree: Path) -> None:
    """Half of them in one directory, half spread over 5,000; not one is lost."""
    for number in range(50_000):
        if not number % 10:
            directory = tree / f"spread/{number % 100}/{number}"
            directory.mkdir(parents=True)
        (directory / f"{number}.txt").write_bytes(b"%d\n" % number)
    (tree / "one").mkdir()
    one = str(tree / "one") + "/"
    for number in range(50_000):
        with open(f"{one}{number}.txt", "wb") as file:  # noqa: PTH123 - pathlib takes twice as long
            file.write(b"%d\n" % number)
    done = pack(tree, ".", "--format", "json", seconds=200)
    assert len(done.files) == 100_001
    assert all(path.endswith(f"/{text[:-1]}.txt") for path, text in done.files.items() if path != "sound.py")


def test_a_line_of_20_megabytes(pack: Measured, tree: Path) -> None:
    """A named file is packed whole, with blanks in its only line, without, and with no ASCII in it."""
    texts = {"words.txt": "word " * 4_000_000, "x.js": "x" * 20_000_000, "wide.txt": "ж🙂" * 3_400_000}
    write(tree, texts)
    for name, text in texts.items():
        done = pack(tree, name, "--format", "json", "--compress")
        assert done.files == {name: text}
    done = pack(tree, ".", "--verbose", "--format", "json", "--max-file-size", "30000000")
    assert set(done.files) == {"sound.py", "words.txt", "wide.txt"}
    assert done.skips["x.js"].startswith("generated or minified")


@pytest.mark.parametrize("more", [(), ("--compress",), ("--strip-comments",), ("--budget", "500000")])
def test_nesting_100_000_deep(pack: Measured, tree: Path, more: tuple[str, ...]) -> None:
    """What overflows the stack of a parser, or makes it take all memory, is packed as it is."""
    deep = 100_000
    texts = {
        "nested.json": "[" * deep + "]" * deep + "\n",
        "objects.json": '{"a":' * deep + "1" + "}" * deep + "\n",
        "nested.ipynb": '{"cells": ' + "[" * deep + "]" * deep + "}\n",
        "parentheses.py": "(" * deep + ")" * deep + "\n",
        "parentheses.c": "int x = " + "(" * deep + "1" + ")" * deep + ";\n",
        "braces.js": "function f() " + "{" * deep + "}" * deep + "\n",
        "indented.yaml": "".join(" " * (i % 1000) + f"k{i}:\n" for i in range(1500)),
        "unclosed.rs": "fn f() {" * 20_000 + "\n",
        "generics.cpp": "A<" * 50_000 + "\n",
        "tags.html": "<div>" * 50_000 + "\n",
        "lists.md": "".join(" " * i + "- x\n" for i in range(800)),
    }
    for name in ("nested.json", "objects.json", "tags.html", "braces.js"):  # not minified, by its lines
        texts[name] = re.sub("(.{400})", r"\1\n", texts[name])
    write(tree, texts)
    done = pack(tree, ".", "--format", "json", "--verbose", *more, megabytes=2_000)
    assert not set(done.files) ^ {"sound.py", *texts}
    whole = "--budget" not in more
    exact = [name for name in texts if whole and (not more or name.endswith((".json", ".ipynb", ".md")))]
    assert {name: done.files[name] for name in exact} == {name: texts[name] for name in exact}


def test_directories_200_deep(pack: Measured, tree: Path) -> None:
    """Depth alone loses nothing, in any view of the pack."""
    write(tree, {"d/" * depth + "f.txt": f"{depth}\n" for depth in range(1, 201)})
    done = pack(tree, ".", "--format", "json", "--tree", "--report", "report.html", "--order", "churn")
    assert sorted(int(text) for path, text in done.files.items() if path != "sound.py") == [*range(1, 201)]


def test_a_path_that_is_longer_than_paths_may_be(pack: Measured, tree: Path) -> None:
    """What the system cannot name is told once, as a directory that cannot be read; nothing else is lost."""
    descriptor = os.open(tree, os.O_RDONLY)
    for depth in range(1, 31):
        os.mkdir("d" * 200, dir_fd=descriptor)
        inner = os.open("d" * 200, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
        with open(os.open("f.txt", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor), "w") as file:  # noqa: PTH123
            file.write(f"{depth}\n")
    os.close(descriptor)
    try:
        for more in ((), ("--compress", "--budget", "40000"), ("--order", "churn")):
            done = pack(tree, ".", "--format", "json", "--verbose", *more)
            depths = sorted(int(text) for path, text in done.files.items() if path != "sound.py")
            assert depths == [*range(1, len(depths) + 1)]
            assert len(depths) >= 4
            beyond = [why for path, why in done.skips.items() if path.startswith("d" * 200)]
            assert beyond == ["unreadable (File name too long)"]
    finally:
        subprocess.run(["rm", "-rf", str(tree)], check=True)  # the only one that can


def test_a_hostile_history(pack: Measured, tree: Path) -> None:
    """A commit may hold names and kinds that no checkout has; --ref packs what is a file in it."""
    write(tree, {"a\nb.txt": "newline\n", "x`y.md": "ticks\n"})
    (tree / "link").symlink_to("/etc/passwd")
    commit(tree, {"big.txt": "x" * 2_000_001})
    done = pack(tree, ".", "--ref", "HEAD", "--format", "json", "--verbose", "--order", "churn")
    assert set(done.files) == {"sound.py", "a\\nb.txt", "x`y.md"}
    assert done.skips["big.txt"].startswith("too large")
    assert done.skips["link"].startswith("link")
