"""JSON bodies and their members: each mistake is told by the name of its field, and nothing else escapes."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3cli.engine.endpoint import clean
from m3cli.serve.fields import Fields, RequestError, parse_object

if TYPE_CHECKING:
    from collections.abc import Callable

HUGE = 10**400  # JSON can spell it, and no float holds it
TEXTS = st.text(st.characters() | st.characters(categories=["Cs"]), max_size=20)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([HUGE, -HUGE, 2**31, -1, 0, 1])
    | st.floats()
    | st.sampled_from([math.inf, -math.inf, math.nan])
    | TEXTS
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
READERS: dict[str, Callable[[Fields], Any]] = {
    "text": lambda fields: fields.text("key"),
    "text with a default": lambda fields: fields.text("key", "default"),
    "flag": lambda fields: fields.flag("key"),
    "number": lambda fields: fields.number("key", -1.5, 100),
    "integer": lambda fields: fields.integer("key", -5, 2**31 - 1),
    "one_of": lambda fields: fields.one_of("key", ["a", "b"], "a"),
    "member": lambda fields: fields.member("key"),
    "members": lambda fields: fields.members("key"),
    "refuse": lambda fields: fields.refuse("key", [], False, 0),
}


def is_right(reader: str, read: Any) -> bool:
    """Whether a value that was read is one that the reader promises."""
    kinds: dict[str, Callable[[], bool]] = {
        "text": lambda: isinstance(read, str) and read == clean(read),
        "text with a default": lambda: isinstance(read, str) and read == clean(read),
        "flag": lambda: type(read) is bool,
        "number": lambda: read is None or (type(read) is float and -1.5 <= read <= 100),
        "integer": lambda: read is None or (type(read) is int and -5 <= read <= 2**31 - 1),
        "one_of": lambda: read in ("a", "b"),
        "member": lambda: read is None or isinstance(read, Fields),
        "members": lambda: len(read) > 0 and all(isinstance(each, Fields) for each in read),
        "refuse": lambda: read is None,
    }
    return kinds[reader]()


def outcome(read: Callable[[], Any]) -> Any:
    """What is read, or the error that it is refused with. Nothing else may be raised."""
    try:
        return read()
    except RequestError as error:
        return error


@pytest.mark.parametrize("reader", READERS)
@given(value=VALUES)
def test_any_value_is_read_or_refused_by_name(reader: str, value: Any) -> None:
    """Whatever JSON spells, a reader gives what it promises or names the field that is wrong."""
    read = outcome(lambda: READERS[reader](Fields({"key": value}, "at")))
    if isinstance(read, RequestError):
        assert (read.param, read.status) == ("at.key", 400)
        assert "'at.key'" in read.message
    else:
        assert is_right(reader, read)


@pytest.mark.parametrize("reader", READERS)
def test_null_counts_as_absent(reader: str) -> None:
    """A field that is null is read, or missed, as one that is not there."""
    null = outcome(lambda: READERS[reader](Fields({"key": None})))
    absent = outcome(lambda: READERS[reader](Fields({})))
    assert type(null) is type(absent)
    assert str(null) == str(absent)
    assert not Fields({"key": None}).has("key")
    assert Fields({"key": False}).has("key")


@pytest.mark.parametrize(
    ("reader", "values"),
    [
        ("text", [None, True, 1, 1.5, [], ["a"], {}]),
        ("text with a default", [True, 1, 1.5, [], ["a"], {}]),
        ("flag", [0, 1, "true", "", [], {}]),
        ("number", [True, False, "1", [], {}, -1.51, 100.01, math.inf, -math.inf, math.nan, HUGE, -HUGE]),
        ("integer", [True, False, 1.0, 1.5, "1", [], {}, -6, 2**31, HUGE, -HUGE]),
        ("one_of", [True, 1, "c", "", "A", ["a"], {"a": 1}]),
        ("member", [True, 1, "a", [], [{}]]),
        ("members", [None, True, 1, "a", {}, [], [1], [{}, None], [[{}]]]),
        ("refuse", [True, 1, "a", [0], {}, {"a": 1}]),
    ],
)
def test_values_of_another_kind_are_refused(reader: str, values: list[object]) -> None:
    """No value is taken for one of another kind: a boolean is no number, a float no whole number."""
    for value in values:
        with pytest.raises(RequestError) as caught:
            READERS[reader](Fields({"key": value}))
        assert caught.value.param == "key", value


def test_errors_name_the_whole_path() -> None:
    """A member of a member of a list is called by where it stands in the body."""
    fields = Fields({"messages": [{}, {"options": {"size": "x"}}]})
    options = fields.members("messages")[1].member("options")
    assert options is not None
    with pytest.raises(RequestError) as caught:
        options.integer("size", 1, 2)
    assert caught.value.param == "messages[1].options.size"
    assert caught.value.message == "'messages[1].options.size' has to be a whole number from 1 to 2."


def test_what_is_not_supported_has_a_code() -> None:
    """Clients can tell what this server does not do from what they have got wrong."""
    with pytest.raises(RequestError) as caught:
        Fields({"tools": [{}]}).refuse("tools", [])
    assert (caught.value.code, caught.value.param) == ("unsupported_value", "tools")
    Fields({"tools": []}).refuse("tools", [])
    Fields({"tools": None}).refuse("tools", [])
    Fields({}).refuse("tools")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"1",
        b"{'a': 1}",
        b'{"a": 1} {"b": 2}',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": [-Infinity]}',
        b'{"a": "\xff"}',
        b'\xef\xbb\xbf{"a": 1}',
        '{"a": 1}'.encode("utf-16"),
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a": ' * 100_000 + b"1" + b"}" * 100_000,
    ],
)
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    """Neither broken nor other JSON, nor constants that JSON lacks, nor depth without end, are taken."""
    with pytest.raises(RequestError) as caught:
        parse_object(body)
    assert caught.value.status == 400
    assert len(caught.value.message) < 300


@given(st.binary() | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_body_is_read_or_refused(body: bytes) -> None:
    """Bytes that nobody meant as a request are refused as bytes, not as a defect of the server."""
    read = outcome(lambda: parse_object(body))
    assert isinstance(read, Fields) or read.status == 400


def test_numbers_of_any_length_are_read_or_refused() -> None:
    """A number with more digits than a float or Python's parser takes is one wrong field, or a wrong body."""
    for digits in (400, 4000, 5000, 100_000):
        with pytest.raises(RequestError):
            parse_object(b'{"key": ' + b"9" * digits + b"}").number("key", 0, 1)
    with pytest.raises(RequestError):
        parse_object(b'{"key": 1e999}').number("key", 0, 1)


@given(TEXTS)
def test_clean_text_can_be_sent(text: str) -> None:
    """Halves of characters are replaced, and nothing else is changed."""
    cleaned = clean(text)
    assert len(cleaned) == len(text)
    cleaned.encode()
    halves = [0xD800 <= ord(character) <= 0xDFFF for character in text]
    assert all(was == now for was, now, half in zip(text, cleaned, halves, strict=True) if not half)
    assert all(now == "?" for now, half in zip(cleaned, halves, strict=True) if half)


def test_halves_of_characters_are_read_from_json() -> None:
    r"""`\ud800` is JSON, a pair of halves is a character, and a text with a lone half can be encoded."""
    fields = parse_object(rb'{"lone": "a\ud800b", "pair": "\ud83d\ude00", "turned": "\ude00\ud83d"}')
    assert [fields.text(key) for key in ("lone", "pair", "turned")] == ["a?b", "😀", "??"]
