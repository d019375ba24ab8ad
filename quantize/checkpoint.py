"""A Hugging Face checkpoint on disk: safetensors shards, read a few rows at a time.

Weights in 8-bit floats (e4m3) stand beside their scales: `NAME_scale_inv` or `NAME_scale`, one number
for each block of the weight, as float or, in the MXFP8 release, as the bare exponent of a power of
two (ue8m0, one for 32 elements of a row). Whichever name it has, the weight is multiplied by it.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from m3cli.errors import ModelError
from quantize.hparams import read_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_FLOATS = {"F32", "F16", "BF16"}
_FP8 = "F8_E4M3"
_EXPONENTS = {"U8", "F8_E8M0"}
_SCALES = ("_scale_inv", "_scale")
AGAIN = "Download the checkpoint again, or the files that differ from the published ones."


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a shard. `dtype` is safetensors' name of it; the shape has the slowest dimension first."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of the model, with the scale that it is multiplied by if it is an 8-bit float.

    `block` is the part of the weight, rows by columns, that shares an element of the scale.
    """

    stored: Stored
    scale: Stored | None = None
    block: tuple[int, int] = (1, 1)

    def rows(self, first: int, last: int, limit: float = math.inf) -> Any:
        """Return rows `first` to `last`, the latter excluded, as a torch tensor of f32, f16 or bf16.

        A tensor of one dimension is one row. Raises ModelError, naming the tensor, if it cannot be read
        or holds a NaN or a value beyond `limit`.
        """
        values = _read(self.stored, first, last)
        if self.scale is not None:
            values = values.float() * self._scales(self.scale, first, last, values.shape[-1])
        low, high = torch.aminmax(values)  # both are NaN if one value is
        largest = max(-float(low), float(high))
        if not math.isfinite(largest):
            kind = "NaNs" if math.isnan(largest) else "infinities"
            raise ModelError(f"The tensor {self.stored.name} of {self.stored.file} holds {kind}.", AGAIN)
        if largest > limit:
            raise ModelError(
                f"The tensor {self.stored.name} of {self.stored.file} holds values beyond {limit:,.4g}, the "
                "largest of the type that was asked for.",
                "Convert with --type bf16, or f32 for values as large as these.",
            )
        return values

    def _scales(self, scale: Stored, first: int, last: int, columns: int) -> Any:
        height, width = self.block
        if not scale.shape:
            return _scale_values(_read(scale, 0, 1), scale.dtype)
        top = first // height
        values = _scale_values(_read(scale, top, (last - 1) // height + 1), scale.dtype)
        rows = torch.arange(first, last) // height - top
        return values[rows].repeat_interleave(width, dim=1)[:, :columns]


class Checkpoint:
    """The tensors of all shards, by the names they have there.

    `scale_block` is rows and columns that share a scale, None where the config does not say.
    Raises ModelError, naming file or tensor, when a shard is missing, broken or cut short, or lacks what
    the index promises.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.scale_block = _scale_block(directory / "config.json")
        self.shards: tuple[Path, ...] = ()
        self.stored: dict[str, Stored] = {}
        promised = _weight_map(directory)
        for shard in sorted(set(promised.values())):
            self.shards += (shard,)
            for tensor in _list(shard):
                if tensor.name in self.stored:
                    other = self.stored[tensor.name].file
                    raise ModelError(
                        f"The tensor {tensor.name} stands in both {other.name} and {shard}.", AGAIN
                    )
                self.stored[tensor.name] = tensor
        for name, shard in promised.items():
            if name and (name not in self.stored or self.stored[name].file != shard):
                raise ModelError(f"{shard} lacks the tensor {name}, which the index places there.", AGAIN)

    def scale_names(self, name: str) -> list[str]:
        """Names of the scale of the tensor `name`, of which at most one is there."""
        return [name + suffix for suffix in _SCALES if name + suffix in self.stored]

    def weight(self, name: str) -> Weight:
        """Return the tensor `name`, which has to be there, with its scale.

        Raises ModelError for a type that is no weight's, and a scale that is missing or misshapen.
        """
        stored = self.stored[name]
        scales = [self.stored[scale] for scale in self.scale_names(name)]
        if stored.dtype in _FLOATS:
            if scales:
                raise ModelError(
                    f"The tensor {name} of {stored.file} is {stored.dtype}, and yet has a scale.", AGAIN
                )
            return Weight(stored)
        if stored.dtype != _FP8:
            raise ModelError(
                f"The tensor {name} of {stored.file} is of type {stored.dtype}, which m3 does not convert.",
                "Convert from the BF16 or the MXFP8 release.",
            )
        if len(scales) != 1:
            raise ModelError(
                f"The tensor {name} of {stored.file} is 8-bit and has {len(scales)} scales instead of one.",
                AGAIN,
            )
        return Weight(stored, scales[0], self._block(stored, scales[0]))

    def _block(self, stored: Stored, scale: Stored) -> tuple[int, int]:
        if scale.dtype not in _FLOATS | _EXPONENTS or len(stored.shape) != 2:
            raise ModelError(
                f"The scale {scale.name} of {scale.file} is of type {scale.dtype}, for a tensor of shape "
                f"{list(stored.shape)}, which m3 does not know.",
                AGAIN,
            )
        if not scale.shape:
            return stored.shape[0], stored.shape[1]
        block = self.scale_block or _likely_block(stored.shape, scale.shape)
        if (
            block is None
            or not all(block)
            or scale.shape != tuple(-(-size // part) for size, part in zip(stored.shape, block, strict=True))
        ):
            raise ModelError(
                f"The scale {scale.name} of {scale.file} has the shape {list(scale.shape)}, which does not "
                f"fit its tensor of {list(stored.shape)}"
                + (f" in blocks of {list(self.scale_block)}." if self.scale_block else "."),
                AGAIN,
            )
        return block


def _likely_block(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, as far as the shapes of weight and scale leave no choice.

    Blocks are whole sides or powers of two: 4 scales for 100 columns are no blocks of 25, but may be of 32.
    """
    if len(scales) != 2 or not all(scales):
        return None
    height, width = (size // count for size, count in zip(shape, scales, strict=True))
    for side, count in ((height, scales[0]), (width, scales[1])):
        if count > 1 and side & (side - 1):
            return None
    return height, width


def _scale_block(path: Path) -> tuple[int, int] | None:
    """Rows and columns that share a scale, where the config states them."""
    config = read_json(path)
    text = config.get("text_config")
    quantization = config.get("quantization_config")
    if quantization is None and isinstance(text, dict):
        quantization = text.get("quantization_config")
    block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise ModelError(f"{path} sets quantization_config.weight_block_size to {block!r}.", AGAIN)
    return block[0], block[1]


def _weight_map(directory: Path) -> Mapping[str, Path]:
    """Tensor name → shard as the index says, or "" → the only file."""
    index = directory / _INDEX
    if not index.exists():
        if (directory / _SINGLE).exists():
            return {"": directory / _SINGLE}
        raise ModelError(
            f"There is neither {_INDEX} nor {_SINGLE} in {directory}.",
            "Name the directory of a downloaded checkpoint; m3 reads safetensors only.",
        )
    entries = read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise ModelError(f"{index} holds no weight_map.", AGAIN)
    for file in entries.values():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".."):
            raise ModelError(f"{index} names {file!r}, which is no file beside it.", AGAIN)
    missing = sorted({file for file in entries.values() if not _is_file(directory / file)})
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ModelError(f"{directory} lacks {shown}, which {_INDEX} names.", "Download what is missing.")
    return {name: directory / file for name, file in entries.items()}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long for any
        return False


def _list(shard: Path) -> Iterator[Stored]:
    with _open(shard) as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            part = file.get_slice(name)
            yield Stored(name, shard, part.get_dtype(), tuple(part.get_shape()))


def _read(stored: Stored, first: int, last: int) -> Any:
    """Rows of a tensor, copied out of the file, which is not kept open: mapped pages count as memory."""
    with _open(stored.file) as file:
        if len(stored.shape) < 2:
            return file.get_tensor(stored.name).clone()
        return file.get_slice(stored.name)[first:last].clone()


def _scale_values(values: Any, dtype: str) -> Any:
    if dtype == "U8":  # ue8m0: the exponent of a power of two; 255 is its NaN
        values = values.view(torch.float8_e8m0fnu)
    return values.float()


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    """Open a safetensors file; errors name it."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}.", AGAIN) from error
