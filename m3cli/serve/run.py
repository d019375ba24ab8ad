"""A server from its start to its end: the address, the file by which it is found, the signals."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import uvicorn

from m3cli import __version__
from m3cli.engine.events import Sampling
from m3cli.engine.running import (
    LOOPBACK,
    RunningServer,
    announce,
    model_state,
    new_secret,
    running_servers,
    this_machine,
    url_of,
)
from m3cli.errors import MachineError, UsageError
from m3cli.serve.app import make_app
from m3cli.serve.metrics import Metrics
from m3cli.serve.model import ServedModel
from m3cli.serve.protocol import MOST_CONNECTIONS, Connection
from m3cli.serve.scheduler import ClosingError, Job, Scheduler
from m3cli.serve.stream import Limits, Service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from m3cli.engine.events import Event
    from m3cli.tasks.context import ContextRequest
    from m3cli.tasks.stepping import OpenEngine

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_OWN_FILES = 40  # that the server opens itself, those of a model process that starts among them
_BACKLOG = 64  # connections that wait to be taken; asyncio tries as many at a time, files or not
# For what was computed to be saved, and for answers to end, when the server is told to.
_SAVING_SECONDS = 120.0
_ENDING_SECONDS = 130


@dataclass(frozen=True, slots=True)
class ServeRequest:
    """What is served, and where. `api_key` may be empty on a loopback address, `port` 0 is any that is free.

    `servers` is the directory in which commands of the same user find the server; None hides it.
    """

    context: ContextRequest
    host: str = "127.0.0.1"
    port: int = 8303
    api_key: str = ""
    most_waiting: int = 32
    limits: Limits = field(default_factory=Limits)
    sampling: Sampling = field(default_factory=Sampling)
    servers: Path | None = None


class Console(Protocol):
    """Who started the server, and what is told there."""

    def listening(self, url: str) -> None:
        """The server can be reached."""

    def heard(self, event: Event) -> None:
        """An event of loading the model and reading the files."""

    def report(self, sentence: str) -> None:
        """A sentence about what the server does."""

    def crashed(self, error: BaseException) -> None:
        """A defect, whose cause no client is told."""


def serve(
    request: ServeRequest,
    *,
    open_engine: OpenEngine,
    stdin: Callable[[], bytes],
    console: Console,
) -> None:
    """Serve until a signal comes: then what is being computed is saved, and the server ends.

    Raises UsageError for an address that would be open to everybody, MachineError for one that cannot be had,
    and what opening the model and reading the files raise.
    """
    loopback = bool(LOOPBACK.fullmatch(request.host))
    if not loopback and not request.api_key:
        raise UsageError(
            f"At {request.host}, everybody who reaches this machine could use the server.",
            "Name a variable that holds a key with --api-key-env, or leave out --host.",
        )
    with _listening(request.host, request.port) as listener:
        model = ServedModel(request.context, open_engine=open_engine, stdin=stdin, report=console.report)
        try:
            scheduler = Scheduler(model.engine_for, most_waiting=request.most_waiting)
            service = Service(
                model,
                scheduler,
                Metrics(scheduler),
                new_secret(),
                request.api_key,
                loopback,
                request.limits,
                request.sampling,
                console.report,
                console.crashed,
            )
            try:
                _run(request, service, listener, console)
            finally:
                scheduler.close(_SAVING_SECONDS)
        finally:
            model.close()


def _run(request: ServeRequest, service: Service, listener: socket.socket, console: Console) -> None:
    host, port = listener.getsockname()[:2]
    prepared = service.model.warm()
    most = _allow_files()
    server = _Server(
        uvicorn.Config(
            make_app(service),
            http=type("Connection", (Connection,), {"most": most}),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=min(_BACKLOG, most),
            timeout_keep_alive=75,
            timeout_graceful_shutdown=_ENDING_SECONDS,
        ),
        service.scheduler,
    )
    for name in ("uvicorn.error", "asyncio"):  # Service.crashed tells what failed
        logger = logging.getLogger(name)
        logger.propagate, logger.handlers = False, [logging.NullHandler()]
    _tell_of_others(request, service, console)
    with _signals(server.end), _announced(request, service, host, port):
        # The server itself asks first: who comes later finds the model loaded and the files computed.
        first = Job(
            prepared.request,
            prepared.n_ctx,
            lambda item: server.fail(item) if isinstance(item, Exception) else console.heard(item),
        )
        with suppress(ClosingError):  # a signal may have come
            service.scheduler.submit(first)
        console.report(
            f"serving {' and '.join(service.model.names)}, up to {service.model.context.window:,} tokens of "
            "context; Ctrl-C ends it"
        )
        console.listening(f"{url_of(host, port)}/v1")
        asyncio.run(server.serve(sockets=[listener]))
    if server.failure is not None:
        raise server.failure


class _Server(uvicorn.Server):
    """A server that a signal ends in order: answers under way end, and what they computed is saved."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler) -> None:
        super().__init__(config)
        self._scheduler = scheduler
        self.failure: Exception | None = None

    def fail(self, error: Exception) -> None:
        """End, as the model or the files cannot be served; from any thread."""
        if not isinstance(error, ClosingError):
            self.failure = error
        self.should_exit = True

    def end(self) -> None:
        """End, as a signal asks for; a second one does not wait for what is computed to be saved."""
        self.force_exit = self.should_exit
        self.should_exit = True
        seconds = 0.0 if self.force_exit else _SAVING_SECONDS
        # Not here: a signal comes in the middle of anything.
        threading.Thread(target=self._scheduler.close, args=(seconds,), daemon=True).start()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing in place of uvicorn's, which raises the signals again when it has ended."""
        yield


def _allow_files() -> int:
    """Allow as many open files as the system lets, up to what all connections take; how many these may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MOST_CONNECTIONS + 64
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    # As many again are taken at a time, and closed if they are too many.
    return max(min(MOST_CONNECTIONS, (soft - _OWN_FILES) // 2), 1)


def _tell_of_others(request: ServeRequest, service: Service, console: Console) -> None:
    """Say what whoever starts a server may not have meant."""
    path = str(service.model.context.model.header.path.resolve())
    for other in running_servers(request.servers) if request.servers is not None else ():
        if other.model_path == path:
            console.report(f"another server of this model runs at {other.url}: it is in memory twice")
    if request.context.corpus is not None and not request.api_key:
        console.report("every user of this machine can ask about the files; a key closes it (--api-key-env)")


@contextmanager
def _signals(end: Callable[[], None]) -> Iterator[None]:
    # One that is ignored stays so: nohup and shells' background jobs mean it.
    heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = [(number, signal.signal(number, lambda *_: end())) for number in heeded]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens at an address. Raises MachineError."""
    listener = None
    try:
        # With its protocol, or asyncio would not switch off Nagle's algorithm.
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except (OSError, UnicodeError) as error:
        if listener is not None:
            listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise MachineError(
            f"The server cannot listen at {host}, port {port}: {reason}.",
            "Another server may run there already; choose another address with --port and --host.",
        ) from error
    with listener:
        yield listener


@contextmanager
def _announced(request: ServeRequest, service: Service, host: str, port: int) -> Iterator[None]:
    """Have commands of this user find the server meanwhile, if it is at a loopback address."""
    if request.servers is None or not service.loopback:
        yield
        return
    header = service.model.context.model.header
    server = RunningServer(
        version=__version__,
        pid=os.getpid(),
        machine=this_machine(),
        host=host,
        port=port,
        secret=service.secret,
        model_path=str(header.path.resolve()),
        model_state=model_state(header.path),
        n_ctx=service.model.context.window,
        run=request.context.run.as_json(),
        caches=request.context.caching is not None,
        started=time.time(),
    )
    try:
        path = announce(request.servers, server)
    except OSError as error:
        service.report(f"other m3 commands will not find this server: {error}")
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
