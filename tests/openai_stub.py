"""A server with OpenAI's API on the loopback interface: it answers as several kinds of servers do.

The shapes are those of the servers' documentation. What was sent is kept, and every way to fail is there. As
a proxy it also stands for any other host: `proxy` is the environment that has m3 go there through it.
"""

from __future__ import annotations

import json
import threading
from collections import defaultdict, deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterable, Mapping

CHAT = "/v1/chat/completions"
MODELS = "/v1/models"
TOKENIZE = "/tokenize"
PROPS = "/props"
HOST = "llm.example"
"""A host that does not exist, for a stub that is its proxy."""
_HEAD = {"id": "chatcmpl-1", "created": 1_760_000_000, "model": "some-model"}


@dataclass(frozen=True)
class Sent:
    """A request. `host` is the one that it is for, `body` what its JSON holds."""

    method: str
    host: str
    path: str
    headers: Mapping[str, str]
    body: Any


@dataclass(frozen=True)
class Reply:
    """An answer, whose `pieces` are sent one after the other.

    `cut` ends the connection before the end is announced, `status` 0 without a word. An `endless` one repeats
    its last piece until nobody reads it.
    """

    pieces: tuple[bytes, ...] = ()
    status: int = 200
    type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: bool = False
    endless: bool = False


@dataclass(frozen=True)
class Kind:
    """What a kind of server says of its model, and how it streams (reasoning, text, finish_reason, usage).

    `tokens` is the answer of its tokenizer to a request, None if it has none; `usage` is what it counts.
    """

    models: Mapping[str, Any]
    stream: Callable[[str, str, str, Mapping[str, int] | None], list[Any]]
    tokens: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    props: Mapping[str, Any] | None = None

    def answer(
        self,
        text: str,
        reasoning: str = "",
        *,
        finish: str = "stop",
        usage: Mapping[str, int] | None = None,
    ) -> Reply:
        """A streamed answer; `usage` has prompt, generated and cached."""
        counted = {"prompt": 100, "generated": 7, "cached": 0} if usage is None else usage
        return events(self.stream(text, reasoning, finish, counted or None))


def events(values: Iterable[Any], *, done: bool = True, cut: bool = False, end: str = "\n\n") -> Reply:
    """Server-sent events of some values, text as it is, and that which ends a stream."""
    lines = [
        value if isinstance(value, str) else f"data: {json.dumps(value, ensure_ascii=False)}"
        for value in [*values, *(["data: [DONE]"] if done else [])]
    ]
    return Reply(tuple(f"{line}{end}".encode() for line in lines), type="text/event-stream", cut=cut)


def error(status: int, body: object, **headers: str) -> Reply:
    """An error with a body, which is JSON unless it is text."""
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    kind = "text/html" if isinstance(body, str) else "application/json"
    return Reply((data,), status, kind, {name.replace("_", "-"): value for name, value in headers.items()})


def whole(text: str, reasoning: str = "", finish: str | None = "stop") -> Reply:
    """The answer of a server that does not stream, whatever it is asked."""
    message = {"role": "assistant", "content": text, "reasoning_content": reasoning or None}
    body = {
        **_HEAD,
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107},
    }
    return Reply((json.dumps(body).encode(),), type="application/json; charset=utf-8")


def chunk(delta: object, finish: str | None = None, **more: Any) -> dict[str, Any]:
    """A piece of a stream."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return {**_HEAD, "object": "chat.completion.chunk", "choices": [choice], **more}


def vllm(*, window: int = 32_768, name: str = "some-model", reasoning_key: str = "reasoning") -> Kind:
    """VLLM, whose deltas have `reasoning`, and `reasoning_content` before version 0.11."""

    def stream(
        text: str, reasoning: str, finish: str, usage: Mapping[str, int] | None
    ) -> list[dict[str, Any]]:
        pieces = [chunk({"role": "assistant", "content": ""})]
        pieces += [chunk({reasoning_key: piece}) for piece in _pieces(reasoning)]
        pieces += [chunk({"content": piece}) for piece in _pieces(text)]
        pieces.append(chunk({"content": ""}, finish, stop_reason=None))
        if usage:
            details = {"cached_tokens": usage["cached"]} if usage["cached"] else None
            pieces.append(
                {**chunk({}), "choices": [], "usage": {**_usage(usage), "prompt_tokens_details": details}}
            )
        return pieces

    def tokens(body: Mapping[str, Any]) -> dict[str, Any]:
        ids = _ids(body["prompt"])
        return {"count": len(ids), "max_model_len": window, "tokens": ids, "token_strs": None}

    model = {
        "id": name,
        "object": "model",
        "created": 1_760_000_000,
        "owned_by": "vllm",
        "root": name,
        "parent": None,
        "max_model_len": window,
        "permission": [],
    }
    return Kind({"object": "list", "data": [model]}, stream, tokens)


def sglang(*, window: int = 32_768, name: str = "some-model") -> Kind:
    """SGLang: all fields are there, most of them null."""

    def piece(finish: str | None = None, **delta: str | None) -> dict[str, Any]:
        empty = {"role": None, "content": None, "reasoning_content": None, "tool_calls": None}
        value = chunk({**empty, **delta}, finish, usage=None)
        value["choices"][0]["matched_stop"] = 151_645 if finish == "stop" else None
        return value

    def stream(
        text: str, reasoning: str, finish: str, usage: Mapping[str, int] | None
    ) -> list[dict[str, Any]]:
        pieces = [piece(role="assistant", content="")]
        pieces += [piece(reasoning_content=each) for each in _pieces(reasoning)]
        pieces += [piece(content=each) for each in _pieces(text)]
        pieces.append(piece(finish))
        if usage:
            counts = {
                **_usage(usage),
                "prompt_tokens_details": {"cached_tokens": usage["cached"]},
                "reasoning_tokens": 0,
            }
            pieces.append({**chunk({}), "choices": [], "usage": counts})
        return pieces

    def tokens(body: Mapping[str, Any]) -> dict[str, Any]:
        ids = _ids(body["prompt"])
        return {"tokens": ids, "count": len(ids), "max_model_len": window}

    model = {"id": name, "object": "model", "owned_by": "sglang", "root": name, "max_model_len": window}
    return Kind({"object": "list", "data": [model]}, stream, tokens)


def llama_server(*, window: int = 32_768, name: str = "model.gguf", details: bool = False) -> Kind:
    """llama-server: its context stands in /props, cached tokens in timings, and later in `details` too."""

    def stream(
        text: str, reasoning: str, finish: str, usage: Mapping[str, int] | None
    ) -> list[dict[str, Any]]:
        head = {"system_fingerprint": "b6990-0123abcd"}
        pieces = [chunk({"role": "assistant", "content": None}, **head)]
        pieces += [chunk({"reasoning_content": piece}, **head) for piece in _pieces(reasoning)]
        pieces += [chunk({"content": piece}, **head) for piece in _pieces(text)]
        pieces.append(chunk({}, finish, **head))
        if usage:
            counts: dict[str, Any] = _usage(usage)
            if details:
                counts["prompt_tokens_details"] = {"cached_tokens": usage["cached"]}
            timings = {
                "cache_n": usage["cached"],
                "prompt_n": usage["prompt"] - usage["cached"],
                "prompt_ms": 31.5,
                "predicted_n": usage["generated"],
                "predicted_ms": 87.6,
            }
            pieces.append({**chunk({}, **head), "choices": [], "usage": counts, "timings": timings})
        return pieces

    meta = {"vocab_type": 2, "n_vocab": 49_152, "n_ctx_train": 2 * window, "n_embd": 576, "size": 98_000_000}
    model = {
        "id": name,
        "object": "model",
        "created": 1_760_000_000,
        "owned_by": "llamacpp",
        "meta": meta,
    }
    settings = {"id": 0, "n_ctx": window, "speculative": False, "is_processing": False}
    return Kind(
        {"models": [{"name": name}], "object": "list", "data": [model]},
        stream,
        lambda body: {"tokens": _ids(body["content"])},
        {"default_generation_settings": settings, "total_slots": 1, "model_path": name},
    )


def hosted(*, window: int | None = 32_768, name: str = "some-model") -> Kind:
    """A hosted API: no tokenizer; `context_length` as OpenRouter has it, or no word about that, as OpenAI."""

    def stream(text: str, reasoning: str, finish: str, usage: Mapping[str, int] | None) -> list[Any]:
        head = {"service_tier": "default", "system_fingerprint": "fp_1", "obfuscation": "xY3"}
        pieces: list[Any] = [": PROCESSING", ": PROCESSING"]
        pieces.append(chunk({"role": "assistant", "content": "", "refusal": None}, usage=None, **head))
        pieces += [chunk({"content": "", "reasoning": piece}, **head) for piece in _pieces(reasoning)]
        pieces += [chunk({"content": piece}, usage=None, **head) for piece in _pieces(text)]
        pieces.append(chunk({}, finish, usage=None, **head))
        if usage:
            counts = {
                **_usage(usage),
                "prompt_tokens_details": {"cached_tokens": usage["cached"], "audio_tokens": 0},
                "completion_tokens_details": {"reasoning_tokens": 0},
            }
            pieces.append({**chunk({}, **head), "choices": [], "usage": counts})
        return pieces

    model: dict[str, Any] = {"id": name, "object": "model", "created": 1_760_000_000, "owned_by": "system"}
    if window is not None:
        model["context_length"] = window
    return Kind({"object": "list", "data": [model]}, stream)


def _pieces(text: str) -> list[str]:
    return [text[at : at + 5] for at in range(0, len(text), 5)]


def _ids(text: str) -> list[int]:
    return list(range(-(-len(text.encode()) // 4)))


def _usage(usage: Mapping[str, int]) -> dict[str, int]:
    prompt, generated = usage["prompt"], usage["generated"]
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


class OpenAIStub:
    """A running server of a kind. A context manager.

    It says `text` unless `queue` has a reply: `queue[path]` are those of the next requests for a path. `sent`
    is what came in; `left` is set when somebody left an endless answer. Without `listening`, connections are
    refused until `listen` is called.
    """

    def __init__(
        self,
        kind: Kind,
        text: str = "It retries (retry.py:2-3).",
        *,
        tls: ssl.SSLContext | None = None,
        listening: bool = True,
    ) -> None:
        self.kind = kind
        self.text = text
        self.sent: list[Sent] = []
        self.queue: defaultdict[str, deque[Reply]] = defaultdict(deque)
        self.left = threading.Event()
        self._scheme = "https" if tls is not None else "http"
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"stub": self}), False)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._server.server_bind()
        self._thread: threading.Thread | None = None
        if listening:
            self.listen()

    def listen(self) -> None:
        """Begin to take connections."""
        self._server.server_activate()
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()

    def __enter__(self) -> OpenAIStub:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    @property
    def port(self) -> int:
        """Where it listens."""
        port: int = self._server.server_address[1]
        return port

    @property
    def url(self) -> str:
        """For --endpoint."""
        return f"{self._scheme}://127.0.0.1:{self.port}/v1"

    @property
    def proxy(self) -> dict[str, str]:
        """Environment variables that have this server answer for all hosts but those of this machine."""
        return {
            "HTTP_PROXY": f"http://127.0.0.1:{self.port}",
            "http_proxy": f"http://127.0.0.1:{self.port}",
            "NO_PROXY": "",
            "no_proxy": "",
        }

    def next(self, *replies: Reply, path: str = CHAT) -> None:
        """Answer so to the next requests for a path."""
        self.queue[path].extend(replies)

    def asked(self, path: str = CHAT) -> list[Sent]:
        """The requests for a path."""
        return [sent for sent in self.sent if sent.path == path]

    def prompts(self) -> list[list[dict[str, str]]]:
        """The messages of each request for an answer."""
        return [sent.body["messages"] for sent in self.asked()]

    def everything(self) -> str:
        """All text that has come in, wherever it stood."""
        return "\n".join(
            f"{sent.path}\n{json.dumps(dict(sent.headers))}\n{json.dumps(sent.body, ensure_ascii=False)}"
            for sent in self.sent
        )

    def reply(self, sent: Sent) -> Reply:
        """The answer to a request."""
        queue, kind = self.queue[sent.path], self.kind
        if queue:
            return queue.popleft()
        if sent.path == MODELS:
            return Reply((json.dumps(kind.models).encode(),))
        if sent.path == PROPS and kind.props is not None:
            return Reply((json.dumps(kind.props).encode(),))
        if sent.path == TOKENIZE and kind.tokens is not None:
            return Reply((json.dumps(kind.tokens(sent.body)).encode(),))
        if sent.path == CHAT:
            return kind.answer(self.text)
        return error(404, {"detail": "Not Found"})


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""


class _Handler(BaseHTTPRequestHandler):
    stub: OpenAIStub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = urlsplit(self.path)  # a whole address, to a proxy
        headers = {name.lower(): value for name, value in self.headers.items()}
        sent = Sent(
            self.command,
            parts.hostname or "",
            parts.path,
            headers,
            json.loads(data) if data else None,
        )
        self.stub.sent.append(sent)
        self._send(self.stub.reply(sent))

    def _send(self, reply: Reply) -> None:
        if not reply.status:
            self.close_connection = True
            return
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.type)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in reply.pieces:
            self._piece(piece)
        try:
            while reply.endless:
                self._piece(reply.pieces[-1])
        except OSError:
            self.stub.left.set()
            self.close_connection = True
            return
        if reply.cut:
            self.close_connection = True
        else:
            self.wfile.write(b"0\r\n\r\n")

    def _piece(self, piece: bytes) -> None:
        if piece:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
