"""Requests of OpenAI's API as values: what is asked, how tokens are chosen, when to stop.

Fields that change nothing here (`user`, `metadata`, `store`, …) are passed over; those that ask for what this
server does not do (tools, several choices, log probabilities) are refused, not ignored.
"""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from m3cli.engine.endpoint import clean
from m3cli.serve.fields import Fields, RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from m3cli.engine.events import Sampling

_MOST_TOKENS = 2**31 - 1
_MOST_STOPS = 4  # as in OpenAI's API
_LONGEST_STOP = 1000  # characters
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "modalities": (["text"],),
    "audio": (),
    # Of other servers; each changes the answer.
    "stop_token_ids": ([],),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "grammar": (),
}
_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
_TEMPLATE_OWN = frozenset({"messages", "add_generation_prompt", "bos_token", "eos_token"})


@dataclass(frozen=True, slots=True)
class Said:
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """What both kinds of completion have in common. `max_tokens` None leaves it to the server.

    `schema` is a JSON schema as text that the answer has to follow, or empty.
    """

    model: str
    max_tokens: int | None
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    schema: str


@dataclass(frozen=True, slots=True)
class ChatCall:
    """A conversation to be continued. `variables` are handed to the chat template."""

    call: Call
    messages: tuple[Said, ...]
    variables: Mapping[str, Any]
    reasoning_effort: str | None


@dataclass(frozen=True, slots=True)
class CompletionCall:
    """A text or token ids to be continued."""

    call: Call
    prompt: str | array[int]


def chat_call(fields: Fields, sampling: Sampling) -> ChatCall:
    """What a body of /v1/chat/completions asks for. Raises RequestError."""
    messages = tuple(map(_said, fields.members("messages")))
    if all(message.role == "system" for message in messages):
        raise fields.wrong("messages", "a conversation with a message of the user")
    variables = fields.raw("chat_template_kwargs") if fields.has("chat_template_kwargs") else {}
    if not isinstance(variables, dict):
        raise fields.wrong("chat_template_kwargs", "an object")
    try:
        json.dumps(variables, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        raise fields.wrong("chat_template_kwargs", "text of whole characters") from error
    if own := _TEMPLATE_OWN & variables.keys():
        raise RequestError(f"'chat_template_kwargs' may not set {min(own)}.", "chat_template_kwargs")
    effort = fields.text("reasoning_effort", "") or None
    return ChatCall(_call(fields, sampling), messages, variables, effort)


def completion_call(fields: Fields, sampling: Sampling) -> CompletionCall:
    """What a body of /v1/completions asks for. Raises RequestError."""
    return CompletionCall(_call(fields, sampling), prompt_of(fields, "prompt"))


def prompt_of(fields: Fields, key: str) -> str | array[int]:
    """A text or token ids, or a list of one of these. Raises RequestError."""
    value = fields.raw(key)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list) and all(type(token) is int and 0 <= token < 2**31 for token in value):
        return array("i", value)
    raise fields.wrong(key, "one text, or one list of token ids")


def _said(message: Fields) -> Said:
    role = message.one_of("role", list(_ROLES), "")
    if not role:
        raise message.wrong("role", f"one of {', '.join(_ROLES)}")
    message.refuse("tool_calls", [])
    content = message.raw("content")
    if isinstance(content, list):
        return Said(_ROLES[role], "".join(map(_part, message.members("content"))))
    if content is None and role == "assistant":
        return Said("assistant", "")
    return Said(_ROLES[role], message.text("content"))


def _part(part: Fields) -> str:
    if part.text("type") != "text":
        raise RequestError(
            f"'{part.name('type')}' has to be text: this server reads no media.", part.name("type")
        )
    return part.text("text")


def _call(fields: Fields, sampling: Sampling) -> Call:
    for key, harmless in _UNSUPPORTED.items():
        fields.refuse(key, *harmless)
    options = fields.member("stream_options")
    most = fields.integer("max_completion_tokens", 1, _MOST_TOKENS)
    return Call(
        model=fields.text("model"),
        max_tokens=most if most is not None else fields.integer("max_tokens", 1, _MOST_TOKENS),
        sampling=_sampling(fields, sampling),
        stop=_stop(fields),
        stream=fields.flag("stream"),
        include_usage=options is not None and options.flag("include_usage"),
        schema=_schema(fields),
    )


def _sampling(fields: Fields, default: Sampling) -> Sampling:
    seed = fields.integer("seed", -(2**63), 2**64 - 1)
    given = {
        "temperature": fields.number("temperature", 0, 100),
        "top_p": fields.number("top_p", 0, 1),
        "top_k": fields.integer("top_k", -1, _MOST_TOKENS),
        "min_p": fields.number("min_p", 0, 1),
        "seed": None if seed is None else seed % (2**32 - 1),
        "repeat_penalty": fields.number("repeat_penalty", 1, 10)
        or fields.number("repetition_penalty", 1, 10),
    }
    if given["top_k"] == -1:  # how vLLM and SGLang say all
        given["top_k"] = 0
    return replace(default, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def _stop(fields: Fields) -> tuple[str, ...]:
    value = fields.raw("stop") if fields.has("stop") else []
    texts = [value] if isinstance(value, str) else value
    right = isinstance(texts, list) and all(
        isinstance(text, str) and 0 < len(text) <= _LONGEST_STOP for text in texts
    )
    if not right or len(texts) > _MOST_STOPS:
        raise fields.wrong(
            "stop", f"a text or up to {_MOST_STOPS} of them, each of 1 to {_LONGEST_STOP} characters"
        )
    return tuple(map(clean, texts))


def _schema(fields: Fields) -> str:
    form = fields.member("response_format")
    if form is None:
        return ""
    kind = form.one_of("type", ["text", "json_object", "json_schema"], "text")
    if kind == "text":
        return ""
    if kind == "json_object":
        return '{"type": "object"}'
    described = form.member("json_schema")
    schema = described.raw("schema") if described is not None else None
    if not isinstance(schema, dict):
        raise form.wrong("json_schema.schema", "a JSON schema")
    return json.dumps(schema)
