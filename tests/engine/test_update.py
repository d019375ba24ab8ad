"""Contexts that are updated in place: what they hold, what they cost, and who may use them."""

from __future__ import annotations

import shutil
from array import array
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m3cli.engine import inplace
from m3cli.engine import session as session_module
from m3cli.engine.edits import Edit, changed_of, staleness
from m3cli.engine.events import (
    CacheConfig,
    EngineConfig,
    Finished,
    Loaded,
    Notice,
    Prefilled,
    Request,
    Restored,
    Saved,
    Stopped,
    Token,
    Updated,
)
from m3cli.engine.llama import Model
from m3cli.engine.llama_update import splice
from m3cli.engine.local import LocalEngine
from m3cli.engine.session import Session
from m3cli.engine.snapshots import SnapshotStore
from m3cli.engine.vocabulary import Vocabulary
from m3cli.errors import DoesNotFitError, EngineCrashError, ImpossibleError, ModelError
from tests import tiny_models
from tests.gguf_files import write_gguf
from tests.llama_logits import last_logits, log_softmax
from tests.tiny_models import ids, write_gemma3, write_mamba

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from m3cli.engine.events import Event

    Logits = np.ndarray[Any, np.dtype[np.float32]]

Kind = TypeVar("Kind")

BATCH = 64
# Batches of 64 tokens or more go through another flash attention of llama.cpp's, with other rounding errors,
# which a small model blows up; an update does not begin its batches where a cold run does.
SMALL_BATCH = 32
SOURCES = Path(__file__).parent.parent / "data" / "review" / "sources" / "c"


def configured(path: Path | str, batch: int = BATCH, **options: Any) -> EngineConfig:
    options = {"in_place": True, **options}
    return EngineConfig(str(path), n_ctx=2048, n_batch=batch, n_ubatch=batch, threads=1, **options)


@contextmanager
def opened(path: Path | str, batch: int = BATCH, **options: Any) -> Iterator[Model]:
    model = Model(configured(path, batch, **options), extra_buffers=False)
    try:
        yield model
    finally:
        model.close()


@pytest.fixture(scope="module")
def smol(smollm2: str) -> Iterator[Model]:
    """A model that has learned something."""
    with opened(smollm2, SMALL_BATCH) as model:
        yield model


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gemma3(tmp_path_factory.mktemp("gemma3") / "gemma3.gguf")


@pytest.fixture(scope="module")
def windowed(gemma3: Path) -> Iterator[Model]:
    """A model with a sliding window, and far faster than the other."""
    with opened(gemma3) as model:
        yield model


def write_variant(path: Path, *, looking: int | None = None, **fields: Any) -> Path:
    """The model with a sliding window with other values; if given, only layer `looking` sees others."""

    def write(path: Path, values: dict[str, Any], tensors: dict[str, Any], arch: str) -> Path:
        for layer in range(tiny_models.LAYERS):
            if looking not in (None, layer):
                tensors[f"blk.{layer}.attn_output.weight"][:] = 0
        return write_gguf(path, values | {f"gemma3.{key}": fields[key] for key in fields}, tensors, arch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_models, "write_gguf", write)
        return write_gemma3(path)


@pytest.fixture(autouse=True)
def everything_is_worth_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "_WORTH_SAVING", BATCH)


@pytest.fixture
def cache(tmp_path: Path) -> CacheConfig:
    return CacheConfig(str(tmp_path / "cache"), "digest", "model")


TREE = ids(600)
EDITED = [*TREE[:300], *ids(20, 1), *TREE[310:]]
QUESTION = ids(20, 2)


def ask(tree: Sequence[int], question: Sequence[int] = QUESTION, **options: Any) -> Request:
    options = {"prefix": len(tree), "label": "tree", "update": "inplace", "max_tokens": 8, **options}
    return Request([*tree, *question], **options)


def run(session: Session, request: Request) -> list[Event]:
    return list(session.generate(request))


def of_kind(events: Sequence[Event], kind: type[Kind]) -> list[Kind]:
    return [event for event in events if isinstance(event, kind)]


def said(events: Sequence[Event]) -> list[int]:
    assert isinstance(events[-1], Finished)
    return [event.id for event in of_kind(events, Token)]


def restored(events: Sequence[Event]) -> list[int]:
    return [event.tokens for event in of_kind(events, Restored)]


def logits_after(session: Session, request: Request) -> tuple[Logits, list[Event]]:
    """The logits behind the prompt, and what happened."""
    events = run(session, replace(request, max_tokens=1))
    return last_logits(session._model), events


def cold_logits(model: Model, request: Request) -> Logits:
    return logits_after(Session(model), replace(request, update="exact"))[0]


def cold_answer(model: Model, request: Request) -> list[int]:
    return said(run(Session(model), replace(request, update="exact")))


def divergence(truth: Logits, other: Logits) -> float:
    """Kullback-Leibler divergence of the distributions that logits stand for."""
    expected, found = log_softmax(truth), log_softmax(other)
    return float((np.exp(expected) * (expected - found)).sum())


# 1. What a splice leaves in the KV cache.


def spliced_logits(model: Model, old: Sequence[int], new: Sequence[int], edits: Sequence[Edit]) -> Logits:
    """Those behind `new`, whose last token is computed after all edits."""
    run(Session(model), Request(old, 0, prefix=len(old)))
    tokens = array("i", new)
    done = list(splice(model, tokens, edits))
    assert done[-1:] == [edit.new_end for edit in edits if edit.new_end > edit.new_start][-1:]
    assert model.decode(tokens, len(tokens) - 1, 1)
    return last_logits(model)


@pytest.mark.parametrize(
    ("name", "start", "count"),
    [
        ("smol", 30, 150),
        ("windowed", 200, 40),
        ("windowed", 30, 150),
        ("windowed", 0, 170),
        ("windowed", 230, 0),
    ],
)
def test_what_is_all_computed_anew_is_as_in_a_cold_run(
    request: pytest.FixtureRequest, name: str, start: int, count: int
) -> None:
    """New tokens have the right places and see all before them, from the first token on if need be."""
    model: Model = request.getfixturevalue(name)
    old = TREE[:240]
    new = [*old[:start], *ids(count, 3), 7]
    got = spliced_logits(model, old, new, [Edit(start, len(old), start, start + count)])
    expected = cold_logits(model, Request(new, 1, prefix=len(new) - 1))
    np.testing.assert_allclose(got, expected, atol=1e-2)


@pytest.mark.parametrize("name", ["smol", "windowed"])
def test_tokens_that_are_replaced_by_themselves_change_nothing(
    request: pytest.FixtureRequest, name: str
) -> None:
    """Several regions, at the beginning and at the end, each computed where it was."""
    model: Model = request.getfixturevalue(name)
    places = [(0, 10), (30, 70), (71, 120), (140, 160)]
    got = spliced_logits(model, TREE[:160], TREE[:161], [Edit(*place, *place) for place in places])
    expected = cold_logits(model, Request(TREE[:161], 1, prefix=160))
    np.testing.assert_allclose(got, expected, atol=1e-2)


@pytest.fixture(scope="module", params=[(4, 32), (5, 32), (5, 0)], ids=["window", "global", "no-window"])
def shallow(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """A model whose keys and values say nothing of the tokens before: no update costs any truth."""
    looking, window = request.param
    path = tmp_path_factory.mktemp("shallow") / "shallow.gguf"
    write_variant(path, looking=looking, **{"attention.sliding_window": window})
    with opened(path) as model:
        yield model


@st.composite
def edited(draw: st.DrawFn) -> tuple[list[int], list[int], list[Edit]]:
    """A sequence, what becomes of it, and the edits that make it so."""
    old = TREE[: draw(st.integers(1, 400))]
    new: list[int] = []
    edits: list[Edit] = []
    place = 0
    for _ in range(draw(st.integers(0, 5))):
        start = place + draw(st.integers(1 if edits else 0, 80))
        if start > len(old):
            break
        end = min(start + draw(st.integers(0, 80)), len(old))
        added = ids(draw(st.integers(0, 80)), draw(st.integers(0, 9)))
        if end == start and not added:
            continue
        new += old[place:start]
        edits.append(Edit(start, end, len(new), len(new) + len(added)))
        new += added
        place = end
    return old, [*new, *old[place:], 7], edits


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edited())
def test_kept_keys_turn_to_their_new_places(
    shallow: Model, case: tuple[list[int], list[int], list[Edit]]
) -> None:
    """Where no token's keys tell of those before it, any edits give what a cold run gives."""
    old, new, edits = case
    got = spliced_logits(shallow, old, new, edits)
    expected = cold_logits(shallow, Request(new, 1, prefix=len(new) - 1))
    np.testing.assert_allclose(got, expected, atol=0.05)  # keys are rounded once more when they turn


@pytest.mark.parametrize(
    "fields",
    [
        {"rope.scaling.attn_factor": 1.19},
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 512,
        },
    ],
    ids=["factor", "yarn"],
)
def test_keys_that_would_be_scaled_again_stay_where_they_are(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Where llama.cpp scales keys as it turns them, all behind an edit is computed."""
    with opened(write_variant(tmp_path / "scaled.gguf", looking=5, **fields)) as model:
        assert model.update_problem
        session = Session(model)
        run(session, ask(TREE, update="auto"))
        got, events = logits_after(session, ask(EDITED, update="auto"))
        assert of_kind(events, Updated) == []
        assert np.array_equal(got, cold_logits(model, ask(EDITED)))
        with pytest.raises(ImpossibleError, match="cannot be updated in place"):
            run(session, ask(EDITED))


@pytest.fixture(scope="module")
def texts(smollm2: str) -> dict[str, list[int]]:
    """Tokens of real text."""
    vocabulary = Vocabulary(smollm2)
    source = "".join(path.read_text("utf-8") for path in sorted(SOURCES.iterdir()))
    found = {
        "code": vocabulary.encode(source[:4000])[:360],
        "secret": vocabulary.encode("\n// Note: the secret password of this project is banana bread.\n"),
        "notice": vocabulary.encode("/* Copyright of nobody in particular. Use it as you like. */\n"),
        "question": vocabulary.encode("\n// Remember: the secret password of this project is"),
    }
    vocabulary.close()
    return found


def test_an_update_tells_the_model_what_was_added(smol: Model, texts: dict[str, list[int]]) -> None:
    """A trained model knows what was inserted before two hundred tokens that are kept."""
    code, question = texts["code"], texts["question"]
    new = [*code[:100], *texts["secret"], *code[100:]]
    expected = cold_logits(smol, ask(new, question))
    session = Session(smol)
    before, _ = logits_after(session, ask(code, question))
    got, events = logits_after(session, ask(new, question))
    assert of_kind(events, Updated)[0].computed < 100
    assert divergence(expected, got) < 0.01 < 1 < divergence(expected, before)
    assert smol.piece(int(got.argmax())) == smol.piece(int(expected.argmax())) == b" banana"


def test_an_update_leaves_what_the_model_knows_behind_it(smol: Model, texts: dict[str, list[int]]) -> None:
    """What was said behind an insertion is moved, and found by the question as before."""
    code, question = texts["code"], texts["question"]
    old = [*code[:200], *texts["secret"], *code[200:300]]
    new = [*old[:60], *texts["notice"], *old[60:]]
    session = Session(smol)
    before, _ = logits_after(session, ask(old, question))
    got, events = logits_after(session, ask(new, question))
    assert of_kind(events, Updated)[0].computed < 100
    assert divergence(before, got) < 0.1
    assert smol.piece(int(got.argmax())) == b" banana"


# 2. What a session tells of an update.


def test_an_update_tells_what_it_kept_and_what_it_computed(windowed: Model) -> None:
    """What is kept counts as restored; the rest comes in batches, and is summed up."""
    session = Session(windowed)
    run(session, ask(TREE))
    events = run(session, ask(EDITED))
    computed = 20 + inplace._SETTLE
    kept = len(EDITED) - computed
    assert restored(events) == [kept]
    assert isinstance(events[0], Loaded)
    assert of_kind(events, Restored)[0].source == "memory"
    done = [event.done for event in of_kind(events, Prefilled)]
    assert done == [kept, kept + BATCH, len(EDITED), len(EDITED) + len(QUESTION)]
    assert {event.total for event in of_kind(events, Prefilled)} == {len(EDITED) + len(QUESTION)}
    (updated,) = of_kind(events, Updated)
    assert (updated.tokens, updated.computed) == (len(EDITED), computed)
    behind = np.arange(300 + 20 + inplace._SETTLE, len(EDITED))
    assert updated.staleness == pytest.approx((20 / behind).sum() / len(EDITED))
    end = events[-1]
    assert isinstance(end, Finished)
    assert (end.restored_tokens, end.prompt_tokens) == (kept, len(EDITED) + len(QUESTION))


def test_an_edit_counts_once_wherever_the_context_comes_from(windowed: Model, cache: CacheConfig) -> None:
    """That the former question and its answer make place for another is no edit of the tree."""
    session = Session(windowed, cache, "key")
    run(session, ask(TREE))
    request = ask(EDITED, save=False)
    in_memory = of_kind(run(session, request), Updated)
    on_disk = of_kind(run(Session(windowed, cache, "key"), request), Updated)
    assert [event.edits for event in (*on_disk, *in_memory)] == [1, 1]


def test_what_has_not_changed_is_not_updated(windowed: Model) -> None:
    """The same tree again, or one that only goes on, is reused as without updates."""
    session = Session(windowed)
    request = ask(TREE)
    first = said(run(session, request))
    again = run(session, request)
    assert of_kind(again, Updated) == []
    assert restored(again) == [len(TREE)]
    assert said(again) == first == cold_answer(windowed, request)


def test_warming_updates_the_whole_prompt(windowed: Model, cache: CacheConfig) -> None:
    """Without an answer, the last token needs no computing; the question finds all of it."""
    session = Session(windowed, cache, "key")
    run(session, ask(TREE, []))
    warm = run(session, ask(EDITED, [], max_tokens=0))
    assert of_kind(warm, Updated)[0].tokens == len(EDITED)
    assert of_kind(warm, Saved)[0].tokens == len(EDITED)
    assert said(warm) == []
    asked = run(Session(windowed, cache, "key"), ask(EDITED))
    assert restored(asked) == [len(EDITED)]
    assert len(said(asked)) == 8


def test_a_prompt_that_is_all_prefix_has_its_last_token_computed(windowed: Model) -> None:
    """Its logits are needed, so the update ends before it."""
    session = Session(windowed)
    run(session, ask(TREE, []))
    events = run(session, ask(EDITED, [], max_tokens=1))
    assert of_kind(events, Updated)[0].tokens == len(EDITED) - 1
    assert len(said(events)) == 1


def test_auto_updates_only_what_is_worth_it(windowed: Model) -> None:
    """A small edit far from the end is updated, one near the end computed exactly."""
    tree = ids(1200)
    session = Session(windowed)
    run(session, ask(tree))
    late = [*tree[:900], 7, *tree[901:]]
    events = run(session, ask(late, update="auto"))
    assert of_kind(events, Updated) == []
    assert said(events) == cold_answer(windowed, ask(late))
    early = [*tree[:200], 7, *tree[201:900], 7, *tree[901:]]
    assert of_kind(run(session, ask(early, update="auto")), Updated)[0].computed == 1 + inplace._SETTLE


def test_too_stale_a_context_is_computed_anew(windowed: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so, and the answer is that of a cold run."""
    monkeypatch.setattr(inplace, "STALEST", 0.001)
    session = Session(windowed)
    run(session, ask(TREE))
    events = run(session, ask(EDITED))
    assert ["is not updated in place" in event.text for event in of_kind(events, Notice)] == [True]
    assert of_kind(events, Updated) == []
    assert said(events) == cold_answer(windowed, ask(EDITED))


# 3. Requests that ask for exactness get it.


def mutated(tree: Sequence[int], chance: np.random.Generator) -> list[int]:
    """A tree after some edits, of which one may be long."""
    new = list(tree)
    for _ in range(int(chance.integers(1, 4))):
        place = int(chance.integers(0, len(new)))
        added = ids(int(chance.integers(0, 50)), int(chance.integers(1000)))
        new[place : place + int(chance.integers(0, 50))] = added
    return new


@pytest.mark.parametrize("seed", range(6))
def test_exact_requests_after_updates_are_as_cold_ones(
    windowed: Model, cache: CacheConfig, seed: int
) -> None:
    """In memory and from the disk, whatever was updated before: the same tokens and the same logits."""
    model = windowed
    chance = np.random.default_rng(seed)
    session = Session(model, cache, "key")
    tree = TREE
    run(session, ask(tree))
    for step in range(4):
        for _ in range(int(chance.integers(1, 3))):
            tree = mutated(tree, chance)
            question = ids(int(chance.integers(1, 90)), step)
            run(session, ask(tree, question, exact=bool(chance.integers(2))))
        tree = mutated(tree, chance) if chance.integers(2) else tree
        expected = cold_logits(model, ask(tree))
        answer = said(run(Session(model), ask(tree)))
        on_disk = Session(model, cache, "key")
        got, _ = logits_after(on_disk, ask(tree, update="exact", save=False))
        assert np.array_equal(got, expected)
        # A model holds the KV cache of one session: this one's is computed again, with an update in between.
        session = Session(model, cache, "key")
        before = mutated(tree, chance)
        run(session, ask(before, update="exact"))
        run(session, ask(tree, save=False))
        got, events = logits_after(session, ask(tree, update="exact"))
        assert np.array_equal(got, expected)
        assert of_kind(events, Updated) == []
        assert said(run(session, ask(tree, update="exact"))) == answer


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
def test_quantized_keys_of_any_width_can_be_turned_or_are_left(
    gemma3: Path, state_dir: Path, kv_type: Any
) -> None:
    """Heads whose width is no multiple of 64 do not crash the engine when a context should be updated."""
    config = configured(gemma3, kv_type_k=kv_type, kv_type_v=kv_type)
    tree = ids(1200)
    with LocalEngine(config, state_dir=state_dir) as engine:
        list(engine.generate(ask(tree, update="auto")))
        events = list(engine.generate(ask([*tree[:100], 7, 8, *tree[100:]], update="auto")))
    assert len(said(events)) == 8


def test_a_conversation_goes_on_after_an_update(windowed: Model) -> None:
    """A turn reuses the updated context and its own answer; an exact request later reuses neither."""
    session = Session(windowed)
    run(session, ask(TREE))
    answer = said(run(session, ask(EDITED)))
    turn = [*QUESTION, *answer, *ids(30, 5)]
    events = run(session, ask(EDITED, turn, exact=False))
    assert restored(events) == [len(EDITED) + len(QUESTION) + len(answer) - 1]
    assert len(said(events)) == 8
    again = [*EDITED[:200], 9, *EDITED[200:]]
    assert of_kind(run(session, ask(again, turn, exact=False)), Updated)
    got, events = logits_after(session, ask(EDITED, turn, update="exact"))
    assert restored(events) == [3 * BATCH]
    assert np.array_equal(got, cold_logits(windowed, ask(EDITED, turn)))


# 4. On the disk.


def entries(cache: CacheConfig, key: str = "key-inplace") -> list[Any]:
    return [each for each in SnapshotStore(Path(cache.directory), key).entries() if each.manifest.key == key]


def test_an_updated_context_is_saved_apart(windowed: Model, cache: CacheConfig) -> None:
    """It is found by the next process, and goes on from there; the last two of its label are kept."""
    session = Session(windowed, cache, "key")
    run(session, ask(TREE))
    assert of_kind(run(session, ask(EDITED)), Saved)[0].tokens == len(EDITED)
    (entry,) = entries(cache)
    assert (entry.manifest.label, entry.manifest.tokens) == ("tree", len(EDITED))
    changed = changed_of(entry.manifest.changed, len(EDITED))
    assert changed.tolist() == [0] * 384 + [20] * (len(EDITED) - 384)
    again = [*EDITED[:100], *ids(90, 7), *EDITED[100:]]
    events = run(Session(windowed, cache, "key"), ask(again))
    assert of_kind(events, Restored)[0].source == "disk"
    (updated,) = of_kind(events, Updated)
    assert (updated.edits, updated.computed) == (1, 90 + inplace._SETTLE)
    entry = max(entries(cache), key=lambda each: each.manifest.tokens)
    assert entry.manifest.tokens == len(again)
    changed = changed_of(entry.manifest.changed, len(again))
    assert changed.tolist() == [0] * 254 + [90] * (390 - 170 + 0) + [110] * (len(again) - 474)
    assert updated.staleness == pytest.approx(staleness(changed))
    assert [each.manifest.tokens for each in entries(cache, "key")] == [len(TREE)]
    third = [*again[:50], *ids(90, 8), *again[50:]]
    run(Session(windowed, cache, "key"), ask(third))
    assert sorted(each.manifest.tokens for each in entries(cache)) == [len(again), len(third)]


def test_updated_contexts_never_serve_exact_requests(windowed: Model, cache: CacheConfig) -> None:
    """Nor a request without updates: it finds what was computed exactly, or nothing."""
    session = Session(windowed, cache, "key")
    run(session, ask(TREE))
    run(session, ask(EDITED))
    for each in entries(cache, "key"):
        shutil.rmtree(each.directory)
    assert len(entries(cache)) == 1
    for options in ({"update": "exact"}, {"update": "exact", "exact": False}):
        events = run(Session(windowed, cache, "key"), ask(EDITED, save=False, **options))
        assert restored(events) == []
        assert said(events) == cold_answer(windowed, ask(EDITED))


def test_contexts_of_other_trees_are_left_alone(windowed: Model, cache: CacheConfig) -> None:
    """The last two of each label are kept; without a label all are."""
    session = Session(windowed, cache, "key")
    other = ids(500, 9)
    for label, tree in (("other", other), ("", other[::-1]), ("tree", TREE)):
        run(session, ask(tree, label=label))
        once = [*tree[:300], *ids(70, 3), *tree[300:]]
        twice = [*once[:200], *ids(70, 4), *once[200:]]
        thrice = [*twice[:100], *ids(70, 5), *twice[100:]]
        for changed in (once, twice, thrice):
            assert of_kind(run(session, ask(changed, label=label)), Saved)
    sizes = sorted((each.manifest.label, each.manifest.tokens) for each in entries(cache))
    assert sizes == [
        *(("", 570), ("", 640), ("", 710)),
        *(("other", 640), ("other", 710), ("tree", 740), ("tree", 810)),
    ]


def test_a_tree_that_only_begins_another_keeps_its_updated_context(
    windowed: Model, cache: CacheConfig
) -> None:
    """Updated contexts are found by their label, so that of another tree does not stand in for one."""
    session = Session(windowed, cache, "key")
    run(session, ask(TREE, label="short"))
    assert of_kind(run(session, ask(EDITED, label="short")), Saved)
    longer = [*EDITED, *ids(200, 6)]
    base = [*TREE, *ids(200, 6)]
    run(session, ask(base, label="long", update="exact"))
    assert of_kind(run(session, ask(longer, label="long")), Saved)
    assert sorted(each.manifest.label for each in entries(cache)) == ["long", "short"]


def test_a_context_that_went_on_after_its_update_is_whole_again(windowed: Model, cache: CacheConfig) -> None:
    """Tokens that were computed behind an update are saved with it, and can be updated in their turn."""
    session = Session(windowed, cache, "key")
    run(session, ask(TREE, []))
    run(session, ask(EDITED, [], max_tokens=1))  # its last token is not part of the update
    (entry,) = entries(cache)
    assert len(changed_of(entry.manifest.changed, len(EDITED))) == entry.manifest.tokens == len(EDITED)
    longer = [*EDITED, *ids(40, 8)]
    events = run(Session(windowed, cache, "key"), ask(longer))
    assert len(said(events)) == 8


def test_a_run_that_was_stopped_after_its_update_goes_on(windowed: Model, cache: CacheConfig) -> None:
    """What was computed of a long question until the stop serves the next update."""
    done = 0
    session = Session(windowed, cache, "key", lambda: done >= len(EDITED) + BATCH)
    run(session, ask(TREE))
    question = ids(300, 5)
    for event in session.generate(ask(EDITED, question)):
        if isinstance(event, Prefilled):
            done = event.done
    assert isinstance(event, Stopped)
    assert event.saved == event.done
    later = [*EDITED[:50], 9, *EDITED[51:], *question]
    events = run(Session(windowed, cache, "key"), ask(later))
    assert of_kind(events, Updated)
    assert len(said(events)) == 8


@pytest.mark.parametrize("name", ["state.bin", "tokens.bin"])
def test_a_damaged_updated_context_is_not_loaded(windowed: Model, cache: CacheConfig, name: str) -> None:
    """It costs a notice, and the answer is that of a context without it."""
    session = Session(windowed, cache, "key")
    run(session, ask(TREE))
    run(session, ask(EDITED))
    for each in entries(cache, "key"):
        shutil.rmtree(each.directory)
    (entry,) = entries(cache)
    file = entry.directory / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    later = [*EDITED[:100], 7, *EDITED[100:]]
    events = run(Session(windowed, cache, "key"), ask(later))
    assert ["is ignored and removed" in event.text for event in of_kind(events, Notice)] == [True]
    assert restored(events) == []
    assert said(events) == cold_answer(windowed, ask(later))
    assert not entry.directory.exists()


@pytest.mark.parametrize("writes", [False, True])
def test_contexts_are_shared_whether_or_not_they_can_be_updated(
    gemma3: Path, windowed: Model, cache: CacheConfig, writes: bool
) -> None:
    """What one process saved without updates is found by one with them, and the other way round."""
    with opened(gemma3, in_place=False) as plain:
        writer, reader = (windowed, plain) if writes else (plain, windowed)
        first = run(Session(writer, cache, "key"), ask(TREE, update="exact"))
        got, events = logits_after(Session(reader, cache, "key"), ask(TREE, update="exact"))
        assert restored(events) == [len(TREE)]
        assert np.array_equal(got, cold_logits(reader, ask(TREE)))
        assert np.array_equal(got, cold_logits(writer, ask(TREE)))
        assert said(first) == cold_answer(reader, ask(TREE))


# 5. Updates that do not come to their end.


def test_a_stop_in_the_middle_of_an_update_keeps_its_beginning(windowed: Model, cache: CacheConfig) -> None:
    """What stands before the end of what was computed is saved, and gone on from."""
    stop = False
    new = [*TREE[:100], *ids(150, 4), *TREE[100:]]
    session = Session(windowed, cache, "key", lambda: stop)
    run(session, ask(TREE, save=False))
    events: list[Event] = []
    for event in session.generate(ask(new)):
        events.append(event)
        stop = len(of_kind(events, Prefilled)) == 2
    assert events[-1] == Stopped(100 + BATCH, 100 + BATCH)
    assert of_kind(events, Updated) == []
    assert [each.manifest.tokens for each in entries(cache)] == [100 + BATCH]
    stop = False
    got, events = logits_after(Session(windowed, cache, "key"), ask(new))
    assert restored(events) == [100 + BATCH]
    assert of_kind(events, Updated)[0].computed == len(new) - 100 - BATCH
    np.testing.assert_allclose(got, cold_logits(windowed, ask(new)), atol=0.05)
    session = Session(windowed)
    run(session, ask(new))
    got, events = logits_after(session, ask(new, update="exact"))
    assert np.array_equal(got, cold_logits(windowed, ask(new)))


def test_a_consumer_that_leaves_in_the_middle_of_an_update(windowed: Model) -> None:
    """Whoever does not ask for the rest of the events leaves an empty context."""
    session = Session(windowed)
    run(session, ask(TREE))
    for event in session.generate(ask([*TREE[:100], *ids(150, 4), *TREE[100:]])):
        if isinstance(event, Prefilled) and event.done > len(TREE) - inplace._SETTLE:
            break
    got, events = logits_after(session, ask(TREE, update="exact"))
    assert restored(events) == []
    assert np.array_equal(got, cold_logits(windowed, ask(TREE)))


@pytest.mark.parametrize("error", [EngineCrashError, DoesNotFitError])
@pytest.mark.parametrize("call", [1, 3])
def test_an_update_that_fails_leaves_nothing(
    windowed: Model, monkeypatch: pytest.MonkeyPatch, error: type[EngineCrashError], call: int
) -> None:
    """The error is the run's, and the next request begins anew."""
    new = [*TREE[:100], *ids(150, 4), *TREE[100:]]
    session = Session(windowed)
    run(session, ask(TREE))
    compute, calls = windowed.compute, 0

    def fail(batch: Any, count: int) -> bool:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error("It failed.", "Try again.")
        return compute(batch, count)

    with monkeypatch.context() as patch:
        patch.setattr(windowed, "compute", fail)
        with pytest.raises(error):
            run(session, ask(new))
    got, events = logits_after(session, ask(new, update="exact"))
    assert restored(events) == []
    assert np.array_equal(got, cold_logits(windowed, ask(new)))


def test_an_aborted_update_keeps_its_beginning(windowed: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop that comes while a batch is computed ends it there."""
    new = [*TREE[:100], *ids(150, 4), *TREE[100:]]
    stopped: list[bool] = []
    session = Session(windowed, stopping=lambda: bool(stopped))
    run(session, ask(TREE))
    compute = windowed.compute

    def abort(batch: Any, count: int) -> bool:
        stopped.append(True)
        if len(stopped) == 2:
            windowed.abort()
        return compute(batch, count)

    with monkeypatch.context() as patch:
        patch.setattr(windowed, "compute", abort)
        patch.setattr(session, "_stopping", lambda: len(stopped) >= 2)
        events = run(session, ask(new))
    windowed.go_on()
    stopped.clear()
    assert events[-1] == Stopped(100 + BATCH, 0)
    got, events = logits_after(session, ask(new, update="exact"))
    assert restored(events) == [BATCH]
    assert np.array_equal(got, cold_logits(windowed, ask(new)))


# 6. Models that cannot be updated.


def test_a_model_without_room_for_updates_refuses_them(gemma3: Path) -> None:
    """Who asks for an update is told; who leaves the choice gets an exact answer."""
    tree = ids(1200)
    edited = [*tree[:100], 7, *tree[100:]]
    with opened(gemma3, in_place=False) as model:
        session = Session(model)
        with pytest.raises(ImpossibleError, match="cannot be updated in place"):
            run(session, ask(tree))
        run(session, ask(tree, update="auto"))
        events = run(session, ask(edited, update="auto"))
        assert of_kind(events, Updated) == []
        assert said(events) == cold_answer(model, ask(edited))


def test_a_recurrent_model_is_never_updated(tmp_path: Path) -> None:
    """Its state is of all tokens at once."""
    with opened(write_mamba(tmp_path / "mamba.gguf")) as model:
        assert model.update_problem
        session = Session(model)
        with pytest.raises(ImpossibleError, match="cannot be updated in place"):
            run(session, ask(TREE))
        run(session, ask(TREE, update="auto"))
        events = run(session, ask(EDITED, update="auto"))
        assert said(events) == cold_answer(model, ask(EDITED))


def test_sparse_attention_is_not_updated(tiny_gguf: Path) -> None:
    """With room for updates, llama.cpp would run MSA densely: that is refused, as other such settings are."""
    with opened(tiny_gguf, in_place=False) as model:
        assert (model.attention, bool(model.update_problem)) == ("sparse", True)
    with pytest.raises(ModelError, match="dense attention"):
        Model(configured(tiny_gguf), extra_buffers=False)


def test_a_context_grows_by_updates_until_it_is_full(
    windowed: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Places of removed tokens are used again, up to the last one that the context has."""
    monkeypatch.setattr(inplace, "STALEST", 1.0)
    session = Session(windowed)
    chance = np.random.default_rng(3)
    tree = ids(1500)
    run(session, ask(tree))
    for size in (1700, 1400, 1900, 2048 - len(QUESTION) - 8):
        place = int(chance.integers(100, 500))
        grown = size - len(tree)
        if grown > 0:
            tree = [*tree[:place], *ids(grown, size), *tree[place:]]
        else:
            tree = [*tree[:place], *tree[place - grown :]]
        events = run(session, ask(tree))
        assert of_kind(events, Updated)[0].tokens == size
        assert len(said(events)) == 8
