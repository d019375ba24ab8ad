"""The forms in which `m3 pack` writes a pack for other tools to read."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from m3cli.prompt.layout import attribute

if TYPE_CHECKING:
    from m3cli.corpus.types import Chunk
    from m3cli.prompt.layout import Layout, Span

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_CONTROLS = bytes(byte for byte in range(0x20) if byte not in b"\t\n\r")
_BACKTICKS = re.compile("`{3,}")


class XmlLayout:
    """Well-formed XML; texts stand verbatim in CDATA sections.

    Characters that XML cannot hold (control characters) become U+FFFD.
    """

    opening = "<documents>\n"
    separator = ""
    closing = "</documents>\n"

    def tree(self, text: str) -> str:
        """A `tree` element."""
        return f"<tree><![CDATA[\n{self._verbatim(text)}]]></tree>\n"

    def header(self, span: Span) -> str:
        """A `document` element with its path and lines."""
        path = attribute(_NOT_XML.sub("\ufffd", span.path))
        return f'<document path="{path}" lines="{span.start_line}-{span.end_line}"><![CDATA[\n'

    def body(self, chunk: Chunk) -> str:
        """The text; an end mark of CDATA in it is split over two sections."""
        text = self._verbatim(chunk.text)
        # the chunk before may end in what this one completes to `]]>`
        return f"]]><![CDATA[{text}" if text.startswith((">", "]>")) else text

    def footer(self, span: Span) -> str:  # noqa: ARG002 - the contract's argument
        """The end of the section and the element."""
        return "]]></document>\n"

    def _verbatim(self, text: str) -> str:
        # (nearly all texts are plain ASCII, and translation sees that faster than a pattern)
        if not text.isascii() or len(text.encode().translate(None, _CONTROLS)) != len(text):
            text = _NOT_XML.sub("\ufffd", text)
        return text.replace("]]>", "]]]]><![CDATA[>")


class MarkdownLayout:
    """A heading and a fenced block a document; fences are longer than any in the text."""

    opening = ""
    separator = "\n"
    closing = ""

    def tree(self, text: str) -> str:
        """A fenced block."""
        marks = fence(text)
        return f"## Files\n\n{marks}\n{text}{marks}\n\n"

    def header(self, span: Span) -> str:
        """A heading with the path, and the opening fence with the file's suffix as language."""
        lines = "" if span.whole else f" (lines {span.start_line}-{span.end_line})"
        name = span.path.rsplit("/", 1)[-1]
        language = name.rsplit(".", 1)[-1] if "." in name[1:] else ""
        if not re.fullmatch(r"[A-Za-z0-9+#_-]{1,15}", language):
            language = ""
        return f"## {_inline_code(span.path)}{lines}\n\n{fence(_text(span))}{language}\n"

    def body(self, chunk: Chunk) -> str:
        """The text as it is."""
        return chunk.text

    def footer(self, span: Span) -> str:
        """The closing fence on a line of its own."""
        newline = "" if span.chunks[-1].text.endswith("\n") else "\n"
        return f"{newline}{fence(_text(span))}\n"


class JsonLayout:
    """One JSON object: `{"files": [{"path", "start_line", "end_line", "text"}, …]}`."""

    opening = '{"files": [\n'
    separator = ",\n"
    closing = "\n]}\n"

    def tree(self, text: str) -> str:  # noqa: ARG002 - the contract's argument
        """Nothing: the manifest, not the text, is what programs read."""
        return ""

    def header(self, span: Span) -> str:
        """The object up to the opening quote of its text."""
        path = json.dumps(span.path, ensure_ascii=False)
        return f'{{"path": {path}, "start_line": {span.start_line}, "end_line": {span.end_line}, "text": "'

    def body(self, chunk: Chunk) -> str:
        """The inside of a JSON string."""
        return json.dumps(chunk.text, ensure_ascii=False)[1:-1]

    def footer(self, span: Span) -> str:  # noqa: ARG002 - the contract's argument
        """The closing quote and brace."""
        return '"}'


class PlainLayout:
    """Headers like `head` prints, each with the number of lines that follow it.

    That number is what tells a header from a line of a file that looks like one.
    """

    opening = ""
    separator = "\n"
    closing = ""

    def tree(self, text: str) -> str:
        """The list as it is, under a header of its own."""
        return f"==> files ({text.count(chr(10))} lines follow) <==\n{text}\n"

    def header(self, span: Span) -> str:
        """Path, first line, and how many lines follow."""
        text = _text(span)
        count = text.count("\n") + (not text.endswith("\n"))
        return f"==> {span.path}:{span.start_line} ({count} lines follow) <==\n"

    def body(self, chunk: Chunk) -> str:
        """The text as it is."""
        return chunk.text

    def footer(self, span: Span) -> str:
        """A newline where the text lacks one."""
        return "" if span.chunks[-1].text.endswith("\n") else "\n"


FORMATS: dict[str, Layout] = {
    "xml": XmlLayout(),
    "markdown": MarkdownLayout(),
    "json": JsonLayout(),
    "plain": PlainLayout(),
}


def _text(span: Span) -> str:
    return "".join(chunk.text for chunk in span.chunks)


def fence(text: str) -> str:
    """Backticks that no line of `text` can close."""
    return "`" * max([2, *map(len, _BACKTICKS.findall(text))]) + "`"


def _inline_code(text: str) -> str:
    """`text` as a Markdown code span, whatever backticks it holds."""
    ticks = "`" * (1 + max([0, *map(len, re.findall("`+", text))]))
    # (a parser takes one blank off both ends of a span, if both have one)
    pad = " " if "`" in (text[:1], text[-1:]) or (text[:1] == text[-1:] == " " and text.strip(" ")) else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"
