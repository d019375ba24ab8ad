"""LoRA adapters: applied as if they were merged, kept apart on the disk, and refused when they do not fit."""

from __future__ import annotations

import shutil
from array import array
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3cli.engine.adapters import check_adapters
from m3cli.engine.dry_run import DryRun
from m3cli.engine.events import CacheConfig, EngineConfig, Finished, Request, Restored, Saved, Token
from m3cli.engine.llama import Model
from m3cli.engine.local import LocalEngine
from m3cli.engine.process import WorkerProcess
from m3cli.engine.snapshot_key import snapshot_key
from m3cli.errors import ModelError, UsageError
from m3cli.model.header import read_header
from m3cli.model.tokens import pack_ids
from tests.gguf_files import write_gguf
from tests.llama_logits import last_logits
from tests.tiny_models import ids, write_gemma3

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]

EMBEDDING = "token_embd.weight"
RANK, ALPHA = 4, 6.0
BATCH = 32
LORA = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": ALPHA}
# Every kind of matrix, in the first and in a later layer.
DENSE = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
DENSE_NAMES = [f"blk.{layer}.{name}.weight" for layer in (0, 3) for name in DENSE]


def make_tensors(model: Path, names: Sequence[str], seed: int = 0, size: float = 0.3) -> dict[str, Floats]:
    """Random A and B for matrices of a model, in numpy's order of dimensions: [experts,] rows, columns."""
    chance = np.random.default_rng(seed)
    dims = {tensor.name: tensor.dims for tensor in read_header(model).tensors}
    tensors = {}
    for name in names:
        columns, rows, *experts = dims[name]
        shapes = {"a": (*experts, RANK, columns), "b": (*experts, rows, RANK)}
        if name == EMBEDDING:  # llama.cpp wants A transposed, and takes a row of it for each token
            shapes = {"a": (rows, RANK), "b": (columns, RANK)}
        for half, shape in shapes.items():
            tensors[f"{name}.lora_{half}"] = chance.normal(0, size, shape).astype(np.float32)
    return tensors


def write_adapter(
    path: Path, tensors: Mapping[str, Floats], fields: Mapping[str, Any] | None = None, arch: str = "gemma3"
) -> Path:
    """Write a LoRA; fields replace the usual ones, and None leaves one out."""
    kept = {key: value for key, value in {**LORA, **(fields or {})}.items() if value is not None}
    return write_gguf(path, kept, tensors, arch)


def merge(model: Path, path: Path, tensors: Mapping[str, Floats], factor: float) -> Path:
    """Copy a model in float32 with `factor` times B @ A added to its weights."""
    shutil.copyfile(model, path)
    for tensor in read_header(model).tensors:
        if f"{tensor.name}.lora_a" in tensors:
            assert tensor.type == "F32"
            shape = tuple(reversed(tensor.dims))
            weights = np.memmap(path, np.float32, "r+", tensor.offset, shape)
            a, b = (tensors[f"{tensor.name}.lora_{half}"].astype(np.float64) for half in "ab")
            weights += (factor * (a @ b.T if tensor.name == EMBEDDING else b @ a)).astype(np.float32)
            weights.flush()
    return path


def config_of(model: Path | str, *lora: tuple[Path, float], n_ctx: int = 512) -> EngineConfig:
    adapters = tuple((str(path), scale) for path, scale in lora)
    return EngineConfig(str(model), n_ctx, n_batch=BATCH, n_ubatch=BATCH, threads=1, lora=adapters)


def logits(config: EngineConfig, tokens: Sequence[int]) -> Floats:
    """Logits after each batch, of shape [batches, vocabulary]."""
    model = Model(config, extra_buffers=False)
    held, rows = array("i", tokens), []
    for start in range(0, len(held), BATCH):
        assert model.decode(held, start, min(BATCH, len(held) - start))
        rows.append(last_logits(model))
    model.close()
    return np.stack(rows)


def distance(one: Floats, other: Floats) -> float:
    """Largest difference of two logits."""
    return float(np.abs(one - other).max())


def assert_acts_as_if_merged(
    config: EngineConfig, merged: Path, *, model: Path, tokens: Sequence[int]
) -> None:
    """The adapters change the logits much, and differ from merged weights by what float32 and f16 lose."""
    base, adapted = logits(config_of(model), tokens), logits(config, tokens)
    assert distance(adapted, base) > 1
    assert distance(adapted, logits(config_of(merged), tokens)) < distance(adapted, base) / 500


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gemma3(tmp_path_factory.mktemp("gemma3") / "gemma3.gguf")


@pytest.fixture(scope="module")
def dense(gemma3: Path) -> dict[str, Floats]:
    return make_tensors(gemma3, DENSE_NAMES)


@pytest.fixture(scope="module")
def adapter(gemma3: Path, dense: dict[str, Floats]) -> Path:
    """One that fits the model and changes every kind of matrix."""
    return write_adapter(gemma3.with_name("adapter.gguf"), dense)


@pytest.fixture(scope="module")
def m3_tensors(tiny_gguf: Path) -> dict[str, Floats]:
    names = [tensor.name for tensor in read_header(tiny_gguf).tensors if len(tensor.dims) > 1]
    return make_tensors(tiny_gguf, names, size=0.05)


@pytest.fixture(scope="module")
def m3_adapter(m3_tensors: dict[str, Floats], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that changes every matrix of the tiny MiniMax-M3."""
    path = tmp_path_factory.mktemp("adapters") / "m3.gguf"
    return write_adapter(path, m3_tensors, arch="minimax-m3")


@pytest.mark.parametrize("scale", [1.0, 0.5, -2.0])
def test_an_adapter_acts_as_if_it_were_merged(
    gemma3: Path, adapter: Path, dense: dict[str, Floats], scale: float, tmp_path: Path
) -> None:
    """What is added to the weights is scale times alpha / rank times B @ A."""
    merged = merge(gemma3, tmp_path / "merged.gguf", dense, scale * ALPHA / RANK)
    assert_acts_as_if_merged(config_of(gemma3, (adapter, scale)), merged, model=gemma3, tokens=ids(150))


def test_experts_indexer_and_embeddings_are_adapted_too(
    tiny_gguf: Path, m3_tensors: dict[str, Floats], m3_adapter: Path, tmp_path: Path
) -> None:
    """An adapter of all matrices of a MiniMax-M3, over more tokens than one query attends."""
    changed = {name.rpartition(".")[0] for name in m3_tensors}
    assert {EMBEDDING, "blk.3.ffn_down_exps.weight", "blk.3.indexer.k_proj.weight"} <= changed
    merged = merge(tiny_gguf, tmp_path / "merged.gguf", m3_tensors, ALPHA / RANK)
    config = config_of(tiny_gguf, (m3_adapter, 1.0))
    assert_acts_as_if_merged(config, merged, model=tiny_gguf, tokens=ids(300))


def test_without_alpha_the_scale_is_all(gemma3: Path, dense: dict[str, Floats], tmp_path: Path) -> None:
    """Adapters in float16 that say nothing of alpha are what their B @ A is."""
    half = {name: values.astype(np.float16) for name, values in dense.items()}
    adapter = write_adapter(tmp_path / "adapter.gguf", half, {"adapter.lora.alpha": None})
    merged = merge(gemma3, tmp_path / "merged.gguf", half, 0.5)
    assert_acts_as_if_merged(config_of(gemma3, (adapter, 0.5)), merged, model=gemma3, tokens=ids(150))


def test_adapters_add_up(gemma3: Path, adapter: Path, dense: dict[str, Floats], tmp_path: Path) -> None:
    """Two adapters of the same matrices, each with its scale."""
    tensors = make_tensors(gemma3, DENSE_NAMES[:4], seed=1)
    other = write_adapter(tmp_path / "other.gguf", tensors)
    first = merge(gemma3, tmp_path / "first.gguf", dense, ALPHA / RANK)
    merged = merge(first, tmp_path / "merged.gguf", tensors, -0.5 * ALPHA / RANK)
    config = config_of(gemma3, (adapter, 1.0), (other, -0.5))
    assert_acts_as_if_merged(config, merged, model=gemma3, tokens=ids(150))


def test_scale_zero_is_no_adapter(gemma3: Path, adapter: Path) -> None:
    """The logits are those of the model alone, to the last bit."""
    tokens = ids(150)
    base = logits(config_of(gemma3), tokens)
    assert np.array_equal(logits(config_of(gemma3, (adapter, 0.0)), tokens), base)


def test_a_real_model_answers_otherwise(
    smollm2: str, state_dir: Path, chat_prompt: Callable[[str], list[int]], tmp_path: Path
) -> None:
    """In the worker, an adapter of quantized weights changes the answer, and scale 0 does not."""
    names = [f"blk.{layer}.attn_{part}.weight" for layer in range(30) for part in "qv"]
    tensors = make_tensors(Path(smollm2), names, size=0.2)
    adapter = write_adapter(tmp_path / "adapter.gguf", tensors, arch="llama")
    request = Request(chat_prompt("What is the capital of France?"), 8)
    answers = []
    for lora in ((), ((adapter, 0.0),), ((adapter, 1.0),)):
        with LocalEngine(config_of(smollm2, *lora), state_dir=state_dir) as engine:
            answers.append("".join(e.text for e in engine.generate(request) if isinstance(e, Token)))
    assert "Paris" in answers[0]
    assert answers[1] == answers[0] != answers[2]


def test_a_snapshot_serves_its_own_adapters_only(
    tiny_gguf: Path, m3_adapter: Path, state_dir: Path, tmp_path: Path
) -> None:
    """What was computed with an adapter is not restored without it, nor the other way round."""
    cache = CacheConfig(str(tmp_path), "digest", "model")
    request = Request(ids(320), 8, prefix=300)

    def run(*lora: tuple[Path, float], keep: bool = True) -> tuple[list[int], int, int]:
        with LocalEngine(
            config_of(tiny_gguf, *lora), state_dir=state_dir, cache=cache if keep else None
        ) as engine:
            events = list(engine.generate(request))
        assert isinstance(events[-1], Finished)
        return (
            [event.id for event in events if isinstance(event, Token)],
            sum(event.tokens for event in events if isinstance(event, Restored)),
            sum(event.tokens for event in events if isinstance(event, Saved)),
        )

    plain, _, _ = run(keep=False)
    adapted, _, _ = run((m3_adapter, 1.0), keep=False)
    halved, _, _ = run((m3_adapter, 0.5), keep=False)
    assert len({tuple(plain), tuple(adapted), tuple(halved)}) == 3
    assert run((m3_adapter, 1.0)) == (adapted, 0, 300)
    assert run() == (plain, 0, 300)
    assert run((m3_adapter, 0.5)) == (halved, 0, 300)
    assert run((m3_adapter, 1.0)) == (adapted, 300, 0)
    assert run() == (plain, 300, 0)


def test_a_key_holds_the_content_of_adapters(
    gemma3: Path, adapter: Path, dense: dict[str, Floats], tmp_path: Path
) -> None:
    """Neither place nor order counts, nor an adapter that changes nothing; weights and scale do."""
    cache = CacheConfig("/c", "digest", "model")
    changed = {name: values.copy() for name, values in dense.items()}
    changed[f"{DENSE_NAMES[-1]}.lora_b"][-1, -1] += 1
    other = write_adapter(tmp_path / "adapter.gguf", changed)
    copy = Path(shutil.copyfile(adapter, tmp_path / "copy.gguf"))

    def key(*lora: tuple[Path, float]) -> str:
        return snapshot_key(config_of(gemma3, *lora), cache, "build", "full")

    assert key((adapter, 1.0)) == key((copy, 1)) == key((copy, 1.0), (other, 0.0))
    assert key((adapter, 1.0), (other, 0.5)) == key((other, 0.5), (copy, 1.0))
    assert key() == key((adapter, 0.0))
    keys = [
        key(),
        key((adapter, 1.0)),
        key((adapter, 0.5)),
        key((other, 1.0)),
        key((adapter, 1.0), (other, 0.5)),
        key((adapter, 0.5), (other, 1.0)),
        key((adapter, 1.0), (adapter, 1.0)),
    ]
    assert len(set(keys)) == len(keys)


def test_a_dry_run_leaves_adapters_out(gemma3: Path) -> None:
    """They need not be there to measure the rest."""
    with DryRun(str(gemma3), extra_buffers=False) as dry_run:
        alone = dry_run.need(config_of(gemma3))
        assert dry_run.need(config_of(gemma3, (Path("/nonexistent.gguf"), 1.0))) == alone


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e39])
def test_a_scale_is_a_finite_number(gemma3: Path, adapter: Path, scale: float) -> None:
    """In float32, which llama.cpp computes with."""
    with pytest.raises(UsageError, match="with a scale of"):
        check_adapters(config_of(gemma3, (adapter, scale)))


def test_too_many_adapters_are_refused(tiny_gguf: Path, m3_adapter: Path) -> None:
    """As many as are allowed have room in the graph of an architecture that leaves none for adapters."""
    config = config_of(tiny_gguf, *[(m3_adapter, 0.1)] * 8)
    assert np.isfinite(logits(config, ids(100))).all()
    with pytest.raises(UsageError, match=r"^9 adapters were given, and 8 can be applied at once"):
        check_adapters(replace(config, lora=(*config.lora, (str(m3_adapter), 1.0))))


QUERY = "blk.0.attn_q.weight"  # 64 × 64


def pair(
    a: tuple[int, ...] = (RANK, 64),
    b: tuple[int, ...] = (64, RANK),
    name: str = QUERY,
    type_: str = "float32",
) -> dict[str, Floats]:
    return {f"{name}.lora_a": np.ones(a, type_), f"{name}.lora_b": np.ones(b, type_)}


FLOAT64 = gguf.GGUFValueType.FLOAT64
# What is wrong → tensors, fields and architecture of the adapter, and what the error says of it.
# Those without a comment would kill llama.cpp.
REFUSED: dict[str, tuple[dict[str, Floats], dict[str, Any], str, str]] = {
    # llama.cpp says these by itself, but after it has read the weights.
    "a model": (pair(), {"general.type": "model"}, "gemma3", "its key general.type is model"),
    "no type": (pair(), {"general.type": None}, "gemma3", "its key general.type is missing"),
    "a vector": (pair(), {"adapter.type": "cvec"}, "gemma3", "its key adapter.type is cvec"),
    "another architecture": (pair(), {}, "llama", "for the architecture llama, and .* is of gemma3"),
    # Would change nothing.
    "nothing": ({}, {}, "gemma3", "holds no tensors of a LoRA"),
    # Would be applied from the first token on.
    "activated": (pair(), {"adapter.alora.invocation_tokens": [5, 6]}, "gemma3", "an activated LoRA"),
    # Would make every logit no number.
    "infinite alpha": (pair(), {"adapter.lora.alpha": float("inf")}, "gemma3", "no finite number of 32 bits"),
    "number as type": (pair(), {"general.type": 7}, "gemma3", "its key general.type is missing"),
    "wide alpha": (pair(), {"adapter.lora.alpha": (6.0, FLOAT64)}, "gemma3", "no finite number of 32 bits"),
    "alpha as text": (pair(), {"adapter.lora.alpha": "6"}, "gemma3", "no finite number of 32 bits"),
    "doubles": (pair(type_="float64"), {}, "gemma3", "lora_a is of type F64"),
    "integers": (pair(type_="int32"), {}, "gemma3", "lora_a is of type I32"),
    "experts": (pair((3, RANK, 64), (3, 64, RANK)), {}, "gemma3", "64×64 in the model, 64×4×3 and 4×64×3"),
    "other rank": (pair(b=(64, 5)), {}, "gemma3", "64×4 and 5×64 in the adapter"),
    "rank 0": (pair((0, 64), (64, 0)), {}, "gemma3", "64×0 and 0×64 in the adapter"),
    "half": ({f"{QUERY}.lora_a": np.ones((RANK, 64), np.float32)}, {}, "gemma3", "without its other half"),
    "hidden": (pair((3, RANK, 64), name=f"{QUERY}.lora_a"), {}, "gemma3", "a tensor with the odd name"),
    "tied": (pair((1000, RANK), (64, RANK), EMBEDDING), {}, "gemma3", "also uses for its output"),
    "rank of tied": (pair((1000, RANK), (64, 5), EMBEDDING), {}, "gemma3", "4×1000 and 5×64 in the adapter"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_before_the_weights_are_read(
    gemma3: Path, what: str, tmp_path: Path
) -> None:
    """The error names the adapter and what is wrong with it."""
    tensors, fields, architecture, words = REFUSED[what]
    adapter = write_adapter(tmp_path / "bad.gguf", tensors, fields, architecture)
    with pytest.raises(ModelError, match=rf"^The adapter .*bad\.gguf cannot be used: .*{words}") as caught:
        check_adapters(config_of(gemma3, (adapter, 1.0)))
    assert caught.value.hint.endswith(".")


def test_a_matrix_that_llama_cpp_cannot_adapt_is_refused(tmp_path: Path) -> None:
    """llama.cpp aborts at an adapter of a feed-forward matrix of type NVFP4."""
    name = "blk.0.ffn_up.weight"
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    blocks = np.zeros((8, 36), np.uint8)
    writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.NVFP4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    adapter = write_adapter(tmp_path / "a.gguf", pair(b=(8, RANK), name=name), arch="llama")
    with pytest.raises(ModelError, match="a matrix of type NVFP4"):
        check_adapters(config_of(tmp_path / "model.gguf", (adapter, 1.0)))


def test_files_that_are_no_adapter_say_why(gemma3: Path, adapter: Path, tmp_path: Path) -> None:
    """Missing, foreign and truncated files are told apart, and a model is not taken for an adapter."""
    text, cut = tmp_path / "text.gguf", tmp_path / "cut.gguf"
    text.write_text("This is not an adapter.", encoding="utf-8")
    cut.write_bytes(adapter.read_bytes()[:-1000])
    expected = {
        tmp_path / "none.gguf": ("There is no file .*none.gguf", "LoRA adapter"),
        tmp_path: ("is a directory", "LoRA adapter"),
        text: ("text.gguf is not a GGUF file", "LoRA adapter"),
        cut: ("cut.gguf is cut short", "Download the file again"),
        gemma3: ("gemma3.gguf cannot be used: it is no LoRA", "LoRA adapter"),
    }
    for path, (words, hint) in expected.items():
        with pytest.raises(ModelError, match=words) as caught:
            check_adapters(config_of(gemma3, (path, 1.0)))
        assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (pair((RANK, 96)), f"tensor '{QUERY}' has incorrect shape"),
        (pair(name="blk.9.attn_q.weight"), "LoRA tensor 'blk.9.attn_q.weight' does not exist in base model"),
        (
            {**pair(), "blk.0.attn_q.weight.dora": np.ones(64, np.float32)},
            "LoRA tensor 'blk.0.attn_q.weight.dora' has unexpected suffix",
        ),
    ],
    ids=["columns", "layer", "suffix"],
)
def test_an_adapter_for_another_model_is_refused_in_the_words_of_llama_cpp(
    gemma3: Path, state_dir: Path, tensors: dict[str, Floats], words: str, tmp_path: Path
) -> None:
    """The second of two adapters has the wrong shapes, and the worker lives on."""
    good = write_adapter(tmp_path / "good.gguf", pair())
    bad = write_adapter(tmp_path / "bad.gguf", tensors)
    with LocalEngine(config_of(gemma3, (good, 1.0), (bad, 1.0)), state_dir=state_dir) as engine:
        for _ in range(2):
            with pytest.raises(ModelError) as caught:
                list(engine.generate(Request(ids(5), 1)))
            assert caught.value.message == f"The adapter {bad} cannot be used with gemma3.gguf: {words}."
            assert caught.value.hint.startswith("Take an adapter that was made for this model")


@pytest.fixture(scope="module")
def worker() -> Iterator[WorkerProcess]:
    process = WorkerProcess()
    yield process
    process.close()


@given(data=st.data())
def test_no_broken_adapter_kills_the_worker(
    gemma3: Path, tmp_path_factory: pytest.TempPathFactory, worker: WorkerProcess, data: st.DataObject
) -> None:
    """Whatever stands in the file, it is applied or refused by one and the same process."""
    broken = tmp_path_factory.mktemp("broken") / "adapter.gguf"  # a worker keeps what has the same name
    content = bytearray(write_adapter(broken, pair()).read_bytes())
    header = min(tensor.offset for tensor in read_header(broken).tensors)
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    broken.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    config = config_of(gemma3, (broken, 1.0))
    request = {"max_tokens": 1, "sampling": {}, "prefix": 0, "label": "", "exact": True}
    message = {"op": "generate", "config": asdict(config), "cache": None, "extra_buffers": False}
    worker.send({**message, "request": request}, pack_ids(ids(5)))
    refused: tuple[str, ...] = ()
    try:
        while worker.receive()[0]["event"] != "Finished":
            pass
    except ModelError as error:
        refused = error.message, error.hint
    assert all(sentence.endswith(".") for sentence in refused)
