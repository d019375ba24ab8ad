"""A model file opened for prompting: its facts, its tokenizer, its chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from m3cli.engine.local import LocalTokenizer
from m3cli.model import preflight
from m3cli.model.header import read_header
from m3cli.model.shape import ModelShape
from m3cli.model.token_cache import CachingTokenizer
from m3cli.model.tokenizer import load_tokenizer
from m3cli.prompt.chat import PLAIN_TEMPLATE, ChatTemplate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from m3cli.memo import Memo
    from m3cli.model.catalog import ModelRef
    from m3cli.model.header import Header
    from m3cli.model.tokens import Tokenizer


@dataclass(frozen=True, slots=True)
class ModelFile:
    """What a GGUF says of its model."""

    header: Header
    shape: ModelShape


@dataclass(frozen=True, slots=True)
class OpenModel:
    """What a prompt for this model is made with; its weights are not loaded.

    `file` is None for a model of another machine. A context manager: a tokenizer that llama.cpp runs in a
    worker ends with it.
    """

    ref: ModelRef
    context_length: int
    tokenizer: Tokenizer
    template: ChatTemplate
    notes: tuple[str, ...]
    file: ModelFile | None

    @property
    def header(self) -> Header:
        """The header of the file; only for a model that has one."""
        assert self.file is not None
        return self.file.header

    @property
    def shape(self) -> ModelShape:
        """The shape of the model; only for one that has a file."""
        assert self.file is not None
        return self.file.shape

    def __enter__(self) -> OpenModel:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End what the tokenizer holds; may be called twice."""
        if isinstance(self.tokenizer, (LocalTokenizer, CachingTokenizer)):
            self.tokenizer.close()


def open_model(ref: ModelRef, memo: Memo | None = None) -> OpenModel:
    """Read the header of `ref` and what prompting needs from it; token ids are kept in `memo`.

    Raises ModelError, naming file and place, for a file that is no complete GGUF model, and for one
    that llama.cpp cannot run as it was made.
    """
    header = read_header(ref.path)
    shape = ModelShape.from_header(header)
    if problem := preflight.problem(header, shape):
        raise problem
    tokenizer: Tokenizer = load_tokenizer(header) or LocalTokenizer(str(ref.path))
    if memo is not None:
        tokenizer = CachingTokenizer(tokenizer, memo)
    source = header.get_str("tokenizer.chat_template")
    notes = []
    if source is None:
        notes.append(
            f"{ref.name} has no chat template: it is prompted as plain text, which base models need."
        )
    tokens = header.strings("tokenizer.ggml.tokens")
    template = ChatTemplate(
        source or PLAIN_TEMPLATE,
        bos_token=_text(tokens, header.get_int("tokenizer.ggml.bos_token_id")),
        eos_token=_text(tokens, header.get_int("tokenizer.ggml.eos_token_id")),
    )
    file = ModelFile(header, shape)
    return OpenModel(ref, shape.context_length, tokenizer, template, tuple(notes), file)


def _text(tokens: Sequence[bytes], token_id: int | None) -> str:
    if token_id is None or not 0 <= token_id < len(tokens):
        return ""
    return tokens[token_id].decode("utf-8", "replace")
