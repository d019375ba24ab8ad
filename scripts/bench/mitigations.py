"""Accuracy of what m3 does about long contexts, on questions about a real third-party package.

Runs `m3 eval --compare` over the source of an installed package (default: bm25s) and prints for each mode the
share of right answers with its Wilson interval, and the tokens and seconds that a question took. The whole
corpus is prefilled once for all questions; a selection or a sweep for each.
usage: python scripts/bench/mitigations.py [MODEL [PACKAGE [LENGTH [SAMPLES [MODES]]]]]
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from m3cli.tasks.evaluate.results import Score

M3 = str(Path(sys.executable).with_name("m3"))
DEFAULTS = ("", "bm25s", "8k", "3", "whole,recap,select,sweep")


def main() -> None:
    model, package, length, samples, modes = [*sys.argv[1:], *DEFAULTS[len(sys.argv) - 1 :]]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"There is no installed package {package}.")
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory, package)
        shutil.copytree(
            spec.submodule_search_locations[0], tree, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
        command = [M3, "eval", str(tree), "--tasks", "code", "--lengths", length, "--samples", samples]
        command += ["--compare", modes, "--json", *(["--model", model] if model else [])]
        environment = os.environ | {"M3_CACHE_DIR": os.environ.get("M3_BENCH_CACHE", f"{directory}/cache")}
        done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=False)
        if done.returncode:
            sys.exit(done.returncode)
    result = json.loads(done.stdout)
    print(
        f"{result['model']['name']} on {package}, {length} tokens, "
        f"{len(result['runs'][0]['outcomes'])} questions\n"
    )
    print("| mode | right | 95 % interval | tokens read | of them computed | seconds |")
    print("|---|---|---|---|---|---|")
    for run in result["runs"]:
        if not run["outcomes"]:
            continue
        total: defaultdict[str, float] = defaultdict(float)
        for outcome in run["outcomes"]:
            for name in ("prompt_tokens", "restored_tokens", "seconds"):
                total[name] += outcome[name]
        score = Score.of(outcome["score"] for outcome in run["outcomes"])
        per = {name: value / score.count for name, value in total.items()}
        computed = per["prompt_tokens"] - per["restored_tokens"]
        print(
            f"| {run['mode']} | {score.mean:.0%} | {score.low:.0%}–{score.high:.0%} "
            f"| {per['prompt_tokens']:,.0f} | {computed:,.0f} | {per['seconds']:.1f} |"
        )


if __name__ == "__main__":
    main()
