"""HTML parser for report pages."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

_EMPTY = ("meta", "br", "link", "img", "path", "use")  # tags that need not be closed


class Page(HTMLParser):
    """Collects the tags of a page, the open ones, its links and the elements that load others."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str | None] = []
        self.external: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in _EMPTY:
            self.open.append(tag)
        if tag in ("script", "link", "img", "iframe"):
            self.external.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in _EMPTY:
            assert self.open.pop() == tag


def read_page(path: Path) -> str:
    """Reads a page; checks that it closes its tags and loads nothing."""
    page, text = Page(), path.read_text()
    page.feed(text)
    assert (page.external, page.open) == ([], [])
    return text
