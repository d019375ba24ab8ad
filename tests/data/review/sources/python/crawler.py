"""Check the links of a site, several at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from urllib.parse import urldefrag, urljoin, urlsplit

Fetch = Callable[[str], Awaitable[tuple[int, str]]]


class LinkParser(HTMLParser):
    """Collects what the anchors of a page point to, as absolute addresses without fragments."""

    def __init__(self, base: str) -> None:
        super().__init__()
        self.base = base
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "a":
            return
        for name, value in attrs:
            if name == "href" and value:
                self.links.append(urldefrag(urljoin(self.base, value)).url)


@dataclass
class Report:
    """Status of every page visited, and the pages that could not be fetched."""

    statuses: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def broken(self) -> list[str]:
        """Addresses that answered with an error, or not at all, sorted."""
        return sorted([url for url, status in self.statuses.items() if status >= 400] + list(self.failures))


class Crawler:
    """Visits the pages of one host, each once, at most `concurrency` at a time."""

    def __init__(self, fetch: Fetch, concurrency: int = 8, timeout: float = 10.0, limit: int = 500) -> None:
        self._fetch = fetch
        self._slots = asyncio.Semaphore(concurrency)
        self._timeout = timeout
        self._limit = limit
        self._seen: set[str] = set()
        self.report = Report()

    async def crawl(self, start: str) -> Report:
        """Visit `start` and all it leads to on the same host."""
        host = urlsplit(start).netloc
        self._seen.add(start)
        wave = [start]
        while wave:
            pages = await asyncio.gather(*(self._visit(url) for url in wave))
            wave = []
            for links in pages:
                for link in links:
                    if link in self._seen or urlsplit(link).netloc != host:
                        continue
                    if len(self._seen) < self._limit:
                        self._seen.add(link)
                        wave.append(link)
        return self.report

    async def _visit(self, url: str) -> list[str]:
        """Fetch one page; return its links, none if it failed."""
        async with self._slots:
            try:
                status, body = await asyncio.wait_for(self._fetch(url), self._timeout)
            except asyncio.TimeoutError:
                self.report.failures[url] = "timeout"
                return []
            except OSError as error:
                self.report.failures[url] = str(error)
                return []
        self.report.statuses[url] = status
        if status >= 400:
            return []
        parser = LinkParser(url)
        parser.feed(body)
        return parser.links
