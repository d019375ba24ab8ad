"""The formats that `m3 review` can write, by the names that people give."""

from __future__ import annotations

from typing import TYPE_CHECKING

from m3cli.report.review_github import github_lines
from m3cli.report.review_json import gitlab, rdjson, rdjsonl, review_object
from m3cli.report.review_markdown import markdown
from m3cli.report.review_sarif import sarif
from m3cli.report.review_text import json_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from m3cli.tasks.findings import Review

    Format = Callable[[Review], Iterable[bytes]]


def _lines(lines: Iterable[str]) -> Iterable[bytes]:
    return [f"{line}\n".encode() for line in lines]


# All in UTF-8, each for a whole file, and the same for the same review, but for `timings` in json.
FORMATS: dict[str, Format] = {
    "json": lambda review: [json_bytes(review_object(review))],
    "sarif": lambda review: [json_bytes(sarif(review))],
    "rdjson": lambda review: [json_bytes(rdjson(review))],
    "rdjsonl": lambda review: [json_bytes(diagnostic, indent=None) for diagnostic in rdjsonl(review)],
    "gitlab": lambda review: [json_bytes(gitlab(review))],
    "github": lambda review: _lines(github_lines(review)),
    "markdown": lambda review: [markdown(review).encode()],
}
