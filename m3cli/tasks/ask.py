"""`m3 ask`: one question about a corpus, answered with checked citations.

The stages in order, each streamed as events: read the corpus, pack it into the model's window,
run the engine, separate reasoning from answer, check the citations.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from m3cli.engine.events import (
    Event,
    Finished,
    Loaded,
    Notice,
    NotSaved,
    Request,
    Sampling,
    Token,
)
from m3cli.errors import M3Error, UsageError
from m3cli.plan.planner import Measured
from m3cli.tasks.citations import Citation, check_citations
from m3cli.tasks.context import SWEPT, Context, ContextRequest, Packed
from m3cli.tasks.rates import remember_speed
from m3cli.tasks.thinking import Kind, ThinkingSplitter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from m3cli.engine.events import Engine, EngineConfig
    from m3cli.tasks.costs import Prices
    from m3cli.tasks.prompts import Prompt
    from m3cli.tasks.stepping import OpenEngine
    from m3cli.tasks.sweep import Window

_TELLING = 256  # tokens of prefill that tell a speed

DENSE = (
    "The model runs with dense attention instead of the sparse attention that it was trained with: do not "
    "rely on its answers."
)
UNCITED = "The answer cites no lines that m3 could verify: check it against the files."


@dataclass(frozen=True, slots=True)
class AskRequest:
    """Everything that one question depends on."""

    question: str
    context: ContextRequest
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer, or of the reasoning before it."""

    kind: Kind
    text: str


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds: from the start of m3's work to the first token, and of each stage."""

    pack: float
    load: float
    prefill: float
    decode: float
    time_to_first_token: float


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of a question. `finish_reason` is `length` when the token cap ended it.

    `restored_tokens` of the prompt did not have to be computed. `staleness` is that of
    m3cli.engine.events.Updated.
    """

    question: str
    text: str
    citations: tuple[Citation, ...]
    finish_reason: Literal["stop", "length"]
    packed: Packed
    restored_tokens: int
    generated_tokens: int
    timings: Timings
    warnings: tuple[str, ...]
    staleness: float = 0.0

    def costs(self, prices: Prices) -> dict[str, float]:
        """What this question costs hosted, and here: as it was asked now, and when all is restored."""
        times = self.timings
        again = times.pack + times.load + times.decode
        return prices.costs(self.packed.prompt_tokens, self.generated_tokens, again + times.prefill, again)


AskEvent: TypeAlias = "Event | Packed | Text | Answer | Window"


def ask(request: AskRequest, *, open_engine: OpenEngine, stdin: Callable[[], bytes]) -> Iterator[AskEvent]:
    """Stream the stages of answering `request`; the last event is the Answer.

    Raises UsageError for a blank question, and what the stages raise: CorpusError, ModelError,
    DoesNotFitError, MachineError, EngineCrashError.
    """
    from m3cli.tasks.sweep import sweep  # which answers as this does

    started = time.perf_counter()
    if not request.question.strip():
        raise UsageError("The question is blank.", 'Ask something: m3 ask PATH "where is the retry logic?"')

    # 1. the model's facts, then the corpus in its tokens
    with Context(request.context, stdin) as context:
        early = context.remote.notes if context.remote is not None else ()
        yield from map(Notice, early)  # before anything goes there
        if request.context.strategy == "sweep":
            yield from sweep(request, context, open_engine=open_engine, started=started)
            return
        packed = context.pack(request.question, recap=True)
        if packed.sweeps:
            context.notes.append(SWEPT.format(model=context.model.ref.name))
            yield from sweep(request, context, open_engine=open_engine, started=started)
            return
        prompt = context.prompt(packed.pack.parts, request.question, recap=packed.recap)
        config, told = context.engine_config(packed.n_ctx)
    yield packed
    heard = [*context.notes, *packed.notes, *told]
    yield from (Notice(note) for note in heard if note not in early)

    # 2. the engine, and what it says, checked
    with context.open(open_engine, config) as engine:
        for event in answer(
            engine, request, packed, prompt, label=context.label, warnings=heard, started=started
        ):
            if isinstance(event, Answer):
                _remember(context, engine.config, event)
            yield event


def _remember(context: Context, config: EngineConfig, answer: Answer) -> None:
    """Keep how fast this was, for the plans to come, if there was enough of it to tell."""
    directory = context.request.state_dir
    prefilled = answer.packed.prompt_tokens - answer.restored_tokens
    if (
        directory is None
        or context.remote
        or context.server
        or prefilled < _TELLING
        or answer.generated_tokens < 2
    ):
        return
    measured = Measured(
        prefill=answer.timings.prefill / prefilled,
        decode=answer.timings.decode / answer.generated_tokens,
        prompt=answer.packed.prompt_tokens,
        n_ctx=config.n_ctx,
        n_ubatch=config.n_ubatch,
        type_k=config.kv_type_k,
        type_v=config.kv_type_v,
    )
    remember_speed(directory, context.digest, measured)


def answer(
    engine: Engine,
    request: AskRequest,
    packed: Packed,
    prompt: Prompt,
    *,
    label: str,
    warnings: Sequence[str] = (),
    started: float,
    exact: bool = True,
) -> Iterator[AskEvent]:
    """Have `engine` answer a prompt that is ready; the last event is the Answer, unless it was stopped.

    `warnings` were told already and go into the answer; `started` is when the work on it began, by
    time.perf_counter.
    """
    pack_seconds = time.perf_counter() - started
    heard = list(warnings)
    splitter = ThinkingSplitter(prompt.tail)
    text: list[str] = []
    load_seconds, first_token, finished = 0.0, 0.0, None
    run = Request(
        prompt.tokens,
        packed.max_tokens,
        request.sampling,
        # An excerpt that was chosen for this question begins no other prompt.
        prefix=prompt.prefix if packed.pack.strategy == "whole" else 0,
        label=label,
        exact=exact,
        update=request.context.run.update,
        messages=prompt.messages,
        variables=prompt.variables,
    )

    # 1. reasoning is told apart while it streams
    for event in engine.generate(run):
        yield event
        if isinstance(event, Token):
            first_token = first_token or time.perf_counter() - started
            for piece in splitter.feed(event.text):
                yield from _text(piece, text)
        elif isinstance(event, Loaded):
            load_seconds = event.seconds
            if event.attention == "dense":
                heard.append(DENSE)
                yield Notice(DENSE)
        elif isinstance(event, (Notice, NotSaved)):
            heard.append(event.text)
        elif isinstance(event, Finished):
            finished = event
    if finished is None:
        raise M3Error(
            "The engine ended without finishing the answer.", "Run again with --debug and report this."
        )
    for piece in splitter.flush():
        yield from _text(piece, text)

    # 2. what was answered, checked
    whole = "".join(text).strip()
    citations = tuple(check_citations(whole, packed.pack.chunks))
    if not any(citation.verified for citation in citations):
        heard.append(UNCITED)
    yield Answer(
        question=request.question,
        text=whole,
        citations=citations,
        finish_reason=finished.reason,
        packed=packed,
        restored_tokens=finished.restored_tokens,
        generated_tokens=finished.generated_tokens,
        timings=Timings(
            pack_seconds, load_seconds, finished.prefill_seconds, finished.decode_seconds, first_token
        ),
        warnings=tuple(heard),
        staleness=finished.staleness,
    )


def _text(piece: tuple[Kind, str], answer: list[str]) -> Iterator[Text]:
    kind, text = piece
    if kind == "answer":
        answer.append(text)
    yield Text(kind, text)
