"""The formats of a review: each as its readers want it, whatever the findings hold."""

from __future__ import annotations

import json
import random
from dataclasses import fields, replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes, urlsplit

from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft4Validator, Draft202012Validator
from rich.console import Console

from m3cli.report import review_sarif
from m3cli.report.review_console import show_review
from m3cli.report.review_formats import FORMATS
from m3cli.report.review_json import review_schema
from m3cli.tasks.findings import RULES, Finding, Unreviewed
from tests.hostile_reviews import PIECES, finding, findings, lines, review, reviews

if TYPE_CHECKING:
    import pytest

    from m3cli.tasks.findings import Review

SCHEMAS = Path(__file__).parents[1] / "data" / "schemas"
SARIF = Draft4Validator(json.loads((SCHEMAS / "sarif-schema-2.1.0.json").read_bytes()))
RDF = json.loads((SCHEMAS / "rdf-diagnostic.schema.json").read_bytes())
DIAGNOSTIC = Draft202012Validator(RDF)
DIAGNOSTIC_RESULT = Draft202012Validator({**RDF, "$ref": "#/$defs/diagnosticResult"})
REVIEW = Draft202012Validator(review_schema())
# What a terminal acts on. JSON has none of it, and escapes the rest.
CONTROLS = {*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0)), "\u202e", "\u2066"} - {"\n", "\t"}


def written(name: str, value: Review) -> str:
    return b"".join(FORMATS[name](value)).decode()


def loaded(name: str, value: Review) -> Any:
    return json.loads(written(name, value))


def run_of(value: Review) -> Any:
    return loaded("sarif", value)["runs"][0]


def command(line: str) -> tuple[str, dict[str, str], str] | None:
    """A line as the runner of GitHub Actions takes it: name, properties and message of a command."""
    line = line.lstrip()
    if not line.startswith("::") or "::" not in line[2:]:
        return None
    head, data = line[2:].split("::", 1)
    name, _, listed = head.partition(" ")
    properties = dict(pair.split("=", 1) for pair in listed.strip().split(",") if "=" in pair)
    escapes = [("%0D", "\r"), ("%0A", "\n"), ("%25", "%")]

    def unescape(text: str, escapes: list[tuple[str, str]]) -> str:
        for escape, character in escapes:
            text = text.replace(escape, character)
        return text

    values = {k: unescape(v, [("%3A", ":"), ("%2C", ","), *escapes]) for k, v in properties.items()}
    return name, values, unescape(data, escapes)


@settings(max_examples=150)
@given(reviews())
def test_every_format_holds(value: Review) -> None:
    """Hostile texts of any kind: every format is UTF-8, parses, validates and has no control characters."""
    texts = {name: written(name, value) for name in FORMATS}
    assert not {name for name, text in texts.items() if CONTROLS & set(text)}
    REVIEW.validate(json.loads(texts["json"]))
    SARIF.validate(json.loads(texts["sarif"]))
    DIAGNOSTIC_RESULT.validate(json.loads(texts["rdjson"]))
    rows = texts["rdjsonl"].splitlines()
    for row in rows:
        DIAGNOSTIC.validate(json.loads(row))
    commands = texts["github"].splitlines()
    report = json.loads(texts["gitlab"])
    assert len(rows) == len(report) == len(value.findings)
    assert len({entry["fingerprint"] for entry in report}) == len(report)
    assert [parsed and parsed[0] for parsed in map(command, commands)] == [
        *(
            {"ERROR": "error", "WARNING": "warning", "INFO": "notice"}[json.loads(row)["severity"]]
            for row in rows
        ),
        None,
    ]


@settings(max_examples=50)
@given(reviews(), st.integers(0, 99), st.floats(0, 9000))
def test_formats_depend_on_nothing_else(value: Review, seed: int, seconds: float) -> None:
    """The order of the findings and the time change no byte, but for `timings` in the JSON object."""
    shuffled = list(value.findings)
    random.Random(seed).shuffle(shuffled)
    other = replace(value, findings=tuple(shuffled), seconds=seconds)
    for name in FORMATS.keys() - {"json"}:
        assert written(name, value) == written(name, other)
    first, second = loaded("json", value), loaded("json", other)
    assert second.pop("timings") == {"total": round(seconds, 4)}
    del first["timings"]
    assert first == second


def test_the_json_object_has_all_of_a_review() -> None:
    """Every field of a review and of a finding, with all of its text."""
    message = "long " * 10_000
    value = review(
        finding(message=message, replacement=None),
        unreviewed=(Unreviewed("a.bin", "it is binary"),),
        dropped={"refuted": 2},
        warnings=("careful",),
    )
    got = loaded("json", value)
    (first,) = got["findings"]
    assert first.keys() == {field.name for field in fields(Finding)}
    assert first["message"] == message
    assert first["frame"][1] == {"line": 11, "text": "    query = text + name"}
    assert got["counts"] == {"error": 1, "warning": 0, "info": 0}
    assert got["unreviewed"] == [{"path": "a.bin", "reason": "it is binary"}]
    assert got["usage"] == {
        "prompt_tokens": 1000,
        "restored_tokens": 0,
        "generated_tokens": 200,
        "staleness": 0.0,
    }
    assert got["timings"] == {"total": 12.5}


def test_the_schema_knows_the_rules() -> None:
    """And no others."""
    assert review_schema()["$defs"]["finding"]["properties"]["rule"]["enum"] == list(RULES)


# SARIF


def test_sarif_describes_every_rule() -> None:
    """All that code scanning shows or filters by, for all rules, found or not, within its lengths."""
    driver = run_of(review())["tool"]["driver"]
    assert driver["name"] == "m3"
    assert [rule["id"] for rule in driver["rules"]] == list(RULES)
    for rule in driver["rules"]:
        assert len(rule["shortDescription"]["text"]) <= len(rule["fullDescription"]["text"]) <= 1024
        assert rule["help"]["text"]
        assert rule["help"]["markdown"]
        assert rule["defaultConfiguration"]["level"] in ("note", "warning", "error")
        properties = rule["properties"]
        assert properties["problem.severity"] in ("recommendation", "warning", "error")
        assert properties["precision"] == "medium"
        assert 0 < len(properties["tags"]) <= 10
        assert ("security-severity" in properties) == (rule["id"] == "security")


def test_a_sarif_result_says_what_and_where() -> None:
    """Rule, level, region with its text, fingerprints, and the suggestion in place of the whole lines."""
    run = run_of(review(finding()))
    (result,) = run["results"]
    assert run["columnKind"] == "unicodeCodePoints"
    assert list(RULES)[result["ruleIndex"]] == result["ruleId"] == "security"
    assert result["level"] == "error"
    assert result["locations"] == [
        {
            "physicalLocation": {
                "artifactLocation": {"uri": "src/db.py", "uriBaseId": "%SRCROOT%"},
                "region": {
                    "startLine": 11,
                    "startColumn": 5,
                    "endLine": 12,
                    "endColumn": 9,
                    "snippet": {"text": "query = text + name\n    go()"},
                },
            }
        }
    ]
    assert result["partialFingerprints"] == {
        "primaryLocationLineHash": "39fa2ee980eb94b0:1",
        "m3/v1": "f0" * 16,
    }
    assert result["fixes"][0]["artifactChanges"][0]["replacements"] == [
        {
            "deletedRegion": {"startLine": 11, "endLine": 12},
            "insertedContent": {"text": "    query = text\n    go(name)"},
        }
    ]
    assert "codeFlows" not in result
    assert "versionControlProvenance" not in run


def test_sarif_levels() -> None:
    """What m3 calls info is a note."""
    levels = {"info": "note", "warning": "warning", "error": "error"}
    for severity, level in levels.items():
        assert run_of(review(finding(severity=severity)))["results"][0]["level"] == level


def test_a_removal_takes_the_line_ends_along() -> None:
    """An empty replacement leaves no empty line."""
    result = run_of(review(finding(replacement="")))["results"][0]
    assert result["fixes"][0]["artifactChanges"][0]["replacements"] == [
        {
            "deletedRegion": {"startLine": 11, "startColumn": 1, "endLine": 13, "endColumn": 1},
            "insertedContent": {"text": ""},
        }
    ]


def uri_of(path: str) -> str:
    location = run_of(review(finding(path=path)))["results"][0]["locations"][0]
    uri: str = location["physicalLocation"]["artifactLocation"]["uri"]
    return uri


@given(st.lists(st.sampled_from([*PIECES, "\ud801"]) | st.text(max_size=5), min_size=1).map("".join))
def test_sarif_uris_are_relative(text: str) -> None:
    """No path is taken for a scheme, a host, a query or a fragment."""
    parts = urlsplit(uri_of("a" + text))
    assert (parts.scheme, parts.netloc, parts.query, parts.fragment) == ("", "", "", "")
    assert urlsplit(uri_of("file:" + text)).scheme == ""


@given(st.binary(min_size=1))
def test_sarif_uris_lead_back_to_the_path(name: bytes) -> None:
    """Byte for byte, as file names are bytes on most systems."""
    uri = uri_of(name.decode("utf-8", "surrogateescape"))
    assert uri.isascii()
    assert unquote_to_bytes(uri) == name


@given(findings())
def test_a_sarif_snippet_is_the_text_of_its_region(value: Finding) -> None:
    """Where the lines are known and not too long; then the columns cut them exactly."""
    region = run_of(review(value))["results"][0]["locations"][0]["physicalLocation"]["region"]
    if not value.frame:
        assert "snippet" not in region
        return
    text = "\n".join(value.lines)
    last = len(value.lines[-1]) - value.end_column + 1
    expected = text[value.start_column - 1 : len(text) - last]
    if len(expected) <= 8192:
        assert region["snippet"]["text"] == expected.encode("utf-8", "replace").decode()
    else:
        assert "snippet" not in region


def test_sarif_says_what_was_not_reviewed() -> None:
    """Files, caps, warnings and findings that did not stay are notifications of the run."""
    value = review(
        unreviewed=(Unreviewed("a b.bin", "it is binary"),),
        dropped={"baseline": 3, "unverified": 2, "excess": 0},
        warnings=("The model is small.",),
        complete=False,
    )
    (invocation,) = run_of(value)["invocations"]
    assert invocation["executionSuccessful"] is False
    notes = [(note["level"], note["message"]["text"]) for note in invocation["toolExecutionNotifications"]]
    assert notes == [
        ("error", "The review is not complete: a cap on time or tokens ended it."),
        ("warning", "a b.bin was not reviewed, or not all of it: it is binary."),
        ("warning", "The model is small."),
        ("note", "Findings that did not stay: 2 not verified, 3 known before."),
    ]
    location = invocation["toolExecutionNotifications"][1]["locations"][0]["physicalLocation"]
    assert location["artifactLocation"]["uri"] == "a%20b.bin"


def test_sarif_holds_no_more_results_than_code_scanning_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of too many findings the least severe are left out, and their number is told."""
    monkeypatch.setattr(review_sarif, "MAX_RESULTS", 100)
    many = [finding(severity="info", fingerprint=f"{i:032x}") for i in range(100)]
    severe = [finding(severity="error", fingerprint=f"e{i:031x}") for i in range(7)]
    run = run_of(review(*many, *severe))
    assert [result["level"] for result in run["results"]] == ["error"] * 7 + ["note"] * 93
    (note,) = run["invocations"][0]["toolExecutionNotifications"]
    assert note["message"]["text"].startswith("Left out the 7 least severe findings")


def test_sarif_fits_when_it_is_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Findings are left out until the file is small enough, not more than a few too many."""
    monkeypatch.setattr(review_sarif, "MAX_BYTES", 100_000)
    rng = random.Random(1)
    many = [finding(message=rng.randbytes(300).hex(), fingerprint=f"{i:032x}") for i in range(500)]
    log = review_sarif.sarif(review(*many))
    kept = len(log["runs"][0]["results"])
    assert 80_000 < review_sarif._compressed(log) <= 100_000
    (note,) = log["runs"][0]["invocations"][0]["toolExecutionNotifications"]
    assert note["message"]["text"].startswith(f"Left out the {500 - kept} least severe findings")


def test_sarif_messages_make_no_links() -> None:
    """Brackets before a parenthesis are a link in SARIF; the message stays as it looks."""
    text = run_of(review(finding(message=r"see [x](https://e.com) and [y\](https://e.com)")))["results"][0]
    assert "](" not in text["message"]["text"]
    assert text["message"]["text"].replace("\u200b", "") == r"see [x](https://e.com) and [y\](https://e.com)"


def test_long_messages_are_cut_and_say_so() -> None:
    """In every format that others show, with the length that they had."""
    value = review(finding(message="x" * 100_000))
    for name, limit in (("sarif", 1024), ("rdjson", 4000), ("gitlab", 4000), ("github", 2000)):
        text = written(name, value)
        assert "xxx… (cut, 100,000 characters in all)" in text
        assert text.count("xxxxxxxxxx") == (limit - len("… (cut, 100,000 characters in all)")) // 10


# reviewdog and GitLab


def test_a_diagnostic_counts_bytes() -> None:
    """Columns are those of UTF-8; a suggestion replaces whole lines."""
    line = "é漢𐐀x = 1"
    value = finding(
        start_line=3, end_line=3, start_column=4, end_column=9, frame=((3, line),), replacement="x = 2\n"
    )
    assert loaded("rdjson", review(value)) == {
        "source": {"name": "m3"},
        "diagnostics": [
            {
                "message": value.message,
                "location": {
                    "path": "src/db.py",
                    "range": {"start": {"line": 3, "column": 10}, "end": {"line": 3, "column": 15}},
                },
                "severity": "ERROR",
                "code": {"value": "security"},
                "suggestions": [{"range": {"start": {"line": 3}, "end": {"line": 3}}, "text": "x = 2"}],
            }
        ],
    }
    (row,) = written("rdjsonl", review(value)).splitlines()
    assert json.loads(row)["source"] == {"name": "m3"}


@given(lines(), st.data())
def test_byte_columns_cut_the_bytes_of_the_file(line: str, data: st.DataObject) -> None:
    """Cut at the byte columns, the bytes of a line are those of the characters between."""
    line = line.replace("\ud800", "")
    start = data.draw(st.integers(1, len(line) + 1))
    end = data.draw(st.integers(start, len(line) + 1))
    value = finding(start_line=1, end_line=1, start_column=start, end_column=end, frame=((1, line),))
    place = loaded("rdjson", review(value))["diagnostics"][0]["location"]["range"]
    try:
        raw = line.encode("utf-8", "surrogateescape")
        expected = line[start - 1 : end - 1].encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # halves of pairs, which no file can hold
        return
    assert raw[place["start"]["column"] - 1 : place["end"]["column"] - 1] == expected


def test_a_diagnostic_without_its_lines_has_no_columns() -> None:
    """A column that cannot be counted in bytes is left out rather than guessed."""
    location = loaded("rdjson", review(finding(frame=())))["diagnostics"][0]["location"]
    assert location["range"] == {"start": {"line": 11}, "end": {"line": 12}}


def test_diagnostics_mention_nobody() -> None:
    """Messages are posted as Markdown: what would be live in it is not, and looks the same."""
    message = "@octocat &#64;octocat #12 GH-12 [x](https://e.com) <img src=x> ```\n![y](z)"
    got = loaded("rdjson", review(finding(message=message)))["diagnostics"][0]["message"]
    for live in ("@o", "&#", "#1", "GH-1", "](", "://", "<i", "```", "[!"):
        assert live not in got
    assert got.replace("\u200b", "") == message


def test_gitlab_gets_the_fields_that_it_documents() -> None:
    """Description, check, fingerprint, severity, path and first line, and nothing else."""
    value = review(
        finding(), finding(severity="warning", fingerprint="1"), finding(severity="info", fingerprint="2")
    )
    report = loaded("gitlab", value)
    assert report[0] == {
        "description": finding().message,
        "check_name": "security",
        "fingerprint": "f0" * 16,
        "severity": "major",
        "location": {"path": "src/db.py", "lines": {"begin": 11}},
    }
    assert [entry["severity"] for entry in report] == ["major", "minor", "info"]


def test_reviews_without_findings_are_empty_reports() -> None:
    """Which is what takes an old finding away."""
    assert loaded("gitlab", review()) == []
    assert loaded("rdjson", review()) == {"source": {"name": "m3"}, "diagnostics": []}
    assert written("rdjsonl", review()) == ""
    assert written("github", review()) == "m3 found nothing in 2 files.\n"


# GitHub Actions


def test_a_workflow_command_is_exact() -> None:
    """Byte for byte, with what has to be escaped in properties and in the message."""
    value = finding(path="a,b:c%.py", message="50% is\nwrong: really, ::error::")
    assert written("github", review(value)).splitlines()[0] == (
        "::error file=a%2Cb%3Ac%25.py,line=11,endLine=12,title=m3%3A Security"
        "::50%25 is%0Awrong: really, ::error::"
    )


@given(findings())
def test_the_runner_reads_back_what_was_meant(value: Finding) -> None:
    """No message and no path makes another command, another property or another line."""
    first, last = written("github", review(value)).splitlines()
    parsed = command(first)
    assert parsed is not None
    _, properties, message = parsed
    assert properties.keys() == {"file", "line", "endLine", "title"}
    assert properties["line"] == str(value.start_line)
    assert properties["endLine"] == str(value.end_line)
    if value.path.isascii() and value.path.isprintable() and value.path == value.path.strip():
        assert properties["file"] == value.path
    if value.message.isascii() and value.message.isprintable() and len(value.message) <= 2000:
        assert message == value.message
    assert command(last) is None
    assert "##[" not in last


def test_annotations_end_where_github_would_drop_them() -> None:
    """Ten of each kind, the most severe first, and a last line that says what is not shown."""
    value = review(
        *(finding(severity="warning", fingerprint=f"w{i}") for i in range(12)),
        *(finding(severity="error", fingerprint=f"e{i}") for i in range(11)),
        finding(severity="info"),
        unreviewed=(Unreviewed("x", "too large"),),
        dropped={"refuted": 2},
    )
    *commands, last = written("github", value).splitlines()
    kinds = [line.split(" ")[0] for line in commands]
    assert kinds == ["::error"] * 10 + ["::warning"] * 10 + ["::notice"]
    assert last == (
        "m3 found 11 errors, 12 warnings, 1 remark in 2 files. Not shown as annotations, as GitHub takes 10 "
        "of a kind: 1 error, 2 warnings. Not reviewed: 1 file. Left out: 2 findings."
    )


# The terminal


def shown(value: Review, **options: Any) -> str:
    out = StringIO()
    show_review(value, Console(file=out, highlight=False, width=80, **options))
    return out.getvalue()


def test_a_person_sees_the_code_with_its_lines_marked() -> None:
    """Place, message, code, suggestion and a summary."""
    value = review(
        finding(), unreviewed=(Unreviewed("a.bin", "it is binary"),), dropped={"refuted": 1}, complete=False
    )
    assert shown(value) == (
        "error[security] src/db.py:11-12\n"
        "  | The name is put into the text of the query. `execute` takes it as a parameter.\n"
        "  10 | def find(name):\n"
        "> 11 |     query = text + name\n"
        "> 12 |     go()\n"
        "  13 | \n"
        "suggestion:\n"
        "  +     query = text\n"
        "  +     go(name)\n"
        "\n"
        "not reviewed: a.bin: it is binary\n"
        "findings that did not stay: 1 refuted by the second look\n"
        "m3 found 1 error in 2 files. The review is not complete: a cap on time or tokens ended it.\n"
    )


def test_a_long_line_is_shown_around_the_place() -> None:
    """Of a line of a minified file, the part that the finding is about."""
    line = "a" * 50_000 + "HERE" + "b" * 50_000
    value = finding(start_line=1, end_line=1, start_column=50_001, end_column=50_005, frame=((1, line),))
    (code,) = [row for row in shown(review(value)).splitlines() if row.startswith("> 1 | ")]
    assert "aHEREb" in code
    assert len(code) < 220


@settings(max_examples=100)
@given(reviews())
def test_no_finding_drives_the_terminal_or_the_log(value: Review) -> None:
    """No control characters, and no line that a build's log would take for a command."""
    text = shown(value)
    text.encode()
    assert not CONTROLS & set(text)
    assert "##[" not in text
    assert "##vso[" not in text
    assert not [row for row in text.splitlines() if row.lstrip().startswith("::")]
