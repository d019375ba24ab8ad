"""How much a model's predictions depend on its attention and on the type of its KV cache, by position.

Runs the same text through the model as it is meant to run (for MiniMax-M3: sparse attention, KV cache in f16)
and then with dense attention, and with KV caches in q8_0 and q4_0; prints for runs of positions the mean KL
divergence of the predictions in nats a token, and how often the likeliest token is the same. Without a model,
a tiny MiniMax-M3 with random weights is made: its numbers show where attention begins to differ, not how much
a trained model would lose.
usage: python scripts/bench/attention_agreement.py [MODEL.gguf [TOKENS]]
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from m3cli.engine.events import EngineConfig
from m3cli.engine.process import WorkerClient
from m3cli.model.catalog import resolve
from m3cli.model.tokens import pack_ids
from m3cli.tasks.evaluate.haystack import python_material
from m3cli.tasks.model import open_model

ROOT = Path(__file__).resolve().parents[2]
_FIRST = 64  # positions of the first run; each is twice as long as all before


def tiny_m3(directory: Path) -> Path:
    """A tiny MiniMax-M3 with random weights, in f32."""
    sys.path.insert(0, str(ROOT))
    from quantize.convert import convert
    from quantize.events import ConvertRequest
    from scripts.make_tiny_m3 import make

    make(directory / "tiny-m3")
    path = directory / "tiny-m3.gguf"
    for _ in convert(ConvertRequest(directory / "tiny-m3", path, "f32")):
        pass
    return path


def main() -> None:
    tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 4096
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(sys.argv[1]) if len(sys.argv) > 1 else tiny_m3(Path(temporary))
        with open_model(resolve(str(path), {})) as opened:
            tokens = min(tokens, opened.shape.context_length)
            ids = opened.tokenizer.encode(python_material(tokens).text)[:tokens]
            sparse = opened.shape.indexer is not None
            if sparse:
                indexer = opened.shape.indexer
                most = (indexer.top_k + 1) * indexer.block_size
                print(f"A query attends {most:,} tokens at most, in blocks of {indexer.block_size}.")
        reference = EngineConfig(str(path), len(ids))
        ways = {
            "dense attention": replace(reference, flash_attention=False, allow_dense=True),
            "KV cache q8_0": replace(reference, kv_type_k="q8_0", kv_type_v="q8_0"),
            "KV cache q4_0": replace(reference, kv_type_k="q4_0", kv_type_v="q4_0"),
        }
        if not sparse:
            ways.pop("dense attention")
        edges = [0, *(_FIRST << i for i in range(40) if _FIRST << i < len(ids) - 1), len(ids) - 1]
        print(f"{path.name}, {len(ids):,} tokens; mean KL divergence in nats, same likeliest token\n")
        with WorkerClient("computing", None) as client:
            predictions(client, reference, ids, temporary, keep=True)
            found = {
                name: predictions(client, config, ids, temporary, keep=False) for name, config in ways.items()
            }
    print(f"| positions | {' | '.join(ways)} |")
    print("|---" * (len(ways) + 1) + "|")
    for a, b in pairwise(edges):
        cells = [f"{kl[a:b].mean():.4f}, {same[a:b].mean():.0%}" for kl, _, _, same in found.values()]
        print(f"| {a:,}–{b:,} | {' | '.join(cells)} |")


def predictions(
    client: WorkerClient, config: EngineConfig, ids: list[int], directory: str, *, keep: bool
) -> np.ndarray:
    """Keep what the model predicts, or compare: float64 [4, positions], see m3cli.engine.llama_logits."""
    message = {
        "op": "logits",
        "config": asdict(config),
        "first": 0,
        "position": 0,
        "keep": keep,
        "directory": directory,
    }
    reply = client.ask(message, pack_ids(ids))[1]
    return np.frombuffer(reply, np.float64).reshape(4, -1) if not keep else np.empty((4, 0))


if __name__ == "__main__":
    main()
