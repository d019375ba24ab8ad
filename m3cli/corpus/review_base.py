"""With what a review compares: the target of a pull request, the default branch, or the last commit.

In continuous integration the target is in one of these variables, of which the first that is set counts:

    CI_MERGE_REQUEST_DIFF_BASE_SHA             GitLab: the commit itself
    CI_MERGE_REQUEST_TARGET_BRANCH_NAME        GitLab
    GITHUB_BASE_REF                            GitHub, Gitea and Forgejo Actions
    BITBUCKET_PR_DESTINATION_BRANCH            Bitbucket Pipelines
    SYSTEM_PULLREQUEST_TARGETBRANCH            Azure Pipelines
    BUILDKITE_PULL_REQUEST_BASE_BRANCH         Buildkite
    CI_COMMIT_TARGET_BRANCH                    Woodpecker
    DRONE_TARGET_BRANCH                        Drone, for pull requests
    CHANGE_TARGET                              Jenkins
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from m3cli.corpus.borrowed import commit_id, shallow_commits, translated
from m3cli.corpus.history import resolve_commit
from m3cli.corpus.names import printable, shown
from m3cli.corpus.worktree import run_git
from m3cli.errors import CorpusError

if TYPE_CHECKING:
    from collections.abc import Sequence

_COMMIT = "CI_MERGE_REQUEST_DIFF_BASE_SHA"
_BRANCHES = (
    *("CI_MERGE_REQUEST_TARGET_BRANCH_NAME", "GITHUB_BASE_REF", "BITBUCKET_PR_DESTINATION_BRANCH"),
    *("SYSTEM_PULLREQUEST_TARGETBRANCH", "BUILDKITE_PULL_REQUEST_BASE_BRANCH", "CI_COMMIT_TARGET_BRANCH"),
    *("DRONE_TARGET_BRANCH", "CHANGE_TARGET"),
)
CI_VARIABLES = ("CI", _COMMIT, *_BRANCHES)  # all that decides
_DEFAULTS = ("origin/HEAD", "origin/main", "origin/master", "main", "master")
_DEEPEN = (
    "Fetch the whole history first: `git fetch --unshallow`, `fetch-depth: 0` with actions/checkout, or "
    "`GIT_DEPTH: 0` in GitLab CI."
)


def in_ci() -> bool:
    """Whether this runs in continuous integration, as the environment says."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false") or _target() is not None


def _target() -> tuple[str, str] | None:
    """The variable that names what a pull request is to be merged into, and its value."""
    for name in (_COMMIT, *_BRANCHES):
        value = os.environ.get(name, "").removeprefix("refs/heads/")
        is_pull = name != "DRONE_TARGET_BRANCH" or os.environ.get("DRONE_BUILD_EVENT") == "pull_request"
        if value and is_pull:
            return name, value
    return None


def choose_base(top: bytes, head: str) -> tuple[str, str, str]:
    """A commit to compare `head` with: what git calls it, what people do, and why it was chosen.

    That is the target of the pull request in continuous integration, else the default branch if `head` is
    not on it, else HEAD. Raises CorpusError when the target is not in this clone, GitError.
    """
    if target := _target():
        variable, value = target
        names = [value] if variable == _COMMIT else [f"origin/{value}", value]
        why = f", as {variable} says"
        if found := next((name for name in names if resolve_commit(top, name)), None):
            return found, found, why
        # What is checked out may be the merge of the pull request, whose first parent is the target.
        if variable == "GITHUB_BASE_REF" and resolve_commit(top, f"{head}^2"):
            return f"{head}^1", names[0], why
        raise CorpusError(
            f"{printable(names[0])}, the target that {variable} names, is not in the clone at {shown(top)}.",
            _DEEPEN if shallow_commits(top) else f"Fetch it first: `git fetch origin {printable(value)}`.",
        )
    for name in _DEFAULTS:
        commit = resolve_commit(top, name)
        if commit is not None:
            if _merge_base(top, commit, head) == head:
                return "HEAD", "HEAD", f", which is on {name}"
            return name, name, ", the default branch"
    return "HEAD", "HEAD", ", as there is no default branch to compare with"


def merge_base(top: bytes, base: str, head: str, names: Sequence[str]) -> str:
    """The id of the last commit that `base` and the commit `head` have in common; `names` are for people.

    Raises UsageError when `base` is no commit, CorpusError when there is nothing in common.
    """
    start = commit_id(top, base)
    with translated(top, "The history of " + names[0]):
        common = _merge_base(top, start, head)
        is_shallow = bool(shallow_commits(top))
    if common:
        return common
    words = f"{names[0]} and {names[1]} have no commit in common in the clone at {shown(top)}"
    if is_shallow:
        raise CorpusError(f"{words}, which is shallow.", _DEEPEN)
    raise CorpusError(
        f"{words}; their histories are unrelated.", "Name a base that the change was made from with --base."
    )


def _merge_base(top: bytes, one: str, other: str) -> str:
    return run_git(top, "merge-base", one, other, may_find_nothing=True).decode().strip()
