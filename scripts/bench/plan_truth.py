"""Compare what a plan says of memory with what a real load takes.

python scripts/bench/plan_truth.py MODEL.gguf [MODEL.gguf ...]

For each model and several contexts, KV types and ubatches: the bytes of weights, KV cache and compute buffers
that `m3 plan` predicts, those that llama.cpp reports once the model is loaded, and what the process
holds (VmRSS) after it has computed a whole context, less what it held before the load.
"""

from __future__ import annotations

import json
import subprocess
import sys
from array import array
from dataclasses import asdict, replace
from pathlib import Path

from m3cli.engine.dry_run import DryRun
from m3cli.engine.events import EngineConfig

CASES = ((2048, "f16", 512), (2048, "q8_0", 128), (4096, "f16", 256), (4096, "q4_0", 512))


def real(config: EngineConfig) -> dict[str, int]:
    """Load for real in this process, compute a whole context, and look."""
    from m3cli.engine.llama import Model
    from m3cli.engine.llama_dry_run import breakdown

    before = rss()
    model = Model(config, extra_buffers=False)
    tokens = array("i", [i % 200 + 50 for i in range(model.n_ctx)])
    for start in range(0, model.n_ctx, model.n_batch):
        model.decode(tokens, start, min(model.n_batch, model.n_ctx - start))
    rows = breakdown(model._context) or []
    found = {key: sum(row[key] for row in rows) for key in ("model", "context", "compute")}
    return {**found, "rss": rss() - before}


def rss() -> int:
    """Bytes that this process holds."""
    facts = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(facts["VmRSS"].split()[0]) * 1024


def main() -> None:
    if sys.argv[1] == "--real":
        config = json.loads(sys.argv[2])
        config["tensor_overrides"], config["tensor_split"] = (), ()
        print(json.dumps(real(EngineConfig(**config))))
        return
    print(f"{'model':24}{'n_ctx':>6}{'KV':>6}{'ubatch':>7}", end="")
    print("".join(f"{name:>26}" for name in ("weights", "KV cache", "compute")), f"{'total / resident':>22}")
    for path in sys.argv[1:]:
        with DryRun(path, extra_buffers=False) as dry_run:
            for n_ctx, kv_type, n_ubatch in CASES:
                config = EngineConfig(
                    path, n_ctx, n_ubatch=n_ubatch, kv_type_k=kv_type, kv_type_v=kv_type, gpu_layers=0
                )  # type: ignore[arg-type]
                need = dry_run.need(replace(config))
                plan = [sum(part.values()) for part in (need.weights, need.memory, need.compute)]
                command = [sys.executable, __file__, "--real", json.dumps(asdict(config))]
                truth = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
                print(f"{Path(path).stem[:23]:24}{n_ctx:6}{kv_type:>6}{n_ubatch:7}", end="")
                for planned, key in zip(plan, ("model", "context", "compute"), strict=True):
                    print(f"{planned:13,}{planned / truth[key] if truth[key] else 0:7.1%}", end="      ")
                total = sum(plan) + sum(need.output.values())
                print(f"{total:13,}{total / truth['rss']:7.1%}")


if __name__ == "__main__":
    main()
