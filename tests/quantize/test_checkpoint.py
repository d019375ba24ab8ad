"""Weights come out of a checkpoint's shards exactly, in whichever form they stand there, or not at all."""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from m3cli.errors import ModelError
from quantize.checkpoint import Checkpoint
from quantize.events import ConvertRequest
from quantize.hparams import read_hparams
from quantize.names import mappings, text_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Convert = Callable[[ConvertRequest], tuple[Path, ...]]

INDEX = "model.safetensors.index.json"
NAME = "layers.0.w.weight"
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
UNREADABLE = Path("/proc/self/mem")  # a regular file that not even root can read from its beginning


def checkpoint(directory: Path, tensors: Mapping[str, torch.Tensor], block: object = None) -> Checkpoint:
    """A checkpoint in one file, whose config states `block` unless it is None."""
    directory.mkdir(exist_ok=True)
    save_file(dict(tensors), directory / "model.safetensors")
    config = {} if block is None else {"quantization_config": {"weight_block_size": block}}
    (directory / "config.json").write_text(json.dumps(config), "utf-8")
    return Checkpoint(directory)


def indexed(directory: Path, weight_map: object, shards: Mapping[str, Mapping[str, torch.Tensor]]) -> Path:
    """A checkpoint in several files, with an index that holds `weight_map`."""
    directory.mkdir(exist_ok=True)
    for name, tensors in shards.items():
        save_file(dict(tensors), directory / name)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), "utf-8")
    (directory / "config.json").write_text("{}", "utf-8")
    return directory


def shard_bytes(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with this header, written by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def refusal(directory: Path, name: str | None = None) -> str:
    """The message with which the checkpoint, or the tensor `name` of it, is refused."""
    with pytest.raises(ModelError) as caught:
        Checkpoint(directory) if name is None else Checkpoint(directory).weight(name)
    assert caught.value.hint
    return caught.value.message


def whole(there: Checkpoint, name: str = NAME) -> Any:
    weight = there.weight(name)
    return weight.rows(0, weight.stored.shape[0])


def e4m3(byte: int) -> float:
    """OCP's 8-bit float from its bits: a sign, 4 of the exponent (bias 7), 3 of the mantissa; no infinity."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    size = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if byte >> 7 else size


def ue8m0(byte: int) -> float:
    """OCP's scale from its bits: the exponent of a power of two (bias 127)."""
    return float("nan") if byte == 255 else 2.0 ** (byte - 127)


E4M3_VALUES = np.array([e4m3(byte) for byte in range(256)])
UE8M0_VALUES = np.array([ue8m0(byte) for byte in range(256)])


def by_hand(weight: Any, scale: Any, block: tuple[int, int]) -> np.ndarray[Any, Any]:
    """The values of e4m3 bytes with float64 scales: exact products, rounded to f32 once."""
    rows, columns = np.indices(weight.shape)
    values: np.ndarray[Any, Any] = E4M3_VALUES[weight] * scale[rows // block[0], columns // block[1]]
    return values.astype(np.float32)


def by_torch(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The same, from torch's own 8-bit types."""
    spread = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return weight.float() * spread[: weight.shape[0], : weight.shape[1]]


def mxfp8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix: e4m3 and, for 32 elements of a row each, a biased exponent."""
    parts = values.float().unflatten(1, (-1, 32))
    exponents = torch.ceil(torch.log2(parts.abs().amax(-1) / 448)).clamp(-127, 127)
    exponents = exponents.nan_to_num(neginf=-127)
    weight = (parts / torch.exp2(exponents)[..., None]).flatten(1).to(E4M3)
    return weight, (exponents + 127).to(torch.uint8)


def same_bits(one: Any, other: Any) -> None:
    np.testing.assert_array_equal(np.asarray(one).view(np.uint32), np.asarray(other).view(np.uint32))


@pytest.mark.parametrize("block", [None, [1, 32]])
@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
@pytest.mark.parametrize("kind", [torch.uint8, E8M0])
def test_mxfp8(tmp_path: Path, kind: torch.dtype, suffix: str, block: object) -> None:
    """The MXFP8 release's weights are e4m3 times powers of two, whatever the scale's name and type."""
    matrix = torch.randn(48, 160, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 6, 160)
    weight, scale = mxfp8(matrix)
    there = checkpoint(tmp_path, {NAME: weight, NAME + suffix: scale.view(kind)}, block)
    assert there.stored[NAME + suffix].dtype == ("U8" if kind == torch.uint8 else "F8_E8M0")
    values = whole(there)
    assert values.dtype == torch.float32
    same_bits(values, by_hand(weight.view(torch.uint8).numpy(), UE8M0_VALUES[scale.numpy()], (1, 32)))
    same_bits(values, by_torch(weight, scale.view(E8M0), (1, 32)))
    largest = matrix.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True)
    error = (values - matrix).unflatten(1, (-1, 32)).abs()
    assert (error <= largest * 2**-4).all()  # half a step of the largest value


def test_every_byte_of_both_types(tmp_path: Path) -> None:
    """Each e4m3 value comes out with each scale, down to those that f32 holds as subnormals or as zero."""
    finite = [byte for byte in range(256) if byte & 127 != 127]
    exponents = range(247)  # with the larger ones, 448 leaves the range of f32
    weight = torch.tensor([finite] * len(exponents), dtype=torch.uint8)
    scale = torch.tensor(exponents, dtype=torch.uint8)[:, None]
    values = whole(checkpoint(tmp_path, {NAME: weight.view(E4M3), NAME + "_scale": scale}))
    same_bits(values, by_hand(weight.numpy(), UE8M0_VALUES[scale.numpy()], (1, len(finite))))
    assert values[0, finite.index(0x30)] == 2.0**-128  # 0.5 with the smallest scale
    assert values[246, finite.index(0xFE)] == -448 * 2.0**119


@st.composite
def scaled(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    """A weight, its scale and the block of it; the last block of a side may be cut off."""
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    block = (
        draw(st.integers(1, 12) | st.just(rows) | st.just(128)),
        draw(st.just(32) | st.integers(1, 12) | st.just(columns)),
    )
    shape = (-(-rows // block[0]), -(-columns // block[1]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    weight = torch.from_numpy(random.integers(0, 256, (rows, columns), dtype=np.uint8))
    weight[weight & 127 == 127] = 0
    kind = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.uint8, E8M0]))
    if kind in (torch.uint8, E8M0):
        scale = torch.from_numpy(random.integers(0, 247, shape, dtype=np.uint8)).view(kind)
    else:
        scale = torch.from_numpy(random.normal(0, 3, shape)).to(kind)
    return weight.view(E4M3), scale, block


@given(scaled(), st.sampled_from(["_scale", "_scale_inv"]), st.data())
def test_any_rows_of_any_blocks(
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[torch.Tensor, torch.Tensor, tuple[int, int]],
    suffix: str,
    data: st.DataObject,
) -> None:
    """Rows that are read alone are those rows of the whole, wherever the edges of the blocks lie."""
    weight, scale, block = case
    tensors = {NAME: weight, NAME + suffix: scale}
    read = checkpoint(tmp_path_factory.getbasetemp() / "scaled", tensors, list(block)).weight(NAME)
    first = data.draw(st.integers(0, len(weight) - 1))
    last = data.draw(st.integers(first + 1, len(weight)))
    scales = scale.view(E8M0).double() if scale.dtype == torch.uint8 else scale.double()
    expected = by_hand(weight.view(torch.uint8).numpy(), scales.numpy(), block)
    same_bits(read.rows(first, last), expected[first:last])
    same_bits(read.rows(0, len(weight)), by_torch(weight, scales, block))


def test_deepseek_s_blocks(tmp_path: Path) -> None:
    """Scales of 128 by 128 elements reach up to the edges of a matrix that is no multiple of it."""
    random = np.random.default_rng(2)
    weight = torch.from_numpy(random.normal(0, 50, (300, 200))).to(E4M3)
    scale = torch.from_numpy(random.normal(0, 1, (3, 2))).float()
    there = checkpoint(tmp_path, {NAME: weight, NAME + "_scale_inv": scale}, [128, 128])
    values = whole(there)
    same_bits(values, by_hand(weight.view(torch.uint8).numpy(), scale.double().numpy(), (128, 128)))
    same_bits(values[127:129], torch.stack([weight[127].float(), weight[128].float()]) * torch.stack(
        [scale[0, [0] * 128 + [1] * 72], scale[1, [0] * 128 + [1] * 72]]
    ))  # fmt: skip
    same_bits(there.weight(NAME).rows(255, 257), values[255:257])


@pytest.mark.parametrize(
    ("scales", "block"),
    [
        ((), (256, 384)),
        ((1, 1), (256, 384)),
        ((256, 1), (1, 384)),
        ((1, 384), (256, 1)),
        ((256, 12), (1, 32)),
        ((2, 3), (128, 128)),
        ((256, 384), (1, 1)),
    ],
)
@pytest.mark.parametrize("stated", [False, True])
def test_blocks_that_the_shapes_tell(
    tmp_path: Path, scales: tuple[int, ...], block: tuple[int, int], stated: bool
) -> None:
    """Whole tensors, rows, columns and blocks are recognised without weight_block_size."""
    random = np.random.default_rng(3)
    weight = torch.from_numpy(random.normal(0, 50, (256, 384))).to(E4M3)
    scale = torch.from_numpy(random.normal(0, 1, scales)).float()
    there = checkpoint(tmp_path, {NAME: weight, NAME + "_scale": scale}, list(block) if stated else None)
    assert there.weight(NAME).block == block
    same_bits(whole(there), by_torch(weight, scale.reshape(1, 1) if not scales else scale, block))


@pytest.mark.parametrize(
    ("shape", "scales"), [((8, 100), (8, 4)), ((192, 64), (2, 2)), ((300, 64), (3, 1)), ((130, 64), (2, 2))]
)
def test_blocks_that_the_shapes_leave_open(
    tmp_path: Path, shape: tuple[int, int], scales: tuple[int, int]
) -> None:
    """4 scales for 100 columns may be of 25 or of 32 each: without weight_block_size nobody knows."""
    tensors = {NAME: torch.ones(shape).to(E4M3), NAME + "_scale": torch.ones(scales)}
    checkpoint(tmp_path, tensors)
    said = refusal(tmp_path, NAME)
    assert f"{NAME}_scale" in said
    assert f"{list(scales)}, which does not fit its tensor of {list(shape)}." in said


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_floats_come_as_they_are(tmp_path: Path, kind: torch.dtype) -> None:
    """Floats keep their type and every bit of their values, in matrices and in vectors."""
    matrix = torch.randn(7, 5, generator=torch.Generator().manual_seed(4)).to(kind)
    matrix[3, 2] = -0.0
    matrix[4, 4] = torch.finfo(kind).smallest_normal / 2
    matrix[5, 0] = torch.finfo(kind).max
    there = checkpoint(tmp_path, {"m": matrix, "v": matrix[5].clone()})
    assert there.weight("m").scale is None
    for values, expected in (
        (there.weight("m").rows(0, 7), matrix),
        (there.weight("m").rows(3, 6), matrix[3:6]),
        (there.weight("v").rows(0, 1), matrix[5]),
    ):
        assert values.dtype == kind
        assert torch.equal(values.view(torch.uint8), expected.contiguous().view(torch.uint8))


QUANTIZED = re.compile(
    r"language_model\..*(self_attn\.(index_)?[qkvo]_proj|mlp\.\w+_proj|experts\.\d+\.w[123]"
    r"|shared_experts\.\w+_proj)\.weight"
)


@pytest.mark.parametrize(
    ("suffix", "kind", "block"), [("_scale_inv", torch.uint8, [1, 32]), ("_scale", E8M0, None)]
)
def test_a_whole_mxfp8_checkpoint(
    tiny_m3: Path, tmp_path: Path, converted: Convert, suffix: str, kind: torch.dtype, block: object
) -> None:
    """Every tensor of the GGUF file holds what torch makes of the checkpoint's, and no scale is left over."""
    source = Path(shutil.copytree(tiny_m3, tmp_path / "checkpoint"))
    config = json.loads((source / "config.json").read_text("utf-8"))
    config["quantization_config"] = {"quant_method": "mxfp8"} | (
        {"weight_block_size": block} if block else {}
    )
    (source / "config.json").write_text(json.dumps(config), "utf-8")
    index = json.loads((source / INDEX).read_text("utf-8"))
    there: dict[str, torch.Tensor] = {}
    for shard in sorted(source.glob("*.safetensors")):
        held = load_file(shard)
        for name in list(held):
            there[text_name(name)] = held[name].float()
            if QUANTIZED.fullmatch(name):
                held[name], scale = mxfp8(held[name])
                held[name + suffix] = scale.view(kind)
                index["weight_map"][name + suffix] = shard.name
                there[text_name(name)] = by_torch(held[name], scale.view(E8M0), (1, 32))
        save_file(held, shard)
    (source / INDEX).write_text(json.dumps(index), "utf-8")
    (made,) = converted(ConvertRequest(source, tmp_path / "m.gguf", "f32"))
    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(made).tensors}
    wanted = mappings(read_hparams(source))
    assert tensors.keys() == {mapping.name for mapping in wanted}
    for mapping in wanted:
        expected = torch.stack([there[name] for name in mapping.sources])
        expected = expected if mapping.stacked else expected[0]
        expected = expected + 1 if mapping.sources[0].endswith("norm.weight") else expected
        same_bits(tensors[mapping.name], expected)


@pytest.mark.parametrize(
    ("dtype", "nbytes"),
    [("I64", 8), ("I32", 4), ("I8", 1), ("U8", 1), ("BOOL", 1), ("F64", 8), ("F8_E5M2", 1), ("F8_E8M0", 1)],
)
@pytest.mark.parametrize("scale", [False, True])
def test_other_types_are_refused(tmp_path: Path, dtype: str, nbytes: int, scale: bool) -> None:
    """Integers, doubles and other 8-bit floats are no weights: tensor, file and type are named."""
    header = {NAME: {"dtype": dtype, "shape": [2, 3], "data_offsets": [0, 6 * nbytes]}}
    if scale:
        header[NAME + "_scale"] = {"dtype": "F32", "shape": [], "data_offsets": [6 * nbytes, 6 * nbytes + 4]}
    file = tmp_path / "model.safetensors"
    file.write_bytes(shard_bytes(header, bytes(6 * nbytes + 4 * scale)))
    (tmp_path / "config.json").write_text("{}", "utf-8")
    assert f"The tensor {NAME} of {file} is of type {dtype}" in refusal(tmp_path, NAME)


WEIGHT = torch.ones(64, 96).to(E4M3)
ONE = torch.ones(())


@pytest.mark.parametrize(
    ("tensors", "block", "said"),
    [
        ({NAME: WEIGHT}, None, "has 0 scales"),
        ({NAME: WEIGHT, NAME + "_scale": ONE, NAME + "_scale_inv": ONE.clone()}, None, "has 2 scales"),
        ({NAME: torch.ones(64, 96).bfloat16(), NAME + "_scale": ONE}, None, "BF16, and yet has a"),
        ({NAME: torch.ones(64, 96), NAME + "_scale_inv": torch.ones(64, 3)}, None, "F32, and yet has a"),
        ({NAME: WEIGHT[0].clone(), NAME + "_scale": torch.ones(3)}, None, "a tensor of shape [96]"),
        ({NAME: WEIGHT[None].clone(), NAME + "_scale": ONE}, None, "a tensor of shape [1, 64, 96]"),
        ({NAME: WEIGHT, NAME + "_scale": torch.ones(64, 3).double()}, None, "is of type F64"),
        ({NAME: WEIGHT, NAME + "_scale": torch.ones(64, 3).to(torch.int8)}, None, "is of type I8"),
        ({NAME: WEIGHT, NAME + "_scale": torch.ones(64, 3).to(E4M3)}, None, "is of type F8_E4M3"),
        ({NAME: WEIGHT, NAME + "_scale": torch.ones(64)}, None, "[64], which does not fit"),
        ({NAME: WEIGHT, NAME + "_scale": torch.ones(0, 3)}, None, "[0, 3], which does not fit"),
        ({NAME: WEIGHT, NAME + "_scale": torch.ones(64, 97)}, None, "[64, 97], which does not fit"),
        ({NAME: WEIGHT, NAME + "_scale": torch.ones(3, 64)}, None, "[3, 64], which does not fit"),
        ({NAME: WEIGHT, NAME + "_scale": torch.ones(64, 3, 1)}, None, "[64, 3, 1], which does not fit"),
        ({NAME: WEIGHT, NAME + "_scale": torch.ones(64, 4)}, [1, 32], "[64, 4], which does not fit"),
        ({NAME: WEIGHT, NAME + "_scale": torch.ones(63, 3)}, [1, 32], "[64, 96] in blocks of [1, 32]"),
        ({NAME: WEIGHT, NAME + "_scale": torch.ones(64, 3)}, [128, 128], "in blocks of [128, 128]"),
    ],
)  # fmt: skip
def test_scales_that_do_not_fit(
    tmp_path: Path, tensors: dict[str, torch.Tensor], block: object, said: str
) -> None:
    """A scale that is missing, doubled, misshapen, of another type or beside a float is named."""
    checkpoint(tmp_path, tensors, block)
    message = refusal(tmp_path, NAME)
    assert NAME in message
    assert said in message
    assert str(tmp_path / "model.safetensors") in message


@pytest.mark.parametrize(
    "block", [[128], [1, 2, 3], [0, 32], [-1, 32], [1.0, 32], [True, 32], ["1", 32], "x", 128]
)
def test_a_block_that_is_none(tmp_path: Path, block: object) -> None:
    """What config.json calls weight_block_size has to be two counts."""
    with pytest.raises(ModelError) as caught:
        checkpoint(tmp_path, {NAME: WEIGHT, NAME + "_scale": torch.ones(64, 3)}, block)
    assert f"{tmp_path / 'config.json'} sets quantization_config.weight_block_size to {block!r}" in str(
        caught.value
    )


@pytest.mark.parametrize("quantization", [[], "mxfp8", 3, {"weight_block_size": None}, {"fmt": "e4m3"}])
def test_other_quantization_settings_do_not_matter(tmp_path: Path, quantization: object) -> None:
    """Without a block in it, quantization_config says nothing that the shapes do not."""
    checkpoint(tmp_path, {NAME: WEIGHT, NAME + "_scale": torch.full((64, 3), 0.5)})
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}), "utf-8")
    assert (whole(Checkpoint(tmp_path)) == 0.5).all()


def with_byte(byte: int, row: int = 40) -> torch.Tensor:
    weight = WEIGHT.view(torch.uint8).clone()
    weight[row, 17] = byte
    return weight.view(E4M3)


def with_value(kind: torch.dtype, value: float, row: int = 40) -> torch.Tensor:
    weight = torch.ones(64, 96, dtype=kind)
    weight[row, 17] = value
    return weight


def with_scale(value: float, kind: torch.dtype) -> torch.Tensor:
    scale = torch.full((64, 3), 127, dtype=kind) if kind == torch.uint8 else torch.ones(64, 3, dtype=kind)
    scale[40, 0] = value
    return scale


@pytest.mark.parametrize(
    ("weight", "scale", "kind"),
    [
        (with_byte(0x7F), with_scale(127, torch.uint8), "NaNs"),
        (with_byte(0xFF), with_scale(127, torch.uint8), "NaNs"),
        (WEIGHT, with_scale(255, torch.uint8), "NaNs"),
        (WEIGHT, with_scale(255, torch.uint8).view(E8M0), "NaNs"),
        (WEIGHT, with_scale(float("nan"), torch.bfloat16), "NaNs"),
        (with_byte(0), with_scale(float("inf"), torch.float32), "NaNs"),  # 0 times infinity
        (WEIGHT, with_scale(float("-inf"), torch.float32), "infinities"),
        (with_byte(0x7E), with_scale(254, torch.uint8), "infinities"),  # 448 * 2**127
        (with_value(torch.bfloat16, float("nan")), None, "NaNs"),
        (with_value(torch.float16, float("inf")), None, "infinities"),
        (with_value(torch.float32, float("-inf")), None, "infinities"),
    ],
)
def test_a_weight_that_is_no_number(
    tmp_path: Path, weight: torch.Tensor, scale: torch.Tensor | None, kind: str
) -> None:
    """NaNs and infinities, of the weight itself or through its scale, are not passed on."""
    tensors = {NAME: weight} | ({} if scale is None else {NAME + "_scale_inv": scale})
    read = checkpoint(tmp_path, tensors).weight(NAME)
    for first, last in ((0, 64), (40, 41)):
        with pytest.raises(ModelError) as caught:
            read.rows(first, last)
        file = tmp_path / "model.safetensors"
        assert caught.value.message == f"The tensor {NAME} of {file} holds {kind}."
    assert torch.isfinite(read.rows(0, 40)).all()
    assert torch.isfinite(read.rows(41, 64)).all()


def test_both_kinds_of_no_number(tmp_path: Path) -> None:
    """A vector with a NaN between infinities is refused, too."""
    values = torch.tensor([1.0, float("inf"), float("nan"), float("-inf")])
    with pytest.raises(ModelError, match=r"The tensor v of .* holds NaNs\."):
        checkpoint(tmp_path, {"v": values}).weight("v").rows(0, 1)


def test_a_shard_cut_short_anywhere(tmp_path: Path) -> None:
    """A download that stopped early, after however many bytes, is refused by the shard's name."""
    file = tmp_path / "model.safetensors"
    complete = save({"a": torch.arange(6.0), "b": torch.ones(2, 2).bfloat16()})
    (tmp_path / "config.json").write_text("{}", "utf-8")
    for length in range(len(complete)):
        file.write_bytes(complete[:length])
        assert f"{file} cannot be read: " in refusal(tmp_path)
    file.write_bytes(complete)
    assert Checkpoint(tmp_path).stored.keys() == {"a", "b"}


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5368709120\n",
        b"<!DOCTYPE html><html><body>404</body></html>",
        struct.pack("<Q", 1 << 63) + b"{}",
        struct.pack("<Q", (1 << 64) - 1) + b"{}",
        struct.pack("<Q", (1 << 64) - 8) + b"{}",
        struct.pack("<Q", 1 << 40) + b"{" * 1000,
        shard_bytes(b"[" * 100_000),
        shard_bytes(b'{"a":' * 100_000),
        shard_bytes([]),
        shard_bytes(b"\xff\xfe"),
        shard_bytes({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        shard_bytes({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]}}, bytes(16)),
        shard_bytes({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, bytes(16)),
        shard_bytes({"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}, bytes(16)),
        shard_bytes({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 60]}}, bytes(16)),
        shard_bytes({"a": {"dtype": "F32", "shape": [4]}}, bytes(16)),
    ],
)
def test_a_file_that_is_no_shard(tmp_path: Path, content: bytes) -> None:
    """Pointers of Git LFS, error pages and headers that lie are refused by the file's name."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    (tmp_path / "config.json").write_text("{}", "utf-8")
    assert f"{file} cannot be read: " in refusal(tmp_path)


@given(st.data())
def test_a_damaged_header(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever bytes of a header change, the tensors that a conversion would take are read, or refused."""
    shape = (4, 32)
    tensors = {NAME: torch.ones(shape).to(E4M3), NAME + "_scale": torch.ones(4, 1), "norm": torch.ones(shape)}
    directory = tmp_path_factory.getbasetemp() / "damaged"
    checkpoint(directory, tensors, [1, 32])
    file = directory / "model.safetensors"
    content = bytearray(file.read_bytes())
    end = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    said = str(file)
    try:
        there = Checkpoint(directory)
        for name, stored in there.stored.items():
            if stored.shape == shape:
                values = there.weight(name).rows(0, 4)
                assert values.shape == shape
                assert torch.isfinite(values).all()
    except ModelError as error:
        said = error.message
    assert str(file) in said


def test_rows_are_copies(tmp_path: Path) -> None:
    """What was read does not hang on the file: its pages would fill the memory one after the other."""
    there = checkpoint(tmp_path, {"m": torch.ones(64, 64), "v": torch.ones(4096)})
    matrix, vector = there.weight("m").rows(0, 64), there.weight("v").rows(0, 1)
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    assert (matrix == 1).all()
    assert (vector == 1).all()


def test_a_shard_that_vanishes(tmp_path: Path) -> None:
    """A shard that is deleted while the conversion runs is named, too."""
    read = checkpoint(tmp_path, {NAME: torch.ones(2, 2)}).weight(NAME)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read: No such file"):
        read.rows(0, 2)


@pytest.mark.skipif(not UNREADABLE.exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", ["model.safetensors", INDEX, "config.json"])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    """Where the system refuses to read a file, its name and the system's reason are given."""
    checkpoint(tmp_path, {NAME: torch.ones(2, 2)})
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to(UNREADABLE)
    assert re.search(f"{re.escape(str(tmp_path / name))} cannot be read: .+", refusal(tmp_path))


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    """A small checkpoint is one file, and its tensors are those that are in it."""
    there = checkpoint(tmp_path, {"a": torch.zeros(2, 3), "b": torch.ones(5).half()})
    assert there.shards == (tmp_path / "model.safetensors",)
    assert {name: (t.dtype, t.shape) for name, t in there.stored.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("F16", (5,)),
    }


def test_shards_that_the_index_names(tmp_path: Path) -> None:
    """Tensors are found in the shards of the index, links included; files beside them do not count."""
    shards = {
        "model-2.safetensors": {"c": torch.full((2, 2), 3.0)},
        "model-1.safetensors": {"a": torch.full((2, 2), 1.0), "b": torch.full((2, 2), 2.0)},
        "model.safetensors": {"a": torch.zeros(2, 2), "old": torch.zeros(2, 2)},
    }
    weight_map = {"c": "model-2.safetensors", "b": "model-1.safetensors", "a": "model-1.safetensors"}
    directory = indexed(tmp_path / "snapshot", weight_map, shards)
    blob = (directory / "model-2.safetensors").rename(tmp_path / "blob")  # as in Hugging Face's cache
    (directory / "model-2.safetensors").symlink_to(blob)
    there = Checkpoint(directory)
    assert [shard.name for shard in there.shards] == ["model-1.safetensors", "model-2.safetensors"]
    assert {name: float(whole(there, name)[0, 0]) for name in there.stored} == {"a": 1.0, "b": 2.0, "c": 3.0}


def test_a_scale_in_another_shard(tmp_path: Path) -> None:
    """Weight and scale belong together wherever they are stored."""
    shards = {"1.safetensors": {NAME: WEIGHT}, "2.safetensors": {NAME + "_scale": torch.full((64, 1), 0.25)}}
    there = Checkpoint(indexed(tmp_path, {NAME: "1.safetensors", NAME + "_scale": "2.safetensors"}, shards))
    assert there.scale_names(NAME) == [NAME + "_scale"]
    assert there.scale_names(NAME + "_scale") == []
    assert (whole(there) == 0.25).all()


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "sub/inside.safetensors", "./1.safetensors", "..", ".", "", 7, None, ["1"]],
)
def test_an_index_that_leads_elsewhere(tmp_path: Path, name: object) -> None:
    """Only files beside the index are shards, also where a file does stand at the other place."""
    save_file({"a": torch.ones(2)}, tmp_path / "outside.safetensors")
    (tmp_path / "c" / "sub").mkdir(parents=True)
    save_file({"a": torch.ones(2)}, tmp_path / "c" / "sub" / "inside.safetensors")
    directory = indexed(tmp_path / "c", {"a": name}, {"1.safetensors": {"a": torch.ones(2)}})
    assert refusal(directory) == f"{directory / INDEX} names {name!r}, which is no file beside it."


def test_an_index_with_an_absolute_path(tmp_path: Path) -> None:
    """A path from the root is refused although it may lead to a shard."""
    save_file({"a": torch.ones(2)}, tmp_path / "outside.safetensors")
    directory = indexed(tmp_path / "c", {"a": str(tmp_path / "outside.safetensors")}, {})
    assert f"names '{tmp_path / 'outside.safetensors'}', which is no file beside it" in refusal(directory)


@pytest.mark.parametrize("name", ["gone.safetensors", "x" * 300, "nul\0.safetensors", "\ud800", "folder"])
def test_a_shard_that_is_missing(tmp_path: Path, name: str) -> None:
    """A file that is not there, cannot be there or is a directory is named as missing."""
    (tmp_path / "folder").mkdir()
    directory = indexed(tmp_path, {"a": "1.safetensors", "b": name}, {"1.safetensors": {"a": torch.ones(2)}})
    assert refusal(directory) == f"{directory} lacks {name}, which {INDEX} names."


def test_many_shards_that_are_missing(tmp_path: Path) -> None:
    """The first three are named and the others counted, each once."""
    weight_map = {f"t{i}": f"{i % 5}.safetensors" for i in range(20)}
    said = refusal(indexed(tmp_path, weight_map, {}))
    assert "lacks 0.safetensors, 1.safetensors, 2.safetensors and 2 more, which" in said


def test_a_tensor_that_its_shard_lacks(tmp_path: Path) -> None:
    """The index's word is checked: a tensor has to be in the shard that it names, not in another."""
    shards = {"1.safetensors": {"a": torch.ones(2)}, "2.safetensors": {"b": torch.ones(2)}}
    absent = indexed(tmp_path / "absent", {"a": "1.safetensors", "c": "1.safetensors"}, shards)
    assert f"{absent / '1.safetensors'} lacks the tensor c, which" in refusal(absent)
    moved = indexed(tmp_path / "moved", {"a": "2.safetensors", "b": "1.safetensors"}, shards)
    assert f"{moved / '2.safetensors'} lacks the tensor a, which" in refusal(moved)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    """The same tensor twice is ambiguous; both shards are named."""
    shards = {
        "1.safetensors": {"a": torch.ones(2), "b": torch.ones(2)},
        "2.safetensors": {"a": torch.zeros(2), "c": torch.ones(2)},
    }
    weight_map = {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"}
    said = refusal(indexed(tmp_path, weight_map, shards))
    assert said == f"The tensor a stands in both 1.safetensors and {tmp_path / '2.safetensors'}."


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": ["a"]}', b"\xff", b"[" * 100_000],
)
def test_an_index_that_is_none(tmp_path: Path, content: bytes) -> None:
    """An index that is no JSON object, or maps nothing, is named: it is not passed over."""
    checkpoint(tmp_path, {"a": torch.ones(2)})
    (tmp_path / INDEX).write_bytes(content)
    assert str(tmp_path / INDEX) in refusal(tmp_path)


def test_a_directory_without_weights(tmp_path: Path) -> None:
    """Weights in another format, as pytorch_model.bin, are not seen; what is looked for is said."""
    (tmp_path / "config.json").write_text("{}", "utf-8")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert refusal(tmp_path) == f"There is neither {INDEX} nor model.safetensors in {tmp_path}."
