"""A GGUF's own tokenizer, run by llama.cpp, for vocabularies that m3 cannot build itself.

Runs in the worker process, as all that uses llama.cpp does.
"""

from __future__ import annotations

import ctypes
import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3cli.engine.llama import load
from m3cli.engine.llama_library import lib, physical_cores
from m3cli.engine.pieces import cut, encode_plain
from m3cli.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

_STACK_BYTES = 16 << 20


class Vocabulary:
    """The tokenizer of a GGUF, loaded without its weights.

    `encode` gives what llama.cpp gives for the whole text, as long as the text spells no special
    token and can be cut at newlines without changing the ids, which holds for SentencePiece
    vocabularies that merge nothing across a newline.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._model = self._load()
        self._vocab = lib.llama_model_get_vocab(self._model)
        kind = lib.llama_vocab_type(self._vocab)
        if kind == lib.LLAMA_VOCAB_TYPE_NONE:
            raise ModelError(
                f"The model {Path(path).name} holds no vocabulary.", "Choose a model with a tokenizer."
            )
        self._is_bpe = kind == lib.LLAMA_VOCAB_TYPE_BPE
        # SentencePiece vocabularies put a space before text, so also before the second piece of a
        # text that was cut. llama_tokenize cannot be told not to, but the metadata can.
        self._prefix = " " if kind == lib.LLAMA_VOCAB_TYPE_SPM and self._adds_space() else ""
        if self._prefix:
            self._plain_model = self._load(add_space_prefix=False)
            self._plain_vocab = lib.llama_model_get_vocab(self._plain_model)
        else:
            self._plain_model, self._plain_vocab = None, self._vocab
        self._forbidden: dict[int, str] = {}
        self._innocent: set[int] = set()
        self.digest = self._read_tokens()

    def _load(self, add_space_prefix: bool | None = None) -> Any:
        params = lib.llama_model_default_params()
        params.vocab_only = True
        overrides = (lib.llama_model_kv_override * 2)()  # the second, empty one ends the list
        if add_space_prefix is not None:
            overrides[0].tag = lib.LLAMA_KV_OVERRIDE_TYPE_BOOL
            overrides[0].key = b"tokenizer.ggml.add_space_prefix"
            overrides[0].value.val_bool = add_space_prefix
            params.kv_overrides = overrides
        return load(self._path, params)

    def _adds_space(self) -> bool:
        value = ctypes.create_string_buffer(16)
        size = lib.llama_model_meta_val_str(
            self._model, b"tokenizer.ggml.add_space_prefix", value, len(value)
        )
        return size < 0 or value.value == b"true"  # llama.cpp's default for SentencePiece is true

    def _read_tokens(self) -> str:
        """Note the ids that content must not produce, with their texts; digest of the vocabulary.

        User-defined tokens of white space only (Gemma's runs of spaces and newlines) are how the
        model was taught to read content, and they forge nothing: they stay.
        """
        innocent = lib.LLAMA_TOKEN_ATTR_UNKNOWN | lib.LLAMA_TOKEN_ATTR_BYTE
        special = (
            innocent
            | lib.LLAMA_TOKEN_ATTR_CONTROL
            | lib.LLAMA_TOKEN_ATTR_USER_DEFINED
            | lib.LLAMA_TOKEN_ATTR_UNUSED
        )
        digest = hashlib.sha256()
        for token in range(lib.llama_vocab_n_tokens(self._vocab)):
            raw = lib.llama_vocab_get_text(self._vocab, token)
            attributes = lib.llama_vocab_get_attr(self._vocab, token)
            digest.update(b"%d %d " % (attributes, len(raw)) + raw)
            text = raw.decode("utf-8", "replace")
            if attributes & special and text.replace("\u2581", " ").strip():
                self._forbidden[token] = text
                if attributes & innocent:
                    self._innocent.add(token)
        return digest.hexdigest()[:16]

    def facts(self) -> dict[str, Any]:
        """`bos` and `eos` (id or None), `add_bos`, `size` in tokens, `digest` of the vocabulary."""
        bos, eos = lib.llama_vocab_bos(self._vocab), lib.llama_vocab_eos(self._vocab)
        return {
            "bos": bos if bos >= 0 else None,
            "eos": eos if eos >= 0 else None,
            "add_bos": bool(lib.llama_vocab_get_add_bos(self._vocab)),
            "size": int(lib.llama_vocab_n_tokens(self._vocab)),
            "digest": self.digest,
        }

    def encode(self, text: str) -> list[int]:
        """Ids of content: whatever it spells, no special or user-defined token comes out."""
        ids: list[int] = []
        for piece in cut(self._prefix + text if text else "", break_runs=self._is_bpe):
            ids += encode_plain(piece, self._tokenize_plain, self._forbidden, self._innocent)
        return ids

    def encode_template(self, text: str) -> list[int]:
        """Ids of template text: special token strings become their ids."""
        return self._tokenize(self._vocab, text, parse_special=True)

    def encode_all(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """Ids of each text, on all cores; True marks template text."""

        def encode(text: tuple[str, bool]) -> list[int]:
            return self.encode_template(text[0]) if text[1] else self.encode(text[0])

        if len(texts) == 1:
            return [encode(texts[0])]
        # llama.cpp's regex recurses deeper than the stack of a second thread is on macOS.
        previous = threading.stack_size(_STACK_BYTES)
        try:
            with ThreadPoolExecutor(physical_cores()) as pool:
                return list(pool.map(encode, texts))
        finally:
            threading.stack_size(previous)

    def _tokenize_plain(self, text: str) -> list[int]:
        return self._tokenize(self._plain_vocab, text, parse_special=False)

    @staticmethod
    def _tokenize(vocab: Any, text: str, *, parse_special: bool) -> list[int]:
        data = text.encode("utf-8", "replace")
        ids = (lib.llama_token * (len(data) + 8))()
        count = lib.llama_tokenize(vocab, data, len(data), ids, len(ids), False, parse_special)
        if count < 0:  # more tokens than bytes: the number it needs, negated
            ids = (lib.llama_token * -count)()
            count = lib.llama_tokenize(vocab, data, len(data), ids, len(ids), False, parse_special)
        return list(ids[:count])

    def close(self) -> None:
        """Free the vocabulary; may be called twice."""
        for model in (self._model, self._plain_model):
            if model:
                lib.llama_model_free(model)
        self._model = self._plain_model = None


def tokenize(model_path: str, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
    """Ids of each text; True marks template text, in which special tokens are recognized."""
    vocabulary = Vocabulary(model_path)
    try:
        return vocabulary.encode_all(texts)
    finally:
        vocabulary.close()
