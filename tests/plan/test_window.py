"""Dividing a window."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3cli.errors import DoesNotFitError
from m3cli.plan.window import plan_window


@given(st.integers(8, 2_000_000), st.integers(1, 400), st.data())
def test_prompt_and_answer_always_fit_the_context(context: int, fixed: int, data: st.DataObject) -> None:
    """Whatever is packed into the room, the context that is made holds it with its answer."""
    window = plan_window(context)
    try:
        room = window.room(fixed)
    except DoesNotFitError:
        assert fixed + window.answer >= context
        return
    prompt = fixed + data.draw(st.integers(0, room))
    assert prompt + window.answer <= window.n_ctx(prompt) <= context


def test_a_context_is_no_larger_than_needed() -> None:
    """A short prompt in a large window gets a small context, in llama.cpp's steps of 256."""
    assert plan_window(1_048_576, max_tokens=100).n_ctx(1000) == 1280


def test_asking_for_more_than_the_model_has_is_refused() -> None:
    """A --ctx beyond the trained context is an error with both numbers."""
    with pytest.raises(DoesNotFitError, match=r"10,000 tokens was asked for, .* trained on 8,192"):
        plan_window(8192, ctx=10_000)


def test_a_question_that_leaves_no_room_says_the_numbers() -> None:
    """A window smaller than instructions, question and answer names all three sizes."""
    with pytest.raises(DoesNotFitError, match=r"context of 128 tokens .* take 120, the answer 32"):
        plan_window(8192, ctx=128).room(120)
