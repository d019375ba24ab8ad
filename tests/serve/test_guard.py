"""Who may talk to the server, by the headers of a request, and how much they may send."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from m3cli.engine.running import LOOPBACK
from m3cli.serve.fields import RequestError
from m3cli.serve.guard import Guard, read_body

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from starlette.types import Message, Receive, Scope, Send

KEY, SECRET = "the-key", "the-secret"
HERE = [(b"host", b"127.0.0.1:8303")]


def passes(
    path: str,
    headers: Sequence[tuple[bytes, bytes]],
    *,
    api_key: str = "",
    loopback: bool = True,
    kind: str = "http",
) -> int:
    """The status of a request behind the guard: 200 if it is passed on."""
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Message:
        raise AssertionError("the guard reads no body")

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": kind, "method": "POST", "path": path, "headers": list(headers)}
    guard = Guard(app, api_key=api_key, secret=SECRET, loopback=loopback)
    asyncio.run(guard(scope, receive, send))
    start = sent[0]
    if start["status"] != 200:
        error = json.loads(sent[1]["body"])["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        names = {401: "authentication_error", 403: "invalid_request_error"}
        assert error["type"] == names[start["status"]]
        challenged = dict(start["headers"]).get(b"www-authenticate") == b"Bearer"
        assert challenged == (start["status"] == 401)
        assert SECRET not in error["message"]
        assert KEY not in error["message"]
    status: int = start["status"]
    return status


THIS_MACHINE = [
    b"localhost",
    b"localhost:8303",
    b"LocalHost:8303",
    b"127.0.0.1",
    b"127.0.0.1:8303",
    b"127.255.0.3:1",
    b"[::1]",
    b"[::1]:8303",
]
OTHER_HOSTS = [
    b"",
    b" ",
    b":8303",
    b"example.com",
    b"example.com:8303",
    b"localhost.example.com",
    b"localhost.example.com:8303",
    b"127.0.0.1.example.com",
    b"127.0.0.1.nip.io:8303",
    b"127.0.0.1x",
    b"x127.0.0.1",
    b"localhost:8303.example.com",
    b"notlocalhost",
    b"localhost@example.com",
    b"localhost:8303@example.com",
    b"example.com@localhost",
    b"example.com/@localhost",
    b"example.com\\@localhost",
    b"example.com#@localhost",
    b"example.com?localhost",
    b"localhost/example.com",
    b"localhost example.com",
    b"example.com localhost",
    b"localhost,example.com",
    b"local\thost",
    b"localhost\n",
    b"\x00localhost",
    b"localhost:x",
    b"::1",
    b"[::1",
    b"[::1]x",
    b"[::1].example.com",
    b"[::2]:8303",
    b"[::ffff:127.0.0.1]",
    b"[127.0.0.1]",
    b"0.0.0.0:8303",
    b"10.0.0.5:8303",
    b"128.0.0.1",
    b"127.1",
    b"2130706433",
    b"0x7f.0.0.1",
    b"\xff\xfe",
    b"%6cocalhost",
    b"localhost%00",
    b"127.0.0.\xb9",
    b"x" * 10_000,
]


@pytest.mark.parametrize("host", THIS_MACHINE)
def test_requests_to_this_machine_are_passed_on(host: bytes) -> None:
    """Every name of the loopback interface does, with a port or without."""
    assert passes("/v1/models", [(b"host", host)]) == 200


@pytest.mark.parametrize("host", OTHER_HOSTS)
def test_requests_to_another_name_are_refused(host: bytes) -> None:
    """A name that was made to point here is not this machine's, however much it looks like it."""
    for path in ("/v1/models", "/health", "/m3/hello"):
        assert passes(path, [(b"host", host)]) == 403
        assert passes(path, [(b"host", host), (b"authorization", f"Bearer {SECRET}".encode())]) == 403


def test_requests_without_a_name_are_refused() -> None:
    """HTTP/1.0 knows requests that do not say whom they mean."""
    assert passes("/v1/models", []) == 403


@pytest.mark.parametrize("host", THIS_MACHINE)
@pytest.mark.parametrize("scheme", [b"http", b"https", b"HTTP"])
def test_pages_of_this_machine_are_answered(host: bytes, scheme: bytes) -> None:
    """A page that is served at another port of this machine may ask."""
    assert passes("/v1/models", [*HERE, (b"origin", scheme + b"://" + host)]) == 200


@pytest.mark.parametrize("host", OTHER_HOSTS)
def test_pages_of_other_hosts_are_refused(host: bytes) -> None:
    """A page of the network in the user's browser must not reach the server."""
    for path in ("/v1/chat/completions", "/health", "/m3/hello"):
        assert passes(path, [*HERE, (b"origin", b"http://" + host)]) == 403


@pytest.mark.parametrize(
    "origin",
    [b"", b"null", b"localhost", b"//localhost", b"http:localhost", b"file://", b"http://", b"about:blank"],
)
def test_pages_of_nowhere_are_refused(origin: bytes) -> None:
    """Sandboxed pages, pages of the disk, and headers that no browser sends."""
    assert passes("/v1/models", [*HERE, (b"origin", origin)]) == 403


@given(st.binary(max_size=40), st.none() | st.binary(max_size=40))
def test_any_headers_are_understood_or_refused(host: bytes, origin: bytes | None) -> None:
    """Bytes that are no host are no failure of the server."""
    headers = [(b"host", host), *([(b"origin", origin)] if origin is not None else [])]
    known = host.lower() in {name.lower() for name in THIS_MACHINE}
    assert passes("/v1/models", headers) == 403 or known


@given(st.binary(max_size=40) | st.binary(max_size=40).map(lambda key: b"Bearer " + key))
def test_any_authorization_is_understood_or_refused(value: bytes) -> None:
    """Bytes that are no key are no failure of the server, and no key."""
    assert passes("/v1/models", [*HERE, (b"authorization", value)]) == 200
    assert passes("/v1/models", [*HERE, (b"authorization", value)], api_key=KEY) == 401
    assert passes("/m3/generate", [*HERE, (b"authorization", value)]) == 401


@pytest.mark.parametrize(
    ("authorization", "right"),
    [
        (None, False),
        ("", False),
        ("Bearer", False),
        ("Bearer ", False),
        (KEY, False),
        (f"Bearer {KEY}", True),
        (f"bearer {KEY}", True),
        (f"BEARER  {KEY} ", True),
        (f"Bearer {SECRET}", True),
        (f"Basic {KEY}", False),
        (f"Bearer{KEY}", False),
        (f"Bearer {KEY}x", False),
        (f"Bearer {KEY[:-1]}", False),
        (f"Bearer {KEY.upper()}", False),
        (f"Bearer {KEY} {KEY}", False),
        (f"Bearer {KEY}, Bearer {KEY}", False),
        (f'Bearer "{KEY}"', False),
    ],
)
@pytest.mark.parametrize("loopback", [True, False])
def test_where_there_is_a_key_it_has_to_be_shown(
    authorization: str | None, right: bool, loopback: bool
) -> None:
    """The key, or the secret of m3's own commands, opens what the API offers, and nothing else does."""
    shown = [(b"authorization", authorization.encode())] if authorization is not None else []
    for path in ("/v1/models", "/v1/chat/completions", "/tokenize", "/metrics", "/", "/nowhere", "/healthy"):
        assert passes(path, [*HERE, *shown], api_key=KEY, loopback=loopback) == (200 if right else 401), path
    for path in ("/health", "/m3/hello"):
        assert passes(path, [*HERE, *shown], api_key=KEY, loopback=loopback) == 200


@pytest.mark.parametrize("path", ["/m3/generate", "/m3/", "/m3/hello/", "/m3/hello/x", "/m3/anything"])
@pytest.mark.parametrize("api_key", ["", KEY])
def test_what_is_for_m3_needs_the_secret(path: str, api_key: str) -> None:
    """Not even the key opens what the user's own commands use."""
    assert passes(path, HERE, api_key=api_key) == 401
    assert passes(path, [*HERE, (b"authorization", b"Bearer")], api_key=api_key) == 401
    assert passes(path, [*HERE, (b"authorization", f"Bearer {KEY}".encode())], api_key=api_key) == 401
    assert passes(path, [*HERE, (b"authorization", f"Bearer {SECRET}".encode())], api_key=api_key) == 200


def test_without_a_key_this_machine_is_let_in_with_any() -> None:
    """Clients that insist on sending some key work with a server that has none."""
    for value in (b"Bearer anything", b"Basic dTpw", b""):
        assert passes("/v1/models", [*HERE, (b"authorization", value)]) == 200


def test_on_other_addresses_hosts_and_pages_do_not_matter() -> None:
    """There the key is what protects: names are the network's own."""
    shown = [(b"authorization", f"Bearer {KEY}".encode()), (b"origin", b"https://example.com")]
    for host in (b"example.com", b"10.0.0.5:8303", b""):
        assert passes("/v1/models", [(b"host", host), *shown], api_key=KEY, loopback=False) == 200
        assert passes("/v1/models", [(b"host", host)], api_key=KEY, loopback=False) == 401


@pytest.mark.parametrize("key", ["schlüssel", "ключ", "k\x7fy", "k\udcffy"])  # the last from a variable
def test_keys_may_have_any_characters(key: str) -> None:
    """A key is what its bytes are in UTF-8, which is how clients send what they are given."""
    shown = (b"authorization", b"Bearer " + key.encode("utf-8", "surrogateescape"))
    assert passes("/v1/models", [*HERE, shown], api_key=key) == 200
    assert passes("/v1/models", [*HERE, (b"authorization", b"Bearer schl?ssel")], api_key=key) == 401


def test_what_is_no_request_is_passed_on() -> None:
    """The application itself refuses other protocols."""
    assert passes("/v1/models", [], kind="websocket") == 200


def test_addresses_of_the_loopback_interface() -> None:
    """What a server may listen at without a key."""
    for host in ("localhost", "127.0.0.1", "127.9.9.9", "::1"):
        assert LOOPBACK.fullmatch(host), host
    for host in ("", "0.0.0.0", "::", "10.0.0.5", "example.com", "127.0.0.1.example.com", "127.0.0.1\n"):
        assert not LOOPBACK.fullmatch(host), host


def body_of(
    pieces: Sequence[bytes] | Callable[[], Awaitable[Message]],
    *,
    length: str | None = None,
    most: int = 10,
    seconds: float = 60,
) -> bytes:
    """What is read of a request that sends its body in pieces, or as a function says."""
    left = list(pieces) if not callable(pieces) else []

    async def receive() -> Message:
        if callable(pieces):
            return await pieces()
        piece = left.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(left)}

    headers = [(b"content-length", length.encode("latin-1"))] if length is not None else []
    request = Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive)
    return asyncio.run(read_body(request, most=most, seconds=seconds))


def refusal(*args: Any, **options: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        body_of(*args, **options)
    return caught.value


@pytest.mark.parametrize("pieces", [[b""], [b"0123456789"], [b"01234", b"", b"56789"], [b"0"] * 10])
def test_a_body_up_to_the_limit_is_read(pieces: list[bytes]) -> None:
    """With its length declared, and without."""
    whole = b"".join(pieces)
    assert body_of(pieces) == body_of(pieces, length=str(len(whole))) == whole


def test_a_body_that_is_declared_too_large_is_not_read() -> None:
    """Nothing of it is waited for."""

    async def receive() -> Message:
        raise AssertionError("read")

    for length in ("11", "1000000000000", "0" * 18 + "11"):
        error = refusal(receive, length=length)
        assert error.status == 413
        assert "10 bytes" in error.message


@pytest.mark.parametrize("length", [None, "5", "-1", "1e3", "x", "", "+3", "²", "0x1"])
def test_a_body_that_turns_out_too_large_is_left(length: str | None) -> None:
    """Whatever its length was said to be, it is read up to the limit and no further."""
    pieces = 0

    async def endless() -> Message:
        nonlocal pieces
        pieces += 1
        assert pieces < 10
        return {"type": "http.request", "body": b"abc", "more_body": True}

    assert refusal(endless, length=length).status == 413
    assert pieces == 4


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    """A client that sends nothing, and one that sends hardly anything, do not hold the server."""

    async def nothing() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def drops() -> Message:
        await asyncio.sleep(0)
        return {"type": "http.request", "body": b"", "more_body": True}

    for slow in (nothing, drops):
        error = refusal(slow, seconds=0.01)
        assert error.status == 408
        assert "0.01 seconds" in error.message
