"""Orders of documents, each a pure function with a stated reason.

The KV cache of a prompt is reused up to the first token that differs, so an order is the better the
later that token comes. A function takes a value for each document, the documents being in path order,
and returns the positions of the documents in the new order; ties stay in path order.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

Order = Literal["churn", "path", "given"]


class State(IntEnum):
    """What git has to do with a document's text, the least likely to change first."""

    COMMITTED = 0  # as it is in the commit
    UNCOMMITTED = 1  # changed, new or ignored: the user is at work on it
    OUTSIDE = 2  # in no work tree, so that nothing is known of it
    STREAM = 3  # standard input, which is another text each time


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of how a document changes.

    `repository` is the rank of its repository among those of the corpus. `touches` has a bit for
    each commit of that repository, later ones higher, set if the commit changed the document.
    """

    state: State
    repository: int = 0
    touches: int = 0


def path_key(path: bytes) -> list[bytes]:
    """The sort key of the path order: components, compared as bytes.

    Reason: it needs nothing but the names, so it is the same on any machine, in any locale and for any
    file system. A directory's files stand together, as people expect of a printed tree.
    """
    return path.split(b"/")


def by_argument(arguments: Sequence[int]) -> list[int]:
    """Documents as the user named them: argument by argument, in path order within a directory.

    Reason: the user knows what changes least, or what the model should read last, better than m3.
    """
    return sorted(range(len(arguments)), key=arguments.__getitem__)


def by_churn(standings: Sequence[Standing]) -> list[int]:
    """The document that was changed longest ago first; what is not committed last.

    Among documents last changed by the same commit, the one whose change before that is older stands
    first. Reason: what changed recently changes next. A commit moves only documents that it changes,
    and to the end, so everything in front of the first of them stays where it is; and as uncommitted
    documents stand at the end already, in the order in which a commit leaves them, committing them
    moves nothing. Several repositories stand one after the other, since their commits cannot be
    compared.

    This is exponential decay with a half-life of one commit. Longer ones were replayed beside it
    (`scripts/bench/edit_replay.py`) on m3's own commits, and on those of eight C projects as their change
    logs list them, with made-up text in the files. With a question after each commit, the best of them
    prefilled up to a quarter less in some and no less in others. But all of them put what was just
    committed back into the middle: with a question before each commit too, none was better in any.
    """
    return sorted(
        range(len(standings)),
        key=lambda i: (standings[i].state, standings[i].repository, standings[i].touches),
    )
