"""Compare what a plan says of memory with what a real load takes.

python scripts/bench/plan_truth.py [--tiny-m3] [--cases N] MODEL.gguf [MODEL.gguf ...]

For each model and several contexts, KV types and ubatches: the bytes of weights, KV cache and compute buffers
of a plan, beside those that llama.cpp reports once it has computed a whole context, and the plan's total
beside what a worker process holds (VmRSS) after it has read a whole context and written two tokens.
`--tiny-m3` makes two random models of MiniMax-M3's architecture and takes them too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from m3cli.engine.dry_run import DryRun  # noqa: E402
from m3cli.engine.events import EngineConfig, Request  # noqa: E402
from m3cli.engine.local import LocalEngine  # noqa: E402
from m3cli.model.header import read_header  # noqa: E402
from m3cli.model.shape import ModelShape  # noqa: E402
from m3cli.plan.machine import this_machine  # noqa: E402
from m3cli.plan.memory import Buffers, parent_bytes, weights_of  # noqa: E402
from m3cli.plan.planner import Configuration, Plan, Planner, Wanted  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from m3cli.plan.planner import KVType

Case = tuple[int, "KVType", int]

CASES: tuple[Case, ...] = ((2048, "f16", 512), (2048, "q8_0", 128), (4096, "f16", 256), (4096, "q4_0", 512))

# Of other proportions than that of the tests: more layers and experts, longer blocks, a wider index.
OTHER_M3 = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "index_n_heads": 4,
    "num_local_experts": 16,
    "num_experts_per_tok": 4,
    "intermediate_size": 256,
    "index_block_size": 64,
    "index_topk_blocks": 8,
    "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 4,
    "layer_types": ["full_attention"] * 2 + ["minimax_m3_sparse"] * 4,
}


@dataclass(frozen=True)
class Truth:
    """Bytes by a plan, by llama.cpp after a real load, and what the worker held.

    Weights that were repacked for the CPU lie in the file's mapped pages too, until memory is short: they
    count twice here, and once in a plan.
    """

    planned: dict[str, int]
    reported: dict[str, int]
    resident: int

    @property
    def total(self) -> int:
        """Bytes that the worker should hold."""
        return sum(self.planned.values())


def compare(model: Path, case: Case, state_dir: Path, *, extra_buffers: bool = True) -> Truth:
    """Plan, load and run one configuration without a GPU."""
    n_ctx, kv_type, n_ubatch = case
    header = read_header(model)
    shape = ModelShape.from_header(header)
    config = EngineConfig(
        str(model), n_ctx, n_ubatch=n_ubatch, kv_type_k=kv_type, kv_type_v=kv_type, gpu_layers=0
    )
    with DryRun(str(model), extra_buffers=extra_buffers) as dry_run:
        need = dry_run.need(config)
    outputs = sum(need.output.values())  # which a plan counts as compute, and llama.cpp not
    kept_twice = sum(size for name, size in need.weights.items() if name != "CPU")

    def buffers(_: Configuration) -> Buffers:
        return Buffers(sum(need.memory.values()), sum(need.compute.values()) + outputs)

    weights = weights_of(header.tensors, shape.layers)
    planner = Planner(shape, weights, this_machine([], os.cpu_count() or 1), buffers)
    plan = planner.plan(Wanted(n_ctx, n_ctx, 0, kv_type, kv_type, n_ubatch, 0))
    assert isinstance(plan, Plan), plan
    ram = plan.places[-1]
    planned = {
        "weights": ram.weights + kept_twice,
        "kv": ram.kv,
        "compute": ram.compute - outputs,
        "other": ram.other - parent_bytes(shape) + outputs,
    }
    command = [sys.executable, __file__, "--real", json.dumps(asdict(config)), str(int(extra_buffers))]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    return Truth(planned, json.loads(done.stdout), resident(config, state_dir))


def resident(config: EngineConfig, state_dir: Path) -> int:
    """Bytes that a worker holds after it has read a whole context."""
    with LocalEngine(config, state_dir=state_dir) as engine:
        for _ in engine.generate(Request(tuple(_tokens(config.n_ctx - 2)), 2)):
            pass
        return _vm_rss(engine._worker._process.pid)  # type: ignore[union-attr]


def reported(config: EngineConfig, extra_buffers: bool) -> dict[str, int]:
    """What llama.cpp says after this process has loaded the model and computed a whole context."""
    from m3cli.engine.llama import Model
    from m3cli.engine.llama_dry_run import breakdown

    model = Model(config, extra_buffers=extra_buffers)
    tokens = _tokens(model.n_ctx)
    for start in range(0, model.n_ctx, model.n_batch):
        model.decode(tokens, start, min(model.n_batch, model.n_ctx - start))
    rows = breakdown(model._context) or []
    names = {"weights": "model", "kv": "context", "compute": "compute"}
    return {name: sum(row[key] for row in rows) for name, key in names.items()}


def tiny_models(directory: Path) -> Iterator[Path]:
    """Two random models: that of the tests, and one of other proportions in 16 bits."""
    from quantize.convert import convert
    from quantize.events import ConvertRequest
    from scripts import make_tiny_m3

    own = dict(make_tiny_m3.TEXT)
    for name, changes, kind in (("tiny-m3", {}, "f32"), ("other-m3", OTHER_M3, "bf16")):
        make_tiny_m3.TEXT.update(changes)
        make_tiny_m3.make(directory / name)
        make_tiny_m3.TEXT.update(own)
        path = directory / f"{name}.gguf"
        for _ in convert(ConvertRequest(directory / name, path, kind)):
            pass
        yield path


def _tokens(count: int) -> array[int]:
    return array("i", [i % 200 + 50 for i in range(count)])


def _vm_rss(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    facts: dict[str, Any] = dict(line.split(":", 1) for line in lines)
    return int(facts["VmRSS"].split()[0]) * 1024


def main() -> None:
    """Parse the arguments and print the table."""
    if sys.argv[1] == "--real":
        config = json.loads(sys.argv[2])
        config.update(tensor_overrides=(), tensor_split=(), lora=())
        print(json.dumps(reported(EngineConfig(**config), sys.argv[3] == "1")))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--tiny-m3", action="store_true")
    parser.add_argument("--cases", type=int, default=len(CASES))
    arguments = parser.parse_args()
    print(f"{'model':22}{'n_ctx':>6}{'KV':>6}{'ubatch':>7}", end="")
    print("".join(f"{name:>21}" for name in ("weights", "KV cache", "compute")), f"{'total / resident':>34}")
    with tempfile.TemporaryDirectory() as directory:
        made = tiny_models(Path(directory)) if arguments.tiny_m3 else ()
        for model in (*arguments.models, *made):
            for case in CASES[: arguments.cases]:
                truth = compare(model, case, Path(directory))
                n_ctx, kv_type, n_ubatch = case
                print(f"{model.stem[:21]:22}{n_ctx:6}{kv_type:>6}{n_ubatch:7}", end="")
                for name, actual in truth.reported.items():
                    print(f"{truth.planned[name]:13,}{truth.planned[name] / actual:8.2%}", end="")
                print(
                    f"{truth.total:15,} /{truth.resident:12,}{truth.total / truth.resident:7.1%}", flush=True
                )


if __name__ == "__main__":
    main()
