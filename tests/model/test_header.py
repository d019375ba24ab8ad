from __future__ import annotations

import contextlib
import os
import struct
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, LlamaFileType
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.errors import ModelError
from m3cli.model.ggml_types import FILE_TYPES, TENSOR_TYPES
from m3cli.model.header import Header, read_header
from tests.gguf_files import write_gguf, write_model
from tests.hugging_face import smollm2_path

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return write_model(
        path,
        **{
            "test.yes": True,
            "test.pi": 3.25,
            "test.far": (-(2**40), gguf.GGUFValueType.INT64),
            "test.text": "naïve ✓",
            "test.small": [3, 1, 2],
            "test.large": list(range(5000)),
            "test.words": ["a", "", "ü" * 300, "z"],
        },
    )


def error_of(path: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        read_header(path)
    assert str(path.name) in caught.value.message
    assert caught.value.message.endswith(".")
    assert caught.value.hint.endswith(".")
    return caught.value


def test_values_come_back_as_they_were_written(model: Path) -> None:
    """Every kind of value that the gguf package writes is read back, arrays on demand."""
    header = read_header(model)
    assert header.architecture == "llama"
    assert header.get_int("llama.block_count") == 2
    assert header.get_bool("test.yes") is True
    assert header.get_float("test.pi") == 3.25
    assert header.get_int("test.far") == -(2**40)
    assert header.get_str("test.text") == "naïve ✓"
    assert header.array("test.small") == (3, 1, 2)
    assert header.array("test.large") == tuple(range(5000))
    assert header.strings("test.words") == [b"a", b"", "ü".encode() * 300, b"z"]
    assert header.count("test.words") == 4
    assert header.count("test.large") == 5000
    assert header.get_int("absent") is None
    assert header.strings("absent") == []


def test_tensor_table_names_places_and_sizes(model: Path) -> None:
    """Tensors have the sizes of their types and lie where the gguf package finds them."""
    header = read_header(model)
    expected = {
        tensor.name: (tensor.data_offset, tensor.n_bytes, tensor.tensor_type.name)
        for tensor in gguf.GGUFReader(model).tensors
    }
    assert {t.name: (t.offset, t.nbytes, t.type) for t in header.tensors} == expected
    assert header.tensors[0].dims == (64, 8)
    assert header.file_bytes == model.stat().st_size


def test_spans_hold_keys_and_values_without_a_gap(model: Path) -> None:
    """From the counts to the tensor table, each span begins where the one before it ends."""
    header = read_header(model)
    assert list(header.spans) == list(header.fields)
    ends = [24, *(end for _, end in header.spans.values())]
    assert [start for start, _ in header.spans.values()] == ends[:-1]
    content = model.read_bytes()
    length = struct.pack("<Q", len("token_embd.weight"))
    assert content[ends[-1] :].startswith(length + b"token_embd.weight")
    text = "naïve ✓".encode()
    expected = struct.pack("<Q", 9) + b"test.text" + struct.pack("<IQ", 8, len(text)) + text
    assert header.raw("test.text") == expected
    for key, field in gguf.GGUFReader(model).fields.items():
        if not key.startswith("GGUF."):
            parts = b"".join(part.tobytes() for part in field.parts)
            assert header.raw(key) == parts
            start, end = header.spans[key]
            assert content[start:end] == parts


def test_a_key_of_another_type_is_an_error_and_not_a_surprise(model: Path) -> None:
    """Asking for a type that the key does not have names the key."""
    header = read_header(model)
    for get in (header.get_int, header.get_str, header.array, header.strings, header.count):
        with pytest.raises(ModelError, match=r"test\.yes"):
            get("test.yes")
    with pytest.raises(ModelError, match=r"no\.such\.key"):
        header.require_int("no.such.key")


def test_real_model_is_read_like_the_gguf_package_reads_it() -> None:
    """The demo model's tensors, token list and merges are the same as GGUFReader's."""
    path = smollm2_path()
    if path is None:
        pytest.skip("the demo model is not installed")
    header = read_header(path)
    reader = gguf.GGUFReader(path)
    assert [(t.name, t.offset, t.nbytes) for t in header.tensors] == [
        (t.name, t.data_offset, t.n_bytes) for t in reader.tensors
    ]
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        field = reader.fields[key]
        assert header.strings(key) == [bytes(field.parts[i]) for i in field.data]
    assert header.array("tokenizer.ggml.token_type") == tuple(
        reader.fields["tokenizer.ggml.token_type"].contents()
    )


def test_type_tables_agree_with_the_gguf_package() -> None:
    """Block sizes and file type names are those that the gguf package knows."""
    known = {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
    shared = known.keys() & TENSOR_TYPES.keys()
    assert len(shared) > 30
    assert {i: known[i] for i in shared} == {i: tuple(TENSOR_TYPES[i]) for i in shared}
    names = {int(kind): kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in LlamaFileType}
    assert len(names.keys() & FILE_TYPES.keys()) > 30
    assert all(names[i] == FILE_TYPES[i] for i in names.keys() & FILE_TYPES.keys())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "Git LFS pointer"),
        (b"PK\x03\x04rest of an archive", "zip archive"),
        (b"<!DOCTYPE html><html><title>404</title></html>", "web page"),
        (struct.pack("<Q", 2) + b"{}", "safetensors"),
        (b"tjgg" + bytes(100), "older GGML"),
        (b"just some text", "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "number of keys"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "number of tensors"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62), "name of key 1"),
        (b"GGUF\x03\x00", "version"),
    ],
)
def test_what_is_no_model_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    """A file that is no GGUF says what it looks like instead; absurd counts say where they stand."""
    path = tmp_path / "file.gguf"
    path.write_bytes(content)
    assert said in error_of(path).message


def _header_with(key: bytes, value: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key + value


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (struct.pack("<I", 99), "unknown type 99"),
        (struct.pack("<IIQ", 9, 9, 1), "array of arrays"),
        (struct.pack("<IIQ", 9, 8, 1 << 40), "strings"),
        (struct.pack("<IIQQ", 9, 8, 3, 16) + bytes(16), "2 strings too early"),
        (struct.pack("<IIQ", 9, 4, 1 << 61), "only 0 are left"),
        (struct.pack("<IQ", 8, 1 << 50), "length of the value of some.key"),
    ],
)
def test_hostile_values_are_refused_before_memory_is_taken(tmp_path: Path, value: bytes, said: str) -> None:
    """Counts and lengths that the file cannot hold name the key and the byte."""
    path = tmp_path / "hostile.gguf"
    path.write_bytes(_header_with(b"some.key", value))
    message = error_of(path).message
    assert said in message
    assert "some.key" in message
    assert "at byte" in message


def test_sparse_file_of_a_terabyte_does_not_stall(tmp_path: Path) -> None:
    """A header that claims to fill a huge hole with strings is refused at once."""
    path = tmp_path / "hole.gguf"
    path.write_bytes(_header_with(b"some.key", struct.pack("<IIQQ", 9, 8, 1 << 22, 1 << 39)))
    os.truncate(path, 1 << 40)
    assert "some.key" in error_of(path).message


def test_cut_short_file_says_how_much_is_there(model: Path, tmp_path: Path) -> None:
    """A download that stopped is told from a broken file, in bytes."""
    path = tmp_path / "cut.gguf"
    path.write_bytes(model.read_bytes()[:-100])
    error = error_of(path)
    assert "cut short" in error.message
    assert f"{path.stat().st_size:,}" in error.message
    assert "ownload" in error.hint


def test_missing_file_and_directory_are_errors(tmp_path: Path) -> None:
    """A path that is not there, or a directory, or no regular file, is named."""
    assert "no file" in error_of(tmp_path / "absent.gguf").message
    assert "directory" in error_of(tmp_path).message
    os.mkfifo(tmp_path / "fifo.gguf")
    assert "regular" in error_of(tmp_path / "fifo.gguf").message


def test_unknown_tensor_type_takes_the_room_up_to_the_next_tensor(model: Path, tmp_path: Path) -> None:
    """A type newer than m3 does not make a file unreadable."""
    data = bytearray(model.read_bytes())
    place = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    assert data[place : place + 4] == struct.pack("<I", 0)
    data[place : place + 4] = struct.pack("<I", 1000)
    path = tmp_path / "new.gguf"
    path.write_bytes(data)
    tensor = next(t for t in read_header(path).tensors if t.name == "token_embd.weight")
    assert (tensor.type, tensor.nbytes) == ("1000", 8 * 64 * 4)


def _write_shards(directory: Path, count: int) -> list[Path]:
    paths = []
    for i in range(count):
        path = directory / f"big-{i + 1:05d}-of-{count:05d}.gguf"
        fields = {
            "split.no": (i, gguf.GGUFValueType.UINT16),
            "split.count": (count, gguf.GGUFValueType.UINT16),
            "split.tensors.count": (count, gguf.GGUFValueType.INT32),
            **({"general.name": "Big"} if i == 0 else {}),
        }
        paths.append(write_gguf(path, fields, {f"blk.{i}.w.weight": np.full((4, 8), i, np.float32)}))
    return paths


def test_split_model_is_read_whole_from_any_of_its_files(tmp_path: Path) -> None:
    """Keys come from the first part, tensors from all; llama.cpp is given the first part."""
    paths = _write_shards(tmp_path, 3)
    for path in paths:
        header = read_header(path)
        assert header.path == paths[0]
        assert header.files == tuple(paths)
        assert header.get_str("general.name") == "Big"
        assert [(t.name, t.file) for t in header.tensors] == [(f"blk.{i}.w.weight", i) for i in range(3)]
        assert header.file_bytes == sum(p.stat().st_size for p in paths)


def test_split_model_names_the_missing_part(tmp_path: Path) -> None:
    """What is missing is said by file name, and a part of another model is not accepted."""
    paths = _write_shards(tmp_path, 3)
    kept = paths[1].read_bytes()
    paths[1].unlink()
    with pytest.raises(ModelError, match=paths[1].name):
        read_header(paths[0])
    paths[1].write_bytes(paths[0].read_bytes())
    with pytest.raises(ModelError, match=paths[1].name):
        read_header(paths[0])
    (tmp_path / "renamed.gguf").write_bytes(kept)
    with pytest.raises(ModelError, match="one of 3 parts"):
        read_header(tmp_path / "renamed.gguf")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damage_ends_in_an_error_or_a_header(model: Path, data: st.DataObject) -> None:
    """However a file is cut and its bytes changed, nothing but a ModelError comes out."""
    content = bytearray(model.read_bytes())
    limit = content.index(b"blk.0.ffn_down") + 64
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, limit - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path = model.with_name("damaged.gguf")
    path.write_bytes(content)
    try:
        header = read_header(path)
    except ModelError:
        return
    assert header.file_bytes == len(content)
    for key in header.fields:
        _read_any(header, key)


def _read_any(header: Header, key: str) -> None:
    getters = (
        header.get_int,
        header.get_float,
        header.get_bool,
        header.get_str,
        header.array,
        header.strings,
    )
    worked = 0
    for get in getters:
        with contextlib.suppress(ModelError):
            get(key)
            worked += 1
    assert worked == 1
