from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3cli.engine.events import Engine, Finished, Loaded, LoadProgress, Prefilled, Request, Token
from m3cli.engine.fake import FakeEngine
from m3cli.errors import DoesNotFitError
from m3cli.model.tokens import ByteTokenizer


@given(st.text(), st.integers(1, 1000), st.integers(0, 50))
def test_the_fake_streams_the_script_as_byte_tokens(script: str, prompt_tokens: int, max_tokens: int) -> None:
    """The ids are the bytes, whole characters come with their last byte, and the limit holds."""
    events = list(FakeEngine(script, n_batch=100).generate(Request([1] * prompt_tokens, max_tokens)))
    tokens = [event for event in events if isinstance(event, Token)]
    ids = ByteTokenizer().encode(script)
    assert [token.id for token in tokens] == ids[:max_tokens]
    assert script.startswith("".join(token.text for token in tokens))
    assert isinstance(events[-1], Finished)
    assert events[-1].reason == ("stop" if len(ids) <= max_tokens else "length")
    assert (events[-1].prompt_tokens, events[-1].generated_tokens) == (prompt_tokens, len(tokens))
    assert [type(event) for event in events[:3]] == [LoadProgress, Loaded, Prefilled]
    assert [event.done for event in events if isinstance(event, Prefilled)][-1] == prompt_tokens


def test_the_fake_answers_by_request_and_keeps_to_its_context() -> None:
    """A script can be a function, requests are kept, and a prompt that is too long is refused."""
    engine: Engine = FakeEngine(lambda request: str(len(request.tokens)), n_ctx=5)
    with engine:
        assert "".join(e.text for e in engine.generate(Request([1, 2, 3], 9)) if isinstance(e, Token)) == "3"
        with pytest.raises(DoesNotFitError, match="6 tokens"):
            list(engine.generate(Request([1] * 6, 9)))
    assert isinstance(engine, FakeEngine)
    assert engine.closed
    assert [len(request.tokens) for request in engine.requests] == [3, 6]
