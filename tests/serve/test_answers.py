"""Answers as OpenAI's client reads them, where they stop, and what errors become."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.completion_choice import CompletionChoice
from openai.types.shared import ErrorObject

from m3cli.engine.events import (
    Finished,
    Loaded,
    LoadProgress,
    Notice,
    NotSaved,
    Prefilled,
    Restored,
    Saved,
    Stopped,
    Token,
)
from m3cli.errors import (
    CorpusError,
    DoesNotFitError,
    EngineCrashError,
    M3Error,
    MachineError,
    ModelError,
    OutOfMemoryError,
    UsageError,
)
from m3cli.serve.answers import Answer, Reading, StopScanner, error_of
from m3cli.serve.fields import RequestError
from m3cli.serve.scheduler import BusyError, ClosingError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from m3cli.engine.events import Event

USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 3,
    "total_tokens": 8,
    "prompt_tokens_details": {"cached_tokens": 4},
}
END = Finished("stop", 5, 3, 0.1, 0.1)
# Two letters make texts that begin, overlap and contain each other.
LETTERS = st.text("ab", max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4).map(tuple)


@st.composite
def cut_texts(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> list[str]:
    """A text in pieces, some of them empty."""
    text = draw(texts)
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[i:j] for i, j in zip([0, *places], [*places, len(text)], strict=True)]


def until_stop(text: str, stops: Iterable[str]) -> str:
    """The text before the first place where one of `stops` begins."""
    return text[: min([place for place in map(text.find, stops) if place >= 0], default=len(text))]


@settings(max_examples=500)
@given(cut_texts(LETTERS), STOPS)
def test_what_is_shown_ends_where_the_first_stop_text_begins(
    pieces: list[str], stops: tuple[str, ...]
) -> None:
    """However a text is cut, it is shown up to the first stop text, or whole if there is none."""
    scanner = StopScanner(stops)
    shown = "".join([*map(scanner.feed, pieces), scanner.flush()])
    text = "".join(pieces)
    assert shown == until_stop(text, stops)
    assert scanner.found == any(stop in text for stop in stops)


@given(cut_texts(st.text(max_size=30)), st.lists(st.text(min_size=1, max_size=3), max_size=4).map(tuple))
def test_stop_texts_of_any_script(pieces: list[str], stops: tuple[str, ...]) -> None:
    """The same holds of texts of any characters."""
    scanner = StopScanner(stops)
    shown = "".join([*map(scanner.feed, pieces), scanner.flush()])
    assert shown == until_stop("".join(pieces), stops)


@given(cut_texts(LETTERS), STOPS)
def test_nothing_is_held_back_that_is_no_beginning(pieces: list[str], stops: tuple[str, ...]) -> None:
    """Without a stop text so far, all is shown but an end that one may begin with."""
    scanner = StopScanner(stops)
    text = shown = ""
    for piece in pieces:
        text, shown = text + piece, shown + scanner.feed(piece)
        if any(stop in text for stop in stops):
            break
        held = text[len(shown) :]
        assert text == shown + held
        assert not held or any(stop.startswith(held) for stop in stops)


def test_one_stop_text_within_another_does_not_hide_the_longer_one() -> None:
    """Whether a token brings one character or all of them, the answer ends at the same place."""
    for pieces in (["abcd"], list("abcd"), ["abc", "d"]):
        scanner = StopScanner(("bc", "abcd"))
        assert "".join([*map(scanner.feed, pieces), scanner.flush()]) == ""
    for pieces in (["abcx"], list("abcx"), ["abc", "x"], list("abc")):
        scanner = StopScanner(("bc", "abcd"))
        assert "".join([*map(scanner.feed, pieces), scanner.flush()]) == "a"
        assert scanner.found


def test_nothing_is_shown_behind_a_stop_text() -> None:
    """Who feeds on after the end gets nothing."""
    scanner = StopScanner(("\n",))
    assert scanner.feed("one\ntwo") == "one"
    assert scanner.feed("three") == scanner.flush() == ""


def reads(
    pieces: Iterable[str],
    *,
    stops: tuple[str, ...] = (),
    tail: str | None = "",
    last: Event = END,
) -> tuple[str, str, str | None]:
    """What becomes of an answer in pieces: reasoning, text, and why it ended."""
    reading = Reading(5, stops, tail)
    said = {"thinking": "", "answer": ""}
    for event in (*(Token(1, piece) for piece in pieces), last):
        for kind, text in reading.feed(event):
            assert text
            said[kind] += text
        if reading.reason is not None:
            break
    return said["thinking"], said["answer"], reading.reason


@given(cut_texts(st.sampled_from(["<think>\nab aab</think>\n\nabba", "abba", "<think>abab", "a</think>b"])))
def test_reasoning_is_told_from_the_answer_however_it_is_cut(pieces: list[str]) -> None:
    """What stands in think tags goes apart, wherever tokens end."""
    assert reads(pieces) == reads(["".join(pieces)])


@given(
    cut_texts(st.builds("<think>{}</think>{}".format, LETTERS, st.text("ab", min_size=1, max_size=9))),
    STOPS,
)
def test_stop_texts_are_those_of_the_answer(pieces: list[str], stops: tuple[str, ...]) -> None:
    """A stop text in the reasoning ends nothing, one in the answer ends it."""
    reasoning, _, answer = "".join(pieces).removeprefix("<think>").partition("</think>")
    assert reads(pieces, stops=stops) == (reasoning, until_stop(answer, stops), "stop")


@pytest.mark.parametrize(
    ("pieces", "tail", "said"),
    [
        (["so", "</think>\n\nyes"], "<ai>\n<think>\n", ("so", "yes", "stop")),
        (["yes"], "<ai>\n<think>\n\n</think>\n\n", ("", "yes", "stop")),
        (["<think>so</think>yes"], "<ai>\n", ("so", "yes", "stop")),
        (["<thi", "s> is"], "<ai>\n", ("", "<this> is", "stop")),
        (["<thi"], "<ai>\n", ("", "<thi", "stop")),
        (["<think>so"], None, ("", "<think>so", "stop")),
        ([], "<ai>\n", ("", "", "stop")),
    ],
)
def test_reasoning_by_what_the_prompt_ends_with(
    pieces: list[str], tail: str | None, said: tuple[str, str, str]
) -> None:
    """A template may open the reasoning or close it; in a text that is no conversation, tags are text."""
    assert reads(pieces, tail=tail) == said


def test_why_an_answer_ended() -> None:
    """A stop text that is complete ends an answer as its end does; the limit is told apart."""
    limit = Finished("length", 5, 3, 0.1, 0.1)
    assert reads(["ab"], last=limit) == ("", "ab", "length")
    assert reads(["ab\n"], stops=("\n\n",), last=limit) == ("", "ab\n", "length")
    assert reads(["ab\n"], stops=("\n",), last=limit) == ("", "ab", "stop")
    # What is held for the sake of a longer stop text ends with the shorter one.
    assert reads(["abc"], stops=("bc", "abcd"), last=limit) == ("", "a", "stop")
    # The end of what might have been a think tag.
    assert reads(["<t"], stops=("<",), last=limit) == ("", "", "stop")


def test_an_answer_goes_on_until_there_is_a_reason() -> None:
    """Nothing but a stop text and the end gives one."""
    reading = Reading(5, ("\n",), "")
    events = [
        LoadProgress(0.5),
        Loaded(0.1, 64, "fake", "full"),
        Notice("something"),
        Restored(3, 0.1, "memory"),
        Prefilled(3, 5, 0.0),
        Saved(5, 100, 0.1),
        NotSaved("It is not."),
        Token(1, ""),
    ]
    assert [piece for event in events for piece in reading.feed(event)] == []
    assert reading.reason is None
    assert list(reading.feed(Token(2, "a\nb"))) == [("answer", "a")]
    assert reading.reason == "stop"


def test_usage_counts_what_was_computed_and_what_was_not() -> None:
    """Tokens without text count too: they were generated."""
    reading = Reading(5, (), "")
    for event in (Restored(4, 0.1, "disk"), Prefilled(4, 5, 0.0), *(Token(i, "") for i in range(3)), END):
        list(reading.feed(event))
    assert reading.usage() == USAGE


def test_an_answer_that_the_server_has_stopped_is_an_error() -> None:
    """Half an answer must not pass for one."""
    reading = Reading(5, (), "")
    list(reading.feed(Token(1, "half")))
    with pytest.raises(ClosingError):
        list(reading.feed(Stopped(5, 0)))
    assert reading.reason is None


@pytest.mark.parametrize("reason", ["stop", "length"])
@pytest.mark.parametrize("reasoning", ["", "so"])
def test_a_whole_chat_answer_is_what_clients_read(reason: str, reasoning: str) -> None:
    """OpenAI's own client takes the object as valid, and finds everything in it."""
    value = json.loads(json.dumps(Answer("chat.completion", "m").whole("Yes. 😀", reasoning, reason, USAGE)))
    read = ChatCompletion.model_validate(value, strict=True)
    assert (read.object, read.model) == ("chat.completion", "m")
    assert read.id.startswith("chatcmpl-")
    (choice,) = read.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, reason, None)
    assert (choice.message.role, choice.message.content) == ("assistant", "Yes. 😀")
    assert getattr(choice.message, "reasoning_content", "") == reasoning
    assert read.usage is not None
    assert read.usage.model_dump(exclude_unset=True) == USAGE


def test_the_chunks_of_a_chat_are_what_clients_read() -> None:
    """Role, reasoning, text, the reason and the usage: each is valid, and all are of one answer."""
    answer = Answer("chat.completion", "m")
    deltas: list[dict[str, str]] = [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "so"},
        {"content": "Yes."},
        {},
    ]
    values = [answer.chunk(delta) for delta in deltas[:3]]
    values += [answer.chunk(deltas[3], "length"), answer.usage_chunk(USAGE)]
    read = [ChatCompletionChunk.model_validate(value, strict=True) for value in values]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in read}) == 1
    assert {chunk.object for chunk in read} == {"chat.completion.chunk"}
    assert [chunk.choices[0].delta.model_dump(exclude_unset=True) for chunk in read[:4]] == deltas
    assert [chunk.choices[0].finish_reason for chunk in read[:4]] == [None, None, None, "length"]
    assert read[4].choices == []
    assert read[4].usage is not None
    assert read[4].usage.model_dump(exclude_unset=True) == USAGE


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_whole_text_is_what_clients_read(reason: str) -> None:
    """Completions of a text have it as the choice's own."""
    read = Completion.model_validate(
        Answer("text_completion", "m").whole("Yes.", "", reason, USAGE), strict=True
    )
    assert (read.object, read.model) == ("text_completion", "m")
    assert read.id.startswith("cmpl-")
    (choice,) = read.choices
    assert (choice.index, choice.finish_reason, choice.text) == (0, reason, "Yes.")
    assert read.usage is not None
    assert read.usage.model_dump(exclude_unset=True) == USAGE


def test_the_chunks_of_a_text_are_what_clients_read() -> None:
    """Pieces are choices of the same kind; as in OpenAI's API, all but the last have no reason yet."""
    answer = Answer("text_completion", "m")
    first, last, usage = (
        answer.chunk({"content": "Yes."}),
        answer.chunk({}, "stop"),
        answer.usage_chunk(USAGE),
    )
    (choice,) = first["choices"]
    assert choice["finish_reason"] is None
    read = CompletionChoice.model_validate({**choice, "finish_reason": "stop"}, strict=True)
    assert read.text == "Yes."
    for value in ({**first, "choices": []}, last, usage):
        Completion.model_validate(value, strict=True)
    assert last["choices"][0] == {"index": 0, "finish_reason": "stop", "logprobs": None, "text": ""}
    assert {value["object"] for value in (first, last, usage)} == {"text_completion"}
    assert len({value["id"] for value in (first, last, usage)}) == 1


def test_answers_have_names_of_their_own() -> None:
    """Two answers are told apart by their ids."""
    ids = {Answer("chat.completion", "m").chunk({})["id"] for _ in range(20)}
    assert len(ids) == 20


@pytest.mark.parametrize(
    ("error", "status", "kind", "param", "code"),
    [
        (RequestError("No.", "stop"), 400, "invalid_request_error", "stop", None),
        (RequestError("No.", "n", code="unsupported_value"), 400, "invalid_request_error", "n",
         "unsupported_value"),
        (RequestError("No.", "model", status=404, code="model_not_found"), 404, "invalid_request_error",
         "model", "model_not_found"),
        (RequestError("No.", status=408), 408, "invalid_request_error", None, None),
        (RequestError("No.", status=413), 413, "invalid_request_error", None, None),
        (RequestError("No.", status=504, code="timeout"), 504, "server_error", None, "timeout"),
        (BusyError("No."), 429, "rate_limit_error", None, "queue_full"),
        (ClosingError("No."), 503, "server_error", None, "shutting_down"),
        (DoesNotFitError("No."), 400, "invalid_request_error", None, "context_length_exceeded"),
        (UsageError("No."), 400, "invalid_request_error", None, None),
        (MachineError("No."), 500, "server_error", None, "impossible"),
        (OutOfMemoryError("No."), 500, "server_error", None, "impossible"),
        (ModelError("No."), 500, "server_error", None, "impossible"),
        (CorpusError("No."), 500, "server_error", None, "impossible"),
        (EngineCrashError("No."), 500, "server_error", None, "engine_failed"),
        (M3Error("No."), 500, "server_error", None, "engine_failed"),
    ],
)  # fmt: skip
def test_errors(error: Exception, status: int, kind: str, param: str | None, code: str | None) -> None:
    """Each kind of error has its status and code, in the form that OpenAI's client reads."""
    said, body = error_of(error)
    assert said == status
    read = ErrorObject.model_validate(body["error"], strict=True)
    assert read == ErrorObject(message="No.", type=kind, param=param, code=code)


def test_errors_say_what_to_do() -> None:
    """The second sentence of m3's errors is for clients too."""
    assert (
        error_of(MachineError("It is full.", "Make room."))[1]["error"]["message"] == "It is full. Make room."
    )


@pytest.mark.parametrize(
    "error", [RuntimeError("/home/me/key"), KeyError("key"), OSError("key"), ValueError()]
)
def test_what_was_not_foreseen_is_not_described(error: Exception) -> None:
    """A client learns that the server failed, and nothing of how."""
    status, body = error_of(error)
    assert status == 500
    said: dict[str, Any] = body["error"]
    assert said == {
        "message": "The server failed unexpectedly; its log says how.",
        "type": "server_error",
        "param": None,
        "code": None,
    }
