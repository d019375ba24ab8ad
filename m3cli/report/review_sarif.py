"""A review in SARIF 2.1.0, as GitHub's code scanning wants it.

Its limits and what it reads: https://docs.github.com/code-security/code-scanning ("SARIF support for code
scanning"). A file that is over a limit is rejected whole, so what does not fit is left out and counted.
"""

from __future__ import annotations

import zlib
from importlib.metadata import PackageNotFoundError, metadata
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from m3cli import __version__
from m3cli.corpus import names
from m3cli.report import review_text
from m3cli.report.review_json import whole_lines
from m3cli.report.review_text import by_severity, cut, json_bytes, readable
from m3cli.report.text import amount
from m3cli.tasks.findings import RULES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from m3cli.tasks.findings import Finding, Review, Rule

MAX_RESULTS = 25_000
MAX_BYTES = 9_500_000  # compressed; GitHub takes 10 MB
_MESSAGE = 1024  # characters
_CONTENT = 8192  # characters of a snippet or a replacement
_NOTIFICATIONS = 1000  # of a kind

_ROOT = "%SRCROOT%"
_LEVELS = {"info": "note", "warning": "warning", "error": "error"}
_PROBLEM_SEVERITIES = {"note": "recommendation", "warning": "warning", "error": "error"}
# What is typical of a rule, and tags that people filter by. Each result has its own level.
_FACETS = {
    "correctness": ("error", ("correctness", "reliability")),
    "security": ("error", ("security",)),
    "concurrency": ("error", ("concurrency", "reliability")),
    "resource": ("warning", ("reliability",)),
    "error-handling": ("warning", ("error-handling", "reliability")),
    "api-break": ("warning", ("compatibility",)),
    "performance": ("warning", ("performance",)),
    "test-gap": ("note", ("tests",)),
    "maintainability": ("note", ("maintainability",)),
}
# "Medium": GitHub has one score for all findings of a rule, the minor ones too.
_SECURITY_SEVERITY = "6.0"


def sarif(review: Review) -> dict[str, Any]:
    """One SARIF log with one run: the most severe findings first, as many as GitHub takes."""
    findings = by_severity(review.findings)
    kept = min(len(findings), MAX_RESULTS)
    log = _log(review, findings, kept)
    while kept and (nbytes := _compressed(log)) > MAX_BYTES:
        kept = min(kept - 1, kept * MAX_BYTES * 19 // (nbytes * 20))
        log = _log(review, findings, kept)
    return log


def _compressed(log: dict[str, Any]) -> int:
    data = json_bytes(log)
    return len(data) if len(data) <= MAX_BYTES else len(zlib.compress(data, 6))


def _log(review: Review, findings: Sequence[Finding], kept: int) -> dict[str, Any]:
    rules = list(RULES)
    driver = {"name": "m3", "version": __version__, "rules": [_rule(rule) for rule in RULES.values()]}
    if uri := _information_uri():
        driver["informationUri"] = uri
    run = {
        "tool": {"driver": driver},
        "invocations": [
            {
                "executionSuccessful": review.complete,
                "toolExecutionNotifications": _notifications(review, len(findings) - kept),
            }
        ],
        "originalUriBaseIds": {_ROOT: {"description": {"text": "The root of the repository."}}},
        "columnKind": "unicodeCodePoints",
        "results": [_result(finding, rules.index(finding.rule)) for finding in findings[:kept]],
        "properties": {
            "base": review.base,
            "head": review.head,
            "model": readable(review.model),
            "context": review.context,
        },
    }
    return {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [run]}


def _information_uri() -> str:
    try:
        urls = metadata("m3cli").get_all("Project-URL") or []
    except PackageNotFoundError:
        return ""
    links: dict[str, str] = dict(url.split(", ", 1) for url in urls if ", " in url)
    return links.get("Homepage", "")


def _rule(rule: Rule) -> dict[str, Any]:
    level, tags = _FACETS[rule.id]
    caution = "A language model found this: check it against the code."
    properties: dict[str, Any] = {
        "tags": list(tags),
        "precision": "medium",
        "problem.severity": _PROBLEM_SEVERITIES[level],
    }
    if "security" in tags:
        properties["security-severity"] = _SECURITY_SEVERITY
    return {
        "id": rule.id,
        "name": rule.name.title().replace(" ", ""),
        "shortDescription": {"text": rule.summary},
        "fullDescription": {"text": f"{rule.summary} {rule.help}"},
        "help": {
            "text": f"{rule.help} {caution}",
            "markdown": f"**{rule.name}.** {rule.summary}\n\n{rule.help}\n\n_{caution}_",
        },
        "defaultConfiguration": {"level": level},
        "properties": properties,
    }


def _result(finding: Finding, rule_index: int) -> dict[str, Any]:
    artifact = _artifact(finding.path)
    region: dict[str, Any] = {
        "startLine": finding.start_line,
        "startColumn": finding.start_column,
        "endLine": finding.end_line,
        "endColumn": finding.end_column,
    }
    snippet = _snippet(finding)
    if snippet is not None:
        region["snippet"] = {"text": snippet}
    result: dict[str, Any] = {
        "ruleId": finding.rule,
        "ruleIndex": rule_index,
        "level": _LEVELS[finding.severity],
        "message": {"text": _message(finding.message, _MESSAGE)},
        "locations": [{"physicalLocation": {"artifactLocation": artifact, "region": region}}],
        "partialFingerprints": {
            "primaryLocationLineHash": finding.line_hash,
            "m3/v1": finding.fingerprint,
        },
        "rank": round(finding.confidence * 100, 2),
    }
    if finding.replacement is not None and len(finding.replacement) <= _CONTENT:
        change = {"artifactLocation": artifact, "replacements": [_replacement(finding, finding.replacement)]}
        text = "Replace the lines by what the model suggests."
        result["fixes"] = [{"description": {"text": text}, "artifactChanges": [change]}]
    return result


def _artifact(path: str) -> dict[str, str]:
    try:
        uri = quote(path, safe="/", errors="surrogateescape")
    except UnicodeEncodeError:  # half a pair that is no byte of a file name either
        uri = quote(names.printable(path), safe="/")
    return {"uri": uri, "uriBaseId": _ROOT}


def _snippet(finding: Finding) -> str | None:
    """The text of the region exactly, or None where it is not known or too long."""
    lines = list(finding.lines)
    if len(lines) != finding.end_line - finding.start_line + 1:
        return None
    lines[-1] = lines[-1][: finding.end_column - 1]
    lines[0] = lines[0][finding.start_column - 1 :]
    text = "\n".join(lines)
    return text if len(text) <= _CONTENT else None


def _replacement(finding: Finding, text: str) -> dict[str, Any]:
    # A region without columns holds whole lines, but not the end of the last one.
    region = {"startLine": finding.start_line, "endLine": finding.end_line}
    if not text:
        region = {
            "startLine": finding.start_line,
            "startColumn": 1,
            "endLine": finding.end_line + 1,
            "endColumn": 1,
        }
    return {"deletedRegion": region, "insertedContent": {"text": whole_lines(text)}}


def _message(text: str, limit: int) -> str:
    # A bracket before a parenthesis would make a link (3.11.6), and the model's are not to be followed.
    return cut(readable(text).replace("](", "]\u200b("), limit)


def _notifications(review: Review, left_out: int) -> list[dict[str, Any]]:
    """What is not among the results, and why."""
    notes: list[tuple[str, str, str]] = []
    if not review.complete:
        notes.append(("error", review_text.INCOMPLETE, ""))
    if left_out:
        reason = "code scanning takes no more in one file"
        notes.append(("warning", f"Left out the {amount(left_out, 'least severe finding')}: {reason}.", ""))
    for unreviewed in review.unreviewed[:_NOTIFICATIONS]:
        text = f"{names.printable(unreviewed.path)} was not reviewed, or not all of it: {unreviewed.reason}."
        notes.append(("warning", text, unreviewed.path))
    if (more := len(review.unreviewed) - _NOTIFICATIONS) > 0:
        notes.append(("warning", f"{amount(more, 'more file')} were not reviewed.", ""))
    notes += [("warning", warning, "") for warning in review.warnings[:_NOTIFICATIONS]]
    if counts := review_text.dropped(review):
        notes.append(("note", f"Findings that did not stay: {counts}.", ""))
    return [
        {"level": level, "message": {"text": _message(text, _MESSAGE)}}
        | ({"locations": [{"physicalLocation": {"artifactLocation": _artifact(path)}}]} if path else {})
        for level, text, path in notes
    ]
