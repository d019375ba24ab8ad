"""Walking a directory: which of its files are read, and why each other one is not.

Symbolic links are never followed in a walk. What a link inside the tree points to is read at its
own place, and what it points to outside is not what the user named; so the walk cannot leave
the tree, cannot loop and reads no file twice. Paths are absolute bytes, as the kernel has them.
"""

# File names are bytes to git and to the kernel, and pathlib has no bytes paths.
# ruff: noqa: PTH116, PTH118
from __future__ import annotations

import errno
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from m3cli.corpus.ignore import IgnoreRules, Pattern, deciding, is_glob, pattern_lines, read_rules
from m3cli.corpus.types import SkipReason
from m3cli.corpus.worktree import WorkTree, describe, find_work_tree, git_directory_of
from m3cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Collection


@dataclass(frozen=True, slots=True)
class WalkOptions:
    """What thins out a directory walk.

    `include` and `exclude` are globs in gitignore(5) syntax, relative to each directory that is
    walked; `exclude` is the stronger one. `use_ignore_files` is about .gitignore, .m3ignore and
    git's own exclude files. `hidden` lets in names that begin with a dot, but never `.git`.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    use_ignore_files: bool = True
    hidden: bool = False


@dataclass(frozen=True, slots=True)
class Left:
    """A path that the walk saw and left out; a directory's path ends with a slash."""

    path: bytes
    reason: SkipReason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class _Frame:
    """A directory yet to be read.

    `rules` are those from above, strongest first. `tracked_only` says why the directory is
    ignored when it is entered only for the tracked files in it.
    """

    path: bytes
    tree: WorkTree
    rules: tuple[IgnoreRules, ...]
    tracked_only: str = ""


class Walk:
    """One walk below `root`, a real path. `files`, `left` and `notes` hold what it found.

    Paths in `named` are passed over: the user named them too, and they are read for themselves.
    """

    def __init__(self, root: bytes, options: WalkOptions, named: Collection[bytes] = ()) -> None:
        self.files: list[bytes] = []
        self.left: list[Left] = []
        self.notes: list[str] = []
        self._root = root
        self._options = options
        self._named = named
        self._base = len(root.rstrip(b"/")) + 1
        # (not by a library that matches with backtracking: a project file may set globs)
        self._include = _option_globs(options.include, "--include", self._base)
        self._exclude = _option_globs(options.exclude, "--exclude", self._base)
        self._trees: list[WorkTree] = []

    def run(self) -> None:
        """Walk the whole tree. Raises OSError when the root itself cannot be read."""
        frames = [self._first_frame()]
        while frames:
            frame = frames.pop()
            try:
                with os.scandir(frame.path) as entries:
                    by_name = {entry.name: entry for entry in entries}
            except OSError as error:
                if frame.path == self._root:
                    raise
                self.left.append(Left(frame.path + b"/", SkipReason.UNREADABLE, describe(error)))
                continue
            frame = self._with_own_rules(frame, by_name)
            for name in sorted(by_name):
                inner = self._visit(by_name[name], frame)
                if inner is not None:
                    frames.append(inner)
        for tree in self._trees:
            self.notes.extend(tree.problems)

    def _first_frame(self) -> _Frame:
        if not self._options.use_ignore_files:
            return _Frame(self._root, WorkTree(self._root, None), ())
        tree = self._enter(find_work_tree(self._root))
        rules = tree.rules()
        directory = tree.top
        for component in self._root[tree.base :].split(b"/") if tree.top != self._root else ():
            rules = self._directory_rules(tree, directory, None) + rules
            directory = os.path.join(directory, component)
        return _Frame(self._root, tree, rules)

    def _enter(self, tree: WorkTree) -> WorkTree:
        self._trees.append(tree)
        return tree

    def _with_own_rules(self, frame: _Frame, names: Collection[bytes]) -> _Frame:
        """Add the ignore files of the frame's own directory, and a nested repository's."""
        if not self._options.use_ignore_files:
            return frame
        tree, rules, tracked_only = frame.tree, frame.rules, frame.tracked_only
        if b".git" in names and frame.path != tree.top:
            git_directory = git_directory_of(frame.path)
            if git_directory is not None:
                # As in git, the patterns of the outer repository end at the inner one's door.
                tree = self._enter(WorkTree(frame.path, git_directory))
                rules = _binding(rules) + tree.rules()
        own = self._directory_rules(tree, frame.path, names)
        rules = (_binding(own) if tracked_only else own) + rules
        return replace(frame, tree=tree, rules=rules)

    def _directory_rules(
        self, tree: WorkTree, directory: bytes, names: Collection[bytes] | None
    ) -> tuple[IgnoreRules, ...]:
        """Read .m3ignore and .gitignore, in this order, if `names` or the disk has them."""
        found = []
        for name, binding in ((b".m3ignore", True), (b".gitignore", False)):
            if names is not None and name not in names:
                continue
            path = os.path.join(directory, name)
            label = os.fsdecode(path[tree.base :])
            base = len(directory.rstrip(b"/")) + 1
            try:
                rules = read_rules(
                    path, base, label, follow=False, binding=binding, ignore_case=tree.ignore_case
                )
            except OSError as error:
                self.notes.append(f"The ignore rules of {label} were not applied: {describe(error)}.")
                continue
            if rules is not None:
                found.append(rules)
        return tuple(found)

    def _visit(self, entry: os.DirEntry[bytes], frame: _Frame) -> _Frame | None:
        """Sort one entry into files and left; return the frame of a directory to be entered."""
        path, name = entry.path, entry.name
        if path in self._named:
            return None
        try:
            is_directory = entry.is_dir(follow_symlinks=False)
            is_file = entry.is_file(follow_symlinks=False)
            is_link = entry.is_symlink()
        except OSError as error:
            self.left.append(Left(path, SkipReason.UNREADABLE, describe(error)))
            return None

        def leave(reason: SkipReason, detail: str) -> None:
            self.left.append(Left(path + b"/" if is_directory else path, reason, detail))

        # git refuses such names in any case of letters, since some file systems do not tell them apart.
        if name.lower() == b".git":
            leave(SkipReason.HIDDEN, "git's own data is never read")
            return None
        if name.startswith(b".") and not self._options.hidden:
            leave(SkipReason.HIDDEN, "")
            return None
        ignored, tracked_only = self._ignored(path, name, is_directory, frame)
        if ignored:
            leave(SkipReason.IGNORED, ignored)
            return None
        if self._exclude is not None:
            hit = self._exclude.match(path, name, is_directory)
            if hit is not None and not hit.negated:
                leave(SkipReason.IGNORED, f"--exclude {hit.text}")
                return None
        if is_link:
            leave(SkipReason.LINK, self._describe_link(path))
            return None
        if not is_file and not is_directory:
            leave(SkipReason.SPECIAL, "")
            return None
        if is_directory:
            return _Frame(path, frame.tree, frame.rules, tracked_only)
        if self._include is not None and not self._include.covers(path):
            leave(SkipReason.NOT_INCLUDED, "")
        else:
            self.files.append(path)
        return None

    def _ignored(self, path: bytes, name: bytes, is_directory: bool, frame: _Frame) -> tuple[str, str]:
        """Return why `path` is ignored, and why the directory is entered for tracked files only.

        To git, what it tracks is not ignored, whatever the patterns say; only .m3ignore holds.
        """
        rules = frame.rules
        reason = frame.tracked_only
        if reason:
            rules = _binding(rules)
        elif hit := deciding(rules, path, name, is_directory):
            if hit[1].negated:
                return "", ""
            reason = _name_of(*hit)
            if hit[0].binding:
                return reason, ""
        if not reason:
            return "", ""
        if not frame.tree.tracks(path):
            return reason, ""
        hit = deciding(_binding(rules), path, name, is_directory)
        if hit and not hit[1].negated:
            return _name_of(*hit), ""
        return "", reason if is_directory and not frame.tree.tracks_all(path) else ""

    def _describe_link(self, path: bytes) -> str:
        try:
            target = os.path.realpath(path)
            os.stat(target)
        except OSError as error:
            return "in a loop" if error.errno == errno.ELOOP else "dangling"
        if target == self._root or target.startswith(self._root.rstrip(b"/") + b"/"):
            return "its target in the tree stands for itself"
        return "leads out of the tree"


def _option_globs(globs: tuple[str, ...], option: str, base: int) -> IgnoreRules | None:
    """The globs of an option; None for none. Raises UsageError, naming it, for one that is malformed."""
    lines = []
    for glob in globs:
        found = pattern_lines(os.fsencode(glob))
        if not all(is_glob(line) for line in found):
            raise UsageError(
                f"{option} {glob!r} is not a glob.", "Globs are written as in .gitignore, such as '*.md'."
            )
        lines += found
    return IgnoreRules(lines, base, option) if globs else None


def _binding(rules: tuple[IgnoreRules, ...]) -> tuple[IgnoreRules, ...]:
    return tuple(rule for rule in rules if rule.binding)


def _name_of(rules: IgnoreRules, pattern: Pattern) -> str:
    return f"{pattern.text} in {rules.label}"
