"""Headers of quantized files, against the gguf package's reader and writer and against llama.cpp."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.engine.dry_run import DryRun
from m3cli.engine.events import EngineConfig
from m3cli.engine.local import LocalTokenizer
from m3cli.errors import ModelError, UsageError
from m3cli.model.ggml_types import TENSOR_TYPES
from m3cli.model.header import MAX_SHARDS, Header, read_header
from quantize.events import ConvertRequest
from quantize.layout import OutFile, OutTensor, lay_out
from tests.gguf_files import LLAMA_KEYS, write_gguf, write_model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Convert = Callable[[ConvertRequest], tuple[Path, ...]]

F32, Q2_K = 0, 10  # numbers of file types
PART = 12_000_000  # bytes of tensors, so that the tiny model makes three files
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


@pytest.fixture(scope="module")
def parts(tiny_m3: Path, tmp_path_factory: pytest.TempPathFactory, converted: Convert) -> tuple[Path, ...]:
    """The tiny model in three files, as the gguf package's writer splits it."""
    out = tmp_path_factory.mktemp("parts") / "m.gguf"
    return converted(ConvertRequest(tiny_m3, out, "f32", split_max_bytes=PART))


def write(
    files: Sequence[OutFile],
    header: Header,
    directory: Path,
    data: Callable[[OutTensor], bytes] | None = None,
) -> list[Path]:
    """Write the files with `data` of each tensor, or with the bytes that it has in the source."""

    def copied(tensor: OutTensor) -> bytes:
        with header.files[tensor.source.file].open("rb") as source:
            source.seek(tensor.source.offset)
            return source.read(tensor.source.nbytes)

    paths = []
    for file in files:
        paths.append(directory / file.name)
        with paths[-1].open("wb") as out:
            out.write(file.header)
            for tensor in file.tensors:
                written = out.write((data or copied)(tensor))
                assert written == tensor.nbytes
                out.write(bytes(tensor.padded - tensor.nbytes))
        assert paths[-1].stat().st_size == file.nbytes
    return paths


def fields_of(path: Path) -> dict[str, Any]:
    """Key → (types, value), as the gguf package reads them; what it counts itself is left out."""
    fields = gguf.GGUFReader(path).fields
    return {
        key: (field.types, field.contents()) for key, field in fields.items() if not key.startswith("GGUF.")
    }


def tensors_of(paths: Sequence[Path]) -> list[tuple[str, str, list[int], bytes]]:
    """Name, type, dims and bytes of each tensor, as the gguf package reads them."""
    return [
        (tensor.name, tensor.tensor_type.name, tensor.shape.tolist(), tensor.data.tobytes())
        for path in paths
        for tensor in gguf.GGUFReader(path).tensors
    ]


def realigned(source: Path, out: Path, alignment: int) -> Path:
    """Write a copy of a file with another alignment, through the gguf package."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    writer.add_custom_alignment(alignment)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def assert_llama_cpp_loads(path: Path, whole: Path) -> None:
    """Its loader finds every tensor of `path` within the files, and as many bytes as in `whole`."""
    with LocalTokenizer(str(path)) as tokenizer, LocalTokenizer(str(whole)) as expected:
        assert tokenizer.facts() == expected.facts()
        assert tokenizer.encode("a house, a mouse") == expected.encode("a house, a mouse")
    needs = []
    for model in (str(path), str(whole)):
        dry_run = DryRun(model, extra_buffers=False)
        needs.append(dry_run.need(EngineConfig(model_path=model, n_ctx=512)))
        dry_run.close()
    assert needs[0] == needs[1]
    assert sum(needs[0].weights.values()) > 25_000_000


def test_unchanged_types_give_the_bytes_that_the_gguf_package_writes(tiny_gguf: Path, tmp_path: Path) -> None:
    """A file made by the package's writer is laid out as it is, to the last byte."""
    header = read_header(tiny_gguf)
    (file,) = lay_out(header, {t.name: t.type for t in header.tensors}, "same.gguf", file_type=F32)
    assert file.nbytes == header.file_bytes
    (path,) = write([file], header, tmp_path)
    assert path.read_bytes() == tiny_gguf.read_bytes()


def test_a_real_model_keeps_everything(smollm2: str, tmp_path: Path) -> None:
    """What llama-quantize wrote is the same file again: it sets the same keys in the same places."""
    header = read_header(Path(smollm2))
    number = header.require_int("general.file_type")
    (file,) = lay_out(header, {}, "same.gguf", file_type=number)
    (path,) = write([file], header, tmp_path)
    assert path.read_bytes() == Path(smollm2).read_bytes()


def test_parts_are_those_that_the_gguf_package_writes(
    tiny_gguf: Path, parts: tuple[Path, ...], tmp_path: Path
) -> None:
    """Names, split keys, shares of the tensors and every byte agree."""
    header = read_header(tiny_gguf)
    files = lay_out(header, {}, "m.gguf", file_type=F32, split_max_bytes=PART)
    assert [file.name for file in files] == [path.name for path in parts]
    for path, expected in zip(write(files, header, tmp_path), parts, strict=True):
        assert path.read_bytes() == expected.read_bytes()


def test_parts_of_a_source_become_one_file(tiny_gguf: Path, parts: tuple[Path, ...], tmp_path: Path) -> None:
    """Whichever part is named, the key/values are those of the first, and nothing of the split is left."""
    for named in (parts[0], parts[2]):
        header = read_header(named)
        (path,) = write(lay_out(header, {}, "whole.gguf", file_type=F32), header, tmp_path)
        assert path.read_bytes() == tiny_gguf.read_bytes()


def test_parts_of_a_source_become_other_parts(
    tiny_gguf: Path, parts: tuple[Path, ...], tmp_path: Path
) -> None:
    """The split keys say what the new files are; both readers join them to the same model."""
    header = read_header(parts[0])
    files = lay_out(header, {}, "other.gguf", file_type=F32, split_max_bytes=7_000_000)
    assert len(files) > 3
    paths = write(files, header, tmp_path)
    for i, path in enumerate(paths):
        fields = fields_of(path)
        assert [fields[key][1] for key in SPLIT_KEYS] == [i, len(files), len(header.tensors)]
        assert i == 0 or set(fields) == set(SPLIT_KEYS)
    whole = fields_of(tiny_gguf)
    assert {key: value for key, value in fields_of(paths[0]).items() if key not in SPLIT_KEYS} == whole
    assert tensors_of(paths) == tensors_of([tiny_gguf])
    again = read_header(paths[0])
    assert [(t.name, t.dims, t.type, t.nbytes) for t in again.tensors] == [
        (t.name, t.dims, t.type, t.nbytes) for t in header.tensors
    ]
    assert again.file_bytes == sum(file.nbytes for file in files)
    assert_llama_cpp_loads(paths[0], tiny_gguf)


def test_a_limit_that_is_not_reached_splits_nothing(tiny_gguf: Path) -> None:
    """The file keeps its name, and no key speaks of parts."""
    header = read_header(tiny_gguf)
    size = sum(tensor.nbytes for tensor in header.tensors)
    assert lay_out(header, {}, "m.gguf", file_type=F32, split_max_bytes=size) == lay_out(
        header, {}, "m.gguf", file_type=F32
    )
    assert len(lay_out(header, {}, "m.gguf", file_type=F32, split_max_bytes=size - 1)) == 2


def test_a_tensor_larger_than_the_limit_has_a_file_of_its_own(tmp_path: Path) -> None:
    """Its neighbours do not join it, and no file is empty."""
    sizes = {"a": 64, "b": 32, "c": 1024, "d": 32, "e": 64, "f": 1}
    header = read_header(
        write_gguf(tmp_path / "s.gguf", {}, {name: np.zeros(n, np.float32) for name, n in sizes.items()})
    )
    files = lay_out(header, {}, "m.gguf", file_type=F32, split_max_bytes=384)
    assert [[tensor.source.name for tensor in file.tensors] for file in files] == [
        ["a", "b"],
        ["c"],
        ["d", "e"],
        ["f"],
    ]


def test_other_types_move_the_tensors(tiny_gguf: Path, tmp_path: Path) -> None:
    """Every tensor lies where the gguf package looks for it, with the bytes of its new type."""
    header = read_header(tiny_gguf)
    kinds = ("Q2_K", "Q8_0", "IQ4_XS", "F16", "BF16")
    matrices = [t for t in header.tensors if len(t.dims) > 1 and t.dims[0] % 256 == 0]
    assert len(matrices) > 10
    types = {tensor.name: kinds[i % len(kinds)] for i, tensor in enumerate(matrices)}
    (file,) = lay_out(header, types, "m.gguf", file_type=Q2_K)
    contents: dict[str, bytes] = {}

    def numbered(tensor: OutTensor) -> bytes:
        name = tensor.source.name
        contents[name] = bytes([len(contents) % 251]) * tensor.nbytes
        return contents[name]

    (path,) = write([file], header, tmp_path, numbered)
    expected = [(t.name, types.get(t.name, t.type), list(t.dims), contents[t.name]) for t in header.tensors]
    assert tensors_of([path]) == expected
    assert fields_of(path)["general.file_type"][1] == Q2_K
    again = read_header(path)
    assert [(t.name, t.type, t.nbytes) for t in again.tensors] == [
        (name, kind, len(data)) for name, kind, _, data in expected
    ]


def test_keys_are_set_in_place_or_behind(tmp_path: Path) -> None:
    """What was there is replaced with its type, what was not comes last, the rest is as it was."""
    source = write_model(
        tmp_path / "s.gguf",
        **{
            "general.file_type": (7, gguf.GGUFValueType.UINT8),
            "quantize.imatrix.file": "old.gguf",
            "test.kept": ["a", "", "ü"],
            "test.far": (-(2**40), gguf.GGUFValueType.INT64),
        },
    )
    before = fields_of(source)
    header = read_header(source)
    extra: dict[str, str | int] = {
        "quantize.imatrix.file": "neu ✓.gguf",
        "quantize.imatrix.entries_count": 2**32 - 1,
        "quantize.imatrix.dataset": "caf\udce9.txt",
    }
    (path,) = write(lay_out(header, {}, "m.gguf", file_type=Q2_K, extra=extra), header, tmp_path)
    after = fields_of(path)
    number, text = [gguf.GGUFValueType.UINT32], [gguf.GGUFValueType.STRING]
    assert list(after) == [
        *before,
        "general.quantization_version",
        "quantize.imatrix.entries_count",
        "quantize.imatrix.dataset",
    ]
    assert after == before | {
        "general.file_type": (number, Q2_K),
        "general.quantization_version": (number, 2),
        "quantize.imatrix.file": (text, "neu ✓.gguf"),
        "quantize.imatrix.entries_count": (number, 2**32 - 1),
        "quantize.imatrix.dataset": (text, r"caf\udce9.txt"),
    }
    assert read_header(path).get_str("quantize.imatrix.file") == "neu ✓.gguf"


def test_another_alignment_holds_in_every_part(tiny_gguf: Path, tmp_path: Path) -> None:
    """A source aligned to 64 bytes gives parts that are, and that say so: llama.cpp loads them."""
    source = realigned(tiny_gguf, tmp_path / "aligned.gguf", 64)
    header = read_header(source)
    (whole,) = write(lay_out(header, {}, "whole.gguf", file_type=F32), header, tmp_path)
    assert whole.read_bytes() == source.read_bytes()
    files = lay_out(header, {}, "m.gguf", file_type=F32, split_max_bytes=PART)
    assert len(files) == 3
    paths = write(files, header, tmp_path)
    for path in paths:
        reader = gguf.GGUFReader(path)
        assert reader.alignment == 64
        assert all(tensor.data_offset % 64 == 0 for tensor in reader.tensors)
    assert any(tensor.nbytes % 64 for file in files for tensor in file.tensors)
    assert tensors_of(paths) == tensors_of([source])
    assert [t.nbytes for t in read_header(paths[0]).tensors] == [t.nbytes for t in header.tensors]
    assert_llama_cpp_loads(paths[0], source)


def test_version_2_becomes_version_3(tmp_path: Path) -> None:
    """Both versions have the same form, little-endian; only the number changes."""
    source = write_model(tmp_path / "s.gguf")
    (new,) = lay_out(read_header(source), {}, "m.gguf", file_type=F32)
    old = bytearray(source.read_bytes())
    assert old[4:8] == b"\3\0\0\0"
    old[4] = 2
    source.write_bytes(old)
    assert lay_out(read_header(source), {}, "m.gguf", file_type=F32)[0].header == new.header
    assert new.header[4:8] == b"\3\0\0\0"


def test_a_model_without_tensors_is_a_header(tmp_path: Path) -> None:
    """There is one file, and both readers take it."""
    header = read_header(write_gguf(tmp_path / "s.gguf", LLAMA_KEYS))
    (file,) = lay_out(header, {}, "m.gguf", file_type=F32, split_max_bytes=1)
    assert file.nbytes == len(file.header)
    (path,) = write([file], header, tmp_path)
    assert read_header(path).tensors == ()
    assert fields_of(path)["llama.block_count"][1] == 2


def test_a_type_newer_than_m3_is_kept_by_its_number(tmp_path: Path) -> None:
    """A tensor of an unknown type keeps number and bytes, wherever it moves to."""
    shapes = {"a": (2, 256), "b": (3, 256), "c": (4, 256)}
    source = write_gguf(
        tmp_path / "s.gguf", {}, {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    )
    data = bytearray(source.read_bytes())
    line = data.index(b"\1\0\0\0\0\0\0\0b") + 9 + 4 + 2 * 8  # where the type of b stands
    assert data[line] == 0
    data[line] = 99
    source.write_bytes(data)
    header = read_header(source)
    (file,) = lay_out(header, {"a": "Q8_0"}, "m.gguf", file_type=F32)
    content = {"a": bytes(2 * 8 * 34), "b": b"b" * 3 * 1024, "c": b"c" * 4 * 1024}
    (path,) = write([file], header, tmp_path, lambda tensor: content[tensor.source.name])
    again = read_header(path)
    assert [(t.name, t.type, t.nbytes) for t in again.tensors] == [
        ("a", "Q8_0", 544),
        ("b", "99", 3072),
        ("c", "F32", 4096),
    ]
    written = path.read_bytes()
    for tensor in again.tensors:
        assert written[tensor.offset : tensor.offset + tensor.nbytes] == content[tensor.name]


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    """The tensor, the type and the way out are named."""
    path = write_model(tmp_path / "s.gguf")
    header = read_header(path)
    with pytest.raises(UsageError, match=r"rows of token_embd\.weight have 64 elements.*256.*Q4_K"):
        lay_out(header, {"token_embd.weight": "Q4_K"}, "m.gguf", file_type=F32)
    with pytest.raises(UsageError, match=r"no tensor type Q4_K_M, which token_embd\.weight"):
        lay_out(header, {"token_embd.weight": "Q4_K_M"}, "m.gguf", file_type=F32)
    path.unlink()
    with pytest.raises(ModelError, match=r"s\.gguf"):
        lay_out(header, {}, "m.gguf", file_type=F32)


def test_too_many_parts_are_refused(tmp_path: Path) -> None:
    """m3 would not read them again, and from 65,536 on the split keys could not count them."""
    one = np.zeros(1, np.float32)
    tensors = {f"t{i}": one for i in range(MAX_SHARDS + 1)}
    header = read_header(write_gguf(tmp_path / "s.gguf", {}, tensors))
    assert len(lay_out(header, {}, "m.gguf", file_type=F32, split_max_bytes=8)) == MAX_SHARDS // 2 + 1
    with pytest.raises(UsageError, match=r"4,097 files; 4,096 are the most") as caught:
        lay_out(header, {}, "m.gguf", file_type=F32, split_max_bytes=4)
    assert "--split-max-size" in caught.value.hint


KINDS = st.sampled_from(sorted(kind.name for kind in TENSOR_TYPES.values()))
TABLES = st.lists(
    st.tuples(st.lists(st.integers(1, 3), min_size=0, max_size=3), KINDS, st.integers(0, 255)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60)
@given(TABLES, st.sampled_from([None, 8, 32, 64, 4096]), st.integers(0, 6000))
def test_any_table_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    table: list[tuple[list[int], str, int]],
    alignment: int | None,
    most: int,
) -> None:
    """Whatever the shapes, types, alignment and limit: order, places, bytes and sizes are right."""
    directory = tmp_path_factory.mktemp("table")
    writer = gguf.GGUFWriter(directory / "s.gguf", "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    for i, (shape, _, _) in enumerate(table):
        writer.add_tensor(f"tensor {i}", np.zeros((*shape, 256), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(directory / "s.gguf")
    types = {f"tensor {i}": kind for i, (_, kind, _) in enumerate(table)}
    fill = {f"tensor {i}": bytes([byte]) for i, (_, _, byte) in enumerate(table)}
    files = lay_out(header, types, "m.gguf", file_type=F32, split_max_bytes=most)
    paths = write(files, header, directory, lambda tensor: fill[tensor.source.name] * tensor.nbytes)
    for file in files:
        assert len(file.header) % (alignment or 32) == 0
        assert not most or len(file.tensors) == 1 or sum(t.nbytes for t in file.tensors) <= most
    for file, following in itertools.pairwise(files):  # no part could have taken one more
        assert sum(t.nbytes for t in (*file.tensors, following.tensors[0])) > most > 0
    again = read_header(paths[0])
    assert again.files == tuple(paths)
    assert [(t.name, t.dims, t.type) for t in again.tensors] == [
        (t.name, t.dims, types[t.name]) for t in header.tensors
    ]
    for tensor in again.tensors:
        assert tensor.offset % (alignment or 32) == 0
        with again.files[tensor.file].open("rb") as file:
            file.seek(tensor.offset)
            assert file.read(tensor.nbytes) == fill[tensor.name] * tensor.nbytes
    known = {kind.name for kind in gguf.GGMLQuantizationType}
    if set(types.values()) <= known:  # GGUFReader ends at a type that it does not know
        assert [(name, kind, dims) for name, kind, dims, _ in tensors_of(paths)] == [
            (t.name, types[t.name], list(t.dims)) for t in header.tensors
        ]
    shutil.rmtree(directory)
