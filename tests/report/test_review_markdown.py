"""The comment on a pull request: what it shows, and that no text of a finding can work in it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from m3cli.report.review_markdown import LIMIT, MARKER, markdown
from m3cli.tasks.findings import Unreviewed
from tests.hostile_reviews import finding, review, reviews

if TYPE_CHECKING:
    from collections.abc import Iterator

    from markdown_it.token import Token

    from m3cli.tasks.findings import Review

# As GitHub and GitLab find them in what is rendered, outside of code.
LIVE = re.compile(r"@\w|#\d|\bGH-\d|!\d|://|\bwww\.", re.IGNORECASE)
HTML = {MARKER, "<details>", "<summary>", "</summary>", "</details>", "<sub>", "</sub>", "<br>"}
KINDS = {
    "paragraph_open",
    "paragraph_close",
    "inline",
    "html_block",
    "fence",
    "bullet_list_open",
    "bullet_list_close",
    "list_item_open",
    "list_item_close",
}
INLINE_KINDS = {
    "text",
    "code_inline",
    "html_inline",
    "strong_open",
    "strong_close",
    "em_open",
    "em_close",
    "softbreak",
}


def tokens(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)


def inline(found: list[Token]) -> Iterator[Token]:
    for token in found:
        yield from token.children or ()


def test_a_comment_is_exact() -> None:
    """Marker, summary, findings with suggestions, what was not reviewed and what did not stay."""
    value = review(
        finding(severity="info", rule="test-gap", replacement=None, start_line=12),
        finding(),
        unreviewed=(Unreviewed("a.bin", "it is binary"),),
        dropped={"refuted": 2},
        warnings=("The model is small.",),
    )
    message = "The name is put into the text of the query. `execute` takes it as a parameter."
    assert markdown(value) == (
        "<!-- m3 review -->\n"
        "**m3 found 1 error, 1 remark in 2 files.**\n"
        "\n"
        f"**Error** (Security) in `src/db.py:11-12`: {message}\n"
        "\n"
        "```suggestion\n"
        "    query = text\n"
        "    go(name)\n"
        "```\n"
        "\n"
        f"**Info** (Missing test) in `src/db.py:12`: {message}\n"
        "\n"
        "<details><summary>Not reviewed, or not all of it: 1 file</summary>\n"
        "\n"
        "- `a.bin`: it is binary\n"
        "\n"
        "</details>\n"
        "\n"
        "- note: The model is small.\n"
        "\n"
        "Findings that did not stay: 2 refuted by the second look.\n"
        "\n"
        "<sub>Found by `demo`, a language model: check before you change the code.</sub>\n"
    )


@settings(max_examples=300)
@given(reviews())
def test_no_text_breaks_out(value: Review) -> None:
    """Only m3's own markup works: no heading, link, image, table or HTML, no mention and no reference."""
    text = markdown(value)
    found = tokens(text)
    assert {token.type for token in found} <= KINDS
    assert {token.type for token in inline(found)} <= INLINE_KINDS
    html = [token.content for token in (*found, *inline(found)) if token.type.startswith("html")]
    assert {tag for content in html for tag in re.findall("<[^>]*>", content)} <= HTML
    assert text.startswith(f"{MARKER}\n")
    assert sum(MARKER in content for content in html) == 1
    assert not [
        token.content for token in inline(found) if token.type == "text" and LIVE.search(token.content)
    ]


@given(st.from_regex(r"[!-_a-~]([ -_a-~]*[!-_a-~])?", fullmatch=True))
@example("a<b>c & d &amp; List<String> 1 < 2 \\ \\* [x](y) **b** @me #1 http://x $x$ ~~s~~ <!-- c -->")
def test_a_message_is_shown_as_it_is(message: str) -> None:
    """Rendered, all punctuation stands where it stood."""
    found = tokens(markdown(review(finding(message=message, replacement=None))))
    line = next(token for token in found if token.type == "inline" and token.content.startswith("**Error**"))
    shown = "".join(token.content for token in line.children or () if token.type == "text")
    assert shown.replace("\u200b", "") == f"Error (Security) in : {message}"


@given(reviews())
def test_suggestions_stand_whole_in_their_fences(value: Review) -> None:
    """As many fences as suggestions, each with its text; nothing else is a fence."""
    fences = [token for token in tokens(markdown(value)) if token.type == "fence"]
    wanted = [f.replacement for f in value.findings if f.replacement is not None]
    assert len(fences) == len(wanted)
    assert {fence.info for fence in fences} <= {"suggestion"}
    plain = {
        text.removesuffix("\n") + "\n"
        for text in wanted
        if text.isascii() and text.replace("\n", "").isprintable()
    }
    assert plain - {"\n"} <= {fence.content for fence in fences}


@given(st.lists(st.sampled_from(["`", "```", "````", "~~~", "\n", " ", "a"]), max_size=20).map("".join))
@example("a\n```\nb\n````\nc")
def test_any_run_of_backticks_stays_in_its_fence(code: str) -> None:
    """The fence is longer than all that stand in the code."""
    (fence,) = [t for t in tokens(markdown(review(finding(replacement=code)))) if t.type == "fence"]
    assert fence.content == (code.removesuffix("\n") + "\n" if code else "")


@given(st.text("ab` /", min_size=1, max_size=30))
def test_paths_are_code_whatever_backticks_they_hold(path: str) -> None:
    """A path is shown as it is."""
    spans = [
        t.content for t in inline(tokens(markdown(review(finding(path=path))))) if t.type == "code_inline"
    ]
    assert spans[0].strip() == f"{path}:11-12".strip()


def test_a_command_of_gitlab_starts_no_line() -> None:
    """`/merge` and the like work where a line of a comment starts with them."""
    value = review(
        finding(message="/merge\n/close\n\n/approve", replacement=None),
        unreviewed=(Unreviewed("/merge", "/merge"),),
        warnings=("/merge",),
    )
    assert "/close" in markdown(value)
    assert not [line for line in markdown(value).splitlines() if line.lstrip().startswith("/")]


def test_a_comment_never_is_too_long() -> None:
    """The least severe findings are left out, and the comment says how many."""
    many = [
        *(finding(severity="warning", fingerprint=f"w{i}", message="&<@a" * 300) for i in range(40)),
        *(finding(severity="error", fingerprint=f"e{i}") for i in range(5)),
        *(finding(severity="info", fingerprint=f"i{i}") for i in range(3)),
    ]
    value = review(
        *many,
        unreviewed=tuple(Unreviewed(f"file{i}", "too large") for i in range(5000)),
        warnings=("&" * 10_000,) * 100,
    )
    text = markdown(value)
    assert 0.8 * LIMIT < len(text.encode("utf-16-le")) // 2 <= LIMIT
    assert text.count("**Error**") == 5
    shown = text.count("**Warning**")
    assert 0 < shown < 40
    assert f"Not shown, as a comment holds no more: {40 - shown} warnings, 3 remarks." in text
    listed = text.count("too large")
    assert f"- and {5000 - listed:,} more\n" in text


def test_the_longest_finding_is_shown() -> None:
    """Texts that grow most when they are escaped leave room for one finding at least."""
    for worst in ("&#", "`", "𐐀", "<a", "a\n"):
        value = review(
            finding(message=worst * 50_000, replacement=worst * 2900, path="`" * 5000),
            unreviewed=tuple(Unreviewed("`" * 400, worst * 400) for _ in range(100)),
            warnings=(worst * 5000,) * 20,
            model="`" * 5000,
        )
        text = markdown(value)
        assert len(text.encode("utf-16-le")) // 2 <= LIMIT
        assert "**Error**" in text
        assert "Not shown" not in text


def test_a_suggestion_that_is_too_long_is_said_to_be() -> None:
    """It is left out as a whole, as half of one would be wrong."""
    text = markdown(review(finding(replacement="x" * 10_000)))
    assert "A suggestion of 10,000 characters is left out here." in text
    assert "```" not in text
