"""The events of an answer on their way to a client, in the forms that clients read."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
from starlette.responses import StreamingResponse

from m3cli.engine.events import Finished, Prefilled, Sampling, Stopped, Token, event_message
from m3cli.errors import M3Error, MachineError
from m3cli.serve.answers import UNFORESEEN, error_of
from m3cli.serve.fields import RequestError
from m3cli.serve.scheduler import Job

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine

    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from m3cli.engine.events import Event
    from m3cli.serve.answers import Answer, Reading
    from m3cli.serve.calls import Call
    from m3cli.serve.metrics import Metrics
    from m3cli.serve.model import Prepared, ServedModel
    from m3cli.serve.scheduler import Scheduler

PING_SECONDS = 10.0  # of silence, after which a line without meaning keeps a connection open
_READING_SECONDS = 60.0  # that a client has for what is left when an answer has ended
_DONE = b"data: [DONE]\n\n"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes of a request, seconds in which it has to be sent, seconds that an answer may take.

    `body_bytes` 0 is what a prompt that fills the context may take.
    """

    body_bytes: int = 0
    body_seconds: float = 60.0
    answer_seconds: float = 86_400.0


@dataclass(frozen=True, slots=True)
class Service:
    """What all routes share. `secret` is known to m3's own commands; `report` is told each answer."""

    model: ServedModel
    scheduler: Scheduler
    metrics: Metrics
    secret: str
    api_key: str = ""
    loopback: bool = True
    limits: Limits = field(default_factory=Limits)
    sampling: Sampling = field(default_factory=Sampling)
    report: Callable[[str], None] = lambda _: None
    crashed: Callable[[BaseException], None] = lambda _: None
    started: float = field(default_factory=time.time)


class Events:
    """The events of one answer. Who leaves before the last one has the engine stop."""

    def __init__(self, service: Service, prepared: Prepared) -> None:
        self._service = service
        self._started = time.monotonic()
        loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event | Exception] = asyncio.Queue()

        def deliver(item: Event | Exception) -> None:
            with suppress(RuntimeError):  # the server has ended, and nobody waits for it
                loop.call_soon_threadsafe(self._put, item)

        self._job = Job(prepared.request, prepared.n_ctx, deliver)
        self._ended = False
        self._generated = 0
        self._getting: asyncio.Future[Event | Exception] | None = None
        service.scheduler.submit(self._job)

    def _put(self, item: Event | Exception) -> None:
        if not self._ended:  # else nobody takes it
            self._queue.put_nowait(item)

    async def first(self) -> Event | None:
        """The first event, or None if it takes long; an answer that fails at once can still say so."""
        try:
            return await self._next()
        except BaseException:
            self.leave()
            raise

    async def all(self) -> AsyncGenerator[Event | None]:
        """Each event; None when there was none for a while. Raises what ends an answer that fails."""
        try:
            while not self._ended:
                yield await self._next()
        finally:
            self.leave()

    @property
    def seconds_left(self) -> float:
        """Until the answer has taken too long."""
        return self._started + self._service.limits.answer_seconds - time.monotonic()

    async def _next(self) -> Event | None:
        left = self.seconds_left
        if left <= 0:
            self._service.metrics.failed.inc()
            self._end("ended at the limit of time")
            raise RequestError("The answer took longer than this server allows.", status=504, code="timeout")
        # Not asyncio.wait_for: before Python 3.12 it may swallow that the client has gone.
        if self._getting is None:
            self._getting = asyncio.ensure_future(self._queue.get())
        if not (await asyncio.wait([self._getting], timeout=min(PING_SECONDS, left)))[0]:
            return None
        item, self._getting = self._getting.result(), None
        metrics = self._service.metrics
        if isinstance(item, Exception):
            self._ended = True
            metrics.failed.inc()
            self._service.report(f"failed: {item}")
            if not isinstance(item, M3Error):
                self._service.crashed(item)
                raise RequestError(UNFORESEEN, status=500) from item
            raise item
        metrics.heard(item)
        if isinstance(item, Token):
            self._generated += 1
            if self._generated == 1:
                metrics.first_token.observe(time.monotonic() - self._started)
        elif isinstance(item, (Finished, Stopped)):
            self._ended = True
            self._service.report(self._summary(item))
        return item

    def _summary(self, last: Finished | Stopped) -> str:
        seconds = time.monotonic() - self._started
        if isinstance(last, Stopped):
            return f"stopped after {last.done:,} tokens, {last.saved:,} of them saved; {seconds:.1f} s"
        return (
            f"{last.prompt_tokens:,} prompt tokens, {last.restored_tokens:,} of them not computed again, "
            f"{last.generated_tokens:,} generated; {seconds:.1f} s"
        )

    def defect(self, error: Exception) -> None:
        """Tell of an error that is m3's own, which no client is told."""
        if not isinstance(error, (M3Error, RequestError)):
            self._service.crashed(error)

    def enough(self) -> None:
        """Have the engine stop: the answer has what it needs."""
        self._end("ended at a stop text")

    def leave(self) -> None:
        """Have the engine stop if the answer has not ended: nobody reads it any more."""
        if not self._ended:
            self._service.metrics.cancelled.inc()
        self._end("left by its client")

    def _end(self, how: str) -> None:
        if self._getting is not None:
            self._getting.cancel()
            self._getting = None
        if not self._ended:
            self._ended = True
            self._service.scheduler.cancel(self._job)
            seconds = time.monotonic() - self._started
            self._service.report(f"{how}, after {self._generated:,} tokens were generated; {seconds:.1f} s")


async def lines_of(events: Events) -> AsyncGenerator[bytes]:
    """Each event as a line of JSON, for m3's own commands."""
    async with aclosing(events.all()) as stream:
        try:
            async for event in stream:
                yield json.dumps(event_message(event)).encode() + b"\n" if event is not None else b"\n"
        except Exception as error:  # noqa: BLE001 - the head is sent: an error can only come in the stream
            events.defect(error)
            if not isinstance(error, M3Error):
                error = MachineError(error_of(error)[1]["error"]["message"], "Look at the log of the server.")
            told = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
            yield json.dumps(told).encode() + b"\n"


async def whole_of(events: Events, reading: Reading) -> tuple[str, str]:
    """The text of an answer and its reasoning."""
    parts: dict[str, list[str]] = {"answer": [], "thinking": []}
    async with aclosing(events.all()) as stream:
        async for event in stream:
            if event is None:
                continue
            for kind, text in reading.feed(event):
                parts[kind].append(text)
            if reading.reason is not None:
                events.enough()
                break
    return "".join(parts["answer"]), "".join(parts["thinking"])


async def chunks_of(
    events: Events, first: Event | None, reading: Reading, answer: Answer, call: Call
) -> AsyncGenerator[bytes]:
    """Server-sent events of an answer; what has no meaning to a client comes as comments."""
    yield _sse(answer.chunk({"role": "assistant", "content": ""}))
    async with aclosing(events.all()) as stream:
        try:
            async for event in _after(first, stream):
                if event is None or isinstance(event, Prefilled):
                    yield _comment(event)
                    continue
                for kind, text in reading.feed(event):
                    yield _sse(answer.chunk({"content" if kind == "answer" else "reasoning_content": text}))
                if reading.reason is not None:
                    events.enough()
                    break
            yield _sse(answer.chunk({}, reading.reason))
            if call.include_usage:
                yield _sse(answer.usage_chunk(reading.usage()))
        except Exception as error:  # noqa: BLE001 - the head is sent: an error can only come in the stream
            events.defect(error)
            yield _sse(error_of(error)[1])
    yield _DONE


async def _after(first: Event | None, rest: AsyncGenerator[Event | None]) -> AsyncGenerator[Event | None]:
    yield first
    async for event in rest:
        yield event


def _comment(event: Prefilled | None) -> bytes:
    if event is None:
        return b": waiting\n\n"
    return f": {event.done} of {event.total} prompt tokens\n\n".encode()


def _sse(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


class Stream(StreamingResponse):
    """A response that leaves its events when the client has gone, whether it had begun or not."""

    def __init__(self, events: Events, content: AsyncGenerator[bytes], media_type: str) -> None:
        super().__init__(content, media_type=media_type, headers={"Cache-Control": "no-store"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send what there is, as long as the answer may take."""
        try:
            with anyio.move_on_after(self._events.seconds_left + _READING_SECONDS):  # who reads nothing
                await super().__call__(scope, receive, send)
        finally:
            self._events.leave()


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, which is cancelled, with None as the result, when the client has gone."""
    doing = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait([doing, watching], return_when=asyncio.FIRST_COMPLETED)
        return doing.result() if doing.done() else None
    finally:
        for task in (doing, watching):
            task.cancel()
        await asyncio.gather(doing, watching, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
