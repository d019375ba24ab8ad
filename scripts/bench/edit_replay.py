"""Replay a repository's commits: how much of a prompt is prefilled again, by the order of its files.

python scripts/bench/edit_replay.py [--commits N] [--half-life COMMITS ...] [REPOSITORY ...]

For each of the last N commits along first parents the files are read at that commit, put in order,
packed as `m3 ask` packs them and tokenized for the demo model. What the prompt does not share with the
one before it, from the front, has to be prefilled again; the table has that share of its tokens:

    commit      someone asks after each commit
    edit+commit someone asks with the change still uncommitted as well, and both are counted

`churn` is m3's order. With --half-life, orders of the same touches under slower decay stand beside it: a
commit weighs half of one that is so many commits younger. `0` weighs all commits alike.
"""

from __future__ import annotations

import argparse
import os
import statistics
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from m3cli.corpus.corpus import CorpusRequest, read_corpus
from m3cli.corpus.history import read_history
from m3cli.corpus.order import Standing, State, by_churn
from m3cli.corpus.worktree import run_git
from m3cli.model.catalog import demo_model
from m3cli.prompt.pack import pack_chunks
from m3cli.tasks.model import open_model

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping, Sequence

    from m3cli.corpus.types import Chunk
    from m3cli.model.tokens import Tokenizer


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """A document as the prompt has it, in tokens. Each is one object, however often it is written."""

    ids: tuple[int, ...]


class Prompts:
    """Documents as parts of a prompt, which are the same parts in any order."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: dict[str, list[int]] = {}
        self._written: dict[tuple[str, ...], Written] = {}

    def write(self, chunks: Sequence[Chunk]) -> Written:
        """Write all chunks of one document."""
        key = (chunks[0].path, *(chunk.digest for chunk in chunks))
        if key not in self._written:
            parts = pack_chunks(chunks, self._count, strategy="whole").parts
            self._written[key] = Written(tuple(chain.from_iterable(self._ids[part] for part in parts)))
        return self._written[key]

    def _count(self, texts: Sequence[str]) -> list[int]:
        new = [text for text in dict.fromkeys(texts) if text not in self._ids]
        self._ids.update(zip(new, self._tokenizer.encode_batch(new), strict=True))
        return [len(self._ids[text]) for text in texts]


def prefilled(before: Sequence[Written], now: Sequence[Written]) -> float:
    """The share of the tokens of `now` that come after the common prefix."""
    same = 0
    while same < min(len(before), len(now)) and before[same] is now[same]:
        same += 1
    shared = sum(len(document.ids) for document in now[:same])
    rest = [chain.from_iterable(document.ids for document in prompt[same:]) for prompt in (before, now)]
    for old, new in zip(*rest, strict=False):
        if old != new:
            break
        shared += 1
    return 1 - shared / sum(len(document.ids) for document in now)


def decayed(touches: int, half_life: int) -> int:
    """The weight of the commits in `touches`, in integers, so that it is the same on any machine."""
    numbers = [n for n in range(touches.bit_length()) if touches >> n & 1]
    if half_life == 0:
        return len(numbers)
    return sum(round(2 ** (40 + n % half_life / half_life)) << n // half_life for n in numbers)


def replay(
    repository: Path, commits: int, orders: Mapping[str, Callable[[int], int] | None], prompts: Prompts
) -> tuple[dict[str, list[tuple[float, float]]], list[Written]]:
    """For each order the shares of each commit: committed at once, and edited before that.

    With them the last commit's prompt.
    """
    top = os.fsencode(repository.resolve())
    listed = run_git(top, "rev-list", "--first-parent", "--reverse", f"--max-count={commits + 1}", "HEAD")
    shares: dict[str, list[tuple[float, float]]] = {name: [] for name in orders}
    last: dict[str, list[Written]] = {}
    documents_before: Mapping[str, Written] = {}
    touches_before: Mapping[bytes, int] = {}
    for commit in listed.decode().split():
        corpus = read_corpus(CorpusRequest((str(repository),), ref=commit), lambda: b"")
        chunks: dict[str, list[Chunk]] = {}
        for chunk in corpus.chunks:
            chunks.setdefault(chunk.path, []).append(chunk)
        documents = {path: prompts.write(chunks[path]) for path in corpus.paths}
        touches = read_history(top, commit).touches
        changed = {path for path in documents if documents_before.get(path) is not documents[path]}
        for name, weigh in orders.items():
            now = _prompt(documents, touches, set(), weigh)
            midway = _prompt(documents, touches_before, changed, weigh)
            if name in last:
                both = prefilled(last[name], midway) + prefilled(midway, now)
                shares[name].append((prefilled(last[name], now), both))
            last[name] = now
        touches_before, documents_before = touches, documents
    return shares, last["path"]


def _prompt(
    documents: Mapping[str, Written],
    touches: Mapping[bytes, int],
    uncommitted: Container[str],
    weigh: Callable[[int], int] | None,
) -> list[Written]:
    """`documents`, which come in path order, in that order or, with `weigh`, by churn."""
    if weigh is None:
        return list(documents.values())
    standings = [
        Standing(
            State.UNCOMMITTED if path in uncommitted else State.COMMITTED,
            touches=weigh(touches.get(os.fsencode(path), 0)),
        )
        for path in documents
    ]
    written = list(documents.values())
    return [written[i] for i in by_churn(standings)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("repositories", nargs="*", type=Path, metavar="REPOSITORY")
    parser.add_argument("--commits", type=int, default=50, metavar="N")
    parser.add_argument("--half-life", type=int, nargs="+", default=[], metavar="COMMITS")
    options = parser.parse_args()
    model = demo_model()
    if model is None:
        parser.error("the demo model is not installed: pip install 'm3cli[demo]'")
    orders: dict[str, Callable[[int], int] | None] = {"path": None, "churn": lambda touches: touches}
    for half_life in options.half_life:
        orders[f"half-life {half_life}"] = partial(decayed, half_life=half_life)
    with open_model(model) as opened:
        for repository in options.repositories or [Path(__file__).resolve().parents[2]]:
            shares, prompt = replay(repository, options.commits, orders, Prompts(opened.tokenizer))
            tokens = sum(len(document.ids) for document in prompt)
            replayed = len(shares["path"])
            name = repository.resolve().name
            print(f"{name}: {replayed} commits, at the end {len(prompt):,} files, {tokens:,} tokens")
            if not replayed:
                continue
            print("  prefilled again   commit: mean   median  of path   edit+commit: mean  of path")
            base, base_both = (statistics.mean(values) for values in zip(*shares["path"], strict=True))
            for name, pairs in shares.items():
                once, both = zip(*pairs, strict=True)
                mean, mean_both = statistics.mean(once), statistics.mean(both)
                print(
                    f"  {name:16}{mean:14.1%}{statistics.median(once):9.1%}{mean / base:9.2f}"
                    f"{mean_both:20.1%}{mean_both / base_both:9.2f}"
                )


if __name__ == "__main__":
    main()
