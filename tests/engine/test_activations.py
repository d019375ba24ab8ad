"""Sums of squared activations against an independent computation in torch, and against llama.cpp's rules."""

from __future__ import annotations

import ctypes
import shutil
from array import array
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers.models.minimax_m3_vl import MiniMaxM3SparseForConditionalGeneration
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as modeling

from m3cli.engine import ggml_tensor, llama, llama_activations
from m3cli.engine.events import EngineConfig
from m3cli.engine.llama_library import lib
from m3cli.engine.process import WorkerClient
from m3cli.errors import MachineError, ModelError
from m3cli.model.header import read_header
from quantize.hparams import read_hparams
from quantize.names import mappings
from tests.tiny_models import write_mamba

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

Measured = dict[str, tuple["NDArray[np.float64]", list[int]]]  # tensor → sums [n_mat, n_cols], counts [n_mat]

Ask = Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]

BUDGET = 64  # tokens that a query of the tiny model attends


def measure(
    worker: WorkerClient | Ask, path: Path | str, windows: Sequence[Sequence[int]], **options: Any
) -> Measured:
    """What the worker gives for windows of one length; `options` are the message's or EngineConfig's."""
    window = len(windows[0])
    output_tensor = options.pop("output_tensor", False)
    config = {**asdict(EngineConfig(str(path), window, window, window, threads=1)), **options}
    ids = np.array(windows, "<i4").tobytes()
    message = {"op": "activations", "config": config, "output_tensor": output_tensor, "totals": True}
    ask = worker.ask if isinstance(worker, WorkerClient) else worker
    reply, payload = ask(message, ids)
    result = reply["result"]
    measured: Measured = {}
    start = 0
    for name, n_mat, n_cols, counts in zip(
        result["names"], result["n_mat"], result["n_cols"], result["counts"], strict=True
    ):
        sums = np.frombuffer(payload, np.float64, n_mat * n_cols, start).reshape(n_mat, n_cols)
        start += sums.nbytes
        measured[name] = sums, counts
    assert start == len(payload)
    return measured


@pytest.fixture
def worker() -> Iterator[WorkerClient]:
    with WorkerClient("measuring") as client:
        yield client


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ask]:
    """The operation within this process, where the KV cache can be of a type that m3 does not offer: f32."""
    monkeypatch.setitem(llama._KV_TYPES, "f32", lib.GGML_TYPE_F32)

    def ask(message: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
        message["config"] |= {"kv_type_k": "f32", "kv_type_v": "f32"}
        result, reply = llama_activations.activations(message, payload)
        return {"result": result}, reply

    yield ask
    if llama_activations._run is not None:
        llama_activations._run.close()
        llama_activations._run = None


def windows_of(count: int, length: int, vocabulary: int = 1000) -> list[list[int]]:
    chance = np.random.default_rng(7)
    result: list[list[int]] = chance.integers(vocabulary, size=(count, length)).tolist()
    return result


# Behind `model.language_model.layers.N.`: the module of transformers that has a GGUF tensor's input. Those
# of gate and up are one matrix there, and experts one module.
_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "indexer.q_proj": "self_attn.indexer.q_proj",
    "indexer.k_proj": "self_attn.indexer.k_proj",
    "ffn_gate": "mlp.gate_up_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_experts.gate_up_proj",
    "ffn_up_shexp": "mlp.shared_experts.gate_up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}


@pytest.fixture
def flash_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have transformers round keys and values as llama.cpp does for flash attention.

    It casts them to f16 where attention is dense; where it is sparse it takes them as they are in the cache.
    Without this, sums differ by up to 0.002 of themselves.
    """
    exact = modeling.eager_attention_forward

    def rounded(module: Any, query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> Any:
        if module.indexer is None:
            key, value = key.half().float(), value.half().float()
        return exact(module, query, key, value, *rest, **more)

    monkeypatch.setattr(modeling, "eager_attention_forward", rounded)


def reference(checkpoint: Path, windows: Sequence[Sequence[int]], *, output_tensor: bool = False) -> Measured:
    """The same by transformers, in float32 and summed in float64, for every matrix of the converted model."""
    model = MiniMaxM3SparseForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(name: str, rows: torch.Tensor, matrix: int = 0, n_mat: int = 1) -> None:
        rows = rows.reshape(-1, rows.shape[-1])
        empty = torch.zeros(n_mat, rows.shape[1], dtype=torch.float64), torch.zeros(n_mat, dtype=torch.int64)
        sums, counts = found.setdefault(name, empty)
        sums[matrix] += rows.double().square().sum(0)
        counts[matrix] += len(rows)

    def watch(module: torch.nn.Module, name: str) -> None:
        module.register_forward_pre_hook(lambda _, inputs: add(name, inputs[0]))

    def watch_experts(module: Any, layer: int) -> None:
        def hook(_module: object, inputs: tuple[torch.Tensor, ...]) -> None:
            hidden, chosen = inputs[:2]
            for expert in range(module.num_experts):
                rows = hidden[(chosen == expert).any(-1)]
                inner = module._apply_gate(functional.linear(rows, module.gate_up_proj[expert]))
                for matrix, each in (("gate", rows), ("up", rows), ("down", inner)):
                    add(f"blk.{layer}.ffn_{matrix}_exps.weight", each, expert, module.num_experts)

        module.register_forward_pre_hook(hook)

    for mapping in mappings(read_hparams(checkpoint)):
        if len(mapping.shape) != 2 or not mapping.name.startswith("blk."):
            continue
        _, number, kind = mapping.name.removesuffix(".weight").split(".", 2)
        if not mapping.stacked:
            watch(model.get_submodule(f"model.language_model.layers.{number}.{_MODULES[kind]}"), mapping.name)
        elif kind == "ffn_gate_exps":
            experts = model.get_submodule(f"model.language_model.layers.{number}.mlp.experts")
            watch_experts(experts, int(number))
    if output_tensor:
        watch(model.lm_head, "output.weight")
    with torch.no_grad():
        for window in windows:
            model(input_ids=torch.tensor([window]))
    return {name: (sums.numpy(), counts.tolist()) for name, (sums, counts) in found.items()}


@pytest.mark.usefixtures("flash_rounding")
@pytest.mark.parametrize(("count", "length"), [(3, BUDGET), (1, 5 * BUDGET)])
def test_sums_are_those_of_an_independent_computation(
    tiny_m3: Path, tiny_gguf: Path, exact: Ask, count: int, length: int
) -> None:
    """Every matrix has the sums and counts that torch finds, each expert those of its own tokens.

    Within the budget of sparse attention, and far beyond it.
    """
    windows = windows_of(count, length)
    got = measure(exact, tiny_gguf, windows, output_tensor=True)
    want = reference(tiny_m3, windows, output_tensor=True)
    assert sorted(got) == sorted(want)
    for name, (sums, counts) in want.items():
        assert got[name][1] == counts, name
        # An expert of few tokens has columns where almost nothing arrives: there a sum is a rounding error.
        np.testing.assert_allclose(got[name][0], sums, rtol=1e-4, atol=1e-5 * sums.mean(), err_msg=name)


def test_f16_changes_little(tiny_gguf: Path, worker: WorkerClient, exact: Ask) -> None:
    """With the KV cache in f16, as it is by default, sums stay what they are up to its rounding."""
    windows = windows_of(1, BUDGET)
    want = measure(exact, tiny_gguf, windows)
    usual = measure(worker, tiny_gguf, windows)
    assert list(usual) == list(want)
    for name, (sums, counts) in want.items():
        assert usual[name][1] == counts
        assert np.linalg.norm(usual[name][0] - sums) < 1e-3 * np.linalg.norm(sums), name


def test_tensors_are_those_of_the_definition(smollm2: str, worker: WorkerClient) -> None:
    """Of a real model, all matrices of its layers have a value a column, and count all tokens."""
    windows = windows_of(2, 16)
    measured = measure(worker, smollm2, windows)
    matrices = {
        tensor.name: tensor.dims[0]
        for tensor in read_header(Path(smollm2)).tensors
        if tensor.name.startswith("blk.") and len(tensor.dims) > 1
    }
    assert len(matrices) == 30 * 7
    assert {name: sums.shape for name, (sums, _) in measured.items()} == {
        name: (1, columns) for name, columns in matrices.items()
    }
    assert all(counts == [32] for _, counts in measured.values())
    assert all((sums > 0).all() for sums, _ in measured.values())


def test_small_batches_are_passed_over(tiny_gguf: Path, worker: WorkerClient) -> None:
    """From fewer than 16 tokens, llama.cpp collects nothing but what goes to experts."""
    measured = measure(worker, tiny_gguf, windows_of(2, 15))
    assert {name.split(".")[2] for name in measured} == {"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}
    assert all(sum(counts) == 2 * 15 * 2 for _, counts in measured.values())


def test_the_output_matrix_has_to_be_asked_for(tiny_gguf: Path, worker: WorkerClient) -> None:
    windows = windows_of(1, 16)
    without = measure(worker, tiny_gguf, windows)
    assert set(measure(worker, tiny_gguf, windows, output_tensor=True)) - set(without) == {"output.weight"}


def test_windows_add_up(tiny_gguf: Path, worker: WorkerClient) -> None:
    """One after the other in messages or together in one; another configuration begins anew."""
    first, second = windows_of(2, 32)
    together = measure(worker, tiny_gguf, [first, second], n_batch=64)
    one = measure(worker, tiny_gguf, [first])
    both = measure(worker, tiny_gguf, [second])
    for name, (sums, counts) in together.items():
        assert sum(both[name][1]) == 2 * sum(one[name][1])
        assert both[name][1] == counts
        np.testing.assert_allclose(both[name][0], sums, rtol=1e-9)


def test_a_window_may_take_several_batches(tiny_gguf: Path, worker: WorkerClient) -> None:
    """Later ones see the earlier: sums are those of the whole window, up to rounding."""
    windows = windows_of(2, BUDGET)
    whole = measure(worker, tiny_gguf, windows)
    pieces = measure(worker, tiny_gguf, windows, n_batch=BUDGET // 2, n_ubatch=BUDGET // 4)
    assert list(pieces) == list(whole)
    for name, (sums, counts) in whole.items():
        assert pieces[name][1] == counts
        assert np.linalg.norm(pieces[name][0] - sums) < 1e-3 * np.linalg.norm(sums), name


def test_experts_take_part_in_turn(tiny_gguf: Path, worker: WorkerClient) -> None:
    """The counts of a layer's experts are those of its tokens, times the experts that each uses."""
    measured = measure(worker, tiny_gguf, windows_of(1, 48))
    for layer in (1, 2, 3):
        down, gate = (measured[f"blk.{layer}.ffn_{name}_exps.weight"] for name in ("down", "gate"))
        assert down[1] == gate[1]
        assert sum(gate[1]) == 48 * 2
        assert [not row.any() for row in gate[0]] == [count == 0 for count in gate[1]]


def test_a_recurrent_model_is_measured_too(tmp_path: Path, worker: WorkerClient) -> None:
    measured = measure(worker, write_mamba(tmp_path / "mamba.gguf"), windows_of(1, 32))
    assert {name for name in measured if name.startswith("blk.1.")} == {
        f"blk.1.ssm_{name}.weight" for name in ("in", "x", "dt", "out")
    }


@pytest.fixture
def broken(tiny_gguf: Path, tmp_path: Path) -> Path:
    """The tiny model with a NaN in the norm before the attention of its second layer."""
    path = tmp_path / "nan.gguf"
    shutil.copy(tiny_gguf, path)
    norm = next(t for t in read_header(path).tensors if t.name == "blk.1.attn_norm.weight")
    with path.open("r+b") as file:
        file.seek(norm.offset)
        file.write(np.float32("nan").tobytes())
    return path


def test_numbers_that_are_none_are_refused(broken: Path, worker: WorkerClient) -> None:
    """What is wrong within llama.cpp's callback arrives as an error that names the tensor."""
    with pytest.raises(ModelError, match=r"blk\.1\.\S+\.weight .* a NaN or an infinity"):
        measure(worker, broken, windows_of(1, 32))


def _config(path: Path) -> EngineConfig:
    return EngineConfig(str(path), 32, 32, 32, threads=1)


def test_an_error_ends_the_computation(broken: Path) -> None:
    """What comes behind the broken layer is not computed, and the error is raised once."""
    run = llama_activations._Run(_config(broken), output_tensor=True)
    try:
        window = array("i", windows_of(1, 32)[0])
        for _ in range(2):
            with pytest.raises(ModelError):
                run.add(window)
            assert not {name for name in run.collector.sums if not name.startswith(("blk.0.", "blk.1."))}
        assert run.collector.error is None
    finally:
        run.close()


def test_memory_of_devices_is_copied(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are the same where a buffer is not in main memory, and has to be asked for its contents."""

    def sums() -> dict[str, NDArray[np.float64]]:
        run = llama_activations._Run(_config(tiny_gguf), output_tensor=False)
        try:
            run.add(array("i", windows_of(1, 32)[0]))
            return {name: each.squares for name, each in run.collector.sums.items()}
        finally:
            run.close()

    in_place = sums()
    asked = []

    def is_host(buffer: int) -> bool:
        asked.append(buffer)
        return False

    monkeypatch.setattr(ggml_tensor._ggml(), "ggml_backend_buffer_is_host", is_host)
    copied = sums()
    assert asked
    assert all(asked)
    assert list(copied) == list(in_place)
    for name, each in copied.items():
        np.testing.assert_array_equal(each, in_place[name])


def test_an_id_beyond_the_vocabulary_is_refused(tiny_gguf: Path, worker: WorkerClient) -> None:
    with pytest.raises(ModelError, match="a token id of 5,000"):
        measure(worker, tiny_gguf, [[1] * 31 + [5000]])


def test_sums_of_several_matrices() -> None:
    """By the letter of llama.cpp's loop, where weights have more than two dimensions."""
    rows = np.random.default_rng(1).normal(size=(6, 4, 5, 8)).astype(np.float32)
    n2, n3 = 2, 3
    want = np.zeros((n2 * n3, 8))
    for i3 in range(6):
        for i2 in range(4):
            for row in range(5):
                want[(i3 % n3) * n2 + i2 % n2] += rows[i3, i2, row].astype(np.float64) ** 2
    sums = llama_activations._Sums(n2 * n3, 8)
    llama_activations._add_dense(sums, rows, n2, n3)
    np.testing.assert_allclose(sums.squares, want, rtol=1e-12)
    assert sums.counts.tolist() == [6 * 4 * 5 // (n2 * n3)] * (n2 * n3)


@pytest.mark.parametrize("per_expert", [1, 3])
def test_sums_of_experts(per_expert: int) -> None:
    """By the letter of llama.cpp's loop, with one input for all experts of a token, or one for each."""
    chance = np.random.default_rng(2)
    rows = chance.normal(size=(1, 20, per_expert, 8)).astype(np.float32)
    ids = np.array([chance.permutation(7)[:3] for _ in range(20)], np.int32)
    ids[ids == 4] = 7  # the fifth is never hit
    want, counts = np.zeros((9, 8)), np.zeros(9, int)
    for token in range(20):
        for place in range(3):
            want[ids[token, place]] += rows[0, token, place % per_expert].astype(np.float64) ** 2
            counts[ids[token, place]] += 1
    sums = llama_activations._Sums(9, 8)
    llama_activations._add_experts(sums, rows, ids, "blk.0.ffn_up_exps.weight")
    np.testing.assert_allclose(sums.squares, want, rtol=1e-12)
    assert sums.counts.tolist() == counts.tolist()
    ids[3, 1] = 9
    with pytest.raises(ModelError, match=r"choices .* from 0 to 9"):
        llama_activations._add_experts(sums, rows, ids, "blk.0.ffn_up_exps.weight")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("blk.0.attn_k.weight", "blk.0.attn_k.weight"),
        ("CUDA0#blk.0.attn_k.weight#0", "blk.0.attn_k.weight"),
        ("CUDA0#output.weight", "output.weight"),
    ],
)
def test_names_are_those_of_the_weights(text: str, name: str) -> None:
    """Without what a scheduler adds when it copies them to another device."""
    assert ggml_tensor.weight_name(ggml_tensor.Tensor(name=text.encode())) == name


def _with(change: Callable[[list[Any]], None]) -> type[ctypes.Structure]:
    fields = list(ggml_tensor.Tensor._fields_)
    change(fields)
    return type("Changed", (ctypes.Structure,), {"_fields_": tuple(fields)})


def _swap(fields: list[Any], first: int, second: int) -> None:
    fields[first], fields[second] = fields[second], fields[first]


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields.append(("more", ctypes.c_void_p)),
        lambda fields: _swap(fields, 2, 3),  # ne and nb
        lambda fields: _swap(fields, 8, 10),  # view_src and data
        lambda fields: _swap(fields, 4, 6),  # op and flags
    ],
)
def test_another_layout_is_refused(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[list[Any]], None]
) -> None:
    """A llama.cpp whose tensors look otherwise is noticed before anything of them is read."""
    assert ggml_tensor.op_name(ggml_tensor.tensor_at(ctypes.addressof(ggml_tensor.Tensor())).op) == "NONE"
    monkeypatch.setattr(ggml_tensor, "Tensor", _with(change))
    ggml_tensor._ggml.cache_clear()
    try:
        with pytest.raises(MachineError, match="laid out in another way"):
            ggml_tensor.tensor_at(0)
    finally:
        ggml_tensor._ggml.cache_clear()
