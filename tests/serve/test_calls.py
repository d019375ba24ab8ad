"""Bodies of completions as values: what is taken, what is refused, and under which name."""

from __future__ import annotations

import json
import math
from array import array
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.engine.events import Sampling
from m3cli.serve.calls import Call, ChatCall, CompletionCall, Said, chat_call, completion_call
from m3cli.serve.fields import Fields, RequestError, parse_object

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT = Sampling(temperature=0.6, top_p=0.9, top_k=40, min_p=0.05, seed=7, repeat_penalty=1.1)
HUGE = 10**400
ASKED = [{"role": "user", "content": "Hi"}]

TEXTS = st.text(st.characters() | st.characters(categories=["Cs"]), max_size=8)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([HUGE, -HUGE, 2**31, -1, 0, 1])
    | st.floats()
    | TEXTS
    # What fields may hold, so that values are not all refused at the first look.
    | st.sampled_from(["user", "system", "assistant", "text", "json_object", "json_schema", "auto", "none"])
)
KEYS = TEXTS | st.sampled_from(
    ["role", "content", "type", "text", "json_schema", "schema", "include_usage", "tool_calls", "messages"]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
SHARED = [
    "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed",
    "repeat_penalty", "repetition_penalty", "stop", "stream", "stream_options", "response_format", "n",
    "logprobs", "top_logprobs", "tools", "tool_choice", "functions", "logit_bias", "presence_penalty",
    "frequency_penalty", "modalities", "audio", "best_of", "echo", "suffix",
]  # fmt: skip
OF_CHAT = [*SHARED, "messages", "chat_template_kwargs", "reasoning_effort"]
OF_COMPLETION = [*SHARED, "prompt"]


def chat(**fields: Any) -> ChatCall:
    return chat_call(Fields({"model": "m", "messages": ASKED, **fields}), DEFAULT)


def completion(**fields: Any) -> CompletionCall:
    return completion_call(Fields({"model": "m", "prompt": "Hi", **fields}), DEFAULT)


def call(**fields: Any) -> Call:
    return chat(**fields).call


def refused(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    return caught.value


def error_of(read: Callable[[], object]) -> RequestError | None:
    """The error that a request is refused with; None if it is taken. Nothing else may be raised."""
    try:
        read()
    except RequestError as error:
        return error
    return None


@settings(max_examples=600)
@given(st.sampled_from(OF_CHAT), VALUES)
def test_any_value_in_a_field_of_a_chat_is_taken_or_refused_by_name(key: str, value: Any) -> None:
    """One field that holds anything: the conversation is read, or the error is about that field."""
    error = error_of(lambda: chat(**{key: value}))
    assert error is None or (error.status == 400 and error.param is not None and error.param.startswith(key))


@settings(max_examples=600)
@given(st.sampled_from(OF_COMPLETION), VALUES)
def test_any_value_in_a_field_of_a_completion_is_taken_or_refused_by_name(key: str, value: Any) -> None:
    """One field that holds anything: the text is read, or the error is about that field."""
    error = error_of(lambda: completion(**{key: value}))
    assert error is None or (error.status == 400 and error.param is not None and error.param.startswith(key))


@given(st.dictionaries(st.sampled_from([*OF_CHAT, "prompt"]), VALUES), st.booleans())
def test_any_body_is_taken_or_refused(body: dict[str, Any], whole: bool) -> None:
    """All fields may be wrong at once."""
    fields = {"model": "m", "messages": ASKED, "prompt": "Hi", **body} if whole else body
    for read in (chat_call, completion_call):
        error = error_of(partial(read, Fields(fields), DEFAULT))
        assert error is None or error.status == 400


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("model", [None, 1, True, ["m"], {}]),
        ("messages", [None, 1, "Hi", {}, [], ["Hi"], [None], [[]]]),
        ("max_tokens", [True, "5", 5.0, 0, -1, 2**31, HUGE, [], {}]),
        ("max_completion_tokens", [True, "5", 5.0, 0, -1, 2**31, HUGE, [], {}]),
        ("temperature", [True, "1", -0.1, 101, HUGE, math.inf, math.nan, [], {}]),
        ("top_p", [True, "1", -0.1, 1.1, HUGE, math.inf, math.nan, [], {}]),
        ("top_k", [True, "1", 1.0, -2, 2**31, HUGE, [], {}]),
        ("min_p", [True, "1", -0.1, 1.1, HUGE, math.inf, math.nan, [], {}]),
        ("seed", [True, "1", 1.0, 2**64, -(2**63) - 1, HUGE, [], {}]),
        ("repeat_penalty", [True, "1", 0.9, 10.1, 0, HUGE, math.inf, math.nan, [], {}]),
        ("repetition_penalty", [True, "1", 0.9, 10.1, 0, HUGE, math.inf, math.nan, [], {}]),
        ("stop", [False, True, 0, 1, 1.5, {}, {"a": 1}, "", [""], ["a", None], [1], [["a"]], ["a"] * 5]),
        ("stop", ["x" * 1001, ["x" * 1001]]),
        ("stream", [0, 1, "true", [], {}]),
        ("stream_options", [0, True, "x", []]),
        ("response_format", [0, True, "text", []]),
        ("chat_template_kwargs", [False, True, 0, 1, "", "x", [], [{}]]),
        ("reasoning_effort", [True, 0, 1, [], {}]),
    ],
)
def test_wrong_values_are_refused_by_name(key: str, values: list[object]) -> None:
    """Other types, values out of range, and empty ones where something is needed."""
    for value in values:
        assert refused(**{key: value}).param == key, value


@pytest.mark.parametrize(
    "prompt",
    [None, True, 1, 1.5, {}, ["a", "b"], [["a"]], [[1], [2]], [1, "a"], [1.0], [True], [-1], [2**31], [None]],
)
def test_a_prompt_is_one_text_or_one_list_of_ids(prompt: object) -> None:
    """Several prompts, and what is no token id, are refused by name."""
    with pytest.raises(RequestError) as caught:
        completion(prompt=prompt)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("", ""),
        ("Hi", "Hi"),
        (["Hi"], "Hi"),
        ("a\ud800", "a?"),
        ([], array("i")),
        ([[]], array("i")),
        ([1, 2, 0], array("i", [1, 2, 0])),
        ([[2**31 - 1]], array("i", [2**31 - 1])),
    ],
)
def test_prompts(prompt: object, read: object) -> None:
    """A text or token ids, alone or as the one of a list."""
    assert completion(prompt=prompt).prompt == read


def test_what_a_plain_call_is() -> None:
    """A body that names a model and asks leaves the rest to the server."""
    read = chat()
    assert read == ChatCall(Call("m", None, DEFAULT, (), False, False, ""), (Said("user", "Hi"),), {}, None)
    assert completion() == CompletionCall(Call("m", None, DEFAULT, (), False, False, ""), "Hi")


def test_null_in_any_field_that_may_be_absent_is_as_if_it_were() -> None:
    """Clients that send all fields they know, most of them null, are served."""
    for key in OF_CHAT:
        if key not in ("model", "messages"):
            assert chat(**{key: None}) == chat(), key
    for key in SHARED[1:]:
        assert completion(**{key: None}) == completion(), key


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("tools", [[{"type": "function"}], {}, "x", True]),
        ("functions", [[{"name": "f"}], {}]),
        ("tool_choice", ["required", {"type": "function"}, True, []]),
        ("logprobs", [True, 1, 5, "x"]),
        ("top_logprobs", [1, 20, "x"]),
        ("logit_bias", [{"5": 1}, [], "x"]),
        ("n", [0, 2, "1", [1]]),
        ("best_of", [0, 2, "1"]),
        ("echo", [True, "x"]),
        ("suffix", ["x", []]),
        ("presence_penalty", [0.1, -2, "0"]),
        ("frequency_penalty", [0.1, -2, "0"]),
        ("modalities", [["audio"], ["text", "audio"], "text", []]),
        ("audio", [{"voice": "alloy"}, {}, False]),
        # Of other servers.
        ("stop_token_ids", [[5]]),
        ("ignore_eos", [True]),
        ("min_tokens", [5]),
        ("guided_json", [{}]),
        ("guided_regex", ["a+"]),
        ("guided_choice", [["a"]]),
        ("guided_grammar", ["x"]),
        ("structured_outputs", [{}]),
        ("grammar", ["root ::= x"]),
    ],
)
def test_what_this_server_does_not_do_is_refused(key: str, values: list[object]) -> None:
    """An answer that lacked what was asked for would be taken for what it is not."""
    for value in values:
        for read in (chat, completion):
            with pytest.raises(RequestError) as caught:
                read(**{key: value})
            assert (caught.value.param, caught.value.code) == (key, "unsupported_value"), value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tools", []),
        ("functions", []),
        ("tool_choice", "none"),
        ("tool_choice", "auto"),
        ("logprobs", False),
        ("top_logprobs", 0),
        ("logit_bias", {}),
        ("n", 1),
        ("best_of", 1),
        ("echo", False),
        ("suffix", ""),
        ("presence_penalty", 0),
        ("presence_penalty", 0.0),
        ("frequency_penalty", 0),
        ("modalities", ["text"]),
        # Fields that change nothing here.
        ("user", "somebody"),
        ("metadata", {"a": "b"}),
        ("store", False),
        ("parallel_tool_calls", True),
        ("service_tier", "auto"),
        ("unheard_of", [1, {"2": 3}]),
    ],
)
def test_what_changes_nothing_is_passed_over(key: str, value: object) -> None:
    """Features that are switched off, and fields that no answer depends on, do no harm."""
    assert chat(**{key: value}) == chat()


def test_roles() -> None:
    """A developer speaks as the system does, and other roles than those of a conversation are refused."""
    roles = ["system", "developer", "user", "assistant"]
    said = chat(messages=[{"role": role, "content": role} for role in roles]).messages
    assert [message.role for message in said] == ["system", "system", "user", "assistant"]
    assert [message.text for message in said] == roles
    for role in ("tool", "function", "", "User", 1, None, ["user"]):
        error = refused(messages=[*ASKED, {"role": role, "content": "x"}])
        assert error.param == "messages[1].role"
    assert refused(messages=[{"content": "x"}]).param == "messages[0].role"


@pytest.mark.parametrize("roles", [["system"], ["developer"], ["system", "developer"]])
def test_somebody_has_to_ask(roles: list[str]) -> None:
    """Instructions alone are no conversation."""
    assert refused(messages=[{"role": role, "content": "x"} for role in roles]).param == "messages"


def test_contents() -> None:
    """Text as it is or in parts; an assistant may have said nothing; halves of characters are replaced."""

    def text(content: Any, role: str = "user") -> str:
        return chat(messages=[*ASKED, {"role": role, "content": content}]).messages[1].text

    assert text("") == ""
    assert text("a\udfffb\n") == "a?b\n"
    assert text([{"type": "text", "text": "a"}, {"type": "text", "text": "\nb\ud800"}]) == "a\nb?"
    assert text(None, "assistant") == ""
    assert chat(messages=[*ASKED, {"role": "assistant"}]).messages[1] == Said("assistant", "")
    assert chat(messages=[*ASKED, {"role": "assistant", "content": "x", "tool_calls": []}])


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (None, "content"),
        (1, "content"),
        ({}, "content"),
        ([], "content"),
        (["a"], "content"),
        ([{}], "content[0].type"),
        ([{"type": 1}], "content[0].type"),
        ([{"type": "image_url", "image_url": {"url": "data:"}}], "content[0].type"),
        ([{"type": "text", "text": "a"}, {"type": "input_audio"}], "content[1].type"),
        ([{"type": "text"}], "content[0].text"),
        ([{"type": "text", "text": 1}], "content[0].text"),
    ],
)
def test_contents_that_are_no_text_are_refused_by_where_they_stand(content: object, param: str) -> None:
    """Images, audio and nothing at all are refused."""
    error = refused(messages=[*ASKED, {"role": "user", "content": content}])
    assert error.param == f"messages[1].{param}"


def test_calls_of_tools_in_a_conversation_are_refused() -> None:
    """A conversation with tools cannot be shown to the model without them."""
    error = refused(messages=[*ASKED, {"role": "assistant", "tool_calls": [{"id": "1"}]}])
    assert (error.param, error.code) == ("messages[1].tool_calls", "unsupported_value")


@pytest.mark.parametrize(
    ("stop", "read"),
    [
        ("\n", ("\n",)),
        ([], ()),
        (["a"], ("a",)),
        (["a", "bc", "\n\n", "é"], ("a", "bc", "\n\n", "é")),
        ("x" * 1000, ("x" * 1000,)),
        (["\ud800"], ("?",)),
    ],
)
def test_stop_texts(stop: object, read: tuple[str, ...]) -> None:
    """One text or up to four, in their order."""
    assert call(stop=stop).stop == read


def test_how_long_an_answer_may_be() -> None:
    """The newer name of the field wins over the older one."""
    assert call(max_tokens=5).max_tokens == 5
    assert call(max_completion_tokens=6).max_tokens == 6
    assert call(max_tokens=5, max_completion_tokens=6).max_tokens == 6
    assert call(max_tokens=2**31 - 1).max_tokens == 2**31 - 1


def test_streams() -> None:
    """Whether pieces are wanted, and at last the usage."""
    assert call(stream=True).stream
    assert not call(stream=False).stream
    assert call(stream=True, stream_options={"include_usage": True}).include_usage
    assert not call(stream=True, stream_options={}).include_usage
    assert refused(stream_options={"include_usage": 1}).param == "stream_options.include_usage"


def test_sampling() -> None:
    """What a body says of sampling takes the place of the server's own, and the rest stays."""
    given = {"temperature": 1, "top_p": 0.5, "top_k": 3, "min_p": 0, "seed": 9, "repeat_penalty": 1.5}
    assert call(**given).sampling == Sampling(1.0, 0.5, 3, 0.0, 9, 1.5)
    for name, value in given.items():
        sampling = call(**{name: value}).sampling
        expected = {**{key: getattr(DEFAULT, key) for key in given}, name: value}
        assert {key: getattr(sampling, key) for key in given} == expected
    assert call(temperature=0).sampling.temperature == 0.0
    assert call(repetition_penalty=1.2).sampling.repeat_penalty == 1.2
    assert call(repeat_penalty=1, repetition_penalty=1.2).sampling.repeat_penalty == 1.0
    assert call(top_k=-1).sampling.top_k == 0
    assert call(top_k=0).sampling.top_k == 0


@given(st.integers(-(2**63), 2**64 - 1))
def test_any_seed_of_64_bits_is_one_that_an_engine_takes(seed: int) -> None:
    """Seeds are brought into 32 bits, always in the same way, and never to the one that stands for chance."""
    taken = call(seed=seed).sampling.seed
    assert 0 <= taken < 2**32 - 1
    assert taken == call(seed=seed).sampling.seed
    if 0 <= seed < 2**32 - 1:
        assert taken == seed


@pytest.mark.parametrize(
    ("form", "schema"),
    [
        ({}, ""),
        ({"type": "text"}, ""),
        ({"type": None}, ""),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}, "{}"),
        (
            {"type": "json_schema", "json_schema": {"schema": {"type": "string", "enum": ["é"]}}},
            '{"type": "string", "enum": ["\\u00e9"]}',
        ),
    ],
)
def test_forms_of_answers(form: object, schema: str) -> None:
    """Text is free, a schema is handed on as JSON."""
    assert call(response_format=form).schema == schema


def test_a_json_object_is_any_object() -> None:
    """The mode that asks for JSON without a schema is a schema that all objects follow."""
    assert json.loads(call(response_format={"type": "json_object"}).schema) == {"type": "object"}


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"type": 1}, "type"),
        ({"type": "xml"}, "type"),
        ({"type": ["text"]}, "type"),
        ({"type": "json_schema"}, "json_schema.schema"),
        ({"type": "json_schema", "json_schema": 1}, "json_schema"),
        ({"type": "json_schema", "json_schema": {}}, "json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"schema": "{}"}}, "json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"schema": []}}, "json_schema.schema"),
    ],
)
def test_forms_that_are_none_are_refused_by_name(form: object, param: str) -> None:
    """What cannot be followed is told before anything is computed."""
    assert refused(response_format=form).param == f"response_format.{param}"


@pytest.mark.parametrize(
    "around",
    [
        '"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}',
        '"chat_template_kwargs": SCHEMA',
    ],
)
def test_values_of_any_depth_are_taken_or_refused(around: str) -> None:
    """What could be read can be handed on, or is refused: there is no depth between the two that fails."""

    def read(body: str) -> ChatCall:
        return chat_call(parse_object(body.encode()), DEFAULT)

    taken = []
    for depth in (*range(800, 1100), *range(1100, 12_000, 500)):
        schema = '{"items":' * depth + "{}" + "}" * depth
        body = f'{{"model": "m", "messages": [{{"role": "user", "content": "x"}}], {around}}}'
        body = body.replace("SCHEMA", schema)
        taken.append(error_of(partial(read, body)) is None)
    assert any(taken)


def test_variables_of_the_chat_template() -> None:
    """What clients set for the template is handed on, but for what the server itself puts there."""
    assert chat(chat_template_kwargs={"enable_thinking": False}).variables == {"enable_thinking": False}
    assert chat(chat_template_kwargs={}).variables == {}
    for lone in ({"a": "\ud800"}, {"\ud800": 1}, {"a": [{"b": "x\udfff"}]}):
        assert refused(chat_template_kwargs=lone).param == "chat_template_kwargs"
    for own in ("messages", "add_generation_prompt", "bos_token", "eos_token"):
        error = refused(chat_template_kwargs={"a": 1, own: "x"})
        assert error.param == "chat_template_kwargs"
        assert own in error.message


def test_effort_of_reasoning() -> None:
    """The effort is handed on; an empty one is none."""
    assert chat(reasoning_effort="low").reasoning_effort == "low"
    assert chat(reasoning_effort="").reasoning_effort is None
