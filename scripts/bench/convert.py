"""Peak memory and speed of `m3 quantize convert`, beside a plain copy of the same bytes.

Makes a checkpoint of over 3 GB in the published form, with random weights and many experts, copies its
weights, converts it to each type, and prints for each the peak resident memory and the throughput.
Copy and conversion both end when their bytes are on the disk. Takes about 11 GB of disk for a while.
usage: python scripts/bench/convert.py [DIRECTORY FOR ITS FILES]
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARD_BYTES = 1_000_000_000
SHAPE = {
    "hidden_size": 2048,
    "num_hidden_layers": 5,
    "intermediate_size": 1024,
    "shared_intermediate_size": 1024,
    "dense_intermediate_size": 4096,
    "num_local_experts": 64,
    "num_experts_per_tok": 4,
    "mlp_layer_types": ["dense"] + ["sparse"] * 4,
    "layer_types": ["full_attention"] + ["minimax_m3_sparse"] * 4,
}


def make(directory: Path) -> None:
    """Write the checkpoint: a tiny M3's files, with a wider shape and its weights."""
    import torch
    from safetensors.torch import save_file

    from quantize.hparams import read_hparams
    from quantize.names import mappings
    from scripts.make_tiny_m3 import make as make_tiny

    make_tiny(directory, config="saved")
    for file in directory.glob("model*"):
        file.unlink()
    config = json.loads((directory / "config.json").read_text("utf-8"))
    config["text_config"].update(SHAPE)
    (directory / "config.json").write_text(json.dumps(config), "utf-8")
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(places.values())) + 1:05d}.safetensors"
        save_file(shard, directory / name)
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    for mapping in mappings(read_hparams(directory)):
        for source in mapping.sources:
            values = torch.empty(mapping.shape, dtype=torch.float32).normal_(0, 0.02, generator=generator)
            shard[f"language_model.model.{source}"] = values.to(torch.bfloat16)
        if sum(2 * values.numel() for values in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}), "utf-8")


def copy(shards: list[Path], target: Path) -> float:
    """Copy the files; return the seconds until they are on the disk."""
    os.sync()  # what others have written is not to be waited for
    begin = time.perf_counter()
    for shard in shards:
        with shard.open("rb") as source, (target / shard.name).open("wb") as sink:
            shutil.copyfileobj(source, sink, 8 << 20)
            sink.flush()
            os.fsync(sink.fileno())
    return time.perf_counter() - begin


def convert(checkpoint: Path, out: Path, out_type: str) -> tuple[float, int]:
    """Run the command; return its seconds and its peak resident memory in bytes."""
    os.sync()
    begin = time.perf_counter()
    command = [str(Path(sys.executable).with_name("m3")), "quantize", "convert", str(checkpoint)]
    process = subprocess.Popen(
        [*command, "--out", str(out), "--type", out_type, "--quiet"], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"the conversion failed: {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - begin, usage.ru_maxrss * 1024


def main() -> None:
    """Measure. This process stays small: a child's peak counts from what its parent held."""
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        directory = Path(name)
        checkpoint, copies = directory / "checkpoint", directory / "copies"
        copies.mkdir()
        subprocess.run(
            [sys.executable, __file__, "--make", str(checkpoint)],
            check=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.DEVNULL,
        )
        shards = sorted(checkpoint.glob("*.safetensors"))
        nbytes = sum(shard.stat().st_size for shard in shards)
        expert = 2 * SHAPE["hidden_size"] * SHAPE["intermediate_size"]  # type: ignore[operator]
        print(
            f"checkpoint: {nbytes / 1e9:.2f} GB in {len(shards)} shards; largest expert {expert / 1e6:.1f} MB"
        )
        seconds = copy(shards, copies)
        shutil.rmtree(copies)
        print(f"{'copy':12} {seconds:6.1f} s  {nbytes / seconds / 1e6:7.0f} MB/s")
        for out_type in ("bf16", "f16", "q8_0", "f32"):
            out = directory / "model.gguf"
            took, peak = convert(checkpoint, out, out_type)
            print(
                f"{out_type:12} {took:6.1f} s  {nbytes / took / 1e6:7.0f} MB/s of checkpoint  "
                f"{took / seconds:5.2f} x the copy  peak {peak / 1e6:6.0f} MB  "
                f"writes {out.stat().st_size / 1e9:.2f} GB"
            )
            out.unlink()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        make(Path(sys.argv[2]))
    else:
        main()
