"""A server that is sent anything: it answers what can be answered, refuses the rest, and lives."""

from __future__ import annotations

import http.client
import json
import random
import re
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults.drills import children, held
from tests.serve.servers import environ_of, poll, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.serve.servers import Server

BROKEN = 8000  # requests that are no HTTP, or end in the middle of it
GROWTH = 1.1  # of memory, from a quarter of them on
MALFORMED = 2000  # bodies that are JSON, or nearly, and no request
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "tiny.gguf",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 1,
        "temperature": 0.5,
        "top_p": 1,
        "seed": 1,
        "stop": ["x"],
        "stream": False,
        "stream_options": {"include_usage": True},
        "response_format": {"type": "text"},
        "chat_template_kwargs": {},
    },
    "/v1/completions": {"model": "tiny.gguf", "prompt": "Hi", "max_tokens": 1, "top_k": 1, "min_p": 0.1},
    "/tokenize": {"content": "Hi"},
}
OTHERS = ("/v1/models", "/v1/models/x", "/health", "/metrics", "/m3/hello", "/m3/generate", "/nothing", "/")
FINE = {200, 400, 401, 403, 404, 405, 413, 429}


@pytest.fixture(scope="module")
def server(place: Path, tiny: str) -> Iterator[Server]:
    """A server of the tiny model, whose answers are short unless others are asked for."""
    short = ("--ctx", "512", "--max-tokens", "2")
    with serving("--model", tiny, "--no-cache", *short, environ=environ_of(place / "hostile")) as server:
        yield server


def is_well(server: Server) -> None:
    """It answers as it should, with the model process that it had."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(VALID["/v1/chat/completions"]))
    response = connection.getresponse()
    answer = json.load(response)
    connection.close()
    assert response.status == 200, answer
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert not server.ended
    assert "Traceback" not in server.stderr
    assert "error:" not in server.stderr


def test_what_is_no_http(server: Server) -> None:
    """Random bytes, broken heads, wrong lengths and pipelines are answered or cut off."""
    is_well(server)
    (worker,) = children(server.process.pid)
    chance = random.Random(1)
    good = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 40\r\n\r\n"
        b'{"model": "tiny.gguf"}'
    )
    heads = (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n12345",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
        good,
    )
    sent, before = 0, (0, 0, 0)
    seen: set[int] = set()
    while sent < BROKEN:
        count = chance.randint(1, 5)  # behind the first that is broken, a connection is closed
        answers = b""
        with (
            socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection,
            suppress(OSError),
        ):
            # The server may have had enough before all is sent.
            for _ in range(count):
                head = bytearray(chance.choice(heads))
                kind = chance.randrange(4)
                if kind == 0:
                    head = bytearray(chance.randbytes(chance.randint(1, 200)))
                elif kind == 1:
                    for _ in range(chance.randint(1, 5)):
                        head[chance.randrange(len(head))] = chance.randrange(256)
                elif kind == 2:
                    del head[chance.randrange(len(head)) :]
                connection.sendall(head)
            if chance.random() < 0.5:
                connection.shutdown(socket.SHUT_WR)
                while piece := connection.recv(65_536):
                    answers += piece
        seen |= {int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answers)}
        assert seen <= FINE, answers
        sent += count
        if sent > BROKEN // 4 and not any(before):
            before = held(server.process.pid)
    assert {200, 400} <= seen
    is_well(server)
    assert children(server.process.pid) == {worker}
    memory, files, _ = before
    poll(lambda: held(server.process.pid)[1] <= files)  # closed connections are noticed a moment later
    assert held(server.process.pid)[0] <= memory * GROWTH


@settings(max_examples=MALFORMED, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(data=st.data())
def test_what_is_no_request(server: Server, data: st.DataObject) -> None:
    """Whatever stands in a body, the answer is one of those that are documented, as an object."""
    path = data.draw(st.sampled_from([*VALID, *VALID, *OTHERS]))
    body: object = data.draw(JSON)
    if path in VALID and data.draw(st.booleans()):
        body = dict(VALID[path])
        for key in data.draw(st.lists(st.sampled_from(sorted(VALID[path])), min_size=1, max_size=3)):
            if data.draw(st.booleans()):
                body.pop(key, None)
            else:
                body[key] = data.draw(JSON)
    text = json.dumps(body, ensure_ascii=data.draw(st.booleans())).encode("utf-8", "surrogatepass")
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        method = data.draw(st.sampled_from(["POST", "POST", "POST", "GET", "PUT", "DELETE"]))
        connection.request(method, path, text)
        response = connection.getresponse()
        said = response.read()
    finally:
        connection.close()
    assert response.status in FINE, (path, text, said)
    if response.status >= 400:
        assert json.loads(said)["error"]["message"]


def test_it_is_well_afterwards(server: Server) -> None:
    """After all of that, a client gets its answer, and nothing was told as a failure of the server's own."""
    is_well(server)
