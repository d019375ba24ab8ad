"""A review as JSON: m3's own object, reviewdog's diagnostics, and GitLab's Code Quality report."""

from __future__ import annotations

import json
from importlib import resources
from typing import TYPE_CHECKING, Any

from m3cli.report.review_text import by_severity, cut, encodable, readable, severity_counts, unlinked

if TYPE_CHECKING:
    from m3cli.tasks.findings import Finding, Review

_MESSAGE = 4000  # characters, in formats that others show
_RDF_SEVERITIES = {"info": "INFO", "warning": "WARNING", "error": "ERROR"}
_GITLAB_SEVERITIES = {"info": "info", "warning": "minor", "error": "major"}


def review_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the object that `m3 review --json` prints."""
    text = resources.files("m3cli.report").joinpath("review.schema.json").read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def review_object(review: Review) -> dict[str, Any]:
    """`review` in plain values, with all of every text."""
    return {
        "findings": [_finding_object(finding) for finding in by_severity(review.findings)],
        "counts": severity_counts(review.findings),
        "files": [encodable(path) for path in review.files],
        "unreviewed": [{"path": encodable(u.path), "reason": u.reason} for u in review.unreviewed],
        "dropped": dict(sorted(review.dropped.items())),
        "base": review.base,
        "head": review.head,
        "model": review.model,
        "context": review.context,
        "complete": review.complete,
        "usage": {
            "prompt_tokens": review.prompt_tokens,
            "restored_tokens": review.restored_tokens,
            "generated_tokens": review.generated_tokens,
            "staleness": round(review.staleness, 4),
        },
        "timings": {"total": round(review.seconds, 4)},
        "warnings": list(review.warnings),
    }


def rdjson(review: Review) -> dict[str, Any]:
    """A DiagnosticResult of the Reviewdog Diagnostic Format: columns in bytes of UTF-8, ends excluded."""
    diagnostics = [_diagnostic(finding) for finding in by_severity(review.findings)]
    return {"source": {"name": "m3"}, "diagnostics": diagnostics}


def rdjsonl(review: Review) -> list[dict[str, Any]]:
    """The same as a Diagnostic a line, each with its source."""
    return [{**_diagnostic(finding), "source": {"name": "m3"}} for finding in by_severity(review.findings)]


def gitlab(review: Review) -> list[dict[str, Any]]:
    """A GitLab Code Quality report: https://docs.gitlab.com/ci/testing/code_quality/."""
    return [
        {
            "description": cut(readable(finding.message), _MESSAGE),
            "check_name": finding.rule,
            "fingerprint": finding.fingerprint,
            "severity": _GITLAB_SEVERITIES[finding.severity],
            "location": {"path": encodable(finding.path), "lines": {"begin": finding.start_line}},
        }
        for finding in by_severity(review.findings)
    ]


def whole_lines(replacement: str) -> str:
    """`replacement` without the end of its last line, as formats want it that replace whole lines."""
    return replacement.removesuffix("\n").removesuffix("\r")


def _finding_object(finding: Finding) -> dict[str, Any]:
    return {
        "rule": finding.rule,
        "severity": finding.severity,
        "confidence": round(finding.confidence, 4),
        "path": encodable(finding.path),
        "start_line": finding.start_line,
        "end_line": finding.end_line,
        "start_column": finding.start_column,
        "end_column": finding.end_column,
        "message": finding.message,
        "replacement": finding.replacement,
        "fingerprint": finding.fingerprint,
        "line_hash": finding.line_hash,
        "frame": [{"line": number, "text": text} for number, text in finding.frame],
    }


def _diagnostic(finding: Finding) -> dict[str, Any]:
    diagnostic: dict[str, Any] = {
        # reviewdog posts it as Markdown.
        "message": unlinked(cut(readable(finding.message), _MESSAGE)),
        "location": {"path": encodable(finding.path), "range": _range(finding)},
        "severity": _RDF_SEVERITIES[finding.severity],
        "code": {"value": finding.rule},
    }
    if finding.replacement is not None:
        # Without columns, whole lines are meant.
        lines = {"start": {"line": finding.start_line}, "end": {"line": finding.end_line}}
        diagnostic["suggestions"] = [{"range": lines, "text": whole_lines(finding.replacement)}]
    return diagnostic


def _range(finding: Finding) -> dict[str, Any]:
    start: dict[str, int] = {"line": finding.start_line}
    end: dict[str, int] = {"line": finding.end_line}
    lines = dict(finding.frame)
    if finding.start_line in lines and finding.end_line in lines:
        start["column"] = _byte_column(lines[finding.start_line], finding.start_column)
        end["column"] = _byte_column(lines[finding.end_line], finding.end_column)
    return {"start": start, "end": end}


def _byte_column(line: str, column: int) -> int:
    # A lone surrogate stands for one byte that was not UTF-8, and `?` is one byte.
    return len(line[: column - 1].encode("utf-8", "replace")) + 1
