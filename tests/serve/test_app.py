"""The HTTP API from end to end: a served model over an engine that says what the test wants to hear."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import socket
import threading
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import openai
import pytest
import uvicorn
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from m3cli import __version__
from m3cli.corpus.corpus import CorpusRequest
from m3cli.engine.events import (
    Finished,
    Loaded,
    Notice,
    NotSaved,
    Request,
    Restored,
    Sampling,
    Saved,
    Token,
    request_message,
)
from m3cli.engine.fake import FakeEngine
from m3cli.engine.running import RunningServer, proof, this_machine
from m3cli.engine.served import ServedEngine, is_alive
from m3cli.errors import DoesNotFitError, EngineCrashError, M3Error, MachineError, OutOfMemoryError
from m3cli.model.catalog import resolve
from m3cli.model.tokens import pack_ids
from m3cli.model.vocabulary import LETTERS
from m3cli.serve import stream
from m3cli.serve.app import make_app
from m3cli.serve.metrics import Metrics
from m3cli.serve.model import ServedModel
from m3cli.serve.scheduler import Job, Scheduler
from m3cli.serve.stream import Limits, Service
from m3cli.tasks.context import ContextRequest
from tests.gguf_files import NORMAL, write_vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from m3cli.engine.events import Event

DEADLINE = 20.0  # seconds; only to fail rather than hang
WINDOW = 4096  # tokens of the model's context
SECRET = "a-secret"
BEARER = {"Authorization": f"Bearer {SECRET}"}
TEMPLATE = (
    "{% if refused %}{{ raise_exception('refused') }}{% endif %}{{ shown }}"
    "{% for message in messages %}<{{ message.role }}>\n{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<ai>\n{% endif %}"
)
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file whose tokens are bytes, but for one, with a context of 4k."""
    path = tmp_path_factory.mktemp("model") / "bytes.gguf"
    fields = {"tokenizer.chat_template": TEMPLATE, "llama.context_length": WINDOW}
    tokens = [*LETTERS, "th"]  # llama.cpp wants a merge
    return write_vocabulary(path, "minimax-m2", tokens, [NORMAL] * len(tokens), ["t h"], **fields)


def text_of(tokens: Sequence[int]) -> str:
    return b"".join(b"th" if token == 256 else bytes([token]) for token in tokens).decode("utf-8", "replace")


def until(condition: Callable[[], object]) -> None:
    """Wait until `condition` holds; fails at the deadline."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.002)


class Engine(FakeEngine):
    """A FakeEngine that can be held before its tokens, and told to fail behind them.

    A stop lets it go on, to its end.
    """

    def __init__(self, script: str | Callable[[Request], str] = "Yes.") -> None:
        super().__init__(script, n_batch=16)
        self.let_go = threading.Event()
        self.let_go.set()
        self.held = threading.Event()
        self.stops = 0
        self.fails: Exception | None = None
        self.fails_at: type[Event] = Finished
        self.first: tuple[Event, ...] = ()
        self._behind = 0

    def hold(self, behind: int = 0) -> None:
        """Wait behind so many tokens until `let_go` is set."""
        self._behind = behind
        self.let_go.clear()
        self.held.clear()

    def generate(self, request: Request) -> Iterator[Event]:
        tokens = 0
        for event in super().generate(request):
            if self.fails is not None and isinstance(event, self.fails_at):
                raise self.fails
            if isinstance(event, Token):
                tokens += 1
                if tokens > self._behind and not self.let_go.is_set():
                    self.held.set()
                    assert self.let_go.wait(DEADLINE), "nobody let the engine go on"
            yield event
            if isinstance(event, Loaded):
                yield from self.first

    def stop(self) -> None:
        self.stops += 1
        super().stop()
        self.let_go.set()

    @property
    def prompts(self) -> list[str]:
        return [text_of(request.tokens) for request in self.requests]


@dataclass
class Served:
    """A server in this process; `client` talks to it without a network."""

    service: Service
    engine: Engine
    crashes: list[BaseException]
    reports: list[str]
    client: TestClient = field(init=False)

    def __post_init__(self) -> None:
        base = "http://127.0.0.1:8303"
        self.client = TestClient(make_app(self.service), base, raise_server_exceptions=False)

    @property
    def name(self) -> str:
        return self.service.model.name

    def chat(self, **fields: Any) -> Any:
        return self.client.post("/v1/chat/completions", json={"model": self.name, **HI, **fields})

    def complete(self, **fields: Any) -> Any:
        return self.client.post("/v1/completions", json={"model": self.name, "prompt": "Hi", **fields})

    def idle(self) -> None:
        scheduler = self.service.scheduler
        until(lambda: scheduler.running == scheduler.waiting == 0)

    def metrics(self) -> dict[str, float]:
        """Values by name, with their labels."""
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        return {
            " ".join([sample.name, *sample.labels.values()]): sample.value
            for family in families
            for sample in family.samples
        }


@contextmanager
def served(
    model: Path,
    engine: Engine | None = None,
    *,
    corpus: CorpusRequest | None = None,
    most_waiting: int = 8,
    **options: Any,
) -> Iterator[Served]:
    engine = engine or Engine()
    crashes: list[BaseException] = []
    reports: list[str] = []
    served_model = ServedModel(
        ContextRequest(corpus, resolve(str(model), {})),
        open_engine=lambda *_: engine,
        stdin=lambda: b"",
        report=reports.append,
    )
    scheduler = Scheduler(served_model.engine_for, most_waiting=most_waiting)
    options = {"report": reports.append, "crashed": crashes.append, **options}
    service = Service(served_model, scheduler, Metrics(scheduler), SECRET, **options)
    try:
        yield Served(service, engine, crashes, reports)
    finally:
        engine.let_go.set()
        scheduler.close(DEADLINE)
        served_model.close()


@contextmanager
def listening(server: Served) -> Iterator[int]:
    """The port at which a server can be reached over the loopback interface."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        make_app(server.service),
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=10,
    )
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until(lambda: running.started)
        yield listener.getsockname()[1]
    finally:
        server.engine.let_go.set()
        running.should_exit = True
        thread.join(DEADLINE)
        listener.close()


def sent(
    port: int, path: str, body: bytes, *, length: int | None = None, secret: bool = False
) -> socket.socket:
    """A connection on which a request was sent, with another length than it has if that is given."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {length or len(body)}\r\n"
    head += f"Authorization: Bearer {SECRET}\r\n" if secret else ""
    connection.sendall(head.encode() + b"\r\n" + body)
    return connection


def read_until(connection: socket.socket, text: bytes) -> bytes:
    """What is received, up to `text` at least."""
    received = b""
    while text not in received:
        piece = connection.recv(65536)
        assert piece, received
        received += piece
    return received


def error_in(response: Any) -> dict[str, Any]:
    """The error that a response describes, in OpenAI's form."""
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"].endswith((".", ")"))
    return dict(error)


def events_in(text: str) -> tuple[list[Any], list[str]]:
    """The values of a stream of server-sent events, which ends as OpenAI's does, and its comments."""
    assert text.endswith("data: [DONE]\n\n")
    blocks = text.split("\n\n")
    assert blocks[-1] == ""
    assert all("\n" not in block for block in blocks)
    values = [json.loads(block.removeprefix("data: ")) for block in blocks[:-2] if block[0] != ":"]
    return values, [block[1:].strip() for block in blocks if block.startswith(":")]


def said_in(chunks: list[Any], name: str = "content") -> str:
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    return "".join(delta.get(name) or "" for delta in deltas)


# Models, and what there is beside them.


def test_the_models_are_listed(model: Path) -> None:
    """A server has one model, by its name, and says how large its context is."""
    with served(model) as server:
        listed = server.client.get("/v1/models").json()
        assert listed["object"] == "list"
        (one,) = listed["data"]
        assert one == {
            "id": server.name,
            "object": "model",
            "created": int(server.service.started),
            "owned_by": "m3",
            "max_model_len": WINDOW,
        }
        assert server.client.get(f"/v1/models/{server.name}").json() == one


@pytest.mark.parametrize("name", ["gpt-4", "", "org/name", "%ff", "%2e%2e%2f", "corpus", "x" * 3000])
def test_an_unknown_model_is_not_found(model: Path, name: str) -> None:
    """The error names the models that there are."""
    with served(model) as server:
        response = server.client.get(f"/v1/models/{name}")
        assert response.status_code == 404
        error = error_in(response)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert server.name in error["message"]


@pytest.mark.parametrize("name", ["gpt-4", "", "corpus", "\ud800"])
def test_an_unknown_model_is_not_asked(model: Path, name: str) -> None:
    """A client that means another model than this is told, not answered by this one."""
    with served(model) as server:
        body = json.dumps({**HI, "model": name, "prompt": "Hi"})
        for path in ("/v1/chat/completions", "/v1/completions"):
            response = server.client.post(path, content=body)
            assert response.status_code == 404
            assert error_in(response)["code"] == "model_not_found"
        assert server.engine.requests == []


@pytest.mark.parametrize(
    ("method", "path", "status", "allowed"),
    [
        ("GET", "/", 404, None),
        ("GET", "/v1", 404, None),
        ("POST", "/v1/embeddings", 404, None),
        ("GET", "/v1/chat/completions/x", 404, None),
        ("GET", "/v1/chat/completions", 405, {"POST"}),
        ("PUT", "/v1/completions", 405, {"POST"}),
        ("GET", "/tokenize", 405, {"POST"}),
        ("POST", "/v1/models", 405, {"GET", "HEAD"}),
        ("DELETE", "/v1/models/bytes", 405, {"GET", "HEAD"}),
        ("POST", "/metrics", 405, {"GET", "HEAD"}),
    ],
)
def test_what_is_not_offered(
    model: Path, method: str, path: str, status: int, allowed: set[str] | None
) -> None:
    """Other addresses and methods have an error in the form of all others."""
    with served(model) as server:
        response = server.client.request(method, path)
        assert response.status_code == status
        assert error_in(response)["type"] == "invalid_request_error"
        if allowed is not None:
            assert set(response.headers["allow"].split(", ")) == allowed


def test_token_ids_of_a_text(model: Path) -> None:
    """Clients can count: special tokens in it are text, and so are halves of characters."""
    with served(model) as server:
        for key in ("content", "prompt"):
            said = server.client.post("/tokenize", json={key: "the é"}).json()
            assert said == {
                "tokens": [256, *" e é".replace(" e", "e").encode()],
                "count": 5,
                "max_model_len": WINDOW,
            }
        assert server.client.post("/tokenize", json={"content": ""}).json()["tokens"] == []
        lone = server.client.post("/tokenize", content=b'{"content": "a\\ud800"}').json()
        assert lone["tokens"] == list(b"a?")
        for body, param in (({}, "prompt"), ({"content": 1}, "content"), ({"prompt": [1]}, "prompt")):
            response = server.client.post("/tokenize", json=body)
            assert response.status_code == 400
            assert error_in(response)["param"] == param


def test_health(model: Path) -> None:
    """What runs and what waits, for whoever decides where to send the next request."""
    with served(model) as server:
        assert server.client.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}
        with held(server), held(server):
            assert server.client.get("/health").json() == {"status": "ok", "running": 1, "waiting": 1}
        server.service.scheduler.close(DEADLINE)
        response = server.client.get("/health")
        assert (response.status_code, response.json()) == (503, {"status": "failed"})


@contextmanager
def held(server: Served) -> Iterator[Job]:
    """A job in the queue: the first one is under way, and goes no further."""
    if not server.service.scheduler.running:
        server.engine.hold()
    job = Job(Request(array("i", b"held"), 5), 64, lambda _: None)
    server.service.scheduler.submit(job)
    assert server.engine.held.wait(DEADLINE)
    try:
        yield job
    finally:
        server.service.scheduler.cancel(job)


# Answers.


def test_a_chat(model: Path) -> None:
    """The conversation is put into the model's template, and the answer is what the engine says."""
    with served(model, Engine("Yes. 😀")) as server:
        messages = [
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}]},
        ]
        response = server.chat(messages=messages, temperature=0.5, seed=3, max_tokens=20)
        assert response.status_code == 200
        answer = ChatCompletion.model_validate(response.json(), strict=True)
        assert answer.model == server.name
        assert answer.choices[0].message.content == "Yes. 😀"
        assert answer.choices[0].finish_reason == "stop"
        (request,) = server.engine.requests
        assert text_of(request.tokens) == "<system>\nBe kind.\n<user>\nHi!\n<ai>\n"
        assert request.max_tokens == 20
        assert request.sampling == Sampling(temperature=0.5, seed=3)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(request.tokens)
        assert answer.usage.completion_tokens == len("Yes. 😀".encode())
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_chat(model: Path) -> None:
    """Role, pieces, reason: valid chunks that make the same answer; progress comes as comments."""
    with served(model, Engine("Yes. 😀")) as server:
        response = server.chat(stream=True)
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        chunks, comments = events_in(response.text)
        for chunk in chunks:
            ChatCompletionChunk.model_validate(chunk, strict=True)
        assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert said_in(chunks) == "Yes. 😀"
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
        assert reasons == [None] * (len(chunks) - 1) + ["stop"]
        assert all("usage" not in chunk for chunk in chunks)
        total = len(server.engine.requests[0].tokens)
        assert comments[0] == f"0 of {total} prompt tokens"
        assert comments[-1] == f"{total} of {total} prompt tokens"


def test_usage_comes_with_a_stream_for_who_asks(model: Path) -> None:
    """It is the last chunk, without a choice, and says what did not have to be computed."""
    engine = Engine("Yes.")
    engine.first = (Restored(7, 0.0, "memory"),)
    with served(model, engine) as server:
        for ask, kind in ((server.chat, ChatCompletionChunk), (server.complete, Completion)):
            chunks, _ = events_in(ask(stream=True, stream_options={"include_usage": True}).text)
            read = kind.model_validate(chunks[-1], strict=True)
            assert read.choices == []
            total = len(engine.requests[-1].tokens)
            assert chunks[-1]["usage"] == {
                "prompt_tokens": total,
                "completion_tokens": 4,
                "total_tokens": total + 4,
                "prompt_tokens_details": {"cached_tokens": 7},
            }
            without, _ = events_in(ask(stream=True, stream_options={"include_usage": False}).text)
            assert "usage" not in without[-1]


def test_the_server_has_defaults_of_sampling(model: Path) -> None:
    """What a client does not say is as the server was started, which the client may change."""
    sampling = Sampling(temperature=0.7, top_p=0.9, repeat_penalty=1.1)
    with served(model, sampling=sampling) as server:
        server.chat()
        server.complete(temperature=0)
        assert server.engine.requests[0].sampling == sampling
        assert server.engine.requests[1].sampling == Sampling(0.0, 0.9, repeat_penalty=1.1)


def test_an_answer_that_reaches_its_limit(model: Path) -> None:
    """A client sees that there would have been more."""
    with served(model, Engine("a long answer")) as server:
        for ask in (server.chat, server.complete):
            choice = ask(max_tokens=6).json()["choices"][0]
            assert choice["finish_reason"] == "length"
            assert (choice.get("message") or {"content": choice.get("text")})["content"] == "a long"
        chunks, _ = events_in(server.chat(max_tokens=6, stream=True).text)
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("\n", "one two three"),
        (["x", "\n"], "one two three"),
        (["wo", "\n"], "one t"),
        ("ee\nfo", "one two thr"),
        (["e\nfix", "\n"], "one two three"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop_text(model: Path, stop: object, expected: str, stream: bool) -> None:
    """The engine is stopped too: nobody would read the rest."""
    script = "one two three\nfour" + "." * 500
    with served(model, Engine(script)) as server:
        server.engine.hold(behind=len("one two three\nfour"))
        response = server.chat(stop=stop, stream=stream)
        if stream:
            chunks, _ = events_in(response.text)
            said, reason = said_in(chunks), chunks[-1]["choices"][0]["finish_reason"]
        else:
            choice = response.json()["choices"][0]
            said, reason = choice["message"]["content"], choice["finish_reason"]
        assert (said, reason) == (expected, "stop")
        server.idle()
        assert server.engine.stops >= 1
        # An answer that is complete was not left.
        assert server.metrics()["m3_cancelled_requests_total"] == 0
        assert [report for report in server.reports if "stop text" in report]


def test_reasoning_comes_apart(model: Path) -> None:
    """What a model thinks is not its answer, whole or streamed."""
    with served(model, Engine("<think>\nso\n</think>\n\nyes")) as server:
        message = server.chat().json()["choices"][0]["message"]
        assert message["content"] == "yes"
        assert message["reasoning_content"].strip() == "so"
        chunks, _ = events_in(server.chat(stream=True).text)
        assert said_in(chunks) == "yes"
        assert said_in(chunks, "reasoning_content").strip() == "so"
        assert server.complete().json()["choices"][0]["text"].startswith("<think>")


def test_a_completion(model: Path) -> None:
    """A text is continued as it is: no template, and no special tokens in it."""
    with served(model) as server:
        response = server.complete(prompt="the é <ai>")
        answer = Completion.model_validate(response.json(), strict=True)
        assert answer.choices[0].text == "Yes."
        assert answer.choices[0].finish_reason == "stop"
        assert server.engine.prompts == ["the é <ai>"]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(server.engine.requests[0].tokens)


@pytest.mark.parametrize("prompt", [[116, 104], [[116, 104]]])
def test_a_completion_of_token_ids(model: Path, prompt: object) -> None:
    """Ids reach the engine as they are, though a tokenizer would have merged them."""
    with served(model) as server:
        assert server.complete(prompt=prompt).json()["choices"][0]["text"] == "Yes."
        assert list(server.engine.requests[0].tokens) == [116, 104]


def test_a_streamed_completion(model: Path) -> None:
    """Pieces of text, then the reason."""
    with served(model, Engine("Yes. 😀")) as server:
        chunks, _ = events_in(server.complete(stream=True).text)
        assert {chunk["object"] for chunk in chunks} == {"text_completion"}
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Yes. 😀"
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "stop"]
        Completion.model_validate(chunks[-1], strict=True)


def test_openais_own_client(model: Path) -> None:
    """The official client lists the models, chats, streams, completes, and sees errors as what they are."""
    with (
        served(model, Engine("Yes. 😀")) as server,
        listening(server) as port,
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client,
    ):
        assert [each.id for each in client.models.list()] == [server.name]
        asked: Any = {"model": server.name, "messages": HI["messages"]}
        assert client.chat.completions.create(**asked).choices[0].message.content == "Yes. 😀"
        stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Yes. 😀"
        assert chunks[-1].usage is not None
        assert client.completions.create(model=server.name, prompt="Hi").choices[0].text == "Yes. 😀"
        pieces = client.completions.create(model=server.name, prompt="Hi", stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == "Yes. 😀"
        with pytest.raises(openai.NotFoundError, match="has no model"):
            client.models.retrieve("gpt-4")
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(**asked, temperature=1000)
        server.engine.fails = EngineCrashError("It died.")
        with pytest.raises(openai.InternalServerError, match="It died"):
            client.chat.completions.create(**asked)
        with pytest.raises(openai.APIError, match="It died"):
            list(client.chat.completions.create(**asked, stream=True))


def test_clients_at_once_have_answers_of_their_own(model: Path) -> None:
    """However they come, each is told what belongs to its question."""

    def answers(request: Request) -> str:
        return "answer " + re.findall(r"number \d+", text_of(request.tokens))[-1]

    with (
        served(model, Engine(answers), most_waiting=100) as server,
        listening(server) as port,
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client,
    ):

        def ask(number: int) -> str:
            messages: Any = [{"role": "user", "content": f"number {number}"}]
            if number % 2:
                return (
                    client.chat.completions.create(model=server.name, messages=messages)
                    .choices[0]
                    .message.content
                    or ""
                )
            stream = client.chat.completions.create(model=server.name, messages=messages, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

        with ThreadPoolExecutor(8) as pool:
            said = list(pool.map(ask, range(40)))
        assert said == [f"answer number {number}" for number in range(40)]


def test_a_form_reaches_the_engine(model: Path) -> None:
    """A JSON schema is the engine's to follow."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    with served(model) as server:
        form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        assert server.chat(response_format=form).status_code == 200
        assert json.loads(server.engine.requests[0].schema) == schema


def test_variables_reach_the_template(model: Path) -> None:
    """What a client sets is there when the prompt is made, whatever it is."""
    with served(model) as server:
        assert server.chat(chat_template_kwargs={"shown": "[1]"}).status_code == 200
        assert server.engine.prompts[-1].startswith("[1]<user>")
        body = {"model": server.name, **HI, "chat_template_kwargs": {"shown": "\ud800"}}
        response = server.client.post("/v1/chat/completions", content=json.dumps(body))
        assert response.status_code < 500
        assert server.crashes == []


def test_a_conversation_that_the_template_refuses_is_the_clients_error(model: Path, tmp_path: Path) -> None:
    """Nothing is wrong with the server, and asking again would not help."""
    (tmp_path / "a.txt").write_text("a line\n")
    with served(model, corpus=CorpusRequest((str(tmp_path),))) as server:
        for name in (server.name, "corpus"):
            response = server.chat(model=name, chat_template_kwargs={"refused": True})
            assert response.status_code == 400
            assert "refused" in error_in(response)["message"]


def test_files_that_are_served(model: Path, tmp_path: Path) -> None:
    """Under the name `corpus`, questions are about the files as they are when one is asked."""
    (tmp_path / "a.txt").write_text("first line\n")
    with served(model, corpus=CorpusRequest((str(tmp_path),))) as server:
        listed = [each["id"] for each in server.client.get("/v1/models").json()["data"]]
        assert listed == [server.name, "corpus"]
        assert server.chat(model="corpus").status_code == 200
        (tmp_path / "a.txt").write_text("second line\n")
        assert server.chat(model="corpus").status_code == 200
        server.chat()
        first, second, plain = server.engine.prompts
        assert "first line" in first
        assert "second line" in second
        assert "line" not in plain
        # Conversations about files take turns.
        said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
        assert server.chat(model="corpus", messages=said).status_code == 400
        assert server.chat(model="corpus", messages=said[1:] + said[:1]).status_code == 400
        assert server.chat(model="corpus", messages=[*said, said[0]]).status_code == 200
        # A text that is continued is about nothing but itself.
        response = server.complete(model="corpus")
        assert response.status_code == 400
        assert error_in(response)["param"] == "model"


# What cannot be answered.


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"model": NaN}', b"\xff", b"[" * 100_000, b'{"model": ' + b"9" * 10_000 + b"}"],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/m3/generate"])
def test_a_body_that_is_no_request_is_refused(model: Path, path: str, body: bytes) -> None:
    """What is no JSON, or none of a request, is the client's error."""
    with served(model) as server:
        response = server.client.post(path, content=body, headers=BEARER)
        assert response.status_code == 400
        assert error_in(response)["type"] == "invalid_request_error"
        assert server.crashes == []
        assert server.engine.requests == []


def test_a_body_that_is_too_large_is_refused(model: Path) -> None:
    """Nobody can fill the server's memory."""
    with served(model, limits=Limits(body_bytes=1000)) as server:
        for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/m3/generate"):
            response = server.client.post(path, content=b"x" * 1001, headers=BEARER)
            assert response.status_code == 413
            pieces = iter([b"x" * 600, b"x" * 600])
            assert server.client.post(path, content=pieces, headers=BEARER).status_code == 413
            assert "1,000 bytes" in error_in(response)["message"]


def test_a_body_may_be_as_large_as_the_context_needs(model: Path) -> None:
    """Unless told, a server of a small model takes no more than one could send it with reason."""
    with served(model) as server:
        assert server.client.post("/tokenize", content=b" " * 1_000_000).status_code == 400
        assert server.client.post("/tokenize", content=b" " * 1_000_001).status_code == 413


def test_a_body_that_does_not_come_is_not_waited_for(model: Path) -> None:
    """A connection that was opened and forgotten ends with an error."""
    with served(model, limits=Limits(body_seconds=0.05)) as server, listening(server) as port:
        with sent(port, "/v1/completions", b'{"model"', length=1000) as connection:
            assert b" 408 " in read_until(connection, b"seconds.")
        assert server.crashes == []


def test_a_client_that_leaves_in_the_middle_of_its_request_is_forgotten(model: Path) -> None:
    """That is no failure of the server."""
    with served(model) as server, listening(server) as port:
        for path in ("/v1/chat/completions", "/m3/generate"):
            sent(port, path, b'{"model"', length=1000, secret=True).close()
        # A request on another connection is answered behind the ends of those.
        with sent(
            port, "/v1/completions", json.dumps({"model": server.name, "prompt": "Hi"}).encode()
        ) as other:
            read_until(other, b"Yes.")
        until(lambda: server.metrics().get("m3_requests_total /v1/completions 200"))
    assert server.crashes == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_refused(model: Path, stream: bool) -> None:
    """Clients know the error of a context that is exceeded, and the numbers are told."""
    with served(model) as server:
        long = [{"role": "user", "content": "x" * WINDOW}]
        for response in (
            server.chat(messages=long, stream=stream),
            server.complete(prompt="x" * WINDOW, stream=stream),
            server.complete(prompt=[5] * (WINDOW + 1), stream=stream),
            server.chat(max_tokens=WINDOW, stream=stream),
            # So long that it is not made into tokens at all.
            server.chat(messages=[{"role": "user", "content": "x" * 200_000}], stream=stream),
            server.chat(messages=HI["messages"] * (WINDOW + 1), stream=stream),
            server.complete(prompt="x" * 200_000, stream=stream),
            server.complete(max_tokens=2**31 - 1, stream=stream),
        ):
            assert response.status_code == 400
            error = error_in(response)
            assert error["code"] == "context_length_exceeded"
            assert str(WINDOW) in error["message"]
        assert server.engine.requests == []
        assert server.complete(prompt="x" * (WINDOW - 1), stream=stream).status_code == 200
        assert server.engine.requests[0].max_tokens == 1


@pytest.mark.parametrize("prompt", ["", [], [[]]])
def test_an_empty_prompt_is_refused(model: Path, prompt: object) -> None:
    """There is nothing to go on from."""
    with served(model) as server:
        assert server.complete(prompt=prompt).status_code == 400
        assert server.engine.requests == []


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_that_the_model_does_not_have_are_refused(model: Path, stream: bool) -> None:
    """The client is told before it waits for its turn."""
    with served(model) as server:
        response = server.complete(prompt=[0, 257], stream=stream)
        assert response.status_code == 400
        assert error_in(response)["param"] == "prompt"
        assert server.engine.requests == []
        assert server.complete(prompt=[0, 256], stream=stream).status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/m3/generate"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_told(model: Path, path: str, stream: bool) -> None:
    """Who comes when too many wait is told at once, and when to come again."""
    with served(model, most_waiting=1) as server, held(server), held(server):
        if path == "/m3/generate":
            response = server.client.post(path, content=wire(Request([1], 5)), headers=BEARER)
        else:
            body = {"model": server.name, **HI, "prompt": "Hi", "stream": stream}
            response = server.client.post(path, json=body)
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) > 0
        assert error_in(response)["code"] == "queue_full"
        assert error_in(response)["type"] == "rate_limit_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_is_ending_takes_nothing(model: Path, stream: bool) -> None:
    """Clients are asked to come again."""
    with served(model) as server:
        server.service.scheduler.close(DEADLINE)
        response = server.chat(stream=stream)
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        assert error_in(response)["code"] == "shutting_down"


ERRORS = [
    (DoesNotFitError("No."), 400, "context_length_exceeded", "No."),
    (OutOfMemoryError("No."), 500, "impossible", "No."),
    (EngineCrashError("No.", "Ask again."), 500, "engine_failed", "No. Ask again."),
    (RuntimeError("/secret/path"), 500, None, "The server failed unexpectedly; its log says how."),
]


@pytest.mark.parametrize(("error", "status", "code", "message"), ERRORS)
@pytest.mark.parametrize("fails_at", [Loaded, Token, Finished])
def test_an_engine_that_fails(
    model: Path,
    error: Exception,
    status: int,
    code: str | None,
    message: str,
    fails_at: type[Event],
) -> None:
    """A whole answer becomes the error, whenever it comes; a defect is told to the user, once."""
    with served(model) as server:
        server.engine.fails, server.engine.fails_at = error, fails_at
        for ask in (server.chat, server.complete):
            server.crashes.clear()
            response = ask()
            assert response.status_code == status
            said = error_in(response)
            assert (said["code"], said["message"]) == (code, message)
            assert server.crashes == ([] if isinstance(error, M3Error) else [error])
            # OpenAI's client asks again after most errors, and would have this computed three times.
            assert response.headers.get("x-should-retry") == ("false" if status == 500 else None)
        server.engine.fails = None
        assert server.chat().status_code == 200
        assert server.metrics()["m3_failed_requests_total"] == 2


@pytest.mark.parametrize(("error", "status", "code", "message"), ERRORS)
def test_an_engine_that_fails_in_the_middle_of_a_stream(
    model: Path, error: Exception, status: int, code: str | None, message: str
) -> None:
    """What was said stays, the error comes as an event, and the stream ends as all do."""
    with served(model) as server:
        server.engine.fails = error
        for ask in (server.chat, server.complete):
            server.crashes.clear()
            response = ask(stream=True)
            assert response.status_code == 200
            chunks, _ = events_in(response.text)
            texts = [chunk["choices"][0] for chunk in chunks[:-1]]
            assert "".join(c.get("text") or c.get("delta", {}).get("content", "") for c in texts) == "Yes."
            assert all(choice["finish_reason"] is None for choice in texts)
            said = chunks[-1]["error"]
            assert (said["code"], said["message"]) == (code, message)
            assert server.crashes == ([] if isinstance(error, M3Error) else [error])


@pytest.mark.parametrize(("error", "status", "code", "message"), ERRORS)
def test_an_engine_that_cannot_be_opened(
    model: Path, error: Exception, status: int, code: str | None, message: str
) -> None:
    """Before the first event of a stream, an error still has its status."""
    with served(model) as server:

        def fails(_: Request) -> Iterator[Event]:
            raise error

        server.engine.generate = fails  # type: ignore[method-assign]
        for stream in (False, True):
            response = server.chat(stream=stream)
            assert response.status_code == status
            assert (error_in(response)["code"], error_in(response)["message"]) == (code, message)


def test_an_answer_that_takes_too_long_is_ended(model: Path) -> None:
    """Whole, it is an error of its own; in a stream the error comes as an event. The engine is stopped."""
    with served(model, limits=Limits(answer_seconds=0.2)) as server:
        for ask in (server.chat, server.complete):
            for stream in (False, True):
                stops = server.engine.stops
                server.engine.hold()
                response = ask(stream=stream)
                if stream:
                    assert response.status_code == 200
                    error = events_in(response.text)[0][-1]["error"]
                else:
                    assert response.status_code == 504
                    error = error_in(response)
                assert (error["code"], error["type"]) == ("timeout", "server_error")
                server.idle()
                assert server.engine.stops > stops
        assert server.crashes == []
        metrics = server.metrics()
        assert metrics["m3_failed_requests_total"] == 4
        assert metrics["m3_cancelled_requests_total"] == 0


def test_an_answer_that_has_to_wait_too_long_is_taken_out_of_the_queue(model: Path) -> None:
    """The engine never hears of it."""
    with served(model, limits=Limits(answer_seconds=0.05)) as server, held(server):
        for stream in (False, True):
            response = server.chat(stream=stream)
            assert response.status_code == 504 or "timeout" in response.text
            assert server.service.scheduler.waiting == 0
        assert len(server.engine.requests) == 1


# Clients that leave.


def body_for(path: str, name: str, *, stream: bool) -> bytes:
    if path == "/m3/generate":
        return wire(Request([1, 2], 50))
    return json.dumps({"model": name, **HI, "prompt": "Hi", "stream": stream}).encode()


LEAVING = [
    ("/v1/chat/completions", False),
    ("/v1/chat/completions", True),
    ("/v1/completions", False),
    ("/v1/completions", True),
    ("/m3/generate", True),
]


@pytest.mark.parametrize(("path", "stream"), LEAVING)
def test_a_client_that_leaves_stops_the_engine(model: Path, path: str, stream: bool) -> None:
    """Nothing is computed for nobody, and who comes next is answered."""
    with served(model, Engine("a long answer")) as server, listening(server) as port:
        server.engine.hold()
        with sent(port, path, body_for(path, server.name, stream=stream), secret=True) as connection:
            assert server.engine.held.wait(DEADLINE)
            if stream:
                read_until(connection, b"prompt tokens" if path != "/m3/generate" else b"Prefilled")
        until(lambda: server.engine.stops)
        server.idle()
        assert server.metrics()["m3_cancelled_requests_total"] == 1
        assert server.metrics()["m3_failed_requests_total"] == 0
        assert server.chat().json()["choices"][0]["message"]["content"] == "a long answer"
        assert server.crashes == []


@pytest.mark.parametrize(("path", "stream"), LEAVING)
def test_a_client_that_has_left_before_its_answer_begins(model: Path, path: str, stream: bool) -> None:
    """A request that nobody waits for any more by the time it was read does not stay in the queue."""
    with served(model, Engine("a long answer")) as server:
        server.engine.hold()
        messages = [{"type": "http.request", "body": body_for(path, server.name, stream=stream)}]
        gone = {"type": "http.disconnect"}

        async def receive() -> Any:
            return messages.pop() if messages else gone

        async def send(_: object) -> None:
            """Nobody is there."""

        headers = [(b"host", b"127.0.0.1"), (b"authorization", BEARER["Authorization"].encode())]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},  # as uvicorn says
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": headers,
        }
        asyncio.run(make_app(server.service)(scope, receive, send))  # type: ignore[arg-type]
        server.idle()
        assert server.crashes == []
        assert server.metrics()["m3_cancelled_requests_total"] == 1


@pytest.mark.parametrize(("path", "stream"), LEAVING)
def test_a_client_that_leaves_in_the_queue_is_forgotten(model: Path, path: str, stream: bool) -> None:
    """Its request is never answered, and the one that is answered meanwhile goes on."""
    with served(model, Engine("a long answer")) as server, listening(server) as port:
        with held(server):
            with sent(port, path, body_for(path, server.name, stream=stream), secret=True):
                until(lambda: server.service.scheduler.waiting == 1)
            until(lambda: server.service.scheduler.waiting == 0)
            assert server.engine.stops == 0
        server.idle()
        assert len(server.engine.requests) == 1
        assert server.metrics()["m3_cancelled_requests_total"] == 1
        assert server.crashes == []


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/m3/generate"])
def test_a_silent_connection_is_kept_open(model: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While nothing happens, something without meaning is sent, so that nobody on the way gives up."""
    monkeypatch.setattr(stream, "PING_SECONDS", 0.01)
    with served(model) as server, listening(server) as port, held(server):
        silence = b"\r\n: waiting\n\n\r\n" if path != "/m3/generate" else b"\r\n\n\r\n"
        with sent(port, path, body_for(path, server.name, stream=True), secret=True) as connection:
            received = read_until(connection, silence)
            received += read_until(connection, silence)
            server.engine.let_go.set()
            end = b"[DONE]" if path != "/m3/generate" else b"Finished"
            read_until(connection, end)
        assert b" 200 " in received


# The way of m3's own commands.


def wire(request: Request, n_ctx: int = 64) -> bytes:
    """A request as ServedEngine sends it."""
    head = json.dumps({"n_ctx": n_ctx, "request": request_message(request)})
    return head.encode() + b"\n" + pack_ids(request.tokens)


def announced(port: int, secret: str = SECRET) -> RunningServer:
    return RunningServer(
        version=__version__,
        pid=1,
        machine=this_machine(),
        host="127.0.0.1",
        port=port,
        secret=secret,
        model_path="m.gguf",
        model_state=[0, 0],
        n_ctx=WINDOW,
        run={},
        caches=False,
        started=0.0,
    )


def test_a_server_shows_that_it_knows_the_secret(model: Path) -> None:
    """Everybody may ask for the proof, of which each is good for one question only."""
    with served(model, api_key="key") as server:
        for nonce in ("", "a", "b", "é", "x" * 500):
            said = server.client.get("/m3/hello", params={"nonce": nonce}).json()
            assert said["proof"] == proof(SECRET, nonce[:100])
            assert SECRET not in json.dumps(said)
        assert server.client.get("/m3/hello").json()["proof"] == proof(SECRET, "")
        with listening(server) as port:
            assert is_alive(announced(port))
            assert not is_alive(announced(port, "another secret"))
    assert not is_alive(announced(port))


def test_only_the_secret_opens_the_engine(model: Path) -> None:
    """Neither without a key nor with that of the API can anybody hand token ids to the engine."""
    with served(model, api_key="key") as server:
        body = wire(Request([1], 5))
        for headers in (
            {},
            {"Authorization": "Bearer key"},
            {"Authorization": "Bearer "},
            {"Authorization": SECRET},
        ):
            response = server.client.post("/m3/generate", content=body, headers=headers)
            assert response.status_code == 401
            assert error_in(response)["type"] == "authentication_error"
        assert server.engine.requests == []
        assert server.client.post("/m3/generate", content=body, headers=BEARER).status_code == 200


def test_a_served_engine_is_as_the_engine_itself(model: Path) -> None:
    """Every event arrives as it was, and the request does too."""
    engine = Engine("Yes. 😀")
    engine.first = (
        Restored(2, 0.5, "disk"),
        Notice("A notice — with a dash."),
        NotSaved("It could not be saved."),
        Saved(3, 2**40, 1.5),
    )
    request = Request(
        array("i", [0, 255, 256, 7]),
        50,
        Sampling(0.7, 0.9, 40, 0.05, 2**32 - 2, 1.1),
        prefix=2,
        label="a label",
        exact=False,
        schema='{"type": "object"}',
        save=False,
    )
    with served(model, engine) as server, listening(server) as port:
        with ServedEngine(announced(port), 64) as lent:
            events = list(lent.generate(request))
        (asked,) = engine.requests
        assert list(asked.tokens) == list(request.tokens)
        assert request_message(asked) == json.loads(json.dumps(request_message(request)))
        assert events == list(engine.generate(request))
        assert isinstance(events[-1], Finished)


def test_a_served_engine_of_a_busy_server(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for its turn, whatever is sent meanwhile, or says that the queue is full."""
    monkeypatch.setattr(stream, "PING_SECONDS", 0.01)
    with served(model, most_waiting=1) as server, listening(server) as port:
        lent = ServedEngine(announced(port), 64)
        with ThreadPoolExecutor(1) as pool:
            with held(server):
                waiting = pool.submit(lambda: list(lent.generate(Request([1], 50))))
                until(lambda: server.service.scheduler.waiting == 1)
                with pytest.raises(MachineError, match="1 wait already"):
                    list(ServedEngine(announced(port), 64).generate(Request([1], 50)))
            assert isinstance(waiting.result(DEADLINE)[-1], Finished)


@pytest.mark.parametrize("error", [each[0] for each in ERRORS])
@pytest.mark.parametrize("fails_at", [Loaded, Finished])
def test_a_served_engine_fails_as_the_engine_itself(
    model: Path, error: Exception, fails_at: type[Event]
) -> None:
    """An error of m3's is raised as what it is; another is one of m3's that says where to look."""
    with served(model) as server, listening(server) as port:
        server.engine.fails, server.engine.fails_at = error, fails_at
        with pytest.raises(M3Error) as caught:
            list(ServedEngine(announced(port), 64).generate(Request([1], 50)))
        if isinstance(error, M3Error):
            assert type(caught.value) is type(error)
            assert (caught.value.message, caught.value.hint) == (error.message, error.hint)
            assert server.crashes == []
        else:
            assert caught.value.message == "The server failed unexpectedly; its log says how."
            assert server.crashes == [error]


def test_a_served_engine_that_takes_too_long(model: Path) -> None:
    """The limit of the server holds for m3's commands too, which say so; the engine is stopped."""
    with served(model, limits=Limits(answer_seconds=0.2)) as server, listening(server) as port:
        server.engine.hold()
        with pytest.raises(M3Error, match="took longer than this server allows"):
            list(ServedEngine(announced(port), 64).generate(Request([1], 50)))
        server.idle()
        assert server.engine.stops
        assert server.crashes == []


def test_leaving_a_served_engine_stops_the_engine(model: Path) -> None:
    """Who reads a generation no further has ended it."""
    with served(model, Engine("many words")) as server, listening(server) as port:
        server.engine.hold()
        events = ServedEngine(announced(port), 64).generate(Request([1], 50))
        assert next(iter(events)) is not None
        assert server.engine.held.wait(DEADLINE)
        events.close()  # type: ignore[attr-defined]
        until(lambda: server.engine.stops)
        server.idle()


def test_a_served_engine_of_a_server_that_ends(model: Path) -> None:
    """The command knows that this was not the end of the answer."""
    with served(model, Engine("many words")) as server, listening(server) as port:
        server.engine.hold()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(lambda: list(ServedEngine(announced(port), 64).generate(Request([1], 50))))
            assert server.engine.held.wait(DEADLINE)
            server.service.scheduler.close(DEADLINE)
            with pytest.raises(EngineCrashError, match="told to end"):
                running.result(DEADLINE)


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b"{}\n",
        b'{"request": null}\n',
        b'{"request": 1}\n',
        b'{"request": "x"}\n',
        b'{"request": []}\n',
        b'{"request": {}}\n',
        b'{"request": {"max_tokens": 5}}\n',
        b'{"request": {"max_tokens": 5, "sampling": null}}\n',
        b'{"request": {"max_tokens": 5, "sampling": {"unknown": 1}}}\n',
        b'{"request": {"max_tokens": 5, "sampling": {}, "unknown": 1}}\n',
        b'{"request": {"sampling": {}}}\n',
        b'{"request": {"max_tokens": 5, "sampling": {}, "tokens": []}}\n',
        b'{"n_ctx": "x", "request": {"max_tokens": 5, "sampling": {}}}\n',
        b'{"n_ctx": 0, "request": {"max_tokens": 5, "sampling": {}}}\n',
        b'{"n_ctx": 4097, "request": {"max_tokens": 5, "sampling": {}}}\n',
        b'{"request": {"max_tokens": 5, "sampling": {}}}\nabc',
    ],
)
def test_a_request_of_another_version_is_refused(model: Path, body: bytes) -> None:
    """A command that speaks otherwise is told, and nothing is computed."""
    with served(model) as server:
        response = server.client.post("/m3/generate", content=body, headers=BEARER)
        assert response.status_code == 400
        assert error_in(response)
        assert server.engine.requests == []
        assert server.crashes == []


# What the server tells of itself.


def test_metrics(model: Path) -> None:
    """Requests by address and status, tokens, and answers that came to no end."""
    engine = Engine("Yes.")
    engine.first = (Restored(7, 0.0, "memory"),)
    with served(model, engine) as server:
        before = server.metrics()
        assert before["m3_prompt_tokens_total"] == before["m3_generated_tokens_total"] == 0
        server.chat()
        server.chat(stream=True)
        server.complete()
        server.chat(model="gpt-4")
        server.chat(temperature="hot")
        server.client.get("/v1/models")
        server.client.get(f"/v1/models/{server.name}")
        server.client.get("/v1/models/gpt-4")
        server.client.get("/nowhere")
        server.client.get("/v1/chat/completions")
        server.client.get("/m3/generate")
        server.client.get("/health", headers={"Host": "example.com"})
        metrics = server.metrics()
        requests = {name: value for name, value in metrics.items() if name.startswith("m3_requests_total ")}
        assert requests == {
            "m3_requests_total /metrics 200": 1,
            "m3_requests_total /v1/chat/completions 200": 2,
            "m3_requests_total /v1/chat/completions 404": 1,
            "m3_requests_total /v1/chat/completions 400": 1,
            "m3_requests_total /v1/chat/completions 405": 1,
            "m3_requests_total /v1/completions 200": 1,
            "m3_requests_total /v1/models 200": 1,
            "m3_requests_total /v1/models/{name:path} 200": 1,
            "m3_requests_total /v1/models/{name:path} 404": 1,
            "m3_requests_total other 404": 1,
            "m3_requests_total other 401": 1,
            "m3_requests_total other 403": 1,
        }
        assert metrics["m3_prompt_tokens_total"] == sum(len(each.tokens) for each in engine.requests)
        assert metrics["m3_restored_tokens_total"] == 21
        assert metrics["m3_generated_tokens_total"] == 12
        assert metrics["m3_time_to_first_token_seconds_count"] == 3
        assert metrics["m3_failed_requests_total"] == metrics["m3_cancelled_requests_total"] == 0
        assert metrics["m3_running_requests"] == metrics["m3_waiting_requests"] == 0
        with held(server), held(server):
            during = server.metrics()
            assert (during["m3_running_requests"], during["m3_waiting_requests"]) == (1, 1)


def test_a_defect_is_counted_as_an_answer(model: Path) -> None:
    """Who watches the server sees its failures by their status."""
    with served(model) as server:
        server.engine.fails = RuntimeError("a defect")
        assert server.chat().status_code == 500
        assert server.metrics()["m3_requests_total /v1/chat/completions 500"] == 1


def test_a_defect_of_an_address_is_told_and_counted(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails before the engine is asked is the user's to know, and no client's."""
    with served(model) as server:
        defect = RuntimeError("/secret/path")

        def fails(*_: object) -> None:
            raise defect

        monkeypatch.setattr(server.service.model, "chat", fails)
        for stream in (False, True):
            response = server.chat(stream=stream)
            assert response.status_code == 500
            assert error_in(response)["message"] == "The server failed unexpectedly; its log says how."
        assert server.crashes == [defect] * 2
        assert server.metrics()["m3_requests_total /v1/chat/completions 500"] == 2


def test_every_answer_is_reported(model: Path) -> None:
    """The user who started the server sees what was asked of it, in numbers only."""
    with served(model) as server:
        server.chat()
        total = len(server.engine.requests[0].tokens)
        (report,) = [line for line in server.reports if "generated" in line]
        assert report.startswith(f"{total} prompt tokens, 0 of them not computed again, 4 generated")
        assert "Hi" not in report


def test_strangers_are_refused(model: Path) -> None:
    """Pages of other hosts and requests without the key get no further than the guard."""
    with served(model, api_key="key") as server:
        path = "/v1/chat/completions"
        body = {"model": server.name, **HI}
        for headers, status in (
            ({}, 401),
            ({"Authorization": "Bearer wrong"}, 401),
            ({"Authorization": "Bearer key", "Origin": "https://example.com"}, 403),
            ({"Authorization": "Bearer key", "Host": "example.com"}, 403),
            ({"Authorization": "Bearer key"}, 200),
            ({"Authorization": "Bearer key", "Origin": "http://localhost:3000"}, 200),
        ):
            response = server.client.post(path, json=body, headers=headers)
            assert response.status_code == status, headers
            page = "http://localhost:3000"
            allowed = page if headers.get("Origin") == page else None
            assert response.headers.get("access-control-allow-origin") == allowed
        assert len(server.engine.requests) == 2


def test_pages_of_this_machine_may_ask_before_they_ask(model: Path) -> None:
    """A browser asks first whether a page may send JSON and a key: those of this machine may, no others."""
    with served(model, api_key="key") as server:
        for origin, allowed in (
            ("http://localhost:3000", True),
            ("http://127.0.0.1", True),
            ("http://[::1]:1", True),
            ("https://example.com", False),
            ("http://localhost.example.com", False),
            ("http://example.com@localhost", False),
            ("null", False),
        ):
            response = server.client.options(
                "/v1/chat/completions",
                headers={
                    "Origin": origin,
                    "Access-Control-Request-Method": "POST",
                    "Access-Control-Request-Headers": "authorization, content-type",
                },
            )
            assert response.is_success == allowed
            said = response.headers.get("access-control-allow-origin")
            assert said == (origin if allowed else None)
            assert "access-control-allow-credentials" not in response.headers


def test_other_machines_are_shown_no_proof(model: Path) -> None:
    """m3's commands look for servers of their own machine; nobody else has a use for it."""
    with served(model, api_key="key", loopback=False) as server:
        response = server.client.get("/m3/hello", params={"nonce": "a"})
        assert response.status_code == 404
        assert "proof" not in response.text


def test_http_of_the_plainest_kind(model: Path) -> None:
    """A client without a library, one connection for several requests, and a HEAD without a body."""
    with served(model) as server, listening(server) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
        try:
            for method, path, status in (
                ("HEAD", "/health", 200),
                ("GET", "/v1/models", 200),
                ("GET", "/x", 404),
            ):
                connection.request(method, path)
                response = connection.getresponse()
                content = response.read()
                assert response.status == status
                assert (content == b"") == (method == "HEAD")
        finally:
            connection.close()
