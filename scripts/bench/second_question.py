"""Time to the first token of a question, cold and with the context restored, side by side.

Takes files of m3's own source until the prompt has about 6,000 tokens, asks once with an empty cache, then
other questions in new processes, and prints both times, their ratio, and where the warm one goes.
usage: python scripts/bench/second_question.py [MODEL [TOKENS]]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
M3 = str(Path(sys.executable).with_name("m3"))
QUESTIONS = (
    "Which function reads a frame?",
    "What is a snapshot?",
    "Where is a prompt rendered?",
    "Who calls llama.cpp?",
)


def measure(arguments: list[str], question: str, environment: dict[str, str]) -> tuple[float, dict[str, Any]]:
    """Wall-clock seconds of the whole command for one token of answer, and its JSON."""
    begin = time.perf_counter()
    done = subprocess.run(
        [M3, "ask", *arguments, question, "--max-tokens", "1", "--json", "--quiet"],
        capture_output=True,
        env=environment,
        check=False,
    )
    if done.returncode not in (0, 4):
        sys.exit(done.stderr.decode())
    return time.perf_counter() - begin, json.loads(done.stdout)


def corpus(tokens: int, model: list[str], environment: dict[str, str]) -> list[str]:
    """Source files that make a prompt of about `tokens`."""
    chosen: list[str] = []
    for path in sorted((ROOT / "m3cli").rglob("*.py"), key=lambda path: (path.stat().st_size, path)):
        done = subprocess.run(
            [M3, "pack", *chosen, str(path), *model],
            capture_output=True,
            env=environment,
            text=True,
            check=True,
        )
        count = int(done.stderr.split("chunk")[1].split(":")[1].split("tokens")[0].replace(",", ""))
        if count > tokens:
            break
        chosen.append(str(path))
    return chosen


def main() -> None:
    model = ["--model", sys.argv[1]] if len(sys.argv) > 1 else []
    tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 6000
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "M3_CACHE_DIR": cache}
        arguments = [*corpus(tokens, model, environment), *model]
        measure(arguments[:1] + model, "warm up the disk?", environment)
        cold, answer = measure(arguments, QUESTIONS[0], environment)
        runs = [measure(arguments, question, environment) for question in QUESTIONS[1:]]
        warm, last = min(runs, key=lambda run: run[0])
        saved = sum(path.stat().st_size for path in Path(cache).rglob("state.bin"))
    usage = answer["usage"]
    print(f"prompt: {usage['prompt_tokens']:,} tokens, KV cache on the disk {saved / 1e6:.0f} MB")
    print(f"cold: {cold:7.2f} s to the first token")
    print(f"warm: {warm:7.2f} s, {warm / cold:.1%} of the cold one (best of {len(runs)} other questions)")
    times, restored = last["timings"], last["usage"]["restored_tokens"]
    first = times["time_to_first_token"]
    rest = last["usage"]["prompt_tokens"] - restored
    parts = {
        "start of the process": warm - first,
        "reading, tokenizing and packing": times["pack"],
        "load of the model": times["load"],
        f"prefill of {rest} tokens": times["prefill"],
        f"start of the worker, restore of {restored:,} tokens": first
        - times["pack"]
        - times["load"]
        - times["prefill"],
    }
    for name, seconds in parts.items():
        print(f"  {seconds:6.3f} s  {name}")


if __name__ == "__main__":
    main()
