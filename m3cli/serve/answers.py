"""Answers in the form of OpenAI's API: objects, chunks of a stream, errors, and where an answer stops."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any

from m3cli.engine.events import Finished, Restored, Stopped, Token
from m3cli.errors import DoesNotFitError, ImpossibleError, M3Error, UsageError
from m3cli.serve.fields import RequestError
from m3cli.serve.scheduler import BusyError, ClosingError, shutting_down
from m3cli.tasks.thinking import ThinkingSplitter

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from m3cli.engine.events import Event
    from m3cli.tasks.thinking import Kind

UNFORESEEN = "The server failed unexpectedly; its log says how."


class StopScanner:
    """Finds the first of some texts in a stream, and holds back what may be the beginning of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """What can be shown now: nothing of a stop text, nor of what follows one."""
        if self.found:
            return ""
        self._held += text
        place, begun = self._place(), len(self._held) - self._begun()
        # One that begins before it and is not complete yet would be the first.
        self.found = place is not None and place <= begun
        return self._cut(begun if place is None else min(place, begun))

    def flush(self) -> str:
        """What was held back when the stream has ended."""
        if self.found:
            return ""
        place = self._place()
        self.found = place is not None
        return self._cut(len(self._held) if place is None else place)

    def _place(self) -> int | None:
        """Where the first stop text begins, if there is one."""
        return min((place for place in map(self._held.find, self._stops) if place >= 0), default=None)

    def _begun(self) -> int:
        """Characters at the end that may be the beginning of a stop text."""
        longest = max(map(len, self._stops), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-size:]
            if any(stop.startswith(end) for stop in self._stops):
                return size
        return 0

    def _cut(self, place: int) -> str:
        shown, self._held = self._held[:place], self._held[place:]
        return shown


class Answer:
    """One answer, as an object or in chunks. `kind` is `chat.completion` or `text_completion`."""

    def __init__(self, kind: str, model: str) -> None:
        self._kind = kind
        self._chat = kind == "chat.completion"
        prefix = "chatcmpl" if self._chat else "cmpl"
        self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, text: str, reasoning: str, reason: str, usage: dict[str, Any]) -> dict[str, Any]:
        """The object of an answer that is not streamed."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text}
            if reasoning:
                choice["message"]["reasoning_content"] = reasoning
        else:
            choice["text"] = text
        return {**self._head, "object": self._kind, "choices": [choice], "usage": usage}

    def chunk(self, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
        """A piece of a stream; `delta` has `role`, `content` or `reasoning_content`."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        if self._chat:
            choice["delta"] = delta
        else:
            choice["text"] = delta.get("content", "")
        return self._chunk([choice])

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last piece of a stream for who asked for it."""
        return {**self._chunk([]), "usage": usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            **self._head,
            "object": "chat.completion.chunk" if self._chat else self._kind,
            "choices": choices,
        }


class Reading:
    """What becomes of the events of one answer: pieces of reasoning and of text, and at last a `reason`.

    `tail` is the text that the prompt ends with; None is for text that is no conversation, whose think tags
    are text.
    """

    def __init__(self, prompt_tokens: int, stops: tuple[str, ...], tail: str | None) -> None:
        self._splitter = ThinkingSplitter(tail) if tail is not None else None
        self._scanner = StopScanner(stops)
        self._prompt_tokens = prompt_tokens
        self.generated = 0
        self.restored = 0
        self.reason: str | None = None

    def feed(self, event: Event) -> Iterator[tuple[Kind, str]]:
        """The pieces that an event adds. Raises ClosingError for an answer that the server has stopped."""
        if isinstance(event, Restored):
            self.restored = event.tokens
        elif isinstance(event, Token):
            self.generated += 1
            yield from self._pieces(
                self._splitter.feed(event.text) if self._splitter else [("answer", event.text)]
            )
        elif isinstance(event, Finished):
            yield from self._pieces(self._splitter.flush() if self._splitter else [])
            if rest := self._scanner.flush():
                yield "answer", rest
            self.reason = "stop" if self._scanner.found else event.reason
        elif isinstance(event, Stopped):
            raise shutting_down()

    def _pieces(self, pieces: Iterable[tuple[Kind, str]]) -> Iterator[tuple[Kind, str]]:
        for kind, text in pieces:
            shown = self._scanner.feed(text) if kind == "answer" else text
            if shown:
                yield kind, shown
            if self._scanner.found:
                self.reason = "stop"

    def usage(self) -> dict[str, Any]:
        """Tokens that the answer took, those that did not have to be computed among them."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self.generated,
            "total_tokens": self._prompt_tokens + self.generated,
            "prompt_tokens_details": {"cached_tokens": self.restored},
        }


def error_of(error: Exception) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of an error. What m3 did not foresee is not described to a client."""
    status, message, param, code = 500, UNFORESEEN, None, None
    if isinstance(error, RequestError):
        status, message, param, code = error.status, error.message, error.param, error.code
    elif isinstance(error, BusyError):
        status, message, code = 429, str(error), "queue_full"
    elif isinstance(error, ClosingError):
        status, message, code = 503, str(error), "shutting_down"
    elif isinstance(error, DoesNotFitError):
        status, message, code = 400, str(error), "context_length_exceeded"
    elif isinstance(error, UsageError):
        status, message = 400, str(error)
    elif isinstance(error, ImpossibleError):
        status, message, code = 500, str(error), "impossible"
    elif isinstance(error, M3Error):
        message, code = str(error), "engine_failed"
    kind = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error"}
    otherwise = "invalid_request_error" if status < 500 else "server_error"
    body = {"message": message, "type": kind.get(status, otherwise), "param": param, "code": code}
    return status, {"error": body}
