"""Whatever a server does in the middle of an answer, or says, is a sentence here, and nothing hangs."""

from __future__ import annotations

import json
import os
import socketserver
import struct
import threading
import time
from array import array
from dataclasses import replace
from socket import SO_LINGER, SOL_SOCKET, socket
from typing import TYPE_CHECKING, Any

import pytest

from m3cli import __version__
from m3cli.engine import served
from m3cli.engine.events import (
    Event,
    Finished,
    Loaded,
    Notice,
    Prefilled,
    Request,
    Restored,
    Sampling,
    Token,
    event_message,
    request_of,
)
from m3cli.engine.running import RunningServer, new_secret, proof, this_machine
from m3cli.engine.served import ServedEngine, is_alive
from m3cli.errors import DoesNotFitError, EngineCrashError, M3Error, MachineError
from m3cli.model.tokens import unpack_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEADLINE = 60.0  # seconds; only to fail rather than hang
SECRET = new_secret()
REQUEST = Request(
    array("i", [1, 2, 3]), 5, Sampling(temperature=0.5, seed=7), prefix=2, label="x", exact=False, schema="{}"
)
EVENTS: list[Event] = [
    Loaded(0.0, 4096, "llama 135M", "full"),
    Restored(2, 0.1, "disk"),
    Prefilled(3, 3, 0.1),
    Notice("Something to know."),
    Token(7, "Hé"),
    Token(8, ""),
    Finished("stop", 3, 2, 0.1, 0.2, 2),
]
NDJSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"


def lines(*events: Event) -> bytes:
    return b"".join(json.dumps(event_message(event)).encode() + b"\n" for event in events)


def chunked(data: bytes) -> bytes:
    """A body in chunks, without the one that ends it."""
    return b"%x\r\n%s\r\n" % (len(data), data)


class Stub:
    """A server that says what a test has it say, after it has proved to be the one, unless it `proves` not.

    `heard` is all requests that it was sent, `left` whether a client has left.
    """

    def __init__(self, reply: Callable[[socket, bytes], None], *, proves: bool) -> None:
        self.heard: list[bytes] = []
        self.left = threading.Event()
        stub = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                connection: socket = self.request
                connection.settimeout(DEADLINE)
                try:
                    if proves and not prove(connection, self._read()):
                        return
                    reply(connection, self._read())
                    while connection.recv(65536):
                        pass
                except OSError:  # the other side has closed
                    pass
                stub.left.set()

            def _read(self) -> bytes:
                """A request; fails when the client leaves."""
                request = b""
                while not _is_whole(request):
                    piece = self.request.recv(65536)
                    request += piece
                    if not piece:
                        raise OSError
                stub.heard.append(request)
                return request

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.server = server(self._server.server_address[1])

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def prove(connection: socket, request: bytes, secret: str = SECRET) -> bool:
    """Say what a server says that knows `secret`; give whether the connection stays open."""
    nonce = request.partition(b"nonce=")[2].split()[0].decode()
    connection.sendall(hello(json.dumps({"proof": proof(secret, nonce)}).encode()))
    if b"Connection: close" in request:
        connection.close()
        return False
    return True


def hello(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def _is_whole(request: bytes) -> bool:
    head, separator, body = request.partition(b"\r\n\r\n")
    fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
    return bool(separator) and len(body) >= int(fields.get(b"Content-Length", b"0"))


def server(port: int) -> RunningServer:
    return RunningServer(
        version=__version__,
        pid=os.getpid(),
        machine=this_machine(),
        host="127.0.0.1",
        port=port,
        secret=SECRET,
        model_path="/models/m.gguf",
        model_state=[1, 2],
        n_ctx=4096,
        run={},
        caches=True,
        started=time.time(),
    )


Start = Any  # of a Stub, by what it sends or by a function that sends it


@pytest.fixture
def stub() -> Iterator[Start]:
    """`stub(reply)`: a server that sends some bytes and closes, or does what a function does."""
    stubs: list[Stub] = []

    def start(reply: bytes | Callable[[socket, bytes], None], *, proves: bool = True) -> Stub:
        def send(connection: socket, request: bytes) -> None:
            if callable(reply):
                reply(connection, request)
            else:
                connection.sendall(reply)
                connection.close()

        stubs.append(Stub(send, proves=proves))
        return stubs[-1]

    yield start
    for each in stubs:
        each.close()


def answer(one: RunningServer) -> list[Event]:
    return list(ServedEngine(one, 4096).generate(REQUEST))


@pytest.mark.parametrize("form", ["closed at the end", "in chunks", "byte by byte"])
def test_the_events_of_an_answer_come_through(stub: Start, form: str) -> None:
    """All events, as the server's engine gave them, with lines between them that only keep it open."""
    body = b"\n\n" + lines(*EVENTS[:3]) + b"\n" + lines(*EVENTS[3:])

    def reply(connection: socket, request: bytes) -> None:
        if form == "closed at the end":
            connection.sendall(NDJSON + b"\r\n" + body)
        else:
            size = 1 if form == "byte by byte" else 50
            pieces = [body[place : place + size] for place in range(0, len(body), size)]
            connection.sendall(NDJSON + b"Transfer-Encoding: chunked\r\n\r\n")
            for piece in pieces:
                connection.sendall(chunked(piece))
            connection.sendall(b"0\r\n\r\n")

    assert answer(stub(reply).server) == EVENTS


def test_a_request_arrives_as_it_was_made(stub: Start) -> None:
    """Tokens, sampling and all that decides an answer; with the secret, and the context that it needs."""
    one = stub(NDJSON + b"\r\n" + lines(*EVENTS))
    answer(one.server)
    head, _, body = one.heard[1].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /m3/generate HTTP/1.1\r\n")
    assert f"Authorization: Bearer {SECRET}".encode() in head
    line, _, tokens = body.partition(b"\n")
    message = json.loads(line)
    assert message["n_ctx"] == 4096
    assert replace(request_of(message["request"], unpack_ids(tokens)), messages=()) == REQUEST


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"HTTP/1.1 2",
        b"GARBAGE\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n",
        NDJSON + b"\r\n",
        NDJSON + b"\r\n" + lines(*EVENTS[:4]),
        NDJSON + b"\r\n" + lines(*EVENTS)[:-5],
        NDJSON + b"Content-Length: 100000\r\n\r\n" + lines(*EVENTS[:4]),
        NDJSON + b"Transfer-Encoding: chunked\r\n\r\n",
        NDJSON + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(lines(*EVENTS[:4])),
        NDJSON + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(lines(*EVENTS[:4])) + b"0\r\n\r\n",
        NDJSON + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        NDJSON + b"Transfer-Encoding: chunked\r\n\r\n-5\r\n",
    ],
)
def test_a_connection_that_is_cut_is_one_sentence(stub: Start, sent: bytes) -> None:
    """Before the answer, in its middle or just before its end: the error names the server and the way on."""
    one = stub(sent)
    with pytest.raises(EngineCrashError) as caught:
        answer(one.server)
    assert caught.value.message.startswith(f"The m3 server at {one.server.url} cannot be used any more: ")
    assert "--no-server" in caught.value.hint


def test_what_came_before_the_cut_was_shown(stub: Start) -> None:
    """Events are passed on as they come, and not when the answer is complete."""
    events = ServedEngine(stub(NDJSON + b"\r\n" + lines(*EVENTS[:5])).server, 1).generate(REQUEST)
    assert [next(events) for _ in range(5)] == EVENTS[:5]
    with pytest.raises(EngineCrashError):
        next(events)


def test_a_reset_connection_is_one_sentence(stub: Start) -> None:
    """A server that was killed resets the connection instead of closing it."""

    def reply(connection: socket, request: bytes) -> None:
        connection.sendall(NDJSON + b"\r\n" + lines(*EVENTS[:4]))
        connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    with pytest.raises(EngineCrashError, match="cannot be used any more"):
        answer(stub(reply).server)


@pytest.mark.parametrize(
    "line",
    [
        b"not JSON",
        b"\xff\xfe\x00",
        b"{",
        b"[]",
        b"[[]]",
        b"5",
        b"null",
        b'"error"',
        b'"event"',
        b"{}",
        b'{"event": "Unheard"}',
        b'{"event": 5}',
        b'{"event": []}',
        b'{"event": "Token"}',
        b'{"event": "Token", "id": 1, "text": "a", "more": 1}',
        b'{"error": "ModelError"}',
        b'{"error": null, "message": "a", "hint": "b"}',
        b'{"error": [], "message": "a", "hint": "b"}',
        b'{"error": "annotations", "message": "a", "hint": "b"}',
        b'{"error": "IntEnum", "message": "a", "hint": "b"}',
        b'{"error": "ExitCode", "message": "a", "hint": "b"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"x" * 3_000_000,
    ],
)
def test_a_line_that_is_no_event_is_one_sentence(stub: Start, line: bytes) -> None:
    """Garbage, JSON of another form and lines without end: the answer is over, and says whose fault it is."""
    one = stub(NDJSON + b"\r\n" + lines(*EVENTS[:3]) + line + b"\n" + lines(*EVENTS[3:]))
    with pytest.raises(M3Error) as caught:
        answer(one.server)
    assert one.server.url in caught.value.message
    assert len(caught.value.message) < 500


def test_an_error_of_the_engine_is_that_of_the_engine(stub: Start) -> None:
    """What the model's process refuses comes through with its kind, and so with its exit code."""
    told = {"error": "DoesNotFitError", "message": "The prompt has 9 tokens.", "hint": "Ask less."}
    with pytest.raises(DoesNotFitError) as caught:
        answer(stub(NDJSON + b"\r\n" + json.dumps(told).encode() + b"\n").server)
    assert (caught.value.message, caught.value.hint) == (told["message"], told["hint"])


def test_an_error_of_the_server_names_it(stub: Start) -> None:
    """What is wrong with the server itself is told as that, with the way to do without."""
    told = {"error": "ClosingError", "message": "The server is shutting down.", "hint": "Ask again later."}
    one = stub(NDJSON + b"\r\n" + json.dumps(told).encode() + b"\n")
    with pytest.raises(EngineCrashError) as caught:
        answer(one.server)
    assert one.server.url in caught.value.message
    assert "The server is shutting down." in caught.value.message
    assert "--no-server" in caught.value.hint


def test_an_answer_that_was_stopped_is_an_error(stub: Start) -> None:
    """Nobody here has stopped it: the server was told to end, and the command has no answer."""
    stopped = b'{"event": "Stopped", "done": 3, "saved": 0}\n'
    one = stub(NDJSON + b"\r\n" + lines(*EVENTS[:3]) + stopped)
    with pytest.raises(EngineCrashError) as caught:
        answer(one.server)
    assert one.server.url in caught.value.message


@pytest.mark.parametrize("status", [400, 401, 404, 413, 429, 500, 503])
@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": {"message": "9 requests wait already. Ask again later."}}', "9 requests wait already"),
        (b'{"error": "no"}', "status"),
        (b'{"error": null}', "status"),
        (b"[]", "status"),
        (b"<html>Bad Gateway</html>", "status"),
        (b"\xff", "status"),
        (b"", "status"),
        (b"[" * 100_000, "status"),
    ],
)
def test_a_refusal_is_one_sentence(stub: Start, status: int, body: bytes, said: str) -> None:
    """Busy, ending or broken: what the server says of it is told, and its status if it says nothing."""
    head = f"HTTP/1.1 {status} Refused\r\nContent-Length: {len(body)}\r\n\r\n"
    one = stub(head.encode() + body)
    with pytest.raises(MachineError) as caught:
        answer(one.server)
    assert caught.value.message.startswith(f"The m3 server at {one.server.url} did not take the request: ")
    assert (f"status {status}" if said == "status" else said) in caught.value.message
    assert "--no-server" in caught.value.hint


def test_a_redirection_is_not_followed(stub: Start) -> None:
    """A prompt and a secret go to the address that was announced and to no other."""
    other = stub(NDJSON + b"\r\n" + lines(*EVENTS))
    head = f"HTTP/1.1 307 Elsewhere\r\nLocation: {other.server.url}/m3/generate\r\nContent-Length: 0\r\n\r\n"
    with pytest.raises(MachineError, match="status 307"):
        answer(stub(head.encode()).server)
    assert other.heard == []


def test_nobody_listens(stub: Start) -> None:
    """A server that ended between being found and being asked is one sentence."""
    one = stub(b"")
    one.close()
    assert not is_alive(one.server)
    with pytest.raises(EngineCrashError, match="cannot be used any more"):
        answer(one.server)


@pytest.mark.parametrize(
    "sent", [b"", b"HTTP/1.1 200", NDJSON + b"\r\n", NDJSON + b"\r\n" + lines(*EVENTS[:3])]
)
def test_silence_has_an_end(stub: Start, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that says nothing more, not even that it is there, is given up."""
    monkeypatch.setattr(served, "_SILENCE", 0.2)
    one = stub(lambda connection, _: connection.sendall(sent))
    with pytest.raises(EngineCrashError, match="cannot be used any more"):
        answer(one.server)
    assert one.left.wait(DEADLINE)


def test_leaving_an_answer_closes_the_connection(stub: Start) -> None:
    """Ctrl-C here is how the server hears that nobody waits any more."""
    one = stub(lambda connection, _: connection.sendall(NDJSON + b"\r\n" + lines(*EVENTS[:5])))
    events = ServedEngine(one.server, 4096).generate(REQUEST)
    assert next(events) == EVENTS[0]
    assert not one.left.is_set()
    events.close()  # type: ignore[attr-defined]
    assert one.left.wait(DEADLINE)


def test_nothing_is_held_between_two_answers(stub: Start) -> None:
    """The same engine answers again, also after it was closed and after an answer that failed."""
    replies = [NDJSON + b"\r\n" + lines(*EVENTS), b"", NDJSON + b"\r\n" + lines(*EVENTS)]

    def reply(connection: socket, request: bytes) -> None:
        connection.sendall(replies.pop(0))
        connection.close()

    with ServedEngine(stub(reply).server, 4096) as engine:
        assert list(engine.generate(REQUEST)) == EVENTS
        with pytest.raises(EngineCrashError):
            list(engine.generate(REQUEST))
        engine.close()
        engine.stop()
        assert list(engine.generate(REQUEST)) == EVENTS


def test_a_server_proves_that_it_is_the_one(stub: Start) -> None:
    """Who knows the secret is taken for the server, and is not told it."""
    one = stub(b"")
    assert is_alive(one.server)
    assert one.heard[0].startswith(b"GET /m3/hello?nonce=")
    assert SECRET.encode() not in one.heard[0]


def test_a_proof_cannot_be_used_again(stub: Start) -> None:
    """What proved it once does not the second time: every question is another one."""
    first: list[bytes] = []

    def reply(connection: socket, request: bytes) -> None:
        first.append(request)
        prove(connection, first[0])

    one = stub(reply, proves=False)
    assert [is_alive(one.server), is_alive(one.server)] == [True, False]


def test_another_process_is_not_taken_for_the_server(stub: Start) -> None:
    """Who listens at the address by now and does not know the secret is not asked, nor told it."""
    one = stub(lambda connection, request: prove(connection, request, "another"), proves=False)
    assert not is_alive(one.server)
    with pytest.raises(EngineCrashError, match="another process"):
        answer(one.server)
    assert [request.split()[0] for request in one.heard] == [b"GET", b"GET"]
    assert SECRET.encode() not in b"".join(one.heard)


@pytest.mark.parametrize("form", ["said", "closed", "without a length"])
def test_a_proof_is_of_one_connection(stub: Start, form: str) -> None:
    """Who proves it and hangs up may not be who takes the next call: nothing more is sent."""

    def reply(connection: socket, request: bytes) -> None:
        nonce = request.partition(b"nonce=")[2].split()[0].decode()
        body = json.dumps({"proof": proof(SECRET, nonce)}).encode()
        head = {
            "said": b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body),
            "closed": b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body),
            "without a length": b"HTTP/1.1 200 OK\r\n\r\n",
        }[form]
        connection.sendall(head + body)
        connection.close()

    one = stub(reply, proves=False)
    with pytest.raises(EngineCrashError):
        answer(one.server)
    assert len(one.heard) == 1
    assert SECRET.encode() not in one.heard[0]


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GARBAGE",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{}",
        hello(b""),
        hello(b"<html>"),
        hello(b"null"),
        hello(b"[]"),
        hello(b"{}"),
        hello(b'{"proof": null}'),
        hello(b'{"proof": ["a"]}'),
        hello(b'{"proof": ""}'),
        hello(b'{"proof": "\\ud800"}'),
        hello('{"proof": "é"}'.encode()),
        hello(b'{"proof": "' + b"0" * 64 + b'"}'),
        hello(b"\xff"),
        hello(b"[" * 500_000),
        hello(b"0" * 3_000_000),
    ],
)
def test_whatever_answers_there_is_no_server(stub: Start, sent: bytes) -> None:
    """Another program, or one that means harm: it is no server, and that is all."""
    one = stub(sent, proves=False)
    assert not is_alive(one.server)
    with pytest.raises(EngineCrashError):
        answer(one.server)
    assert SECRET.encode() not in b"".join(one.heard)


@pytest.mark.parametrize("first", [b"", b"HTTP/1.1 200 OK\r\n", hello(b"x" * 1000)[:60]])
def test_a_server_that_does_not_answer_is_given_up(
    stub: Start, first: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that hangs, or that another user has put there to make m3 wait."""
    monkeypatch.setattr(served, "_PATIENCE", 0.2)
    one = stub(lambda connection, _: connection.sendall(first), proves=False)
    assert not is_alive(one.server)
    assert one.left.wait(DEADLINE)
    with pytest.raises(EngineCrashError):
        answer(one.server)


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\n", hello(b"x" * 900_000)[:50]])
def test_a_server_that_never_stops_answering_is_given_up(
    stub: Start, head: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte now and then is no answer: it takes a bounded time as a whole to find that out."""
    monkeypatch.setattr(served, "_PATIENCE", 0.5)
    given_up = threading.Event()

    def reply(connection: socket, _request: bytes) -> None:
        connection.sendall(head)
        while not given_up.wait(0.05):
            connection.sendall(b"x")

    one = stub(reply, proves=False)
    asking = threading.Thread(target=is_alive, args=(one.server,), daemon=True)
    asking.start()
    asking.join(DEADLINE)
    given_up.set()
    assert not asking.is_alive()
