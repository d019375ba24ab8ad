"""Prompts of an evaluation, and their sizes, in the tokens of one model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from m3cli.engine.events import THINK_TAGS
from m3cli.prompt.chat import Message
from m3cli.prompt.segments import Content
from m3cli.tasks.prompts import encode_prompt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from m3cli.tasks.evaluate.trial import Question
    from m3cli.tasks.model import OpenModel
    from m3cli.tasks.prompts import Prompt


class Prompter:
    """Makes prompts for `model`, whose chat template is given `variables`: a Measure, too."""

    def __init__(self, model: OpenModel, variables: Mapping[str, object]) -> None:
        self.model = model
        self._variables = variables

    def prompt(
        self,
        parts: Sequence[str],
        question: str,
        *,
        system: str = "",
        lead: str = "",
        recap: Sequence[str] = (),
    ) -> Prompt:
        """The haystack in `parts`, a recap, the question, and the start of the model's turn with `lead`.

        Reasoning that the template begins is ended at once: there is no room for it.
        """
        asked = [*map(Content, recap), Content(question)]
        messages = [Message("user", (*map(Content, parts), *asked))]
        if system:
            messages.insert(0, Message("system", (Content(system),)))
        prompt = encode_prompt(self.model, messages, asked[0], self._variables)
        tokens, tail = prompt.tokens, prompt.tail
        opened = next((tag for tag in THINK_TAGS if tail.rstrip().endswith(tag)), None)
        if opened is not None:  # by a template that cannot do without
            closing = f"\n{THINK_TAGS[opened]}\n\n"
            tokens, tail = [*tokens, *self.model.tokenizer.encode_template(closing)], tail + closing
        if lead:
            tokens = [*tokens, *self.model.tokenizer.encode(lead)]
        return replace(prompt, tokens=tokens, tail=tail)

    def count(self, parts: Sequence[str]) -> int:
        """Tokens of texts that are tokenized each on its own."""
        return sum(self.model.tokenizer.count_batch(parts))

    def room(self, length: int, max_tokens: int, questions: Sequence[Question], system: str = "") -> int:
        """Tokens for a haystack, so that the prompt of the longest question and its reply take `length`."""
        most = max(len(self.prompt((), q.text, system=system, lead=q.lead).tokens) for q in questions)
        return length - max_tokens - most
