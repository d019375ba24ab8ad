"""`m3 warm`: compute the KV cache of a corpus now, so that every question about it is answered fast."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from m3cli.engine.events import Event, Finished, Notice, NotSaved, Request
from m3cli.errors import M3Error, MachineError, UsageError
from m3cli.tasks.context import Context, Packed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from m3cli.tasks.context import ContextRequest
    from m3cli.tasks.stepping import OpenEngine


@dataclass(frozen=True, slots=True)
class Warmed:
    """The first `tokens` of every prompt about this corpus are on the disk, unless they are very few.

    `restored_tokens` of them were computed before; `seconds` is what this run took. `staleness` is that of
    m3cli.engine.events.Updated.
    """

    packed: Packed
    tokens: int
    restored_tokens: int
    seconds: float
    warnings: tuple[str, ...]
    staleness: float = 0.0


WarmEvent = Event | Packed | Warmed


def warm(
    request: ContextRequest, *, open_engine: OpenEngine, stdin: Callable[[], bytes]
) -> Iterator[WarmEvent]:
    """Stream the stages of warming; the last event is Warmed.

    Raises UsageError without a cache, DoesNotFitError when the whole corpus does not fit the context: an
    excerpt depends on the question. Also what the stages raise, and MachineError if nothing could be saved.
    """
    started = time.perf_counter()
    if request.caching is None:
        raise UsageError("Without a cache there is nothing to warm.", "Leave out --no-cache.")
    with Context(request, stdin) as context:
        packed = context.pack("", strategy="whole")
        prompt = context.prompt(packed.pack.parts, "")
        config, told = context.engine_config(packed.n_ctx)
    yield packed
    warnings = [*context.notes, *context.about_whole(packed), *told]
    for note in warnings:
        yield Notice(note)
    tokens = prompt.tokens[: prompt.prefix]
    run = Request(tokens, 0, prefix=prompt.prefix, label=context.label, update=request.run.update)
    finished: Finished | None = None
    with context.open(open_engine, config) as engine:
        for event in engine.generate(run):
            yield event
            if isinstance(event, Notice):
                warnings.append(event.text)
            elif isinstance(event, NotSaved):
                raise MachineError(event.text, "Make room on the disk, or in the cache with m3 cache prune.")
            elif isinstance(event, Finished):
                finished = event
    if finished is None:
        raise M3Error("The engine ended without finishing.", "Run again with --debug and report this.")
    yield Warmed(
        packed,
        len(tokens),
        finished.restored_tokens,
        time.perf_counter() - started,
        tuple(warnings),
        finished.staleness,
    )
