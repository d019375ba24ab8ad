"""Packs in the form of a user's own template: Jinja, in a sandbox.

A template sees `files`, each with `path`, `text`, `start_line`, `end_line` (counted from 1), `whole` (not a
part of a file) and `language` (the suffix); `tree`, the list of all files as text; `omitted`, how many chunks
the budget left out; and `query`. Texts are put in as they are: what keeps a file's text from looking like the
template's own is up to the template. The filters `xml`, `tojson` and `fence` help with that.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from m3cli.errors import DoesNotFitError, UsageError
from m3cli.prompt.export import fence
from m3cli.prompt.layout import attribute
from m3cli.prompt.pack import pack_chunks
from m3cli.prompt.tree import compact_tree

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import jinja2

    from m3cli.corpus.types import Chunk
    from m3cli.prompt.layout import Span
    from m3cli.prompt.pack import CountBatch, Pack


class Template:
    """A compiled template. `name` is what messages call it. Raises UsageError where it is malformed."""

    def __init__(self, source: str, name: str) -> None:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
        )
        environment.filters["xml"] = attribute
        environment.filters["fence"] = fence
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        self._name = name
        try:
            self._template: jinja2.Template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(
                f"The template {name} has an error in line {error.lineno}: {error.message}.",
                "Templates are written in Jinja: https://jinja.palletsprojects.com/templates",
            ) from error

    def render(self, pack: Pack, paths: Iterable[str], query: str) -> str:
        """The text that shows `pack`. Raises UsageError when the template fails."""
        tree = compact_tree(sorted(set(paths), key=lambda path: path.split("/")), lambda _: True)
        try:
            return self._template.render(
                files=list(map(_file, pack.spans)), tree=tree, omitted=len(pack.omitted), query=query
            )
        except Exception as error:  # whatever its expressions raise
            raise UsageError(f"The template {self._name} fails: {error}.", "Correct the template.") from error


def pack_template(
    template: Template,
    chunks: Sequence[Chunk],
    count: CountBatch,
    *,
    budget: int | None = None,
    question: str = "",
) -> Pack:
    """Like `pack_chunks`, in the form of `template`: `tokens` are those of the whole rendered text.

    Raises DoesNotFitError when not even one chunk fits, UsageError when the template fails.
    """
    room = budget
    while True:
        pack = pack_chunks(chunks, count, budget=room, question=question, layout=_Bare())
        paths = [chunk.path for chunk in (*pack.chunks, *pack.omitted)]
        text = template.render(pack, paths, question)
        tokens = sum(count([text]))
        if budget is None or tokens <= budget:
            needed = pack.tokens_needed if pack.omitted else tokens
            return replace(pack, parts=(text,), tokens=tokens, tokens_needed=needed)
        # What the template adds is known only now; most of it is there again with fewer files.
        room = max(pack.tokens - (tokens - budget), pack.tokens // 2)
        if not room:
            raise DoesNotFitError(
                f"There is room for {budget:,} tokens; the template takes more by itself.",
                "Make more room with --budget, or shorten the template.",
            )


class _Bare:
    """The texts alone."""

    opening = ""
    separator = ""
    closing = ""

    def tree(self, text: str) -> str:  # noqa: ARG002 - the contract's argument
        return ""

    def header(self, span: Span) -> str:  # noqa: ARG002 - the contract's argument
        return ""

    def body(self, chunk: Chunk) -> str:
        return chunk.text

    def footer(self, span: Span) -> str:  # noqa: ARG002 - the contract's argument
        return ""


def _file(span: Span) -> dict[str, Any]:
    """What a template sees of a file, or of a run of its lines."""
    name = span.path.rsplit("/", 1)[-1]
    return {
        "path": span.path,
        "text": "".join(chunk.text for chunk in span.chunks),
        "start_line": span.start_line,
        "end_line": span.end_line,
        "whole": span.whole,
        "language": name.rsplit(".", 1)[-1] if "." in name[1:] else "",
    }
