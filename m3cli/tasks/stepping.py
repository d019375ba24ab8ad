"""An engine that makes do with less, once, when the memory that was planned with is not there after all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from m3cli.engine.events import Notice, Prefilled, Restored, Token
from m3cli.errors import EngineCrashError, OutOfMemoryError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from m3cli.engine.events import CacheConfig, Engine, EngineConfig, Event, Request

    OpenEngine = Callable[[EngineConfig, CacheConfig | None], Engine]

SMALLER = "{problem} Trying once more with a ubatch of {n_ubatch} and a KV cache of {kv}."


class SteppingEngine:
    """The Engine of `config`, or of `smaller` if that one dies or lacks memory before it has computed.

    `config` is the one in use.
    """

    def __init__(
        self,
        open_engine: OpenEngine,
        config: EngineConfig,
        cache: CacheConfig | None,
        smaller: EngineConfig | None,
    ) -> None:
        self.config = config
        self._open = open_engine
        self._cache = cache
        self._smaller = smaller
        self._engine = open_engine(config, cache)

    def generate(self, request: Request) -> Generator[Event, None, None]:
        """Stream the continuation of `request`; see Engine."""
        try:
            yield from self._generate(request)
        except (OutOfMemoryError, EngineCrashError) as error:
            smaller, self._smaller = self._smaller, None
            if smaller is None:
                raise
            problem = error.message
        else:
            return
        self._engine.close()
        self.config, self._engine = smaller, self._open(smaller, self._cache)
        yield Notice(SMALLER.format(problem=problem, n_ubatch=smaller.n_ubatch, kv=smaller.kv_type_k))
        yield from self._generate(request)

    def _generate(self, request: Request) -> Generator[Event, None, None]:
        restored = 0
        for event in self._engine.generate(request):
            if isinstance(event, Restored):
                restored = event.tokens
            # What was restored counts as prefilled before anything is computed.
            computed = isinstance(event, Prefilled) and event.done > restored
            if computed or isinstance(event, Token):
                self._smaller = None  # the memory is there
            yield event

    def stop(self) -> None:
        """Have the generation end that runs in another thread; see Engine."""
        self._engine.stop()

    def close(self) -> None:
        """Free everything; may be called twice, and from another thread."""
        self._smaller = None  # what dies of this is not to be tried again
        self._engine.close()

    def __enter__(self) -> SteppingEngine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
