"""The demo's upstream text: what a Python installation says about itself.

The demo model was trained on this text, and the demo's pool is drawn from it again on the user's own machine, so
nothing of it has to be shipped. A *document* is one topic of the language reference, one doc string, or the code of
one function; documents are read lazily, in an order that depends on their file's name alone.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sysconfig
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from forgetcast.errors import DataError
from forgetcast.pool import Example, Pool

SHORTEST = 160
"""Documents with fewer characters say too little to be worth an example."""

STANDARD_LIBRARY = "stdlib"

HELD_OUT_SHARE = 0.05
"""Share of the files that pre-training never sees."""


@dataclass(frozen=True)
class Document:
    """One piece of text: where it is from, and whether pre-training kept it aside."""

    name: str
    text: str
    held_out: bool


def documents(source: str) -> Iterator[Document]:
    """Documents of one source, in an order fixed by the names of the files they are in.

    Raises
    ------
    DataError
        If `source` is not one of `SOURCES`.
    """
    if source not in SOURCES:
        raise DataError(f"unknown source {source!r}; the demo has {', '.join(SOURCES)}")
    return SOURCES[source]()


def demo_pool(n: int, *, seed: int = 0, longest: int = 360) -> Pool:
    """Draw `n` upstream examples, the same number from every source, from text that pre-training did see.

    Parameters
    ----------
    n : int
        Examples in all; a remainder goes to the first sources.
    seed : int
        Which part of each document is taken.
    longest : int
        Characters in an example at most; it is cut at the end of a line.
    """
    rng = np.random.default_rng(seed)
    examples: list[Example] = []
    for rank, source in enumerate(SOURCES):
        wanted = n // len(SOURCES) + (rank < n % len(SOURCES))
        examples.extend(_draw(source, wanted, rng, longest))
    return Pool(examples)


def _draw(source: str, wanted: int, rng: np.random.Generator, longest: int) -> Iterator[Example]:
    # The language reference has few, long topics: several parts of each are needed to fill its share.
    per_document = 4 if source == "python-reference" else 1
    documents_of_file: Counter[str] = Counter()
    for document in documents(source):
        if wanted == 0:
            return
        file = document.name.partition(":")[0]
        documents_of_file[file] += 1
        if document.held_out or documents_of_file[file] > 2:
            continue
        parts = list(_parts(document.text, longest))
        for part in sorted(rng.permutation(len(parts))[: min(per_document, wanted)]):
            yield Example(id=f"{source}/{document.name}#{part}", text=parts[part], source=source)
            wanted -= 1
    if wanted:
        raise DataError(f"the installation has too little text for {source!r}: {wanted} examples are missing")


def _parts(text: str, longest: int) -> Iterator[str]:
    """Cut at line ends into parts of at most `longest` characters; parts under SHORTEST are dropped."""
    part = ""
    for line in text.splitlines(keepends=True):
        if part and len(part) + len(line) > longest:
            if len(part.strip()) >= SHORTEST:
                yield part.strip("\n")
            part = ""
        part += line[:longest]
    if len(part.strip()) >= SHORTEST:
        yield part.strip("\n")


def _rank(name: str) -> float:
    """A number in [0, 1) that depends on the name alone: the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _is_held_out(name: str) -> bool:
    return _rank("held-out:" + name) < HELD_OUT_SHARE


def _reference() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics, key=_rank):
        yield Document(name, topics[name].strip(), _is_held_out(name))


def _files(*packages: str) -> Iterator[tuple[str, Path]]:
    """Source files of the packages, tests and generated tables left out, in an order fixed by their names."""
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "_vendor"}
    files: list[tuple[str, Path]] = []
    for package in packages:
        if package == STANDARD_LIBRARY:
            root = Path(sysconfig.get_paths()["stdlib"])
        else:
            spec = importlib.util.find_spec(package)
            if spec is None or spec.origin is None:
                continue  # not installed here: _draw says so if the other packages have too little text
            root = Path(spec.origin).parent
        for path in root.rglob("*.py"):
            name = path.relative_to(root)
            if not skipped.intersection(name.parts):
                files.append((f"{package}/{name.as_posix()}", path))
    yield from sorted(files, key=lambda file: _rank(file[0]))


def _definitions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef, str]]:
    """Every function and class of a file that parses: its name, its node, the file's text."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return  # templates and deliberately broken files in the library are no text of ours to explain
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield f"{node.name}:{node.lineno}", node, text


def _doc_strings(*packages: str) -> Iterator[Document]:
    for name, path in _files(*packages):
        for definition, node, _ in _definitions(path):
            doc = ast.get_docstring(node)
            if doc and len(doc) >= SHORTEST:
                yield Document(f"{name}:{definition}", doc, _is_held_out(name))


def _code(*packages: str) -> Iterator[Document]:
    for name, path in _files(*packages):
        for definition, node, text in _definitions(path):
            if isinstance(node, ast.FunctionDef):
                code = _without_doc_string(node, text)
                if len(code) >= SHORTEST:
                    yield Document(f"{name}:{definition}", code, _is_held_out(name))


def _without_doc_string(node: ast.FunctionDef, text: str) -> str:
    lines = text.splitlines(keepends=True)[node.lineno - 1 : node.end_lineno]
    if ast.get_docstring(node) is not None:
        first = node.body[0]
        del lines[first.lineno - node.lineno : (first.end_lineno or first.lineno) - node.lineno + 1]
    return textwrap.dedent("".join(lines)).strip()


SOURCES: dict[str, Callable[[], Iterator[Document]]] = {
    "python-reference": _reference,
    "stdlib-docs": lambda: _doc_strings(STANDARD_LIBRARY),
    "numpy-docs": lambda: _doc_strings("numpy"),
    "scipy-docs": lambda: _doc_strings("scipy"),
    "torch-docs": lambda: _doc_strings("torch"),
    "stdlib-code": lambda: _code(STANDARD_LIBRARY),
    "library-code": lambda: _code("xarray", "zarr", "rich"),
}
"""Every source of the demo, by the name its examples carry."""
