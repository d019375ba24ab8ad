"""Orders of documents, each a pure function with a stated reason.

The KV cache of a prompt is reused up to the first token that differs, so an order is the better the
later that token comes. A function takes a value for each document, the documents being in path order,
and returns the positions of the documents in the new order; ties stay in path order.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from enum import IntEnum
from graphlib import TopologicalSorter
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

Order = Literal["churn", "path", "given", "dependency", "relevance"]


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


def by_dependency(paths: Sequence[str], dependencies: Mapping[str, Collection[str]]) -> list[int]:
    """Definitions before uses: a document stands behind all that it depends on.

    `dependencies` has for a path those that it depends on; what is not among `paths` does not count.
    Documents that depend on each other stand together, in path order. Whenever several could be next, the
    first of them in path order is. Reason: a model reads once, from front to back, so it should know
    what a name means when it meets it. And what all else depends on changes less often than what
    nothing depends on, which stands last.
    """
    positions = {path: position for position, path in enumerate(paths)}
    needs = [[positions[path] for path in dependencies.get(user, ()) if path in positions] for user in paths]
    firsts = _first_of_cycles(needs)
    members: defaultdict[int, list[int]] = defaultdict(list)
    sorter: TopologicalSorter[int] = TopologicalSorter()
    for position, first in enumerate(firsts):
        members[first].append(position)
        sorter.add(first, *({firsts[need] for need in needs[position]} - {first}))
    sorter.prepare()
    ready = list(sorter.get_ready())
    heapify(ready)
    order: list[int] = []
    while ready:
        first = heappop(ready)
        order += members[first]
        sorter.done(first)
        for following in sorter.get_ready():
            heappush(ready, following)
    return order


def by_relevance(scores: Sequence[float]) -> list[int]:
    """The document with the lowest score first, the most relevant last.

    Reason: the question stands behind the corpus, and models use best what is near to it; what is in the
    middle of a long context they overlook most. The order is another for each question, so no
    question finds the KV cache of the one before: it is for a corpus that is asked once.
    """
    return sorted(range(len(scores)), key=scores.__getitem__)


def _first_of_cycles(needs: Sequence[Sequence[int]]) -> list[int]:
    """Give for each position the first of its strongly connected component (Tarjan 1972).

    A position in no cycle is the first of its own. There is no recursion, as chains may be long.
    """
    firsts = [-1] * len(needs)
    found = [0] * len(needs)  # when each was found, counted from 1
    lowest = [0] * len(needs)  # when the earliest was found that is reached from here and not yet closed
    count = 0
    opened: list[int] = []
    for root in range(len(needs)):
        walk = [] if found[root] else [(root, iter(needs[root]))]
        while walk:
            position, rest = walk[-1]
            if not found[position]:
                count += 1
                found[position] = lowest[position] = count
                opened.append(position)
            for need in rest:
                if not found[need]:
                    walk.append((need, iter(needs[need])))
                    break
                if firsts[need] < 0:
                    lowest[position] = min(lowest[position], found[need])
            else:
                walk.pop()
                if walk:
                    above = walk[-1][0]
                    lowest[above] = min(lowest[above], lowest[position])
                if lowest[position] == found[position]:
                    component = [opened.pop()]
                    while component[-1] != position:
                        component.append(opened.pop())
                    first = min(component)
                    for member in component:
                        firsts[member] = first
    return firsts
