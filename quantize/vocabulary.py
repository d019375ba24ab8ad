"""A checkpoint's tokenizer and chat template, as GGUF keys.

MiniMax-M3's tokenizer is byte-level BPE with the split pattern of o200k, which llama.cpp calls
`minimax-m2`. Ids, merges and special tokens come from `tokenizer.json`, the rest from the files beside it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import gguf

from m3cli.errors import ModelError
from m3cli.model.pretokenizers import PATTERNS
from quantize.hparams import read_json

if TYPE_CHECKING:
    from pathlib import Path

    from quantize.hparams import HParams

PRE_TOKENIZER = "minimax-m2"

_HINT = "Take tokenizer.json from the published checkpoint, as it stands beside the weights."
# Ways to say that text is cut into matches of a pattern that matches everything.
_KEEP_ALL = (("Isolated", False), ("Isolated", True), ("Removed", True))
_SURROGATE = re.compile("[\ud800-\udfff]")
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
        special = gguf.SpecialVocab(directory, n_vocab=hparams.vocab_size)
        special.chat_template = _chat_template(directory, special.chat_template)
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise ModelError(f"The tokenizer files in {directory} cannot be read: {error}.", _HINT) from error
    if "eos" not in special.special_token_ids:
        raise ModelError(
            f"No token of {directory} ends a turn: tokenizer_config.json names no eos_token among those that "
            "tokenizer.json adds.",
            "Take tokenizer_config.json from the published checkpoint.",
        )
    special.merges = _merges(path, tokenizer)
    special.add_special_token.setdefault("bos", False)  # the chat template writes it
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special.add_to_gguf(writer, quiet=True)
    if not special.chat_template:
        return [f"{directory} holds no chat template, so the model will be prompted as plain text."]
    return []


def _tokens(path: Path, tokenizer: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Text and type of every id."""
    model = _part(path, tokenizer, "model", dict)
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        fallback = " with byte_fallback" if model.get("byte_fallback") else ""
        raise ModelError(f"{path} is of type {model.get('type')}{fallback}, not byte-level BPE.", _HINT)
    vocabulary = _part(path, model, "vocab", dict)
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(gguf.TokenType.UNUSED)] * size

    def put(text: Any, token_id: object, kind: gguf.TokenType) -> None:
        if not _is_text(text) or type(token_id) is not int or not 0 <= token_id < size:
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
    if len(set(tokens)) < size:  # which llama.cpp aborts at
        (twice, _), *_ = Counter(tokens).most_common(1)
        raise ModelError(f"{path} gives the token {twice!r} more than one id.", _HINT)
    return tokens, types


def _merges(path: Path, tokenizer: dict[str, Any]) -> list[str]:
    """Merges as GGUF has them, `left right`; newer files hold pairs."""
    vocabulary = tokenizer["model"]["vocab"]
    merges = []
    for merge in _part(path, tokenizer["model"], "merges", list):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(part, str) and part in vocabulary and " " not in part for part in pair)
        ):
            raise ModelError(f"{path} merges {merge!r}, which is no pair of its tokens.", _HINT)
        merges.append(" ".join(pair))
    if not merges:
        raise ModelError(f"{path} has no merges.", _HINT)
    return merges


def _chat_template(directory: Path, template: object) -> str | None:
    """Return the template of chat_template.jinja, which goes first in transformers, or else `template`.

    That may be several by name, of which the default counts. Raises ValueError for what is no text.
    """
    path = directory / "chat_template.jinja"
    if path.is_file():
        template = path.read_text(encoding="utf-8")
    if isinstance(template, list):
        defaults = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = defaults[0].get("template") if defaults else None
    if template is not None and not _is_text(template):
        raise ValueError("the chat template is no text")
    return template


def _check_splits(path: Path, tokenizer: dict[str, Any]) -> None:
    """Refuse a tokenizer that cuts text before merging in another way than llama.cpp will."""
    steps = _part(path, tokenizer, "pre_tokenizer", dict)
    match steps.get("pretokenizers"):
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ] if pattern == PATTERNS[PRE_TOKENIZER] and (behavior, invert) in _KEEP_ALL:
            return
    raise ModelError(
        f"{path} splits text in another way than MiniMax-M3's, which is the one that llama.cpp will use: "
        f"every prompt would be tokenized wrongly. It says {json.dumps(steps)[:1000]}.",
        "m3 converts MiniMax-M3; for a model with another tokenizer, use llama.cpp's own converter.",
    )


def _part(path: Path, values: dict[str, Any], key: str, kind: type[_T]) -> _T:
    value = values.get(key)
    if not isinstance(value, kind):
        raise ModelError(f"{path} has no '{key}' that is a {kind.__name__}.", _HINT)
    return value


def _is_text(value: object) -> TypeGuard[str]:
    """Whether UTF-8 can hold it: a JSON string may have halves of surrogate pairs."""
    return isinstance(value, str) and not _SURROGATE.search(value)
