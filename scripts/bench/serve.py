"""What a running server is worth: time to first token, speed with several clients, memory over many requests.

Asks questions about a directory, whose context is on the disk, in fresh processes that load the model and in
processes that use the server, in turns; then has 1, 2 and 4 clients chat with the server at once; then sends
it many short requests and looks at the resident memory of the server and of its model process. Linux only.
usage: python scripts/bench/serve.py [MODEL [DIRECTORY [REQUESTS]]]
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from second_question import measure

ROOT = Path(__file__).resolve().parents[2]
M3 = str(Path(sys.executable).with_name("m3"))
QUESTIONS = ("What does it do?", "Which errors are there?", "What is stored?", "Who calls it?", "Is it safe?")
DEFAULTS = ("demo", str(ROOT / "m3cli" / "memo.py"), "1000")
_ANSWER = 64  # tokens of an answer where speed is measured


def chat(url: str, model: str, text: str, tokens: int) -> tuple[int, float, float]:
    """Tokens of a streamed answer, seconds to its first, and seconds in all."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 1,
    }
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode())
    begin, first, generated = time.perf_counter(), 0.0, 0
    with urllib.request.urlopen(request) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if chunk.get("usage"):
                generated = chunk["usage"]["completion_tokens"]
            elif not first and chunk["choices"][0]["delta"].get("content"):
                first = time.perf_counter() - begin
    return generated, first, time.perf_counter() - begin


def first_token(directory: str, model: list[str], environment: dict[str, str]) -> None:
    """Print the time to the first token of fresh processes and of the server, side by side."""
    arguments = [directory, *model]
    sides = {"a fresh process": ["--no-server"], "the server": []}
    walls: dict[str, list[float]] = {side: [] for side in sides}
    firsts: dict[str, list[float]] = {side: [] for side in sides}
    result: dict[str, Any] = {}
    for question in QUESTIONS:
        for side, options in sides.items():
            wall, result = measure([*arguments, *options], question, environment)
            walls[side].append(wall)
            firsts[side].append(result["timings"]["time_to_first_token"])
    usage = result["usage"]
    print(f"{usage['prompt_tokens']:,} prompt tokens, {usage['restored_tokens']:,} of them restored\n")
    print(f"| medians of {len(QUESTIONS)}, in seconds | the whole command | its time to the first token |")
    print("|---|---|---|")
    for side in sides:
        print(f"| {side} | {statistics.median(walls[side]):.2f} | {statistics.median(firsts[side]):.2f} |")
    ratios = [
        statistics.median(one["a fresh process"]) / statistics.median(one["the server"])
        for one in (walls, firsts)
    ]
    print(f"| ratio | {ratios[0]:.1f} | {ratios[1]:.1f} |\n")


def clients(url: str, model: str) -> None:
    """Print tokens a second of several clients at once."""
    print(
        "| clients | tokens/s in all | tokens/s of one answer | seconds to the first token (median, worst) |"
    )
    print("|---|---|---|---|")
    for count in (1, 2, 4):
        begin = time.perf_counter()
        with ThreadPoolExecutor(count) as pool:
            texts = [f"Tell me a story about the number {number}." for number in range(8)]
            answers = list(pool.map(lambda text: chat(url, model, text, _ANSWER), texts))
        seconds = time.perf_counter() - begin
        generated = sum(tokens for tokens, _, _ in answers)
        firsts = [first for _, first, _ in answers]
        speeds = [tokens / (whole - first) for tokens, first, whole in answers if whole > first]
        print(
            f"| {count} | {generated / seconds:.1f} | {statistics.median(speeds):.1f} "
            f"| {statistics.median(firsts):.2f}, {max(firsts):.2f} |"
        )
    print()


def memory(server: int, url: str, model: str, requests: int) -> None:
    """Print the resident memory of the server and its model process while it answers short requests."""
    print("| requests | server, MB | model process, MB | open files of the server |")
    print("|---|---|---|---|")
    steps = sorted({1, requests // 10, requests // 2, requests} - {0})
    for number in range(1, requests + 1):
        chat(url, model, f"Say {number}.", 2)
        if number in steps:
            children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
            worker = sum(map(resident, [int(child) for child in children] or workers(server)))
            files = len(list(Path(f"/proc/{server}/fd").iterdir()))
            print(f"| {number:,} | {resident(server):.1f} | {worker:.1f} | {files} |")


def workers(server: int) -> list[int]:
    """Processes that threads of the server have started."""
    tasks = Path(f"/proc/{server}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def resident(process: int) -> float:
    """Megabytes of memory that a process has."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    model, directory, requests = [*sys.argv[1:], *DEFAULTS[len(sys.argv) - 1 :]]
    named = ["--model", model] if model != "demo" else []
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"M3_CACHE_DIR": cache}
        subprocess.run([M3, "warm", directory, *named, "--quiet"], env=environment, check=True)
        command = [M3, "serve", directory, *named, "--port", "0", "--quiet"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as server:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            try:
                with urllib.request.urlopen(f"{url}/models") as response:
                    name = json.load(response)["data"][0]["id"]
                chat(url, name, "Hello.", 1)  # behind the loading of the model
                first_token(directory, named, environment)
                clients(url, name)
                memory(server.pid, url, name, int(requests))
            finally:
                server.send_signal(signal.SIGTERM)


if __name__ == "__main__":
    main()
