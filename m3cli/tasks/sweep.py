"""`m3 ask --strategy sweep`: read all of a corpus in windows, then answer from what was found in them.

For each window the model lists the passages that bear on the question. These are looked up in the corpus, and
the question is answered from them. Windows do not depend on the question, so their KV caches serve them all.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from m3cli.corpus.chunks import TARGET_TOKENS, chunk_document, refine
from m3cli.corpus.types import Chunk, Document
from m3cli.engine.events import (
    Event,
    Finished,
    Loaded,
    LoadProgress,
    Notice,
    NotSaved,
    Request,
    Sampling,
    Token,
)
from m3cli.errors import DoesNotFitError
from m3cli.prompt.chat import Message
from m3cli.prompt.layout import PromptLayout, attribute, number_lines
from m3cli.prompt.pack import pack_chunks, split_chunks
from m3cli.prompt.segments import Content
from m3cli.prompt.thinking import think_variables
from m3cli.tasks.ask import DENSE, Answer, answer
from m3cli.tasks.context import INSTRUCTIONS, Packed

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

    from m3cli.engine.events import Engine
    from m3cli.prompt.layout import Span
    from m3cli.prompt.pack import CountBatch, Pack
    from m3cli.tasks.ask import AskEvent, AskRequest
    from m3cli.tasks.context import Context
    from m3cli.tasks.prompts import Prompt
    from m3cli.tasks.stepping import OpenEngine

    Prompter = Callable[[Sequence[str], str], Prompt]

WINDOW = 8192  # tokens of the corpus in a window; models use less than that well
LIST_TOKENS = 256  # of an answer that lists passages
_MOST_PASSAGES = 8  # of one window
_MOST_LINES = 60  # of one passage
_LEAST = 2 * TARGET_TOKENS  # of what is found, however small windows are, so that an excerpt fits
_QUESTION = 128  # tokens; questions up to a multiple of this leave the same room, so windows stay the same

NOTHING = "No passage of the corpus was found to bear on the question; what matches its words best is read."
_TASK = (
    "List the passages above that help to answer the question below, the most helpful first: at most {most}, "
    "each with the path of its file and the numbers of its first and last line. If nothing above helps, the "
    'list is empty. Answer in JSON: {{"passages": [{{"path": ..., "first": ..., "last": ...}}]}}\n'
    "The question: {question}"
)


@dataclass(frozen=True, slots=True)
class Window:
    """Window `number` of `of` was read, in a prompt of `tokens`; `passages` of it bear on the question.

    `restored` tokens did not have to be computed.
    """

    number: int
    of: int
    tokens: int
    restored: int
    passages: int


@dataclass(frozen=True, slots=True)
class Found:
    """What a corpus holds about a question: `passages` in its order, none of which overlap.

    The tokens are those of all windows. `dropped` is how many passages were named that were not shown.
    """

    passages: tuple[Chunk, ...]
    windows: int
    prompt_tokens: int
    restored_tokens: int
    generated_tokens: int
    seconds: float
    dropped: int


class PassageLayout(PromptLayout):
    """Passages under tags that say which lines they are, also where they are all that is shown of a file."""

    def tree(self, text: str) -> str:  # noqa: ARG002 - the contract's argument
        """Nothing: it would list only the files of the passages."""
        return ""

    def header(self, span: Span) -> str:
        """An opening tag with the path and the lines, `2-5, 9-9`."""
        runs: list[tuple[int, int]] = []
        for chunk in span.chunks:
            if runs and chunk.start_line <= runs[-1][1] + 1:
                runs[-1] = runs[-1][0], chunk.end_line
            else:
                runs.append((chunk.start_line, chunk.end_line))
        lines = ", ".join(f"{first}-{last}" for first, last in runs)
        return f'<file path="{attribute(span.path)}" lines="{lines}">\n'


def search(
    engine: Engine,
    chunks: Sequence[Chunk],
    question: str,
    *,
    prompter: Prompter,
    count: CountBatch,
    window: int,
    label: str,
    sampling: Sampling | None = None,
    save: bool = True,
) -> Iterator[Event | Window | Found]:
    """Have the model read all `chunks`, `window` tokens at a time; the last event is Found.

    `prompter` makes a prompt of parts of the corpus and what is asked about them. The KV cache of each window
    is kept under `label` unless `save` is off. A run that is stopped ends with Stopped, and without Found.
    Raises DoesNotFitError for a window that is too small for a few words.
    """
    begin = time.monotonic()
    task = passages_task(question)
    packs = _windows(chunks, count, window)
    passages: list[Chunk] = []
    prompt_tokens = restored = generated = dropped = 0
    for number, pack in enumerate(packs, 1):
        prompt = prompter(pack.parts, task)
        asked = Request(
            prompt.tokens,
            LIST_TOKENS,
            sampling or Sampling(),
            prefix=prompt.prefix,
            label=label,
            schema=json.dumps(passages_schema(pack.chunks)),
            save=save,
            messages=prompt.messages,
            variables=prompt.variables,
        )
        text: list[str] = []
        finished: Finished | None = None
        for event in engine.generate(asked):  # to its end: who leaves early kills the engine's process
            if isinstance(event, Token):
                text.append(event.text)
            elif isinstance(event, Finished):
                finished = event
            yield event
        if finished is None:
            return
        kept, found, wrong = _verified(pack.chunks, read_passages("".join(text)))
        passages += found
        prompt_tokens += finished.prompt_tokens
        restored += finished.restored_tokens
        generated += finished.generated_tokens
        dropped += wrong
        yield Window(number, len(packs), finished.prompt_tokens, finished.restored_tokens, kept)
    seconds = time.monotonic() - begin
    yield Found(tuple(passages), len(packs), prompt_tokens, restored, generated, seconds, dropped)


def passages_task(question: str) -> str:
    """What is asked about each window."""
    return _TASK.format(most=_MOST_PASSAGES, question=question.strip())


def passages_schema(chunks: Sequence[Chunk]) -> dict[str, Any]:
    """The JSON schema of an answer to `passages_task`, where `chunks` are what is shown."""
    line = {"type": "integer", "minimum": 1, "maximum": max(1, *(chunk.end_line for chunk in chunks))}
    passage = {
        "path": {"enum": list(dict.fromkeys(chunk.path for chunk in chunks))},
        "first": line,
        "last": line,
    }
    item = {
        "type": "object",
        "properties": passage,
        "required": list(passage),
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {"passages": {"type": "array", "maxItems": _MOST_PASSAGES, "items": item}},
        "required": ["passages"],
        "additionalProperties": False,
    }


def read_passages(answer: str) -> list[tuple[str, int, int] | None]:
    """Path, first and last line of each passage that an answer names; None for what is no passage.

    Of an answer that was cut off, those that are complete.
    """
    decoder = json.JSONDecoder()
    passages: list[tuple[str, int, int] | None] = []
    place = answer.find("[") + 1
    while place and (start := answer.find("{", place)) >= 0:
        try:
            value, place = decoder.raw_decode(answer, start)
        except (ValueError, RecursionError):
            break
        match value:
            case {"path": str(path), "first": int(first), "last": int(last)}:
                passages.append((path, first, last))
            case _:  # from an engine that does not keep to the schema
                passages.append(None)
    return passages


def _windows(chunks: Sequence[Chunk], count: CountBatch, limit: int) -> list[Pack]:
    """All `chunks` in packs of at most `limit` tokens."""
    if not chunks:
        return []
    try:
        return split_chunks(chunks, count, limit=limit)
    except DoesNotFitError:
        return split_chunks(_smaller(chunks, count, limit // 2), count, limit=limit)


def _smaller(chunks: Sequence[Chunk], count: CountBatch, most: int) -> Iterator[Chunk]:
    """`chunks`, those of more than `most` tokens cut into as large parts as have not."""
    for chunk, tokens in zip(chunks, count(map(number_lines, chunks)), strict=True):
        parts, target = [chunk], TARGET_TOKENS
        while tokens > most and target > 1:
            target //= 2
            parts = chunk_document(Document(chunk.path, chunk.text, "", chunk.numbers), target)
            tokens = max(count(map(number_lines, parts)))  # noqa: PLW2901 - of the largest part now
        before = 0 if parts == [chunk] or chunk.numbers is not None else chunk.start_line - 1
        for part in parts:
            yield replace(part, start_line=part.start_line + before, end_line=part.end_line + before)


def _verified(
    chunks: Sequence[Chunk], named: Iterable[tuple[str, int, int] | None]
) -> tuple[int, list[Chunk], int]:
    """How many of the `named` passages were shown, what of `chunks` that is, and how many were not.

    Of a passage that was shown in part, that part counts.
    """
    wanted: dict[int, set[int]] = {}  # places of lines by the place of their chunk
    kept: set[tuple[str, int, int]] = set()
    dropped = 0
    for passage in named:
        path, first, last = passage or ("", 0, 0)
        lines = range(first, min(last, first + _MOST_LINES - 1) + 1)
        shown = False
        for index, chunk in enumerate(chunks):
            numbers = chunk.numbers or range(chunk.start_line, chunk.end_line + 1)
            places = [place for place, number in enumerate(numbers) if number and number in lines]
            if chunk.path == path and places:
                wanted.setdefault(index, set()).update(range(places[0], places[-1] + 1))
                shown = True
        if shown:
            kept.add((path, first, last))
        else:
            dropped += 1
    return (
        len(kept),
        [part for index in sorted(wanted) for part in _cut(chunks[index], wanted[index])],
        dropped,
    )


def _cut(chunk: Chunk, places: set[int]) -> Iterator[Chunk]:
    """The lines of `chunk` at `places`, counted from 0: a chunk for each run of neighbours."""
    lines = [f"{line}\n" for line in chunk.text.split("\n")]
    lines[-1] = lines[-1][:-1]
    for _, run in groupby(enumerate(sorted(places)), key=lambda entry: entry[1] - entry[0]):
        indices = [place for _, place in run]
        start, stop = indices[0], indices[-1] + 1
        text = "".join(lines[start:stop])
        if chunk.numbers is None:
            yield Chunk(chunk.path, chunk.start_line + start, chunk.start_line + stop - 1, text)
        else:
            numbers = chunk.numbers[start:stop]  # a wanted run begins and ends with lines of the file
            yield Chunk(chunk.path, numbers[0], numbers[-1], text, numbers)


def sweep(
    request: AskRequest,
    context: Context,
    *,
    open_engine: OpenEngine,
    started: float,
    window: int = WINDOW,
) -> Iterator[AskEvent | Window]:
    """Answer `request` from what all windows of the corpus hold; the last event is the Answer.

    A window has at most `window` tokens of the corpus, and what is found of it about as many. `started` is
    when the work began, by time.perf_counter. Raises DoesNotFitError, what the engine raises, and
    KeyboardInterrupt when it was stopped: then the windows that were read are saved.
    """
    # 1. how large windows are, and what is found
    prompter, question = _prompter(context), request.question
    bare = len(context.prompt((), question).tokens)
    around = _around(prompter, question) + max(0, LIST_TOKENS - context.max_tokens)
    limit = min(window, context.room(around))
    budget = min(max(limit, _LEAST), context.room(bare))
    config, told = context.engine_config(context.n_ctx(max(around + limit, bare + budget)))
    teller = _Teller([*context.notes, *told])
    yield from map(Notice, teller.heard)
    with context.open(open_engine, config) as engine:
        # 2. every window is read
        found: Found | None = None
        for event in search(
            engine,
            context.corpus.chunks,
            question,
            prompter=prompter,
            count=context.model.tokenizer.count_batch,
            window=limit,
            label=context.label,
            sampling=request.sampling,
        ):
            if isinstance(event, Found):
                found = event
            elif isinstance(event, Window):
                yield event
            elif not isinstance(event, Token):  # what is not of the answer
                yield from teller.pass_on(event)
        if found is None:
            raise KeyboardInterrupt  # the engine was asked to stop
        # 3. the answer, from what was found
        pack = _pack(context, question, found, budget)
        prompt = context.prompt(pack.parts, question)
        tokens = len(prompt.tokens)
        packed = Packed(context.model, context.corpus, pack, tokens, context.max_tokens, config.n_ctx)
        yield packed
        for note in _notes(found, pack):
            yield from teller.pass_on(Notice(note))
        loading = teller.load_seconds
        for said in answer(
            engine, request, packed, prompt, label=context.label, warnings=teller.heard, started=started
        ):
            if isinstance(said, Answer):
                times = said.timings
                yield replace(
                    said,
                    timings=replace(times, pack=times.pack - loading, load=times.load + loading),
                    warnings=tuple(dict.fromkeys(said.warnings)),
                )
            elif isinstance(said, (Loaded, LoadProgress, Notice)):
                yield from teller.pass_on(said)
            else:
                yield said


class _Teller:
    """Passes events of several generations on as if they were one; `heard` is for the answer's warnings."""

    def __init__(self, heard: Sequence[str]) -> None:
        self.heard = list(heard)
        self.load_seconds = 0.0
        self._loaded = False

    def pass_on(self, event: Event) -> Generator[Event, None, None]:
        """The event, unless it says again what was said before."""
        if isinstance(event, (Notice, NotSaved)):
            if event.text in self.heard:
                return
            self.heard.append(event.text)
        elif isinstance(event, (Loaded, LoadProgress)) and self._loaded:
            self.load_seconds += event.seconds if isinstance(event, Loaded) else 0.0
            return
        yield event
        if isinstance(event, Loaded):
            self._loaded = True
            self.load_seconds += event.seconds
            if event.attention == "dense":
                yield from self.pass_on(Notice(DENSE))


def _prompter(context: Context) -> Prompter:
    """Prompts that begin as those of `ask` do, without reasoning: the answer's form has no place for it."""
    variables = think_variables(context.model.template, "off") or {}
    if context.remote is not None:
        variables = dict(context.variables)

    def prompt(parts: Sequence[str], task: str) -> Prompt:
        asked = Content(f"\n{context.remote.redacted(task) if context.remote is not None else task}")
        messages = [
            Message("system", (Content(INSTRUCTIONS),)),
            Message("user", (*map(Content, parts), asked)),
        ]
        return context.encoded(messages, asked, variables)

    return prompt


def _around(prompter: Prompter, question: str) -> int:
    """Tokens around a window: a number that nearly all questions share, so that they share the windows."""
    least = len(prompter((), passages_task("")).tokens)
    asked = len(prompter((), passages_task(question)).tokens) - least
    return least + -(-max(asked, 1) // _QUESTION) * _QUESTION


def _pack(context: Context, question: str, found: Found, budget: int) -> Pack:
    """What was found, or what a search by words finds; as much of it as `budget` tokens hold, best first."""
    chunks, count = context.corpus.chunks, context.model.tokenizer.count_batch
    if not found.passages:
        return pack_chunks(
            chunks,
            count,
            budget=budget,
            strategy="select",
            question=question,
            refined=lambda: refine(chunks),
        )
    return pack_chunks(
        found.passages, count, budget=budget, strategy="select", question=question, layout=PassageLayout()
    )


def _notes(found: Found, pack: Pack) -> Iterator[str]:
    """What the user should hear of how a corpus was read."""
    windows, passages = _amount(found.windows, "window"), _amount(len(found.passages), "passage")
    bear = "bears" if len(found.passages) == 1 else "bear"
    yield f"Read {windows} of the corpus, {passages} {bear} on the question."
    if found.dropped:
        yield f"The model named {_amount(found.dropped, 'passage')} that it was not shown."
    if not found.passages:
        yield NOTHING
    elif pack.omitted:
        words = "The {n} that match the question least were left out: what was found takes {tokens:,} tokens."
        yield words.format(n=_amount(len(pack.omitted), "passage"), tokens=pack.tokens_needed)


def _amount(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
