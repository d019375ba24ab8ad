"""llama-cpp-python's server with a real model: what another project's OpenAI API makes of m3's requests."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from m3cli.corpus.corpus import CorpusRequest
from m3cli.engine.endpoint import Endpoint, RemoteServer
from m3cli.engine.events import Finished, Loaded, Notice, Prefilled, Request, Token
from m3cli.engine.remote import RemoteEngine, RemoteTokenizer
from m3cli.errors import EngineCrashError, MachineError, UsageError
from m3cli.model.catalog import ModelRef
from m3cli.tasks.ask import Answer, AskRequest, ask
from m3cli.tasks.context import ContextRequest, Packed
from m3cli.tasks.remote import COUNTED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from m3cli.engine.events import Event
    from m3cli.tasks.ask import AskEvent

_NEEDED = ("fastapi", "pydantic_settings", "sse_starlette", "starlette_context", "uvicorn")
_MISSING = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(_MISSING), reason=f"llama_cpp.server needs {', '.join(_MISSING)}")

CTX = 1024
KEY = "key-5dd1f0a4c9be"
DEADLINE = 120.0  # seconds; only to fail rather than hang


@pytest.fixture(scope="module")
def url(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that runs the small model, and wants a key."""
    log = tmp_path_factory.mktemp("server") / "log"
    # One thread: llama.cpp's threads wait for each other by spinning, which is slow on a busy machine.
    options = {"model": smollm2, "model_alias": "smollm2", "n_ctx": CTX, "n_threads": 1, "n_threads_batch": 1}
    command = [f"--{name}={value}" for name, value in {**options, "port": 0, "api_key": KEY}.items()]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "llama_cpp.server", "--host=127.0.0.1", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            env={name: value for name, value in os.environ.items() if name not in ("HOST", "PORT")},
        )
    try:
        deadline = time.monotonic() + DEADLINE
        while not (found := re.search(r"running on (http://127\.0\.0\.1:\d+)", log.read_text("utf-8"))):
            assert process.poll() is None, log.read_text("utf-8")
            assert time.monotonic() < deadline, log.read_text("utf-8")
            time.sleep(0.05)
        yield f"{found[1]}/v1"
    finally:
        process.kill()
        process.wait()


def generated(url: str, text: str, max_tokens: int = 12) -> list[Event]:
    request = Request([0] * 9, max_tokens, messages=(("user", text),))
    with RemoteEngine(Endpoint(url, KEY), "smollm2", CTX, wait=lambda _: None) as engine:
        return list(engine.generate(request))


def asked(url: str, directory: Path, question: str, ctx: int = CTX) -> list[AskEvent]:
    endpoint = Endpoint(url, KEY)
    request = ContextRequest(
        CorpusRequest((str(directory),)),
        ModelRef("", Path(), "remote", url),
        endpoint=endpoint,
        ctx=ctx,
        max_tokens=8,
    )
    return list(ask(AskRequest(question, request), open_engine=_no_engine, stdin=lambda: b""))


def _no_engine(*_: object) -> RemoteEngine:
    raise AssertionError("no engine of this machine is wanted")


def test_what_it_says_of_itself(url: str) -> None:
    """It names its model, and neither the context nor a tokenizer at the usual address."""
    with RemoteServer(Endpoint(url, KEY)) as server:
        assert [model["id"] for model in server.models()] == ["smollm2"]
        assert server.llama_context() == 0
        assert RemoteTokenizer.offered_by(server, "smollm2") is None


def test_an_answer_streams(url: str) -> None:
    """The events come in their order, and without a usage each piece counts as a token."""
    heard = generated(url, "Say hello.")
    kinds = [type(event) for event in heard]
    assert kinds[:3] == [Loaded, Prefilled, Prefilled]
    assert set(kinds[3:-1]) == {Token}
    end = heard[-1]
    assert isinstance(end, Finished)
    assert "".join(event.text for event in heard if isinstance(event, Token)).strip()
    assert 0 < end.generated_tokens <= 12
    assert end.reason == ("length" if end.generated_tokens >= 11 else "stop")
    again = generated(url, "Say hello.")
    assert [event for event in again if isinstance(event, Token)] == [
        e for e in heard if isinstance(e, Token)
    ]


def test_a_question_about_files(url: str, tmp_path: Path) -> None:
    """Files that do not fit are selected from, by another tokenizer's count, and the prompt fits there."""
    for number in range(60):
        (tmp_path / f"m{number}.py").write_text(
            f"def function_{number}(value):\n    return value + {number}\n" * 4
        )
    heard = asked(url, tmp_path, "What does function_7 return?")
    answer = heard[-1]
    assert isinstance(answer, Answer)
    assert answer.text
    packed = next(event for event in heard if isinstance(event, Packed))
    assert packed.pack.strategy == "select"
    assert packed.prompt_tokens > CTX // 2
    host = Endpoint(url).host
    notes = [event.text for event in heard if isinstance(event, Notice)]
    assert COUNTED.format(host=host, name="the demo model") in notes
    with pytest.raises(UsageError, match="does not say how much context smollm2 has"):
        asked(url, tmp_path, "What does function_7 return?", ctx=0)


def test_a_prompt_that_is_too_long(url: str) -> None:
    """It ends a stream without a word where it fails, which is no answer."""
    with pytest.raises(EngineCrashError, match="ended without an answer") as failed:
        generated(url, "word " * 3000)
    assert url in failed.value.message
    assert "log" in failed.value.hint


def test_who_has_no_key(url: str) -> None:
    """It refuses whoever has another key, and m3 says so."""
    engine = RemoteEngine(Endpoint(url, "another"), "smollm2", CTX)
    with engine, pytest.raises(UsageError, match=r"\(status 401\): Invalid API key\."):
        list(engine.generate(Request([0], 4, messages=(("user", "Hi."),))))


def test_a_form_that_it_does_not_know(url: str) -> None:
    """It has no JSON schemas in OpenAI's form: the error is its own, with the address."""
    request = Request([0], 4, messages=(("user", "Hi."),), schema='{"type": "object"}')
    with RemoteEngine(Endpoint(url, KEY), "smollm2", CTX, wait=lambda _: None) as engine:
        with pytest.raises(MachineError, match="json_schema") as refused:
            list(engine.generate(request))
        assert url in refused.value.message
