from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import m3cli
from m3cli.engine.events import (
    EngineConfig,
    Event,
    Finished,
    Loaded,
    LoadProgress,
    Notice,
    Prefilled,
    Request,
    Sampling,
    Token,
)
from m3cli.engine.local import LocalEngine, LocalTokenizer, system_facts
from m3cli.errors import DoesNotFitError, EngineCrashError, ExitCode, MachineError, ModelError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

CRASH_ON_FIRST_DECODE = """
from m3cli.engine import llama
decode = llama.Model.decode
load = llama.Model.__init__
def noted_load(self, config, *, extra_buffers=True, progress=None):
    self.extra = extra_buffers
    load(self, config, extra_buffers=False, progress=progress)
def crash(self, tokens, start, count):
    {condition}
    return decode(self, tokens, start, count)
llama.Model.__init__ = noted_load
llama.Model.decode = crash
"""


def text_of(events: Iterable[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Token))


def long_request(prompt: Callable[[str], list[int]]) -> Request:
    return Request((prompt("word " * 4000))[:4000], 4)


def test_a_run_streams_its_events_in_order(
    config: EngineConfig, state_dir: Path, chat_prompt: Callable[[str], list[int]]
) -> None:
    """Loading, prefill, tokens and the end come in this order, and the answer ends by itself."""
    tokens = chat_prompt("What is the capital of France?")
    with LocalEngine(config, state_dir=state_dir) as engine:
        list(engine.generate(Request(tokens, 1)))  # falls into the AMX trap where there is one
        events = list(engine.generate(Request(tokens, 40)))
    kinds = [type(event) for event in events if not isinstance(event, LoadProgress)]
    generated = kinds.count(Token)
    assert kinds == [Loaded, Prefilled, Prefilled, *[Token] * generated, Finished]
    assert Prefilled(0, len(tokens), 0.0) in events
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.prompt_tokens) == ("stop", len(tokens))
    assert finished.generated_tokens == generated < 40
    assert text_of(events) == "The capital of France is Paris."


def test_greedy_output_is_the_same_twice_and_for_any_batch_size(
    config: EngineConfig, state_dir: Path, chat_prompt: Callable[[str], list[int]]
) -> None:
    """Greedy generation depends neither on the run nor on how prefill is cut."""
    request = Request(chat_prompt("Name three colours and say where you see each of them. " * 4), 24)
    answers = []
    for n_batch in (32, 512):
        with LocalEngine(replace(config, n_batch=n_batch), state_dir=state_dir) as engine:
            for _ in range(2):
                events = list(engine.generate(request))
                answers.append([event.id for event in events if isinstance(event, Token)])
    assert len(answers[0]) == 24
    assert answers == [answers[0]] * 4


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_max_tokens_ends_as_length(
    config: EngineConfig, state_dir: Path, chat_prompt: Callable[[str], list[int]], max_tokens: int
) -> None:
    """Generation stops at max_tokens, and zero only fills the cache."""
    with LocalEngine(config, state_dir=state_dir) as engine:
        events = list(engine.generate(Request(chat_prompt("Count to one hundred."), max_tokens)))
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.generated_tokens) == ("length", max_tokens)


def test_a_full_context_ends_as_length(config: EngineConfig, state_dir: Path) -> None:
    """A prompt that fills the context to the last cell still gets the one token it has logits for."""
    with LocalEngine(replace(config, n_ctx=256), state_dir=state_dir) as engine:
        events = list(engine.generate(Request([28] * 256, 50)))
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.generated_tokens) == ("length", 1)


@pytest.mark.parametrize(("kv_type_k", "kv_type_v"), [("q8_0", "q8_0"), ("q4_0", "q4_0"), ("f16", "q8_0")])
def test_quantized_kv_types_work_with_flash_attention(
    config: EngineConfig,
    state_dir: Path,
    chat_prompt: Callable[[str], list[int]],
    kv_type_k: str,
    kv_type_v: str,
) -> None:
    """The cache can be held in fewer bits, and the model still answers."""
    quantized = replace(config, kv_type_k=kv_type_k, kv_type_v=kv_type_v)  # type: ignore[arg-type]
    with LocalEngine(quantized, state_dir=state_dir) as engine:
        assert "Paris" in text_of(engine.generate(Request(chat_prompt("What is the capital of France?"), 16)))


def test_sampling_is_reproducible_by_seed(
    config: EngineConfig, state_dir: Path, chat_prompt: Callable[[str], list[int]]
) -> None:
    """One seed gives one text, also the seed that llama.cpp takes for random; another gives another."""
    prompt = chat_prompt("Tell me a story.")
    with LocalEngine(config, state_dir=state_dir) as engine:

        def story(seed: int) -> str:
            sampling = Sampling(temperature=1.5, top_p=0.95, top_k=100, min_p=0.01, seed=seed)
            return text_of(engine.generate(Request(prompt, 16, sampling)))

        assert story(1) == story(1)
        assert story(0xFFFFFFFF) == story(0xFFFFFFFF)
        assert len({story(seed) for seed in range(4)}) > 1


def test_a_prompt_longer_than_the_context_does_not_fit_and_does_no_harm(
    config: EngineConfig,
    state_dir: Path,
    chat_prompt: Callable[[str], list[int]],
    new_children: Callable[[], set[int]],
) -> None:
    """A refused prompt leaves the worker as it was, ready for the next one."""
    with LocalEngine(replace(config, n_ctx=256), state_dir=state_dir) as engine:
        list(engine.generate(Request(chat_prompt("Hello"), 1)))
        worker = new_children()
        with pytest.raises(DoesNotFitError, match="300 tokens, but the context holds 256"):
            list(engine.generate(Request([28] * 300, 5)))
        with pytest.raises(UsageError, match="empty"):
            list(engine.generate(Request([], 5)))
        with pytest.raises(ModelError, match="beyond the 49,152"):
            list(engine.generate(Request([49152], 5)))
        assert text_of(engine.generate(Request(chat_prompt("Hello"), 2)))
        assert new_children() == worker


@pytest.mark.parametrize(
    ("signal_number", "hint"), [(signal.SIGKILL, "ran out of memory"), (signal.SIGSEGV, "report it")]
)
def test_a_worker_killed_in_mid_prefill_is_an_error_that_says_where(
    config: EngineConfig,
    state_dir: Path,
    chat_prompt: Callable[[str], list[int]],
    new_children: Callable[[], set[int]],
    signal_number: signal.Signals,
    hint: str,
) -> None:
    """The death of the worker names its signal and the progress, leaves no process, and can be repeated."""
    with LocalEngine(replace(config, n_ctx=4096, n_batch=32), state_dir=state_dir) as engine:
        run = engine.generate(long_request(chat_prompt))
        next(event for event in run if isinstance(event, Prefilled) and event.done > 0)
        for pid in new_children():
            os.kill(pid, signal_number)
        with pytest.raises(EngineCrashError) as caught:
            list(run)
        assert caught.value.exit_code is ExitCode.INTERNAL
        assert f"was killed by {signal_number.name} while reading the prompt (" in caught.value.message
        assert "of 4,000 tokens)" in caught.value.message
        assert hint in caught.value.hint
        assert not new_children()
        assert text_of(engine.generate(Request(chat_prompt("Hello"), 2)))


def test_closing_a_run_early_ends_the_worker_at_once(
    config: EngineConfig,
    state_dir: Path,
    chat_prompt: Callable[[str], list[int]],
    new_children: Callable[[], set[int]],
) -> None:
    """Nobody waits for a prefill that is no longer wanted."""
    engine = LocalEngine(replace(config, n_ctx=4096, n_batch=32), state_dir=state_dir)
    run = engine.generate(long_request(chat_prompt))
    next(event for event in run if isinstance(event, Prefilled) and event.done > 0)
    with pytest.raises(RuntimeError, match="another generation"):
        next(engine.generate(Request([1], 1)))
    begin = time.monotonic()
    run.close()  # type: ignore[attr-defined]
    assert time.monotonic() - begin < 10  # at once; a prefill would take minutes
    assert not new_children()
    engine.close()
    engine.close()


def test_closing_an_engine_ends_its_worker(
    config: EngineConfig,
    state_dir: Path,
    chat_prompt: Callable[[str], list[int]],
    new_children: Callable[[], set[int]],
) -> None:
    """The worker lives from the first request to the end of the engine."""
    engine = LocalEngine(config, state_dir=state_dir)
    assert not new_children()
    list(engine.generate(Request(chat_prompt("Hello"), 1)))
    assert len(new_children()) == 1
    engine.close()
    assert not new_children()


def test_no_worker_outlives_a_parent_that_was_killed(
    smollm2: str, state_dir: Path, tmp_path: Path, chat_prompt: Callable[[str], list[int]]
) -> None:
    """SIGKILL of the parent in mid-prefill takes the worker with it, also from a thread."""
    script = tmp_path / "parent.py"
    script.write_text(
        f"""
import os, sys, threading
sys.path.insert(0, {str(Path(m3cli.__file__).parent.parent)!r})
from pathlib import Path
from m3cli.engine.events import EngineConfig, Prefilled, Request
from m3cli.engine.local import LocalEngine
def run():
    config = EngineConfig({smollm2!r}, n_ctx=4096, n_batch=32)
    engine = LocalEngine(config, state_dir=Path({str(state_dir)!r}))
    for event in engine.generate(Request([28] * 4000, 1)):
        if isinstance(event, Prefilled) and event.done == 64:
            print(engine._worker.pid, flush=True)
if sys.argv[1] == "thread":
    threading.Thread(target=run).start()
else:
    run()
""",
        encoding="utf-8",
    )
    for where in ("main", "thread"):
        with subprocess.Popen([sys.executable, str(script), where], stdout=subprocess.PIPE) as parent:
            assert parent.stdout is not None
            worker = Path(f"/proc/{int(parent.stdout.readline())}/stat")
            parent.kill()
        deadline = time.monotonic() + 10
        while worker.exists() and worker.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline, "the worker outlived its parent"


def test_an_interrupt_from_the_terminal_is_quiet(smollm2: str, state_dir: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches the whole group: the parent gets its KeyboardInterrupt, the worker ends unheard."""
    script = tmp_path / "parent.py"
    script.write_text(
        f"""
import sys
sys.path.insert(0, {str(Path(m3cli.__file__).parent.parent)!r})
from pathlib import Path
from m3cli.engine.events import EngineConfig, Prefilled, Request
from m3cli.engine.local import LocalEngine
config = EngineConfig({smollm2!r}, n_ctx=4096, n_batch=32)
engine = LocalEngine(config, state_dir=Path({str(state_dir)!r}))
try:
    for event in engine.generate(Request([28] * 4000, 1)):
        if isinstance(event, Prefilled) and event.done == 64:
            print(engine._worker.pid, flush=True)
except KeyboardInterrupt:
    print("interrupted")
""",
        encoding="utf-8",
    )
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        os.killpg(parent.pid, signal.SIGINT)
        assert parent.communicate() == ("interrupted\n", "")
    assert not Path(f"/proc/{worker}").exists()


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGILL", "SIGBUS"])
def test_a_crash_in_the_first_computation_is_retried_without_extra_buffers(
    config: EngineConfig,
    tmp_path: Path,
    chat_prompt: Callable[[str], list[int]],
    worker_script: Callable[[str], list[str]],
    name: str,
) -> None:
    """The work-around is found, told once, remembered, and used from the start the next time."""
    condition = f"self.extra and os.kill(os.getpid(), signal.{name})"
    command = worker_script(CRASH_ON_FIRST_DECODE.format(condition=condition))
    state = tmp_path / "state"
    state.mkdir()
    (state / "llama-workarounds.json").write_text("{ corrupt", encoding="utf-8")
    request = Request(chat_prompt("What is the capital of France?"), 16)
    with LocalEngine(config, state_dir=state, worker_command=command) as engine:
        first, second = list(engine.generate(request)), list(engine.generate(request))
    with LocalEngine(config, state_dir=state, worker_command=command) as engine:
        later = list(engine.generate(request))
    assert "Paris" in text_of(first) == text_of(second) == text_of(later)
    notices = [[event for event in run if isinstance(event, Notice)] for run in (first, second, later)]
    assert [len(each) for each in notices] == [1, 0, 0]
    assert name in notices[0][0].text
    assert [sum(isinstance(event, Loaded) for event in run) for run in (first, second, later)] == [2, 1, 1]
    assert [path.name for path in state.iterdir()] == ["llama-workarounds.json"]
    assert list(json.loads((state / "llama-workarounds.json").read_text()).values()) == ["no extra buffers"]


def test_a_crash_that_the_work_around_does_not_help_is_reported_and_not_remembered(
    config: EngineConfig,
    tmp_path: Path,
    chat_prompt: Callable[[str], list[int]],
    worker_script: Callable[[str], list[str]],
    new_children: Callable[[], set[int]],
) -> None:
    """When the second attempt dies as well, the error says so and nothing is learned from it."""
    command = worker_script(CRASH_ON_FIRST_DECODE.format(condition="os.kill(os.getpid(), signal.SIGSEGV)"))
    with LocalEngine(config, state_dir=tmp_path / "state", worker_command=command) as engine:
        with pytest.raises(EngineCrashError, match=r"SIGSEGV while reading the prompt \(0 of"):
            list(engine.generate(Request(chat_prompt("Hello"), 1)))
        assert not new_children()
    assert not (tmp_path / "state").exists()


def test_a_failed_assertion_is_quoted_and_not_retried(
    config: EngineConfig,
    tmp_path: Path,
    chat_prompt: Callable[[str], list[int]],
    worker_script: Callable[[str], list[str]],
) -> None:
    """The last words of native code are in the message; an abort is no illegal instruction."""
    condition = 'os.write(2, b"ggml.c:7: GGML_ASSERT(n > 0) failed\\nbacktrace\\n"); os.abort()'
    command = worker_script(CRASH_ON_FIRST_DECODE.format(condition=condition))
    with (
        LocalEngine(config, state_dir=tmp_path, worker_command=command) as engine,
        pytest.raises(EngineCrashError, match=r"SIGABRT .*: ggml\.c:7: GGML_ASSERT\(n > 0\) failed\."),
    ):
        list(engine.generate(Request(chat_prompt("Hello"), 1)))


def test_an_unwritable_state_directory_costs_nothing_but_the_memory(
    config: EngineConfig,
    tmp_path: Path,
    chat_prompt: Callable[[str], list[int]],
    worker_script: Callable[[str], list[str]],
) -> None:
    """The work-around helps also where it cannot be remembered."""
    condition = "self.extra and os.kill(os.getpid(), signal.SIGSEGV)"
    (tmp_path / "file").write_text("", encoding="utf-8")
    command = worker_script(CRASH_ON_FIRST_DECODE.format(condition=condition))
    with LocalEngine(config, state_dir=tmp_path / "file" / "state", worker_command=command) as engine:
        assert text_of(engine.generate(Request(chat_prompt("Hello"), 2)))


def test_what_native_code_prints_does_not_disturb_the_answer(
    config: EngineConfig,
    state_dir: Path,
    chat_prompt: Callable[[str], list[int]],
    worker_script: Callable[[str], list[str]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Text on the worker's standard output and error is neither taken for events nor shown."""
    command = worker_script('os.write(1, b"noise " * 1000); os.write(2, b"noise " * 1000)')
    with LocalEngine(config, state_dir=state_dir, worker_command=command) as engine:
        assert text_of(engine.generate(Request(chat_prompt("Hello"), 2)))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("code", "words"), [("sys.exit(3)", "exit code 3"), ("1 / 0", "ZeroDivisionError")])
def test_a_worker_that_cannot_start_is_an_error(
    config: EngineConfig, tmp_path: Path, worker_script: Callable[[str], list[str]], code: str, words: str
) -> None:
    """An ordinary exit of the worker is reported with its code and its last words."""
    with (
        LocalEngine(config, state_dir=tmp_path, worker_command=worker_script(code)) as engine,
        pytest.raises(EngineCrashError, match=words),
    ):
        list(engine.generate(Request([1], 1)))
    with pytest.raises(MachineError, match="could not be started"):
        system_facts(worker_command=[str(tmp_path / "missing")])


def test_a_context_that_does_not_fit_in_memory_is_a_machine_error(
    config: EngineConfig, tmp_path: Path, worker_script: Callable[[str], list[str]]
) -> None:
    """The error names the sizes that were asked for and how to ask for less."""
    command = worker_script("import resource; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))")
    big = replace(config, n_ctx=400_000)
    with (
        LocalEngine(big, state_dir=tmp_path, worker_command=command) as engine,
        pytest.raises(MachineError, match=r"context of 400,000 tokens .*allocate") as caught,
    ):
        list(engine.generate(Request([1], 1)))
    assert "smaller context" in caught.value.hint


def test_settings_that_llama_cpp_refuses_are_explained_in_its_words(
    config: EngineConfig, state_dir: Path
) -> None:
    """A quantized V cache needs flash attention, and the error says so."""
    refused = replace(config, kv_type_v="q8_0", flash_attention=False)
    with (
        LocalEngine(refused, state_dir=state_dir) as engine,
        pytest.raises(MachineError, match="quantized V cache requires flash_attn"),
    ):
        list(engine.generate(Request([1], 1)))


def test_a_hostile_current_directory_is_not_imported_from(
    tmp_path: Path, smollm2: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modules that lie in the reviewed tree do not run, even when Python's path holds that tree."""
    for name in ("llama_cpp", "json", "numpy", "m3cli", "sitecustomize", "__future__", "typing_extensions"):
        (tmp_path / f"{name}.py").write_text("open('HACKED', 'w').close()\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", ".", str(tmp_path), *sys.path])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert system_facts()["devices"]
    with LocalTokenizer(smollm2) as tokenizer:
        assert tokenizer.encode("hello")
    assert not (tmp_path / "HACKED").exists()


def test_facts_describe_the_build_and_its_devices() -> None:
    """The doctor learns versions, cores and memory from a worker of its own."""
    facts = system_facts()
    assert "llama-cpp-python" in facts["version"]
    assert facts["system_info"]
    assert facts["cores"] >= 1
    cpu = next(device for device in facts["devices"] if device["name"] == "CPU")
    assert cpu["kind"] == "cpu"
    assert 0 < cpu["free"] <= cpu["total"]


def test_a_library_that_does_not_load_is_a_machine_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker_script: Callable[[str], list[str]]
) -> None:
    """A broken installation is explained in its own words, with how to repair it."""
    with pytest.raises(MachineError, match=r"cannot be loaded: .*llama_cpp") as caught:
        system_facts(worker_command=worker_script("sys.modules['llama_cpp'] = None"))
    assert "Reinstall" in caught.value.hint
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    with pytest.raises(MachineError, match=r"Shared library with base name 'llama' not found\. Reinstall"):
        system_facts()


def test_the_parent_imports_no_heavy_library() -> None:
    """Neither llama_cpp nor numpy is loaded by the side that talks to people."""
    code = (
        "import sys, m3cli.engine.local; print(sorted({'llama_cpp', 'numpy', 'ctypes'} & set(sys.modules)))"
    )
    root = str(Path(m3cli.__file__).parent.parent)
    output = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root}, capture_output=True, check=True
    )
    assert output.stdout == b"[]\n"


def test_a_repeat_penalty_changes_greedy_output_and_stays_deterministic(
    config: EngineConfig, state_dir: Path, chat_prompt: Callable[[str], list[int]]
) -> None:
    """With a penalty a loop is left, in the same way each time."""
    tokens = chat_prompt("Sing a song with a refrain that comes again and again.")
    answers = []
    with LocalEngine(config, state_dir=state_dir) as engine:
        for penalty in (1.0, 1.5, 1.5):
            request = Request(tokens, 40, Sampling(repeat_penalty=penalty))
            answers.append([event.id for event in engine.generate(request) if isinstance(event, Token)])
    assert answers[1] == answers[2] != answers[0]
