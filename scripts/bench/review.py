"""How well a model reviews: precision, recall and noise over the seeded bugs of tests/data/review.

python scripts/bench/review.py [--model PATH] [--mode diff|related|repo ...] [--every N] [--no-check]

Each case is a git repository with the correct code and a commit that brings in one bug among harmless
edits, or none. A finding that overlaps the lines of the bug is a hit. Printed for each context mode:

recall      bugs with a hit
precision   hits among all findings in the changes with a bug
line        hits among the findings that are within three lines of the bug
clean       findings for each clean change, and how many of these have none
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from m3cli.corpus.corpus import CorpusRequest
from m3cli.corpus.reviewed import ChangesRequest, read_changes
from m3cli.engine.local import LocalEngine
from m3cli.errors import DoesNotFitError
from m3cli.model.catalog import resolve
from m3cli.tasks.context import Caching, ContextRequest
from m3cli.tasks.findings import Review
from m3cli.tasks.review import ReviewRequest, review
from tests.review_cases import load_cases, make_case_repository

if TYPE_CHECKING:
    from collections.abc import Iterator

    from m3cli.engine.events import CacheConfig, EngineConfig, Event, Request
    from m3cli.tasks.review_groups import Mode
    from tests.review_cases import Case

_NEAR = 3  # lines


class Kept:
    """One engine for all cases: the model is loaded once, with a context that all of them fit."""

    def __init__(self, n_ctx: int, state_dir: Path) -> None:
        self._n_ctx, self._state_dir = n_ctx, state_dir
        self._engine: LocalEngine | None = None

    def open(self, config: EngineConfig, cache: CacheConfig | None) -> Kept:
        """Open it the first time."""
        if self._engine is None:
            self._engine = LocalEngine(
                replace(config, n_ctx=self._n_ctx), state_dir=self._state_dir, cache=cache
            )
        return self

    def generate(self, request: Request) -> Iterator[Event]:
        """See Engine."""
        assert self._engine is not None
        return self._engine.generate(request)

    def close(self) -> None:
        """Stay open for the next case."""

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def end(self) -> None:
        """Close it."""
        if self._engine is not None:
            self._engine.close()


@dataclass
class Score:
    """Counts over the cases of one mode."""

    bugs: int = 0
    found: int = 0
    hits: int = 0
    near: int = 0
    findings: int = 0
    clean: int = 0
    noise: int = 0
    silent: int = 0

    def add(self, case: Case, result: Review) -> None:
        """Count one review."""
        if case.clean:
            self.clean += 1
            self.noise += len(result.findings)
            self.silent += not result.findings
            return
        hits = near = 0
        for finding in result.findings:
            lines = range(finding.start_line, finding.end_line + 1)
            hits += bool(case.lines.intersection(lines))
            near += any(abs(line - other) <= _NEAR for line in lines for other in case.lines)
        self.bugs += 1
        self.found += hits > 0
        self.hits += hits
        self.near += near
        self.findings += len(result.findings)

    def __str__(self) -> str:
        return (
            f"recall {_share(self.found, self.bugs)}  precision {_share(self.hits, self.findings)}  "
            f"line {_share(self.hits, self.near)}  "
            f"clean {self.noise / max(self.clean, 1):.2f} each, {_share(self.silent, self.clean)} with none"
        )


def _share(part: int, whole: int) -> str:
    return f"{part / whole:4.0%} ({part}/{whole})" if whole else "   - (0/0)"


def reviewed(case: Case, mode: Mode, model: str | None, check: bool, engine: Kept, ctx: int) -> Review:
    """The review of one case."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "repository"
        base, head = make_case_repository(directory, case)
        changes = read_changes(ChangesRequest(str(directory), base, head))
        corpus = CorpusRequest((str(directory),), order="auto")
        context = ContextRequest(
            corpus, resolve(model, {}), ctx=ctx, max_tokens=1024, caching=Caching(Path(name) / "cache")
        )
        request = ReviewRequest(changes, context, mode, check)
        for event in review(request, open_engine=engine.open, stdin=lambda: b""):
            if isinstance(event, Review):
                return event
    raise AssertionError


def main() -> None:
    """Review the cases in each mode and print the scores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--mode", action="append", choices=["diff", "related", "repo"])
    parser.add_argument("--every", type=int, default=1, help="take every Nth case")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--ctx", type=int, default=8192)
    arguments = parser.parse_args()
    cases = load_cases()[:: arguments.every]
    with ExitStack() as stack:
        state = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engine = Kept(arguments.ctx, state)
        stack.callback(engine.end)
        for mode in arguments.mode or ["diff", "related", "repo"]:
            score = Score()
            started = time.monotonic()
            unverified = refuted = too_large = 0
            for case in cases:
                try:
                    result = reviewed(
                        case, mode, arguments.model, not arguments.no_check, engine, arguments.ctx
                    )
                except DoesNotFitError:  # the repository, into this context
                    too_large += 1
                    continue
                score.add(case, result)
                unverified += result.dropped.get("unverified", 0)
                refuted += result.dropped.get("refuted", 0)
            print(
                f"{mode:8} {score}  dropped: {unverified} unverified, {refuted} refuted  "
                f"{too_large} did not fit  {(time.monotonic() - started) / len(cases):.1f} s a change",
                flush=True,
            )


if __name__ == "__main__":
    main()
