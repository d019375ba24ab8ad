"""What it costs, and what it loses, to update a context in place while a repository changes.

First the hard cases: the values of constants change, and all that uses them, and was computed with the old
ones in view, stays as it is; or their names do, everywhere. Then commits are replayed that touch the given
files. Two sessions of one model follow them, each with the files in the order that m3 gives them for it: one
computes all behind the first change of each commit (churn), and one updates its context in place and never
computes it anew (path). Printed are tokens and seconds for each; then, after 1, 10 and all commits, the share
of right answers to the questions of `m3 eval` about the code, beside those of a context of the same files
that was computed exactly, and how far the two are apart at the first token of the answer: questions about
lines that have changed since the beginning apart from the others. Intervals are of 95 % (Wilson).
usage: python scripts/bench/inplace.py [--model GGUF] [--repository DIR] [--commits N] [--flips TOKENS]
       [--changes values names] [GLOB ...]
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain, starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from m3cli.corpus.corpus import CorpusRequest, read_corpus
from m3cli.corpus.sources import WalkOptions
from m3cli.corpus.worktree import run_git
from m3cli.engine import inplace
from m3cli.engine.events import EngineConfig, Finished, Request, Token, Updated
from m3cli.engine.llama import Model
from m3cli.engine.llama_library import lib
from m3cli.engine.session import Session
from m3cli.model.catalog import demo_model, resolve
from m3cli.prompt.pack import pack_chunks
from m3cli.tasks.context import INSTRUCTIONS
from m3cli.tasks.evaluate.code import MAX_TOKENS, TASKS
from m3cli.tasks.evaluate.prompting import Prompter
from m3cli.tasks.evaluate.results import Score
from m3cli.tasks.evaluate.trial import Material, Question, Scope, TooShortError
from m3cli.tasks.model import open_model

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from m3cli.corpus.corpus import Corpus
    from m3cli.corpus.order import Order
    from m3cli.engine.events import Update
    from m3cli.tasks.prompts import Prompt

# Files of this repository that many of its commits touch.
FILES = (
    "m3cli/cli/app.py",
    "m3cli/cli/ask.py",
    "m3cli/model/tokens.py",
    "m3cli/report/output.py",
    "m3cli/tasks/model.py",
    "m3cli/tasks/warm.py",
    "quantize/sensitivity.py",
)
SCOPE = Scope((1,), depths=5, samples=3)


@dataclass(frozen=True, slots=True)
class State:
    """The files at one commit as a prompt, of which the first `prefix` tokens are the files."""

    corpus: Corpus
    parts: tuple[str, ...]
    tokens: tuple[int, ...]
    prefix: int


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, and the log-probabilities of its first token."""

    text: str
    first: np.ndarray[Any, np.dtype[np.float64]]


class Side:
    """A session that is brought up to date in one of the two ways."""

    def __init__(self, path: str, n_ctx: int, update: Update) -> None:
        config = EngineConfig(path, n_ctx=n_ctx, threads=_cores(), in_place=update == "inplace")
        self._model = Model(config, extra_buffers=False)
        self._session = Session(self._model)
        self._update = update
        self.staleness = 0.0

    def follow(self, state: State) -> tuple[int, float]:
        """Bring the context up to date: how many tokens that computed, and in how many seconds."""
        begin = time.monotonic()
        request = Request(state.tokens[: state.prefix], 0, prefix=state.prefix, update=self._update)
        for event in self._session.generate(request):
            if isinstance(event, Updated):
                self.staleness = event.staleness
            elif isinstance(event, Finished):
                computed = event.prompt_tokens - event.restored_tokens
        return computed, time.monotonic() - begin

    def ask(self, prompt: Prompt) -> Reply:
        """Answer, greedily."""
        first, pieces = None, []
        request = Request(prompt.tokens, MAX_TOKENS, prefix=prompt.prefix, update=self._update)
        for event in self._session.generate(request):
            if isinstance(event, Token):
                if first is None:
                    first = self._logits()
                pieces.append(event.text)
        assert first is not None
        return Reply("".join(pieces).strip(), first)

    def _logits(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        row = lib.llama_get_logits_ith(self._model._context, -1)
        logits = np.ctypeslib.as_array(row, (self._model.n_vocab,)).astype(np.float64)
        logits -= logits.max()
        return logits - np.log(np.exp(logits).sum())

    def close(self) -> None:
        """Free the model."""
        self._model.close()


@dataclass(frozen=True, slots=True)
class Asked:
    """What both sides said to a question."""

    question: Question
    exact: Reply
    updated: Reply

    @property
    def divergence(self) -> float:
        """Kullback-Leibler divergence of the first token, in nats."""
        p = self.exact.first
        return float((np.exp(p) * (p - self.updated.first)).sum())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def state_of(prompter: Prompter, corpus: Corpus) -> State:
    pack = pack_chunks(corpus.chunks, prompter.model.tokenizer.count_batch, strategy="whole")
    prompt = prompter.prompt(pack.parts, "\nQuestion: Which?", system=INSTRUCTIONS)
    return State(corpus, tuple(pack.parts), tuple(prompt.tokens), prompt.prefix)


def states(
    prompter: Prompter, repository: Path, files: Sequence[str], commits: int, order: Order
) -> Iterator[State]:
    """The files at each of the last commits that touch them, and before the first of these."""
    top = os.fsencode(repository.resolve())
    options = ["--first-parent", "--reverse", f"--max-count={commits + 1}"]
    listed = run_git(top, "rev-list", *options, "HEAD", "--", *files).decode().split()
    for commit in listed:
        walk = WalkOptions(include=tuple(files))
        request = CorpusRequest((str(repository),), walk, ref=commit, order=order)
        yield state_of(prompter, read_corpus(request, bytes))


def questions_of(prompter: Prompter, state: State) -> list[Question]:
    """The questions of `m3 eval` about the code."""
    material = Material("", state.corpus.chunks, "", own=True)
    found: list[Question] = []
    for name, make in TASKS.items():
        task = make(material, prompter, SCOPE)
        for missing in range(0, 2000, 40):  # the haystack has to be a little shorter than the files
            with suppress(TooShortError):
                for trial in task.trials(len(state.tokens) + 200 - missing):
                    found += [replace(question, id=f"{name} {question.id}") for question in trial.questions]
                break
    return found


def is_edited(question: Question, state: State, lines: frozenset[str]) -> bool:
    """Whether a line that the question is about is none of these; its number alone does not count."""
    names = re.findall(r"`[\w.]*?(\w+)`", question.text)
    words = re.compile(rf"\b({'|'.join(map(re.escape, names + list(question.answers)))})\b")
    return any(words.search(line) and line not in lines for line in lines_of(state))


def lines_of(state: State) -> frozenset[str]:
    return frozenset(line for chunk in state.corpus.chunks for line in chunk.text.split("\n"))


def asked(
    sides: Sequence[Side], prompter: Prompter, state: State, questions: Iterable[Question]
) -> list[Asked]:
    result = []
    for question in questions:
        prompt = prompter.prompt(state.parts, question.text, system=INSTRUCTIONS)
        exact, updated = (side.ask(prompt) for side in sides)
        result.append(Asked(question, exact, updated))
    return result


def row_of(name: str, group: Sequence[Asked]) -> str:
    if not group:
        return f"| {name} | 0 | | | | | |"
    scores = " | ".join(shown(each.question.score(reply(each).text) for each in group) for reply in REPLIES)
    same = sum(each.exact.text == each.updated.text for each in group)
    divergences = [each.divergence for each in group]
    return (
        f"| {name} | {len(group)} | {scores} | {same} of {len(group)} "
        f"| {statistics.mean(divergences):.4f} | {max(divergences):.4f} |"
    )


DEFINITIONS = "constants.py"
# What becomes of the constants: what is asked then, and which fields of a Flip are right and out of date.
CHANGES = {
    "values": (
        (
            "its value",
            "What is the value of the constant `{name}` in constants.py? Answer with the value alone.",
            *("new", "old"),
        ),
        (
            "the value that a function uses",
            (
                "The function `{user}` in {path} uses one constant with a name in capitals. What is the "
                "value of that constant? Answer with the value alone."
            ),
            *("new", "old"),
        ),
    ),
    "names": (
        (
            "its value, by the new name",
            "What is the value of the constant `{renamed}` in constants.py? Answer with the value alone.",
            *("old", ""),
        ),
        (
            "the name that a function uses",
            (
                "The function `{user}` in {path} uses one constant with a name in capitals. What is the "
                "name of that constant? Answer with the name alone."
            ),
            *("renamed", "name"),
        ),
    ),
}
REPLIES = (lambda each: each.exact, lambda each: each.updated)
HEAD = (
    "| {} | questions | right, exact | right, in place | same answer | KL, mean | KL, most |\n"
    "|---|---|---|---|---|---|---|"
)


def replay(path: str, prompter: Prompter, by_churn: Sequence[State], by_path: Sequence[State]) -> None:
    commits = len(by_path) - 1
    n_ctx = max(len(state.tokens) for state in (*by_churn, *by_path)) + 512
    exact, updated = Side(path, n_ctx, "exact"), Side(path, n_ctx, "inplace")
    reference = Side(path, n_ctx, "exact")
    spent: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
    rows = []
    lines = lines_of(by_path[0])
    for number, state in enumerate(by_path):
        costs = exact.follow(by_churn[number]), updated.follow(state)
        if number == 0:
            continue
        for name, cost in zip(("exact", "in place"), costs, strict=True):
            spent[name].append(cost)
            print(f"{number}: {name} {cost[0]:,} tokens, {cost[1]:.1f} s", file=sys.stderr, flush=True)
        if number in {1, 10, commits}:
            reference.follow(state)
            result = asked((reference, updated), prompter, state, questions_of(prompter, state))
            for kind, edited in (("edited", True), ("not edited", False)):
                group = [each for each in result if is_edited(each.question, state, lines) == edited]
                rows.append(row_of(f"{number} ({updated.staleness:.0%} stale), {kind}", group))
                print(rows[-1], file=sys.stderr, flush=True)
    print(
        f"{commits} commits, {by_path[0].prefix:,} tokens of files at the beginning and "
        f"{by_path[-1].prefix:,} at the end\n"
    )
    print("| update | tokens a commit, mean | median | seconds a commit, mean | median | seconds in all |")
    print("|---|---|---|---|---|---|")
    for name, costs_of in spent.items():
        tokens, seconds = zip(*costs_of, strict=True)
        print(
            f"| {name} | {statistics.mean(tokens):,.0f} | {statistics.median(tokens):,.0f} "
            f"| {statistics.mean(seconds):.1f} | {statistics.median(seconds):.1f} | {sum(seconds):,.0f} |"
        )
    print("\n" + HEAD.format("commits, answer"))
    print("\n".join(rows), flush=True)
    for side in (exact, updated, reference):
        side.close()


@dataclass(frozen=True, slots=True)
class Flip:
    """A constant whose value or name becomes another one, and a function that uses it and no other."""

    path: str
    name: str
    renamed: str
    old: str
    new: str
    user: str
    text: str


def flips_in(path: str, text: str) -> Iterator[Flip]:
    """Integer constants of a Python file, each with a function that names no other constant."""
    tree = ast.parse(text)
    found = re.findall(r"^(_*[A-Z][A-Z0-9_]+) = (\d[\d_]+)\b", text, re.M)
    values = {name: value for name, value in found if text.count(value) == 1}
    for node in tree.body:
        used = {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and each.id.isupper()}
        if isinstance(node, ast.FunctionDef) and len(used) == 1 and used <= values.keys():
            (name,) = used
            value = values.pop(name)
            source = f"{ast.get_source_segment(text, node)}\n\n\n"
            yield Flip(path, name, f"{name}_HERE", value, str(int(value) * 3 + 7), node.name, source)


def flips_of(prompter: Prompter, repository: Path, room: int) -> list[Flip]:
    """The shortest of a repository that take so many tokens together."""
    corpus = read_corpus(CorpusRequest((str(repository),), WalkOptions(include=("*.py",)), ref="HEAD"), bytes)
    texts: defaultdict[str, str] = defaultdict(str)
    for chunk in corpus.chunks:
        texts[chunk.path] += chunk.text
    flips = sorted(chain.from_iterable(starmap(flips_in, texts.items())), key=lambda flip: len(flip.text))
    chosen: dict[str, Flip] = {}
    for each in flips:
        room -= prompter.count([each.text])
        if room >= 0:
            chosen.setdefault(each.name, each)
    return list(chosen.values())


def flip(path: str, prompter: Prompter, flips: Sequence[Flip], change: str) -> None:
    """Give constants new values where they are defined, or new names everywhere, and ask about them."""
    # Far from what uses them: what stands right behind an edit is computed again.
    before = defaultdict(str, {DEFINITIONS: "".join(f"{f.name} = {f.old}\n" for f in flips)})
    for each in flips:
        before[each.path] += each.text
    if change == "values":
        after = before | {DEFINITIONS: "".join(f"{f.name} = {f.new}\n" for f in flips)}
    else:
        names = {each.name: each.renamed for each in flips}
        word = re.compile(rf"\b({'|'.join(names)})\b")
        after = {name: word.sub(lambda match: names[match[1]], text) for name, text in before.items()}
    with tempfile.TemporaryDirectory() as directory:
        first, second = (_written(prompter, Path(directory, "tree"), files) for files in (before, after))
    n_ctx = max(len(first.tokens), len(second.tokens)) + 512
    sides = Side(path, n_ctx, "exact"), Side(path, n_ctx, "inplace")
    sides[1].follow(first)
    for side in sides:
        computed, seconds = side.follow(second)
        print(f"{change}: {computed:,} tokens, {seconds:.1f} s", file=sys.stderr, flush=True)
    print(
        f"\n{len(flips)} constants in {second.prefix:,} tokens of files have new {change} "
        f"({computed:,} tokens computed in place, {sides[1].staleness:.1%} stale)\n"
    )
    print("| asked | questions | right, exact | right, in place | as before, exact | as before, in place |")
    print("|---|---|---|---|---|---|")
    for title, form, right, former in CHANGES[change]:
        asking = [Question(each.name, f"\nQuestion: {form.format(**asdict(each))}", ()) for each in flips]
        replies = asked(sides, prompter, second, asking)
        cells = [
            shown(
                holds(reply(said).text, getattr(each, field))
                for each, said in zip(flips, replies, strict=True)
            )
            if field
            else ""
            for field in (right, former)
            for reply in REPLIES
        ]
        print(f"| {title} | {len(flips)} | {' | '.join(cells)} |", flush=True)
    for side in sides:
        side.close()


def holds(reply: str, word: str) -> float:
    """Whether a reply gives a number or a name, with or without underscores."""
    wanted = Question("", "", (word.replace("_", ""),), scoring="words")
    return wanted.score(reply.replace("_", ""))


def shown(scores: Iterable[float]) -> str:
    score = Score.of(scores)
    return f"{score.mean:.0%} ({score.low:.0%}–{score.high:.0%})"


def _written(prompter: Prompter, tree: Path, files: dict[str, str]) -> State:
    for name, text in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text, encoding="utf-8")
    return state_of(prompter, read_corpus(CorpusRequest((str(tree),)), bytes))


def main() -> None:
    inplace.STALEST = 1.0  # whatever comes
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="*", metavar="GLOB")
    parser.add_argument("--model", metavar="GGUF")
    parser.add_argument("--repository", type=Path, default=Path(__file__).resolve().parents[2], metavar="DIR")
    parser.add_argument("--commits", type=int, default=30, metavar="N")
    parser.add_argument("--flips", type=int, default=6000, metavar="TOKENS")
    parser.add_argument("--changes", nargs="*", default=list(CHANGES), choices=list(CHANGES))
    options = parser.parse_args()
    reference = resolve(options.model, {}) if options.model else demo_model()
    if reference is None:
        parser.error("the demo model is not installed: pip install 'm3cli[demo]'")
    with open_model(reference) as opened:
        prompter = Prompter(opened, {})
        path = str(opened.header.path)
        print(f"{opened.ref.name}, {_cores()} cores\n")
        flips = flips_of(prompter, options.repository, options.flips)
        for change in options.changes:
            flip(path, prompter, flips, change)
        if not options.commits:
            return
        by_churn, by_path = (
            list(states(prompter, options.repository, options.files or FILES, options.commits, order))
            for order in ("churn", "path")
        )
        print()
        replay(path, prompter, by_churn, by_path)


if __name__ == "__main__":
    main()
