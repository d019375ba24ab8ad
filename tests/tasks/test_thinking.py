"""Reasoning and answer, told apart while they stream."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.tasks.thinking import ThinkingSplitter


def split(pieces: list[str], prompt_tail: str = "") -> dict[str, str]:
    splitter = ThinkingSplitter(prompt_tail)
    found = {"thinking": "", "answer": ""}
    for piece in pieces:
        for kind, text in splitter.feed(piece):
            found[kind] += text
    for kind, text in splitter.flush():
        found[kind] += text
    return found


CASES = [
    ("", "plain answer", "", "plain answer"),
    ("", "<think>why</think>\n\nbecause", "why", "because"),
    ("", "\n<mm:think>why</mm:think>because", "why", "because"),
    ("<|im_start|>assistant\n<think>\n", "why</think>because", "why", "because"),
    ("]~b]ai\n<mm:think>", "why</mm:think>because", "why", "because"),
    ("]~b]ai\n</mm:think>", "because <think>", "", "because <think>"),
    ("", "</think>because", "", "because"),
    (
        "",
        "The tag <think> opens it, </think> closes it.",
        "",
        "The tag <think> opens it, </think> closes it.",
    ),
    ("", "<think>a</mm:think>b</think>c", "a</mm:think>b", "c"),
    ("", "<think>never closed", "never closed", ""),
    ("", "<thin", "", "<thin"),
    ("", "[THINK]why[/THINK]because", "why", "because"),
    ("", "◁think▷why◁/think▷because", "why", "because"),
    ("", "a < b", "", "a < b"),
    ("", "<think></think>x</think>y", "", "x</think>y"),
]


@pytest.mark.parametrize(("tail", "text", "thinking", "answer"), CASES)
def test_reasoning_is_what_stands_between_the_first_tags(
    tail: str, text: str, thinking: str, answer: str
) -> None:
    """Only a tag before the answer begins reasoning, and only its own closing tag ends it."""
    assert split([text], tail) == {"thinking": thinking, "answer": answer}


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(CASES), st.lists(st.integers(1, 6), min_size=1))
def test_it_does_not_matter_how_the_text_is_cut(case: tuple[str, str, str, str], cuts: list[int]) -> None:
    """Tokens may end anywhere, also inside a tag: the result is the same."""
    tail, text, thinking, answer = case
    pieces, start = [], 0
    for i in range(len(text)):
        end = start + cuts[i % len(cuts)]
        pieces.append(text[start:end])
        start = end
    assert split(pieces, tail) == {"thinking": thinking, "answer": answer}


def test_an_answer_streams_at_once() -> None:
    """What cannot be the start of a tag is handed on with the token that brought it."""
    splitter = ThinkingSplitter()
    assert list(splitter.feed("The")) == [("answer", "The")]
    assert list(splitter.feed(" <thi")) == [("answer", " <thi")]
