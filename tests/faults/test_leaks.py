"""A server after many requests: what it holds is what it held before."""

from __future__ import annotations

import http.client
import json
import random
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.drills import children, held
from tests.serve.servers import environ_of, poll, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.serve.servers import Server

REQUESTS = 1000
SETTLED = 200  # after so many, all has been seen once
GROWTH = 1.05
MODEL = "tiny.gguf"


@pytest.fixture(scope="module")
def server(place: Path, tiny: str) -> Iterator[Server]:
    """A server of the tiny model, which keeps nothing on the disk."""
    with serving("--model", tiny, "--no-cache", environ=environ_of(place / "leaks")) as server:
        yield server


def one(server: Server, number: int, kind: str) -> None:
    """A request of a kind; `leave` goes away in the middle of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": f"Request {number}."}],
        "max_tokens": 2,
        "stream": kind in ("stream", "leave"),
    }
    if kind == "long":
        body["messages"][0]["content"] *= 10 + number % 7
    if kind == "leave":
        body["max_tokens"] = 200
    if kind == "wrong":
        body["messages"] = "none"
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        response = connection.getresponse()
        if kind == "leave":
            response.readline()
        else:
            response.read()
            assert response.status == (400 if kind == "wrong" else 200)
    finally:
        connection.close()


def test_a_thousand_requests(server: Server) -> None:
    """Memory stays within 5 % of what it was, and no file or thread is left, of the server and its model."""
    chance = random.Random(1)
    one(server, 0, "whole")  # behind the loading of the model
    (worker,) = children(server.process.pid)
    before: dict[int, tuple[int, int, int]] = {}
    for number in range(1, REQUESTS + 1):
        one(server, number, chance.choice(["whole", "stream", "long", "leave", "wrong"]))
        if number == SETTLED:
            before = {pid: held(pid) for pid in (server.process.pid, worker)}
    assert children(server.process.pid) == {worker}
    for pid, (memory, files, threads) in before.items():
        poll(
            lambda pid=pid, files=files: held(pid)[1] <= files
        )  # closed connections are noticed a moment later
        assert held(pid)[0] <= memory * GROWTH
        assert held(pid)[2] <= threads + 1  # the pool that makes prompts may have grown
