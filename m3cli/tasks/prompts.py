"""A conversation as what an engine takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from m3cli.prompt.segments import Content, TemplateText, encode_each

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from m3cli.prompt.chat import Message
    from m3cli.tasks.model import OpenModel


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, the first `prefix` of which do not depend on the question, and the text that ends them.

    For a server that makes its own tokens, also `messages`, roles and texts, and `variables`.
    """

    tokens: list[int]
    prefix: int
    tail: str
    messages: tuple[tuple[str, str], ...] = ()
    variables: Mapping[str, object] = field(default_factory=dict)


def encode_prompt(
    model: OpenModel, messages: Sequence[Message], varies: Content, variables: Mapping[str, object]
) -> Prompt:
    """The tokens of `messages` and of the start of the model's turn; `varies` begins what is not shared."""
    segments = model.template.render(messages, **variables)
    place = segments.index(varies) if varies in segments else 0
    encoded = encode_each(segments, model.tokenizer)
    last = segments[-1]
    return Prompt(
        tokens=[token for ids in encoded for token in ids],
        prefix=sum(map(len, encoded[:place])),
        tail=last.text if isinstance(last, TemplateText) else "",
    )
