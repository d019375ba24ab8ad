"""A pack misses nothing: what git shows is packed, or told with a reason, and the reason is true."""

from __future__ import annotations

import os
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import networkx
import numpy
import pytest

from m3cli.corpus.corpus import CorpusRequest
from m3cli.corpus.types import SkipReason
from m3cli.corpus.walk import WalkOptions
from m3cli.tasks.pack import PackRequest
from m3cli.tasks.pack import pack as run_pack
from tests.git_repositories import commit, git, make_repository, write

if TYPE_CHECKING:
    from collections.abc import Iterable

    from m3cli.corpus.types import Skip

ROOT = Path(__file__).parents[2]
LIMIT = 2_000_000  # bytes, m3's own for files in a tree
# Reasons that hold of whatever the file holds; what shows them is asked below.
BY_CONTENT = (SkipReason.GENERATED, SkipReason.LOCK_FILE)
EXTRACTED = (".pdf", ".docx", ".pptx", ".xlsx", ".epub", ".rtf")


@dataclass(frozen=True)
class Manifest:
    """What became of a tree: the texts that are in the pack, and the rest with its reasons."""

    texts: dict[str, str]
    skips: dict[str, Skip]

    def skip_of(self, path: str) -> Skip | None:
        """What tells of `path`: its own skip, or that of a directory above it."""
        parts = path.split("/")
        above = ("/".join(parts[:depth]) + "/" for depth in range(1, len(parts)))
        return next((self.skips[place] for place in (path, *above) if place in self.skips), None)


def manifest(tree: Path, *, hidden: bool = False) -> Manifest:
    """Pack `tree`; no path may be told of twice, or be both in the pack and left out."""
    request = CorpusRequest((str(tree),), walk=WalkOptions(hidden=hidden))
    result = run_pack(PackRequest(request, redact=False), lambda: b"")
    texts: dict[str, list[str]] = {path: [] for path in result.corpus.paths}
    for chunk in result.pack.chunks:
        texts[chunk.path].append(chunk.text)
    skips = {skip.path: skip for skip in result.corpus.skips}
    assert len(skips) == len(result.corpus.skips)
    assert not skips.keys() & texts.keys()
    assert not result.corpus.notes
    return Manifest({path: "".join(parts) for path, parts in texts.items()}, skips)


def shown_by_git(tree: Path) -> set[str]:
    """What `git ls-files` lists: tracked files, and untracked ones that are not ignored."""
    listing = git(tree, "ls-files", "-co", "--exclude-standard", "-z").decode("utf-8")
    return {path for path in listing.split("\0") if path}


def is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def plain_text(file: Path) -> str | None:
    """The text of a file that nobody could take for anything else."""
    if file.is_symlink() or not file.is_file() or not 0 < file.stat().st_size <= LIMIT:
        return None
    data = file.read_bytes()
    if b"\0" in data or data.startswith((b"%PDF-", b"{\\rtf")):
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return text if text.strip() else None


def untrue(tree: Path, skip: Skip) -> str:
    """What speaks against the reason of a skip, looked at in another way than m3 does; empty if nothing."""
    file = tree / skip.path
    name = file.name.lower()
    reason = skip.reason
    if reason is SkipReason.HIDDEN:
        true = is_hidden(skip.path)
    elif reason is SkipReason.LINK:
        true = file.is_symlink()
    elif reason is SkipReason.EMPTY:
        true = not file.read_bytes().decode("utf-8-sig").strip()
    elif reason is SkipReason.TOO_LARGE:
        true = file.stat().st_size > LIMIT or file.suffix in EXTRACTED  # what unpacks to too much
    elif reason is SkipReason.LOCK_FILE:
        true = any(word in name for word in ("lock", "shrinkwrap", "resolved", "freeze", ".sum"))
    elif reason is SkipReason.GENERATED:
        text = file.read_text("utf-8")
        lines = text.splitlines()
        true = (
            any(mark in line.lower() for mark in ("generated",) for line in lines[:20])
            or ".min." in name
            or name.endswith(".map")
            or len(text) / max(1, len(lines)) > 400
        )
    elif reason in (SkipReason.BINARY, SkipReason.UNDECODABLE):
        true = plain_text(file) is None
    elif reason is SkipReason.IGNORED:
        path = skip.path.rstrip("/")
        true = bool(git(tree, "check-ignore", "--no-index", "--", path)) if "--" not in skip.detail else False
    elif reason is SkipReason.SPECIAL:
        true = not file.is_file() and not file.is_dir()
    else:  # of documents whose text is taken out
        true = file.suffix in EXTRACTED
    return "" if true else f"{skip.path} is not {reason.value} ({skip.detail})"


def missed(tree: Path, found: Manifest, *, hidden: bool = False) -> Iterable[str]:
    """All that is wrong with a manifest, in words; `tree` holds no path with special characters."""
    shown = shown_by_git(tree)
    repositories = tuple(path for path in shown if path.endswith("/"))  # git shows a nested one as a whole
    for path in sorted(shown):
        file = tree / path
        if path in repositories or file.is_dir() or not os.path.lexists(file):
            continue  # a submodule is a directory here, and a deleted or sparse file is nowhere
        text, skip = plain_text(file), found.skip_of(path)
        if path not in found.texts and skip is None:
            yield f"{path} is neither packed nor told"
        elif text is not None and path in found.texts and not path.endswith(".ipynb"):
            if found.texts[path] != text:
                yield f"{path} is packed with another text"
        elif text is not None and skip is not None and skip.reason not in BY_CONTENT:
            if not hidden and is_hidden(path) and skip.reason is SkipReason.HIDDEN:
                continue
            yield f"{path} is text, and left out as {skip.reason.value} ({skip.detail})"
    submodules = tuple(f"{path}/" for path in shown if (tree / path).is_dir() and not path.endswith("/"))
    for path in sorted(found.texts.keys() - shown):
        if not path.startswith(repositories + submodules):
            yield f"{path} is packed, and git does not show it"
    yield from filter(None, (untrue(tree, skip) for skip in found.skips.values()))


# Trees of others


def copied(source: Path, target: Path, *, ignore: tuple[str, ...] = ()) -> Path:
    """`source` as a new repository, all of it added but for caches."""
    skipped = shutil.ignore_patterns("__pycache__", *ignore)
    shutil.copytree(source, target, symlinks=True, ignore=skipped)
    git(target, "init", "--quiet")
    write(target, {".gitignore": "__pycache__/\n*.so\n"})
    git(target, "add", "--all", ".")
    return target


def test_the_standard_library_is_packed_whole(tmp_path: Path) -> None:
    """Thousands of files in many encodings, with data for tests of codecs and archives."""
    big = ("site-packages", "config-*", "ensurepip", "lib-dynload")
    tree = copied(Path(sysconfig.get_path("stdlib")), tmp_path / "tree", ignore=big)
    found = manifest(tree)
    assert list(missed(tree, found)) == []
    assert len(found.texts) > 500


@pytest.mark.parametrize("package", [networkx, numpy], ids=lambda package: package.__name__)
def test_installed_packages_are_packed_whole(tmp_path: Path, package: object) -> None:
    """Packages with compiled code and data beside their sources."""
    source = Path(str(package.__file__)).parent  # type: ignore[attr-defined]
    tree = copied(source, tmp_path / "tree")
    for hidden in (False, True):
        found = manifest(tree, hidden=hidden)
        assert list(missed(tree, found, hidden=hidden)) == []
        assert len(found.texts) > 200


def test_this_repository_is_packed_whole(tmp_path: Path) -> None:
    """Its own sources, test data included."""
    tree = make_repository(tmp_path / "tree")
    ignore = shutil.ignore_patterns("__pycache__", ".*_cache")
    for name in ("m3cli", "quantize", "tests", "scripts"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    write(tree, {"README.md": (ROOT / "README.md").read_bytes(), ".gitignore": "*.gguf\n"})
    git(tree, "add", "--all", ".")
    found = manifest(tree)
    assert list(missed(tree, found)) == []
    assert {"m3cli/tasks/pack.py", "tests/cli/test_pack_manifest.py"} <= found.texts.keys()


# Trees that were made for it


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_repository(tmp_path / "tree", {"first.txt": "first\n"})


def test_ignore_rules_at_every_level(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nested rules, negations, excludes of the repository and the user, tracked files that match them."""
    home = tmp_path / "home"
    write(home, {".config/git/ignore": "*.global\n!kept.global\n"})
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    write(tree, {".git/info/exclude": "*.local\n/deep/build\n"})
    write(
        tree,
        {
            ".gitignore": "*.log\n!kept.log\nbuild/\n/only-here\nforced/\n\\#odd\ntrailing \\ \n",
            "deep/.gitignore": "!*.log\n*.txt\n!deeper/\n",
            "deep/deeper/.gitignore": "!yes.txt\n*.log\n",
            "deep/deeper/build/.gitignore": "!*\n",
            ".hidden/.gitignore": "*\n",
        },
    )
    names = (
        "a.log",
        "kept.log",
        "build/a.py",
        "only-here",
        "a.txt",
        "yes.txt",
        "a.local",
        "a.global",
        "a.py",
    )
    for place in ("", "deep/", "deep/deeper/", "deep/deeper/build/", "other/only-here/", ".hidden/"):
        write(
            tree, {place + name: f"{place}{name}\n" for name in names if not (place + name).endswith("re/")}
        )
    write(tree, {"kept.global": "x\n", "#odd": "x\n", "forced/a.py": "forced\n", "forced/b.py": "no\n"})
    git(tree, "add", "--force", "forced/a.py", "build/a.py", "deep/a.txt", "a.local")
    for hidden in (False, True):
        found = manifest(tree, hidden=hidden)
        assert list(missed(tree, found, hidden=hidden)) == []
    assert {
        "forced/a.py",
        "build/a.py",
        "deep/a.txt",
        "a.local",
        "deep/a.log",
        "kept.log",
    } <= found.texts.keys()
    assert not {"forced/b.py", "a.global", "deep/deeper/build/a.py", "a.log"} & found.texts.keys()
    every = {str(file.relative_to(tree)) for file in tree.rglob("*") if file.is_file()}
    untold = {path for path in every if path not in found.texts and found.skip_of(path) is None}
    assert untold == set()  # what git does not show is told as well


def test_all_states_of_the_index(tree: Path) -> None:
    """Staged, changed, deleted, renamed, intended, unmerged and sparse files are what is on the disk."""
    names = ("changed", "deleted", "renamed", "assumed", "skipped", "removed", "far/sparse", "conflict")
    commit(tree, {f"{name}.txt": f"{name}\n" for name in names})
    git(tree, "checkout", "--quiet", "-b", "other")
    commit(tree, {"conflict.txt": "theirs\n"})
    git(tree, "checkout", "--quiet", "main")
    commit(tree, {"conflict.txt": "ours\n"})
    git(tree, "read-tree", "-m", "main~1", "main", "other")
    write(tree, {"intended.txt": "intended\n", "staged.txt": "staged\n", "untracked.txt": "untracked\n"})
    git(tree, "add", "--intent-to-add", "intended.txt")
    git(tree, "add", "staged.txt")
    git(tree, "mv", "renamed.txt", "new-name.txt")
    git(tree, "rm", "--quiet", "--cached", "removed.txt")
    git(tree, "update-index", "--assume-unchanged", "assumed.txt")
    git(tree, "update-index", "--skip-worktree", "skipped.txt", "far/sparse.txt")
    write(tree, {"changed.txt": "new text\n", "assumed.txt": "new text\n", "skipped.txt": "new text\n"})
    (tree / "deleted.txt").unlink()
    shutil.rmtree(tree / "far")
    found = manifest(tree)
    assert list(missed(tree, found)) == []
    there = {
        "changed",
        "assumed",
        "skipped",
        "intended",
        "staged",
        "untracked",
        "new-name",
        "conflict",
        "removed",
    }
    assert {f"{name}.txt" for name in there} == found.texts.keys() - {"first.txt"}
    assert found.texts["skipped.txt"] == "new text\n"


def test_submodules_and_linked_work_trees(tree: Path, tmp_path: Path) -> None:
    """A submodule is read by its own rules, and so is a work tree that is linked to another repository."""
    library = make_repository(tmp_path / "library", {"lib.py": "lib\n", ".gitignore": "*.tmp\n"})
    git(tree, "submodule", "--quiet", "add", str(library), "modules/library")
    commit(tree, {".gitignore": "*.py\n", "kept.tmp": "kept\n"})
    write(tree, {"modules/library/new.py": "new\n", "modules/library/no.tmp": "no\n", "no.py": "no\n"})
    linked = tmp_path / "linked"
    git(tree, "worktree", "add", "--quiet", "--detach", str(linked))
    write(linked, {"more.txt": "more\n", "no.py": "no\n"})
    found = manifest(tree)
    assert list(missed_outside(tree, found, "modules/library")) == []
    inner = {"modules/library/lib.py", "modules/library/new.py"}
    assert found.texts.keys() == {"first.txt", "kept.tmp", *inner}
    module = manifest(tree / "modules/library")
    assert list(missed(tree / "modules/library", module)) == []
    found = manifest(linked)
    assert list(missed(linked, found)) == []
    assert found.texts.keys() == {"first.txt", "kept.tmp", "more.txt"}


def missed_outside(tree: Path, found: Manifest, submodule: str) -> Iterable[str]:
    """As `missed`, but for skips in a submodule, about which git says nothing from outside."""
    skips = {path: skip for path, skip in found.skips.items() if not path.startswith(f"{submodule}/")}
    return missed(tree, Manifest(found.texts, skips))


def test_reasons_are_the_true_ones(tree: Path) -> None:
    """Whatever looks like a reason and is none does not keep a text out."""
    texts = {
        "generated-docs.md": "This file says that code is generated. Do not edit lightly.\n",
        "about.py": "# How @generated marks work\n'@generated'\n",
        "locks.py": "lock = 1\n",
        "my-lock.json": "{}\n",
        "data.csv": "1,2,3\n" * 2000,
        "wide.csv": "1," * 4000 + "\n",
        "wide.py": "x = [" + "1, " * 3000 + "]\n",
        "elf.txt": "\x7fELF is how programs begin\n"[1:],
        "bm.txt": "BM is a mark of pictures\n",
        "mz.txt": "MZ begins programs\n",
        "pk.txt": "PK\n",
        "id3.txt": "ID3 is a tag\n",
        "gguf.txt": "GGUF is a format\n",
        "xz.png": "text in a picture's name\n",
        "text.pdf": "no document\n",
        "text.docx": "no document\n",
        "text.exe": "text\n",
        "Makefile": "all:\n",
        "dot.": "text\n",
        "%PDF": "text\n",
        "form\u00e9.txt": "name\n",
        "controls.txt": "a\x08b\x0c\x1b[0m\n",
        "one-character": "x",
        "cr.txt": "a\rb\r",
        "bom.txt": "\ufeffmark\n",
        "emoji \U0001f600.txt": "smile\n",
    }
    write(tree, texts)
    found = manifest(tree)
    wrong = list(missed(tree, found))
    assert wrong == []
    texts["bom.txt"] = "mark\n"
    assert {path: found.texts.get(path) for path in texts} == texts
