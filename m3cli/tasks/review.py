"""`m3 review`: what is wrong with a change, each finding at a line that exists and was changed.

The stages in order: divide the change into groups of files that fit the context, have the model
claim what is wrong with each, locate every claim in the new version, and have the model try to refute it.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from m3cli.corpus.history import read_blobs, read_tree
from m3cli.corpus.walk import WalkOptions
from m3cli.engine.events import (
    Event,
    Finished,
    Loaded,
    Notice,
    NotSaved,
    Prefilled,
    Request,
    Restored,
    Sampling,
    Token,
)
from m3cli.errors import CorpusError, UsageError
from m3cli.settings import PROJECT_FILE
from m3cli.tasks.ask import DENSE
from m3cli.tasks.context import Context
from m3cli.tasks.findings import Review, Unreviewed
from m3cli.tasks.review_check import Sieve, Wanted, matches
from m3cli.tasks.review_groups import groups_of
from m3cli.tasks.review_prompt import (
    CHECK_SCHEMA,
    check_task,
    claims_schema,
    is_refuted,
    read_claims,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from m3cli.corpus.patch import FileChange
    from m3cli.corpus.reviewed import Changes
    from m3cli.tasks.context import ContextRequest
    from m3cli.tasks.findings import Finding
    from m3cli.tasks.prompts import Prompt
    from m3cli.tasks.review_groups import Group, Mode
    from m3cli.tasks.review_prompt import Claim
    from m3cli.tasks.stepping import OpenEngine, SteppingEngine

_JUDGEMENT = 300  # tokens of an answer that judges one claim


@dataclass(frozen=True, slots=True)
class ReviewRequest:
    """Everything that a review depends on.

    `context` says how the model runs, and what is read beside the change: the tree for `related`, the base
    for `repo`. With `check`, each finding has to survive a second look. `time_limit` is in seconds,
    `token_limit` counts what is computed, of prompts and answers; None is no limit.
    """

    changes: Changes
    context: ContextRequest
    mode: Mode = "related"
    check: bool = True
    wanted: Wanted = field(default_factory=Wanted)
    time_limit: float | None = None
    token_limit: int | None = None
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, slots=True)
class Reviewing:
    """Group `number` of `total` begins: `paths`, in a prompt of `tokens`."""

    paths: tuple[str, ...]
    number: int
    total: int
    tokens: int


ReviewEvent = Event | Reviewing | Review


def project_file(changes: Changes) -> bytes:
    """The project settings of the commit that was changed; empty if there are none.

    What the change makes of them does not count: whoever wrote it may be a stranger.
    """
    if changes.top is None or not changes.base:
        return b""
    file = read_tree(changes.top, changes.base).get(PROJECT_FILE.encode())
    return read_blobs(changes.top, [file.id])[0] if file is not None and file.kind == "file" else b""


class _LimitError(Exception):
    """A cap was reached; the text says which."""


def review(
    request: ReviewRequest, *, open_engine: OpenEngine, stdin: Callable[[], bytes]
) -> Iterator[ReviewEvent]:
    """Stream the stages of a review; the last event is the Review.

    Raises what reading the corpus raises, ModelError, DoesNotFitError, EngineCrashError.
    A cap ends it early: then the Review is not complete, and says what was not reviewed.
    """
    run, changes = _Run(request), request.changes
    run.tell(changes.notes)
    yield from map(Notice, changes.notes)
    left_out = [(change, _left_out(change, request.context)) for change in changes.files]
    run.unreviewed += [Unreviewed(change.path, reason) for change, reason in left_out if reason]
    reviewed = [change for change, reason in left_out if not reason]
    model = ""
    if reviewed:
        with _context(request, changes, stdin) as context:
            model = context.model.ref.name
            reviewed = context.shown_changes(reviewed)
            run.tell(context.notes)
            yield from map(Notice, context.notes)
            groups, too_large = groups_of(request.mode, context, reviewed)
            run.unreviewed += too_large
            n_ctx = max((context.n_ctx(len(group.prompt.tokens)) for group in groups), default=0)
            if groups:
                config, told = context.engine_config(n_ctx)
                run.tell(told)
                yield from map(Notice, told)
                with context.open(open_engine, config) as engine:
                    yield from _review(run, context, groups, engine)
    findings, excess = run.sieve.findings()
    yield Review(
        findings=findings,
        excess=excess,
        files=tuple(change.path for change in changes.files),
        unreviewed=tuple(run.unreviewed),
        dropped=dict(sorted(run.sieve.dropped.items())),
        base=changes.base,
        head=changes.head,
        model=model,
        context=request.mode,
        complete=run.complete,
        prompt_tokens=run.prompt_tokens,
        restored_tokens=run.restored_tokens,
        generated_tokens=run.generated_tokens,
        staleness=run.staleness,
        seconds=time.monotonic() - run.started,
        warnings=tuple(run.warnings),
    )


def _left_out(change: FileChange, context: ContextRequest) -> str:
    """Why a changed file is not reviewed; empty if it is."""
    walk = context.corpus.walk if context.corpus is not None else WalkOptions()
    for globs, is_in, reason in ((walk.exclude, True, "excluded"), (walk.include, False, "not included")):
        if globs and matches(tuple(globs), change.path) == is_in:
            return reason
    return change.reason or ("" if change.hunks else "nothing to show")


class _Run:
    """What one review has come to so far, and what it may still cost."""

    def __init__(self, request: ReviewRequest) -> None:
        self.request = request
        self.sieve = Sieve(request.wanted)
        self.started = time.monotonic()
        self.unreviewed: list[Unreviewed] = []
        self.warnings: list[str] = []
        self.complete = True
        self.prompt_tokens = self.restored_tokens = self.generated_tokens = 0
        self.staleness = 0.0

    def tell(self, sentences: Sequence[str]) -> None:
        self.warnings += sentences

    def check_limits(self, pending: int) -> None:
        """Raise _LimitError if a cap is reached, with `pending` tokens on top of what is accounted for."""
        limits = self.request
        computed = self.prompt_tokens - self.restored_tokens + self.generated_tokens + pending
        if limits.time_limit is not None and time.monotonic() - self.started > limits.time_limit:
            raise _LimitError(f"the limit of {limits.time_limit:,.0f} s was reached")
        if limits.token_limit is not None and computed > limits.token_limit:
            raise _LimitError(f"the limit of {limits.token_limit:,} tokens was reached")


def _review(
    run: _Run, context: Context, groups: Sequence[Group], engine: SteppingEngine
) -> Generator[ReviewEvent, None, None]:
    for number, group in enumerate(groups, 1):
        paths = tuple(change.path for change in group.changes)
        yield Reviewing(paths, number, len(groups), len(group.prompt.tokens))
        try:
            yield from _review_group(run, context, group, engine)
        except _LimitError as limit:
            run.complete = False
            for rest in groups[number - 1 :]:
                run.unreviewed += [Unreviewed(change.path, str(limit)) for change in rest.changes]
            return


def _review_group(
    run: _Run, context: Context, group: Group, engine: SteppingEngine
) -> Generator[ReviewEvent, None, None]:
    by_path = {change.path: change for change in group.changes}
    lines = {path: change.head_lines() for path, change in by_path.items()}
    # 1. what the model claims
    answer, reason = yield from _answer(
        run, context, group.prompt, engine, context.max_tokens, claims_schema(list(by_path))
    )
    if reason == "length":
        run.complete = False
        words = "the list of findings was cut off; --max-tokens allows more"
        run.unreviewed += [Unreviewed(path, words) for path in by_path]
    found: list[tuple[Claim, Finding]] = []
    for claim in read_claims(answer):
        change = by_path.get(claim.path)
        if change is None:  # from an engine that does not keep to the schema
            run.sieve.dropped["unverified"] += 1
            continue
        finding = run.sieve.take(claim, change, lines[claim.path])
        if finding is not None:
            if not run.request.check:
                run.sieve.keep(finding)
            found.append((claim, finding))
    # 2. what of that holds
    for number, (claim, finding) in enumerate(found if run.request.check else ()):
        if run.sieve.is_duplicate(finding):  # of one that has held
            continue
        prompt = context.prompt(group.parts, check_task(group.diff, claim))
        if len(prompt.tokens) + _JUDGEMENT > context.n_ctx(len(group.prompt.tokens)):
            run.sieve.keep(finding)  # no room for a second look: who reads it decides
            continue
        try:
            answer, _ = yield from _answer(run, context, prompt, engine, _JUDGEMENT, CHECK_SCHEMA)
        except _LimitError:
            run.sieve.dropped["unchecked"] += len(found) - number
            raise
        if is_refuted(answer):
            run.sieve.dropped["refuted"] += 1
        else:
            run.sieve.keep(finding)


def _answer(
    run: _Run, context: Context, prompt: Prompt, engine: SteppingEngine, max_tokens: int, schema: object
) -> Generator[Event, None, tuple[str, str]]:
    """The text of one answer and how it ended. Raises _LimitError."""
    run.check_limits(0)
    text: list[str] = []
    # Only a whole repository is worth saving: what is around a change begins no other prompt.
    prefix = prompt.prefix if run.request.mode == "repo" else 0
    asked = Request(
        prompt.tokens,
        max_tokens,
        run.request.sampling,
        prefix,
        context.label,
        schema=json.dumps(schema),
        update=context.request.run.update,
        messages=prompt.messages,
        variables=prompt.variables,
    )
    restored = prefilled = 0
    finished: Finished | None = None
    events = engine.generate(asked)
    for event in events:  # to its end: who leaves early kills the engine's process
        if isinstance(event, Restored):
            restored = event.tokens
        elif isinstance(event, Prefilled):
            prefilled = event.done - restored
        elif isinstance(event, Token):
            text.append(event.text)
        elif isinstance(event, (Notice, NotSaved)):
            run.tell([event.text])
        elif isinstance(event, Loaded) and event.attention == "dense" and DENSE not in run.warnings:
            run.tell([DENSE])
            yield Notice(DENSE)
        elif isinstance(event, Finished):
            run.prompt_tokens += event.prompt_tokens
            run.restored_tokens += event.restored_tokens
            run.generated_tokens += event.generated_tokens
            run.staleness = max(run.staleness, event.staleness)
            finished = event
        yield event
        if finished is not None:
            continue
        try:
            run.check_limits(max(prefilled, 0) + len(text))
        except _LimitError:
            run.prompt_tokens += restored + max(prefilled, 0)
            run.restored_tokens += restored
            run.generated_tokens += len(text)
            events.close()
            raise
    if finished is None:
        raise KeyboardInterrupt  # the engine was asked to stop
    return "".join(text), finished.reason


def _context(request: ReviewRequest, changes: Changes, stdin: Callable[[], bytes]) -> Context:
    asked = _with_corpus(request, changes)
    try:
        return Context(asked, stdin)
    except CorpusError:
        if request.mode != "related":
            raise
        return Context(replace(asked, corpus=None), stdin)  # a diff alone, with no files around it


def _with_corpus(request: ReviewRequest, changes: Changes) -> ContextRequest:
    """What is read beside the change: for `repo` its base, for `related` the tree that it is in."""
    corpus = request.context.corpus
    if request.mode == "repo" and not changes.base:
        raise UsageError(
            "The context 'repo' is that of the base commit, and this change has none.",
            "Use --context related, or name a --base.",
        )
    if request.mode == "diff" or corpus is None:
        return replace(request.context, corpus=None)
    paths = (os.fsdecode(changes.top),) if changes.top is not None else corpus.paths
    ref = changes.base if request.mode == "repo" else changes.head or None
    return replace(request.context, corpus=replace(corpus, paths=paths, ref=ref))
