from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import pytest

from m3cli.engine import llama, llama_library
from m3cli.engine.events import EngineConfig, Finished, LoadProgress, Prefilled, Request, Token
from m3cli.engine.local import LocalEngine
from m3cli.engine.session import Session
from m3cli.engine.vocabulary import tokenize
from m3cli.errors import EngineCrashError, MachineError, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EMOJI = "naïve 👩🏽‍🚀 日本 🦙!"  # SmolLM2 has no tokens for most of these: they come in bytes


@pytest.fixture(scope="module")
def model(smollm2: str) -> Iterator[llama.Model]:
    """The real model, in this process."""
    loaded = llama.Model(EngineConfig(smollm2, n_ctx=256, threads=1), extra_buffers=False)
    yield loaded
    loaded.close()
    loaded.close()


def scripted(monkeypatch: pytest.MonkeyPatch, tokens: list[int]) -> None:
    """Have the sampler choose these tokens."""
    chosen = iter(tokens)
    monkeypatch.setattr(llama_library.lib, "llama_sampler_sample", lambda *_: next(chosen))


def test_characters_that_are_split_into_tokens_are_streamed_whole(
    model: llama.Model, smollm2: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of a character wait for the token that completes it."""
    tokens = tokenize(smollm2, [(EMOJI, False)])[0]
    assert len(tokens) > len(EMOJI)
    scripted(monkeypatch, tokens)
    texts = [e.text for e in Session(model).generate(Request([28], len(tokens))) if isinstance(e, Token)]
    assert "".join(texts) == EMOJI
    assert "" in texts


@pytest.mark.parametrize("ending", ["length", "stop"])
def test_a_character_that_stays_incomplete_becomes_a_replacement_character(
    model: llama.Model, smollm2: str, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """Half a character is not lost, neither at the token limit nor at the end of the answer."""
    llama_token, stop = tokenize(smollm2, [("🦙", False), ("<|im_end|>", True)])
    begun = llama_token[:-1]
    scripted(monkeypatch, [*begun, *stop])
    limit = len(begun) + (ending == "stop")
    events = list(Session(model).generate(Request([28], limit)))
    assert "".join(e.text for e in events if isinstance(e, Token)) == "\ufffd"
    assert isinstance(events[-1], Finished)
    assert (events[-1].reason, events[-1].generated_tokens) == (ending, limit)


def test_control_tokens_are_hidden_and_think_tags_shown(
    model: llama.Model, smollm2: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader of the answer sees where reasoning ends, and no other control token."""
    hidden = tokenize(smollm2, [("<|im_start|>", True), ("<repo_name>", True)])
    assert [len(ids) for ids in hidden] == [1, 1]
    scripted(monkeypatch, [hidden[0][0], hidden[1][0]])
    monkeypatch.setattr(llama, "_SHOWN", {"<repo_name>"})
    texts = [e.text for e in Session(model).generate(Request([28], 2)) if isinstance(e, Token)]
    assert texts == ["", "<repo_name>"]


def test_prefill_goes_in_batches_and_reports_each(smollm2: str) -> None:
    """Progress is told after every logical batch, and loading tells its own."""
    progress: list[LoadProgress] = []
    model = llama.Model(
        EngineConfig(smollm2, n_ctx=256, n_batch=32, threads=1), extra_buffers=False, progress=progress.append
    )
    done = [e.done for e in Session(model).generate(Request([28] * 70, 0)) if isinstance(e, Prefilled)]
    model.close()
    assert done == [0, 32, 64, 70]
    fractions = [each.fraction for each in progress]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


def test_a_failing_computation_is_an_error_with_its_code(
    model: llama.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What llama_decode returns is never ignored."""
    monkeypatch.setattr(llama_library.lib, "llama_decode", lambda *_: -3)
    with pytest.raises(EngineCrashError, match=r"batch of 2 tokens \(code -3\)"):
        list(Session(model).generate(Request([28, 28], 1)))


def test_dense_attention_for_a_sparse_model_is_refused(smollm2: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp only warns that it falls back to dense attention; that warning is an error here."""
    make = llama_library.lib.llama_init_from_model

    def make_with_warning(*arguments: object) -> object:
        llama_library.LOG._add(
            3, b"build_arch_graph: flash attention disabled; -> running DENSE attention ", None
        )
        return make(*arguments)

    monkeypatch.setattr(llama, "_FELL_BACK", set())  # for this test alone
    monkeypatch.setattr(llama_library.lib, "llama_init_from_model", make_with_warning)
    with pytest.raises(ModelError, match="wrong answers"):
        llama.Model(EngineConfig(smollm2, n_ctx=256), extra_buffers=False)


def test_weights_that_memory_cannot_hold_are_a_machine_error(
    smollm2: str, tmp_path: Path, worker_script: Callable[[str], list[str]]
) -> None:
    """Running out of memory while loading is told apart from a broken file."""
    command = worker_script(
        "import resource\nfrom m3cli.engine import llama\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28))"
    )
    with (
        LocalEngine(EngineConfig(smollm2, n_ctx=256), state_dir=tmp_path, worker_command=command) as engine,
        pytest.raises(MachineError, match="do not fit in memory"),
    ):
        list(engine.generate(Request([1], 1)))


def _write_unknown_architecture(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "nosuch")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def test_files_that_are_no_usable_model_say_why(config: EngineConfig, tmp_path: Path, smollm2: str) -> None:
    """Truncated, foreign, missing and unknown models are told apart, in llama.cpp's words."""
    truncated, unknown, foreign = (tmp_path / name for name in ("cut.gguf", "new.gguf", "text.gguf"))
    with Path(smollm2).open("rb") as file:
        truncated.write_bytes(file.read(4 << 20))
    _write_unknown_architecture(unknown)
    foreign.write_text("This is not a model.", encoding="utf-8")
    expected = {
        truncated: "corrupted or incomplete",
        unknown: r"architecture nosuch of new\.gguf is not known to llama-cpp-python \d",
        foreign: "text.gguf cannot be loaded: .*magic",
        tmp_path / "none.gguf": "does not exist",
    }
    for path, words in expected.items():
        with (
            LocalEngine(replace(config, model_path=str(path)), state_dir=tmp_path) as engine,
            pytest.raises(ModelError, match=words) as caught,
        ):
            list(engine.generate(Request([1], 1)))
        assert caught.value.hint.endswith(".")


def test_cores_are_counted_once_and_within_the_affinity() -> None:
    """The default number of threads is at least one."""
    assert llama_library.physical_cores() >= 1
