"""From claims to findings: where they are, which are the same, and which nobody wants."""

from __future__ import annotations

import difflib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3cli.corpus.patch import FileChange, Hunk
from m3cli.errors import UsageError
from m3cli.tasks.findings import RULES, Finding
from m3cli.tasks.line_hash import line_hashes
from m3cli.tasks.review_check import PathRule, Sieve, Wanted, baseline_bytes, located, read_baseline
from m3cli.tasks.review_prompt import Claim, claims_schema, is_refuted, read_claims

if TYPE_CHECKING:
    from pathlib import Path

BASE = "def total(items):\n    return sum(items)\n\n\ndef first(items):\n    return items[0]\n"
HEAD = (
    "def total(items):\n    result = 0\n    for item in items:\n        result = item\n    return result\n"
    "\n\ndef first(items):\n    return items[0]\n\n\ndef last(items):\n    return items[len(items)]\n"
)


def change_of(base: str, head: str, path: str = "a.py") -> FileChange:
    """The change from one text to another, as a parsed diff has it."""
    before, after = base.splitlines(), head.splitlines()
    hunks = []
    for group in difflib.SequenceMatcher(None, before, after).get_grouped_opcodes(3):
        lines: list[str] = []
        for tag, i1, i2, j1, j2 in group:
            if tag == "equal":
                lines += [f" {line}" for line in before[i1:i2]]
                continue
            lines += [f"-{line}" for line in before[i1:i2]] + [f"+{line}" for line in after[j1:j2]]
        first, last = group[0], group[-1]
        old, new = last[2] - first[1], last[4] - first[3]
        hunks.append(Hunk(first[1] + (old > 0), old, first[3] + (new > 0), new, tuple(lines)))
    return FileChange(path, path, "modified", tuple(hunks), base, head, "")


CHANGE = change_of(BASE, HEAD)
LINES = CHANGE.head_lines()


def claim(quote: str, **more: Any) -> Claim:
    """A claim about the change."""
    given = Claim("a.py", quote, "It is wrong.", "correctness", "error", 0.9, None)
    return replace(given, **more)


def found(quote: str, **more: Any) -> Finding:
    """The finding that a claim is."""
    finding = located(claim(quote, **more), CHANGE, LINES)
    assert finding is not None
    return finding


def test_the_place_comes_from_the_quote() -> None:
    """Lines and columns are those of the text, whatever white space the model leaves at the ends."""
    part = found("result = item")
    assert (part.start_line, part.end_line, part.start_column, part.end_column) == (4, 4, 9, 22)
    assert part.lines == ("        result = item",)
    assert part.line_hash == line_hashes(HEAD)[3]
    assert found("4:         result = item") == part
    assert found("+        result = item") == part
    several = found("for item in items:\nresult = item")
    assert (several.start_line, several.end_line, several.start_column, several.end_column) == (3, 4, 5, 22)
    assert [number for number, _ in several.frame] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    "quote",
    [
        "result = items",
        "return sum(items)",
        "}",
        "142: }",
        "142:",
        "",
        "\n\n",
        "for item in items:\nreturn result",
    ],
)
def test_what_is_not_there_is_no_finding(quote: str) -> None:
    """Not invented, not of the old version, not a brace, not lines that do not follow each other."""
    assert located(claim(quote), CHANGE, LINES) is None


def test_only_changed_hunks_count() -> None:
    """The same words far from the change are not what was changed; new lines go before old ones."""
    far = change_of(
        "start = 1\n" + "pad = 0\n" * 40 + "x = 1\n", "start = 1\n" + "pad = 0\n" * 40 + "x = 2\n"
    )
    assert located(claim("start = 1"), far, far.head_lines()) is None
    assert located(claim("pad = 0"), far, far.head_lines()) is None
    gone = change_of("pad = 0\n" * 3 + "close()\nreturn value\n", "pad = 0\n" * 3 + "return value\n")
    beside = located(claim("return value"), gone, gone.head_lines())
    assert beside is not None
    assert beside.start_line == 4
    twice = change_of("call(a)\nb\nc\n", "call(a)\nb\ncall(a)\n")
    new = located(claim("call(a)"), twice, twice.head_lines())
    assert new is not None
    assert new.start_line == 3


@given(
    st.lists(st.sampled_from(["a = f(x)", "  b += 1", "}", "", "return a", "é = 1"]), max_size=12), st.data()
)
def test_every_new_line_can_be_pointed_at(lines: list[str], data: st.DataObject) -> None:
    """A quote of a changed line is found at a changed line with this text."""
    added = data.draw(st.lists(st.sampled_from(["new_call(1)", "    other = 2"]), min_size=1, max_size=4))
    place = data.draw(st.integers(0, len(lines)))
    head = "\n".join([*lines[:place], *added, *lines[place:]]) + "\n"
    change = change_of("\n".join(lines) + "\n", head)
    wanted = data.draw(st.sampled_from(added))
    finding = located(claim(wanted), change, change.head_lines())
    assert finding is not None
    assert finding.start_line in change.added
    assert finding.lines[0].strip() == wanted.strip()


def test_a_replacement_is_of_whole_lines() -> None:
    """The indentation of the place is kept, for each line."""
    assert found("result = item", replacement="result += item").replacement == "        result += item"
    several = found("items[len(items)]", replacement="if items:\n    return items[-1]").replacement
    assert several == "    if items:\n        return items[-1]"
    indented = found("items[len(items)]", replacement="    return items[-1]")
    assert indented.replacement == "    return items[-1]"
    assert found("result = item", replacement="result = item").replacement is None
    assert found("result = item", replacement=" \n").replacement is None


def test_the_same_is_said_once() -> None:
    """Overlapping lines and one rule, or one message: a duplicate. Another problem at the place is none."""
    sieve = Sieve(Wanted())
    for quote, more in (
        ("result = item", {}),
        ("for item in items:\nresult = item", {}),
        ("result = item", {"rule": "security"}),
        ("result = item", {"rule": "performance", "message": "Slow."}),
        ("items[len(items)]", {}),
        ("nowhere to be seen", {}),
    ):
        finding = sieve.take(claim(quote, **more), CHANGE, LINES)
        if finding is not None:
            sieve.keep(finding)
    assert [(finding.start_line, finding.rule) for finding in sieve.findings()[0]] == [
        (4, "correctness"),
        (4, "performance"),
        (13, "correctness"),
    ]
    assert sieve.dropped == {"duplicate": 2, "unverified": 1}


def kept(wanted: Wanted, *claims: Claim, change: FileChange = CHANGE) -> tuple[list[Finding], dict[str, int]]:
    """What of some claims is reported, and how many are not, by reason."""
    sieve = Sieve(wanted)
    for each in claims:
        if finding := sieve.take(each, change, change.head_lines()):
            sieve.keep(finding)
    return list(sieve.findings()[0]), dict(sieve.dropped)


def test_only_what_is_wanted() -> None:
    """Severity, paths and rules, a number: each says what it took away; the most severe stay."""
    claims = (
        claim("result = item", severity="info"),
        claim("items[len(items)]", severity="error"),
        claim("return result", severity="warning", rule="performance"),
    )
    every, _ = kept(Wanted(), *claims)
    assert [finding.severity for finding in every] == ["error", "warning", "info"]
    assert kept(Wanted(min_severity="warning"), *claims)[1] == {"severity": 1}
    assert kept(Wanted(max_findings=1), *claims)[0] == every[:1]
    assert kept(Wanted(max_findings=1), *claims)[1] == {"excess": 2}
    assert kept(Wanted(ignore=(PathRule.parse("*.py:performance"),)), *claims)[1] == {"ignored": 1}
    assert kept(Wanted(ignore=(PathRule.parse("tests/"),)), *claims)[1] == {}
    assert kept(Wanted(ignore=(PathRule.parse("*.py"),)), *claims)[1] == {"ignored": 3}
    for text, words in (("*.py:style", "style"), ("!", "no pattern"), ("a:b/*.py", "")):
        if words:
            with pytest.raises(UsageError, match=words):
                PathRule.parse(text)
        else:
            assert PathRule.parse(text).pattern == text


@pytest.mark.parametrize(
    ("comment", "is_ignored"),
    [
        ("# m3: ignore[correctness] the caller checks it", True),
        ("// m3: ignore[security, correctness] looked at in July */", True),
        ("# m3: ignore[*] generated", True),
        ("# m3: ignore[security] no", False),
        ("# m3: ignore[correctness]", False),
        ("/* m3: ignore[correctness] */", False),
        ("# ignore[correctness] m3", False),
    ],
)
def test_a_comment_with_a_reason(comment: str, is_ignored: bool) -> None:
    """It counts on the line and right above it, for the rules that it names, and only with a reason."""
    for head in (f"a\nbad = call(1)  {comment}\n", f"a\n{comment}\nbad = call(1)\n"):
        change = change_of("a\n", head)
        _, dropped = kept(Wanted(), claim("bad = call(1)"), change=change)
        assert dropped == ({"ignored": 1} if is_ignored else {})


def test_fingerprints_survive_what_does_not_concern_them() -> None:
    """Lines above, other indentation: the same. Another text, path or rule: another. Twins are told apart."""

    def prints(head: str, path: str = "a.py", rule: str = "correctness") -> list[str]:
        change = change_of("a\n", head, path)
        quote = claim("bad = call(1)", path=path, rule=rule)
        sieve = Sieve(Wanted())
        for line in sorted(change.added):
            hunk = Hunk(0, 0, line, 1, (f"+{change.head_lines()[line]}",))
            if finding := sieve.take(quote, replace(change, hunks=(hunk,)), change.head_lines()):
                sieve.keep(finding)
        return [finding.fingerprint for finding in sieve.findings()[0]]

    (plain,) = prints("a\nbad = call(1)\n")
    assert prints("new\n\na\nmore\n    bad =  call(1)\n".replace("=  ", "= ")) == [plain]
    assert prints("a\nbad = call(1)\n", path="b.py") != [plain]
    assert prints("a\nbad = call(1)\n", rule="security") != [plain]
    assert prints("a\nbad = call(1) + 1\n") != [plain]
    twins = prints("a\nbad = call(1)\nx\nbad = call(1)\n")
    assert twins[0] == plain
    assert len(set(twins)) == 2


def test_a_baseline_knows_what_was_found(tmp_path: Path) -> None:
    """What is in it is not reported again; what is new is; a file that is none is refused."""
    every, _ = kept(Wanted(), claim("result = item"), claim("items[len(items)]"))
    file = tmp_path / "baseline.json"
    file.write_bytes(baseline_bytes(every[:1], {"feed": {"fingerprint": "feed", "rule": "security"}}))
    known = read_baseline(file)
    assert known.keys() == {every[0].fingerprint, "feed"}
    assert known["feed"]["rule"] == "security"
    fresh, dropped = kept(
        Wanted(baseline=frozenset(known)), claim("result = item"), claim("items[len(items)]")
    )
    assert (fresh, dropped) == (every[1:], {"baseline": 1})
    for text in ("[]", "{", '{"findings": [1]}', "[" * 100_000):
        file.write_text(text)
        with pytest.raises(UsageError, match="no baseline"):
            read_baseline(file)
    with pytest.raises(UsageError, match="cannot be read"):
        read_baseline(tmp_path / "nothing")


ITEM = {
    "path": "a.py", "quote": 'print("}{")', "message": " Wrong. ", "rule": "security", "severity": "error",
    "confidence": "high", "replacement": None,
}  # fmt: skip


@given(st.integers(0, 400))
def test_an_answer_that_was_cut_off(length: int) -> None:
    """The claims that are complete count, whatever is in their texts."""
    text = json.dumps({"analysis": 'Of [{"a": ', "findings": [ITEM, {**ITEM, "replacement": "x"}]})
    claims = read_claims(text[:length])
    first, second = (text.index("}", text.index('"replacement"', start)) + 1 for start in (0, 200))
    assert len(claims) == (length >= first) + (length >= second)
    assert all(claim.message == "Wrong." and claim.confidence == 0.9 for claim in claims)


def test_forms() -> None:
    """Paths and rules are those that there are; a judgement that was cut off refutes nothing."""
    item = claims_schema(["a.py", 'b"c.py'])["properties"]["findings"]["items"]["properties"]
    assert item["path"] == {"enum": ["a.py", 'b"c.py']}
    assert item["rule"] == {"enum": list(RULES)}
    assert is_refuted('{"argument": "No.", "claim": "wrong"}')
    assert not is_refuted('{"argument": "Yes.", "claim": "right"}')
    assert not is_refuted('{"argument": "Well, the cl')
