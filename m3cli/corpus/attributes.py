"""What the .gitattributes files of a commit say of its files: which are generated, vendored, without a diff.

They are taken from the commit alone, so that a change to them has no say in its own review.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from m3cli.corpus.borrowed import borrowing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from m3cli.corpus.history import TreeFile

_NAME = b".gitattributes"
_KINDS = {  # attribute → the values that count, and what they say
    b"linguist-generated": ((b"set", b"true"), "generated: linguist-generated in .gitattributes"),
    b"linguist-vendored": ((b"set", b"true"), "vendored: linguist-vendored in .gitattributes"),
    b"diff": ((b"unset",), "without a diff: -diff or binary in .gitattributes"),
}


def kinds_of(
    top: bytes, commit: str, files: Mapping[bytes, TreeFile], paths: Sequence[bytes]
) -> dict[bytes, str]:
    """Why those of `paths` are not reviewed of which the attributes in `commit` say so, without a full stop.

    Empty for those that are said not to be generated, whatever they look like. `files` are the
    commit's. Raises GitError.
    """
    directories = {path.rpartition(b"/")[0] for path in paths}
    parents = {
        b"/".join(parts[:n]) for parts in (d.split(b"/") for d in directories) for n in range(len(parts) + 1)
    }
    wanted = [parent + b"/" + _NAME if parent else _NAME for parent in sorted(parents)]
    entries = [
        b"100644 %b\t%b\0" % (file.id.encode(), path)
        for path in wanted
        if (file := files.get(path)) is not None and file.kind == "file"
    ]
    if not entries:
        return {}
    with borrowing(top, commit) as git:
        git("update-index", "-z", "--index-info", stdin=b"".join(entries))
        names = map(bytes.decode, _KINDS)
        stdin = b"".join(path + b"\0" for path in paths)
        answer = git("check-attr", "--cached", "-z", "--stdin", *names, stdin=stdin).split(b"\0")
    found: dict[bytes, str] = {}
    for path, name, value in zip(answer[::3], answer[1::3], answer[2::3], strict=False):
        values, reason = _KINDS[name]
        if value in values:
            found[path] = found.get(path) or reason
        elif name == b"linguist-generated" and value in (b"unset", b"false"):
            found.setdefault(path, "")
    return found
