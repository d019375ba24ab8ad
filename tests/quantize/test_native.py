"""The parent's side of the quantizer: order, errors, and which tensors llama.cpp quantizes."""

from __future__ import annotations

import ctypes
import os
import signal
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest

from m3cli.engine.llama_quantize import encode
from m3cli.errors import EngineCrashError, ModelError
from m3cli.model.header import read_header
from quantize import kinds
from quantize.native import Native, Rows, quantize_all
from scripts.make_shape_gguf import MODELS, quantized, write_shape

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

COLUMNS = 512


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NDArray[np.float32]]:
    """1,024 rows of float32 in a file that holds nothing else."""
    values = np.random.default_rng(1).standard_normal((1024, COLUMNS)).astype(np.float32)
    path = tmp_path_factory.mktemp("native") / "values"
    path.write_bytes(values.tobytes())
    return path, values


def rows(path: Path, first: int, count: int, to: str, importance: NDArray[np.float32] | None = None) -> Rows:
    return Rows(path, f"t{first}", first * COLUMNS * 4, "F32", to, count, COLUMNS, importance)


def children() -> set[int]:
    """Processes of this one."""
    found = Path("/proc/self/task").glob("*/children")
    return {int(pid) for each in found for pid in each.read_text().split()}


@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_order(weights: tuple[Path, NDArray[np.float32]], threads: int) -> None:
    """However long each takes, and whoever takes part in it: the first is the first."""
    path, values = weights
    importance = np.linspace(0.1, 4, COLUMNS, dtype=np.float32)
    work = []
    for i in range(24):
        first, count = i * 40, (2 if i % 4 else 37)
        to = ("IQ4_XS", "F32", "Q8_0", "Q4_0")[i % 4]
        work.append(rows(path, first, count, to, importance if i % 8 == 4 else None))
    made = list(quantize_all(iter(work), threads))
    for i, (each, data) in enumerate(zip(work, made, strict=True)):
        part = values[i * 40 : i * 40 + each.rows]
        if each.to == "F32":
            assert data == part.tobytes()
        elif each.to == "IQ4_XS":
            out = np.empty(each.rows * kinds.row_bytes(each.to, COLUMNS), np.uint8)
            encode(each.to, part, COLUMNS, each.importance, out)
            assert data == out.tobytes()
        else:
            assert data == gguf.quants.quantize(part, gguf.GGMLQuantizationType[each.to]).tobytes()


def test_work_is_taken_when_it_is_needed(weights: tuple[Path, NDArray[np.float32]]) -> None:
    """Of a whole model's rows only a few are described at a time; who stops early leaves no process."""
    path, _ = weights
    before, taken = children(), 0

    def work() -> Iterator[Rows]:
        nonlocal taken
        for i in range(1000):
            taken += 1
            yield rows(path, i, 1, "Q8_0")

    made = quantize_all(work())
    assert len(list(islice(made, 10))) == 10
    assert taken <= 13
    assert len(children() - before) == 1
    made.close()
    assert children() == before


def test_an_error_ends_it(weights: tuple[Path, NDArray[np.float32]], tmp_path: Path) -> None:
    """What came before the weights that are no numbers is there; then an error names them; nobody is left."""
    values = weights[1].copy()
    values[500, 3] = np.inf
    path = tmp_path / "values"
    path.write_bytes(values.tobytes())
    before = children()
    made = quantize_all(rows(path, i * 100, 100, "Q8_0") for i in range(10))
    assert len(list(islice(made, 5))) == 5
    with pytest.raises(ModelError, match=r"The tensor t500 of .*values holds a NaN or an infinity"):
        next(made)
    assert children() == before
    assert list(made) == []


def test_a_file_that_became_shorter(weights: tuple[Path, NDArray[np.float32]], tmp_path: Path) -> None:
    """Rows that are not there any more are an error and not zeros."""
    path = tmp_path / "values"
    path.write_bytes(weights[1].tobytes()[: 150 * COLUMNS * 4 + 17])
    made = quantize_all([rows(path, 0, 100, "Q8_0"), rows(path, 100, 100, "Q8_0")])
    next(made)
    with pytest.raises(ModelError, match="became shorter while it was read"):
        next(made)


def test_a_worker_that_is_killed(weights: tuple[Path, NDArray[np.float32]]) -> None:
    """The error says by what, and at which tensor it was."""
    path, _ = weights
    before = children()
    made = quantize_all(rows(path, i, 1, "Q8_0") for i in range(1000))
    next(made)
    (worker,) = children() - before
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(EngineCrashError, match=r"was killed by SIGKILL while quantizing t\d+"):
        list(made)
    assert children() == before


def test_an_error_does_not_end_the_client(weights: tuple[Path, NDArray[np.float32]], tiny_gguf: Path) -> None:
    """After a file that is no model, the next question is answered."""
    header = read_header(tiny_gguf)
    broken = read_header(tiny_gguf)
    broken.path = weights[0]
    with Native(1) as native:
        with pytest.raises(ModelError, match=r"llama\.cpp's quantizer does not take .*values: .*\w"):
            native.quantizable(broken)
        assert native.types(header, kinds.file_type("Q8_0"), importance=False)["output.weight"] == "Q8_0"


def changed_by_llama_cpp(source: Path, out: Path, file_type: int) -> set[str]:
    """Names of the tensors that have another type after a quantization by llama.cpp alone."""
    from m3cli.engine.llama_library import lib

    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.allow_requantize = file_type, 2, True
    assert lib.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(params)) == 0
    after = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(out).tensors}
    return {t.name for t in gguf.GGUFReader(source).tensors if t.tensor_type != after[t.name]}


def test_what_llama_cpp_quantizes(tiny_gguf: Path, smollm2: str, tmp_path: Path) -> None:
    """All that llama.cpp changes when it makes F16 of everything, and nothing else."""
    with Native(1) as native:
        for source in (tiny_gguf, Path(smollm2)):
            expected = changed_by_llama_cpp(source, tmp_path / "f16.gguf", kinds.file_type("F16"))
            assert native.quantizable(read_header(source)) == expected
            assert len(expected) > 30
            assert not [
                name for name in expected if "norm" in name or "gate_inp" in name or "indexer" in name
            ]


@pytest.mark.parametrize("mixture", ["Q8_0", "Q4_0", "Q4_K_M"])
def test_a_type_that_is_there_already(tiny_gguf: Path, tmp_path: Path, mixture: str) -> None:
    """In a model that is quantized, also to the types that are asked for, the same tensors are found."""
    changed_by_llama_cpp(tiny_gguf, tmp_path / "q.gguf", kinds.file_type(mixture))
    with Native(1) as native:
        expected = native.quantizable(read_header(tiny_gguf))
        assert native.quantizable(read_header(tmp_path / "q.gguf")) == expected


@pytest.mark.parametrize("model", ["minimax-m3", "llama-3.1-70b", "qwen3-30b-a3b"])
def test_large_models(model: str, tmp_path: Path) -> None:
    """Of the shape alone it is known, before there are weights: what a dry run to Q8_0 changes."""
    write_shape(model, "BF16", tmp_path / "shape.gguf", vocabulary=False)
    shape = MODELS[model]()
    both = zip(shape.tensors, quantized(shape, "Q8_0"), strict=True)
    expected = {before.name for before, after in both if before.type != after.type}
    with Native(1) as native:
        assert native.quantizable(read_header(tmp_path / "shape.gguf")) == expected
