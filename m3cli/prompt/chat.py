"""Chat template → segments.

The template is rendered around placeholders, never around content: what a file says cannot meet
the template engine, and cannot be mistaken for the template's own text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from m3cli.errors import ModelError
from m3cli.prompt.segments import Content, Segment, TemplateText

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import jinja2

# The format of models that bring no template of their own: plain text that base models continue.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)
# Templates that print today's date would change every cached prefix at midnight.
_FIXED_DATE = date(2026, 1, 1)
_PLACEHOLDER = re.compile("\ue000m3-part-([0-9]+)\ue001")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; its content is the parts joined."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[Content, ...]


class ChatTemplate:
    """A jinja2 chat template as GGUF files carry it in `tokenizer.chat_template`."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        self.source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}

    def render(self, messages: Sequence[Message], **variables: object) -> list[Segment]:
        """The conversation followed by the start of the model's turn, as segments.

        A template that refuses or drops the system message gets it in front of the first user
        message instead. `variables` are handed to the template (such as `thinking_mode`).
        Raises ModelError when the template fails or does not place every message exactly once.
        """
        attempts = [messages, _without_system(messages)]
        problem: ModelError | None = None
        for attempt in attempts:
            try:
                return self._render(attempt, variables)
            except ModelError as error:
                problem = problem or error
        assert problem is not None
        raise problem

    def _render(self, messages: Sequence[Message], variables: Mapping[str, object]) -> list[Segment]:
        rendered = self._run(
            [{"role": m.role, "content": f"\ue000m3-part-{i}\ue001"} for i, m in enumerate(messages)],
            variables,
        )
        pieces = _PLACEHOLDER.split(rendered)  # text, number, text, number, …, text
        if [int(n) for n in pieces[1::2]] != list(range(len(messages))):
            raise ModelError(
                "The model's chat template does not show every message once and in order.",
                "Use a GGUF of this model with its published chat template.",
            )
        segments: list[Segment] = []
        for position, piece in enumerate(pieces):
            if position % 2:
                segments.extend(part for part in messages[int(piece)].parts if part.text)
            elif piece:
                segments.append(TemplateText(piece))
        return segments

    def _run(self, messages: list[dict[str, str]], variables: Mapping[str, object]) -> str:
        try:
            return self._compiled.render(
                {**self._tokens, **variables, "messages": messages, "add_generation_prompt": True}
            )
        except Exception as error:
            raise ModelError(
                f"The model's chat template fails: {error}.",
                "Use a GGUF of this model with its published chat template.",
            ) from error

    @cached_property
    def _compiled(self) -> jinja2.Template:
        """The template, ready to render: compiling it takes longer than many renderings."""
        return _environment().from_string(self.source)


def _environment() -> jinja2.Environment:
    """The settings and extensions that Hugging Face's apply_chat_template renders with."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **layout)

    class Generation(jinja2.ext.Extension):
        """`{% generation %}…{% endgeneration %}`, which marks training text: the text alone."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's way to name them

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = _FIXED_DATE.strftime
    return environment


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """The same conversation with system messages moved into the first user message."""
    system = tuple(part for m in messages if m.role == "system" for part in m.parts)
    rest = [m for m in messages if m.role != "system"]
    for position, message in enumerate(rest):
        if message.role == "user" and system:
            rest[position] = Message("user", (*system, Content("\n\n"), *message.parts))
            break
    return rest
