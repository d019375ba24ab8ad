"""`m3 eval`: ask a model questions with known answers about texts of growing length, and keep the outcomes.

Lengths come first in the order of things, so that a run that is stopped has measured all tasks up to some
length. A haystack's tokens are computed once for all of its questions.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from m3cli.engine.events import (
    Event,
    Finished,
    Loaded,
    Notice,
    NotSaved,
    Prefilled,
    Request,
    Restored,
    Stopped,
    Token,
)
from m3cli.errors import DoesNotFitError, UsageError
from m3cli.tasks.ask import DENSE
from m3cli.tasks.context import Context
from m3cli.tasks.evaluate.choice import CODE, TASKS, check_comparison, chosen, lengths_for
from m3cli.tasks.evaluate.difference import Difference
from m3cli.tasks.evaluate.effective import variant_of
from m3cli.tasks.evaluate.haystack import own_material, python_material
from m3cli.tasks.evaluate.prompting import Prompter
from m3cli.tasks.evaluate.results import Evaluation, Mode, Outcome, Run, Skipped
from m3cli.tasks.evaluate.shown import Shown
from m3cli.tasks.evaluate.store import outcome_key, remember
from m3cli.tasks.evaluate.trial import Scope, TooShortError
from m3cli.tasks.evaluate.way import Cost, Way
from m3cli.tasks.stepping import SteppingEngine
from m3cli.tasks.sweep import LIST_TOKENS, Found, Window, passages_task
from m3cli.tasks.sweep import search as sweep_search
from m3cli.tasks.thinking import ThinkingSplitter

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from m3cli.engine.events import EngineConfig, KVType
    from m3cli.tasks.context import ContextRequest
    from m3cli.tasks.evaluate.trial import Question, Task, Trial
    from m3cli.tasks.prompts import Prompt
    from m3cli.tasks.stepping import OpenEngine
    from m3cli.tasks.thinking import Kind

REASONS = (
    "The model reasons before it answers, also when told not to; m3 eval leaves it little room for that, so "
    "its scores are too low."
)
LEARNED = (
    "The questions about code are about Python's library, which models may know by heart: name files of your "
    "own to measure what the model reads."
)
_EXTRA = 2048  # tokens that modes other than `whole` may add to a prompt: a recap, and a quote in the reply


@dataclass(frozen=True, slots=True)
class EvalRequest:
    """What is to be measured. Without a corpus in `context`, haystacks are made of what ships with Python.

    `tasks` are as in `choice.chosen`; no `lengths` leaves them to m3. Each of `kv_types` (of keys and of
    values) is measured; none stands for what `context` says. `modes` are compared on tasks about a corpus,
    `whole` always among them. `time_limit` is in seconds. With `fresh`, nothing that was measured earlier
    counts. The model is asked without reasoning, whatever `context` says.
    """

    context: ContextRequest
    tasks: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    depths: int = 5
    samples: int = 5
    seed: int = 0
    kv_types: tuple[tuple[KVType, KVType], ...] = ()
    modes: tuple[Mode, ...] = ("whole",)
    time_limit: float | None = None
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class Trying:
    """A trial begins: questions of `task` about `length` tokens, with such a KV cache and in such a mode."""

    task: str
    length: int
    questions: int
    type_k: KVType
    type_v: KVType
    mode: Mode


@dataclass(frozen=True, slots=True)
class Asked:
    """A question was answered; `known` says that it had been in an earlier run."""

    outcome: Outcome
    known: bool


EvalEvent = Event | Trying | Asked | Window | Evaluation


_EngineOrSweep = Event | Window | Found
_SHARING: tuple[Mode, ...] = ("whole", "recap", "quote")  # modes whose prompts begin with the whole haystack


class _TimeUpError(Exception):
    """The time limit was reached."""


class Evaluator:
    """An evaluation; `result` is what it has come to, also after an interruption. A context manager.

    Raises what reading the corpus and the model raises, UsageError for tasks that do not exist, and
    DoesNotFitError for lengths that the model or the machine cannot have.
    """

    def __init__(self, request: EvalRequest, *, open_engine: OpenEngine, stdin: Callable[[], bytes]) -> None:
        if request.context.state_dir is None:
            raise UsageError("Results have nowhere to be kept.", "Give a directory for them.")
        self._state_dir = request.context.state_dir
        self._modes: tuple[Mode, ...] = tuple(dict.fromkeys(("whole", *request.modes)))
        self._request = request
        self._open_engine = open_engine
        compared = len(self._modes) > 1
        self._names = chosen(request.tasks or (("code",) if compared else ()))
        if compared:
            check_comparison(self._names)
        self._extra = _EXTRA if compared else 0
        self._started = time.monotonic()
        self._deadline = None if request.time_limit is None else self._started + request.time_limit
        self._warnings: list[str] = []
        self._skipped: dict[Skipped, None] = {}
        self._computed = self._known = 0
        self._complete = False
        self._description = ""
        self._haystack = ""
        self._ways: list[Way] = []
        self._context = Context(replace(request.context, think=None), stdin)
        try:
            window = self._context.window
            self.lengths = lengths_for(window if request.lengths else window - self._extra, request.lengths)
            self._ways = self._planned()
            for way in self._ways:
                way.kept(self._state_dir)
        except BaseException:
            self._context.close()
            raise

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._context.close()

    def _planned(self) -> list[Way]:
        """The ways to run the model; lengths that nobody asked for are left out if they do not fit."""
        while True:
            try:
                return [self._way(types) for types in self._request.kv_types or (None,)]
            except DoesNotFitError as error:
                if self._request.lengths or len(self.lengths) == 1:
                    raise
                *shorter, longest = self.lengths
                self._warn(f"{longest:,} tokens are left out: {error.message}")
                self.lengths = tuple(shorter)

    def _way(self, types: tuple[KVType, KVType] | None) -> Way:
        """How the model is loaded for a type of KV cache, for the longest length. Raises DoesNotFitError."""
        context, options = self._context, self._request.context.run
        if types is not None:
            options = replace(options, type_k=types[0], type_v=types[1])
        n_ctx = min(-(-(self.lengths[-1] + self._extra) // 256) * 256, context.window)
        config, told = context.engine_config(n_ctx, options)
        for note in told:
            self._warn(note)
        return Way(variant_of(context.digest, context.model.shape, config), config)

    def run(self) -> Iterator[EvalEvent]:
        """Stream the evaluation; the last event is the Evaluation, unless it is interrupted.

        Raises KeyboardInterrupt when it was stopped, EngineCrashError when the engine dies; what was
        measured until then is kept.
        """
        context, request = self._context, self._request
        yield from map(Notice, (*context.notes, *self._warnings))
        self._warnings[:0] = context.notes
        # 1. what is asked
        prompter = Prompter(context.model, context.variables)
        scope = Scope(self.lengths, request.depths, request.samples, request.seed)
        count = context.model.tokenizer.count_batch
        if request.context.corpus is not None:
            material = own_material(context.corpus.chunks, context.label, self.lengths[-1], count)
        else:
            material = python_material(self.lengths[-1])
        self._haystack = material.label
        if not material.own and any(name in CODE for name in self._names):
            self._warn(LEARNED)
            yield Notice(LEARNED)
        tasks = {name: TASKS[name](material, prompter, scope) for name in self._names}
        # 2. the answers
        try:
            for way in self._ways:
                try:
                    yield from self._measure(way, tasks, prompter)
                finally:
                    self._remember(way)
            self._complete = True
        except _TimeUpError:
            pass
        yield self.result

    @property
    def result(self) -> Evaluation:
        """All that was measured so far."""
        request = self._request
        return Evaluation(
            model=request.context.model.name,
            digest=self._context.digest,
            description=self._description,
            haystack=self._haystack,
            lengths=self.lengths,
            depths=request.depths,
            samples=request.samples,
            seed=request.seed,
            runs=tuple(run for way in self._ways for run in self._runs(way)),
            skipped=tuple(self._skipped),
            complete=self._complete,
            computed_tokens=self._computed,
            known=self._known,
            seconds=time.monotonic() - self._started,
            warnings=tuple(self._warnings),
        )

    def _runs(self, way: Way) -> list[Run]:
        variant = way.variant
        return [
            Run(
                variant.type_k,
                variant.type_v,
                variant.attention,
                mode,
                tuple(way.outcomes.get(mode, ())),
                way.partial,
            )
            for mode in self._modes
        ]

    def _measure(
        self, way: Way, tasks: dict[str, Task], prompter: Prompter
    ) -> Generator[EvalEvent, None, None]:
        with self._engine(way.config) as engine:
            for length in self.lengths:
                way.partial = length
                for name, task in tasks.items():
                    before = {mode: len(outcomes) for mode, outcomes in way.outcomes.items()}
                    try:
                        for trial in task.trials(length):
                            yield from self._try(way, engine, Shown(trial, prompter))
                    except TooShortError as reason:
                        self._skip(name, length, str(reason))
                        for mode, outcomes in way.outcomes.items():  # some trials fitted, but not all
                            del outcomes[before.get(mode, 0) :]
                way.partial = 0

    def _engine(self, config: EngineConfig) -> SteppingEngine:
        """The engine, which keeps to its configuration: another type of KV cache would be another result."""
        return SteppingEngine(self._open_engine, config, self._context.cache_config(), None)

    def _try(self, way: Way, engine: SteppingEngine, shown: Shown) -> Generator[EvalEvent, None, None]:
        """Ask all questions of a trial, mode by mode; a mode in which one does not fit is left out."""
        trial = shown.trial
        variant = way.variant
        for mode in self._modes:
            questions = trial.questions
            yield Trying(trial.task, trial.length, len(questions), variant.type_k, variant.type_v, mode)
            outcomes = way.outcomes.setdefault(mode, [])
            before = len(outcomes)
            try:
                for question in questions:
                    outcome, known = yield from self._outcome(way, engine, shown, question, mode)
                    outcomes.append(outcome)
                    yield Asked(outcome, known)
            except DoesNotFitError as error:
                del outcomes[before:]
                self._skip(trial.task, trial.length, f"{mode}: {error.message.rstrip('.')}")

    def _outcome(
        self, way: Way, engine: SteppingEngine, shown: Shown, question: Question, mode: Mode
    ) -> Generator[EvalEvent, None, tuple[Outcome, bool]]:
        """How a question is answered, and whether that was known. Raises DoesNotFitError, _TimeUpError."""
        prompt, most = shown.prompt(mode, question), shown.max_tokens(mode)
        if len(prompt.tokens) + most > way.config.n_ctx and mode != "sweep":
            raise DoesNotFitError(
                f"A prompt of {len(prompt.tokens):,} tokens and its reply do not fit the context.",
                "Ask for shorter --lengths.",
            )
        more = f"{way.config.flash_attention}"
        if mode == "sweep":
            more += f" {shown.window} {LIST_TOKENS} {passages_task('')}"
        key = outcome_key(mode, prompt.tokens, most, more)
        known = None if self._request.fresh else way.kept(self._state_dir).get(key)
        if known is not None:
            self._known += 1
            # The reply is what is known; what it is worth may be judged anew.
            score = shown.score(mode, question, known.reply)
            names = _names(shown.trial, question, mode)
            return replace(known, **names, depth=question.depth, score=score), True
        outcome = yield from self._ask(way, engine, shown, question, mode, prompt)
        way.kept(self._state_dir).add(key, outcome)
        return outcome, False

    def _skip(self, task: str, length: int, reason: str) -> None:
        self._skipped[Skipped(task, length, reason)] = None

    def _ask(
        self,
        way: Way,
        engine: SteppingEngine,
        shown: Shown,
        question: Question,
        mode: Mode,
        prompt: Prompt,
    ) -> Generator[EvalEvent, None, Outcome]:
        """Have one question answered. Raises _TimeUpError."""
        trial, cost = shown.trial, Cost()
        if mode == "sweep":
            prompt = yield from self._sweep(way, engine, shown, question, cost)
        run = Request(
            prompt.tokens,
            shown.max_tokens(mode),
            prefix=prompt.prefix,
            label=f"m3 eval of {self._context.label or self._haystack}",
            save=trial.nested and mode in _SHARING,
        )
        splitter = ThinkingSplitter(prompt.tail)
        pieces: list[tuple[Kind, str]] = []
        for event in self._watched(way, engine.generate(run), cost):
            assert not isinstance(event, Found)
            if isinstance(event, Token):
                pieces += splitter.feed(event.text)
            yield event
        pieces += splitter.flush()
        if any(kind == "thinking" for kind, _ in pieces):
            self._warn(REASONS)
        text = "".join(piece for kind, piece in pieces if kind == "answer").strip()
        return Outcome(
            **_names(trial, question, mode),
            depth=question.depth,
            score=shown.score(mode, question, text),
            reply=text,
            prompt_tokens=cost.prompt,
            restored_tokens=cost.restored,
            generated_tokens=cost.generated,
            seconds=cost.seconds,
        )

    def _sweep(
        self, way: Way, engine: SteppingEngine, shown: Shown, question: Question, cost: Cost
    ) -> Generator[EvalEvent, None, Prompt]:
        """Read the haystack in windows; the prompt with what they hold about the question."""
        trial = shown.trial
        events = sweep_search(
            engine,
            trial.chunks,
            question.text,
            prompter=shown.prompt_of,
            count=self._context.model.tokenizer.count_batch,
            window=shown.window,
            label=f"m3 eval of {self._context.label or self._haystack}",
        )
        found = None
        for event in self._watched(way, events, cost):
            if isinstance(event, Found):
                found = event
            else:
                yield event
        assert found is not None
        return shown.prompt_about(found.passages, question)

    def _watched(
        self, way: Way, events: Iterator[_EngineOrSweep], cost: Cost
    ) -> Generator[_EngineOrSweep, None, None]:
        """Pass events on, and note what they cost. Raises _TimeUpError, KeyboardInterrupt when stopped."""
        restored = 0
        self._check_time()
        for event in events:
            if isinstance(event, Restored):
                restored = event.tokens
            elif isinstance(event, Prefilled) and event.done > restored:
                self._check_time()
            elif isinstance(event, Finished):
                cost.add(event)
                self._computed += event.prompt_tokens - event.restored_tokens
                restored = 0
            elif isinstance(event, Stopped):
                raise KeyboardInterrupt
            elif isinstance(event, NotSaved):
                self._warn(event.text)
            elif isinstance(event, Loaded):
                way.found_to_be(event.attention)
                self._description = event.description
                if event.attention == "dense" and DENSE not in self._warnings:
                    self._warn(DENSE)
                    yield Notice(DENSE)
            yield event

    def _warn(self, text: str) -> None:
        if text not in self._warnings:
            self._warnings.append(text)

    def _check_time(self) -> None:
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise _TimeUpError

    def _remember(self, way: Way) -> None:
        """Keep what follows from the outcomes, for `m3 ask`."""
        runs = dict(zip(self._modes, self._runs(way), strict=True))
        base = runs["select"].outcomes if "select" in runs else ()
        gains = {mode: Difference.of(run.outcomes, base) for mode, run in runs.items() if mode != "select"}
        remember(
            self._state_dir,
            way.variant,
            runs["whole"].groups(),
            {mode: gain for mode, gain in gains.items() if gain is not None},
        )


def _names(trial: Trial, question: Question, mode: Mode) -> dict[str, Any]:
    """What an outcome is called by."""
    return {
        "task": trial.task,
        "group": trial.group,
        "mode": mode,
        "length": trial.length,
        "question": question.id,
        "text": question.text.strip(),
        "answers": question.answers,
    }
