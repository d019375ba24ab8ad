"""Answers of a form: what a JSON schema describes, from a real model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from m3cli.engine.events import EngineConfig, Finished, Request, Sampling, Token
from m3cli.engine.local import LocalEngine
from m3cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name", "kind", "parts"],
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "kind": {"enum": ["dog", 'c"a\\t', "ünïcode"]},
        "parts": {
            "type": "array",
            "maxItems": 2,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["count", "good"],
                "properties": {"count": {"type": "integer"}, "good": {"type": "boolean"}},
            },
        },
    },
}


@pytest.fixture(scope="module")
def engine(smollm2: str, state_dir: Path) -> Iterator[LocalEngine]:
    """One for all: what is loaded does not depend on the schema."""
    with LocalEngine(EngineConfig(smollm2, n_ctx=512, threads=1), state_dir=state_dir) as engine:
        yield engine


def answer(engine: LocalEngine, tokens: list[int], schema: object, sampling: Sampling | None = None) -> str:
    """The text of an answer, which has to end by itself if it has a form."""
    text = json.dumps(schema) if schema else ""
    events = list(engine.generate(Request(tokens, 150, sampling or Sampling(), schema=text)))
    assert isinstance(events[-1], Finished)
    if schema:
        assert events[-1].reason == "stop"
    return "".join(event.text for event in events if isinstance(event, Token))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=2.0, top_k=40, seed=7)])
def test_an_answer_follows_its_schema(
    engine: LocalEngine, chat_prompt: Callable[[str], list[int]], sampling: Sampling
) -> None:
    """Greedy or wild, it is one JSON object of the wanted form, the same each time."""
    tokens = chat_prompt("Tell me a story about a dog.")
    first = answer(engine, tokens, SCHEMA, sampling)
    jsonschema.validate(json.loads(first), SCHEMA)
    assert answer(engine, tokens, SCHEMA, sampling) == first


def test_without_a_schema_nothing_changes(
    engine: LocalEngine, chat_prompt: Callable[[str], list[int]]
) -> None:
    """A schema of one request is forgotten at the next one, and prose is what the model prefers."""
    tokens = chat_prompt("What is the capital of France?")
    prose = answer(engine, tokens, None)
    assert "Paris" in prose
    city = {"type": "string", "maxLength": 30}
    schema = {"type": "object", "required": ["capital"], "additionalProperties": False}
    formed = answer(engine, tokens, {**schema, "properties": {"capital": city}})
    assert list(json.loads(formed)) == ["capital"]
    assert answer(engine, tokens, None) == prose


@pytest.mark.parametrize(
    "schema", [{"type": "nothing"}, {"$ref": "#/nowhere"}, {"pattern": "("}, {"type": 3}]
)
def test_a_schema_that_cannot_be_followed(
    engine: LocalEngine, chat_prompt: Callable[[str], list[int]], schema: dict[str, Any]
) -> None:
    """It is refused in words, and the engine lives on."""
    with pytest.raises(UsageError, match="cannot be followed"):
        answer(engine, chat_prompt("Hello"), {"type": "string", **schema})
    assert answer(engine, chat_prompt("Hello"), {"enum": ["hi"]}) == '"hi"'
