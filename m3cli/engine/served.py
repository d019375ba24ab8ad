"""The engine that a running `m3 serve` of the same user lends: its model is loaded, its context warm."""

from __future__ import annotations

import hmac
import http.client
import json
import secrets
import socket
import time
from typing import TYPE_CHECKING, Any

from m3cli import errors
from m3cli.engine.events import Finished, Stopped, event_of, request_message
from m3cli.engine.interrupts import terminable
from m3cli.engine.running import proof
from m3cli.errors import EngineCrashError, M3Error, MachineError
from m3cli.model.tokens import pack_ids

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Self

    from m3cli.engine.events import Event, Request
    from m3cli.engine.running import RunningServer

HELLO = "/m3/hello"
GENERATE = "/m3/generate"
NDJSON = "application/x-ndjson"
_PATIENCE = 2.0  # seconds for a server to show that it is there
# A server writes an empty line when it has had nothing to say for a while (serve.app.PING_SECONDS).
_SILENCE = 120.0
_LARGEST_LINE = 1_000_000  # bytes


def is_alive(server: RunningServer) -> bool:
    """Whether the process at the address of `server` is that server, and well."""
    nonce = secrets.token_hex(16)
    try:
        return _is_proof(_hello(server, nonce), server, nonce)
    except OSError:
        return False


def _is_proof(said: bytes, server: RunningServer, nonce: str) -> bool:
    """Whether `said` shows that who said it knows the secret."""
    try:
        told = json.loads(said)["proof"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    return isinstance(told, str) and hmac.compare_digest(
        told.encode("utf-8", "replace"), proof(server.secret, nonce).encode()
    )


def _hello(server: RunningServer, nonce: str) -> bytes:
    """What is said at the address of `server`, by whoever it is: in bounded time and of bounded size.

    http.client bounds the time of each piece, and there may be any number of them. Raises OSError.
    """
    end = time.monotonic() + _PATIENCE
    said = bytearray()
    host = server.url.removeprefix("http://")
    with socket.create_connection((server.host, server.port), _PATIENCE) as connection:
        connection.sendall(
            f"GET {HELLO}?nonce={nonce} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
        )
        while len(said) < _LARGEST_LINE and (left := end - time.monotonic()) > 0:
            connection.settimeout(left)
            if not (piece := connection.recv(65_536)):
                break
            said += piece
    return bytes(said).partition(b"\r\n\r\n")[2]


class ServedEngine:
    """An Engine of another process, which stays when this one ends.

    What was computed of a generation that is left before its end is saved there, as at Ctrl-C here.
    """

    def __init__(self, server: RunningServer, n_ctx: int) -> None:
        self._server = server
        self._n_ctx = n_ctx

    def generate(self, request: Request) -> Iterator[Event]:
        """Stream the continuation of `request`; see Engine. Raises MachineError when the server is busy."""
        with terminable():
            yield from self._generate(request)

    def _generate(self, request: Request) -> Iterator[Event]:
        head = json.dumps({"n_ctx": self._n_ctx, "request": request_message(request)})
        connection = http.client.HTTPConnection(self._server.host, self._server.port, timeout=_PATIENCE)
        try:
            self._check(connection)
            connection.request(
                "POST",
                GENERATE,
                body=head.encode() + b"\n" + pack_ids(request.tokens),
                headers={
                    "Authorization": f"Bearer {self._server.secret}",
                    "Content-Type": "application/octet-stream",
                },
            )
            with connection.getresponse() as response:
                if response.status != 200:
                    raise self._refusal(response)
                while line := response.readline(_LARGEST_LINE):
                    if not line.strip():
                        continue
                    event = self._event(line)
                    yield event
                    if isinstance(event, Finished):
                        return
            raise self._gone("it ended in the middle of an answer")
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._gone(str(error) or type(error).__name__) from error
        finally:
            connection.close()

    def _check(self, connection: http.client.HTTPConnection) -> None:
        """Have who is at the other end of this very connection prove that it is the server."""
        nonce = secrets.token_hex(16)
        connection.request("GET", f"{HELLO}?nonce={nonce}")
        said = connection.getresponse().read(_LARGEST_LINE)
        # One that is closed behind it would be made anew, and not be this very connection.
        if connection.sock is None or not _is_proof(said, self._server, nonce):
            raise self._gone("another process is there now")
        connection.sock.settimeout(_SILENCE)

    def _event(self, line: bytes) -> Event:
        """What a line of an answer says. Raises the error that it tells of, EngineCrashError."""
        try:
            message = json.loads(line)
            if "error" in message:
                kind = getattr(errors, message["error"], None)
                if kind is None:  # one of the server's own: it is busy, or ending
                    raise self._gone(str(message["message"]))
                raise kind(message["message"], message["hint"])
            event = event_of(message)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._gone("what it said is not of this version of m3") from error
        if isinstance(event, Stopped):  # not by this command, which would not be here to hear of it
            raise self._gone("it was told to end")
        return event

    def _refusal(self, response: http.client.HTTPResponse) -> M3Error:
        try:
            said: Any = json.loads(response.read(_LARGEST_LINE))["error"]["message"]
        except (ValueError, KeyError, TypeError, RecursionError):
            said = f"it answered with status {response.status}"
        return MachineError(
            f"The m3 server at {self._server.url} did not take the request: {str(said).rstrip('.')}.",
            "Try again later, or run the model in this process with --no-server.",
        )

    def _gone(self, reason: str) -> EngineCrashError:
        return EngineCrashError(
            f"The m3 server at {self._server.url} cannot be used any more: {reason.rstrip('.')}.",
            "Run the command again; with --no-server it does without the server.",
        )

    def stop(self) -> None:
        """Nothing: whoever reads the generation ends it by leaving."""

    def close(self) -> None:
        """Nothing is held between two generations."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Nothing is held."""
