"""The HTTP API: OpenAI's completions, what other servers offer beside them, and a way for m3's commands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import h11
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from m3cli import __version__
from m3cli.engine.events import request_of
from m3cli.engine.running import proof
from m3cli.engine.served import GENERATE, HELLO, NDJSON
from m3cli.errors import M3Error
from m3cli.model.tokens import unpack_ids
from m3cli.serve.answers import Answer, Reading, error_of
from m3cli.serve.calls import chat_call, completion_call
from m3cli.serve.fields import RequestError, parse_object
from m3cli.serve.guard import PAGES, Guard, read_body
from m3cli.serve.metrics import CONTENT_TYPE, Metrics
from m3cli.serve.model import Prepared
from m3cli.serve.stream import Events, Service, Stream, chunks_of, lines_of, unless_gone, whole_of

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from m3cli.serve.calls import Call

_LEAST_BODY = 1_000_000
_BYTES_PER_TOKEN = 40  # of JSON, in which many characters are spelled with six


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
        events = Events(self._service, Prepared(asked, n_ctx))
        return Stream(events, lines_of(events), NDJSON)

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
        events = Events(self._service, prepared)
        if call.stream:
            first = await unless_gone(request, events.first())
            return Stream(events, chunks_of(events, first, reading, answer, call), "text/event-stream")
        try:
            whole = await unless_gone(request, whole_of(events, reading))
        finally:
            events.leave()
        if whole is None:
            return Response(status_code=499)  # nobody reads it
        text, reasoning = whole
        assert reading.reason is not None
        return JSONResponse(answer.whole(text, reasoning, reading.reason, reading.usage()))


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
    status, body = error_of(RequestError(f"{error.detail}.", status=error.status_code))
    return JSONResponse(body, status, error.headers)
