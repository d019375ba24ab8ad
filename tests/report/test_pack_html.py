"""The page about a pack: its numbers, and how it behaves in a real browser."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
from contextlib import ExitStack
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest

from m3cli import __version__
from m3cli.corpus.corpus import Corpus, CorpusRequest
from m3cli.corpus.types import Chunk, Skip, SkipReason
from m3cli.prompt.pack import Pack
from m3cli.report.pack_html import FILES_LISTED, SKIPS_LISTED, render
from m3cli.tasks.pack import PackRequest, PackResult, pack
from tests.browser import Visit, chromium, visit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from playwright.sync_api import Browser, Locator, Page

# Tokens a file. The areas that they should get are easy to see.
SMALL = {
    "src/engine/llama.py": 300,
    "src/engine/worker.py": 100,
    "src/app.py": 200,
    "tests/test_app.py": 300,
    "README.md": 100,
}
HOSTILE = {
    "<script>document.title='owned'</script>.py": 90,
    "</script><img src=x onerror=\"document.title='owned'\">/a\"b'c.md": 80,
    "<!--<script >.txt": 70,
    "javascript:alert(1)": 60,
    "a&lt;b&amp;c.py": 50,
    "line\u2028end\u2029.py": 40,
    "right\u202eto-left.py": 30,
    "{{ 7 * 7 }}{% raw %}.jinja": 20,
    "x" * 250 + ".py": 10,
}


def result_of(
    tokens: Mapping[str, int],
    *,
    omitted: Sequence[Chunk] = (),
    skips: Sequence[Skip] = (),
    redacted: Mapping[str, int] | None = None,
    counted_by: str = "",
) -> PackResult:
    """A result with a chunk a file, and 10 tokens around them all."""
    chunks = tuple(Chunk(path, 1, 9, "text\n") for path in tokens)
    paths = tuple(dict.fromkeys([*tokens, *(chunk.path for chunk in omitted)]))
    total = sum(tokens.values()) + 10
    packed = Pack(
        strategy="select" if omitted else "whole",
        chunks=chunks,
        chunk_tokens=tuple(tokens.values()),
        omitted=tuple(omitted),
        spans=(),
        parts=("text",),
        tokens=total,
        tokens_needed=total * 4 if omitted else total,
    )
    corpus = Corpus(paths, (*chunks, *omitted), tuple(skips), ())
    return PackResult(corpus, packed, counted_by, redacted or {})


class Parts(HTMLParser):
    """Names of all elements, attributes that could load or run something, and texts of raw elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.raw: list[tuple[str, str]] = []
        self.policy = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = {name: value or "" for name, value in attrs}
        self.attributes += [
            (name, value)
            for name, value in values.items()
            if name in ("src", "href", "action", "style", "data") or name.startswith("on")
        ]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] in ("script", "style") and data.strip():
            self.raw.append((self.tags[-1], data))


# 1. The bytes of the page.


def test_the_same_pack_gives_the_same_bytes(tmp_path: Path) -> None:
    """Order of creation and time change no byte."""
    pages = []
    for seed in (1, 2):
        root = tmp_path / str(seed) / "tree"
        names = [f"d{i % 5}/e{i % 3}/f{i}.py" for i in range(60)]
        random.Random(seed).shuffle(names)
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("x = 1\n" * (len(name) % 4 + 1))
        result = pack(PackRequest(CorpusRequest((str(root),))), lambda: b"")
        pages.append(render(result, title="tree", budget=1000))
    assert pages[0] == pages[1]
    assert pages[0].count("<tr>") > FILES_LISTED


def test_the_page_needs_nothing_and_lets_nothing_run() -> None:
    """There is no address in it, and its policy allows its own style and script by hash alone."""
    page = render(
        result_of(HOSTILE, skips=[Skip(path, SkipReason.BROKEN, path) for path in HOSTILE]), title="t"
    )
    parts = Parts(page)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page)
    assert parts.attributes == [("href", "data:,")]
    assert not {"img", "iframe", "object", "embed", "base", "form", "a"} & set(parts.tags)
    (_, style), (_, data), (_, script) = parts.raw
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)]
    assert parts.policy.startswith(
        f"default-src 'none'; script-src 'sha256-{hashes[0]}'; style-src 'sha256-{hashes[1]}'; "
    )
    assert json.loads(data)["root"][1] == sum(HOSTILE.values())
    assert not set("<>&") & set(data)
    assert not re.search("[\u2028\u2029\u202e]", page)


def test_directories_that_hold_one_directory_are_one() -> None:
    """`src/main/java` is one step, at the top too; a file and a directory may share a name."""
    page = render(result_of({"a/b/c/x.py": 1, "a/b/y/z.py": 2, "a/b/y": 4}), title="t")
    assert json.loads(Parts(page).raw[1][1]) == {
        "root": [
            "a/b",
            7,
            3,
            [["y", 4, 1, 0, 0], ["y", 2, 1, [["z.py", 2, 1, 0, 1]]], ["c", 1, 1, [["x.py", 1, 1, 0, 1]]]],
        ],
        "types": ["y", ".py"],
    }


def test_paths_may_be_as_deep_as_they_like() -> None:
    """A path of 2,000 directories beside another is cut into as many levels as recursion can bear."""
    deep = "/".join(f"d{i}" for i in range(2000)) + "/x.py"
    page = render(
        result_of({deep: 5, "/".join(f"d{i}" for i in range(50)) + "/y.py": 5, "z.py": 1}), title="t"
    )
    assert "d1999/x.py" in page


# 2. The page in a browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Any]:
    """Open the page about a result; at the end it has asked for nothing, and nothing went wrong in it."""
    windows = ExitStack()
    opened: list[Visit] = []

    def open_page(result: PackResult, *, budget: int | None = None, **options: Any) -> Page:
        file = tmp_path / f"report{len(opened)}.html"
        file.write_bytes(render(result, title="a <b>title</b>", budget=budget).encode())
        opened.append(windows.enter_context(visit(browser, file, **options)))
        return opened[-1].page

    with windows:
        yield open_page
        for here in opened:
            assert (here.requests, here.problems) == ([], [])


def cells(page: Page) -> dict[str, dict[str, float]]:
    """Boxes of all cells of the map by the path that they name, relative to the map."""
    found: list[list[Any]] = page.evaluate(
        """() => {
          const map = document.getElementById("map").getBoundingClientRect();
          return [...document.querySelectorAll("#map .cell")].map((cell) => {
            const box = cell.getBoundingClientRect();
            const [x, y] = [box.x - map.x, box.y - map.y];
            return [cell.getAttribute("aria-label").split(/, [\\d,]+ tokens? · /)[0],
              { x, y, width: box.width, height: box.height,
                area: box.width * box.height / map.width / map.height }];
          });
        }"""
    )
    assert len({name for name, _ in found}) == len(found)
    return dict(found)


def cell(page: Page, name: str) -> Locator:
    return page.locator(f'#map .cell[aria-label^="{name}, "]')


def crumbs(page: Page) -> str:
    return " ".join(page.locator("#crumbs").inner_text().split())


def legend(page: Page) -> list[str]:
    return [" ".join(row.split()) for row in page.locator("#legend span").all_inner_texts()]


def table(page: Page, selector: str) -> list[list[str]]:
    rows: list[list[str]] = page.evaluate(
        "selector => [...document.querySelectorAll(`${selector} tbody tr`)]"
        ".map(row => [...row.cells].slice(0, 4).map(cell => cell.textContent.trim()))",
        selector,
    )
    return rows


def test_areas_are_in_proportion_to_tokens(show: Any) -> None:
    """Every file and directory has a cell; siblings share their directory's area by tokens."""
    page = show(result_of(SMALL))
    boxes = cells(page)
    assert set(boxes) == {*SMALL, "src/", "src/engine/", "tests/"}
    for name, tokens in (("src/", 600), ("tests/", 300), ("README.md", 100)):
        assert boxes[name]["area"] == pytest.approx(tokens / 1000, rel=0.005)
    engine = boxes["src/engine/llama.py"]["area"] / boxes["src/engine/worker.py"]["area"]
    assert engine == pytest.approx(3, rel=0.005)
    assert boxes["src/engine/"]["area"] / boxes["src/app.py"]["area"] == pytest.approx(2, rel=0.005)
    for inner, outer in (("src/engine/llama.py", "src/engine/"), ("src/engine/", "src/")):
        a, b = boxes[inner], boxes[outer]
        assert b["x"] < a["x"] < a["x"] + a["width"] < b["x"] + b["width"]
        assert b["y"] < a["y"] < a["y"] + a["height"] < b["y"] + b["height"]


def test_a_thousand_areas_fill_the_map(show: Any) -> None:
    """Sizes that differ by far: each cell has its share of the map, none lies on another or outside."""
    tokens = {f"f{i}.py": int(1_000_000 / (i + 1)) for i in range(100)}
    boxes = cells(show(result_of(tokens)))
    total = sum(tokens.values())
    assert len(boxes) == 100
    for name, box in boxes.items():
        assert box["area"] == pytest.approx(tokens[name] / total, rel=0.02)
        assert max(box["width"] / box["height"], box["height"] / box["width"]) < 5
    assert sum(box["area"] for box in boxes.values()) == pytest.approx(1, rel=0.001)
    placed = list(boxes.values())
    for i, a in enumerate(placed):
        for b in placed[i + 1 :]:
            across = min(a["x"] + a["width"], b["x"] + b["width"]) - max(a["x"], b["x"])
            down = min(a["y"] + a["height"], b["y"] + b["height"]) - max(a["y"], b["y"])
            assert min(across, down) < 0.1


def test_a_click_zooms_in_and_the_path_leads_back(show: Any) -> None:
    """A directory fills the map after a click; each step of the path above the map leads back to it."""
    page = show(result_of(SMALL))
    assert crumbs(page) == "all files 1,000 tokens · 100.0% · 5 files"
    before = cells(page)
    cell(page, "src/").click(position={"x": 5, "y": 5})
    assert set(cells(page)) == {"src/engine/", "src/engine/llama.py", "src/engine/worker.py", "src/app.py"}
    assert crumbs(page) == "all files / src 600 tokens · 60.0% · 3 files"
    assert cells(page)["src/app.py"]["area"] == pytest.approx(1 / 3, rel=0.005)
    cell(page, "src/engine/llama.py").click()  # a file leads to the directory that it is in
    assert crumbs(page).startswith("all files / src / engine 400 tokens · 40.0% · 2 files")
    assert cells(page)["src/engine/llama.py"]["area"] == pytest.approx(3 / 4, rel=0.005)
    page.locator("#crumbs").get_by_role("button", name="src").click()
    assert crumbs(page).startswith("all files / src 600")
    page.locator("#crumbs").get_by_role("button", name="all files").click()
    assert cells(page) == before


def test_the_map_can_be_used_without_a_mouse(show: Any) -> None:
    """One stop of the Tab key; arrows move, Enter zooms in, Backspace out, and the focus is never lost."""
    page = show(result_of(SMALL))
    assert page.locator('#map [tabindex="0"]').count() == 1
    page.locator("#colours input:checked").focus()
    page.keyboard.press("Tab")
    focused = "document.activeElement.getAttribute('aria-label')"
    assert page.evaluate(focused) == "src/, 600 tokens · 60.0% · 3 files"
    assert page.locator("#tip").inner_text().split("\n")[0].startswith("src/")
    assert page.locator(".ring").is_visible()
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused).startswith("src/engine/, ")
    page.keyboard.press("Enter")
    assert crumbs(page).startswith("all files / src / engine")
    assert page.evaluate(focused).startswith("src/engine/llama.py, 300 tokens · 30.0% · 1 chunk")
    page.keyboard.press("Backspace")
    assert crumbs(page).startswith("all files / src 600")
    assert page.evaluate(focused).startswith("src/engine/, ")
    page.keyboard.press("Escape")
    page.keyboard.press("End")
    assert page.evaluate(focused).startswith("README.md, ")
    assert page.locator('#map [tabindex="0"]').count() == 1


def test_colours_say_the_directory_or_the_type(show: Any) -> None:
    """Cells of a colour are of one directory, or of one type of file, and the legend has its share."""
    page = show(result_of(SMALL))

    def colour(name: str) -> str:
        value: str = cell(page, name).evaluate("cell => getComputedStyle(cell).getPropertyValue('--fill')")
        return value

    assert colour("src/app.py") == colour("src/engine/llama.py") != colour("tests/test_app.py")
    assert legend(page) == ["src/ 60.0%", "tests/ 30.0%", "other 10.0%"]
    page.get_by_label("file type").check()
    assert colour("src/app.py") == colour("tests/test_app.py") != colour("README.md")
    assert legend(page) == [".py 90.0%", ".md 10.0%"]


def test_one_large_directory_is_not_one_colour(show: Any) -> None:
    """Where a directory holds most of all tokens, the colours are those of what is in it."""
    page = show(result_of({"lib/a/x.py": 500, "lib/b/y.py": 400, "other/z.py": 100}))
    assert legend(page) == ["lib/a/ 50.0%", "lib/b/ 40.0%", "other/ 10.0%"]


def test_small_siblings_are_grouped(show: Any) -> None:
    """20,000 files make a map of few cells that miss none of them, and a group can be zoomed into."""
    tokens = {f"many/f{i:05}.py": 50 for i in range(20_000)} | {"many/large.py": 200_000}
    page = show(result_of(tokens))
    labels = page.locator("#map .cell").evaluate_all(
        "cells => cells.map(cell => cell.getAttribute('aria-label'))"
    )
    assert labels[0].startswith("many/large.py, ")
    sizes = [re.match(r"many/: ([\d,]+) more files, ([\d,]+) tokens", label) for label in labels[1:]]
    counts = [[int(number.replace(",", "")) for number in found.groups()] for found in sizes if found]
    assert 50 < len(counts) == len(labels) - 1 < 2000
    assert sum(count for count, _ in counts) == 20_000
    assert all(size == 50 * count for count, size in counts)
    page.locator("#map .cell.group").first.click()
    assert page.locator("#map .cell").count() == counts[0][0]
    assert f"/ {counts[0][0]} more files" in crumbs(page)
    page.locator("#map .cell").first.click()  # a file of the group: there is nothing to zoom into
    assert page.locator("#map .cell").count() == counts[0][0]
    page.locator("#crumbs").get_by_role("button").first.click()
    assert page.locator("#map .cell").count() == len(labels)


def test_search_goes_through_all_files(show: Any) -> None:
    """All words have to be in the path, in any case; what does not match is dimmed in the map."""
    tokens = {f"lib/Module{i}/part.py": 1000 - i for i in range(200)} | {"docs/module7.md": 1}
    page = show(result_of(tokens))
    first = table(page, "#files")
    assert len(first) == FILES_LISTED
    assert page.locator("#found").inner_text() == "The first 50 of 201 files."
    page.locator("#search").fill("MODULE199 part")
    assert [row[0] for row in table(page, "#files")] == ["lib/Module199/part.py"]
    assert page.locator("#found").inner_text() == "1 file found: 801 tokens, 0.4%."
    bright = page.locator("#map .cell:not(.dim)")
    labels = bright.evaluate_all("cells => cells.map(cell => cell.ariaLabel.split(',')[0])")
    assert labels == ["lib/", "lib/Module199/", "lib/Module199/part.py"]
    page.locator("#search").fill("module")
    assert page.locator("#found").inner_text().startswith("201 files found: ")
    page.locator("#more").click()
    assert len(table(page, "#files")) == 201
    page.locator("#search").fill("nothing like it")
    assert table(page, "#files") == []
    assert page.locator("#found").inner_text() == "0 files found: 0 tokens, 0.0%."
    page.locator("#search").fill("")
    assert table(page, "#files") == first  # the script writes the rows as the page came with them
    assert page.locator("#map .cell.dim").count() == 0


def test_hostile_names_are_text(show: Any) -> None:
    """Names with markup, quotes and controls are shown as they are, in table, map and tip; none runs."""
    skips = [Skip(path, SkipReason.BROKEN, path) for path in HOSTILE]
    omitted = [Chunk(path, 10, 19, "") for path in HOSTILE]
    page = show(result_of(HOSTILE, skips=skips, omitted=omitted, redacted={"<b>key</b>": 1}))
    shown = [re.sub("[\u2028\u2029\u202e]", lambda found: f"\\u{ord(found[0]):x}", path) for path in HOSTILE]
    assert [row[0] for row in table(page, "#files")] == shown
    assert [row[0] for row in table(page, "#omitted")] == shown
    assert page.locator(".skips bdi.path").all_text_contents() == shown
    assert page.locator(".skips bdi.detail").all_text_contents() == shown
    assert set(shown) <= set(cells(page))
    page.locator("#map .cell.leaf").first.hover()
    assert page.locator("#tip .path").inner_text() in shown
    page.locator("#search").fill("<SCRIPT")
    assert len(table(page, "#files")) == 2
    page.locator("#search").fill("")
    page.evaluate("document.querySelector('#map .cell.directory').click()")
    assert crumbs(page).startswith("all files / <script>document.title='owned'< 90 tokens")
    assert page.title() == "a <b>title</b> · m3 pack"
    assert page.locator("h1").inner_text() == "a <b>title</b>"
    assert page.locator("img, h1 b, dd b").count() == 0


def test_tables_hold_the_numbers_of_the_pack(show: Any) -> None:
    """Facts, files, directories, types, and chunks over the budget are those of the PackResult."""
    omitted = [
        Chunk("src/app.py", 10, 19, ""),
        Chunk("src/app.py", 20, 25, ""),
        Chunk("src/app.py", 40, 40, ""),
        Chunk("whole.py", 1, 4, "", numbers=(3, 0, 8, 9)),
    ]
    skips = [Skip("x.png", SkipReason.BINARY)]
    redacted = {"AWS Access Key": 2, "Private Key": 1}
    result = result_of(SMALL, omitted=omitted, skips=skips, redacted=redacted, counted_by="tiny")
    page = show(result, budget=2000)
    facts = page.locator(".facts > div").evaluate_all(
        "all => all.map(fact => [...fact.children].map(part => part.textContent))"
    )
    assert facts == [
        ["Tokens", "1,010", "counted as tiny does"],
        ["Budget", "2,000", "50.5% used"],
        ["Whole corpus", "4,040", "tokens, 25.0% packed"],
        ["Files", "5", "of 6 that were read"],
        ["Chunks", "5", "4 more over the budget"],
        ["Secrets redacted", "3", "2 AWS Access Key, 1 Private Key"],
        ["Skipped", "1", "listed below, with reasons"],
    ]
    assert table(page, "#files") == [
        ["src/engine/llama.py", "1", "300", "30.0%"],
        ["tests/test_app.py", "1", "300", "30.0%"],
        ["src/app.py", "1 of 4", "200", "20.0%"],
        ["src/engine/worker.py", "1", "100", "10.0%"],
        ["README.md", "1", "100", "10.0%"],
    ]
    assert table(page, ".pair section:nth-child(1)") == [
        ["src/", "3", "600", "60.0%"],
        ["tests/", "1", "300", "30.0%"],
        ["files at the top", "1", "100", "10.0%"],
    ]
    assert table(page, ".pair section:nth-child(2)") == [
        [".py", "4", "900", "90.0%"],
        [".md", "1", "100", "10.0%"],
    ]
    assert table(page, "#omitted") == [
        ["src/app.py", "3 of 4", "10-25, 40"],
        ["whole.py", "1 of 1", "3-9"],
    ]
    assert f"m3 {__version__}" in page.locator("footer").inner_text()
    assert "takes 10 more" in page.locator("#files-section").inner_text()


def test_skips_are_grouped_capped_and_filtered(show: Any) -> None:
    """A list for each reason, the longest first; a long one says how many more there are."""
    skips = [Skip(f"build/o{i}.o", SkipReason.BINARY, "NUL") for i in range(SKIPS_LISTED + 500)]
    skips += [Skip("package-lock.json", SkipReason.LOCK_FILE), Skip("gone/o7.bin", SkipReason.UNREADABLE)]
    page = show(result_of(SMALL, skips=skips))
    groups = page.locator("details.skips")
    assert groups.locator("summary").all_inner_texts() == ["binary 1,500", "lock file 1", "unreadable 1"]
    assert groups.locator("li:visible").count() == 0
    groups.first.locator("summary").click()
    assert groups.locator("li:visible").count() == SKIPS_LISTED
    assert "500 more not listed here" in groups.first.inner_text()
    page.locator("#skip-search").fill("o7.")
    assert groups.locator("li:visible").all_inner_texts() == ["build/o7.o NUL", "gone/o7.bin"]
    page.locator("#skip-search").fill("")
    assert groups.locator("summary:visible").count() == 3
    assert groups.locator("li:visible").count() == 0


def test_without_a_script_there_are_the_tables(show: Any) -> None:
    """Where JavaScript is off, what needs it is not shown, and all tables are."""
    page = show(result_of(SMALL, skips=[Skip("x", SkipReason.EMPTY)]), java_script_enabled=False)
    assert page.locator("#files tbody tr:visible").count() == len(SMALL)
    assert page.locator(".pair tbody tr:visible").count() == 5
    assert page.locator("details.skips:visible").count() == 1
    for selector in ("#map-section", "#search", "#skip-search", "#more", "#tip"):
        assert not page.locator(selector).is_visible()


@pytest.mark.parametrize("width", [360, 800, 1600])
def test_the_page_fits_its_window(show: Any, width: int) -> None:
    """Nothing sticks out at any width, whatever the names; the map is drawn anew when the width changes."""
    long = {f"{'directory' * 20}{i}/{'file' * 50}.py": 100 + i for i in range(30)}
    page = show(result_of(SMALL | long), viewport={"width": 700, "height": 900})
    page.evaluate("document.querySelectorAll('.cell').forEach(cell => cell.dataset.old = '')")
    page.set_viewport_size({"width": width, "height": 900})
    page.locator(".cell[data-old]").first.wait_for(state="detached")
    page.locator(".cell").first.wait_for()
    assert page.evaluate(
        """() => {
          const right = (element) => element.getBoundingClientRect().right;
          const map = document.getElementById("map");
          return [...map.querySelectorAll(".cell")].every((cell) => right(cell) <= right(map) + 1);
        }"""
    )
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_files_without_tokens_have_no_area(show: Any) -> None:
    """What takes no tokens stands in the tables with 0.0%, also when nothing takes any."""
    page = show(result_of({"a.py": 10, "b.py": 0}))
    assert set(cells(page)) == {"a.py"}
    assert table(page, "#files") == [["a.py", "1", "10", "100.0%"], ["b.py", "1", "0", "0.0%"]]
    nothing = show(result_of({"a.py": 0}))
    assert cells(nothing) == {}
    assert legend(nothing) == ["files 0.0%"]
    assert table(nothing, "#files") == [["a.py", "1", "0", "0.0%"]]


def test_paper_and_dark_rooms(show: Any) -> None:
    """The page follows the reader's colour scheme; on paper the map is whole and controls are gone."""
    page = show(result_of(SMALL), color_scheme="dark")
    ink = "getComputedStyle(document.body).color"
    dark = page.evaluate(ink)
    page.emulate_media(color_scheme="light")
    assert page.evaluate(ink) != dark
    page.emulate_media(media="print")
    assert not page.locator("#search").is_visible()
    assert cells(page)["src/"]["area"] == pytest.approx(0.6, rel=0.005)


# 3. The watch over the page sees what it has to see.


def test_requests_and_problems_would_be_seen(browser: Browser, tmp_path: Path) -> None:
    """A page that loads, breaks or violates its policy is caught by the helper that all tests use."""
    (tmp_path / "bad.html").write_text(
        "<meta http-equiv='Content-Security-Policy' content=\"style-src 'none'\">"
        "<style>p { color: red }</style>"
        "<img src='http://example.invalid/x.png'><script>null.x</script>"
    )
    with visit(browser, tmp_path / "bad.html") as here:
        assert here.requests == ["http://example.invalid/x.png"]
        problems = "\n".join(here.problems)
    assert "Content Security Policy" in problems
    assert "Cannot read properties of null" in problems


def test_a_missing_browser_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without Chromium a test is skipped with the reason, and fails where a browser is required."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("M3_REQUIRE_BROWSER", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no Chromium"), chromium():
        pass
    monkeypatch.setenv("M3_REQUIRE_BROWSER", "1")
    with pytest.raises(pytest.fail.Exception, match="no Chromium"), chromium():
        pass
