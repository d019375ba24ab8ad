"""Trusted template text and untrusted content, as different types.

This is the security boundary of the program. Only `TemplateText`, which comes from the model's
own chat template, may become special tokens. `Content` comes from files, diffs, standard input
and questions; whatever it spells, it is encoded as plain text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from m3cli.model.tokens import Tokenizer


@dataclass(frozen=True, slots=True)
class TemplateText:
    """Text of the chat template; strings of special tokens in it become those tokens."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """Text from outside; encoded on its own, so that its tokens do not depend on what follows."""

    text: str


Segment = TemplateText | Content


def encode_segments(segments: Sequence[Segment], tokenizer: Tokenizer) -> list[int]:
    """Token ids of `segments` in order, begun with the model's BOS token if it wants one.

    Each content segment is encoded by itself: token counts of segments add up exactly, and equal
    leading segments give equal leading tokens.
    """
    return [token for ids in encode_each(segments, tokenizer) for token in ids]


def encode_each(segments: Sequence[Segment], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of each segment; the BOS token that `encode_segments` begins with is the first one's."""
    contents = iter(tokenizer.encode_batch([s.text for s in segments if isinstance(s, Content)]))
    encoded = [
        next(contents) if isinstance(segment, Content) else tokenizer.encode_template(segment.text)
        for segment in segments
    ]
    first = next((ids[0] for ids in encoded if ids), None)
    if tokenizer.bos_id is not None and first != tokenizer.bos_id and encoded:
        encoded[0] = [tokenizer.bos_id, *encoded[0]]
    return encoded
