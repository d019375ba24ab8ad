"""Time m3's header reader beside gguf.GGUFReader on a synthetic vocabulary of 200,000 tokens.

python scripts/bench/header.py
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import gguf

from m3cli.model.header import read_header

if TYPE_CHECKING:
    from collections.abc import Callable

TOKENS = 200_000


def write_vocabulary(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", [f"token{i}" for i in range(TOKENS)])
    writer.add_array("tokenizer.ggml.scores", [float(i) for i in range(TOKENS)])
    writer.add_array("tokenizer.ggml.token_type", [1] * TOKENS)
    writer.add_array("tokenizer.ggml.merges", [f"token {i}" for i in range(TOKENS)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def best_seconds(work: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "vocabulary.gguf"
        write_vocabulary(path)
        ours = best_seconds(lambda: read_header(path), 5)
        strings = best_seconds(lambda: read_header(path).strings("tokenizer.ggml.tokens"), 5)
        theirs = best_seconds(lambda: gguf.GGUFReader(path), 1)
    print(f"m3 read_header               {ours:8.3f} s")
    print(f"m3 read_header and all tokens{strings:8.3f} s")
    print(f"gguf.GGUFReader              {theirs:8.3f} s, {theirs / ours:.0f} times as long")


if __name__ == "__main__":
    main()
