"""Quantizing against llama.cpp's own quantizer, and what interrupts it."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from m3cli.errors import ModelError, UsageError
from m3cli.model.header import read_header
from quantize import kinds
from quantize.choose import Choice, QuantizeRequest, choose
from quantize.events import Converted, Progress
from quantize.importance import Entry, Importance, write_importance
from quantize.quantizer import Output, Quantization

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from m3cli.model.header import Header


def made(request: QuantizeRequest) -> tuple[Quantization, tuple[Path, ...]]:
    """Carry a request out."""
    quantization = planned(request)
    *_, last = quantization.run()
    assert isinstance(last, Converted)
    return quantization, last.files


def planned(request: QuantizeRequest) -> Quantization:
    *_, choice = choose(request)
    assert isinstance(choice, Choice)
    return Quantization(choice.source, choice.types, request.output, choice.file_type)


def data_of(header: Header) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of each tensor."""
    result = {}
    for tensor in header.tensors:
        with header.files[tensor.file].open("rb") as file:
            file.seek(tensor.offset)
            result[tensor.name] = (tensor.type, file.read(tensor.nbytes))
    return result


def by_llama_cpp(source: Path, out: Path, file_type: str, importance: Importance | None) -> None:
    """Quantize with `llama_model_quantize`."""
    from m3cli.engine.llama_library import lib

    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.allow_requantize = kinds.file_type(file_type), 2, True
    header = read_header(source)
    dims = {tensor.name: (*tensor.dims, 1, 1) for tensor in header.tensors}
    entries = importance.entries if importance else {}
    arrays = []
    table = (lib.llama_model_imatrix_data * (len(entries) + 1))()
    for slot, name in zip(table, entries, strict=False):
        assert importance is not None
        weights = importance.weights(name, dims[name][0], dims[name][2])
        assert weights is not None
        arrays.append(np.ascontiguousarray(weights))
        slot.name, slot.size = name.encode(), weights.size
        slot.data = arrays[-1].ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if entries:
        params.imatrix = table
    assert lib.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(params)) == 0


def random_importance(header: Header) -> Importance:
    """Importances of all matrices, of each expert its own; one expert was never hit."""
    random = np.random.default_rng(0)
    entries = {}
    for tensor in header.tensors:
        if tensor.name.startswith("blk.") and len(tensor.dims) > 1:
            experts = (*tensor.dims, 1)[2]
            sums = random.lognormal(0, 1, (experts, tensor.dims[0])).astype(np.float32)
            counts = random.integers(1, 50, experts)
            if experts > 1:
                counts[3] = 0
            entries[tensor.name] = Entry(sums * counts[:, None].astype(np.float32), counts.astype(np.int64))
    return Importance(entries, ("made up",), 512, 4)


@pytest.mark.parametrize("with_importance", [False, True])
@pytest.mark.parametrize("mixture", ["Q4_K_M", "Q2_K", "Q8_0", "IQ3_S", "F16"])
def test_every_byte_is_that_of_llama_cpp(
    tiny_gguf: Path, tmp_path: Path, mixture: str, with_importance: bool
) -> None:
    """Types and data of all tensors are what llama_model_quantize makes, experts and importance included."""
    importance = random_importance(read_header(tiny_gguf)) if with_importance else None
    if importance:
        write_importance(tmp_path / "i.gguf", importance)
    by_llama_cpp(tiny_gguf, tmp_path / "theirs.gguf", mixture, importance)
    imatrix = tmp_path / "i.gguf" if importance else None
    _, (ours,) = made(
        QuantizeRequest(tiny_gguf, Output(tmp_path / "ours.gguf"), mixture=mixture, imatrix=imatrix)
    )
    mine, theirs = read_header(ours), read_header(tmp_path / "theirs.gguf")
    assert data_of(mine) == data_of(theirs)
    assert mine.get_int("general.file_type") == theirs.get_int("general.file_type")
    assert mine.get_int("general.quantization_version") == theirs.get_int("general.quantization_version")


def test_types_that_need_an_importance_matrix(tiny_gguf: Path, tmp_path: Path) -> None:
    """IQ2_XXS is refused without one, and equals llama.cpp's with one."""
    output = Output(tmp_path / "ours.gguf")
    with pytest.raises(UsageError, match=r"IQ2_XXS of blk.* needs an importance matrix, and there is none"):
        planned(QuantizeRequest(tiny_gguf, output, mixture="IQ2_XXS"))
    importance = random_importance(read_header(tiny_gguf))
    write_importance(tmp_path / "i.gguf", importance)
    by_llama_cpp(tiny_gguf, tmp_path / "theirs.gguf", "IQ2_XXS", importance)
    _, (ours,) = made(QuantizeRequest(tiny_gguf, output, mixture="IQ2_XXS", imatrix=tmp_path / "i.gguf"))
    assert data_of(read_header(ours)) == data_of(read_header(tmp_path / "theirs.gguf"))
    assert read_header(ours).get_str("quantize.imatrix.dataset") == "made up"

    output = Output(tmp_path / "other.gguf")
    partial = {name: entry for name, entry in importance.entries.items() if "attn_q" not in name}
    write_importance(tmp_path / "partial.gguf", Importance(partial, (), 512, 4))
    with pytest.raises(UsageError, match="and the given one has nothing on it"):
        planned(QuantizeRequest(tiny_gguf, output, mixture="IQ2_XXS", imatrix=tmp_path / "partial.gguf"))


def test_rows_that_k_quants_do_not_divide(smollm2: str, tmp_path: Path) -> None:
    """SmolLM2's rows of 576 fall back as in llama.cpp; requantized only if that is allowed."""
    from pathlib import Path

    source = Path(smollm2)
    refused = QuantizeRequest(source, Output(tmp_path / "ours.gguf"), mixture="Q3_K_M")
    with pytest.raises(UsageError, match=r"is quantized already: .* are Q4_1\. Quantized again, its errors"):
        planned(refused)
    by_llama_cpp(source, tmp_path / "theirs.gguf", "Q3_K_M", None)
    allowed = QuantizeRequest(source, Output(tmp_path / "ours.gguf", allow_requantize=True), mixture="Q3_K_M")
    quantization, (ours,) = made(allowed)
    assert data_of(read_header(ours)) == data_of(read_header(tmp_path / "theirs.gguf"))
    assert ours.stat().st_size == quantization.planned.total_bytes


@pytest.mark.parametrize("split", [0, 1_000_000])
def test_sizes_are_known_beforehand(tiny_gguf: Path, tmp_path: Path, split: int) -> None:
    """The plan is right to the byte, in one file and in parts; the parts hold what the one file holds."""
    request = QuantizeRequest(tiny_gguf, Output(tmp_path / "q.gguf", split), recipe="uniform-q4_k")
    quantization, files = made(request)
    assert [(file.name, file.nbytes) for file in quantization.planned.files] == [
        (path.name, path.stat().st_size) for path in files
    ]
    assert len(files) > 1 if split else files == (tmp_path / "q.gguf",)
    assert sorted(os.listdir(tmp_path)) == sorted(path.name for path in files)  # noqa: PTH208
    _, (whole,) = made(QuantizeRequest(tiny_gguf, Output(tmp_path / "w.gguf"), recipe="uniform-q4_k"))
    assert data_of(read_header(files[0])) == data_of(read_header(whole))


def test_a_split_source(tiny_gguf: Path, tmp_path: Path) -> None:
    """Parts go in, one file comes out."""
    _, parts = made(QuantizeRequest(tiny_gguf, Output(tmp_path / "p.gguf", 4_000_000), mixture="F16"))
    _, (whole,) = made(QuantizeRequest(tiny_gguf, Output(tmp_path / "w.gguf"), mixture="F16"))
    assert len(parts) > 2
    _, (one,) = made(QuantizeRequest(parts[1], Output(tmp_path / "one.gguf"), mixture="Q5_K_M"))
    _, (other,) = made(QuantizeRequest(whole, Output(tmp_path / "other.gguf"), mixture="Q5_K_M"))
    assert one.read_bytes() == other.read_bytes()


_KILLED = """\
import sys
from pathlib import Path
from quantize.choose import QuantizeRequest, choose
from quantize.quantizer import Output, Quantization
*_, choice = choose(QuantizeRequest(Path(sys.argv[1]), Output(Path(sys.argv[2])), mixture="Q4_K_M"))
for event in Quantization(choice.source, choice.types, Output(Path(sys.argv[2])), choice.file_type).run():
    print(event, flush=True)
"""


@pytest.mark.parametrize("after", [1, 12, 40])
def test_kill_9(tiny_gguf: Path, tmp_path: Path, after: int) -> None:
    """A run that is killed leaves no file under the final name; a second one goes on and completes it."""
    out = tmp_path / "q.gguf"
    run = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(tiny_gguf), str(out)], stdout=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    for _ in range(after):
        assert run.stdout.readline().startswith("Progress")
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert not out.exists()
    assert (tmp_path / "q.gguf.partial").is_dir()

    request = QuantizeRequest(tiny_gguf, Output(out), mixture="Q4_K_M")
    _, files = made(request)
    assert files == (out,)
    _, (whole,) = made(QuantizeRequest(tiny_gguf, Output(tmp_path / "w.gguf"), mixture="Q4_K_M"))
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["q.gguf", "w.gguf"]  # noqa: PTH208


def test_what_is_written_is_kept(tiny_gguf: Path, tmp_path: Path) -> None:
    """A run that is interrupted goes on where it was; with other types it does not."""
    request = QuantizeRequest(tiny_gguf, Output(tmp_path / "q.gguf"), mixture="Q4_K_M")
    run = planned(request).run()
    for event in run:
        assert isinstance(event, Progress)
        if event.done > event.total // 2:
            break
    run.close()
    first = next(planned(request).run())
    assert isinstance(first, Progress)
    assert first.resumed == event.done
    other = QuantizeRequest(tiny_gguf, Output(tmp_path / "q.gguf"), mixture="Q5_K_M")
    with pytest.raises(UsageError, match=r"unfinished quantization in .* is of another model, or was begun"):
        next(planned(other).run())


def test_weights_that_are_no_numbers(tiny_gguf: Path, tmp_path: Path) -> None:
    """A NaN in the source is an error that names the tensor; nothing gets the final name."""
    source = tmp_path / "nan.gguf"
    shutil.copyfile(tiny_gguf, source)
    tensor = next(t for t in read_header(source).tensors if t.name == "blk.2.ffn_up_exps.weight")
    with source.open("r+b") as file:
        file.seek(tensor.offset + 400_000)
        file.write(np.float32("nan").tobytes())
    with pytest.raises(ModelError, match=r"blk\.2\.ffn_up_exps\.weight .* holds a NaN"):
        made(QuantizeRequest(source, Output(tmp_path / "q.gguf"), mixture="Q4_K_M"))
    assert not (tmp_path / "q.gguf").exists()


@pytest.mark.parametrize(
    ("request_of", "words"),
    [
        ({"mixture": "Q4_K_M", "recipe": "uniform-q4_k"}, "More than one thing says"),
        ({}, "Nothing says what to quantize to"),
        ({"mixture": "Q9"}, "There is no file type Q9"),
        ({"recipe": "none"}, "There is no recipe none"),
        ({"budget": 1_000_000}, r"too small: the model takes 2,904,544 bytes with the smallest types"),
        ({"budget": 10_000_000, "candidates": ("Q4_K", "Q99")}, "There is no type Q99"),
    ],
)
def test_what_cannot_be_asked_for(
    tiny_gguf: Path, tmp_path: Path, request_of: Mapping[str, object], words: str
) -> None:
    """Each is refused before anything is written."""
    with pytest.raises(UsageError, match=words):
        planned(QuantizeRequest(tiny_gguf, Output(tmp_path / "q.gguf"), **request_of))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_output_names(tiny_gguf: Path, tmp_path: Path) -> None:
    """An output is a .gguf in a directory that exists, and is never overwritten."""
    with pytest.raises(UsageError, match=r"not named \*\.gguf"):
        planned(QuantizeRequest(tiny_gguf, Output(tmp_path / "q.bin"), mixture="Q8_0"))
    with pytest.raises(UsageError, match="There is no directory"):
        planned(QuantizeRequest(tiny_gguf, Output(tmp_path / "no" / "q.gguf"), mixture="Q8_0"))
    (tmp_path / "q.gguf").touch()
    with pytest.raises(UsageError, match="already exists"):
        made(QuantizeRequest(tiny_gguf, Output(tmp_path / "q.gguf"), mixture="Q8_0"))
