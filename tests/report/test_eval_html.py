"""The page about an evaluation: its numbers, and how it behaves in a real browser."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from m3cli.report.eval_html import WRONG_LISTED, render
from m3cli.report.eval_parts import percent
from m3cli.report.eval_text import length_name
from m3cli.tasks.evaluate.results import Skipped
from tests.browser import Visit, chromium, visit
from tests.report.evaluations import HOSTILE, evaluation_of, outcome, run_of, varied

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Browser, Locator, Page

    from m3cli.tasks.evaluate.results import Evaluation

SHOWN = ".run:nth-of-type({}) .map:not(.off) .heats"


def hostile() -> Evaluation:
    """Markup and controls in every text that it has."""
    answers = [
        outcome(0, task=text, question=text, text=text, answers=(text,), reply=text) for text in HOSTILE
    ]
    return evaluation_of(
        run_of(*answers),
        model=HOSTILE[0],
        haystack=HOSTILE[1],
        description=HOSTILE[3],
        skipped=tuple(Skipped(text, 512, text) for text in HOSTILE),
        warnings=HOSTILE,
    )


# 1. The bytes of the page.


def test_the_page_needs_nothing_and_lets_nothing_run() -> None:
    """The same bytes each time; no address in them; its own style and script run, by hash, and no other."""
    page = render(hostile())
    assert page == render(hostile())
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page)
    assert not re.search(r"<(img|iframe|object|embed|base|form|a)\b", page)
    assert not re.search(r"<[^>]*\s(style|on\w+)=", page)
    found = []
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        found.append(base64.b64encode(hashlib.sha256(text.encode()).digest()).decode())
    policy = f"default-src 'none'; script-src 'sha256-{found[0]}'; style-src 'sha256-{found[1]}'; "
    assert f'http-equiv="Content-Security-Policy" content="{policy}' in html.unescape(page)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200f\u2028\u202e\u2066\ud800-\udfff]", page)


# 2. The page in a browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Any]:
    """Open the page about an evaluation; at the end it has asked for nothing, and nothing went wrong."""
    windows = ExitStack()
    opened: list[Visit] = []

    def open_page(evaluation: Evaluation, **options: Any) -> Page:
        file = tmp_path / f"report{len(opened)}.html"
        file.write_bytes(render(evaluation).encode())
        opened.append(windows.enter_context(visit(browser, file, **options)))
        return opened[-1].page

    with windows:
        yield open_page
        for here in opened:
            assert (here.requests, here.problems) == ([], [])


def rows(table: Locator) -> list[list[str]]:
    """What is in the cells of a table for those who see it."""
    found: list[list[str]] = table.evaluate(
        """table => [...table.rows].map(row => [...row.cells].map(cell =>
          (cell.querySelector("[aria-hidden]") || cell).innerText.replace(/\\s+/g, " ").trim()))"""
    )
    return found


def test_the_heatmap_has_the_numbers_of_the_run(show: Any) -> None:
    """Depths are rows, lengths columns; a cell says its mean, interval, count and place."""
    run = varied(1)
    page = show(evaluation_of(run))
    head, *body = rows(page.locator(SHOWN.format(2)))
    lengths = sorted({answer.length for answer in run.outcomes})
    assert head == ["Depth", *map(length_name, lengths)]
    cells = run.cells(5)
    for row, line in enumerate(body):
        assert line == [
            f"{20 * row}–{20 * row + 20} %",
            *(percent(cells[length, row].mean) for length in lengths),
        ]
    score = cells[4096, 1]
    words = page.locator(SHOWN.format(2)).locator("tbody tr").nth(1).locator(".words").nth(2)
    assert words.text_content() == (
        f"{percent(score.mean, 1)} %, interval {percent(score.low)} to {percent(score.high)} %, "
        f"{score.count} answers: 4k, depth 20–40 %"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_score(show: Any, scheme: str) -> None:
    """A better score is lighter on a light page, darker on a dark one; its number can be read on it."""
    answers = [
        outcome(1.0 if number < right else 0.0, length=1024 * (right + 1), question=str(number))
        for right in range(41)
        for number in range(40)
    ]
    page = show(evaluation_of(run_of(*answers), depths=1), color_scheme=scheme)
    found: list[list[list[int]]] = page.locator(f"{SHOWN.format(2)} td").evaluate_all(
        """all => all.map(cell => {
          const style = getComputedStyle(cell);
          return [style.backgroundColor, style.color].map(text => text.match(/\\d+/g).map(Number));
        })"""
    )
    assert len(found) == 41

    def luminance(colour: list[int]) -> float:
        linear = [((value / 255 + 0.055) / 1.055) ** 2.4 for value in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    backs = [luminance(back) for back, _ in found]
    assert backs == sorted(backs, reverse=scheme == "dark")
    assert len(set(backs)) == 21
    for back, ink in found:
        low, high = sorted((luminance(back), luminance(ink)))
        assert (high + 0.05) / (low + 0.05) > 4.4


def test_groups_are_chosen_by_keyboard(show: Any) -> None:
    """Arrows go through the groups that have depths; only the chosen map is seen; runs do not mix."""
    good = outcome(1, question="a")
    bad = outcome(0, task="code", group="code", question="b", depth=0.9)
    page = show(evaluation_of(run_of(good, bad), run_of(good, bad, mode="end")))
    maps = page.locator(".run").first.locator(".map:visible")
    assert maps.count() == 1
    assert rows(maps.locator("table"))[3] == ["40–60 %", "100"]
    page.locator("fieldset input").first.focus()
    for group, line in (("retrieval", 3), ("code", 5)):
        page.keyboard.press("ArrowRight")
        assert page.locator("fieldset input:checked").first.get_attribute("value") == group
        assert maps.get_attribute("data-group") == group
        asked = [row[1] for row in rows(maps.locator("table"))[1:] if row[1] != "–"]
        assert asked == [{"retrieval": "100", "code": "0"}[group]]
        assert rows(maps.locator("table"))[line][1] == asked[0]
    assert page.locator(".run").nth(1).locator(".map:visible").get_attribute("data-group") == ""


def test_cells_tell_more_to_mouse_and_keyboard(show: Any) -> None:
    """A tip stands beside the cell under the mouse or with the focus; a table is one stop of the Tab key."""
    page = show(evaluation_of(varied(1)))
    tip = page.locator("#tip")
    assert not tip.is_visible()
    table = page.locator(SHOWN.format(2))
    table.locator("td").nth(8).hover()
    assert re.fullmatch(
        r"[\d.]+ %, interval \d+ to \d+ %, 8 answers\n4k, depth 20–40 %", tip.inner_text().strip()
    )
    page.mouse.move(1, 1)
    assert not tip.is_visible()
    page.locator("fieldset input:checked").focus()
    page.keyboard.press("Tab")
    assert tip.inner_text().endswith("512, depth 0–20 %")
    for key, place in (
        ("ArrowDown", "512, depth 20–40 %"),
        ("End", "1M, depth 20–40 %"),
        ("ArrowRight", "1M, depth 20–40 %"),
        ("ArrowUp", "1M, depth 0–20 %"),
        ("ArrowLeft", "128k, depth 0–20 %"),
    ):
        page.keyboard.press(key)
        assert tip.inner_text().endswith(place)
    assert table.locator('[tabindex="0"]').count() == 1
    page.keyboard.press("Escape")
    assert not tip.is_visible()


def test_tables_hold_the_results(show: Any) -> None:
    """Facts, effective contexts, scores by group and task, comparisons and skips."""
    whole = [outcome(float(n < 38), question=str(n), length=512) for n in range(40)]
    whole += [outcome(float(n < 36), question=str(n), length=1024) for n in range(40)]
    less = [outcome(float(n < 20), question=str(n), mode="end", length=512, seconds=1) for n in range(40)]
    evaluation = evaluation_of(
        run_of(*whole),
        run_of(*less, mode="end"),
        run_of(kv=("q8_0", "q8_0")),
        skipped=(Skipped("vt", 512, "it is too short"),),
        complete=False,
        known=3,
        warnings=("It swaps.",),
    )
    page = show(evaluation)
    facts = dict(
        page.locator(".plain > div").evaluate_all(
            "all => all.map(fact => [...fact.children].map(part => part.textContent))"
        )
    )
    assert facts["haystack"] == "Python's standard library"
    assert facts["runs"] == "f16 · whole, f16 · end, q8_0 · whole"
    assert facts["answers"] == "120, 3 of them from earlier runs"
    assert facts["computed"] == "1,234,567 tokens in 67 min"
    assert page.locator(".note").all_inner_texts() == [
        "It was ended before all questions were asked: scores are those of the answers so far.",
        "Warning: It swaps.",
    ]
    assert rows(page.locator(".effective")) == [
        ["Group", "Absolute", "Relative"],
        ["f16 · whole"],
        [
            "retrieval",
            "none needs 85.6 % undecided at 512: more samples would tell",
            "512 needs 80.8 % undecided at 1k: more samples would tell",
        ],
        ["f16 · end"],
        ["retrieval", "none needs 85.6 %", "none needs 42.5 % undecided at 512: more samples would tell"],
    ]
    modes, caches = (rows(page.locator(".comparison table").nth(number)) for number in (0, 1))
    assert modes[1] == ["whole", "40", "95.0", "83–99", "–", "–", "–", "4,000", "1,000", "2.0"]
    assert modes[2][:5] == ["end", "40", "50.0", "35–65", "-45.0"]
    assert modes[2][6:] == ["40", "4,000", "1,000", "1.0"]
    assert caches[2] == ["q8_0", "0", "nothing was answered"]
    spread = page.locator(".run").first.locator(".spread")
    assert rows(spread.nth(0)) == [["Group", "512", "1k"], ["retrieval", "95 83–99", "90 77–96"]]
    assert rows(spread.nth(1)) == [["Task", "512", "1k"], ["niah_single_2", "95 83–99", "90 77–96"]]
    assert rows(page.locator("#skipped table"))[1] == ["vt", "512", "it is too short"]
    assert page.title() == "tiny-m3 · m3 eval"


def test_wrong_answers_are_a_sample_of_all_tasks(show: Any) -> None:
    """At most so many are shown, of each task and length; right ones are not."""
    answers = [outcome(0, task=f"t{n % 3}", question=str(n), reply=f"reply {n}") for n in range(300)]
    answers += [outcome(1, reply="all right"), outcome(0.5, task="rare", reply="", length=512, depth=None)]
    page = show(evaluation_of(run_of(*answers)))
    page.locator(".wrong summary").click()
    items = page.locator(".wrong li").all_inner_texts()
    assert len(items) == WRONG_LISTED
    assert page.locator(".wrong summary").inner_text() == (
        f"Wrong answers {WRONG_LISTED} of 301, of all tasks and lengths"
    )
    assert " ".join(items[0].split()) == ("50 rare · 512 · question 0 What is it? an empty reply Expected: 7")
    assert {item.split()[1] for item in items} == {"rare", "t0", "t1", "t2"}
    assert "depth 50 %" in items[1]
    assert "all right" not in page.locator(".wrong").inner_text()


def test_hostile_texts_are_text(show: Any) -> None:
    """Markup, quotes and controls of replies and names are shown, and none runs or turns text round."""
    page = show(hostile())
    page.locator(".wrong summary").click()
    shown = page.locator("blockquote").all_text_contents()
    assert len(shown) == len(HOSTILE)
    assert {HOSTILE[0], HOSTILE[1], HOSTILE[2], HOSTILE[6], HOSTILE[7]} < set(shown)
    for place in (".asked", ".expected bdi"):
        assert set(page.locator(place).all_text_contents()) == set(shown)
    assert "right\\u202eto-left\\u200f\\u2066 end" in shown
    assert "\\x1b[2J\\x07\\u009bcontrols\\x00" in shown
    assert page.title() == f"{HOSTILE[0]} · m3 eval"
    assert page.locator("img, script[src], main b b").count() == 0
    assert page.locator("script").count() == 1


def test_long_replies_are_cut(show: Any) -> None:
    """The page says how much is missing; lines of a reply stay lines."""
    page = show(evaluation_of(run_of(outcome(0, reply="a\nb\n" + "c" * 5000, text="d" * 2001))))
    text = page.locator("blockquote").text_content()
    assert text.startswith("a\nb\nccc")
    assert text.endswith("… and 3,004 characters more")
    assert page.locator(".asked").text_content().endswith("d … and 1 character more")


@pytest.mark.parametrize("width", [320, 700, 1600])
def test_the_page_fits_its_window(show: Any, width: int) -> None:
    """Wide tables scroll in themselves, the page does not, whatever the names."""
    lengths = tuple(512 * 2**i for i in range(12))
    words = {"text": "a" * 3000, "answers": ("b" * 300,)}
    long = [outcome(0, task="x" * 300, question="y" * 300, reply="z" * 3000, **words)]
    evaluation = evaluation_of(
        varied(1, lengths=lengths),
        varied(1, lengths=lengths, mode="select"),
        run_of(*long, mode="end"),
        model="m" * 300,
        skipped=(Skipped("t" * 100, 512, "r" * 300),),
    )
    page = show(evaluation, viewport={"width": width, "height": 900})
    for details in page.locator("summary").all():
        details.click()
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    page.locator(".heats td").first.hover()
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_paper_shows_all_maps(show: Any) -> None:
    """Printed, there is nothing to choose: every group's map is there under its name, in its colours."""
    page = show(evaluation_of(run_of(outcome(1), outcome(0, task="code", group="code"))))
    assert page.locator(".map:visible").count() == 1
    page.emulate_media(media="print")
    assert page.locator(".map:visible h4:visible").all_inner_texts() == ["all groups", "retrieval", "code"]
    assert not page.locator("fieldset").is_visible()
    adjust = "cell => getComputedStyle(cell).printColorAdjust"
    assert page.locator(".map td.heat").first.evaluate(adjust) == "exact"


def test_without_a_script_all_maps_are_there(show: Any) -> None:
    """Where JavaScript is off, nothing is hidden but what needs it."""
    page = show(
        evaluation_of(run_of(outcome(1), outcome(0, task="code", group="code"))), java_script_enabled=False
    )
    assert page.locator(".map:visible h4:visible").count() == 3
    for selector in ("fieldset", ".keys", "#tip"):
        assert not page.locator(selector).first.is_visible()


def test_pages_about_little(show: Any) -> None:
    """No run, no answer, no depth, one length: the page says so."""
    assert "Nothing was answered." in show(evaluation_of()).locator("main").inner_text()
    assert "0 answers." in show(evaluation_of(run_of())).locator("main").inner_text()
    without = show(evaluation_of(run_of(outcome(1, depth=None), outcome(0, depth=None, question="1"))))
    assert "No question here stands at a depth." in without.locator(".run").inner_text()
    assert without.locator(".map").count() == 0
    assert rows(without.locator(".spread").first)[1] == ["retrieval", "50 9–91"]


def test_what_was_not_finished_is_said(show: Any) -> None:
    """The length where a run ended early is named; where it is the only one, no group has a score."""
    page = show(evaluation_of(run_of(outcome(1), outcome(0, length=65_536), partial=65_536)))
    assert "64k was not finished" in page.locator(".run").inner_text()
    assert rows(page.locator(".effective"))[2][0] == "retrieval"
    page = show(evaluation_of(run_of(outcome(1), partial=4096)))
    assert "4k was not finished" in page.locator(".run").inner_text()
    assert "No length was finished." in page.locator("#effective").inner_text()
    assert [table[0][0] for table in map(rows, page.locator(".run .spread").all())] == ["Task"]
