"""How large a context this run needs, and how its window is divided."""

from __future__ import annotations

from dataclasses import dataclass

from m3cli.errors import DoesNotFitError

# llama.cpp rounds contexts up to this many cells.
_CELLS = 256
_MOST_ANSWER_TOKENS = 2048
_ANSWER_SHARE = 4  # unless told, an answer takes at most a fourth of the window


@dataclass(frozen=True, slots=True)
class Window:
    """A context of `size` tokens, of which `answer` are kept for what the model writes."""

    size: int
    answer: int

    def room(self, fixed: int) -> int:
        """Tokens left for the corpus beside `fixed` ones of instructions and question.

        Raises DoesNotFitError, with the numbers, when there are none.
        """
        room = self.size - self.answer - fixed
        if room <= 0:
            raise DoesNotFitError(
                f"A context of {self.size:,} tokens is too small: instructions and question take {fixed:,}, "
                f"the answer {self.answer:,}.",
                "Use a larger --ctx, a smaller --max-tokens, or a shorter question.",
            )
        return room

    def n_ctx(self, prompt_tokens: int) -> int:
        """The smallest context, in tokens, that holds this prompt and its answer."""
        wanted = prompt_tokens + self.answer
        return min(self.size, -(-wanted // _CELLS) * _CELLS)


def plan_window(context_length: int, ctx: int = 0, max_tokens: int = 0) -> Window:
    """Divide the model's `context_length`, or `ctx` of it if that is not 0.

    `max_tokens` 0 reserves 2,048 tokens for the answer, or a fourth of a smaller window. Raises
    DoesNotFitError when more is asked for than the model was trained on.
    """
    if ctx > context_length:
        raise DoesNotFitError(
            f"A context of {ctx:,} tokens was asked for, and this model was trained on {context_length:,}.",
            "Use a smaller --ctx, or a model with a longer context.",
        )
    size = ctx or context_length
    answer = max_tokens or min(_MOST_ANSWER_TOKENS, size // _ANSWER_SHARE)
    return Window(size, answer)
