"""How spans of documents are written down: the contract, and the form that models see."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from m3cli.corpus.types import Chunk


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring chunks of one document, in order; `whole` if they are all of it."""

    chunks: tuple[Chunk, ...]
    whole: bool

    @property
    def path(self) -> str:
        """Path of the document."""
        return self.chunks[0].path

    @property
    def start_line(self) -> int:
        """First line, counted from 1."""
        return self.chunks[0].start_line

    @property
    def end_line(self) -> int:
        """Last line, included."""
        return self.chunks[-1].end_line


class Layout(Protocol):
    """One written form of a pack.

    A pack is `opening`, a tree if there is one, the spans with `separator` between them, and
    `closing`; a span is its header, the body of each chunk, and its footer. Whatever a body
    holds, a reader of the form can tell it from the form's own marks.
    """

    opening: str
    separator: str
    closing: str

    def tree(self, text: str) -> str:
        """The list of all files, `text` with one entry a line."""
        ...

    def header(self, span: Span) -> str:
        """What stands before the span's first body."""
        ...

    def body(self, chunk: Chunk) -> str:
        """The chunk's text in this form; depends on the chunk alone."""
        ...

    def footer(self, span: Span) -> str:
        """What stands after the span's last body."""
        ...


def attribute(text: str) -> str:
    """`text` for use between double quotes in a tag."""
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")


class PromptLayout:
    """Tagged files with every line numbered, so that a model can cite `path:12-18`.

    The number in front of each line also keeps content apart from tags: a line of a file can
    spell `</file>`, but never at the start of a line. (A line ends at a line feed, as in editors.)
    """

    opening = ""
    separator = ""
    closing = ""

    def tree(self, text: str) -> str:
        """All files of the corpus, those left out included."""
        return f"<tree>\n{attribute(text)}</tree>\n"

    def header(self, span: Span) -> str:
        """An opening tag with path, and lines where the span is only a part."""
        lines = "" if span.whole else f' lines="{span.start_line}-{span.end_line}"'
        return f'<file path="{attribute(span.path)}"{lines}>\n'

    def body(self, chunk: Chunk) -> str:
        """Numbered lines; both parts of a line that was cut carry its number."""
        return number_lines(chunk)

    def footer(self, span: Span) -> str:  # noqa: ARG002 - the contract's argument
        """The closing tag."""
        return "</file>\n"


def number_lines(chunk: Chunk) -> str:
    """The chunk's lines with `12: ` in front of each, always ending in a newline.

    A line that marks a gap has no number.
    """
    lines = chunk.text.split("\n")
    if lines[-1] == "":
        lines.pop()
    if chunk.numbers is None:
        return "".join([f"{number}: {line}\n" for number, line in enumerate(lines, chunk.start_line)])
    numbered = zip(chunk.numbers, lines, strict=True)
    return "".join([f"{number}: {line}\n" if number else f"{line}\n" for number, line in numbered])


def numbered(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """`chunks` with a number in front of each line of their texts."""
    for chunk in chunks:
        yield replace(chunk, text=number_lines(chunk))
