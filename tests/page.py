"""A report page as a browser takes it apart."""

from __future__ import annotations

from html.parser import HTMLParser

_EMPTY = ("meta", "br", "link", "img", "path", "use")  # tags that need not be closed


class Page(HTMLParser):
    """Collects a page's tags, those that are still open, and what it refers to or would load."""

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
