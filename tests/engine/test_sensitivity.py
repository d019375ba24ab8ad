"""Noise in place of errors of weights, against errors that are really in the weights."""

from __future__ import annotations

import shutil
from array import array
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import gguf
import numpy as np
import pytest

from m3cli.engine import ggml_tensor, llama_activations, llama_sensitivity
from m3cli.engine.events import EngineConfig
from m3cli.engine.ggml_tensor import op_name, values
from m3cli.engine.llama_activations import activations
from m3cli.engine.llama_sensitivity import sensitivity
from m3cli.engine.process import WorkerClient
from m3cli.errors import ModelError, UsageError
from m3cli.model.header import read_header
from m3cli.model.tokens import pack_ids
from tests.llama_logits import llama_logits

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from m3cli.engine.ggml_tensor import Tensor

WINDOW = 64  # as many as a query of the tiny model attends, so no error makes it choose other blocks
IDS = array("i", np.random.default_rng(3).integers(40, size=WINDOW).tolist())  # each token more than once
ERROR = 1e-5  # small enough that hardly a token goes to another expert

DENSE, SHARED, EXPERTS = "blk.2.attn_v.weight", "blk.1.ffn_down_shexp.weight", "blk.2.ffn_up_exps.weight"
LOOKED_UP, OUTPUT = "token_embd.weight", "output.weight"
LAST = ("blk.3.ffn_gate_exps.weight", "blk.3.ffn_down_exps.weight", "blk.3.ffn_up_shexp.weight", OUTPUT)


@pytest.fixture(autouse=True)
def unloaded() -> Iterator[None]:
    """Free what the operations keep for the next message."""
    yield
    unload()


def unload() -> None:
    if llama_sensitivity._probe is not None:
        llama_sensitivity._probe.close()
    if llama_activations._run is not None:
        llama_activations._run.close()
    llama_sensitivity._probe = llama_activations._run = None


def measure(
    path: Path | str,
    tensors: Sequence[str],
    error: float = ERROR,
    ids: array[int] = IDS,
    **options: Any,
) -> list[float | None]:
    config = {**asdict(EngineConfig(str(path), len(ids), threads=1, gpu_layers=0)), **options}
    message = {"config": config, "tensors": tensors, "error": error}
    result: list[float | None] = sensitivity(message, pack_ids(ids))[0]
    return result


def log_probabilities(path: Path) -> NDArray[np.float64]:
    """Of the positions that count, taken in another way."""
    logits = llama_logits(path, IDS, [WINDOW])[WINDOW // 2 :].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return result


def weights_of(path: Path, name: str) -> NDArray[np.float32]:
    """[matrices, rows, columns]."""
    tensor = next(each for each in gguf.GGUFReader(path).tensors if each.name == name)
    shape = [1, *tensor.shape[::-1].tolist()][-3:]
    return np.array(tensor.data, np.float32).reshape(shape)


def error_energy(path: Path, name: str, weights: NDArray[np.float32]) -> NDArray[np.float64]:
    """Mean square of an error of 1 in each weight, for inputs as they are: [matrices or 1, rows or 1, 1]."""
    if name == LOOKED_UP:
        return np.square(weights, dtype=np.float64).mean(axis=2, keepdims=True)
    message = {
        "config": asdict(EngineConfig(str(path), WINDOW, WINDOW, WINDOW, threads=1, gpu_layers=0)),
        "output_tensor": True,
        "totals": True,
    }
    result, payload = activations(message, pack_ids(IDS))
    sizes = [n_mat * n_cols for n_mat, n_cols in zip(result["n_mat"], result["n_cols"], strict=True)]
    at = result["names"].index(name)
    sums = np.frombuffer(payload, np.float64)[sum(sizes[:at]) : sum(sizes[: at + 1])]
    sums = sums.reshape(len(weights), 1, -1)
    energy = (sums * np.square(weights, dtype=np.float64).mean(axis=1, keepdims=True)).sum() / sums.sum()
    return np.full((1, 1, 1), energy)


@pytest.mark.parametrize("name", [DENSE, SHARED, EXPERTS, LOOKED_UP, OUTPUT])
def test_noise_does_what_errors_of_weights_do(tiny_gguf: Path, tmp_path: Path, name: str) -> None:
    """The divergence is that of weights that have Gaussian errors of the same energy, up to chance."""
    weights = weights_of(tiny_gguf, name)
    root = np.sqrt(ERROR * error_energy(tiny_gguf, name, weights))
    reference = log_probabilities(tiny_gguf)
    tensor = next(each for each in read_header(tiny_gguf).tensors if each.name == name)
    path = tmp_path / "disturbed.gguf"
    shutil.copy(tiny_gguf, path)
    actual = []
    for seed in range(4):
        changed = weights + root * np.random.default_rng(seed).normal(size=weights.shape)
        with path.open("r+b") as file:
            file.seek(tensor.offset)
            file.write(changed.astype(np.float32).tobytes())
        other = log_probabilities(path)
        actual.append((np.exp(reference) * (reference - other)).sum(axis=1).mean())
    (predicted,) = measure(tiny_gguf, [name])
    assert predicted == pytest.approx(np.mean(actual), rel=0.3)


class Seen(NamedTuple):
    """Of a node that was disturbed: operands, what it gave and what was put there."""

    inputs: NDArray[np.float32]
    indices: NDArray[np.int32] | None
    before: NDArray[np.float32]
    after: NDArray[np.float32]

    @property
    def noise(self) -> NDArray[np.float32]:
        """[rows, outputs]."""
        return (self.after - self.before).reshape(-1, self.before.shape[-1])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """What the operation changes, as it does."""
    nodes: list[Seen] = []
    store = ggml_tensor.store

    def noted(node: Tensor, elements: NDArray[np.float32]) -> None:
        indices = {"MUL_MAT": None, "GET_ROWS": 1, "MUL_MAT_ID": 2}[op_name(node.op)]
        nodes.append(
            Seen(
                values(node.source(1)).copy(),
                None if indices is None else values(node.source(indices)).copy(),
                values(node).copy(),
                elements.copy(),
            )
        )
        store(node, elements)
        np.testing.assert_array_equal(values(node), elements)

    monkeypatch.setattr(llama_sensitivity, "store", noted)
    return nodes


@pytest.mark.parametrize("name", ["blk.0.attn_q.weight", "blk.0.ffn_down.weight", OUTPUT])
def test_the_covariance_of_noise_is_that_of_inputs(tiny_gguf: Path, seen: list[Seen], name: str) -> None:
    """Tokens with like inputs get like errors, by the definition and up to chance."""
    measure(tiny_gguf, [name], 1e-3)
    (node,) = seen
    inputs = node.inputs.reshape(len(node.noise), -1).astype(np.float64)
    weights = weights_of(tiny_gguf, name)[0].astype(np.float64)
    energy = 1e-3 * (np.square(inputs) @ np.square(weights).mean(axis=0)).sum()
    want = inputs @ inputs.T
    want *= energy / np.trace(want)
    noise = node.noise.astype(np.float64)
    got = noise @ noise.T / noise.shape[1]
    assert np.trace(got) == pytest.approx(energy, rel=0.1)
    root = np.sqrt(np.outer(np.diag(want), np.diag(want)))
    np.testing.assert_allclose(got / root, want / root, atol=6 / noise.shape[1] ** 0.5)


@pytest.mark.parametrize("name", [EXPERTS, "blk.2.ffn_down_exps.weight"])
def test_experts_have_errors_of_their_own(tiny_gguf: Path, seen: list[Seen], name: str) -> None:
    """Within an expert the noise belongs together as its inputs do, between experts not at all."""
    measure(tiny_gguf, [name], 1e-3)
    (node,) = seen
    assert node.indices is not None
    chosen = node.indices[0, 0]
    inputs = np.broadcast_to(node.inputs[0], (*chosen.shape, node.inputs.shape[-1])).astype(np.float64)
    inputs = inputs.reshape(chosen.size, -1)
    energies = np.square(weights_of(tiny_gguf, name), dtype=np.float64).mean(axis=1)
    energy = 1e-3 * (np.square(inputs) @ energies.mean(axis=0)).sum()
    want = inputs @ inputs.T * (chosen.ravel()[:, None] == chosen.ravel())
    want *= energy / np.trace(want)
    noise = node.noise.astype(np.float64)
    got = noise @ noise.T / noise.shape[1]
    assert np.trace(got) == pytest.approx(energy, rel=0.1)
    root = np.sqrt(np.outer(np.diag(want), np.diag(want)))
    np.testing.assert_allclose(got / root, want / root, atol=6 / noise.shape[1] ** 0.5)


def test_a_token_always_has_the_same_error(tiny_gguf: Path, seen: list[Seen]) -> None:
    """Wherever it stands in the window, as large as its row of the embeddings is."""
    measure(tiny_gguf, [LOOKED_UP], 1e-3)
    (node,) = seen
    first = {token: IDS.index(token) for token in IDS}
    assert len(first) < WINDOW
    rows = node.before.reshape(WINDOW, -1)
    for place, token in enumerate(IDS):
        np.testing.assert_allclose(node.noise[place], node.noise[first[token]], atol=1e-6)
        relative = np.square(node.noise[place]).sum() / np.square(rows[place]).sum()
        assert relative == pytest.approx(1e-3, rel=0.5)


def test_divergence_grows_with_the_error(tiny_gguf: Path) -> None:
    """Ten times the energy is ten times the divergence, where no token goes to another expert."""
    small, large = (np.array(measure(tiny_gguf, LAST, error), float) for error in (1e-4, 1e-3))
    np.testing.assert_allclose(large / small, 10, rtol=0.1)
    assert measure(tiny_gguf, LAST, 0.0) == [0.0] * len(LAST)


def test_the_same_again(tiny_gguf: Path) -> None:
    """To the last digit, in whichever order and by whichever process tensors are measured."""
    first = measure(tiny_gguf, [DENSE, EXPERTS, LOOKED_UP])
    assert measure(tiny_gguf, [LOOKED_UP, EXPERTS, DENSE]) == first[::-1]
    with WorkerClient("measuring") as worker:
        config = asdict(EngineConfig(str(tiny_gguf), WINDOW, threads=1, gpu_layers=0))
        message = {"op": "sensitivity", "config": config, "tensors": [EXPERTS], "error": ERROR}
        assert worker.ask(message, pack_ids(IDS))[0]["result"] == [first[1]]


def test_embeddings_that_are_the_output_matrix_too(smollm2: str, seen: list[Seen]) -> None:
    """They are disturbed at both places; a tensor that the model does not have is not used."""
    tied, absent = measure(smollm2, [LOOKED_UP, OUTPUT], 1e-3)
    assert absent is None
    assert tied is not None
    assert tied > 0
    assert [node.indices is None for node in seen] == [False, True]


def test_batches_are_as_long_as_the_window(tiny_gguf: Path, seen: list[Seen]) -> None:
    """Whatever else is asked for: the noise of a window belongs together."""
    want = measure(tiny_gguf, [DENSE])
    assert measure(tiny_gguf, [DENSE], n_ctx=16, n_batch=16, n_ubatch=16) == want
    assert [len(node.noise) for node in seen] == [WINDOW, WINDOW]


def test_memory_for_logits_is_bounded(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large vocabulary fewer positions count, evenly spread over the second half."""
    (want,) = measure(tiny_gguf, [OUTPUT])
    unload()
    monkeypatch.setattr(llama_sensitivity, "_LOGITS_BYTES", 10 * 1024 * 4)
    assert measure(tiny_gguf, [OUTPUT]) == [pytest.approx(want, rel=0.5)]
    probe = llama_sensitivity._probe
    assert probe is not None
    assert list(probe._wanted) == list(range(WINDOW // 2, WINDOW, 4))
    assert probe._reference.shape == (8, 1024)


def test_memory_of_devices_is_copied(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise is the same where buffers are not in main memory."""
    tensors = [DENSE, EXPERTS, LOOKED_UP]
    want = measure(tiny_gguf, tensors)
    asked = []
    monkeypatch.setattr(ggml_tensor._ggml(), "ggml_backend_buffer_is_host", asked.append)  # None: it is not
    assert measure(tiny_gguf, tensors) == want
    assert asked


def test_an_error_within_llama_cpp_comes_out(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is; the next tensor is measured as if nothing had been."""
    want = measure(tiny_gguf, [SHARED])
    with monkeypatch.context() as patch:
        patch.setattr(llama_sensitivity, "dequantize", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            measure(tiny_gguf, [SHARED])
    assert measure(tiny_gguf, [SHARED]) == want


def test_operands_that_do_not_fit(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that m3 would misread is refused by name."""
    measure(tiny_gguf, [])
    monkeypatch.setattr(llama_sensitivity, "values", lambda tensor: values(tensor)[..., :7, :])
    with pytest.raises(ModelError, match=rf"{DENSE} is used in a way that m3 does not know"):
        measure(tiny_gguf, [DENSE])


def test_a_model_that_predicts_no_numbers(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "nan.gguf"
    shutil.copy(tiny_gguf, path)
    norm = next(tensor for tensor in read_header(path).tensors if tensor.name == "output_norm.weight")
    with path.open("r+b") as file:
        file.seek(norm.offset)
        file.write(np.float32("nan").tobytes())
    with pytest.raises(ModelError, match="predicts no numbers"):
        measure(path, [DENSE])


def test_wrong_input_is_refused(tiny_gguf: Path) -> None:
    """Each time, and nothing stays loaded."""
    for _ in range(2):
        with pytest.raises(ModelError, match="would run it with dense attention"):
            measure(tiny_gguf, [DENSE], flash_attention=False)
        assert llama_sensitivity._probe is None
    with pytest.raises(ModelError, match="a token id of 1,024"):
        measure(tiny_gguf, [DENSE], ids=array("i", [1, 2, 1024]))
    with pytest.raises(UsageError, match="A window of 1 tokens is too short"):
        measure(tiny_gguf, [DENSE], ids=array("i", [1]))
    with pytest.raises(ModelError, match="does not exist"):
        measure(tiny_gguf.with_name("absent.gguf"), [DENSE])
