"""The HTTP API: OpenAI's completions, what other servers offer beside them, and a way for m3's commands."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import anyio.to_thread
import h11
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from m3cli import __version__
from m3cli.engine.events import Finished, Prefilled, Sampling, Stopped, Token, event_message, request_of
from m3cli.engine.running import proof
from m3cli.engine.served import GENERATE, HELLO, NDJSON
from m3cli.errors import M3Error, MachineError
from m3cli.model.tokens import unpack_ids
from m3cli.serve.answers import UNFORESEEN, Answer, Reading, error_of
from m3cli.serve.calls import chat_call, completion_call
from m3cli.serve.fields import RequestError, parse_object
from m3cli.serve.guard import PAGES, Guard, read_body
from m3cli.serve.metrics import CONTENT_TYPE, Metrics
from m3cli.serve.model import Prepared
from m3cli.serve.scheduler import Job, Scheduler

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine

    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from m3cli.engine.events import Event
    from m3cli.serve.calls import Call
    from m3cli.serve.model import ServedModel

_LEAST_BODY = 1_000_000
_BYTES_PER_TOKEN = 40  # of JSON, in which many characters are spelled with six
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


def make_app(service: Service) -> ASGIApp:
    """The application of a server."""
    routes = _Routes(service)
    app = Starlette(
        routes=[
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.model),
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/v1/completions", routes.completion, methods=["POST"]),
            Route("/tokenize", routes.tokenize, methods=["POST"]),
            Route("/health", routes.health),
            Route("/metrics", routes.metrics),
            Route(HELLO, routes.hello),
            Route(GENERATE, routes.generate, methods=["POST"]),
        ],
        middleware=[
            Middleware(
                CORSMiddleware,
                allow_origin_regex=PAGES.pattern,
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type"],
            ),
            Middleware(Guard, api_key=service.api_key, secret=service.secret, loopback=service.loopback),
        ],
        exception_handlers={
            RequestError: _on_error,
            M3Error: _on_error,
            HTTPException: _on_http_error,
            ClientDisconnect: _on_disconnect,
            Exception: routes.on_defect,
        },
    )
    return _Counting(app, service.metrics)


class _Routes:
    """The answers of the server's addresses."""

    def __init__(self, service: Service) -> None:
        self._service = service
        window = service.model.context.window
        self._most_bytes = service.limits.body_bytes or max(_LEAST_BODY, window * _BYTES_PER_TOKEN)

    async def models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": list(map(self._about, self._service.model.names))})

    async def model(self, request: Request) -> Response:
        return JSONResponse(self._about(self._known(request.path_params["name"])))

    async def health(self, _request: Request) -> Response:
        scheduler = self._service.scheduler
        status = {"status": "ok", "running": scheduler.running, "waiting": scheduler.waiting}
        return JSONResponse(status) if scheduler.alive else JSONResponse({"status": "failed"}, 503)

    async def metrics(self, _request: Request) -> Response:
        return Response(self._service.metrics.text(), media_type=CONTENT_TYPE)

    async def hello(self, request: Request) -> Response:
        if not self._service.loopback:  # m3's commands look for servers of their own machine
            raise HTTPException(404)
        nonce = request.query_params.get("nonce", "")[:100]
        return JSONResponse({"m3": __version__, "proof": proof(self._service.secret, nonce)})

    async def tokenize(self, request: Request) -> Response:
        fields = parse_object(await self._body(request))
        text = fields.text("content" if fields.has("content") else "prompt")
        tokens = await anyio.to_thread.run_sync(self._service.model.tokens, text)
        window = self._service.model.context.window
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": window})

    async def chat(self, request: Request) -> Response:
        self._service.scheduler.check_room()
        call = chat_call(parse_object(await self._body(request)), self._service.sampling)
        self._known(call.call.model)
        prepared = await anyio.to_thread.run_sync(self._service.model.chat, call)
        return await self._answer(request, call.call, prepared, "chat.completion")

    async def completion(self, request: Request) -> Response:
        self._service.scheduler.check_room()
        call = completion_call(parse_object(await self._body(request)), self._service.sampling)
        self._known(call.call.model)
        prepared = await anyio.to_thread.run_sync(self._service.model.completion, call)
        return await self._answer(request, call.call, prepared, "text_completion")

    async def generate(self, request: Request) -> Response:
        """What ServedEngine asks: a line of JSON, then token ids; the events, each a line of JSON."""
        head, _, tokens = (await self._body(request)).partition(b"\n")
        fields = parse_object(head)
        n_ctx = fields.integer("n_ctx", 1, self._service.model.context.window) or 1
        try:
            asked = request_of(fields.raw("request"), unpack_ids(tokens))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RequestError("The request is not one of this version of m3.") from error
        events = _Events(self._service, Prepared(asked, n_ctx))
        return _Stream(events, _lines(events), NDJSON)

    async def on_defect(self, _request: Request, error: Exception) -> Response:
        if not isinstance(error, h11.LocalProtocolError):  # of a client that has broken off
            self._service.crashed(error)
        return await _on_error(_request, error)

    def _known(self, name: str) -> str:
        names = self._service.model.names
        if name not in names:
            raise RequestError(
                f"This server has no model '{name}'; it has {' and '.join(names)}.",
                "model",
                status=404,
                code="model_not_found",
            )
        return name

    def _about(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": int(self._service.started),
            "owned_by": "m3",
            "max_model_len": self._service.model.context.window,
        }

    async def _body(self, request: Request) -> bytes:
        limits = self._service.limits
        return await read_body(request, most=self._most_bytes, seconds=limits.body_seconds)

    async def _answer(self, request: Request, call: Call, prepared: Prepared, kind: str) -> Response:
        tail = prepared.tail if kind == "chat.completion" else None
        reading = Reading(len(prepared.request.tokens), call.stop, tail)
        answer = Answer(kind, call.model)
        events = _Events(self._service, prepared)
        if call.stream:
            first = await _unless_gone(request, events.first())
            return _Stream(events, _chunks(events, first, reading, answer, call), "text/event-stream")
        try:
            whole = await _unless_gone(request, _whole(events, reading))
        finally:
            events.leave()
        if whole is None:
            return Response(status_code=499)  # nobody reads it
        text, reasoning = whole
        assert reading.reason is not None
        return JSONResponse(answer.whole(text, reasoning, reading.reason, reading.usage()))


class _Events:
    """The events of one answer. Who leaves before the last one has the engine stop."""

    def __init__(self, service: Service, prepared: Prepared) -> None:
        self._service = service
        self._prepared = prepared
        self._started = time.monotonic()
        loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event | Exception] = asyncio.Queue()

        def deliver(item: Event | Exception) -> None:
            with suppress(RuntimeError):  # the server has ended, and nobody waits for it
                loop.call_soon_threadsafe(self._queue.put_nowait, item)

        self._job = Job(prepared.request, prepared.n_ctx, deliver)
        self._ended = False
        self._generated = 0
        self._getting: asyncio.Future[Event | Exception] | None = None
        service.scheduler.submit(self._job)

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


async def _lines(events: _Events) -> AsyncGenerator[bytes]:
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


async def _whole(events: _Events, reading: Reading) -> tuple[str, str]:
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


async def _chunks(
    events: _Events, first: Event | None, reading: Reading, answer: Answer, call: Call
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


class _Stream(StreamingResponse):
    """A response that leaves its events when the client has gone, whether it had begun or not."""

    def __init__(self, events: _Events, content: AsyncGenerator[bytes], media_type: str) -> None:
        super().__init__(content, media_type=media_type, headers={"Cache-Control": "no-store"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with anyio.move_on_after(self._events.seconds_left + _READING_SECONDS):  # who reads nothing
                await super().__call__(scope, receive, send)
        finally:
            self._events.leave()


class _Counting:
    """Counts requests by address and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                path = route.path if isinstance(route, Route) else "other"
                self._metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
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


async def _on_error(_request: Request, error: Exception) -> Response:
    status, body = error_of(error)
    headers = {}
    if status in (429, 503):
        headers["Retry-After"] = "2"
    elif status >= 500:
        headers["x-should-retry"] = "false"  # OpenAI's clients would have it computed three times
    return JSONResponse(body, status, headers)


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _on_http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = {"message": f"{error.detail}.", "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": body}, error.status_code, error.headers)
