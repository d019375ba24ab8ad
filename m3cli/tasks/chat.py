"""`m3 chat`: several questions on one context, each with what was said before."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from m3cli.engine.events import Notice, Sampling
from m3cli.errors import DoesNotFitError
from m3cli.tasks.ask import Answer, AskEvent, AskRequest, answer
from m3cli.tasks.context import Context, Turn

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from m3cli.engine.events import Engine
    from m3cli.prompt.pack import Strategy
    from m3cli.tasks.context import ContextRequest, Packed
    from m3cli.tasks.stepping import OpenEngine

# Answers that a context has room for when it is made, so that it need not grow with every question.
_ROOM = 4
FORGOTTEN = "The conversation has outgrown the context; the oldest question is left out from now on."


class Chat:
    """A conversation about a corpus. A context manager: model and engine end with it.

    The corpus stands first in every prompt, so its KV cache is computed once, and shared with `ask`. A
    corpus that does not fit is represented by the excerpts that match each question best.
    """

    def __init__(
        self,
        request: ContextRequest,
        *,
        open_engine: OpenEngine,
        stdin: Callable[[], bytes],
        sampling: Sampling | None = None,
    ) -> None:
        self._request = request
        self._open_engine = open_engine
        self._stdin = stdin
        self._sampling = sampling or Sampling()
        self._engine: Engine | None = None
        self._n_ctx = 0
        self._told: tuple[str, ...] = ()
        self._strategy: Strategy | None = None
        self.turns: list[Turn] = []
        self.packed: Packed | None = None
        self.context = Context(request, stdin)

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.context.close()
        self._close_engine()

    def ask(self, question: str) -> Iterator[AskEvent]:
        """Stream the answer to `question`; it joins the conversation when it is complete.

        Raises what `m3cli.tasks.ask.ask` raises, and KeyboardInterrupt when it was stopped: then the
        conversation is as if the question had not been asked.
        """
        started = time.perf_counter()
        if not self.turns:
            for note in self.context.notes:
                yield Notice(note)
        packed = yield from self._pack(question)
        self.packed = packed
        prompt = self.context.prompt(packed.pack.parts, question, self.turns)
        yield packed
        yield from map(Notice, packed.notes if not self.turns else ())
        request = AskRequest(question, self._request, self._sampling)
        engine = yield from self._fitting_engine(packed)
        for event in answer(
            engine,
            request,
            packed,
            prompt,
            label=self.context.label,
            started=started,
            exact=not self.turns,  # what the model has written itself cannot be computed again in batches
        ):
            if isinstance(event, Answer):
                self.turns.append(Turn(question, event.text))
            yield event

    def reload(self) -> None:
        """Read the corpus again; the conversation stays.

        Raises what reading raises; then nothing has changed.
        """
        fresh = Context(self._request, self._stdin)
        self.context.close()
        self.context = fresh
        self._strategy = self.packed = None

    def transcript(self) -> str:
        """The conversation as Markdown."""
        return "".join(f"## {turn.question}\n\n{turn.answer}\n\n" for turn in self.turns)

    def _pack(self, question: str) -> Generator[Notice, None, Packed]:
        """Pack the corpus beside the conversation, whose beginning is forgotten if there is no room for it.

        Yields notices and returns the Packed.
        """
        while True:
            try:
                packed = self.context.pack(question, self.turns, strategy=self._strategy)
            except DoesNotFitError:
                if not self.turns:
                    raise
                del self.turns[0]
                yield Notice(FORGOTTEN)
            else:
                # Decided once: what a longer conversation leaves room for changes with every question.
                self._strategy = packed.pack.strategy
                return packed

    def _fitting_engine(self, packed: Packed) -> Generator[Notice, None, Engine]:
        """The engine, opened anew when its context is too small; the prefix comes back from the cache.

        Yields what is to be told of how the model is loaded, once.
        """
        if self._engine is None or packed.prompt_tokens + packed.max_tokens > self._n_ctx:
            self._close_engine()
            self._n_ctx = self.context.room_for(packed, _ROOM)
            config, told = self.context.engine_config(self._n_ctx)
            self._engine = self.context.open(self._open_engine, config)
            if told != self._told:
                self._told = told
                yield from map(Notice, told)
        return self._engine

    def _close_engine(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
