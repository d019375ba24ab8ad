from __future__ import annotations

import contextlib
import os
import struct
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from m3cli.errors import MachineError, ModelError
from quantize.importance import Entry, Importance, merged, read_importance, unhit, write_importance
from tests.gguf_files import write_gguf, write_model

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import ArrayLike

META = {
    "general.type": "imatrix",
    "imatrix.datasets": ["a.txt"],
    "imatrix.chunk_count": 1,
    "imatrix.chunk_size": 512,
}
MOST_EXACT = 1 << 24  # the largest count that float32 has with all before it


def entry(sums: ArrayLike, counts: ArrayLike) -> Entry:
    return Entry(np.atleast_2d(np.asarray(sums, np.float32)), np.atleast_1d(np.asarray(counts, np.int64)))


def importance(chunk_size: int = 512, chunk_count: int = 1, **entries: Entry) -> Importance:
    return Importance(entries, ("a.txt",), chunk_size, chunk_count)


def legacy(
    entries: Sequence[tuple[bytes, int, Sequence[float]]], tail: bytes | None = None, total: int | None = None
) -> bytes:
    """The older format, written from its description: (name, calls, values) each, then what `tail` is."""
    parts = [struct.pack("<i", len(entries) if total is None else total)]
    for name, calls, values in entries:
        parts.append(struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, len(values)))
        parts.append(struct.pack(f"<{len(values)}f", *values))
    return b"".join(parts) + (b"" if tail is None else tail)


def origin(chunks: int, dataset: bytes) -> bytes:
    return struct.pack("<ii", chunks, len(dataset)) + dataset


def sized(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def same(one: Importance, other: Importance) -> bool:
    facts = [
        (each.datasets, each.chunk_size, each.chunk_count, list(each.entries), each.sensitivities)
        for each in (one, other)
    ]
    return facts[0] == facts[1] and all(
        np.array_equal(one.entries[name].sums, other.entries[name].sums)
        and np.array_equal(one.entries[name].counts, other.entries[name].counts)
        for name in one.entries
    )


def error_of(path: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        read_importance(path)
    assert str(path) in caught.value.message
    assert caught.value.message.endswith(".")
    assert caught.value.hint.endswith(".")
    return caught.value


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    n_mat, n_cols = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    number = st.floats(0, float(np.finfo(np.float32).max), width=32)
    sums = draw(hnp.arrays(np.float32, (n_mat, n_cols), elements=number))
    return Entry(sums, draw(hnp.arrays(np.int64, n_mat, elements=st.integers(0, MOST_EXACT))))


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
IMPORTANCES = st.builds(
    lambda found, *rest: Importance(dict(sorted(found.items())), *rest),
    st.dictionaries(NAMES, entries(), min_size=1, max_size=4),
    st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=3).map(tuple),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.dictionaries(st.sampled_from(["a.weight", "b.weight"]), st.floats(0, 1000, width=32)),
)


@given(original=IMPORTANCES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_what_is_written_is_read(tmp_path: Path, original: Importance) -> None:
    """Sums, counts, names and facts come back bit by bit."""
    write_importance(tmp_path / "i.gguf", original)
    assert same(read_importance(tmp_path / "i.gguf"), original)
    assert os.listdir(tmp_path) == ["i.gguf"]  # noqa: PTH208


@given(original=IMPORTANCES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
def test_the_gguf_package_reads_what_is_written(tmp_path: Path, original: Importance) -> None:
    """Keys, types, shapes and values are where llama.cpp's own reader for Python finds them."""
    write_importance(tmp_path / "i.gguf", original)
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert fields == {
        "general.type": "imatrix",
        "imatrix.datasets": list(original.datasets),
        "imatrix.chunk_count": original.chunk_count,
        "imatrix.chunk_size": original.chunk_size,
    }
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = [n + s for n in original.entries for s in (".in_sum2", ".counts")]
    assert list(tensors) == [*names, *(f"{name}.sensitivity" for name in sorted(original.sensitivities))]
    for name, each in original.entries.items():
        sums, counts = tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"]
        n_mat, n_cols = each.sums.shape
        assert (sums.shape.tolist(), counts.shape.tolist()) == ([n_cols, n_mat], [1, n_mat])
        assert {sums.tensor_type, counts.tensor_type} == {gguf.GGMLQuantizationType.F32}
        assert np.array_equal(sums.data, each.sums)
        assert np.array_equal(counts.data[:, 0], each.counts)


def test_a_file_of_the_gguf_package_is_read(tmp_path: Path) -> None:
    """A matrix that llama-imatrix could have made: experts, one of them never hit, and a plain tensor."""
    tensors = {
        "blk.0.ffn_down_exps.weight.in_sum2": np.array([[2, 4, 6], [0, 0, 0]], np.float32),
        "blk.0.ffn_down_exps.weight.counts": np.array([[2], [0]], np.float32),
        "blk.0.attn_q.weight.in_sum2": np.array([[8, 4]], np.float32),
        "blk.0.attn_q.weight.counts": np.array([[4]], np.float32),
        "something.else": np.ones((3, 3), np.float32),
    }
    fields: dict[str, Any] = {**META, "imatrix.datasets": ["a.txt", "b.txt"], "imatrix.chunk_count": 7}
    found = read_importance(write_gguf(tmp_path / "i.gguf", fields, tensors))
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("a.txt", "b.txt"), 7, 512)
    assert list(found.entries) == ["blk.0.attn_q.weight", "blk.0.ffn_down_exps.weight"]
    weights = found.weights("blk.0.ffn_down_exps.weight", 3, 2)
    assert weights is not None
    assert weights.dtype == np.float32
    assert weights.tolist() == [[1, 2, 3], [1, 1, 1]]
    assert np.array_equal(found.weights("blk.0.attn_q.weight", 2, 1), [[2, 1]])  # type: ignore[arg-type]
    assert found.weights("blk.1.attn_q.weight", 2, 1) is None
    assert unhit(found) == {"blk.0.ffn_down_exps.weight": 1}


def test_one_count_is_that_of_all_matrices(tmp_path: Path) -> None:
    """As llama-quantize divides: files with one count for several matrices are about."""
    tensors = {
        "e.in_sum2": np.array([[2, 4], [6, 8]], np.float32),
        "e.counts": np.array([[2]], np.float32),
    }
    found = read_importance(write_gguf(tmp_path / "i.gguf", META, tensors))
    assert found.entries["e"].counts.tolist() == [2, 2]
    assert np.array_equal(found.weights("e", 2, 2), [[1, 2], [3, 4]])  # type: ignore[arg-type]


def test_counts_are_rounded_as_llama_cpp_does(tmp_path: Path) -> None:
    """Halves go away from zero (lround), not to the even neighbour."""
    tensors = {
        "e.in_sum2": np.ones((4, 2), np.float32),
        "e.counts": np.array([[0.5], [1.5], [2.5], [0.4]], np.float32),
    }
    found = read_importance(write_gguf(tmp_path / "i.gguf", META, tensors))
    assert found.entries["e"].counts.tolist() == [1, 2, 3, 0]


@given(each=entries())
def test_weights_are_those_of_llama_quantize(each: Entry) -> None:
    """The definition of quantize.cpp, value by value: sum over count in float32, 1 without a count."""
    found = importance(e=each).weights("e", each.sums.shape[1], len(each.counts))
    expected = [
        [np.float32(value) / np.float32(count) if count > 0 else np.float32(1) for value in row]
        for row, count in zip(each.sums, each.counts, strict=True)
    ]
    assert np.array_equal(found, np.array(expected, np.float32))  # type: ignore[arg-type]


def test_a_matrix_of_another_model_is_refused() -> None:
    """A size that differs is an error for all tensors but the embeddings, as in llama-quantize."""
    found = {"a.weight": entry([1, 2, 3], 1), "token_embd.weight": entry([1, 2, 3], 1)}
    matrix = Importance(found, (), 512, 1)
    with pytest.raises(ModelError, match=r"has 3 values for a\.weight, which needs 8"):
        matrix.weights("a.weight", 4, 2)
    assert matrix.weights("token_embd.weight", 4, 1) is None
    assert matrix.weights("token_embd.weight", 3, 1) is not None


def test_the_older_format_is_read(tmp_path: Path) -> None:
    """Values are divided by the calls; experts come as one row; without calls values stand as they are."""
    path = tmp_path / "imatrix.dat"
    path.write_bytes(
        legacy(
            [(b"b.weight", 4, [4, 8, 2, 6]), (b"a.weight", 0, [0.5, 0.25])], origin(40, "süß.txt".encode())
        )
    )
    found = read_importance(path)
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("süß.txt",), 40, 0)
    assert list(found.entries) == ["a.weight", "b.weight"]
    assert np.array_equal(found.weights("b.weight", 2, 2), [[1, 2], [0.5, 1.5]])  # type: ignore[arg-type]
    assert np.array_equal(found.weights("a.weight", 2, 1), [[0.5, 0.25]])  # type: ignore[arg-type]
    write_importance(tmp_path / "new.gguf", found)
    again = read_importance(tmp_path / "new.gguf")
    assert np.array_equal(again.weights("b.weight", 2, 2), [[1, 2], [0.5, 1.5]])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tail", "chunks", "datasets"),
    [
        (None, 0, ()),  # the first versions of the format ended here
        (b"\x01", 0, ()),
        (struct.pack("<i", 9), 9, ()),
        (origin(9, b""), 9, ()),
        (struct.pack("<ii", 9, 99) + b"cut", 9, ()),
        (struct.pack("<ii", -9, -1), 0, ()),
        (origin(9, b"\xff.txt"), 9, ("\ufffd.txt",)),
    ],
)
def test_where_an_older_file_comes_from_is_optional(
    tmp_path: Path, tail: bytes | None, chunks: int, datasets: tuple[str, ...]
) -> None:
    """The number of chunks and the name of the data may be missing, as llama.cpp has it."""
    path = tmp_path / "imatrix.dat"
    path.write_bytes(legacy([(b"a", 1, [1])], tail))
    found = read_importance(path)
    assert (found.chunk_count, found.datasets) == (chunks, datasets)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", r"the number of entries takes 4 bytes, and only 0 are left"),
        (b"Just some text, of a README say.", "is not an importance matrix: it is no GGUF file, and"),
        (struct.pack("<i", 0), "the number of entries is 0"),
        (struct.pack("<i", -1), "the number of entries is -1"),
        (legacy([(b"a", 1, [1])], total=1 << 30), "entry 2 of 1,073,741,824, at byte 21, takes 4 bytes"),
        (struct.pack("<ii", 1, -5) + bytes(20), "entry 1 of 1 has a name of -5 bytes"),
        (struct.pack("<ii", 1, 1 << 30) + bytes(20), "has a name of 1,073,741,824 bytes"),
        (struct.pack("<ii", 1, 60000) + bytes(20), "takes 60,000 bytes, and only 20 are left"),
        (legacy([(b"\xff\xfe", 1, [1])]), "has a name that is not UTF-8"),
        (legacy([(b"a", 1, []), (b"b", 1, [1, 2])]), r"entry 1 of 2 \(a\) has 0 values"),
        (legacy([(b"a", 1, [1]), (b"a", 1, [1])]), r"is broken: entry 2 of 2, at byte .*, is the second one"),
        (
            legacy([(b"a", 1, [1]), (b"b", 1, [1, 2])])[:-1],
            r"broken: entry 2 of 2, at byte 34, takes 8 bytes",
        ),
        (
            legacy([(b"a", 1, [1])], total=2)
            + struct.pack("<i", 1)
            + b"b"
            + struct.pack("<ii", 1, 2**31 - 1),
            "takes 8,589,934,588 bytes, and only 0 are left",
        ),
        (legacy([(b"a", 1, [float("nan")])]), "a has a value that is nan"),
        (legacy([(b"a", 1, [1, float("inf")])]), "a has a value that is inf"),
        (legacy([(b"a", 1, [1, -2])]), r"a has a value that is -2\.0"),
    ],
)
def test_broken_older_files_are_refused(tmp_path: Path, data: bytes, words: str) -> None:
    """Each is one sentence that says what is wrong, and nothing is allocated for a length that lies."""
    path = tmp_path / "imatrix.dat"
    path.write_bytes(data)
    assert error_of(path)
    with pytest.raises(ModelError, match=words):
        read_importance(path)


ONE = np.ones((1, 2), np.float32)


@pytest.mark.parametrize(
    ("fields", "tensors", "words"),
    [
        (META, {}, "has no entries"),
        (META, {"w": ONE}, "has no entries"),
        ({}, {"w": ONE}, "is not an importance matrix: it is a GGUF file that is a model"),
        ({"general.type": "adapter"}, {"w": ONE}, "it is a GGUF file that is of type 'adapter'"),
        (META, {"w.in_sum2": ONE}, "broken: it has sums for w, and no counts"),
        (META, {"w.counts": ONE}, "broken: it has counts for w, and no sums"),
        (
            META,
            {"w.in_sum2": ONE.astype(np.float16), "w.counts": ONE},
            r"w\.in_sum2 holds 2 values of type F16",
        ),
        (META, {"w.in_sum2": np.ones((3, 3), np.float32), "w.counts": ONE}, "9 sums, which 2 counts do not"),
        (META, {"w.in_sum2": ONE * np.float32("nan"), "w.counts": ONE}, "value that is nan"),
        (META, {"w.in_sum2": ONE * np.float32("inf"), "w.counts": ONE}, "value that is inf"),
        (META, {"w.in_sum2": -ONE, "w.counts": ONE}, r"value that is -1\.0"),
        (META, {"w.in_sum2": ONE, "w.counts": -ONE}, r"w has a count of -1\.0"),
        (META, {"w.in_sum2": ONE, "w.counts": ONE * np.float32("nan")}, "w has a count of nan"),
        (META, {"w.in_sum2": ONE, "w.counts": ONE * np.float32(1e30)}, r"w has a count of 1\.0\d*e\+30"),
        (
            {**META, "imatrix.chunk_size": (-1, gguf.GGUFValueType.INT32)},
            {"w.in_sum2": ONE, "w.counts": ONE},
            r"imatrix\.chunk_size is -1",
        ),
        (
            {**META, "imatrix.chunk_size": "large"},
            {"w.in_sum2": ONE, "w.counts": ONE},
            r"imatrix\.chunk_size of .* has the wrong type",
        ),
    ],
)
def test_broken_gguf_files_are_refused(
    tmp_path: Path, fields: dict[str, Any], tensors: dict[str, np.ndarray[Any, Any]], words: str
) -> None:
    """Each is one sentence that says what is wrong."""
    path = write_gguf(tmp_path / "i.gguf", fields, tensors)
    assert error_of(path)
    with pytest.raises(ModelError, match=words):
        read_importance(path)


def test_a_model_is_no_importance_matrix(tmp_path: Path) -> None:
    """The commonest mistake gets a sentence of its own, and so do paths that are no files."""
    assert "that is a model" in error_of(write_model(tmp_path / "m.gguf")).message
    assert "There is no file" in error_of(tmp_path / "missing.gguf").message
    assert "is a directory" in error_of(tmp_path).message
    os.mkfifo(tmp_path / "pipe")
    assert "is not a regular file" in error_of(tmp_path / "pipe").message


def test_tensors_that_overlap_take_no_memory(tmp_path: Path) -> None:
    """Many tensors over the same bytes would fill memory with a small file."""
    path = tmp_path / "i.gguf"
    found = {f"w{i}": entry(np.ones((4, 64)), [1] * 4) for i in range(9)}
    write_importance(path, Importance(found, (), 512, 1))
    data = bytearray(path.read_bytes())
    for i in range(9):
        at = data.index(f"w{i}.in_sum2".encode()) + len(f"w{i}.in_sum2") + 4
        struct.pack_into("<QQIQ", data, at, 64, 36, 0, 0)
    path.write_bytes(data)
    assert "its tensors overlap" in error_of(path).message


def test_a_scalar_is_read(tmp_path: Path) -> None:
    """Tensors without dimensions have one value, which is no reason to fail."""
    path = tmp_path / "i.gguf"
    data = struct.pack("<4sIQQ", b"GGUF", 3, 2, 1)
    data += sized(b"general.type") + struct.pack("<I", 8) + sized(b"imatrix")
    data += sized(b"w.in_sum2") + struct.pack("<IIQ", 0, 0, 0)
    data += sized(b"w.counts") + struct.pack("<IIQ", 0, 0, 32)
    path.write_bytes(data + bytes(-len(data) % 32) + struct.pack("<f28xf", 6, 2))
    assert np.array_equal(read_importance(path).weights("w", 1, 1), [[3]])  # type: ignore[arg-type]


@pytest.mark.parametrize("older", [False, True])
def test_files_that_are_cut_short_are_refused(tmp_path: Path, older: bool) -> None:
    """Wherever the file ends too early, there is a sentence about it and nothing half read."""
    whole = importance(w=entry(np.ones((3, 8)), [1, 2, 3]), v=entry([1, 2], 5))
    path = tmp_path / "i.gguf"
    write_importance(path, whole)
    last = path.read_bytes().rstrip(b"\0")
    if older:
        last = legacy([(b"w", 3, [1, 2, 3]), (b"v", 3, [4])])
    for length in range(len(last)):
        path.write_bytes(last[:length])
        error_of(path)


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
def test_damaged_files_never_crash(tmp_path: Path, data: st.DataObject) -> None:
    """Any bytes in any place: it is read, or it is a ModelError."""
    path = tmp_path / "i.gguf"
    if data.draw(st.booleans()):
        write_importance(path, importance(w=entry(np.ones((3, 8)), [1, 2, 3]), v=entry([1, 2], 5)))
        content = bytearray(path.read_bytes())
    else:
        content = bytearray(legacy([(b"w", 3, [1, 2, 3]), (b"v", 3, [4])], origin(5, b"a.txt")))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + 4] = data.draw(st.binary(min_size=0, max_size=8))
    path.write_bytes(content)
    with contextlib.suppress(ModelError):
        for name, each in read_importance(path).entries.items():
            weights = merged(importance(), read_importance(path)).weights(name, each.sums.size, 1)
            assert weights is not None
            assert np.isfinite(weights).all()


@given(one=entries(), other=entries())
def test_merging_is_measuring_on_both(one: Entry, other: Entry) -> None:
    """Sums and counts are added where both have a tensor, and kept where one has."""
    small = np.float32(1e30)
    shape = one.sums.shape
    other = Entry(np.resize(other.sums, shape), np.resize(other.counts, shape[0]))
    one, other = (Entry(np.minimum(each.sums, small), each.counts) for each in (one, other))
    first, second = importance(e=one, a=entry([1], 1)), importance(e=other, b=entry([2], 1))
    both = merged(first, second)
    assert list(both.entries) == ["a", "b", "e"]
    assert np.array_equal(both.entries["e"].sums, one.sums + other.sums)
    assert np.array_equal(both.entries["e"].counts, one.counts + other.counts)
    assert (both.chunk_size, both.chunk_count, both.datasets) == (512, 2, ("a.txt",))
    assert both.entries["a"].sums.tolist() == [[1]]


def test_merging_with_the_older_format(tmp_path: Path) -> None:
    """Pieces of text become tokens, so that both weigh as much as they were measured on."""
    path = tmp_path / "imatrix.dat"
    path.write_bytes(legacy([(b"e", 2, [2, 4, 6, 8])], origin(2, b"b.txt")))  # means 1, 2, 3, 4
    older = read_importance(path)
    newer = importance(e=entry([[512, 512], [0, 0]], [512, 0]))
    for both in (merged(older, newer), merged(newer, older)):
        assert (both.chunk_size, both.chunk_count) == (512, 3)
        assert both.entries["e"].counts.tolist() == [1536, 1024]
        assert both.entries["e"].sums.tolist() == [[1536, 2560], [3072, 4096]]
    twice = merged(older, older)
    assert (twice.chunk_size, twice.chunk_count, twice.datasets) == (0, 4, ("b.txt",))
    assert np.array_equal(twice.weights("e", 4, 1), [[1, 2, 3, 4]])  # type: ignore[arg-type]


def test_chunks_of_other_sizes_are_counted_in_those_of_the_first() -> None:
    """The product of chunks and their size stays the number of tokens."""
    both = merged(importance(512, 3, e=entry([1], 1)), importance(2048, 2, e=entry([1], 1)))
    assert (both.chunk_size, both.chunk_count) == (512, 11)


@pytest.mark.parametrize("other", [entry([1, 2, 3], 1), entry([[1, 2], [3, 4], [5, 6]], [1, 1, 1])])
def test_matrices_of_different_models_do_not_merge(other: Entry) -> None:
    """Neither with other sizes, nor with as many values in another number of matrices."""
    first = importance(e=entry([[1, 2, 3], [4, 5, 6]], [1, 2]))
    with pytest.raises(ModelError, match="different sizes for e: 2 x 3 and"):
        merged(first, importance(e=other))


def test_sums_that_overflow_are_refused(tmp_path: Path) -> None:
    """Added or brought to the same unit, they would be infinite, and no file could hold them."""
    path = tmp_path / "imatrix.dat"
    path.write_bytes(legacy([(b"e", 1, [3e38])]))
    older, newer = read_importance(path), importance(e=entry([3e38], 1))
    for first, second in ((older, older), (newer, newer), (older, newer), (older, importance())):
        with pytest.raises(ModelError, match=r"sums of e .* are too large"):
            merged(first, second)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    """An error is one sentence, what was there stays, and nothing is left beside it."""
    path = tmp_path / "i.gguf"
    write_importance(path, importance(e=entry([1], 1)))
    before = path.read_bytes()
    (tmp_path / "i.gguf.new").mkdir()
    with pytest.raises(MachineError, match=r"i\.gguf cannot be written"):
        write_importance(path, importance(e=entry([2], 1)))
    assert path.read_bytes() == before
    with pytest.raises(MachineError, match="cannot be written"):
        write_importance(tmp_path / "missing" / "i.gguf", importance(e=entry([2], 1)))
