"""`m3 eval`: ask a model questions with known answers about texts of growing length, and keep the outcomes.

Lengths come first in the order of things, so that a run that is stopped has measured all tasks up to some
length. A haystack's tokens are computed once for all of its questions.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
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
from m3cli.tasks.evaluate.choice import TASKS, chosen, lengths_for
from m3cli.tasks.evaluate.effective import variant_of
from m3cli.tasks.evaluate.haystack import own_material, python_material
from m3cli.tasks.evaluate.prompting import Prompter
from m3cli.tasks.evaluate.results import Evaluation, Mode, Outcome, Run, Score, Skipped
from m3cli.tasks.evaluate.shown import Shown
from m3cli.tasks.evaluate.store import Outcomes, outcome_key, remember
from m3cli.tasks.evaluate.trial import Scope, TooShortError
from m3cli.tasks.stepping import SteppingEngine
from m3cli.tasks.sweep import Found, Window
from m3cli.tasks.sweep import search as sweep_search
from m3cli.tasks.thinking import ThinkingSplitter

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from pathlib import Path

    from m3cli.engine.events import Attention, EngineConfig, KVType
    from m3cli.tasks.context import ContextRequest, Prompt
    from m3cli.tasks.evaluate.store import Variant
    from m3cli.tasks.evaluate.trial import Question, Task, Trial
    from m3cli.tasks.stepping import OpenEngine

_EXTRA = 2048  # tokens that modes other than `whole` may add to a prompt: a recap, and a quote in the reply


@dataclass(frozen=True, slots=True)
class EvalRequest:
    """What is to be measured. Without a corpus in `context`, haystacks are made of what ships with Python.

    `tasks` are as in `choice.chosen`; no `lengths` leaves them to m3. Each of `kv_types` (of keys and of
    values) is measured; none stands for what `context` says. `modes` other than `whole` are for tasks about
    a corpus. `time_limit` is in seconds. With `fresh`, nothing that was measured earlier counts.
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


@dataclass(slots=True)
class _Way:
    """One way to run the model, and what came of it so far."""

    variant: Variant
    config: EngineConfig
    outcomes: dict[Mode, list[Outcome]] = field(default_factory=dict)
    _kept: Outcomes | None = None

    def kept(self, state_dir: Path) -> Outcomes:
        """The outcomes of this way that are kept from run to run."""
        if self._kept is None:
            self._kept = Outcomes(state_dir, self.variant)
        return self._kept

    def found_to_be(self, attention: Attention) -> None:
        """Correct what was expected by what the engine says now that the model is loaded."""
        if attention != self.variant.attention:
            self.variant, self._kept = replace(self.variant, attention=attention), None


class Evaluator:
    """An evaluation; `result` is what it has come to, also after an interruption. A context manager.

    Raises what reading the corpus and the model raises, UsageError for tasks that do not exist, and
    DoesNotFitError for lengths that the model or the machine cannot have.
    """

    def __init__(self, request: EvalRequest, *, open_engine: OpenEngine, stdin: Callable[[], bytes]) -> None:
        self._request = request
        self._open_engine = open_engine
        self._names = chosen(request.tasks)
        self._started = time.monotonic()
        self._deadline = None if request.time_limit is None else self._started + request.time_limit
        self._warnings: list[str] = []
        self._skipped: dict[tuple[str, int], Skipped] = {}
        self._computed = self._known = 0
        self._complete = False
        self._description = ""
        self._haystack = ""
        self._ways: list[_Way] = []
        self._context = Context(request.context, stdin)
        try:
            self.lengths = lengths_for(self._context.window, request.lengths)
            self._ways = self._planned()
        except BaseException:
            self._context.close()
            raise

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._context.close()

    def _planned(self) -> list[_Way]:
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

    def _way(self, types: tuple[KVType, KVType] | None) -> _Way:
        """How the model is loaded for a type of KV cache, for the longest length. Raises DoesNotFitError."""
        context, options = self._context, self._request.context.run
        if types is not None:
            options = replace(options, type_k=types[0], type_v=types[1])
        extra = _EXTRA if self._request.modes != ("whole",) else 0
        n_ctx = min(-(-(self.lengths[-1] + extra) // 256) * 256, context.window)
        config, told = context.engine_config(n_ctx, options)
        for note in told:
            self._warn(note)
        return _Way(variant_of(context.digest, context.model.shape, config), config)

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
        tasks = {name: TASKS[name](material, prompter, scope) for name in self._names}
        # 2. the answers
        try:
            for way in self._ways:
                yield from self._measure(way, tasks, prompter)
            self._complete = True
        except _TimeUpError:
            pass
        self._remember()
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
            runs=tuple(
                Run(
                    way.variant.type_k,
                    way.variant.type_v,
                    way.variant.attention,
                    mode,
                    tuple(way.outcomes.get(mode, ())),
                )
                for way in self._ways
                for mode in request.modes
            ),
            skipped=tuple(self._skipped.values()),
            complete=self._complete,
            computed_tokens=self._computed,
            known=self._known,
            seconds=time.monotonic() - self._started,
            warnings=tuple(self._warnings),
        )

    def _measure(
        self, way: _Way, tasks: dict[str, Task], prompter: Prompter
    ) -> Generator[EvalEvent, None, None]:
        state_dir = self._request.context.state_dir
        if state_dir is None:
            raise UsageError("Results have nowhere to be kept.", "Give a directory for them.")
        with self._engine(way.config) as engine:
            for length in self.lengths:
                for name, task in tasks.items():
                    try:
                        for trial in task.trials(length):
                            yield from self._try(way, engine, Shown(trial, prompter), state_dir)
                    except TooShortError as reason:
                        self._skipped[name, length] = Skipped(name, length, str(reason))

    def _engine(self, config: EngineConfig) -> SteppingEngine:
        """The engine, which keeps to its configuration: another type of KV cache would be another result."""
        return SteppingEngine(self._open_engine, config, self._context.cache_config(), None)

    def _try(
        self, way: _Way, engine: SteppingEngine, shown: Shown, state_dir: Path
    ) -> Generator[EvalEvent, None, None]:
        """Ask all questions of a trial, mode by mode."""
        trial = shown.trial
        for mode in self._request.modes:
            if mode != "whole" and not trial.chunks:
                continue
            yield Trying(
                trial.task,
                trial.length,
                len(trial.questions),
                way.variant.type_k,
                way.variant.type_v,
                mode,
            )
            for question in trial.questions:
                try:
                    prompt = shown.prompt(mode, question)
                except DoesNotFitError as error:
                    self._skip(trial, f"{mode}: {error.message.rstrip('.')}")
                    break
                key = outcome_key(mode, prompt.tokens, shown.max_tokens(mode), f"{shown.window}")
                known = None if self._request.fresh else way.kept(state_dir).get(key)
                if known is None:
                    if len(prompt.tokens) + shown.max_tokens(mode) > way.config.n_ctx:
                        self._skip(trial, f"{mode}: {len(prompt.tokens):,} tokens do not fit the context")
                        break
                    outcome = yield from self._ask(way, engine, shown, question, mode, prompt)
                    way.kept(state_dir).add(key, outcome)
                else:
                    self._known += 1
                    # What was asked is the same; what it was called may not be.
                    outcome = replace(known, **_names(trial, question, mode))
                way.outcomes.setdefault(mode, []).append(outcome)
                yield Asked(outcome, known is not None)

    def _skip(self, trial: Trial, reason: str) -> None:
        self._skipped[trial.task, trial.length] = Skipped(trial.task, trial.length, reason)

    def _ask(
        self,
        way: _Way,
        engine: SteppingEngine,
        shown: Shown,
        question: Question,
        mode: Mode,
        prompt: Prompt,
    ) -> Generator[EvalEvent, None, Outcome]:
        """Have one question answered. Raises _TimeUpError."""
        trial, cost = shown.trial, _Cost()
        if mode == "sweep":
            prompt = yield from self._sweep(way, engine, shown, question, cost)
        run = Request(
            prompt.tokens,
            shown.max_tokens(mode),
            prefix=prompt.prefix,
            label=f"m3 eval of {self._context.label or self._haystack}",
            save=trial.nested and mode in _SHARING,
        )
        splitter, text = ThinkingSplitter(prompt.tail), ""
        for event in self._watched(way, engine.generate(run), cost):
            assert not isinstance(event, Found)
            if isinstance(event, Token):
                text += "".join(piece for kind, piece in splitter.feed(event.text) if kind == "answer")
            yield event
        text += "".join(piece for kind, piece in splitter.flush() if kind == "answer")
        return Outcome(
            **_names(trial, question, mode),
            depth=question.depth,
            score=question.score(text),
            reply=text.strip(),
            prompt_tokens=cost.prompt,
            restored_tokens=cost.restored,
            generated_tokens=cost.generated,
            seconds=cost.seconds,
        )

    def _sweep(
        self, way: _Way, engine: SteppingEngine, shown: Shown, question: Question, cost: _Cost
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
        self, way: _Way, events: Iterator[_EngineOrSweep], cost: _Cost
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

    def _remember(self) -> None:
        """Keep what follows from the outcomes, for `m3 ask`, if all lengths were measured."""
        state_dir = self._request.context.state_dir
        if not self._complete or state_dir is None:
            return
        for number, way in enumerate(self._ways):
            modes = self._request.modes
            runs = self.result.runs[number * len(modes) : (number + 1) * len(modes)]
            whole = next((run for run in runs if run.mode == "whole"), None)
            scores = {run.mode: Score.of(o.score for o in run.outcomes) for run in runs if run.outcomes}
            remember(state_dir, way.variant, whole.groups() if whole is not None else (), scores)


@dataclass(slots=True)
class _Cost:
    """What one question took, in all of its prompts."""

    prompt: int = 0
    restored: int = 0
    generated: int = 0
    seconds: float = 0.0

    def add(self, event: Finished) -> None:
        self.prompt += event.prompt_tokens
        self.restored += event.restored_tokens
        self.generated += event.generated_tokens
        self.seconds += event.prefill_seconds + event.decode_seconds


def _names(trial: Trial, question: Question, mode: Mode) -> dict[str, Any]:
    """What an outcome is called by."""
    return {
        "task": trial.task,
        "group": trial.group,
        "mode": mode,
        "length": trial.length,
        "question": question.id,
    }
