"""A deterministic engine without a model, for tests of everything above the engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from m3cli.engine.events import Finished, Loaded, LoadProgress, Prefilled, Stopped, Token
from m3cli.errors import DoesNotFitError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from m3cli.engine.events import Attention, Event, Request


class FakeEngine:
    """An Engine that says what its script says, one byte a token, as the byte tokenizer has it.

    `script` is the text of every answer, or a function that makes it from the request. All
    seconds are zero, and `requests` keeps what was asked.
    """

    def __init__(
        self,
        script: str | Callable[[Request], str],
        *,
        n_ctx: int = 1 << 20,
        n_batch: int = 512,
        attention: Attention = "full",
    ) -> None:
        self._script = script
        self._attention = attention
        self._n_ctx = n_ctx
        self._n_batch = n_batch
        self.requests: list[Request] = []
        self.closed = False
        self._stopping = False

    def generate(self, request: Request) -> Iterator[Event]:
        """Stream the script. Raises DoesNotFitError as a real engine does."""
        self.requests.append(request)
        self._stopping = False
        yield LoadProgress(1.0)
        yield Loaded(0.0, self._n_ctx, "fake", self._attention)
        total = len(request.tokens)
        if total > self._n_ctx:
            raise DoesNotFitError(
                f"The prompt has {total:,} tokens, but the context holds {self._n_ctx:,}.",
                "Ask for a larger context or give fewer files.",
            )
        yield Prefilled(0, total, 0.0)
        for start in range(0, total, self._n_batch):
            yield Prefilled(min(start + self._n_batch, total), total, 0.0)
        text = self._script if isinstance(self._script, str) else self._script(request)
        # The last byte of a character brings its text, the others an empty one.
        tokens = [
            Token(byte, character if last else "")
            for character in text
            for encoded in [character.encode("utf-8")]
            for last, byte in zip([False] * (len(encoded) - 1) + [True], encoded, strict=True)
        ]
        for token in tokens[: request.max_tokens]:
            if self._stopping:
                yield Stopped(total, 0)
                return
            yield token
        reason: Literal["stop", "length"] = "stop" if len(tokens) <= request.max_tokens else "length"
        yield Finished(reason, total, min(len(tokens), request.max_tokens), 0.0, 0.0)

    def stop(self) -> None:
        """End the generation before its next token."""
        self._stopping = True

    def close(self) -> None:
        """Note that it was closed."""
        self.closed = True

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
