"""A checkpoint's tokenizer and chat template, as GGUF keys.

MiniMax-M3's tokenizer is byte-level BPE with the split pattern of o200k, which llama.cpp calls
`minimax-m2`. Ids, merges and special tokens come from `tokenizer.json`, the rest from the files beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import gguf

from m3cli.errors import ModelError
from m3cli.model.pretokenizers import PATTERNS
from quantize.hparams import read_json

if TYPE_CHECKING:
    from pathlib import Path

    from quantize.hparams import HParams

PRE_TOKENIZER = "minimax-m2"

_HINT = "Take tokenizer.json from the published checkpoint, as it stands beside the weights."
_T = TypeVar("_T")


def add_vocabulary(writer: gguf.GGUFWriter, directory: Path, hparams: HParams) -> list[str]:
    """Write the tokenizer of the checkpoint in `directory`; return what the user should know of it.

    Ids that no token has, up to `vocab_size`, become unused ones. Raises ModelError, naming the file,
    for a tokenizer of another kind, and when no token ends a turn.
    """
    path = directory / "tokenizer.json"
    tokenizer = read_json(path)
    tokens, types = _tokens(path, tokenizer, hparams.vocab_size)
    _check_splits(path, tokenizer)
    try:
        special = gguf.SpecialVocab(directory, load_merges=True, n_vocab=hparams.vocab_size)
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise ModelError(f"The tokenizer files in {directory} cannot be read: {error}.", _HINT) from error
    if not special.merges:
        raise ModelError(f"{path} has no merges.", _HINT)
    if "eos" not in special.special_token_ids:
        raise ModelError(
            f"No token of {directory} ends a turn: tokenizer_config.json names no eos_token.",
            "Take tokenizer_config.json from the published checkpoint.",
        )
    special.add_special_token.setdefault("bos", False)  # the chat template writes it
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special.add_to_gguf(writer, quiet=True)
    if special.chat_template is None:
        return [f"{directory} holds no chat template, so the model will be prompted as plain text."]
    return []


def _tokens(path: Path, tokenizer: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Text and type of every id."""
    model = _part(path, tokenizer, "model", dict)
    vocabulary = _part(path, model, "vocab", dict)
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ModelError(f"{path} is of type {model.get('type')}, not byte-level BPE.", _HINT)
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(gguf.TokenType.UNUSED)] * size

    def put(text: object, token_id: object, kind: gguf.TokenType) -> None:
        if not isinstance(text, str) or type(token_id) is not int or not 0 <= token_id < size:
            raise ModelError(
                f"{path} gives the token {text!r} the id {token_id!r}; the model has {size:,} ids.", _HINT
            )
        if types[token_id] != gguf.TokenType.UNUSED and tokens[token_id] != text:
            raise ModelError(f"{path} gives both {tokens[token_id]!r} and {text!r} the id {token_id}.", _HINT)
        tokens[token_id], types[token_id] = text, int(kind)

    for text, token_id in vocabulary.items():
        put(text, token_id, gguf.TokenType.NORMAL)
    for added in _part(path, tokenizer, "added_tokens", list):
        if not isinstance(added, dict):
            raise ModelError(f"{path} lists {added!r} among added_tokens.", _HINT)
        kind = gguf.TokenType.CONTROL if added.get("special") else gguf.TokenType.USER_DEFINED
        put(added.get("content"), added.get("id"), kind)
    return tokens, types


def _check_splits(path: Path, tokenizer: dict[str, Any]) -> None:
    """Refuse a tokenizer that cuts text before merging in another way than llama.cpp will."""
    steps = _part(path, tokenizer, "pre_tokenizer", dict)
    steps = steps.get("pretokenizers", [steps])
    patterns = [
        step.get("pattern", {}).get("Regex")
        for step in steps
        if isinstance(step, dict) and isinstance(step.get("pattern", {}), dict)
    ]
    if [pattern for pattern in patterns if pattern is not None] != [PATTERNS[PRE_TOKENIZER]]:
        raise ModelError(
            f"{path} splits text by another pattern than MiniMax-M3's, which is the one that llama.cpp will "
            "use: every prompt would be tokenized wrongly.",
            "m3 converts MiniMax-M3; for a model with another tokenizer, use llama.cpp's own converter.",
        )


def _part(path: Path, values: dict[str, Any], key: str, kind: type[_T]) -> _T:
    value = values.get(key)
    if not isinstance(value, kind):
        raise ModelError(f"{path} has no '{key}' that is a {kind.__name__}.", _HINT)
    return value
