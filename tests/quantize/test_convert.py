"""Whole conversions of a tiny checkpoint, also through the real command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from m3cli.errors import ModelError, UsageError
from m3cli.model import preflight
from m3cli.model.header import read_header
from m3cli.model.shape import ModelShape
from quantize.convert import Conversion, convert
from quantize.events import ConvertRequest, Planned, Progress
from scripts import make_tiny_m3
from scripts.make_tiny_m3 import make
from tests.cli.conftest import M3

if TYPE_CHECKING:
    from collections.abc import Callable

    Convert = Callable[[ConvertRequest], tuple[Path, ...]]

INDEX = "model.safetensors.index.json"
EXPERT = "language_model.model.layers.1.block_sparse_moe.experts.3.w2.weight"


def tensors(*paths: Path) -> dict[str, tuple[int, bytes]]:
    """Type and bytes of every tensor, read by the gguf package."""
    return {
        tensor.name: (int(tensor.tensor_type), tensor.data.tobytes())
        for path in paths
        for tensor in gguf.GGUFReader(path).tensors
    }


def copy_of(tiny_m3: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_m3, tmp_path / "checkpoint"))


def change(checkpoint: Path, name: str, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Rewrite the shard that holds `name`, and the index with it; return the shard."""
    index = json.loads((checkpoint / INDEX).read_text("utf-8"))
    shard = checkpoint / index["weight_map"][name]
    held = load_file(shard)
    before = set(held)
    edit(held)
    save_file(held, shard)
    for gone in before - set(held):
        del index["weight_map"][gone]
    index["weight_map"] |= dict.fromkeys(set(held) - before, shard.name)
    (checkpoint / INDEX).write_text(json.dumps(index), "utf-8")
    return shard


def refusal(checkpoint: Path, out_type: Any = "bf16") -> str:
    """What the conversion is refused with; nothing may be left that looks like a model."""
    out = checkpoint.parent / "out" / "m.gguf"
    out.parent.mkdir()
    with pytest.raises(ModelError) as caught:
        for _ in convert(ConvertRequest(checkpoint, out, out_type)):
            pass
    assert not list(out.parent.glob("*.gguf"))
    return str(caught.value)


def test_both_forms_of_the_config_give_the_same_tensors(
    tiny_gguf: Path, tmp_path: Path, converted: Convert
) -> None:
    """The published config.json and the one that transformers saves again make the same model."""
    make(tmp_path / "saved", config="saved")
    text = json.loads((tmp_path / "saved" / "config.json").read_text("utf-8"))["text_config"]
    assert "index_block_size" in text
    assert "sparse_attention_config" not in text
    (again,) = converted(ConvertRequest(tmp_path / "saved", tmp_path / "again.gguf", "f32"))
    assert tensors(again) == tensors(tiny_gguf)


def test_every_weight_arrives(tiny_m3: Path, tiny_gguf: Path) -> None:
    """Each expert stands in its place of the stacked tensor, and norms have their 1."""
    there: dict[str, torch.Tensor] = {}
    for shard in tiny_m3.glob("*.safetensors"):
        there |= load_file(shard)
    made = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(tiny_gguf).tensors}
    layer = "language_model.model.layers.2"
    for name, part in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        stacked = torch.stack(
            [there[f"{layer}.block_sparse_moe.experts.{e}.{part}.weight"] for e in range(8)]
        )
        np.testing.assert_array_equal(made[f"blk.2.ffn_{name}_exps.weight"], stacked.float().numpy())
    norm = there["language_model.model.norm.weight"].float() + 1
    np.testing.assert_array_equal(made["output_norm.weight"], norm.numpy())
    indexer = there[f"{layer}.self_attn.index_q_norm.weight"].float() + 1
    np.testing.assert_array_equal(made["blk.2.indexer.q_norm.weight"], indexer.numpy())
    text = [name for name in there if name.startswith("language_model.")]
    assert sum(array.size for array in made.values()) == sum(there[name].numel() for name in text)


@pytest.mark.parametrize("out_type", ["bf16", "f16", "q8_0"])
def test_only_matrices_take_the_type(
    tiny_m3: Path, tiny_gguf: Path, tmp_path: Path, converted: Convert, out_type: Any
) -> None:
    """Norms, router and indexer stay f32; matrices round to the nearest value of their type."""
    (path,) = converted(ConvertRequest(tiny_m3, tmp_path / "m.gguf", out_type))
    exact = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(tiny_gguf).tensors}
    for tensor in gguf.GGUFReader(path).tensors:
        kept = "norm" in tensor.name or ".indexer." in tensor.name or "_inp" in tensor.name
        kept = kept or tensor.name.endswith(".bias")
        assert tensor.tensor_type.name == ("F32" if kept else out_type.upper())
        values, want = gguf.quants.dequantize(tensor.data, tensor.tensor_type), exact[tensor.name]
        if kept or out_type == "bf16":  # as the checkpoint has it
            np.testing.assert_array_equal(values, want)
        elif out_type == "f16":  # below 2**-14 its steps are all alike
            assert (np.abs(values - want) <= np.maximum(np.abs(want) * 2**-11, 2**-25)).all()
        else:  # blocks of 32, in 127 steps of a scale that is f16 itself
            values, want = values.reshape(-1, 32), want.reshape(-1, 32)
            assert (np.abs(values - want) <= np.abs(want).max(1, keepdims=True) * 1.13 / 254).all()


def test_a_split_model_is_the_same_model(
    tiny_m3: Path, tiny_gguf: Path, tmp_path: Path, converted: Convert
) -> None:
    """Three files hold the tensors of one; m3's header reader and preflight accept them."""
    files = converted(ConvertRequest(tiny_m3, tmp_path / "m.gguf", "f32", split_max_bytes=12_000_000))
    assert [file.name for file in files] == [f"m-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    assert tensors(*files) == tensors(tiny_gguf)
    header = read_header(files[0])
    assert preflight.problem(header, ModelShape.from_header(header)) is None
    whole = read_header(tiny_gguf)
    assert {
        k: v for k, v in header.fields.items() if not k.startswith("split.")
    }.keys() == whole.fields.keys()


def test_the_plan_is_what_is_written(tiny_m3: Path, tmp_path: Path) -> None:
    """Sizes, counts and skips are known before, and progress runs from nothing to all."""
    planned, *progress, done = convert(ConvertRequest(tiny_m3, tmp_path / "m.gguf", "q8_0"))
    assert isinstance(planned, Planned)
    assert planned.license == "minimax-community"
    assert planned.skipped == {"vision": 27}
    assert planned.notes == ()
    (file,) = done.files  # type: ignore[union-attr]
    assert file.stat().st_size == planned.total_bytes
    made = gguf.GGUFReader(file).tensors
    assert sum(count for _, count, _ in planned.tensors) == len(made)
    assert sum(nbytes for *_, nbytes in planned.tensors) == sum(int(t.n_bytes) for t in made)
    assert planned.parameters == sum(int(t.n_elements) for t in made)
    counts = [event.done for event in progress if isinstance(event, Progress)]
    assert counts == sorted(set(counts))
    assert (counts[0], counts[-1]) == (0, planned.total_bytes)


def test_a_missing_tensor_is_named(tiny_m3: Path, tmp_path: Path) -> None:
    """A checkpoint without one expert's matrix is refused before anything is written."""
    checkpoint = copy_of(tiny_m3, tmp_path)
    change(checkpoint, EXPERT, lambda held: held.__delitem__(EXPERT))
    assert EXPERT.removeprefix("language_model.model.") in refusal(checkpoint)


def test_an_extra_tensor_is_named(tiny_m3: Path, tmp_path: Path) -> None:
    """A tensor that the model has no place for, such as an adapter's, is not dropped in silence."""
    checkpoint = copy_of(tiny_m3, tmp_path)
    extra = EXPERT.replace("weight", "lora_A.weight")
    shard = change(checkpoint, EXPERT, lambda held: held.update({extra: torch.zeros(2, 2)}))
    said = refusal(checkpoint)
    assert extra in said
    assert shard.name in said


def test_a_tensor_that_is_there_twice_is_named(tiny_m3: Path, tmp_path: Path) -> None:
    """The same tensor under two prefixes is ambiguous."""
    checkpoint = copy_of(tiny_m3, tmp_path)
    other = EXPERT.removeprefix("language_model.")
    change(checkpoint, EXPERT, lambda held: held.update({other: held[EXPERT].clone()}))
    said = refusal(checkpoint)
    assert EXPERT in said
    assert other in said


def test_a_misshapen_tensor_is_named(tiny_m3: Path, tmp_path: Path) -> None:
    """Shapes are checked against config.json before anything is written."""
    checkpoint = copy_of(tiny_m3, tmp_path)
    change(checkpoint, EXPERT, lambda held: held.update({EXPERT: held[EXPERT][:, :-1].contiguous()}))
    said = refusal(checkpoint)
    assert EXPERT in said
    assert "[256, 255]" in said
    assert "[256, 256]" in said


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("out_type", ["bf16", "f32", "q8_0"])
def test_a_bad_value_is_named(tiny_m3: Path, tmp_path: Path, bad: float, out_type: Any) -> None:
    """One NaN or infinity in one expert ends the conversion with the tensor's name."""
    checkpoint = copy_of(tiny_m3, tmp_path)

    def spoil(held: dict[str, torch.Tensor]) -> None:
        held[EXPERT][200, 17] = bad

    change(checkpoint, EXPERT, spoil)
    said = refusal(checkpoint, out_type)
    assert EXPERT in said
    assert ("NaN" if bad != bad else "infinities") in said


def test_output_names_are_checked(tiny_m3: Path, tmp_path: Path) -> None:
    """A name without .gguf, or in no directory, is refused at once."""
    for out in (tmp_path / "m.bin", tmp_path / "nowhere" / "m.gguf"):
        with pytest.raises(UsageError, match=str(out.name if out.suffix == ".bin" else out.parent)):
            Conversion(ConvertRequest(tiny_m3, out))


KILLED = """
import os, signal, sys
from pathlib import Path
from quantize import convert, partial
from quantize.events import ConvertRequest
partial._SYNC_BYTES = 1 << 20
convert._PIECE_ELEMENTS = 1 << 14
steps = 0
source, out, split, kill_at = sys.argv[1:]
for event in convert.convert(ConvertRequest(Path(source), Path(out), "f32", int(split), resume=True)):
    steps += 1
    if steps == int(kill_at):
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("split", [0, 12_000_000])
def test_kill_9_and_resume(tiny_m3: Path, tmp_path: Path, converted: Convert, split: int) -> None:
    """Killed three times at odd moments, then resumed by the command: every byte is the same."""
    whole = converted(ConvertRequest(tiny_m3, tmp_path / "m.gguf", "f32", split))
    (tmp_path / "again").mkdir()
    out = tmp_path / "again" / "m.gguf"
    done = []
    for kill_at in (2, 57, 150):
        command = [sys.executable, "-c", KILLED, str(tiny_m3), str(out), str(split), str(kill_at)]
        root = str(Path(__file__).parents[2])
        killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": root}, check=False)
        assert killed.returncode == -signal.SIGKILL
        assert not list(out.parent.glob("*.gguf"))
        done.append(json.loads((out.parent / "m.gguf.partial" / "journal.json").read_text("utf-8"))["done"])
    assert 0 < done[1] < done[2]
    arguments = ["--out", str(out), "--type", "f32"] + (["--split-max-size", str(split)] if split else [])
    resumed = subprocess.run(
        [M3, "quantize", "convert", str(tiny_m3), *arguments, "--resume"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stderr.count("resuming at") == 1
    assert resumed.stdout.strip() == str(out.parent / whole[0].name)
    assert sorted(path.name for path in out.parent.iterdir()) == [path.name for path in whole]
    for path in whole:
        assert (out.parent / path.name).read_bytes() == path.read_bytes()


def begun(checkpoint: Path, out: Path) -> None:
    """Convert until a good part of it is written, then stop."""
    events = convert(ConvertRequest(checkpoint, out))
    for event in events:
        if isinstance(event, Progress) and event.done > event.total // 2:
            break
    with pytest.raises(KeyboardInterrupt):
        events.throw(KeyboardInterrupt)  # type: ignore[attr-defined]


def test_another_conversion_is_not_resumed(tiny_m3: Path, tmp_path: Path) -> None:
    """Another type, or another block of scales, does not continue the old conversion."""
    checkpoint, out = copy_of(tiny_m3, tmp_path), tmp_path / "m.gguf"
    begun(checkpoint, out)
    with pytest.raises(UsageError, match="other options"):
        list(convert(ConvertRequest(checkpoint, out, "f16", resume=True)))
    path = checkpoint / "config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**config, "quantization_config": {"weight_block_size": [1, 32]}}))
    with pytest.raises(UsageError, match="another model"):
        list(convert(ConvertRequest(checkpoint, out, resume=True)))


def test_a_shard_that_was_replaced_is_converted_again(
    tiny_m3: Path, tmp_path: Path, converted: Convert
) -> None:
    """A NaN costs what came from its shard, not the whole conversion; the directory may move meanwhile."""
    checkpoint, out = copy_of(tiny_m3, tmp_path), tmp_path / "m.gguf"
    whole = converted(ConvertRequest(tiny_m3, tmp_path / "whole.gguf"))[0]
    late = "language_model.model.layers.3.block_sparse_moe.experts.3.w2.weight"
    index = json.loads((checkpoint / INDEX).read_text("utf-8"))
    original = (checkpoint / index["weight_map"][late]).read_bytes()

    def spoil(held: dict[str, torch.Tensor]) -> None:
        held[late][0, 0] = float("nan")

    shard = change(checkpoint, late, spoil)
    with pytest.raises(ModelError, match="NaN"):
        list(convert(ConvertRequest(checkpoint, out)))
    checkpoint = checkpoint.rename(tmp_path / "moved")
    (checkpoint / shard.name).write_bytes(original)
    _, first, *_, last = convert(ConvertRequest(checkpoint, out, resume=True))
    assert isinstance(first, Progress)
    assert 0 < first.resumed < first.total
    assert last.files[0].read_bytes() == whole.read_bytes()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("value", "out_type"), [(1e7, "q8_0"), (3.4e38, "bf16"), (70000.0, "f16"), (-1e7, "q8_0")]
)
def test_what_a_type_cannot_hold_is_named(tmp_path: Path, value: float, out_type: Any) -> None:
    """A value beyond the range of the type does not become an infinity, or a block of NaNs."""
    checkpoint = tmp_path / "checkpoint"
    make(checkpoint, dtype="float32")

    def spoil(held: dict[str, torch.Tensor]) -> None:
        held[EXPERT][0, 0] = value

    change(checkpoint, EXPERT, spoil)
    said = refusal(checkpoint, out_type)
    assert EXPERT in said
    assert "beyond" in said


def test_data_are_padded_to_their_alignment(
    tmp_path: Path, converted: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor whose bytes are no multiple of 32, as the bias of 6 experts, does not shift the next one."""
    monkeypatch.setitem(make_tiny_m3.TEXT, "num_local_experts", 6)
    make(tmp_path / "six")
    (path,) = converted(ConvertRequest(tmp_path / "six", tmp_path / "six.gguf", "f32"))
    there: dict[str, torch.Tensor] = {}
    for shard in (tmp_path / "six").glob("*.safetensors"):
        there |= load_file(shard)
    made = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    layer = "language_model.model.layers.1.block_sparse_moe"
    for name, source in (
        ("exp_probs_b.bias", "e_score_correction_bias"),
        ("ffn_gate_inp.weight", "gate.weight"),
    ):
        np.testing.assert_array_equal(made[f"blk.1.{name}"], there[f"{layer}.{source}"].float().numpy())


def test_fused_matrices_are_told_from_missing_ones(tiny_m3: Path, tmp_path: Path) -> None:
    """What transformers saves in its own form is not called damaged."""
    checkpoint = copy_of(tiny_m3, tmp_path)
    fused = "language_model.model.layers.1.mlp.experts.gate_up_proj"

    def fuse(held: dict[str, torch.Tensor]) -> None:
        held[fused] = held.pop(EXPERT)

    change(checkpoint, EXPERT, fuse)
    assert "fused matrices" in refusal(checkpoint)


def test_an_output_name_need_not_be_text(tiny_m3: Path, tmp_path: Path, converted: Convert) -> None:
    """File names are bytes."""
    (path,) = converted(ConvertRequest(tiny_m3, Path(os.fsdecode(os.fsencode(tmp_path) + b"/n\xff.gguf"))))
    assert path.exists()


def test_a_tensor_larger_than_a_file_is_noted(tiny_m3: Path, tmp_path: Path) -> None:
    """A split that cannot be kept is said before, not found out afterwards."""
    planned = Conversion(ConvertRequest(tiny_m3, tmp_path / "m.gguf", split_max_bytes=1000)).planned
    assert any("--split-max-size" in note for note in planned.notes)
    assert len(planned.files) > 40
