"""The form that an answer has to have: which tokens a JSON schema allows next, by llguidance.

Runs in the worker process, as all that uses llama.cpp does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import llguidance
import llguidance.llamacpp
import llguidance.numpy
import numpy as np

from m3cli.engine.llama_library import lib
from m3cli.errors import EngineCrashError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# JSON on one line, as most of it is written: the model spends no tokens on white space.
_LAYOUT: Any = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}


def tokenizer_of(vocab: Any) -> Any:
    """A tokenizer of llguidance for a `llama_vocab`; every token that ends a generation ends an answer."""
    ends = [token for token in range(lib.llama_vocab_n_tokens(vocab)) if lib.llama_vocab_is_eog(vocab, token)]
    return llguidance.llamacpp.lltokenizer_from_vocab(vocab, eos_token=ends or None)


class Form:
    """The tokens of one answer, which together are JSON that `schema`, a JSON schema as text, describes.

    Raises UsageError for a schema that cannot be followed.
    """

    def __init__(self, tokenizer: Any, schema: str) -> None:
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=_LAYOUT)
            problem = llguidance.LLMatcher.validate_grammar(grammar, tokenizer)
        except ValueError as error:
            problem = str(error)
        if problem and not problem.startswith("WARNING"):
            raise UsageError(
                f"The schema of the answer cannot be followed: {problem.splitlines()[0].rstrip('.')}.",
                "Use a simpler JSON schema.",
            )
        self._matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
        self._mask = llguidance.numpy.allocate_token_bitmask(1, tokenizer.vocab_size)

    def allowed(self) -> NDArray[np.bool_]:
        """For each token, whether it may come next. Raises EngineCrashError when none may."""
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._mask)
        allowed = np.unpackbits(self._mask[0].view(np.uint8), bitorder="little").view(np.bool_)
        if self._matcher.is_error() or not allowed.any():
            raise EngineCrashError(
                f"The answer could not be kept in its form: {self._matcher.get_error() or 'no token fits'}.",
                "Run the command again with --debug and report this.",
            )
        return allowed

    def accept(self, token: int) -> None:
        """Go on behind `token`, one of those that are allowed."""
        self._matcher.consume_token(token)
