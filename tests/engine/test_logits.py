"""What the worker adds up over logits and weights, against the same computed in a plain way."""

from __future__ import annotations

import os
from array import array
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from m3cli.engine import llama_logits
from m3cli.engine.events import EngineConfig
from m3cli.engine.ggml_rows import dequantize, has_values
from m3cli.engine.llama_errors import sampled_rows, tensor_errors
from m3cli.engine.llama_logits import logits
from m3cli.errors import MachineError, ModelError
from m3cli.model.ggml_types import TENSOR_TYPES
from m3cli.model.header import read_header
from m3cli.model.tokens import pack_ids
from quantize.convert import convert
from quantize.events import ConvertRequest
from tests.llama_logits import llama_logits as all_logits
from tests.llama_logits import log_softmax

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

WINDOW, FIRST = 96, 48
NOT_IN_PACKAGE = {"Q1_0"}  # of types with values: the gguf package cannot dequantize it


@pytest.fixture(autouse=True)
def unloaded() -> Iterator[None]:
    """Free the model and the file that an operation keeps for the next message."""
    yield
    if llama_logits._model is not None:
        llama_logits._model.close()
    if llama_logits._predictions is not None:
        llama_logits._predictions.close()
    llama_logits._model = llama_logits._model_key = llama_logits._predictions = None


@pytest.fixture(scope="module")
def q8_0(tiny_m3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("q8_0") / "tiny.gguf"
    for _ in convert(ConvertRequest(tiny_m3, path, "q8_0")):
        pass
    return path


def windows(count: int) -> list[array[int]]:
    chance = np.random.default_rng(5)
    return [array("i", chance.integers(1000, size=WINDOW).tolist()) for _ in range(count)]


def run(
    path: Path, ids: Sequence[array[int]], directory: Path, *, keep: bool, n_batch: int = WINDOW
) -> NDArray[np.float64]:
    config = EngineConfig(str(path), WINDOW, n_batch=n_batch, n_ubatch=n_batch, threads=1, gpu_layers=0)
    replies = []
    for number, window in enumerate(ids):
        message = {
            "config": asdict(config),
            "first": FIRST,
            "position": number * (WINDOW - 1 - FIRST),
            "keep": keep,
            "directory": str(directory),
        }
        replies.append(np.frombuffer(logits(message, pack_ids(window))[1]))
    return np.concatenate([reply.reshape(4, -1) for reply in replies], axis=1) if not keep else np.empty(0)


def test_a_comparison_is_that_of_all_logits(tiny_gguf: Path, q8_0: Path, tmp_path: Path) -> None:
    """Over two windows, against logits that were taken another way.

    With a KV cache in f32, which here and there makes another expert or block the better one by a hair.
    """
    ids = windows(2)
    run(tiny_gguf, ids, tmp_path, keep=True)
    kl, kept_loss, loss, same_top = run(q8_0, ids, tmp_path, keep=False)
    counted = slice(FIRST, WINDOW - 1)
    old, new = (
        log_softmax(np.concatenate([all_logits(path, window, [WINDOW])[counted] for window in ids]))
        for path in (tiny_gguf, q8_0)
    )
    actual = np.concatenate([window[FIRST + 1 :] for window in ids])
    rows = np.arange(len(actual))
    want = (np.exp(old) * (old - new)).sum(axis=1)
    assert np.isclose(kl, want, rtol=0.1, atol=2e-3).mean() > 0.9
    assert kl.mean() == pytest.approx(want.mean(), rel=0.3)
    assert np.isclose(kept_loss, -old[rows, actual], atol=0.05).mean() > 0.9
    assert np.isclose(loss, -new[rows, actual], atol=0.05).mean() > 0.9
    assert (same_top == (old.argmax(1) == new.argmax(1))).mean() > 0.9


def test_batches_change_nothing(tiny_gguf: Path, tmp_path: Path) -> None:
    """A window computed in pieces, some of which no position of is wanted, is the same to rounding."""
    ids = windows(2)
    run(tiny_gguf, ids, tmp_path, keep=True)
    kl, kept_loss, loss, _ = run(tiny_gguf, ids, tmp_path, keep=False, n_batch=20)
    assert kl.shape == (2 * (WINDOW - 1 - FIRST),)
    assert kl.mean() < 2e-3
    assert loss == pytest.approx(kept_loss, abs=0.1)


def test_large_vocabularies_are_computed_in_small_batches(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for logits is bounded, whatever batch was asked for."""
    monkeypatch.setattr(llama_logits, "_LOGITS_BYTES", 13 * 1024 * 4)
    run(tiny_gguf, windows(1), tmp_path, keep=True)
    model = llama_logits._model
    assert model is not None
    assert [len(piece) for piece in model.logits(windows(1)[0])] == [12, 12, 12, 11]


def test_nothing_is_left_on_the_disk(tiny_gguf: Path, tmp_path: Path) -> None:
    """The file has no name, not even while it is used; a new reference begins a new one."""
    for _ in range(2):
        run(tiny_gguf, windows(1), tmp_path, keep=True)
        assert list(tmp_path.iterdir()) == []
    predictions = llama_logits._predictions
    assert predictions is not None
    assert os.fstat(predictions._file.fileno()).st_size == (WINDOW - 1 - FIRST) * 1024 * 2


def test_a_directory_that_cannot_be_written(tiny_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"cannot be kept in .*nowhere: No such file"):
        run(tiny_gguf, windows(1), tmp_path / "nowhere", keep=True)


@given(st.integers(0, 2**32), st.sampled_from([0.1, 3.0, 30.0]), st.integers(1, 5000))
@example(1, 0.1, 2)  # with two tokens, nothing evens the rounding out
def test_divergence_is_exact_to_the_rounding_of_the_file(seed: int, width: float, vocabulary: int) -> None:
    """Flat or peaked: against the definition, in float64 and with nothing rounded."""
    chance = np.random.default_rng(seed)
    old = chance.normal(0, width, vocabulary).astype(np.float32)
    new = (old + chance.normal(0, 0.1 * width, vocabulary)).astype(np.float32)
    actual = int(chance.integers(vocabulary))
    kept = llama_logits._encode(old, actual)
    p, q = log_softmax(old), log_softmax(new)
    kl, kept_loss, loss, same_top = llama_logits._compare(new, actual, kept)
    expected = (np.exp(p) * (p - q)).sum()
    # Codes are half a step off at most, and a divergence of d moves the shares by sqrt(2 d) (Pinsker).
    rounding = 2 * np.sqrt(2 * max(expected, 0.0)) / 2048
    assert kl == pytest.approx(expected, rel=1e-2, abs=1e-6 + rounding)
    assert kept_loss == pytest.approx(-p[actual], abs=1e-9)
    assert loss == pytest.approx(-q[actual], abs=1e-9)
    assert same_top == (p.argmax() == q.argmax())
    assert 0 <= llama_logits._compare(old, actual, kept)[0] < 1e-7


def test_logits_that_are_no_numbers() -> None:
    """A NaN is an error; a token that is ruled out by both is none, and changes nothing."""
    values = np.array([1, 2, np.nan, 0], np.float32)
    with pytest.raises(ModelError, match="predicts no numbers"):
        llama_logits._encode(values, 0)
    values[2] = -np.inf
    kl, *_, same_top = llama_logits._compare(values, 0, llama_logits._encode(values, 0))
    assert kl < 1e-7
    assert same_top


@pytest.mark.parametrize("kind", [each.name for each in TENSOR_TYPES.values()])
def test_values_are_those_of_the_gguf_package(kind: str) -> None:
    """All types that have values, on blocks of random bits."""
    layout = next(each for each in TENSOR_TYPES.values() if each.name == kind)
    data = np.random.default_rng(0).integers(0, 256, 8 * layout.nbytes, np.uint8)
    if not has_values(kind):
        with pytest.raises(ModelError, match=kind):
            dequantize(kind, data.tobytes(), 8 * layout.block)
        return
    got = dequantize(kind, data.data, 8 * layout.block)
    assert (got.dtype, got.shape) == (np.float32, (8 * layout.block,))
    if kind in NOT_IN_PACKAGE:
        return
    with np.errstate(invalid="ignore", over="ignore"):
        packed = {"F32": data.view(np.float32), "F16": data.view(np.float16)}.get(kind, data)
        want = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind]).ravel()
    finite = np.isfinite(want) & np.isfinite(got)
    assert finite.any()
    assert got[finite] == pytest.approx(want[finite], rel=1e-3)
    with pytest.raises(ValueError, match="weights of type"):
        dequantize(kind, data.tobytes(), 9 * layout.block)


@pytest.mark.parametrize("sample", [10, 100, 10**6])
@pytest.mark.parametrize("name", ["blk.1.ffn_down_exps.weight", "blk.0.attn_k_norm.weight", "output.weight"])
def test_weights_are_compared_row_by_row(tiny_gguf: Path, q8_0: Path, name: str, sample: int) -> None:
    """Of two files, against the gguf package: all rows, or those of the sample."""
    message: dict[str, Any] = {"name": name, "sample": sample, "threads": 2}
    values = []
    for side, path in (("reference", tiny_gguf), ("new", q8_0)):
        tensor = next(tensor for tensor in read_header(path).tensors if tensor.name == name)
        message[side] = {"path": str(path), "type": tensor.type, "offset": tensor.offset}
        message["columns"], message["rows"] = tensor.dims[0], tensor.elements // tensor.dims[0]
        data = next(each for each in gguf.GGUFReader(path).tensors if each.name == name)
        whole = gguf.quants.dequantize(data.data, data.tensor_type)
        values.append(whole.reshape(message["rows"], -1)[sampled_rows(message["rows"], sample)])
    result, _ = tensor_errors(message, b"")
    assert result["rows"] == min(sample, message["rows"])
    assert result["energy"] == pytest.approx(np.square(values[0], dtype=np.float64).sum())
    assert result["error"] == pytest.approx(
        np.square(values[0] - values[1], dtype=np.float64).sum(), abs=1e-9
    )


@given(st.integers(1, 10**12), st.integers(1, 2000))
def test_a_sample_is_spread(rows: int, sample: int) -> None:
    """Rising, none twice, and one in each of equal parts."""
    chosen = sampled_rows(rows, sample)
    assert len(chosen) == min(rows, sample)
    assert (np.diff(chosen) > 0).all()
    assert 0 <= chosen[0] <= chosen[-1] < rows
    if sample < rows:
        edges = np.arange(sample + 1) * rows // sample
        assert (edges[:-1] <= chosen).all()
        assert (chosen < edges[1:]).all()


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    np.array([1, np.nan], np.float32).tofile(path)
    side = {"path": str(path), "type": "F32", "offset": 0}
    message = {"name": "a.weight", "reference": side, "new": side}
    message.update({"rows": 1, "columns": 2, "sample": 1, "threads": 1})
    with pytest.raises(ModelError, match=r"a\.weight of .* holds a NaN"):
        tensor_errors(message, b"")
    with pytest.raises(ModelError, match="became shorter"):
        tensor_errors({**message, "columns": 3}, b"")
    assert tensor_errors({**message, "new": {**side, "type": "I32"}}, b"") == (None, b"")
