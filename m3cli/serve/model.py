"""The model of a server: prompts for it, and an engine whose context grows with what is asked of it."""

from __future__ import annotations

import sys
import threading
from array import array
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from m3cli.engine.events import Request
from m3cli.errors import DoesNotFitError, ModelError
from m3cli.prompt.chat import Message
from m3cli.prompt.segments import Content
from m3cli.prompt.thinking import think_variables
from m3cli.serve.fields import RequestError
from m3cli.tasks.context import Context, Turn
from m3cli.tasks.prompts import encode_prompt

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from m3cli.engine.events import Engine
    from m3cli.serve.calls import Call, ChatCall, CompletionCall, Said
    from m3cli.tasks.context import ContextRequest
    from m3cli.tasks.stepping import OpenEngine

CORPUS = "corpus"  # the model's name for who asks about the files that are served with it
_LEAST_CONTEXT = 8192  # tokens; a context that grows with each request would be made anew each time
_ROOM = 4  # answers
_LONGEST_TOKEN = 32  # characters, on average over a whole prompt
_BATCH = 512  # tokens, of which batches of prefill are multiples


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request for the engine in a context of `n_ctx` tokens. `tail` is the text that the prompt ends on."""

    request: Request
    n_ctx: int
    tail: str = ""


class ServedModel:
    """What a server knows of its model. Prompts may be made by several threads, one at a time.

    `engine_for` belongs to the scheduler's thread alone. Of the files of `request`, if there are any, each
    request reads what has changed.
    """

    def __init__(
        self,
        request: ContextRequest,
        *,
        open_engine: OpenEngine,
        stdin: Callable[[], bytes],
        report: Callable[[str], None],
    ) -> None:
        self._request = request
        self._open_engine = open_engine
        self._stdin = stdin
        self._report = report
        self._making = threading.Lock()
        self._engine: Engine | None = None
        self._n_ctx = 0
        self._too_large = sys.maxsize  # tokens of context
        self._told: tuple[str, ...] = ()
        self.context = Context(replace(request, corpus=None), stdin)

    def close(self) -> None:
        """Free everything."""
        if self._engine is not None:
            self._engine.close()
        self.context.close()

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self.context.request.model.name

    @property
    def names(self) -> list[str]:
        """All that clients may ask for."""
        return [self.name, *([CORPUS] if self._request.corpus is not None else [])]

    def engine_for(self, n_ctx: int) -> Engine:
        """The engine with a context of `n_ctx` tokens at least; a larger one takes the place of a smaller."""
        if n_ctx >= self._too_large:
            raise DoesNotFitError(
                f"A context of {n_ctx:,} tokens does not fit this machine.", "Send less, or ask for less."
            )
        if self._engine is None or n_ctx > self._n_ctx:
            if self._engine is not None:
                self._engine.close()
                self._engine = None
            roomy = min(max(_LEAST_CONTEXT, 1 << (n_ctx - 1).bit_length()), self.context.window)
            try:
                config, told = self.context.engine_config(roomy)
            except DoesNotFitError:
                try:
                    config, told = self.context.engine_config(n_ctx)
                except DoesNotFitError:
                    self._too_large = n_ctx  # once: the model that was loaded is gone
                    raise
            if told != self._told:
                self._told = told
                for sentence in told:
                    self._report(sentence)
            self._engine = self.context.open(self._open_engine, config)
            self._n_ctx = config.n_ctx
        return self._engine

    def warm(self) -> Prepared:
        """A request that has the model loaded and computes the files, if there are any and all of them fit.

        Raises what reading them raises.
        """
        for note in self.context.notes:
            self._report(note)
        if self._request.corpus is None:
            return Prepared(Request(array("i", self.context.prompt((), "").tokens), 0, save=False), 1)
        with self._making, Context(self._request, self._stdin, model=self.context.model) as context:
            for note in context.corpus.notes:
                self._report(note)
            packed = context.pack("")
            if packed.pack.strategy != "whole":
                self._report(
                    "the files do not fit: of each question, the excerpts that match it best are read"
                )
                return Prepared(
                    Request(array("i", context.prompt((), "").tokens), 0, save=False), packed.n_ctx
                )
            for note in context.about_whole(packed):
                self._report(note)
            prompt = context.prompt(packed.pack.parts, "")
            tokens = array("i", prompt.tokens[: prompt.prefix])
            update = self._request.run.update
            request = Request(tokens, 0, prefix=prompt.prefix, label=context.label, update=update)
            return Prepared(request, context.room_for(packed, _ROOM))

    def chat(self, call: ChatCall) -> Prepared:
        """The conversation in the model's chat template. Raises RequestError, M3Error."""
        self._check_size(len(call.messages), sum(len(said.text) for said in call.messages))
        with self._making:
            messages = [Message(said.role, (Content(said.text),)) for said in call.messages]
            try:
                if call.call.model == CORPUS and self._request.corpus is not None:
                    return self._about_files(call)
                prompt = encode_prompt(
                    self.context.model, messages, messages[-1].parts[-1], self._variables(call)
                )
            except ModelError as error:  # of the template: roles that have to take turns, and the like
                raise RequestError(error.message, "messages") from error
            said_before = any(said.role == "assistant" for said in call.messages)
            return self._prepared(
                call.call, prompt.tokens, prefix=prompt.prefix, tail=prompt.tail, exact=not said_before
            )

    def completion(self, call: CompletionCall) -> Prepared:
        """A text as it is, or token ids. Raises RequestError."""
        if call.call.model == CORPUS:
            raise RequestError(f"Only chat completions are about files; name {self.name}.", "model")
        if not isinstance(call.prompt, str):
            return self._prepared(call.call, call.prompt)
        tokenizer = self.context.model.tokenizer
        begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        return self._prepared(call.call, begin + self.tokens(call.prompt))

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text, in which special tokens are plain text. Raises RequestError."""
        self._check_size(1, len(text))
        with self._making:
            return self.context.model.tokenizer.encode(text)

    def _check_size(self, messages: int, characters: int) -> None:
        """Refuse at once what cannot fit: making tokens of it takes as long as of what can."""
        window = self.context.window
        if messages > window or characters > window * _LONGEST_TOKEN:
            raise RequestError(
                f"This model's context holds {window} tokens, and the prompt is larger.",
                code="context_length_exceeded",
            )

    def _variables(self, call: ChatCall) -> dict[str, object]:
        """What the chat template is given; an answer that has to be JSON begins at once."""
        variables: dict[str, object] = dict(self.context.variables)
        if call.reasoning_effort is not None:
            off = call.reasoning_effort in ("none", "minimal")
            variables |= think_variables(self.context.model.template, "off" if off else "on") or {}
        variables |= call.variables
        if call.call.schema:
            variables |= think_variables(self.context.model.template, "off") or {}
        return variables

    def _about_files(self, call: ChatCall) -> Prepared:
        """The conversation behind the files, as they are now: what `m3 chat` would ask."""
        turns, question = _turns(call.messages)
        with Context(self._request, self._stdin, model=self.context.model) as context:
            context.variables = self._variables(call)
            packed = context.pack(question, turns)
            prompt = context.prompt(packed.pack.parts, question, turns)
            return self._prepared(
                call.call,
                prompt.tokens,
                prefix=prompt.prefix if packed.pack.strategy == "whole" else 0,
                tail=prompt.tail,
                exact=not turns,
                label=context.label,
            )

    def _prepared(
        self,
        call: Call,
        tokens: Sequence[int],
        *,
        prefix: int = 0,
        tail: str = "",
        exact: bool = True,
        label: str = "",
    ) -> Prepared:
        count, window = len(tokens), self.context.window
        if not count:
            raise RequestError("The prompt is empty.")
        vocabulary = self.context.model.shape.vocab_size
        if vocabulary and max(tokens) >= vocabulary:
            raise RequestError(f"Token ids of this model are less than {vocabulary}.", "prompt")
        wanted = call.max_tokens or min(self.context.max_tokens, window - count)
        if wanted <= 0 or count + wanted > window:
            raise RequestError(
                f"This model's context holds {window} tokens. The prompt has {count}"
                + (f", and {call.max_tokens} were asked for the answer." if call.max_tokens else "."),
                code="context_length_exceeded",
            )
        if not label and prefix < count // 2:
            # A long text and a question are often one message: all but its end may come again.
            prefix = (count - 1) // _BATCH * _BATCH
        request = Request(
            array("i", tokens),
            wanted,
            call.sampling,
            prefix=prefix,
            label=label,
            exact=exact,
            schema=call.schema,
            update=self._request.run.update if label else "exact",
        )
        return Prepared(request, count + wanted, tail)


def _turns(messages: Sequence[Said]) -> tuple[list[Turn], str]:
    """Questions that were answered, and the last one. System messages go to the question behind them."""
    turns: list[Turn] = []
    question = ""
    for said in messages:
        if said.role == "assistant":
            if not question:
                raise RequestError("About files, questions and answers have to take turns.", "messages")
            turns.append(Turn(question, said.text))
            question = ""
        else:
            question = f"{question}\n\n{said.text}" if question else said.text
    if not question:
        raise RequestError("About files, the last message has to be a question.", "messages")
    return turns, question
