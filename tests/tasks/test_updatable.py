"""Which models have their contexts updated in place, and what whoever asked for it is told."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from m3cli.engine.events import EngineConfig
from m3cli.errors import ImpossibleError
from m3cli.model.header import read_header
from m3cli.model.preflight import update_problem
from m3cli.tasks.configure import RunOptions, updatable
from tests.gguf_files import LLAMA_KEYS, write_gguf

if TYPE_CHECKING:
    from pathlib import Path

    from m3cli.engine.events import KVType, Update
    from m3cli.model.header import Header

SCALING = "llama.rope.scaling."
YARN = {f"{SCALING}type": "yarn", f"{SCALING}factor": 4.0}


@pytest.fixture
def header(tmp_path: Path) -> Any:
    """`header(arch, **keys)`: what a file says of its model."""

    def make(keys: dict[str, Any] | None = None, arch: str = "llama") -> Header:
        return read_header(write_gguf(tmp_path / f"{arch}.gguf", {**LLAMA_KEYS, **(keys or {})}, arch=arch))

    return make


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {f"{SCALING}type": "linear", f"{SCALING}factor": 4.0},
        {f"{SCALING}type": "none"},
        {f"{SCALING}attn_factor": 1.0},
    ],
)
def test_keys_that_are_only_rotated_can_be_moved(header: Any, keys: dict[str, Any]) -> None:
    """Positions may be stretched: a rotation by the difference still is one."""
    assert update_problem(header(keys), "f16") == ""


@pytest.mark.parametrize(
    ("keys", "arch", "kv_type", "words"),
    [
        ({}, "minimax-m3", "f16", "sparse attention"),
        ({}, "minimax-m3", "q8_0", "sparse attention"),
        ({}, "smollm3", "f16", "architecture smollm3"),  # every fourth layer has no positions
        ({}, "mamba", "f16", "architecture mamba"),
        ({}, "llama", "q8_0", "keys of type q8_0"),
        ({}, "llama", "q4_0", "keys of type q4_0"),
        (YARN, "llama", "f16", "YaRN"),
        ({**YARN, f"{SCALING}attn_factor": 1.0}, "llama", "f16", "YaRN"),
        ({f"{SCALING}type": "longrope", f"{SCALING}attn_factor": 1.19}, "llama", "f16", "scaled"),
        ({f"{SCALING}attn_factor": 1.19}, "llama", "f16", "scaled"),
    ],
)
def test_why_keys_cannot_be_moved(
    header: Any, keys: dict[str, Any], arch: str, kv_type: KVType, words: str
) -> None:
    """The reason goes into a sentence: `inplace` is refused with it, `auto` is exact and told of it."""
    made = header(keys, arch)
    problem = update_problem(made, kv_type)
    assert words in problem
    assert not problem.endswith(".")
    config = EngineConfig(str(made.path), 512, kv_type_k=kv_type)
    with pytest.raises(ImpossibleError) as caught:
        updatable(config, made, "inplace")
    assert f"{arch}.gguf cannot be updated in place: {problem}." in caught.value.message
    assert "--update inplace" in caught.value.hint
    chosen, (note,) = updatable(config, made, "auto")
    assert (chosen, chosen.in_place) == (config, False)
    assert note.endswith(problem)
    assert updatable(config, made, "exact") == (config, ())


@pytest.mark.parametrize("kv_type_v", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("update", ["inplace", "auto"])
def test_values_may_be_quantized(header: Any, update: Update, kv_type_v: KVType) -> None:
    """Values know no positions, so they stay where they are; the context is made with room for updates."""
    made = header()
    config = EngineConfig(str(made.path), 512, kv_type_v=kv_type_v)
    assert updatable(config, made, update) == (replace(config, in_place=True), ())
    assert updatable(config, made, "exact") == (config, ())


@pytest.mark.parametrize(
    ("asked", "serves", "used"),
    [
        ("exact", "exact", True),
        ("exact", "inplace", True),
        ("exact", "auto", True),
        ("inplace", "exact", False),
        ("auto", "exact", False),
        ("inplace", "inplace", True),
        ("auto", "auto", True),
    ],
)
def test_a_server_with_updates_serves_those_without(asked: Update, serves: Update, used: bool) -> None:
    """Each request says how its own context is brought up to date; only what needs room needs it there."""
    assert RunOptions(update=asked).agrees_with(RunOptions(update=serves).as_json()) == used
