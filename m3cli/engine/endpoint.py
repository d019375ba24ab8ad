"""The server at an address: its models, its tokenizer, its answers; attempts, limits, and errors in words."""

from __future__ import annotations

import json
import random
import re
import ssl
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from m3cli.engine.events import Notice
from m3cli.engine.running import LOOPBACK
from m3cli.errors import (
    DoesNotFitError,
    EngineCrashError,
    ImpossibleError,
    M3Error,
    MachineError,
    ModelError,
    UsageError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import httpx2
    from typing_extensions import Self


_ATTEMPTS = 5
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # what may be over at the next attempt
_CONNECT_SECONDS = 15.0
_LARGEST_ANSWER = 64_000_000  # bytes of an object, or of one piece of a stream
_LARGEST_ERROR = 1_000_000  # bytes
_ADDRESS = re.compile(r"https?://(\[[^\]/\s]+\]|[^/\s\\:\[\]]+)(:\d*)?(/[^\s\\]*)?", re.I)
_OVERFLOW = re.compile(
    r"context.{0,20}(length|size|window|limit)|(prompt|input|messages?).{0,20}too (long|large)"
    r"|too many tokens|maximum (prompt|input) length|reduce the length",
    re.I,
)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server is: `url` up to the version, such as `http://127.0.0.1:8000/v1`.

    `model` None is the first that it names. `patience` is how many seconds of silence end a request: a server
    says nothing while it reads a long prompt.
    """

    url: str
    api_key: str = field(default="", repr=False)
    model: str | None = None
    patience: float = 3600.0

    @classmethod
    def parse(cls, url: str, *, api_key: str = "", model: str | None = None) -> Self:
        """An endpoint as a person writes it. Raises UsageError."""
        hint = "Write it as http://HOST:PORT/v1; a key is named with --api-key-env."
        if any(sign in url for sign in "@?#"):  # not shown: what stands there may be a secret
            raise UsageError("The endpoint holds more than an address: a user or a query.", hint)
        try:
            parts = urlsplit(url)
            right = bool(_ADDRESS.fullmatch(url)) and bool(parts.hostname) and parts.port != 0
        except ValueError:
            right = False
        if not right:
            raise UsageError(f"The endpoint {url!r} is no address of a server.", hint)
        path = parts.path.rstrip("/") or "/v1"
        return cls(f"{parts.scheme}://{parts.netloc}{path}", api_key, model)

    @property
    def host(self) -> str:
        """The host's name."""
        return urlsplit(self.url).hostname or ""

    @property
    def is_local(self) -> bool:
        """Whether nothing leaves this machine."""
        return bool(LOOPBACK.fullmatch(self.host))

    @property
    def is_open(self) -> bool:
        """Whether others can read what is sent."""
        return not self.is_local and urlsplit(self.url).scheme != "https"


class RemoteServer:
    """The server at an endpoint; connections are kept between requests. A context manager.

    `wait` passes the time between two attempts.
    """

    def __init__(self, endpoint: Endpoint, *, wait: Callable[[float], None] = time.sleep) -> None:
        self.endpoint = endpoint
        self._wait = wait

    @cached_property
    def _http(self) -> httpx2.Client:
        library = _library()
        try:
            library.URL(self.endpoint.url)
        except (library.InvalidURL, UnicodeError) as error:
            raise UsageError(
                f"The endpoint {self.endpoint.url!r} is no address of a server: {_words(error)}.",
                "Write it as http://HOST:PORT/v1.",
            ) from error
        headers = {"User-Agent": "m3"}
        if self.endpoint.api_key:
            headers["Authorization"] = f"Bearer {self.endpoint.api_key}"
        client: httpx2.Client = library.Client(
            headers=headers,
            timeout=library.Timeout(self.endpoint.patience, connect=_CONNECT_SECONDS),
            trust_env=not self.endpoint.is_local,  # a proxy knows nothing of this machine's servers
        )
        return client

    @property
    def _root(self) -> str:
        return self.endpoint.url.removesuffix("/v1")

    def models(self) -> list[dict[str, Any]]:
        """What the server says of its models, the `id` of each at least. Raises M3Error."""
        listed = self._object("GET", f"{self.endpoint.url}/models").get("data")
        models = (
            [each for each in listed if isinstance(each, dict) and isinstance(each.get("id"), str)]
            if (isinstance(listed, list))
            else []
        )
        if not models:
            raise self._odd("it lists no models")
        return models

    def llama_context(self) -> int:
        """Tokens of context that a llama-server has, which it tells in a place of its own; else 0."""
        try:
            facts = self._object("GET", f"{self._root}/props", patient=False)
        except M3Error:
            return 0
        return count_of(object_of(facts.get("default_generation_settings")), "n_ctx", 0)

    def tokenize(self, model: str, text: str, *, patient: bool = True) -> list[int]:
        """Token ids of a text by the server. Raises M3Error."""
        # vLLM reads the first three, llama-server the last two.
        text = clean(text)
        body = {
            "model": model,
            "prompt": text,
            "add_special_tokens": False,
            "content": text,
            "add_special": False,
        }
        tokens = self._object("POST", f"{self._root}/tokenize", body, patient=patient).get("tokens")
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise self._odd("its tokenizer gives no token ids")
        return tokens

    def stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any] | Notice]:
        """The chunks of a chat completion, and why an attempt is made again. Raises M3Error.

        Once an answer has begun, it is not asked for again.
        """
        library = _library()
        for attempt in range(1, _ATTEMPTS + 1):
            began = False
            try:
                with self._http.stream(
                    "POST", f"{self.endpoint.url}/chat/completions", json=body
                ) as response:
                    if response.status_code == 200:
                        began = True
                        yield from self._chunks(response)
                        return
                    self._check_passing(response, attempt, _ATTEMPTS)
                    problem, pause = (
                        f"it answered with status {response.status_code}",
                        _pause(attempt, response),
                    )
            except library.RequestError as error:
                problem, pause = _words(error), _pause(attempt)
                if began:
                    raise EngineCrashError(
                        f"The connection to {self.endpoint.host} broke within an answer: {problem}.",
                        "Run the command again.",
                    ) from error
                self._check_reachable(error, attempt, _ATTEMPTS)
            yield Notice(f"{self.endpoint.host}: {problem}; trying again in {pause:.0f} s")
            self._wait(pause)

    def _chunks(self, response: httpx2.Response) -> Iterator[dict[str, Any]]:
        kind = response.headers.get("content-type", "").partition(";")[0].strip()
        if kind == "application/json":
            yield self._checked(self._parsed(self._content(response)))  # a server that does not stream
            return
        found = False
        for line in self._lines(response):
            name, _, data = line.partition(b":")
            data = data.strip()
            if name != b"data" or not data:
                continue  # a comment, or a field that means nothing here
            if data == b"[DONE]":
                return
            yield self._checked(self._parsed(data))
            found = True
        if not found and kind != "text/event-stream":
            raise self._odd("its answer is neither JSON nor a stream of it")

    def _lines(self, response: httpx2.Response) -> Iterator[bytes]:
        """Lines as server-sent events have them; JSON may hold other characters that end lines of text."""
        held = bytearray()
        for piece in response.iter_bytes():
            *ended, rest = re.split(rb"[\r\n]", piece)
            for line in ended:
                yield bytes(held + line)
                held.clear()
            held += rest
            self._check_size(len(held))
        if held:
            yield bytes(held)

    def _content(self, response: httpx2.Response) -> bytes:
        content = bytearray()
        for piece in response.iter_bytes():
            content += piece
            self._check_size(len(content))
        return bytes(content)

    def _check_size(self, nbytes: int) -> None:
        if nbytes > _LARGEST_ANSWER:
            raise self._odd(f"its answer is larger than {_LARGEST_ANSWER:,} bytes")

    def _object(
        self, method: str, url: str, body: dict[str, Any] | None = None, *, patient: bool = True
    ) -> dict[str, Any]:
        library = _library()
        attempts = _ATTEMPTS if patient else 1
        for attempt in range(1, attempts + 1):
            try:
                with self._http.stream(method, url, json=body) as response:
                    if response.status_code == 200:
                        return self._parsed(self._content(response))
                    self._check_passing(response, attempt, attempts)
                    pause = _pause(attempt, response)
            except library.RequestError as error:
                self._check_reachable(error, attempt, attempts)
                pause = _pause(attempt)
            self._wait(pause)
        raise AssertionError("the last attempt returns or raises")

    def _check_reachable(self, error: Exception, attempt: int, attempts: int) -> None:
        """Raise what a connection that failed means, unless it may work at the next attempt."""
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(cause)
        if any(isinstance(each, ssl.SSLCertVerificationError) for each in causes):
            raise MachineError(
                f"The certificate of {self.endpoint.url} is not trusted here: {_words(error)}.",
                "Check the address, or name the certificate of who signed it in SSL_CERT_FILE.",
            ) from error
        if attempt == attempts or isinstance(error, _library().ReadTimeout):
            raise self._unreachable(_words(error)) from error

    def _check_passing(self, response: httpx2.Response, attempt: int, attempts: int) -> None:
        """Raise the error that an answer is, unless it may be over at the next attempt."""
        if response.status_code not in _PASSING or attempt == attempts:
            raise self._refused(response.status_code, _message(response))

    def _checked(self, chunk: dict[str, Any]) -> dict[str, Any]:
        """A chunk that is no error. Raises M3Error."""
        problem = chunk.get("error")
        if not problem and chunk.get("object") != "error":
            return chunk
        words = _said(chunk)
        code = object_of(problem).get("code", chunk.get("code"))
        if type(code) is not int or not 400 <= code < 600:
            code = 400 if _OVERFLOW.search(words) else 500
        raise self._refused(code, words)

    def _parsed(self, data: bytes) -> dict[str, Any]:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise self._odd("its answer is not JSON") from error
        if not isinstance(value, dict):
            raise self._odd("its answer is no JSON object")
        return value

    def _odd(self, problem: str) -> ModelError:
        return ModelError(
            f"The server at {self.endpoint.url} does not speak OpenAI's API: {problem}.",
            "Check the address: it ends in /v1 with most servers.",
        )

    def _unreachable(self, problem: str) -> MachineError:
        return MachineError(
            f"The server at {self.endpoint.url} cannot be reached: {problem}.",
            "Check that it runs, and the address, the proxy and the network.",
        )

    def _refused(self, status: int, words: str) -> M3Error:
        if self.endpoint.api_key:  # which some servers repeat
            words = words.replace(self.endpoint.api_key, "…")
        said = f": {words.strip().rstrip('.')[:500]}" if words.strip() else ""
        where = f"The server at {self.endpoint.url}"
        if status in (401, 403):
            hint = "Name the variable that holds a key with --api-key-env."
            if self.endpoint.api_key:
                hint = "Check the key in the variable of --api-key-env, and what it may use."
            return UsageError(f"{where} does not let m3 in (status {status}){said}.", hint)
        if status == 404:
            return ModelError(
                f"{where} has no such model or address (status 404){said}.",
                "Check --model against its list of models, and that the address ends in /v1.",
            )
        if status == 413 or (status in (400, 422) and _OVERFLOW.search(words)):
            return DoesNotFitError(
                f"{where} takes no prompt of this size (status {status}){said}.",
                "Tell m3 how much it takes with --ctx, or give fewer files.",
            )
        if status == 429:
            return MachineError(
                f"{where} is asked too much (status 429){said}.", "Wait, or ask for a higher limit there."
            )
        if status in (400, 422):
            return ImpossibleError(
                f"{where} does not take the request (status {status}){said}.",
                "Leave out options that it may not know, such as --think or --min-p.",
            )
        if 300 <= status < 400:
            return UsageError(
                f"{where} is elsewhere (status {status}).", "Give the address that it is sent on to."
            )
        return MachineError(
            f"{where} failed (status {status}){said}.", "Try again later, or look at its log."
        )

    def close(self) -> None:
        """End the connections; may be called twice."""
        if "_http" in self.__dict__:
            self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _library() -> Any:
    try:
        import httpx2
    except ImportError as error:
        raise MachineError(
            "--endpoint needs the package httpx2, which is not installed.",
            "Install it: pip install 'm3cli[remote]'.",
        ) from error
    return httpx2


def _pause(attempt: int, response: httpx2.Response | None = None) -> float:
    """Seconds before the next attempt: what the server asks for, else twice as long each time, at random."""
    asked = response.headers.get("retry-after", "") if response is not None else ""
    if re.fullmatch(r"\d{1,6}(\.\d{1,3})?", asked):
        return min(float(asked), _LONGEST_PAUSE)
    return float(min(_FIRST_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE) * random.uniform(0.5, 1.0))


def _words(error: Exception) -> str:
    return str(error).strip().rstrip(".") or type(error).__name__


def _message(response: httpx2.Response) -> str:
    """What a server says of an error."""
    content = bytearray()
    for piece in response.iter_bytes():
        content += piece
        if len(content) > _LARGEST_ERROR:
            return ""
    try:
        return _said(json.loads(content))
    except (ValueError, RecursionError):
        return ""


def _said(value: object) -> str:
    """The words of an error, in any of the forms that servers use."""
    for key in ("error", "message", "detail", "msg"):
        while isinstance(value, dict) and key in value:
            value = value[key]
        if isinstance(value, list) and value:  # FastAPI lists what is wrong with each field
            value = value[0]
    return value if isinstance(value, str) else ""


def object_of(value: object) -> dict[str, Any]:
    """`value` if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def clean(text: str) -> str:
    """A text without halves of characters, which JSON can spell and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def count_of(values: dict[str, Any], name: str, otherwise: int) -> int:
    """The whole number of a name, if there is one."""
    value = values.get(name)
    return value if type(value) is int and value >= 0 else otherwise
