"""Errors of types, against the gguf package's and numpy's; and what is measured where."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest

from m3cli.engine.llama_quantize import encode
from m3cli.errors import ModelError
from m3cli.model.header import read_header
from quantize import kinds
from quantize.importance import Entry, Importance
from quantize.measure import measure, possible_types
from quantize.native import Native
from scripts.make_shape_gguf import write_shape

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from m3cli.model.header import Header, Tensor
    from quantize.measure import Measured

RANDOM = np.random.default_rng(7)
DENSE, EXPERTS = "blk.0.ffn_up.weight", "blk.0.ffn_up_exps.weight"
# As many rows as are sampled of a matrix and of 8 experts, so that nothing is left to a choice of rows.
WEIGHTS = {
    DENSE: RANDOM.standard_t(4, (64, 512)).astype(np.float32),
    EXPERTS: RANDOM.standard_t(4, (8, 8, 256)).astype(np.float32),
    "blk.0.ffn_narrow.weight": RANDOM.standard_normal((4, 576)).astype(np.float32),
    "blk.0.ffn_bf16.weight": gguf.quants.quantize(
        RANDOM.standard_normal((64, 256)).astype(np.float32), gguf.GGMLQuantizationType.BF16
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Header:
    """A file with the tensors of WEIGHTS and nothing else."""
    path = tmp_path_factory.mktemp("measure") / "m.gguf"
    return written(path, WEIGHTS)


def written(path: Path, weights: Mapping[str, NDArray[np.generic]]) -> Header:
    writer = gguf.GGUFWriter(path, "llama")
    for name, values in weights.items():
        bf16 = gguf.GGMLQuantizationType.BF16 if values.dtype == np.uint8 else None
        writer.add_tensor(name, values, raw_dtype=bf16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_header(path)


@pytest.fixture(scope="module")
def native() -> Iterator[Native]:
    with Native(2) as it:
        yield it


def one(
    native: Native, header: Header, name: str, candidates: Sequence[str], importance: Importance | None = None
) -> Measured:
    (found,) = measure(native, header, [name], candidates, importance)
    assert found.tensor.name == name
    return found


def changed(
    values: NDArray[np.float32], kind: str, weights: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """The values of one matrix after quantization: gguf reads what ggml wrote."""
    out = np.empty(len(values) * kinds.row_bytes(kind, values.shape[1]), np.uint8)
    encode(kind, np.ascontiguousarray(values), values.shape[1], weights, out)
    number = gguf.GGMLQuantizationType[kind]
    result: NDArray[np.float32] = gguf.quants.dequantize(out.reshape(len(values), -1), number)
    return result


def importance_of(name: str, counts: Sequence[int] | None = None) -> Importance:
    experts, _, columns = (1, *WEIGHTS[name].shape)[-3:]
    random = np.random.default_rng(11)
    numbers = np.array(counts or random.integers(1, 400, experts), np.int64)
    sums = random.lognormal(0, 2, (experts, columns)) * numbers[:, None]
    return Importance({name: Entry(sums.astype(np.float32), numbers)}, (), 512, 4)


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0"])
def test_errors_are_those_of_the_gguf_package(native: Native, model: Header, kind: str) -> None:
    """Without an importance matrix both directions are the gguf package's: no line of ggml is involved."""
    values = WEIGHTS[DENSE]
    number = gguf.GGMLQuantizationType[kind]
    there_and_back = gguf.quants.dequantize(gguf.quants.quantize(values, number), number)
    expected = np.square(there_and_back - values).sum() / np.square(values).sum()
    found = one(native, model, DENSE, [kind])
    assert found.measured
    assert found.errors[kind] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("with_importance", [False, True])
@pytest.mark.parametrize("kind", ["Q2_K", "Q4_K", "Q6_K", "IQ3_S", "IQ4_NL"])
def test_errors_of_a_matrix(native: Native, model: Header, kind: str, with_importance: bool) -> None:
    """Columns weigh as much as the importance matrix says: in the choice of the blocks and in the error."""
    values = WEIGHTS[DENSE]
    importance = importance_of(DENSE) if with_importance else None
    columns = importance.weights(DENSE, 512, 1) if importance else None
    there_and_back = changed(values, kind, None if columns is None else columns[0])
    weights = np.ones((1, 512)) if columns is None else columns.astype(np.float64)
    expected = (np.square(there_and_back - values) * weights).sum() / (np.square(values) * weights).sum()
    found = one(native, model, DENSE, [kind], importance)
    assert found.errors[kind] == pytest.approx(expected, rel=1e-4)
    assert found.errors["F32"] == 0


def test_experts_weigh_by_how_often_they_are_used(native: Native, model: Header) -> None:
    """Mean activation times tokens is the sum of the activations: that is what an expert's columns weigh."""
    values, importance = WEIGHTS[EXPERTS], importance_of(EXPERTS)
    means = importance.weights(EXPERTS, 256, 8)
    assert means is not None
    there_and_back = np.stack([changed(values[i], "Q2_K", means[i]) for i in range(8)])
    sums = importance.entries[EXPERTS].sums.astype(np.float64)[:, None]
    expected = (np.square(there_and_back - values) * sums).sum() / (np.square(values) * sums).sum()
    found = one(native, model, EXPERTS, ["Q2_K"], importance).errors["Q2_K"]
    assert found == pytest.approx(expected, rel=0.02)  # blocks are rounded otherwise when weights are scaled


def test_an_expert_that_was_never_hit(native: Native, model: Header) -> None:
    """It counts like one that was hit once, whatever the size of the activations of the others."""
    counts = [100, 50, 0, 20, 30, 40, 10, 60]
    entry = importance_of(EXPERTS, counts).entries[EXPERTS]
    errors = []
    for scale in (1e-4, 1.0, 1e4):
        scaled = Entry(entry.sums * np.float32(scale), entry.counts)
        importance = Importance({EXPERTS: scaled}, (), 512, 4)
        errors.append(one(native, model, EXPERTS, ["Q2_K"], importance).errors["Q2_K"])
    assert errors == pytest.approx([errors[1]] * 3, rel=0.01)


def test_experts_that_the_older_format_does_not_tell_apart(native: Native, model: Header) -> None:
    """One count for all experts: the means weigh as they are."""
    sums = np.random.default_rng(3).lognormal(0, 1, (1, 8 * 256)).astype(np.float32)
    importance = Importance({EXPERTS: Entry(sums, np.array([5]))}, (), 0, 4)
    each = Importance(
        {EXPERTS: Entry(sums.reshape(8, 256), np.full(8, 5))}, (), 512, 4
    )  # what says the same in the newer one
    found = [one(native, model, EXPERTS, ["Q3_K"], it).errors["Q3_K"] for it in (importance, each)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_what_needs_an_importance_matrix_is_left_out(native: Native, model: Header) -> None:
    """Types that llama.cpp refuses or aborts at without one are not even tried; with one they are."""
    candidates = ["IQ1_S", "IQ2_XXS", "IQ3_XXS", "Q2_K", "IQ3_S"]
    assert list(one(native, model, DENSE, candidates).errors) == ["F32", "Q2_K", "IQ3_S"]
    # one for another tensor does not help
    assert "IQ1_S" not in one(native, model, DENSE, candidates, importance_of(EXPERTS)).errors
    with_one = one(native, model, DENSE, candidates, importance_of(DENSE)).errors
    assert list(with_one) == ["F32", *candidates]
    assert with_one["IQ1_S"] > with_one["IQ2_XXS"] > with_one["IQ3_XXS"] > with_one["IQ3_S"] > 0


def test_narrow_rows_get_other_types(native: Native, model: Header, smollm2: str) -> None:
    """Rows of 576, as SmolLM2 has them: what llama.cpp would take instead is tried, and each type once."""
    candidates = ["IQ4_XS", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"]
    instead = ["IQ4_NL", "Q4_0", "Q5_0", "Q5_1", "Q8_0"]
    found = one(native, model, "blk.0.ffn_narrow.weight", candidates)
    assert list(found.errors) == ["F32", *instead]
    assert found.errors["Q4_0"] > found.errors["Q5_0"] > found.errors["Q5_1"] > found.errors["Q8_0"] > 0
    header = read_header(Path(smollm2))
    real = one(native, header, "blk.3.attn_q.weight", candidates)
    assert real.tensor.dims[0] == 576
    assert real.tensor.type == "Q4_1"
    assert list(real.errors) == ["Q4_1", *instead]
    assert real.measured


def test_a_tensor_that_stays_loses_nothing(native: Native, model: Header, smollm2: str) -> None:
    """Its own type is no quantization: no error, and no importance matrix is needed for it."""
    header = read_header(Path(smollm2))
    assert one(native, header, "blk.3.attn_q.weight", ["Q4_0"]).errors["Q4_1"] == 0
    bf16 = one(native, model, "blk.0.ffn_bf16.weight", ["F16", "BF16"]).errors
    assert bf16["BF16"] == 0 <= bf16["F16"] < 1e-6
    tensor = model.tensors[0]
    low = type(tensor)(tensor.name, (256, 4), "IQ2_XXS", 0, 0, 264)
    assert "IQ2_XXS" in possible_types(low, ["Q4_K"], with_importance=False)


class Recorder(Native):
    """Remembers which pieces of which tensor were to be measured, and says that all are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: dict[str, list[tuple[int, int, int]]] = {}
        self.importance: dict[str, NDArray[np.float32] | None] = {}

    def errors(
        self,
        tensor: Tensor,
        path: Path,
        pieces: Sequence[tuple[int, int, int]],
        candidates: Sequence[str],
        importance: NDArray[np.float32] | None,
    ) -> tuple[float, dict[str, float]]:
        self.pieces[tensor.name] = list(pieces)
        self.importance[tensor.name] = importance
        return 0.0, dict.fromkeys(candidates, 0.0)


@pytest.fixture(scope="module")
def m3_header(tmp_path_factory: pytest.TempPathFactory) -> Header:
    """Header of a file of MiniMax-M3's shape that has a hole in the place of its weights."""
    path = tmp_path_factory.mktemp("m3") / "m3.gguf"
    write_shape("minimax-m3", "BF16", path, vocabulary=False)
    return read_header(path)


def test_rows_are_spread_evenly(m3_header: Header) -> None:
    """64 rows, from all over a matrix, or from all over 16 of the experts; with each its own importance."""
    recorder = Recorder()
    names = ["output.weight", "blk.5.ffn_down_exps.weight", "blk.5.attn_k.weight"]
    experts = np.arange(1, 129, dtype=np.float32)[:, None] * np.ones((1, 3072), np.float32)
    entry = Entry(experts, np.ones(128, np.int64))
    importance = Importance({"blk.5.ffn_down_exps.weight": entry}, (), 512, 4)
    list(measure(recorder, m3_header, names, ["Q4_K"], importance))
    tensors = {tensor.name: tensor for tensor in m3_header.tensors}
    for name in names:
        tensor = tensors[name]
        columns, rows, matrices = (*tensor.dims, 1)[:3]
        offsets = [(offset - tensor.offset) // (2 * columns) for offset, _, _ in recorder.pieces[name]]
        assert all((offset - tensor.offset) % (2 * columns) == 0 for offset, _, _ in recorder.pieces[name])
        assert [count for _, count, _ in recorder.pieces[name]] == [1] * 64
        assert offsets == sorted(set(offsets))
        taken = min(matrices, 16)
        used = sorted({offset // rows for offset in offsets})
        assert len(used) == taken
        assert set(np.diff(used)) <= {matrices // taken}
        gap = rows * taken / 64
        for matrix in used:
            inside = [offset - matrix * rows for offset in offsets if offset // rows == matrix]
            edges = np.diff([0, *inside, rows])
            assert max(abs(edges[1:-1] - gap)) < 1
            assert max(abs(edges[[0, -1]] - gap / 2)) <= 1
        if matrices > 1:
            # the importance of a piece is that of its own expert, up to the scale of the counts
            sent = recorder.importance[name]
            assert sent is not None
            for offset, (_, _, index) in zip(offsets, recorder.pieces[name], strict=True):
                assert sent[index, 0] == offset // rows + 1
        else:
            assert recorder.importance[name] is None


def test_a_file_without_weights(native: Native, m3_header: Header) -> None:
    """Zeros cannot be measured: the errors are typical ones, as the types' order by bits would have them."""
    names = {tensor.name for tensor in m3_header.tensors if tensor.name.startswith("blk.7.ffn_")}
    matrices: Collection[str] = {name for name in names if "_exps" in name or "_shexp" in name}
    found = list(measure(native, m3_header, matrices, kinds.WRITTEN, None))
    assert [each.tensor.name for each in found] == [t.name for t in m3_header.tensors if t.name in matrices]
    for each in found:
        assert not each.measured
        assert "IQ2_XXS" not in each.errors
        assert each.errors["BF16"] == each.errors["F32"] == 0
        order = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"]
        values = [each.errors[kind] for kind in order]
        assert values == sorted(values, reverse=True)
        assert each.errors["Q8_0"] > 0


def test_typical_errors_are_near_measured_ones(native: Native, model: Header, m3_header: Header) -> None:
    """The table agrees within a factor of two with weights of long tails, for all types."""
    candidates = [kind for kind in kinds.WRITTEN if kinds.bits(kind) < 16]
    real = one(native, model, DENSE, candidates, importance_of_ones()).errors
    names = ["blk.7.ffn_up_shexp.weight"]
    (typical,) = measure(native, m3_header, names, candidates, importance_of_ones(names[0], 6144))
    assert set(typical.errors) - {"BF16"} == set(real) - {"F32"}
    for kind in candidates:
        assert 0.5 < typical.errors[kind] / real[kind] < 2, kind


def importance_of_ones(name: str = DENSE, columns: int = 512) -> Importance:
    return Importance({name: Entry(np.ones((1, columns), np.float32), np.array([1]))}, (), 512, 4)


def test_another_models_importance(native: Native, model: Header) -> None:
    """Columns that are not the tensor's are an error that says whose they are."""
    entry = Entry(np.ones((1, 64), np.float32), np.array([5]))
    with pytest.raises(ModelError, match=f"64 values for {DENSE}, which needs 512"):
        one(native, model, DENSE, ["Q4_K"], Importance({DENSE: entry}, (), 512, 4))


def test_weights_that_are_no_numbers(native: Native, tmp_path: Path) -> None:
    """A NaN in a sampled row is told as what it is, with the tensor's name."""
    values = WEIGHTS[DENSE].copy()
    values[5, 7] = np.nan
    header = written(tmp_path / "nan.gguf", {DENSE: values})
    with pytest.raises(ModelError, match=r"ffn_up\.weight of .* holds a NaN"):
        one(native, header, DENSE, ["Q4_K", "F16"])


def test_weights_that_a_type_cannot_hold(native: Native, tmp_path: Path) -> None:
    """What is too large for F16 costs this type, and not the whole measurement."""
    values = WEIGHTS[DENSE].copy()
    values[5, 7] = 1e6
    header = written(tmp_path / "large.gguf", {DENSE: values})
    errors = one(native, header, DENSE, ["F16", "BF16"]).errors
    assert errors["BF16"] < 1e-4
    assert errors.get("F16", np.inf) > errors["BF16"]
