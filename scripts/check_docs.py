"""Check the built site: links and anchors resolve, public names have an entry, and no page loads from the network.

zensical's strict mode checks the links that are written in Markdown; this also checks those that the generator and
mkdocstrings write, and that each exported name has a docstring and an entry. Usage: python scripts/check_docs.py [SITE]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import griffe

from docs_pages import exported, exporting_modules

ROOT = Path(__file__).parents[1]
# Elements that a browser loads by itself, and the attribute that says from where.
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    """Collect a page's anchors, its links, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep what an element declares or points to."""
        values = {name: value for name, value in attrs if value}
        self.ids.update(values[name] for name in ("id", "name") if name in values)
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        # A canonical address or the next page is a statement, not a file to load.
        if tag in LOADED and LOADED[tag] in values and values.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(values[LOADED[tag]])


def broken_links(site: Path) -> Iterator[str]:
    """Yield every link, anchor or loaded file of the site that does not resolve within it."""
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    if not pages:
        yield f"{site} has no pages; build it first"
    for path, page in pages.items():
        if path.name == "404.html":  # its links are absolute, because it is shown at any address
            continue
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loaded and parts.scheme != "data":
                    yield f"{path.relative_to(site)} loads {link} from the network"
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            if not target.is_file():
                yield f"{path.relative_to(site)}: {link} does not exist"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                yield f"{path.relative_to(site)}: {link} has no such anchor"


def undocumented(site: Path, source: Path) -> Iterator[str]:
    """Yield every name in an `__all__` of the package that has no docstring, or no entry on a page of the API."""
    package: Any = griffe.load("forgetcast", search_paths=[str(source)])
    anchors = {id_ for page in (site / "reference" / "api").rglob("*.html") for id_ in Page(page).ids}
    entries = {_defined(package, anchor) for anchor in anchors if anchor.startswith("forgetcast")}
    for module in exporting_modules(package):
        for name in sorted(module.exports or ()):
            found = exported(module, name)
            if found.is_module:
                continue
            if found.path not in entries:
                yield f"{module.path}.{name} has no entry in docs/reference/api/"
            elif not found.docstring:
                yield f"{module.path}.{name} has no docstring"


def _defined(package: Any, path: str) -> str | None:
    """Return the path at which an object is defined, whatever path it is imported from; None if there is none."""
    try:
        found = package.modules_collection[path]
        return str(found.final_target.path if found.is_alias else found.path)
    except (KeyError, ValueError, griffe.AliasResolutionError):
        return None


def main() -> None:
    """Print what is wrong; exit code 1 if anything is."""
    site = (Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "site").resolve()
    faults = [*broken_links(site), *undocumented(site, ROOT / "src")]
    for fault in faults:
        print(fault)
    if faults:
        sys.exit(f"{len(faults)} fault(s) in {site}")


if __name__ == "__main__":
    main()
