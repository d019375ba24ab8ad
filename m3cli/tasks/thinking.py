"""Tell a model's reasoning from its answer while both stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from m3cli.engine.events import THINK_TAGS

if TYPE_CHECKING:
    from collections.abc import Iterator

Kind = Literal["thinking", "answer"]

_CLOSERS = frozenset(THINK_TAGS.values())


class ThinkingSplitter:
    """Splits streamed text at think tags, wherever the pieces are cut.

    Tags count only where reasoning models write them: one opening tag before anything else of the
    answer, and the closing tag that belongs to it. After that, a tag is text: an answer may be
    about think tags. `prompt_tail` is the end of the prompt: templates of reasoning models may
    open the tag themselves, or close it at once.
    """

    def __init__(self, prompt_tail: str = "") -> None:
        tail = prompt_tail.rstrip()
        opened = next((tag for tag in THINK_TAGS if tail.endswith(tag)), None)
        closed = any(tail.endswith(tag) for tag in _CLOSERS)
        self._closer = THINK_TAGS[opened] if opened else ""
        self._state: Literal["start", "thinking", "after", "answer"] = (
            "thinking" if opened else "after" if closed else "start"
        )
        self._held = ""

    def feed(self, text: str) -> Iterator[tuple[Kind, str]]:
        """What of the text so far is certain, as (kind, text) pieces without the tags."""
        self._held += text
        if self._state == "start":
            yield from self._start()
        if self._state == "thinking":
            yield from self._thinking()
        if self._state == "after":  # blank lines between reasoning and answer belong to neither
            self._held = self._held.lstrip()
            if self._held:
                self._state = "answer"
        if self._state == "answer" and self._held:
            held, self._held = self._held, ""
            yield "answer", held

    def flush(self) -> Iterator[tuple[Kind, str]]:
        """What is still held when the stream has ended."""
        held, self._held = self._held, ""
        if held:
            yield ("thinking" if self._state == "thinking" else "answer"), held

    def _start(self) -> Iterator[tuple[Kind, str]]:
        seen = self._held.lstrip()
        for tag, closer in THINK_TAGS.items():
            if seen.startswith(tag):
                self._state, self._closer, self._held = "thinking", closer, seen[len(tag) :]
                return
        for closer in _CLOSERS:  # models whose template opened the tag out of our sight
            if seen.startswith(closer):
                self._state, self._held = "after", seen[len(closer) :]
                return
        if seen and not any(tag.startswith(seen) for tag in [*THINK_TAGS, *_CLOSERS]):
            self._state = "answer"
        yield from ()

    def _thinking(self) -> Iterator[tuple[Kind, str]]:
        before, tag, after = self._held.partition(self._closer)
        if tag:
            self._state, self._held = "after", after
        else:
            longest = min(len(before), len(self._closer) - 1)
            keep = next((n for n in range(longest, 0, -1) if self._closer.startswith(before[-n:])), 0)
            before, self._held = before[: len(before) - keep], before[len(before) - keep :]
        if before:
            yield "thinking", before
