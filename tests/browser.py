"""A real browser for the tests of HTML pages: what they ask of the network, and what goes wrong in them."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Browser, Page, Route

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
_ARGUMENTS = (
    "--no-sandbox",  # it cannot be had as root or in most containers; the pages are our own
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--no-first-run",
)


@dataclass(slots=True)
class Visit:
    """A page that is open.

    `requests` are the addresses that it asked for beside its own, none of which it got; `problems` are
    errors of its script, on its console, and of its Content-Security-Policy. Wait with locators: playwright's
    `wait_for_function` evaluates strings in the page, which a strict policy forbids.
    """

    page: Page
    requests: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium. Without one the test is skipped, or fails if M3_REQUIRE_BROWSER is set."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        _missing(f"There is no Chromium on PATH (looked for {', '.join(NAMES)}).")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("The package playwright is not installed.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(_ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visit(browser: Browser, file: Path, **options: Any) -> Iterator[Visit]:
    """`file` in a window of its own; `options` are those of playwright's `Browser.new_context`."""
    address = file.resolve().as_uri()
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    try:
        here = Visit(context.new_page())

        def route(asked: Route) -> None:
            if asked.request.url == address:
                asked.continue_()
            else:
                here.requests.append(asked.request.url)
                asked.abort()

        context.route("**/*", route)
        here.page.on("websocket", lambda socket: here.requests.append(socket.url))
        here.page.on("pageerror", lambda error: here.problems.append(str(error)))
        here.page.on(
            "console",
            lambda message: (
                here.problems.append(message.text) if message.type in ("error", "warning") else None
            ),
        )
        here.page.goto(address)
        yield here
    finally:
        context.close()


def _missing(reason: str) -> NoReturn:
    if os.environ.get("M3_REQUIRE_BROWSER"):
        pytest.fail(reason)
    pytest.skip(reason)
