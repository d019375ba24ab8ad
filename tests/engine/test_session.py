"""Cold, restored, resumed and edited: what a KV cache that was kept gives is what a new one gives."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m3cli.engine import session as session_module
from m3cli.engine.events import (
    CacheConfig,
    EngineConfig,
    Finished,
    Notice,
    NotSaved,
    Prefilled,
    Request,
    Restored,
    Saved,
    Stopped,
    Token,
)
from m3cli.engine.llama import Model
from m3cli.engine.session import Session
from m3cli.engine.snapshot_key import snapshot_key
from m3cli.engine.snapshots import SnapshotStore
from tests.llama_logits import last_logits
from tests.tiny_models import ids, write_gemma3, write_mamba

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from m3cli.engine.events import Event

    Logits = np.ndarray[Any, np.dtype[np.float32]]

BATCH = 64
QUESTION = 20  # tokens
PREFIX = 4 * BATCH + 37  # tokens: not where a batch would end anyway


@pytest.fixture(scope="module", params=["smollm2", "tiny-m3", "sliding-window"])
def model(
    request: pytest.FixtureRequest, smollm2: str, tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Model]:
    """Models with full attention, with MSA and with a sliding window, in this process."""
    if request.param == "sliding-window":
        path = str(write_gemma3(tmp_path_factory.mktemp("gemma3") / "gemma3.gguf"))
    else:
        path = smollm2 if request.param == "smollm2" else str(tiny_gguf)
    config = EngineConfig(path, n_ctx=2048, n_batch=BATCH, n_ubatch=BATCH, threads=1)
    loaded = Model(config, extra_buffers=False)
    yield loaded
    loaded.close()


@pytest.fixture(autouse=True)
def everything_is_worth_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "_WORTH_SAVING", BATCH)


CORPUS = ids(PREFIX)
PROMPT = [*CORPUS, *ids(QUESTION, 1)]


def ask(tokens: list[int] = PROMPT, prefix: int = PREFIX, **options: object) -> Request:
    return Request(tokens, 12, prefix=prefix, label="tree", **options)  # type: ignore[arg-type]


def said(events: list[Event]) -> list[int]:
    assert isinstance(events[-1], Finished)
    return [event.id for event in events if isinstance(event, Token)]


def restored(events: list[Event]) -> int:
    return next((event.tokens for event in events if isinstance(event, Restored)), 0)


@pytest.fixture(scope="module")
def cold(model: Model) -> Callable[[list[int]], list[int]]:
    """The answer to a prompt without anything kept."""
    answers: dict[tuple[int, ...], list[int]] = {}

    def answer(tokens: list[int], prefix: int = PREFIX) -> list[int]:
        key = (prefix, *tokens)
        if key not in answers:
            answers[key] = said(list(Session(model).generate(ask(tokens, prefix))))
        return answers[key]

    return answer


@pytest.fixture
def cache(tmp_path: Path) -> CacheConfig:
    return CacheConfig(str(tmp_path), "digest", "model")


def test_a_restored_run_says_the_same(
    model: Model, cache: CacheConfig, cold: Callable[..., list[int]]
) -> None:
    """The second process finds the corpus on the disk, exactly up to the question."""
    first = list(Session(model, cache, "key").generate(ask()))
    assert [event.tokens for event in first if isinstance(event, Saved)] == [PREFIX]
    assert restored(first) == 0
    second = list(Session(model, cache, "key").generate(ask()))
    assert restored(second) == PREFIX
    assert [event.done for event in second if isinstance(event, Prefilled)] == [PREFIX, len(PROMPT)]
    assert said(first) == said(second) == cold(PROMPT)


def test_another_question_prefills_only_itself(
    model: Model, cache: CacheConfig, cold: Callable[..., list[int]]
) -> None:
    """In one process and in two, the corpus is shared."""
    other = [*CORPUS, *ids(QUESTION + 9, 2)]
    session = Session(model, cache, "key")
    list(session.generate(ask()))
    same_process = list(session.generate(ask(other)))
    new_process = list(Session(model, cache, "key").generate(ask(other)))
    for events in (same_process, new_process):
        assert restored(events) == PREFIX
        assert said(events) == cold(other)


def test_an_edit_costs_the_changed_tail(
    model: Model, cache: CacheConfig, cold: Callable[..., list[int]]
) -> None:
    """Up to the batch in which the first token changed, everything is kept; longer or shorter after it."""
    list(Session(model, cache, "key").generate(ask()))
    place = 3 * BATCH + 50
    for change in (ids(40, 3), ids(130, 4), []):
        edited = [*CORPUS[:place], *change, *CORPUS[place + 20 :]]
        tokens = [*edited, *ids(QUESTION, 1)]
        events = list(Session(model, cache, "key").generate(ask(tokens, len(edited))))
        assert restored(events) == 3 * BATCH
        assert said(events) == cold(tokens, len(edited))


def stop_after(count: int) -> tuple[Callable[[], bool], Callable[[Event], None]]:
    """A switch that says stop once `count` tokens are prefilled, and what tells it."""
    seen = 0

    def hear(event: Event) -> None:
        nonlocal seen
        if isinstance(event, Prefilled):
            seen = event.done

    return lambda: seen >= count, hear


@pytest.mark.parametrize("count", [1, 2 * BATCH, 4 * BATCH, PREFIX, len(PROMPT)])
def test_a_stopped_run_is_resumed(
    model: Model, cache: CacheConfig, cold: Callable[..., list[int]], count: int
) -> None:
    """What was computed until the interrupt is saved, if it is worth it, and the next run goes on there."""
    stopping, hear = stop_after(count)
    events: list[Event] = []
    for event in Session(model, cache, "key", stopping).generate(ask()):
        hear(event)
        events.append(event)
    end = events[-1]
    assert isinstance(end, Stopped)
    assert count <= end.done < count + BATCH
    assert end.saved == (end.done if end.done >= BATCH else 0) or end.done == len(PROMPT)
    again = list(Session(model, cache, "key").generate(ask()))
    assert restored(again) == min(end.saved, PREFIX)
    assert said(again) == cold(PROMPT)


def test_checkpoints_on_a_timer(model: Model, cache: CacheConfig, cold: Callable[..., list[int]]) -> None:
    """During a long prefill the cache is saved; the newest replaces the ones before it."""
    events = list(Session(model, replace(cache, checkpoint_seconds=0.0), "key").generate(ask()))
    saved = [event.tokens for event in events if isinstance(event, Saved)]
    assert saved[:3] == [BATCH, 2 * BATCH, 3 * BATCH]
    entries = SnapshotStore(session_module.Path(cache.directory)).entries()
    assert [entry.manifest.tokens for entry in entries] == [saved[-1]]
    assert said(events) == cold(PROMPT)


def test_an_aborted_computation_keeps_whole_batches(
    model: Model, cold: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop in the middle of a batch leaves the cache as it was before that batch."""
    stopped: list[bool] = []
    decode = model.decode

    def decode_and_stop(tokens: array[int], start: int, count: int) -> bool:
        if start == 2 * BATCH:  # as the worker does when a stop comes
            stopped.append(True)
            model.abort()
        return decode(tokens, start, count)

    session = Session(model, stopping=lambda: bool(stopped))
    with monkeypatch.context() as patch:
        patch.setattr(model, "decode", decode_and_stop)
        end = list(session.generate(ask()))[-1]
    model.go_on()
    stopped.clear()
    assert end == Stopped(2 * BATCH, 0)
    again = list(session.generate(ask()))
    assert restored(again) == 2 * BATCH
    assert said(again) == cold(PROMPT)


def test_a_damaged_state_is_not_loaded(
    model: Model, cache: CacheConfig, cold: Callable[..., list[int]]
) -> None:
    """A flipped bit in the state is a notice, and a cold run; the next one finds a good entry again."""
    list(Session(model, cache, "key").generate(ask()))
    (entry,) = SnapshotStore(session_module.Path(cache.directory)).entries()
    data = bytearray(entry.state_file.read_bytes())
    data[len(data) // 2] ^= 4
    entry.state_file.write_bytes(data)
    events = list(Session(model, cache, "key").generate(ask()))
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert len(notices) == 1
    assert "does not match its checksum" in notices[0]
    assert restored(events) == 0
    assert said(events) == cold(PROMPT)
    assert restored(list(Session(model, cache, "key").generate(ask()))) == PREFIX


def test_a_state_that_llama_cpp_refuses_is_not_the_end(
    model: Model, cache: CacheConfig, cold: Callable[..., list[int]]
) -> None:
    """A file with a right checksum that is no state, as another version might leave, costs a notice."""
    key = "key"
    store = SnapshotStore(session_module.Path(cache.directory), key)

    def write_nonsense(path: Path) -> int:
        return path.write_bytes(b"nonsense" * 100)

    store.save(CORPUS, 800, write_nonsense, label="", model="", tokens_per_second=0)
    events = list(Session(model, cache, key).generate(ask()))
    assert ["does not accept it" in e.text for e in events if isinstance(e, Notice)] == [True]
    assert said(events) == cold(PROMPT)


def test_a_cache_that_cannot_be_written_costs_a_notice(
    model: Model, tmp_path: Path, cold: Callable[..., list[int]]
) -> None:
    """The answer comes all the same."""
    (tmp_path / "file").write_text("in the way")
    cache = CacheConfig(str(tmp_path / "file"), "digest", "model")
    events = list(Session(model, cache, "key").generate(ask()))
    assert ["is not saved for later" in e.text for e in events if isinstance(e, NotSaved)] == [True]
    assert said(events) == cold(PROMPT)


def test_a_conversation_reuses_all_that_agrees(model: Model, cache: CacheConfig) -> None:
    """Without exactness, what the model has written itself is kept as well."""
    session = Session(model, cache, "key")
    first = list(session.generate(ask()))
    answer = said(first)
    longer = [*PROMPT, *answer, *ids(20, 5)]
    second = list(session.generate(ask(longer, exact=False)))
    assert restored(second) == len(PROMPT) + len(answer) - 1  # the last one was sampled, not computed
    strict = list(session.generate(ask(longer)))
    assert restored(strict) == PREFIX


def test_a_conversation_is_not_saved_for_others(
    model: Model, cache: CacheConfig, cold: Callable[..., list[int]]
) -> None:
    """What was computed on top of the model's own words would give another run other digits."""
    stopping, hear = stop_after(len(PROMPT) + 3 * BATCH)
    session = Session(model, cache, "key", stopping)
    answer = said(list(session.generate(ask())))
    longer = [*PROMPT, *answer, *ids(5 * BATCH, 5)]
    for event in session.generate(ask(longer, exact=False)):
        hear(event)
    (entry,) = SnapshotStore(session_module.Path(cache.directory)).entries()
    assert entry.manifest.tokens == PREFIX
    assert said(list(Session(model, cache, "key").generate(ask()))) == cold(PROMPT)


def test_what_is_kept_is_private(model: Model, cache: CacheConfig) -> None:
    """Token ids say what the files say: nobody else may read them."""
    list(Session(model, cache, "key").generate(ask()))
    assert SnapshotStore(session_module.Path(cache.directory)).root.stat().st_mode & 0o077 == 0


def test_what_nobody_will_ask_again_is_kept_in_memory_alone(
    model: Model, cache: CacheConfig, cold: Callable[..., list[int]]
) -> None:
    """Without `save`, the next question of the process finds the corpus, and the next process does not."""
    session = Session(model, cache, "key")
    list(session.generate(ask(save=False)))
    other = [*CORPUS, *ids(QUESTION, 3)]
    again = list(session.generate(ask(other, save=False)))
    assert (restored(again), said(again)) == (PREFIX, cold(other))
    assert restored(list(Session(model, cache, "key").generate(ask(save=False)))) == 0


def test_warming_computes_no_answer(model: Model, cache: CacheConfig, cold: Callable[..., list[int]]) -> None:
    """A prompt that is all prefix is saved whole, and found whole the next time."""
    warm = Request(CORPUS, 0, prefix=PREFIX)
    assert said(list(Session(model, cache, "key").generate(warm))) == []
    again = list(Session(model, cache, "key").generate(warm))
    assert restored(again) == PREFIX
    asked = list(Session(model, cache, "key").generate(ask()))
    assert restored(asked) == PREFIX
    assert said(asked) == cold(PROMPT)


def logits_after(session: Session, request: Request) -> tuple[Logits, list[Event]]:
    """The logits behind a prompt, and what happened."""
    events = list(session.generate(replace(request, max_tokens=1)))
    assert isinstance(events[-1], Finished)
    return last_logits(session._model), events


def cold_logits(model: Model, request: Request) -> Logits:
    return logits_after(Session(model), replace(request, exact=True))[0]


def test_logits_are_those_of_a_cold_run_bit_for_bit(model: Model, cache: CacheConfig) -> None:
    """Restored whole, resumed after a stop, and cut back to a batch after an edit."""
    stopping, hear = stop_after(3 * BATCH)
    for event in Session(model, cache, "key", stopping).generate(ask()):
        hear(event)
    resumed, events = logits_after(Session(model, cache, "key"), ask())
    assert restored(events) == 3 * BATCH
    whole, events = logits_after(Session(model, cache, "key"), ask())
    assert restored(events) == PREFIX
    expected = cold_logits(model, ask())
    assert np.array_equal(resumed, expected)
    assert np.array_equal(whole, expected)
    edited = [*CORPUS[: 2 * BATCH + 9], 7, *CORPUS[2 * BATCH + 9 :]]
    request = ask([*edited, *ids(QUESTION, 1)], len(edited), save=False)
    cut_back, events = logits_after(Session(model, cache, "key"), request)
    assert restored(events) == 2 * BATCH
    assert np.array_equal(cut_back, cold_logits(model, request))


@pytest.mark.parametrize("model", ["tiny-m3", "sliding-window"], indirect=True)
def test_a_turn_that_goes_on_inside_a_batch_is_not_exact(model: Model, cache: CacheConfig) -> None:
    """It is not saved, and of what it computed later requests use what a cold run computes alike."""
    session = Session(model, cache, "key")
    list(session.generate(ask(ids(200), 0)))
    tokens = [*ids(200)[:100], *ids(100, 6)]
    turn = list(session.generate(ask(tokens, 190, exact=False)))
    assert restored(turn) == 100
    assert [event for event in turn if isinstance(event, Saved)] == []
    got, events = logits_after(session, ask(tokens, 190, save=False))
    assert restored(events) == BATCH
    expected = cold_logits(model, ask(tokens, 190))
    assert np.array_equal(got, expected)
    anew, events = logits_after(Session(model, cache, "key"), ask(tokens, 190, save=False))
    assert restored(events) == 0
    assert np.array_equal(anew, expected)


@pytest.mark.parametrize("model", ["tiny-m3", "sliding-window"], indirect=True)
@pytest.mark.parametrize("from_disk", [False, True])
@pytest.mark.parametrize(
    ("former", "prefix", "kept", "loaded"),
    [
        (180, 180, 192, 180),
        (180, 100, 64, 64),
        (100, 180, 64, 64),
        (100, 150, 64, 64),
        (20, 150, 0, 0),
        (150, 20, 0, 0),
        (32, 150, 128, 0),  # so little is not saved
        (150, 32, 128, 128),
        (150, 0, 128, 128),
        (150, 128, 128, 128),
        (128, 150, 128, 128),
        (150, 400, 128, 128),
    ],
)
def test_with_another_prefix_only_the_batches_of_a_cold_run_are_kept(
    model: Model, cache: CacheConfig, former: int, prefix: int, kept: int, loaded: int, from_disk: bool
) -> None:
    """Where the shared prefix ends, a batch ends, so another prefix makes other batches behind the first."""
    tokens = ids(200)
    session = Session(model, cache, "key")
    list(session.generate(ask(tokens, former)))
    if from_disk:
        session = Session(model, cache, "key")
    got, events = logits_after(session, ask([*tokens, *ids(9, 3)], prefix, save=False))
    assert restored(events) == (loaded if from_disk else kept)
    assert np.array_equal(got, cold_logits(model, ask([*tokens, *ids(9, 3)], prefix)))


@pytest.mark.parametrize("model", ["tiny-m3", "sliding-window"], indirect=True)
def test_the_prefix_decides_the_last_digits(model: Model) -> None:
    """Else the tests that compare them would show nothing."""
    one, other = (cold_logits(model, ask(ids(200), prefix)) for prefix in (100, 0))
    assert not np.array_equal(one, other)


@st.composite
def requests(draw: st.DrawFn) -> list[tuple[bool, Request]]:
    """Some requests about texts that have parts in common; True for those that come to a new process."""
    base, former = ids(260), []
    for number in range(draw(st.integers(2, 5))):
        place = draw(st.integers(0, 260))
        tail = draw(st.integers(1, 120))
        base = [*base[:place], *ids(tail, number)][:400]
        prefix = draw(st.one_of(st.integers(0, len(base)), st.just(len(base)), st.just(place)))
        exact, save, new = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
        former.append((new, ask(base, prefix, exact=exact, save=save)))
    return former


@pytest.mark.parametrize("model", ["sliding-window"], indirect=True)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sequence=requests())
def test_whatever_came_before_an_exact_request_does_not_show(
    model: Model, tmp_path_factory: pytest.TempPathFactory, sequence: list[tuple[bool, Request]]
) -> None:
    """Any turns and prefixes, kept in memory or on the disk: the logits are those of a cold run."""
    cache = CacheConfig(str(tmp_path_factory.mktemp("cache")), "digest", "model")
    session = Session(model, cache, "key")
    for new, request in sequence:
        session = Session(model, cache, "key") if new else session
        list(session.generate(request))
    last = replace(sequence[-1][1], exact=True, save=False)
    in_memory, _ = logits_after(session, last)
    on_disk, _ = logits_after(Session(model, cache, "key"), last)
    expected = cold_logits(model, last)
    assert np.array_equal(in_memory, expected)
    assert np.array_equal(on_disk, expected)


@pytest.mark.parametrize("model", ["sliding-window"], indirect=True)
def test_an_entry_may_be_removed_while_it_is_loaded(
    model: Model, cache: CacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may make room just then: what was loaded is right, or nothing of it stays."""
    list(Session(model, cache, "key").generate(ask()))
    load_state = model.load_state

    def load_and_lose(path: Path, count: int) -> bool:
        loaded = load_state(path, count)
        shutil.rmtree(path.parent)
        return loaded

    with monkeypatch.context() as patch:
        patch.setattr(model, "load_state", load_and_lose)
        got, _ = logits_after(Session(model, cache, "key"), ask())
    assert np.array_equal(got, cold_logits(model, ask()))
    saved, _ = logits_after(Session(model, cache, "key"), ask())
    assert np.array_equal(saved, got)


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """A model whose memory is one state, which cannot be cut back."""
    path = write_mamba(tmp_path_factory.mktemp("mamba") / "mamba.gguf")
    loaded = Model(EngineConfig(str(path), n_ctx=2048, n_batch=BATCH, n_ubatch=BATCH, threads=1))
    yield loaded
    loaded.close()


def test_a_recurrent_model_reuses_whole_states_only(recurrent: Model, cache: CacheConfig) -> None:
    """The state after the corpus serves another question; after an edit everything is computed, and right."""
    assert not recurrent.can_truncate
    other = [*CORPUS, *ids(QUESTION + 9, 2)]
    edited = [*CORPUS[:100], 7, *CORPUS[101:], *ids(QUESTION, 1)]
    cold = {
        tuple(tokens): said(list(Session(recurrent).generate(ask(tokens))))
        for tokens in (PROMPT, other, edited)
    }
    session = Session(recurrent, cache, "key")
    first = list(session.generate(ask()))
    assert [event.tokens for event in first if isinstance(event, Saved)] == [PREFIX]
    for tokens, kept in ((other, PREFIX), (edited, 0), (PROMPT, PREFIX), (PROMPT, PREFIX)):
        events = list(session.generate(ask(tokens)))
        assert restored(events) == kept
        assert said(events) == cold[tuple(tokens)]
    assert [event for event in first if isinstance(event, Notice)] == []


def test_a_recurrent_model_resumes_at_a_checkpoint(recurrent: Model, cache: CacheConfig) -> None:
    """What was saved at the end of a batch is where a longer prefill goes on."""
    cold = said(list(Session(recurrent).generate(ask())))
    stopping, hear = stop_after(3 * BATCH)
    for event in Session(recurrent, cache, "key", stopping).generate(ask()):
        hear(event)
    events = list(Session(recurrent, cache, "key").generate(ask()))
    assert restored(events) == 3 * BATCH
    assert said(events) == cold


def test_only_what_fits_is_found(smollm2: str) -> None:
    """Each setting that changes the numbers in a cache gives another key; those that do not, do not."""
    config = EngineConfig(smollm2, n_ctx=512)
    cache = CacheConfig("/c", "digest", "name")
    key = snapshot_key(config, cache, "build", "full")
    same = replace(config, model_path="/other", n_ctx=1024, threads=3)
    assert snapshot_key(same, replace(cache, directory="/d", model_name="x"), "build", "full") == key
    others = {
        snapshot_key(replace(config, kv_type_k="q8_0"), cache, "build", "full"),
        snapshot_key(replace(config, kv_type_v="q8_0"), cache, "build", "full"),
        snapshot_key(replace(config, n_batch=256), cache, "build", "full"),
        snapshot_key(replace(config, flash_attention=False), cache, "build", "full"),
        snapshot_key(config, replace(cache, model_digest="other"), "build", "full"),
        snapshot_key(config, cache, "other", "full"),
        snapshot_key(config, cache, "build", "sparse"),
        key,
    }
    assert len(others) == 8
