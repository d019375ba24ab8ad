"""A thousand requests to a server in this process, some of whose clients leave: nothing of them stays."""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import random
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import uvicorn

from m3cli.engine.fake import FakeEngine
from m3cli.model.catalog import resolve
from m3cli.serve.app import make_app
from m3cli.serve.metrics import Metrics
from m3cli.serve.model import ServedModel
from m3cli.serve.protocol import Connection
from m3cli.serve.scheduler import Job, Scheduler
from m3cli.serve.stream import Events, Service
from m3cli.tasks.context import ContextRequest
from tests.serve.servers import DEADLINE, poll

if TYPE_CHECKING:
    from collections.abc import Iterator

    from m3cli.engine.events import Event, Request

REQUESTS = 1000
SETTLED = 200  # after so many, all has been seen once
POOL = 4  # threads more than before that make prompts of requests which come at the same time
STRAY = 200  # objects more than before that are nobody's fault: caches of the interpreter's own
KINDS = ("whole", "stream", "leave", "leave at once", "wrong", "text", "events")


class ForgetfulEngine(FakeEngine):
    """One that does not keep what it was asked."""

    def generate(self, request: Request) -> Iterator[Event]:
        yield from super().generate(request)
        self.requests.clear()


class Inside:
    """A server of a model file, whose engine is a fake, in a thread of this process."""

    def __init__(self, model: str) -> None:
        context = ContextRequest(None, resolve(model, {}))
        engine = ForgetfulEngine("Yes, it is. " * 100)
        self.model = ServedModel(context, open_engine=lambda *_: engine, stdin=bytes, report=str)
        self.scheduler = Scheduler(self.model.engine_for, most_waiting=8)
        self.secret = "a-secret"
        app = make_app(Service(self.model, self.scheduler, Metrics(self.scheduler), self.secret))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        config = uvicorn.Config(app, http=Connection, ws="none", lifespan="off", log_config=None)
        self._server = uvicorn.Server(config)
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        poll(lambda: self._server.started)

    def _run(self) -> None:
        self.loop.run_until_complete(self._server.serve(sockets=[self._listener]))
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(DEADLINE)
        self.scheduler.close(DEADLINE)
        self.model.close()
        self._listener.close()


@pytest.fixture
def inside(tiny: str) -> Iterator[Inside]:
    inside = Inside(tiny)
    yield inside
    inside.close()


def ask(inside: Inside, kind: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", inside.port, timeout=DEADLINE)
    body: dict[str, Any] = {"model": "tiny.gguf", "max_tokens": 200 if "leave" in kind else 4}
    path = "/v1/completions" if kind in ("text", "events") else "/v1/chat/completions"
    if kind in ("text", "events"):
        body["prompt"] = "Is it?"
    else:
        body["messages"] = "none" if kind == "wrong" else [{"role": "user", "content": "Is it?"}]
    body["stream"] = kind in ("stream", "leave", "events")
    try:
        connection.request("POST", path, json.dumps(body))
        if kind == "leave at once":
            return
        response = connection.getresponse()
        assert response.status == (400 if kind == "wrong" else 200)
        if kind == "leave":
            response.readline()
        else:
            response.read()
    finally:
        connection.close()


def held(inside: Inside) -> dict[str, int]:
    """How much there is of what a request takes."""
    gc.collect()
    objects = gc.get_objects()
    files = Path("/proc/self/fd")
    return {
        "tasks": len(asyncio.all_tasks(inside.loop)),
        "jobs": sum(type(each) in (Job, Events) for each in objects),
        "files": len(list(files.iterdir())) if files.exists() else 0,
        "threads": threading.active_count(),
        "objects": len(objects),
    }


def test_nothing_of_a_request_stays(inside: Inside) -> None:
    """Tasks, jobs, files, threads and objects are what they were, whatever clients did."""

    def settled(wanted: dict[str, int]) -> bool:
        now = held(inside)
        return all(count <= wanted[name] for name, count in now.items())

    chance = random.Random(0)
    others = held(inside)["jobs"]  # of tests that ran in this process before
    for _ in range(SETTLED):
        ask(inside, chance.choice(KINDS))
    poll(lambda: inside.scheduler.waiting == inside.scheduler.running == 0)
    poll(lambda: len(asyncio.all_tasks(inside.loop)) == 1)  # the server's own
    before = held(inside)
    assert before["jobs"] == others
    for _ in range(REQUESTS - SETTLED):
        ask(inside, chance.choice(KINDS))
    most = {**before, "threads": before["threads"] + POOL, "objects": before["objects"] + STRAY}
    poll(lambda: settled(most))
    assert inside.scheduler.waiting == inside.scheduler.running == 0
