"""What a review looks at: the files that differ between two versions of a tree, with both texts.

The versions are two commits, a commit and the work tree or the index, or those before and after a diff.
git reads them as in `m3cli.corpus.changes`: nothing of the repository is run, and nothing is written.
"""

# File names are bytes to git and to the kernel, and pathlib has no bytes paths.
# ruff: noqa: PTH110, PTH112, PTH120
from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from m3cli.corpus.attributes import kinds_of
from m3cli.corpus.borrowed import borrowing, commit_id, literal_paths, quoted, translated
from m3cli.corpus.changes import diff, patch_between, tree_entries
from m3cli.corpus.documents import DocumentLimits, generated_by_name, generated_by_text, is_lock_file
from m3cli.corpus.history import read_blobs, read_tree
from m3cli.corpus.names import printable, shown
from m3cli.corpus.patch import applied, decoded, misfit, parse_raw, split_lines
from m3cli.corpus.patched import after_patch
from m3cli.corpus.review_base import choose_base, in_ci, merge_base
from m3cli.corpus.worktree import find_work_tree, git_environment, run_git
from m3cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from m3cli.corpus.history import TreeFile
    from m3cli.corpus.patch import FileChange

MAX_BYTES = DocumentLimits().max_bytes or 0  # larger files are listed and not reviewed

_REF = b"refs/m3/index"
_BATCH = 32_000_000  # bytes of files before the change that are in memory at a time


@dataclass(frozen=True, slots=True)
class ChangesRequest:
    """What to compare. `path` is a work tree or something in it, and only changes there count.

    `base` and `head` name commits. Without `head` it is the work tree as it is, untracked files included,
    but in continuous integration, where builds leave files behind, HEAD. `base` is "auto" for what
    `choose_base` finds. `staged` compares the index with HEAD. `diff` is a unified diff, of which the
    files at `path` hold the version before or after.
    """

    path: str = "."
    base: str = "auto"
    head: str | None = None
    staged: bool = False
    diff: bytes | None = None


@dataclass(frozen=True, slots=True)
class Changes:
    """The changed files, in git's order, or that of the diff.

    `base` and `head` are ids of commits, "" for the work tree, the index, or no repository. `base` is
    the merge base of what was asked for and what is reviewed. `top` is the root of the work tree.
    `notes` are whole sentences about what was chosen.
    """

    files: tuple[FileChange, ...]
    base: str
    head: str
    top: bytes | None
    notes: tuple[str, ...]


def read_changes(request: ChangesRequest) -> Changes:
    """Read what `request` asks for. No difference gives no files.

    Raises UsageError for options that contradict each other, paths in no work tree and unknown commits,
    CorpusError if there is no merge base, git fails, or a diff is broken or does not apply.
    """
    _check(request)
    place = os.fsencode(os.path.realpath(request.path))
    if not os.path.exists(place):
        raise UsageError(
            f"There is no file or directory {printable(request.path)}.",
            "Check the spelling, and that the path is relative to the current directory.",
        )
    directory = place if os.path.isdir(place) else os.path.dirname(place)
    tree = find_work_tree(directory)
    top = tree.top if tree.git_directory is not None else None
    if request.diff is not None:
        return _of_diff(request.diff, top, directory)
    if top is None:
        raise UsageError(
            f"{printable(request.path)} is in no git work tree.",
            "Name a path in one, or give a diff to review.",
        )
    with translated(top, "The changes"):
        base, head, notes = _versions(request, top)
        paths = [] if place == top else [place[tree.base :]]
        notes += [f"Only changes in {shown(path)} count." for path in paths]
        data = _staged_diff(top, base, paths) if request.staged else diff(top, base, paths, head=head or None)
        changes = parse_raw(data)
        files = read_tree(top, base, sizes=True)
        changes = [whole for batch in _batches(files, changes) for whole in _with_texts(top, batch)]
        kinds = kinds_of(top, base, files, [change.raw_path for change in changes if not change.reason])
    return Changes(tuple(_sifted(change, kinds) for change in changes), base, head, top, tuple(notes))


def _check(request: ChangesRequest) -> None:
    given = {
        "a base": request.base != "auto",
        "a head": request.head is not None,
        "the index": request.staged,
        "a diff": request.diff is not None,
    }
    names = [name for name, is_given in given.items() if is_given]
    if len(names) > 1 and (request.staged or request.diff is not None):
        raise UsageError(
            f"{' and '.join(names).capitalize()} cannot be reviewed at once.",
            "The index is compared with HEAD, and a diff holds both versions: leave out the rest.",
        )


def _versions(request: ChangesRequest, top: bytes) -> tuple[str, str, list[str]]:
    """The ids of the merge base and of the commit to review, if it is one, and what to say of them."""
    if request.staged:
        return commit_id(top, "HEAD"), "", ["The index is compared with HEAD."]
    is_tree = request.head is None and not in_ci()
    tip = request.head or "HEAD"
    end = commit_id(top, tip)
    start, name, why = request.base, printable(request.base), ""
    if request.base == "auto":
        start, name, why = choose_base(top, end)
    base = merge_base(top, start, end, (name, printable(tip)))
    what = "The work tree" if is_tree else printable(tip)
    notes = [f"{what} is compared with {name}{why}, from {base[:10]} on."]
    if request.head is None and not is_tree:
        notes.append("In continuous integration what is not committed does not count.")
    return base, "" if is_tree else end, notes


def _of_diff(data: bytes, top: bytes | None, directory: bytes) -> Changes:
    roots = [directory] if top is None or top == directory else [top, directory]
    changes = after_patch(parse_raw(data), roots, MAX_BYTES)
    notes = ["The changes are those of the diff that was given."]
    if alone := sum(not change.reason and change.head is None for change in changes):
        notes.append(
            f"Of {alone:,} of its files only the hunks are known, since they are not in {shown(roots[0])}."
        )
    return Changes(tuple(_sifted(change, {}) for change in changes), "", "", top, tuple(notes))


def _staged_diff(top: bytes, commit: str, paths: Sequence[bytes]) -> bytes:
    """The unified diff from `commit` to the index, as in `changes.diff`.

    Raises UsageError when a file is in conflict, GitError.
    """
    # What the configuration takes for the work tree decides of what part of the index git speaks.
    environment = git_environment() | {"GIT_WORK_TREE": os.fsdecode(top)}
    listing = run_git(top, "ls-files", "--cached", "--stage", "-z", environment=environment)
    before = {path: (entry.mode, entry.id.encode()) for path, entry in tree_entries(top, commit).items()}
    gone = set(before)
    changed = []
    for entry in listing.split(b"\0"):
        facts, _, path = entry.partition(b"\t")
        if not path:
            continue
        mode, name, stage = facts.split()
        if stage != b"0":
            raise UsageError(
                f"{shown(path)} is in conflict, so that the index is not one version.",
                "Resolve it and `git add` it, or review the work tree.",
            )
        gone.discard(path)
        if before.get(path) != (mode, name):
            changed.append(b"M %b %b %b\n" % (mode, name, quoted(path)))
    # As single files, objects that the repository has too would get new times there.
    header = b"commit %b\ncommitter m3 <m3> 0 +0000\ndata 0\nfrom %b\n" % (_REF, commit.encode())
    with borrowing(top, commit) as git:
        stream = [header, *(b"D %b\n" % quoted(path) for path in sorted(gone)), *changed]
        command = ("-c", "fastimport.unpackLimit=1", "fast-import", "--quiet", "--force")
        git(*command, stdin=b"".join(stream))
        return patch_between(git, commit, _REF.decode(), literal_paths(paths))


def _batches(
    files: Mapping[bytes, TreeFile], changes: Iterable[FileChange]
) -> Iterator[list[tuple[FileChange, TreeFile | None]]]:
    """`changes` with their files before, so many at a time as may be in memory."""
    batch: list[tuple[FileChange, TreeFile | None]] = []
    size = 0
    for change in changes:
        is_new = change.status == "added" and change.raw_path == change.raw_old_path
        file = None if change.reason or is_new else files.get(change.raw_old_path)
        if file is not None and file.size > MAX_BYTES:
            change, file = replace(change, reason=f"larger than {MAX_BYTES:,} bytes"), None  # noqa: PLW2901
        batch.append((change, file))
        size += file.size if file is not None else 0
        if size > _BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def _with_texts(top: bytes, batch: Sequence[tuple[FileChange, TreeFile | None]]) -> Iterator[FileChange]:
    """The changes with the texts before, and after, which the hunks make of those. Raises GitError."""
    blobs = iter(read_blobs(top, [file.id for _, file in batch if file is not None]))
    for change, file in batch:
        base = next(blobs) if file is not None else None
        head = None
        if base is not None:
            lines = split_lines(base.decode("utf-8", "surrogateescape"))
            if misfit(lines, change.hunks, new=False) is None:
                head = "".join(applied(lines, change.hunks)).encode("utf-8", "surrogateescape")
        yield decoded(change, base, head)


def _sifted(change: FileChange, kinds: Mapping[bytes, str]) -> FileChange:
    """`change` with a reason not to review it, if there is one.

    What marks a file as generated, its name and what is in it, has to be so before the change, unless the
    file is new: else a change could keep itself from being reviewed.
    """
    if change.reason:
        return change
    if change.raw_path in kinds:
        return replace(change, reason=kinds[change.raw_path])
    lines = change.head_lines()
    text = change.base or (change.head if change.status == "added" else None) or ""
    if sum(map(len, lines.values())) > MAX_BYTES:
        reason = f"larger than {MAX_BYTES:,} bytes"
    elif is_lock_file(change.old_path):
        reason = "generated: a lock file"
    else:
        kind = generated_by_name(change.old_path) or generated_by_text(change.old_path, text)
        reason = f"generated: {kind}" if kind else ""
    return replace(change, reason=reason)
