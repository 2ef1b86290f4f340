"""Report pages, and text that tries to break out of them."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

HOSTILE = "</script><script>alert('x')</script><img src=x onerror=alert(1)>{{ 7 * 7 }} & \"quoted\""


class Page(HTMLParser):
    """Text of a page outside its scripts, and every attribute that could fetch something."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.words, self.links, self.scripts, self._tags = "", [], 0, []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "img", "br"):
            self._tags.append(tag)
        self.scripts += tag == "script"
        self.links += [value for name, value in attrs if name in ("src", "href", "onerror", "onload")]

    def handle_endtag(self, tag: str) -> None:
        if tag in self._tags:
            while self._tags.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"}.intersection(self._tags):
            self.words += " " + data

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", self.words)
