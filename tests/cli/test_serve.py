"""`m3 serve` with a real model: other programs, m3's own commands, and how it begins and ends."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socketserver
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import jsonschema
import openai
import pytest

from m3cli.cli import values
from m3cli.engine.running import RunningServer, announce, running_servers
from m3cli.errors import ExitCode
from m3cli.tasks.context import Context
from tests.git_repositories import make_repository, write
from tests.serve.servers import DEADLINE, M3, Server, environ_of, poll, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.cli.conftest import Run

CODE = "".join(f"def function_{i}(value):\n    return value + {i}\n\n\n" for i in range(6))
SECRET_WORD = "The secret word is banana.\n"
LONG = "".join(f"line {i} of a long text\n" for i in range(56))  # more tokens than a batch of prefill has
SERVED = "note: the m3 server at {} answers"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all that these tests have in common is kept."""
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def environ(home: Path) -> dict[str, str]:
    """In place of a test's own: commands share the cache of the server, and so find it."""
    return environ_of(home)


@pytest.fixture(scope="module")
def corpus(home: Path) -> Path:
    """Files that are served."""
    directory = home / "corpus"
    directory.mkdir()
    (directory / "code.py").write_text(CODE)
    (directory / "word.txt").write_text(SECRET_WORD)
    return directory


@pytest.fixture(scope="module")
def server(environ: dict[str, str], corpus: Path) -> Iterator[Server]:
    """One for most tests, after which it has to have nothing to complain about."""
    with serving(str(corpus), environ=environ) as server:
        yield server
        assert server.stop() == 0
        assert "error" not in server.stderr
        assert "Traceback" not in server.stderr


@contextmanager
def client_of(server: Server, api_key: str = "none") -> Iterator[openai.OpenAI]:
    """The official client, which tries nothing twice and knows no proxy."""
    with (
        openai.DefaultHttpxClient(trust_env=False, timeout=DEADLINE) as transport,
        openai.OpenAI(base_url=server.url, api_key=api_key, max_retries=0, http_client=transport) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


def asked(question: str) -> list[Any]:
    return [{"role": "user", "content": question}]


def get(server: Server, path: str) -> Any:
    """A JSON answer to GET."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=DEADLINE)
    try:
        connection.request("GET", path)
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


def running(server: Server) -> int:
    found: int = get(server, "/health")["running"]
    return found


@contextmanager
def streaming(server: Server, content: str, max_tokens: int) -> Iterator[http.client.HTTPResponse]:
    """A stream as it comes over the wire, with what m3 says of its progress."""
    body = {"model": "demo", "messages": asked(content), "max_tokens": max_tokens, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=DEADLINE)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        with connection.getresponse() as response:
            yield response
    finally:
        connection.close()


# Other programs


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    """The model itself, and the files that are served with it."""
    models = list(client.models.list())
    assert [model.id for model in models] == ["demo", "corpus"]
    assert [client.models.retrieve(model.id) for model in models] == models
    assert {model.owned_by for model in models} == {"m3"}


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI) -> None:
    """Text, reason and usage are those of the same answer whole, and the usage comes last."""
    call: dict[str, Any] = {"model": "demo", "messages": asked("Say hello."), "max_tokens": 10}
    whole = client.chat.completions.create(**call)
    (choice,) = whole.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 10
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(client.chat.completions.create(**call, stream=True, stream_options={"include_usage": True}))
    assert [len(chunk.choices) for chunk in chunks] == [1] * (len(chunks) - 1) + [0]
    deltas = [chunk.choices[0] for chunk in chunks[:-1]]
    assert deltas[0].delta.role == "assistant"
    assert "".join(each.delta.content or "" for each in deltas) == choice.message.content
    assert len([each for each in deltas if each.delta.content]) > 1
    assert [each.finish_reason for each in deltas] == [None] * (len(deltas) - 1) + [choice.finish_reason]
    usage = chunks[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
        whole.usage.total_tokens,
    )
    without = list(client.chat.completions.create(**call, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in without)


def test_an_answer_follows_a_schema(client: openai.OpenAI) -> None:
    """It parses, and it is what the schema describes."""
    schema = {
        "type": "object",
        "properties": {
            "wet": {"enum": ["yes", "no"]},
            "degrees": {"type": "integer", "minimum": 0, "maximum": 100},
        },
        "required": ["wet", "degrees"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="demo",
        messages=asked("Is water wet, and at how many degrees does it boil?"),
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "water", "schema": schema}},
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    jsonschema.validate(json.loads(choice.message.content or ""), schema)


def test_a_text_is_continued(client: openai.OpenAI, server: Server) -> None:
    """As text or as its token ids, whole or in pieces; up to a number of tokens, or before a stop text."""
    call: dict[str, Any] = {"model": "demo", "max_tokens": 8}
    prompt = "1, 2, 3, 4, 5, 6,"
    whole = client.completions.create(**call, prompt=prompt)
    text = whole.choices[0].text
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 8
    tokens = client.post(f"{server.root}/tokenize", body={"prompt": prompt}, cast_to=object)
    assert isinstance(tokens, dict)
    assert whole.usage.prompt_tokens == tokens["count"]
    assert client.completions.create(**call, prompt=tokens["tokens"]).choices[0].text == text
    pieces = list(client.completions.create(**call, prompt=prompt, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == text
    stop = text[3:5]
    stopped = client.completions.create(**call, prompt=prompt, stop=["never said", stop])
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("changed", "kind", "code", "words"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "model_not_found", "'gpt-5'; it has demo and corpus"),
        ({"temperature": -1}, openai.BadRequestError, None, "'temperature'"),
        ({"max_tokens": "many"}, openai.BadRequestError, None, "'max_tokens'"),
        ({"n": 2}, openai.BadRequestError, "unsupported_value", "'n'"),
        ({"messages": []}, openai.BadRequestError, None, "'messages'"),
        ({"messages": asked("a b " * 9000)}, openai.BadRequestError, "context_length_exceeded", "8192"),
        ({"max_tokens": 8192}, openai.BadRequestError, "context_length_exceeded", "8192"),
        (
            {"model": "corpus", "messages": asked("a b " * 9000)},
            openai.BadRequestError,
            "context_length_exceeded",
            "8,192",
        ),
    ],
)
def test_what_cannot_be_answered_is_an_error_of_its_kind(
    client: openai.OpenAI, changed: dict[str, Any], kind: type[openai.APIStatusError], code: str, words: str
) -> None:
    """The client raises what OpenAI's own server would have it raise, streamed or not."""
    for stream in (False, True):
        call = {"model": "demo", "messages": asked("Hi."), "max_tokens": 2, "stream": stream, **changed}
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**call)
        assert caught.value.code == code
        assert words in caught.value.message


def about_files(client: openai.OpenAI, question: str) -> tuple[int, int]:
    """Tokens of a question about the files, and how many of them were not computed again."""
    usage = client.chat.completions.create(model="corpus", messages=asked(question), max_tokens=2).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    cached = usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    return usage.prompt_tokens, cached


def test_a_changed_file_is_seen_by_the_next_question(client: openai.OpenAI, corpus: Path) -> None:
    """Each question is about the files as they are when it comes; the server is not told of changes."""
    question = "What is the secret word?"
    before, _ = about_files(client, question)
    word = corpus / "word.txt"
    try:
        word.write_text(SECRET_WORD + "The other word is strawberry.\n" * 3)
        more, _ = about_files(client, question)
    finally:
        word.write_text(SECRET_WORD)
    assert more > before + 15
    assert about_files(client, question)[0] == before


def test_the_files_are_computed_once_for_all_clients(server: Server, client: openai.OpenAI) -> None:
    """Of another client's first question only its own words are, though the model did other work."""
    first, cached = about_files(client, "What is the secret word?")
    assert cached > 256
    client.completions.create(model="demo", prompt="Something else.", max_tokens=1)
    with client_of(server) as other:
        second, again = about_files(other, "Where is function_5, and what is it for?")
    assert again == cached
    assert first - cached < 40
    assert second - cached < 40


def test_long_contexts_take_turns(client: openai.OpenAI) -> None:
    """Two that do not fit into the KV cache together come back from the disk, however they alternate."""

    def about_text(question: str) -> tuple[int, int]:
        call: dict[str, Any] = {"model": "demo", "max_tokens": 2}
        usage = client.chat.completions.create(**call, messages=asked(LONG + question)).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        return usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens or 0

    about_text("What is this?")
    _, files = about_files(client, "What is this?")
    assert files > 256
    for number in range(1):
        tokens, cached = about_text(f"And what is line {number}?")
        assert cached == 512 < tokens
        assert about_files(client, f"And what is function_{number}?")[1] == files
    with ThreadPoolExecutor() as pool:
        texts = [pool.submit(about_text, f"What is at line {number}?") for number in range(2)]
        about = [pool.submit(about_files, client, f"Who calls function_{number}?") for number in range(2)]
    assert [each.result()[1] for each in texts] == [512] * 2
    assert [each.result()[1] for each in about] == [files] * 2


# m3's own commands


@pytest.mark.parametrize("command", ["ask", "chat", "warm", "review"])
def test_commands_find_the_server(
    m3: Run, server: Server, corpus: Path, tmp_path: Path, command: str
) -> None:
    """It answers for them, as they say, and what they print is what they print without it."""
    top = make_repository(tmp_path / "top", {"reader.py": "def read(path):\n    return open(path)\n"})
    write(top, {"reader.py": "def read(path):\n    return open(path).read()\n"})
    arguments: tuple[str, ...] = {
        "ask": ("ask", str(corpus), "What is the secret word?", "--max-tokens", "6"),
        "chat": ("chat", str(corpus), "--max-tokens", "6"),
        "warm": ("warm", str(corpus)),
        "review": ("review", str(top), "--context", "diff", "--no-check", "--max-tokens", "16"),
    }[command]
    lines = "What is the secret word?\nAnd what is function_3?\n"
    before = server.answers()
    served = m3(*arguments, stdin=lines)
    answers = server.answers() - before
    assert SERVED.format(server.root) in served.stderr
    assert answers == (2 if command == "chat" else 1)
    if command == "ask":
        alone = m3(*arguments, stdin=lines, M3_SERVER="0")
    else:
        alone = m3(*arguments, "--no-server", stdin=lines)
    assert "the m3 server at" not in alone.stderr
    assert server.answers() - before == answers
    assert served.stdout == alone.stdout
    assert bool(served.stdout) == (command != "warm")
    assert served.returncode == alone.returncode, served.stderr
    assert served.returncode in (ExitCode.DONE, ExitCode.FINDINGS, ExitCode.CAP_REACHED)


def found(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], **options: Any) -> str:
    """The address of the server that a command with such options would use; empty for none."""
    for name in ("M3_CONFIG", "M3_CACHE_DIR", "M3_THREADS", "M3_SERVER"):
        if name in environ:
            monkeypatch.setenv(name, environ[name])
    allow_dense = options.pop("allow_dense", False)
    request = values.context_request(None, values.settings(options), allow_dense=allow_dense, asks=True)
    with Context(request, lambda: b"") as context:
        return context.server.url if context.server is not None else ""


@pytest.mark.parametrize(
    ("options", "used"),
    [
        ({}, True),
        ({"threads": 1, "ctx": 4096, "max_tokens": 5, "strategy": "select"}, True),
        ({"server": False}, False),
        ({"cache": False}, False),
        ({"threads": 2}, False),
        ({"kv_type": "q8_0"}, False),
        ({"ubatch": 64}, False),
        ({"flash_attention": "off"}, False),
        ({"allow_dense": True}, False),
        ({"lora": ("adapter.gguf",)}, False),
    ],
)
def test_only_a_server_that_runs_the_model_so_is_used(
    server: Server, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], used: bool
) -> None:
    """What a command asks for of the model has to be what the server does, and what it keeps too."""
    assert found(monkeypatch, server.environ, **options) == (server.root if used else "")


def test_another_model_file_has_no_server(
    server: Server, smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even one with the same content: only the file that was opened is known to be the same."""
    copy, link = tmp_path / "copy.gguf", tmp_path / "link.gguf"
    shutil.copyfile(smollm2, copy)
    link.symlink_to(smollm2)
    assert found(monkeypatch, server.environ, model=str(link)) == server.root
    assert found(monkeypatch, server.environ, model=str(copy)) == ""


def test_the_environment_decides_whether_a_server_is_used(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """M3_SERVER=0 does without, and each cache directory has servers of its own."""
    assert found(monkeypatch, {**server.environ, "M3_SERVER": "1"}) == server.root
    assert found(monkeypatch, {**server.environ, "M3_SERVER": "0"}) == ""
    another = {"M3_SERVER": "1", "M3_CACHE_DIR": str(tmp_path / "cache")}
    assert found(monkeypatch, {**server.environ, **another}) == ""


def warm(m3: Run, corpus: Path) -> str:
    """What a command says on stderr that finds its work done."""
    done = m3("warm", str(corpus))
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_the_younger_of_two_servers_is_used(
    m3: Run, server: Server, corpus: Path, environ: dict[str, str]
) -> None:
    """As long as it lives. m3's commands need no key for it, but others do. Killed, it is forgotten."""
    key = "sesame-123"
    with serving("--api-key-env", "KEY", environ={**environ, "KEY": key}) as younger:
        assert SERVED.format(younger.root) in warm(m3, corpus)
        assert younger.answers() == 1
        with client_of(younger, "wrong") as stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        with client_of(younger, key) as friend:
            assert [model.id for model in friend.models.list()] == ["demo"]
        assert key not in younger.file.read_text()
        younger.stop(signal.SIGKILL)
        assert younger.file.exists()
    assert SERVED.format(server.root) in warm(m3, corpus)
    assert not younger.file.exists()
    assert server.file.exists()


class Impostor:
    """Who listens where a server did, without its secret; `heard` is all that was sent there."""

    def __init__(self) -> None:
        self.heard = b""
        impostor = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                self.request.settimeout(DEADLINE)
                impostor.heard += self.request.recv(65536)
                body = json.dumps({"m3": "0", "proof": "0" * 64}).encode()
                self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def announced(server: Server) -> Iterator[Any]:
    """`announced(**changes)`: the server's own file once more, changed, as that of the youngest."""
    (own,) = (each for each in running_servers(server.cache / "servers") if each.port == server.port)
    paths: list[Path] = []

    def add(**changes: Any) -> Path:
        values = {**asdict(own), "pid": os.getpid(), "started": own.started + 1000, **changes}
        paths.append(announce(server.cache / "servers", RunningServer(**values)))
        return paths[-1]

    yield add
    for path in paths:
        path.unlink(missing_ok=True)


def test_another_process_at_the_address_is_told_nothing(
    m3: Run, server: Server, corpus: Path, announced: Any
) -> None:
    """Neither the secret nor the prompt goes to who cannot prove to be the server; the next one is used."""
    impostor = Impostor()
    try:
        announced(port=impostor.port, secret="not-for-others")
        assert SERVED.format(server.root) in warm(m3, corpus)
    finally:
        impostor.close()
    assert impostor.heard.startswith(b"GET /m3/hello?nonce=")
    assert impostor.heard.count(b"HTTP/1.1") == 1
    assert b"not-for-others" not in impostor.heard


def test_files_that_cannot_be_trusted_are_passed_over(
    m3: Run, server: Server, corpus: Path, announced: Any
) -> None:
    """Of files that others may use, that lead elsewhere or are broken, none is asked, and all are left."""
    impostor = Impostor()
    try:
        port = impostor.port
        announced(port=port, host="10.255.255.1")
        announced(port=port, pid=1, machine="another")
        announced(port=port, pid=os.getppid()).chmod(0o644)
        link = announced(port=1)
        link.unlink()
        link.symlink_to(announced(port=port, pid=2, machine="another"))
        announced(port=2).write_text("{")
        before = sorted(link.parent.iterdir())
        assert SERVED.format(server.root) in warm(m3, corpus)
        assert sorted(link.parent.iterdir()) == before
    finally:
        impostor.close()
    assert impostor.heard == b""


def start_ask(server: Server, path: Path) -> subprocess.Popen[str]:
    """`m3 ask` with so much to read that it does not end by itself, when the server is at it."""
    poll(lambda: not running(server))
    path.write_text(LONG * 5)
    process = subprocess.Popen(
        [M3, "ask", str(path), "What is it about?", "--strategy", "whole"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=server.environ, start_new_session=True,
    )  # fmt: skip
    poll(lambda: running(server) or process.poll() is not None)
    return process


def test_ctrl_c_ends_the_command_and_not_the_server(
    m3: Run, server: Server, corpus: Path, tmp_path: Path
) -> None:
    """The command exits as without a server; the server hears that nobody waits, and serves on."""
    process = start_ask(server, tmp_path / "long.txt")
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=DEADLINE)
    assert process.returncode == ExitCode.INTERRUPTED, stderr
    assert SERVED.format(server.root) in stderr
    assert (stdout, "Traceback" in stderr) == ("", False)
    poll(lambda: not running(server))
    assert SERVED.format(server.root) in warm(m3, corpus)


def test_a_command_whose_server_ends_says_so(tmp_path: Path) -> None:
    """One sentence about the server, and how to go on; not an answer, nor silence."""
    with serving(environ=environ_of(tmp_path / "home")) as server:
        process = start_ask(server, tmp_path / "long.txt")
        assert server.stop() == 0
        stdout, stderr = process.communicate(timeout=DEADLINE)
    assert process.returncode == ExitCode.INTERNAL, stderr
    assert stdout == ""
    (said,) = (line for line in stderr.replace("\n", " ").split("error: ")[1:])
    assert said.startswith(f"The m3 server at {server.root} cannot be used any more: ")
    assert "--no-server" in said


# How it begins and ends

ENDS = pytest.mark.parametrize(
    ("number", "group"),
    [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGHUP, True)],
    ids=["Ctrl-C", "SIGTERM", "closed terminal"],
)


@ENDS
def test_a_signal_ends_it_at_once(tmp_path: Path, number: int, group: bool) -> None:
    """While the model is still being loaded: it is done, and nobody finds it any more."""
    with serving(environ=environ_of(tmp_path / "home")) as server:
        assert server.file.exists()
        assert server.stop(number, group=group) == 0, server.stderr
        assert not list(server.file.parent.iterdir())
        assert "error" not in server.stderr
        assert "Traceback" not in server.stderr


@ENDS
def test_a_signal_ends_a_stream(tmp_path: Path, number: int, group: bool) -> None:
    """Who reads an answer is told that there will be no more of it."""
    with serving(environ=environ_of(tmp_path / "home")) as server:
        with streaming(server, "Tell me a very long story about a ship.", 4000) as response:
            while b'"content": "' not in (line := response.readline()) or b'"content": ""' in line:
                assert line
            code = server.stop(number, group=group)
            rest = response.read()
        assert code == 0, server.stderr
        assert not list(server.file.parent.iterdir())
        assert "Traceback" not in server.stderr
    error, done = [line for line in rest.splitlines() if line.startswith(b"data: ")][-2:]
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "shutting_down"
    assert done == b"data: [DONE]"


def test_a_signal_keeps_what_was_read(tmp_path: Path) -> None:
    """The terminal is closed in the middle of a long prompt: the next server goes on there."""
    environ = environ_of(tmp_path / "home")
    with serving(environ=environ) as server:
        with streaming(server, LONG * 8, 1) as response:
            while not (line := response.readline()).startswith(b": 512 of "):
                assert line
            assert server.stop(signal.SIGHUP, group=True) == 0, server.stderr
            assert b"shutting_down" in response.read()
        assert not list(server.file.parent.iterdir())
        assert "error" not in server.stderr
    with serving(environ=environ) as server, client_of(server) as client:
        usage = client.chat.completions.create(model="demo", messages=asked(LONG), max_tokens=1).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == 512


def test_nohup_keeps_it_running(tmp_path: Path) -> None:
    """Who has it started with hangups ignored wants it to survive the terminal."""
    with serving(environ=environ_of(tmp_path / "home"), ignoring=signal.SIGHUP) as server:
        poll(lambda: not running(server))
        server.process.send_signal(signal.SIGHUP)
        with client_of(server) as client:
            assert client.completions.create(model="demo", prompt="1, 2,", max_tokens=1).choices
        assert server.stop() == 0
        assert not list(server.file.parent.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--port", "{port}"), ExitCode.IMPOSSIBLE, "cannot listen at 127.0.0.1, port {port}"),
        (("--host", "0.0.0.0"), ExitCode.USAGE, "--api-key-env"),
        (("--host", "192.0.2.1", "--api-key-env", "KEY"), ExitCode.IMPOSSIBLE, "cannot listen at 192.0.2.1"),
        (("--api-key-env", "NO_SUCH_KEY"), ExitCode.USAGE, "NO_SUCH_KEY"),
        (("--model", "no-such-model.gguf"), ExitCode.IMPOSSIBLE, "no-such-model.gguf"),
        (("--model", "{broken}"), ExitCode.IMPOSSIBLE, "broken.gguf"),
        (("no-such-directory",), ExitCode.USAGE, "no-such-directory"),
        ((".", "--strategy", "sweep"), ExitCode.USAGE, "sweep"),
        (("--ctx", "100000"), ExitCode.IMPOSSIBLE, "100,000"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(
    m3: Run, server: Server, tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    """The command ends at once, as others do with such arguments, and is found by nobody."""
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(10))
    values = {"port": server.port, "broken": broken}
    free = () if "--port" in arguments else ("--port", "0")
    before = list((server.cache / "servers").iterdir())
    done = m3("serve", *free, *(word.format(**values) for word in arguments), KEY="sesame")
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert words.format(**values) in done.stderr.replace("\n", " ")
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert list((server.cache / "servers").iterdir()) == before
