"""Models behind an OpenAI-compatible API: vLLM, SGLang, llama-server, `m3 serve`, hosted ones.

Prompts go there as messages, and the server makes tokens of them. What does not change from one question to
the next stands in front, so that the caches of prefixes that such servers have find it again.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

from m3cli.engine.endpoint import RemoteServer, clean, count_of, object_of
from m3cli.engine.events import THINK_TAGS, Finished, Loaded, Notice, Prefilled, Token
from m3cli.engine.interrupts import terminable
from m3cli.errors import EngineCrashError, M3Error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from typing_extensions import Self

    from m3cli.engine.endpoint import Endpoint
    from m3cli.engine.events import Event, Request

_REQUESTS = 8  # at a time, to the tokenizer
_BROKEN_OFF = frozenset({"abort", "error"})  # how servers finish an answer that they did not complete
_OPEN, _CLOSE = next(iter(THINK_TAGS.items()))


class RemoteTokenizer:
    """The tokenizer of a server: a Tokenizer, whose ids are for counting."""

    bos_id: int | None = None

    def __init__(self, server: RemoteServer, model: str) -> None:
        self._server = server
        self._model = model
        self.name = f"{server.endpoint.url} {model}"

    @classmethod
    def offered_by(cls, server: RemoteServer, model: str) -> Self | None:
        """The tokenizer of a server that has one."""
        try:
            return cls(server, model) if server.tokenize(model, "m3", patient=False) else None
        except M3Error:
            return None

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Raises M3Error."""
        return self._server.tokenize(self._model, text) if text else []

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Ids of each text, for some of them at a time."""
        with ThreadPoolExecutor(_REQUESTS) as pool:
            return list(pool.map(self.encode, texts))

    def count_batch(self, texts: Iterable[str]) -> list[int]:
        """How many ids each text has."""
        return list(map(len, self.encode_batch(texts)))

    def encode_template(self, text: str) -> list[int]:
        """Same as `encode`: the server has the chat template."""
        return self.encode(text)


class EstimatingTokenizer:
    """A Tokenizer to count with: a token for every three bytes, more than most vocabularies make of code."""

    name = "estimate"
    bos_id: int | None = None

    def encode(self, text: str) -> list[int]:
        """As many ids as a text is thought to have."""
        return [0] * -(-len(text.encode("utf-8", "replace")) // 3)

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Ids of each text."""
        return [self.encode(text) for text in texts]

    def count_batch(self, texts: Iterable[str]) -> list[int]:
        """How many ids each text is thought to have."""
        return list(map(len, self.encode_batch(texts)))

    def encode_template(self, text: str) -> list[int]:
        """Same as `encode`."""
        return self.encode(text)


class RemoteEngine:
    """An Engine that has a server answer; of a Request it sends `messages`, not `tokens`."""

    def __init__(
        self, endpoint: Endpoint, model: str, n_ctx: int, *, wait: Callable[[float], None] = time.sleep
    ) -> None:
        self._server = RemoteServer(endpoint, wait=wait)
        self._model = model
        self._n_ctx = n_ctx

    def generate(self, request: Request) -> Iterator[Event]:
        """Stream the answer to `request`; see Engine. Raises M3Error for all that a server may do."""
        with terminable():
            yield from self._generate(request)

    def _generate(self, request: Request) -> Iterator[Event]:
        yield Loaded(0.0, self._n_ctx, f"{self._model} at {self._server.endpoint.host}", "full")
        total = len(request.tokens)
        begin = time.monotonic()
        yield Prefilled(0, total, 0.0)
        usage: dict[str, Any] = {}
        cached = 0
        reason: Literal["stop", "length"] | None = None
        first, pieces = 0.0, 0
        tags = _Tags(shown=not request.schema)
        try:
            for chunk in self._server.stream(self._body(request)):
                if isinstance(chunk, Notice):
                    yield chunk
                    continue
                usage = object_of(chunk.get("usage")) or usage
                cached = count_of(object_of(chunk.get("timings")), "cache_n", cached)  # llama-server's
                choices = chunk.get("choices")
                choice = object_of(choices[0]) if isinstance(choices, list) and choices else {}
                delta = object_of(choice.get("delta")) or object_of(choice.get("message"))
                reasoning, content = _text(delta, "reasoning_content", "reasoning"), _text(delta, "content")
                if reasoning or content:
                    if not pieces:
                        first = time.monotonic()
                        yield Prefilled(total, total, first - begin)
                    pieces += 1
                if text := tags.around(reasoning, content):
                    yield Token(-1, text)
                ended = choice.get("finish_reason")
                if ended and ended not in _BROKEN_OFF:
                    reason = "length" if ended == "length" else "stop"
                    if ended == "content_filter":
                        yield Notice(
                            f"{self._server.endpoint.host} has cut the answer by its content filter."
                        )
        except EngineCrashError:  # a connection that breaks behind the end of an answer
            if reason is None:
                raise
        if reason is None:
            how = "its answer in the middle" if pieces else "without an answer"
            raise EngineCrashError(
                f"The server at {self._server.endpoint.url} ended {how}.",
                "Run the command again, or look at the server's log.",
            )
        first = first or time.monotonic()
        yield Finished(
            reason,
            count_of(usage, "prompt_tokens", total),
            count_of(usage, "completion_tokens", pieces),
            first - begin,
            time.monotonic() - first,
            count_of(object_of(usage.get("prompt_tokens_details")), "cached_tokens", cached),
        )

    def _body(self, request: Request) -> dict[str, Any]:
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": role, "content": clean(text)} for role, text in request.messages],
            "max_tokens": max(request.max_tokens, 1),
            "temperature": sampling.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if sampling.temperature:
            body |= {"top_p": sampling.top_p, "seed": sampling.seed}
            if sampling.min_p:
                body["min_p"] = sampling.min_p
        if sampling.repeat_penalty != 1.0:  # by the name that vLLM and SGLang have for it, and llama-server's
            body |= dict.fromkeys(("repetition_penalty", "repeat_penalty"), sampling.repeat_penalty)
        if request.schema:
            schema = {"name": "answer", "strict": True, "schema": json.loads(request.schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if request.variables:
            body["chat_template_kwargs"] = dict(request.variables)
        return body

    def stop(self) -> None:
        """Nothing: whoever reads the generation ends it by leaving."""

    def close(self) -> None:
        """End the connection; may be called twice."""
        self._server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class _Tags:
    """Puts reasoning between tags in front of the answer, as models without a server write it.

    Reasoning that comes later has no place in an answer, nor has any in one whose form is given: `shown` off.
    """

    def __init__(self, *, shown: bool) -> None:
        self._state: Literal["start", "thinking", "answer"] = "start" if shown else "answer"

    def around(self, reasoning: str, content: str) -> str:
        """The text of a piece of reasoning and one of the answer."""
        text = ""
        if reasoning and self._state != "answer":
            text = reasoning if self._state == "thinking" else f"{_OPEN}{reasoning}"
            self._state = "thinking"
        if self._state != "answer" and content.strip():
            text += _CLOSE if self._state == "thinking" else ""
            self._state = "answer"
        return text + content if self._state == "answer" else text


def _text(values: dict[str, Any], *names: str) -> str:
    """The first text of these names that is not empty."""
    return clean(next((value for name in names if isinstance(value := values.get(name), str) and value), ""))
