"""Servers with OpenAI's API, as a stub replays their shapes: what they are sent, and what becomes of it."""

from __future__ import annotations

import json
import re
import shutil
import ssl
import subprocess
import sys
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3cli.engine import endpoint
from m3cli.engine.endpoint import Endpoint, RemoteServer
from m3cli.engine.events import Finished, Loaded, Notice, Prefilled, Request, Sampling, Token
from m3cli.engine.remote import EstimatingTokenizer, RemoteEngine, RemoteTokenizer
from m3cli.errors import (
    DoesNotFitError,
    EngineCrashError,
    ImpossibleError,
    M3Error,
    MachineError,
    ModelError,
    UsageError,
)
from tests.openai_stub import (
    HOST,
    MODELS,
    TOKENIZE,
    OpenAIStub,
    Reply,
    chunk,
    error,
    events,
    hosted,
    llama_server,
    sglang,
    vllm,
    whole,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from m3cli.engine.events import Event
    from tests.openai_stub import Kind

KINDS = [vllm(), vllm(reasoning_key="reasoning_content"), sglang(), llama_server(), hosted()]
IDS = ["vllm", "vllm-0.10", "sglang", "llama-server", "hosted"]
KEY = "key-5dd1f0a4c9be"
HTML = "<!DOCTYPE html><html><body>Sign in</body></html>"


def no_wait(_seconds: float) -> None:
    """In place of time.sleep."""


def request(**options: Any) -> Request:
    return Request(
        tokens=[0] * 50, max_tokens=20, messages=(("system", "Be short."), ("user", "Hi?")), **options
    )


def engine_of(stub: OpenAIStub, *, wait: Callable[[float], None] = no_wait, key: str = "") -> RemoteEngine:
    return RemoteEngine(Endpoint(stub.url, key), "some-model", 8192, wait=wait)


def generated(stub: OpenAIStub, asked: Request | None = None) -> list[Event]:
    with engine_of(stub) as engine:
        return list(engine.generate(asked or request()))


def text_of(heard: Sequence[Event]) -> str:
    return "".join(event.text for event in heard if isinstance(event, Token))


def finished(heard: Sequence[Event]) -> Finished:
    last = heard[-1]
    assert isinstance(last, Finished)
    return last


def said(reply: Reply, asked: Request | None = None) -> list[Event]:
    """What becomes of one reply."""
    with OpenAIStub(vllm()) as stub:
        stub.next(reply)
        return generated(stub, asked)


# Addresses


@pytest.mark.parametrize(
    ("written", "url", "host", "local", "open_"),
    [
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1", "127.0.0.1", True, False),
        ("http://localhost:8000", "http://localhost:8000/v1", "localhost", True, False),
        ("http://LOCALHOST:8000/", "http://LOCALHOST:8000/v1", "localhost", True, False),
        ("http://[::1]:8000/v1/", "http://[::1]:8000/v1", "::1", True, False),
        ("http://127.3.2.1/v1", "http://127.3.2.1/v1", "127.3.2.1", True, False),
        ("https://api.example.com/v1", "https://api.example.com/v1", "api.example.com", False, False),
        ("HTTPS://api.example.com", "https://api.example.com/v1", "api.example.com", False, False),
        ("https://example.com/api/v1//", "https://example.com/api/v1", "example.com", False, False),
        ("http://gpu-box:8000/v1", "http://gpu-box:8000/v1", "gpu-box", False, True),
        ("http://[2001:db8::1]:8000", "http://[2001:db8::1]:8000/v1", "2001:db8::1", False, True),
        ("http://localhost.example/v1", "http://localhost.example/v1", "localhost.example", False, True),
        ("http://127.0.0.1.example", "http://127.0.0.1.example/v1", "127.0.0.1.example", False, True),
        ("http://0.0.0.0:8000/v1", "http://0.0.0.0:8000/v1", "0.0.0.0", False, True),
        ("https://müller.example/v1", "https://müller.example/v1", "müller.example", False, False),
    ],
)  # fmt: skip
def test_addresses(written: str, url: str, host: str, local: bool, open_: bool) -> None:
    """An address may lack the path; only names of this machine are local, only http elsewhere is open."""
    endpoint = Endpoint.parse(written)
    assert (endpoint.url, endpoint.host, endpoint.is_local, endpoint.is_open) == (url, host, local, open_)
    assert Endpoint.parse(endpoint.url) == endpoint


@pytest.mark.parametrize(
    "written",
    [
        "",
        "localhost:8000",
        "gpu-box:8000/v1",
        "/v1",
        "file:///etc/passwd",
        "ftp://example.com/v1",
        "http://",
        "http:///v1",
        "http://:8000/v1",
        "http://example.com:0/v1",
        "http://example.com:99999/v1",
        "http://example.com:port/v1",
        "http://[::1/v1",
        "http://exa mple.com/v1",
        "http://example.com/a b",
        "http://example.com\\v1",
        "http://example.com\t/v1",
        "http://example.com/v1\n",
        " http://example.com/v1",
    ],
)
def test_what_is_no_address(written: str) -> None:
    """What is no http or https address is a usage error that says how to write one."""
    with pytest.raises(UsageError, match="no address of a server") as refused:
        Endpoint.parse(written)
    assert "http://HOST:PORT/v1" in refused.value.hint


@pytest.mark.parametrize(
    "written",
    [
        "http://somebody:hunter2@example.com/v1",
        "http://hunter2@example.com/v1",
        "http://somebody:hun@ter2@example.com/v1",
        "http://somebody:hunter2?@example.com/v1",
        "https://example.com/v1?key=hunter2",
        "https://example.com/v1?user=a@b&key=hunter2",
        "https://example.com/v1#hunter2",
        "somebody:hunter2@example.com",
    ],
)
def test_secrets_do_not_belong_into_an_address(written: str) -> None:
    """A user, a query or a fragment is refused, and nothing of it is shown, for it may be a password."""
    with pytest.raises(UsageError) as refused:
        Endpoint.parse(written)
    assert "ter2" not in str(refused.value)
    assert "hun" not in str(refused.value)
    assert "--api-key-env" in str(refused.value)


@given(
    st.one_of(st.text(), st.text().map("http://{}".format), st.text().map("https://example.com/{}".format))
)
def test_every_text_is_an_address_or_a_usage_error(written: str) -> None:
    """Whatever is given, nothing else comes of it, also where the HTTP library is more particular."""
    with suppress(UsageError), RemoteServer(Endpoint.parse(written)) as server:
        assert server._http.base_url == httpx2.URL("")
        assert httpx2.URL(server.endpoint.url).host


def test_a_key_is_not_shown() -> None:
    """An endpoint that is printed, as in a traceback, does not show its key."""
    assert KEY not in repr(Endpoint.parse("http://localhost/v1", api_key=KEY))


# Answers


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_an_answer_in_every_shape(kind: Kind) -> None:
    """The events come in their order, and the server's counts are those of the end."""
    with OpenAIStub(kind) as stub:
        stub.next(kind.answer("It retries three times.", usage={"prompt": 61, "generated": 9, "cached": 48}))
        heard = generated(stub)
    kinds = [type(event) for event in heard]
    assert kinds[:3] == [Loaded, Prefilled, Prefilled]
    assert set(kinds[3:-1]) == {Token}
    assert heard[0] == Loaded(0.0, 8192, "some-model at 127.0.0.1", "full")
    assert [(e.done, e.total) for e in heard if isinstance(e, Prefilled)] == [(0, 50), (50, 50)]
    assert text_of(heard) == "It retries three times."
    end = finished(heard)
    assert (end.reason, end.prompt_tokens, end.generated_tokens, end.restored_tokens) == ("stop", 61, 9, 48)
    assert end.prefill_seconds >= 0
    assert end.decode_seconds >= 0


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_reasoning_stands_between_tags(kind: Kind) -> None:
    """What a server sends as reasoning comes as a model writes it: in tags, before the answer."""
    with OpenAIStub(kind) as stub:
        stub.next(kind.answer("The answer.", "Let me think of it."))
        heard = generated(stub)
    assert text_of(heard) == "<think>Let me think of it.</think>The answer."


def test_a_newer_llama_server_counts_in_both_places() -> None:
    """Cached tokens stand in the timings of older versions, and in the usage of later ones as well."""
    kind = llama_server(details=True)
    end = finished(said(kind.answer("Yes.", usage={"prompt": 61, "generated": 2, "cached": 48})))
    assert end.restored_tokens == 48


def test_a_server_that_does_not_stream() -> None:
    """One JSON object in place of a stream is an answer too."""
    heard = said(whole("The answer.", "Hm."))
    assert text_of(heard) == "<think>Hm.</think>The answer."
    assert (finished(heard).reason, finished(heard).prompt_tokens, finished(heard).generated_tokens) == (
        "stop", 100, 7,
    )  # fmt: skip


def test_counts_of_a_server_that_does_not_count() -> None:
    """Without a usage, the prompt has m3's count, and each piece is taken for a token."""
    end = finished(said(events([chunk({"content": "a"}), chunk({"content": "b"}), chunk({}, "stop")])))
    assert (end.prompt_tokens, end.generated_tokens, end.restored_tokens) == (50, 2, 0)


@pytest.mark.parametrize("value", [None, "12", -1, 1.5, True, [], {}])
def test_counts_that_are_none(value: object) -> None:
    """A count that is no number is passed over."""
    usage = {
        "prompt_tokens": value,
        "completion_tokens": value,
        "prompt_tokens_details": {"cached_tokens": value},
    }
    heard = said(events([chunk({"content": "a"}), chunk({}, "stop", usage=usage), chunk({}, usage=value)]))
    end = finished(heard)
    assert (end.prompt_tokens, end.generated_tokens, end.restored_tokens) == (50, 1, 0)


def test_pieces_without_a_text() -> None:
    """Pieces without choices, with null for a delta, or with other things than texts add nothing."""
    odd: list[Any] = [
        chunk(None),
        chunk({}),
        chunk([]),
        chunk("text"),
        chunk({"content": None}),
        chunk({"content": 7, "reasoning": ["a"]}),
        {**chunk({}), "choices": []},
        {**chunk({}), "choices": None},
        {**chunk({}), "choices": [None]},
        {"id": "1"},
        {},
        chunk({"tool_calls": []}),
    ]
    assert text_of(said(events([*odd, chunk({"content": "a"}), *odd, chunk({}, "stop")]))) == "a"


def test_blank_text_around_the_reasoning() -> None:
    """Blank text before and within the reasoning does not end it."""
    pieces = [
        chunk({"content": "\n"}),
        chunk({"reasoning": "One. "}),
        chunk({"content": " \n"}),
        chunk({"reasoning": "Two."}),
        chunk({"content": "\n\nAnswer: 1"}),
        chunk({"content": " "}),
        chunk({"content": "2"}),
        chunk({}, "stop"),
    ]
    assert text_of(said(events(pieces))) == "<think>One. Two.</think>\n\nAnswer: 1 2"


def test_reasoning_behind_an_answer() -> None:
    """Reasoning that comes when the answer has begun is no part of it."""
    pieces = [
        chunk({"content": "One"}),
        chunk({"reasoning": "Hm."}),
        chunk({"content": " two"}),
        chunk({}, "stop"),
    ]
    assert text_of(said(events(pieces))) == "One two"


def test_one_piece_with_both() -> None:
    """A piece may hold the end of the reasoning and the beginning of the answer."""
    pieces = [chunk({"reasoning": "a"}), chunk({"reasoning": "b", "content": "c"}), chunk({}, "stop")]
    assert text_of(said(events(pieces))) == "<think>ab</think>c"
    both = chunk({"reasoning": "a", "reasoning_content": "a", "content": "c"})  # vLLM 0.11
    assert text_of(said(events([both, chunk({}, "stop")]))) == "<think>a</think>c"


def test_an_answer_in_a_form_has_no_reasoning() -> None:
    """With a schema, the text is JSON alone; who reasoned meanwhile has begun to answer all the same."""
    heard = said(vllm().answer('{"a": 1}', "Let me think."), request(schema='{"type": "object"}'))
    assert json.loads(text_of(heard)) == {"a": 1}
    assert [event.done for event in heard if isinstance(event, Prefilled)] == [0, 50]


@pytest.mark.parametrize(
    ("finish", "reason"),
    [("stop", "stop"), ("length", "length"), ("eos_token", "stop"), ("tool_calls", "stop")],
)
def test_how_an_answer_ends(finish: str, reason: str) -> None:
    """Only `length` says that the cap has cut the answer."""
    assert finished(said(vllm().answer("Yes.", finish=finish))).reason == reason


def test_a_content_filter_is_told() -> None:
    """An answer that the server has cut for its content says so."""
    heard = said(vllm().answer("Yes, but", finish="content_filter"))
    assert [event.text for event in heard if isinstance(event, Notice)] == [
        "127.0.0.1 has cut the answer by its content filter."
    ]
    assert finished(heard).reason == "stop"


def test_an_empty_answer() -> None:
    """A server that says nothing and ends in order has answered."""
    heard = said(events([chunk({"role": "assistant", "content": ""}), chunk({}, "stop")]))
    assert [type(event) for event in heard] == [Loaded, Prefilled, Finished]
    assert finished(heard).generated_tokens == 0


# The stream

STREAM = vllm().answer("Grüße, 世界: a\u2028b\x85c\x0bd\x1ee\u2029 \\n", "Ich überlege …")
HEARD = "<think>Ich überlege …</think>Grüße, 世界: a\u2028b\x85c\x0bd\x1ee\u2029 \\n"


@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n", "\r\r", "\n"])
def test_ends_of_lines(end: str) -> None:
    """Lines end as server-sent events have them, and not at what ends a line in a text."""
    kind = vllm()
    values = kind.stream("Grüße, 世界: a\u2028b\x85c\x0bd\x1ee\u2029 \\n", "Ich überlege …", "stop", None)
    assert text_of(said(events(values, end=end))) == HEARD


@given(st.lists(st.integers(0, len(b"".join(STREAM.pieces))), max_size=30))
def test_wherever_the_stream_is_cut_into_packets(places: list[int]) -> None:
    """The answer does not depend on where one packet ends and the next begins."""
    data = b"".join(STREAM.pieces)
    edges = [0, *sorted(places), len(data)]
    pieces = [data[a:b] for a, b in pairwise(edges)]
    server = RemoteServer(Endpoint("http://localhost/v1"))
    response = httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=iter(pieces))
    assert list(server._chunks(response)) == _values(data)


def _values(data: bytes) -> list[Any]:
    lines = data.decode().split("\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]


def test_what_else_a_stream_holds() -> None:
    """Comments, other fields and a missing blank behind the colon are as the standard has them."""
    value = json.dumps(chunk({"content": "Yes."}))
    lines = [": ping", "", "event: message", "id: 7", "retry: 100", f"data:{value}", "data:", "data", ":"]
    assert text_of(said(events([*lines, chunk({}, "stop")]))) == "Yes."


def test_a_stream_without_its_last_line() -> None:
    """A server that closes the connection when it is done need not say so."""
    assert text_of(said(events([chunk({"content": "Yes."}), chunk({}, "stop")], done=False))) == "Yes."
    assert text_of(said(events([chunk({"content": "Yes."}, "stop")], done=False, end=""))) == "Yes."


def test_what_follows_the_end_of_a_stream() -> None:
    """Nothing behind `[DONE]` is read."""
    reply = events(
        [chunk({"content": "a"}), chunk({}, "stop"), "data: [DONE]", chunk({"content": "b"}), "data: {"]
    )
    assert text_of(said(reply)) == "a"


def test_halves_of_characters() -> None:
    """What JSON can spell and UTF-8 cannot does not get in, nor out."""
    reply = Reply((b'data: {"choices": [{"delta": {"content": "a\\ud83db"}, "finish_reason": "stop"}]}\n\n',),
                  type="text/event-stream")  # fmt: skip
    assert text_of(said(reply)) == "a?b"
    with OpenAIStub(vllm()) as stub, engine_of(stub) as engine:
        list(engine.generate(Request([0], 5, messages=(("user", "a\udcffb"),))))
        assert stub.prompts() == [[{"role": "user", "content": "a?b"}]]
        assert engine._server.tokenize("m", "a\udcffb") == [0]


# What is sent


def body_of(asked: Request) -> dict[str, Any]:
    with OpenAIStub(vllm()) as stub:
        generated(stub, asked)
        body: dict[str, Any] = stub.asked()[0].body
        return body


def test_the_request() -> None:
    """A greedy one has model, messages, cap and a stream with its usage, and nothing that was not given."""
    sampling = Sampling(temperature=0.0, top_p=0.9, top_k=40, min_p=0.1, seed=7)
    assert body_of(request(sampling=sampling)) == {
        "model": "some-model",
        "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi?"}],
        "max_tokens": 20,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_the_sampling() -> None:
    """With a temperature, also what else decides about the next token."""
    bare = body_of(request())
    warm = body_of(request(sampling=Sampling(temperature=0.7, top_p=0.9, seed=7)))
    assert warm == {**bare, "temperature": 0.7, "top_p": 0.9, "seed": 7}
    assert body_of(request(sampling=Sampling(temperature=0.7, min_p=0.1)))["min_p"] == 0.1
    penalty = body_of(request(sampling=Sampling(repeat_penalty=1.2)))
    assert penalty == {**bare, "repetition_penalty": 1.2, "repeat_penalty": 1.2}


def test_a_schema_and_variables() -> None:
    """A schema goes as OpenAI has it, variables of the chat template as vLLM, SGLang and llama-server do."""
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}}
    body = body_of(request(schema=json.dumps(schema), variables={"enable_thinking": False}))
    assert body["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "strict": True, "schema": schema},
    }
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert not {"response_format", "chat_template_kwargs"} & body_of(request()).keys()


def test_at_least_one_token_is_asked_for() -> None:
    """A cap of nothing, which servers refuse, is one token."""
    assert body_of(Request([0], 0, messages=(("user", "Hi?"),)))["max_tokens"] == 1


def test_the_key_is_sent_and_only_that() -> None:
    """A key goes as a bearer token to every address; without one, nothing does, whatever ~/.netrc holds."""
    with OpenAIStub(vllm()) as stub:
        for key in (KEY, ""):
            with RemoteServer(Endpoint(stub.url, key)) as server:
                server.models()
                server.tokenize("m", "text")
                list(server.stream({"messages": []}))
        headers = [sent.headers.get("authorization") for sent in stub.sent]
        assert headers == [f"Bearer {KEY}"] * 3 + [None] * 3
        assert {sent.headers["user-agent"] for sent in stub.sent} == {"m3"}


# Attempts


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_may_be_over_is_tried_again(status: int) -> None:
    """A server that is busy or starting is asked again, later each time, and the user is told."""
    waits: list[float] = []
    with OpenAIStub(vllm()) as stub:
        stub.next(*[error(status, {"error": {"message": "Loading model"}})] * 3)
        with engine_of(stub, wait=waits.append) as engine:
            heard = list(engine.generate(request()))
        assert len(stub.asked()) == 4
    notices = [event.text for event in heard if isinstance(event, Notice)]
    assert len(notices) == 3
    pattern = rf"127\.0\.0\.1: it answered with status {status}; trying again in \d s"
    assert all(re.fullmatch(pattern, notice) for notice in notices)
    assert all(low <= wait <= high for wait, low, high in zip(waits, (0.5, 1, 2), (1, 2, 4), strict=True))
    assert text_of(heard) == stub.text


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [("7", 7, 7), ("0", 0, 0), ("2.5", 2.5, 2.5), ("86400", 60, 60), ("-3", 0.5, 1),
     ("Wed, 21 Oct 2026 07:28:00 GMT", 0.5, 1), ("soon", 0.5, 1)],
)  # fmt: skip
def test_a_server_says_when(asked: str, least: float, most: float) -> None:
    """Seconds of Retry-After are kept to, up to a minute; another form is passed over."""
    waits: list[float] = []
    with OpenAIStub(vllm()) as stub:
        stub.next(error(429, {"error": "busy"}, Retry_After=asked))
        with engine_of(stub, wait=waits.append) as engine:
            list(engine.generate(request()))
    assert len(waits) == 1
    assert least <= waits[0] <= most


def test_the_pauses_are_not_the_same_for_all() -> None:
    """Clients that were refused at the same time do not come back at the same time."""
    waits: list[float] = []
    with OpenAIStub(vllm()) as stub:
        for _ in range(5):
            stub.next(error(503, {}))
            with engine_of(stub, wait=waits.append) as engine:
                list(engine.generate(request()))
    assert len(set(waits)) == 5


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 405, 413, 422, 451, 501])
def test_what_stays_wrong_is_not_tried_again(status: int) -> None:
    """An answer that would be the same the next time is an error at once."""
    with OpenAIStub(vllm()) as stub:
        stub.next(error(status, {"error": {"message": "No."}}))
        with pytest.raises(M3Error):
            generated(stub)
        assert len(stub.asked()) == 1


def test_an_answer_that_has_begun_is_not_asked_for_again() -> None:
    """A connection that breaks within an answer ends the run, and what was said stays."""
    with OpenAIStub(vllm()) as stub:
        stub.next(events([chunk({"content": "It retries"})], done=False, cut=True))
        heard: list[Event] = []
        with engine_of(stub) as engine, pytest.raises(EngineCrashError) as crashed:
            heard.extend(engine.generate(request()))  # what came before the error stays
        assert len(stub.asked()) == 1
    assert crashed.value.exit_code == 70
    assert "The connection to 127.0.0.1 broke within an answer" in crashed.value.message
    assert text_of(heard) == "It retries"


def test_a_connection_that_ends_before_the_answer() -> None:
    """A server that closes a connection without a word is asked again."""
    with OpenAIStub(vllm()) as stub:
        stub.next(Reply(status=0), Reply(status=0))
        heard = generated(stub)
        assert len(stub.asked()) == 3
    assert text_of(heard) == stub.text


def test_a_server_that_is_not_there() -> None:
    """Five attempts, and then a sentence with the address."""
    waits: list[float] = []
    with OpenAIStub(vllm(), listening=False) as stub:
        with engine_of(stub, wait=waits.append) as engine, pytest.raises(MachineError) as absent:
            list(engine.generate(request()))
        url = stub.url
    assert len(waits) == 4
    assert sorted(waits) == waits or all(wait <= 8 for wait in waits)
    assert f"The server at {url} cannot be reached: " in absent.value.message
    assert absent.value.exit_code == 3
    assert "Check that it runs" in absent.value.hint


def test_a_server_that_starts_meanwhile() -> None:
    """A connection that was refused is tried again, for the answer as for the list of models."""
    for ask in (generated_by, models_of):
        waits: list[float] = []
        with OpenAIStub(vllm(), listening=False) as stub:

            def wait(seconds: float, stub: OpenAIStub = stub, waits: list[float] = waits) -> None:
                waits.append(seconds)
                if len(waits) == 2:
                    stub.listen()

            ask(stub, wait)
            assert len(waits) == 2
            assert len(stub.sent) == 1


def generated_by(stub: OpenAIStub, wait: Callable[[float], None]) -> None:
    with engine_of(stub, wait=wait) as engine:
        heard = list(engine.generate(request()))
    assert sum(isinstance(event, Notice) for event in heard) == 2
    assert text_of(heard) == stub.text


def models_of(stub: OpenAIStub, wait: Callable[[float], None]) -> None:
    with RemoteServer(Endpoint(stub.url), wait=wait) as server:
        assert [model["id"] for model in server.models()] == ["some-model"]


def test_silence_is_not_tried_again() -> None:
    """A server that says nothing for so long may be reading the prompt: it is not asked twice."""
    with OpenAIStub(vllm()) as stub:
        endpoint = Endpoint(stub.url, patience=0.05)
        stub.reply = lambda sent: (stub.left.wait(30), error(503, {}))[1]  # type: ignore[method-assign]
        with (
            RemoteServer(endpoint, wait=no_wait) as server,
            pytest.raises(MachineError, match="cannot be reached"),
        ):
            list(server.stream({"messages": []}))
        stub.left.set()
        assert len(stub.asked()) == 1


def test_leaving_an_answer_ends_the_connection() -> None:
    """Who stops reading has the server stop: nothing is computed for nobody."""
    with OpenAIStub(vllm()) as stub:
        pieces = events([chunk({"content": "word "})], done=False).pieces
        stub.next(Reply(pieces, type="text/event-stream", endless=True))
        with engine_of(stub) as engine:
            stream = engine.generate(request())
            while not isinstance(next(stream), Token):
                pass
            stream.close()  # type: ignore[attr-defined]
            assert stub.left.wait(30)


# Errors

BODIES = [
    lambda words: {
        "object": "error",
        "message": words,
        "type": "BadRequestError",
        "param": None,
        "code": 400,
    },
    lambda words: {"error": {"message": words, "type": "invalid_request_error", "param": None, "code": None}},
    lambda words: {"error": words},
    lambda words: {"error": {"object": "error", "message": words}},
    lambda words: {"detail": words},
    lambda words: {"detail": [{"type": "missing", "loc": ["body", "x"], "msg": words}]},
    lambda words: {"message": words},
]
OVERFLOWS = [
    "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens.",
    "request (9412 tokens) exceeds the available context size (8192 tokens), try increasing it",
    "The input (5000 tokens) is longer than the model's context length (4096 tokens).",
    "Requested token count exceeds the model's maximum context length of 4096 tokens.",
    "prompt is too long: 5000 tokens > 4096 maximum",
    "This model's maximum prompt length is 131072 but the request contains 537812 tokens.",
    "Please reduce the length of the messages or completion.",
    "invalid params, context window exceeds limit",
]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(
    ("status", "kind", "code", "words"),
    [
        (400, ImpossibleError, 3, "does not take the request (status 400)"),
        (422, ImpossibleError, 3, "does not take the request (status 422)"),
        (401, UsageError, 2, "does not let m3 in (status 401)"),
        (403, UsageError, 2, "does not let m3 in (status 403)"),
        (404, ModelError, 3, "has no such model or address (status 404)"),
        (413, DoesNotFitError, 3, "takes no prompt of this size (status 413)"),
        (429, MachineError, 3, "is asked too much (status 429)"),
        (500, MachineError, 3, "failed (status 500)"),
        (503, MachineError, 3, "failed (status 503)"),
    ],
)
def test_what_a_status_means(
    status: int, kind: type[M3Error], code: int, words: str, body: Callable[[str], object]
) -> None:
    """Each status is a sentence with the address and what the server said, in any form, and an exit code."""
    with OpenAIStub(vllm()) as stub:
        stub.next(*[error(status, body("Something is wrong."))] * 5)
        with pytest.raises(kind) as failed:
            generated(stub)
        assert failed.type is kind
        assert failed.value.message == f"The server at {stub.url} {words}: Something is wrong."
    assert failed.value.exit_code == code
    assert failed.value.hint.endswith(".")


@pytest.mark.parametrize("words", OVERFLOWS)
@pytest.mark.parametrize("body", BODIES[:3])
def test_a_prompt_that_is_too_long(words: str, body: Callable[[str], object]) -> None:
    """Whoever says it, and however: the prompt does not fit, and --ctx or fewer files help."""
    with OpenAIStub(vllm()) as stub:
        stub.next(error(400, body(words)))
        with pytest.raises(DoesNotFitError) as failed:
            generated(stub)
    assert "takes no prompt of this size" in failed.value.message
    assert words.rstrip(".") in failed.value.message
    assert "--ctx" in failed.value.hint


@pytest.mark.parametrize(
    "words", ["Your quota is exceeded.", "temperature exceeds 2", "The name of the schema is too long."]
)
def test_another_limit_is_not_that_of_the_context(words: str) -> None:
    """A request that is refused for another limit does not ask for fewer files."""
    with OpenAIStub(vllm()) as stub:
        stub.next(error(400, {"error": {"message": words}}))
        with pytest.raises(ImpossibleError, match="does not take the request"):
            generated(stub)


@pytest.mark.parametrize(
    "body",
    ["", "<html>Bad gateway</html>", {}, [], None, {"error": None}, {"error": {"message": 7}}, "[" * 10**5],
)
def test_an_error_without_words(body: object) -> None:
    """An error whose body says nothing is a whole sentence too, and shows no page."""
    with OpenAIStub(vllm()) as stub:
        stub.next(*[error(502, body)] * 5)
        with pytest.raises(MachineError) as failed:
            generated(stub)
        assert failed.value.message == f"The server at {stub.url} failed (status 502)."


def test_long_words_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what a server says of an error, a few lines are shown, and no endless body is read."""
    with OpenAIStub(vllm()) as stub:
        stub.next(error(400, {"error": "no " * 10_000}))
        with pytest.raises(ImpossibleError) as failed:
            generated(stub)
        assert len(failed.value.message) < 1000
        monkeypatch.setattr(endpoint, "_LARGEST_ERROR", 5_000)
        stub.next(Reply((b" " * 1000,), status=400, endless=True))
        with pytest.raises(ImpossibleError):
            generated(stub)
        assert stub.left.wait(30)


def test_an_error_in_the_middle_of_a_stream() -> None:
    """An error that can only come in the stream is one, with the server's words."""
    for value in (
        {"error": {"message": "CUDA error", "type": "InternalServerError", "code": 500}},
        {"error": {"object": "error", "message": "CUDA error"}},
        {"error": "CUDA error"},
        {"object": "error", "message": "CUDA error", "code": 500},
    ):
        with pytest.raises(MachineError, match=r"failed \(status 500\): CUDA error\."):
            said(events([chunk({"content": "It"}), value, chunk({}, "stop")]))


def test_an_error_in_place_of_an_answer() -> None:
    """An object with an error is one, though the status is that of success."""
    reply = Reply((json.dumps({"error": {"message": "No provider", "code": 502}}).encode(),))
    with pytest.raises(MachineError, match=r"failed \(status 502\): No provider\."):
        said(reply)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({"error": {"message": OVERFLOWS[0]}}, DoesNotFitError),
        ({"error": {"message": OVERFLOWS[1], "code": 400}}, DoesNotFitError),
        ({"error": {"message": "Rate limit exceeded", "code": 429}}, MachineError),
        ({"error": {"message": "Bad grammar", "code": 400}}, ImpossibleError),
        ({"error": {"message": "Bad grammar", "code": "invalid"}}, MachineError),
        ({"error": {"message": "Bad grammar", "code": 7}}, MachineError),
    ],
)
def test_what_an_error_in_a_stream_means(value: object, kind: type[M3Error]) -> None:
    """The code that stands in the error counts as the status, if it is one."""
    with pytest.raises(kind) as failed:
        said(events([value]))
    assert failed.type is kind


@pytest.mark.parametrize("finish", [None, "abort", "error"])
def test_an_answer_without_an_end(finish: str | None) -> None:
    """A stream that ends in order, but before the answer does, is no answer."""
    for delta, how in (({"content": "It retries"}, "its answer in the middle"), ({}, "without an answer")):
        with pytest.raises(EngineCrashError, match=rf"The server at http://127.* ended {how}\."):
            said(events([chunk(delta), chunk({}, finish)], done=False))


def test_a_connection_that_breaks_behind_the_end() -> None:
    """When the answer is complete, a broken connection is no error, though the counts are missing."""
    heard = said(events([chunk({"content": "Yes."}), chunk({}, "stop")], done=False, cut=True))
    assert text_of(heard) == "Yes."
    assert finished(heard).reason == "stop"


@pytest.mark.parametrize(
    "reply",
    [
        Reply((HTML.encode(),), type="text/html"),
        Reply((b"",), type="text/plain"),
        Reply((b"not JSON",)),
        Reply((b"[1, 2]",)),
        Reply((b"[" * 100_000,)),
        Reply((b"\xff\xfe\x00",)),
        events(["data: not JSON"]),
        events(["data: [1, 2]"]),
        events(["data: " + "[" * 100_000]),
    ],
)
def test_an_answer_that_is_none(reply: Reply) -> None:
    """A page, or anything else in place of the answer, says that the address is wrong."""
    with pytest.raises(ModelError, match="does not speak OpenAI's API") as odd:
        said(reply)
    assert "/v1" in odd.value.hint


def test_an_answer_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece or an object that never ends is given up before memory is."""
    monkeypatch.setattr(endpoint, "_LARGEST_ANSWER", 100_000)
    for kind in ("text/event-stream", "application/json"):
        with OpenAIStub(vllm()) as stub:
            stub.next(Reply((b"data: " + b" " * 10_000,), type=kind, endless=True))
            with pytest.raises(ModelError, match="larger than 100,000 bytes"):
                generated(stub)
            assert stub.left.wait(30)


def test_an_answer_that_is_not_packed_as_it_says() -> None:
    """Bytes that are no gzip, although the header says so, are a broken connection, not a defect of m3."""
    reply = Reply((b"data: {}",), type="text/event-stream", headers={"Content-Encoding": "gzip"})
    with pytest.raises(EngineCrashError, match="broke within an answer"):
        said(reply)
    with OpenAIStub(vllm()) as stub:
        stub.next(*[Reply((b"{}",), headers={"Content-Encoding": "gzip"})] * 5, path=MODELS)
        with server_of(stub) as server, pytest.raises(MachineError, match="cannot be reached"):
            server.models()


def test_a_redirection_is_not_followed() -> None:
    """Neither the prompt nor the key goes anywhere but to the address that was named."""
    with OpenAIStub(vllm()) as elsewhere, OpenAIStub(vllm()) as stub:
        target = f"{elsewhere.url}/chat/completions"
        for status in (301, 302, 307, 308):
            stub.next(error(status, {}, Location=target))
            with engine_of(stub, key=KEY) as engine, pytest.raises(UsageError) as refused:
                list(engine.generate(request()))
            assert refused.value.message == f"The server at {stub.url} is elsewhere (status {status})."
        assert elsewhere.sent == []


def test_a_key_that_a_server_repeats() -> None:
    """What a server says of an error is shown without the key, also in the traceback."""
    with OpenAIStub(vllm()) as stub:
        stub.next(error(401, {"error": {"message": f"Incorrect API key provided: {KEY}. See the docs."}}))
        stub.next(events([{"error": {"message": f"The key {KEY} has run out."}}]))
        for _ in range(2):
            with engine_of(stub, key=KEY) as engine, pytest.raises(M3Error) as refused:
                list(engine.generate(request()))
            assert KEY not in str(refused.getrepr(style="long", showlocals=False))
            assert "…" in refused.value.message
    assert "--api-key-env" in RemoteServer(Endpoint("http://h/v1"))._refused(401, "").hint


def test_who_is_not_let_in_is_told_of_the_key() -> None:
    """Without a key the hint is to name one, with one to check it."""
    for key, words in (("", "Name the variable"), (KEY, "Check the key")):
        with OpenAIStub(vllm()) as stub:
            stub.next(error(401, {}), path=MODELS)
            with RemoteServer(Endpoint(stub.url, key)) as server, pytest.raises(UsageError) as refused:
                server.models()
            assert words in refused.value.hint


def test_no_tls_where_it_is_asked_for() -> None:
    """A server that speaks http, asked by https, cannot be reached."""
    with (
        OpenAIStub(vllm()) as stub,
        RemoteServer(Endpoint(stub.url.replace("http:", "https:")), wait=no_wait) as server,
        pytest.raises(MachineError, match=r"https://127\.0\.0\.1:\d+/v1 cannot be reached: .*SSL"),
    ):
        server.models()


@contextmanager
def self_signed(directory: Path) -> Iterator[ssl.SSLContext]:
    """A TLS server's context with a certificate that nobody trusts."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    key, certificate = directory / "key.pem", directory / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    yield context


def test_a_certificate_that_is_not_trusted(tmp_path: Path) -> None:
    """A stranger's certificate is an error at once: nothing is sent, and waiting does not help."""
    waits: list[float] = []
    with self_signed(tmp_path) as context, OpenAIStub(vllm(), tls=context) as stub:
        for ask in (
            lambda server: server.models(),
            lambda server: list(server.stream({"messages": []})),
        ):
            with (
                RemoteServer(Endpoint(stub.url, KEY), wait=waits.append) as server,
                pytest.raises(MachineError, match=r"certificate of https://127\.0\.0\.1:\d+/v1 is not") as no,
            ):
                ask(server)
            assert "SSL_CERT_FILE" in no.value.hint
        assert stub.sent == []
    assert waits == []


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation without the HTTP library says which extra has it."""
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(MachineError, match="httpx2, which is not installed") as missing:
        RemoteServer(Endpoint("http://localhost/v1")).models()
    assert "pip install 'm3cli[remote]'" in missing.value.hint


# Models and tokenizers


def server_of(stub: OpenAIStub) -> RemoteServer:
    return RemoteServer(Endpoint(stub.url), wait=no_wait)


@pytest.mark.parametrize(
    "value", [{}, {"data": None}, {"data": []}, {"data": [{}]}, {"data": ["a"]}, {"data": [{"id": 7}]}]
)
def test_a_server_without_models(value: object) -> None:
    """A list of models that names none says that this is another kind of server."""
    with OpenAIStub(vllm()) as stub:
        stub.next(Reply((json.dumps(value).encode(),)), path=MODELS)
        with server_of(stub) as server, pytest.raises(ModelError, match="it lists no models"):
            server.models()


def test_a_page_in_place_of_models() -> None:
    """The address of a page, as that of a router or of a chat, is no endpoint."""
    with OpenAIStub(vllm()) as stub:
        stub.next(Reply((HTML.encode(),), type="text/html"), path=MODELS)
        with server_of(stub) as server, pytest.raises(ModelError, match="its answer is not JSON") as odd:
            server.models()
        assert stub.url in odd.value.message


def test_the_context_of_a_llama_server() -> None:
    """It stands in /props beside the API; a server without that has none to tell."""
    for kind, window in ((llama_server(window=5000), 5000), (vllm(), 0), (hosted(), 0)):
        with OpenAIStub(kind) as stub, server_of(stub) as server:
            assert server.llama_context() == window


@pytest.mark.parametrize("kind", [vllm(), sglang(), llama_server()], ids=["vllm", "sglang", "llama-server"])
def test_the_tokenizer_of_a_server(kind: Kind) -> None:
    """Texts are counted there, some at a time, and come back in their order."""
    with OpenAIStub(kind) as stub, server_of(stub) as server:
        tokenizer = RemoteTokenizer.offered_by(server, "some-model")
        assert tokenizer is not None
        texts = [f"{number} " + "x" * number for number in range(40)]
        assert tokenizer.count_batch(texts) == [-(-len(text) // 4) for text in texts]
        assert tokenizer.encode_template("abcde") == tokenizer.encode("abcde") == [0, 1]
        assert tokenizer.encode("") == []
        assert "127.0.0.1" in tokenizer.name
        assert {sent.body["model"] for sent in stub.asked(TOKENIZE)} == {"some-model"}
        assert {sent.body["add_special_tokens"] for sent in stub.asked(TOKENIZE)} == {False}
        assert {sent.body["add_special"] for sent in stub.asked(TOKENIZE)} == {False}


@pytest.mark.parametrize(
    "reply",
    [
        error(404, {"detail": "Not Found"}),
        error(500, {}),
        error(307, {}, Location="/"),
        Reply((HTML.encode(),), type="text/html"),
        Reply((b"{}",)),
        Reply((b'{"tokens": []}',)),
        Reply((b'{"tokens": ["a", "b"]}',)),
        Reply((b'{"tokens": [1, true]}',)),
        Reply((b'{"tokens": 2}',)),
    ],
)
def test_a_server_without_a_tokenizer(reply: Reply) -> None:
    """What gives no token ids is no tokenizer, and is asked only once."""
    with OpenAIStub(vllm()) as stub, server_of(stub) as server:
        stub.next(reply, path=TOKENIZE)
        assert RemoteTokenizer.offered_by(server, "some-model") is None
        assert len(stub.sent) == 1


def test_a_tokenizer_that_is_busy() -> None:
    """Once it is known, a tokenizer is asked again as everything else is."""
    with OpenAIStub(vllm()) as stub, server_of(stub) as server:
        tokenizer = RemoteTokenizer.offered_by(server, "some-model")
        assert tokenizer is not None
        stub.next(error(503, {}), error(429, {}), path=TOKENIZE)
        assert tokenizer.encode("abcde") == [0, 1]
        stub.next(*[error(503, {"error": "full"})] * 5, path=TOKENIZE)
        with pytest.raises(MachineError, match="full"):
            tokenizer.encode("abcde")


@given(st.text())
def test_the_estimate(text: str) -> None:
    """Where nothing counts, three bytes are taken for a token: none for no text, never less than one else."""
    tokenizer = EstimatingTokenizer()
    size = len(text.encode())
    assert len(tokenizer.encode(text)) == -(-size // 3)
    assert tokenizer.count_batch([text, text]) == [len(tokenizer.encode_template(text))] * 2


def test_a_proxy_is_for_other_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment names as a proxy is used, but not for this machine's servers."""
    with OpenAIStub(vllm()) as proxy, OpenAIStub(vllm()) as stub:
        for name, value in proxy.proxy.items():
            monkeypatch.setenv(name, value)
        with server_of(stub) as server, RemoteServer(Endpoint(f"http://{HOST}/v1")) as other:
            server.models()
            assert proxy.sent == []
            other.models()
        assert [(sent.host, sent.path) for sent in proxy.sent] == [(HOST, MODELS)]
        assert [sent.path for sent in stub.sent] == [MODELS]
