"""The demo's upstream text: the documentation and code of a Python installation.

The demo model was trained on this text, and the demo's pool is drawn from it on the user's machine, so that none of it
is shipped. A *document* is a topic of the language reference, a docstring, or the code of a function; documents are
read lazily, in an order that depends only on their file's name.
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

from forgetcast.data.pool import Example, Pool
from forgetcast.errors import DataError

SHORTEST = 160
"""Minimum number of characters of a document or example."""

STANDARD_LIBRARY = "stdlib"

HELD_OUT_SHARE = 0.05
"""Fraction of the files that are excluded from pre-training."""


@dataclass(frozen=True)
class Document:
    """A text, where it is from, and whether it was excluded from pre-training."""

    name: str
    text: str
    held_out: bool


def documents(source: str) -> Iterator[Document]:
    """Return the documents of a source, in an order fixed by the names of their files.

    Raises
    ------
    DataError
        If `source` is not one of `SOURCES`.
    """
    if source not in SOURCES:
        raise DataError(f"unknown source {source!r}; the demo has {', '.join(SOURCES)}")
    return SOURCES[source]()


def demo_pool(n: int, *, seed: int = 0, longest: int = 360) -> Pool:
    """Draw `n` upstream examples, equally many from every source, from text that was used in pre-training.

    Parameters
    ----------
    n : int
        Number of examples; the first sources get the remainder.
    seed : int
        Determines which part of each document is taken.
    longest : int
        Maximum number of characters of an example, which ends at the end of a line.
    """
    rng = np.random.default_rng(seed)
    examples: list[Example] = []
    for rank, source in enumerate(SOURCES):
        wanted = n // len(SOURCES) + (rank < n % len(SOURCES))
        examples.extend(_draw(source, wanted, rng, longest))
    return Pool(examples)


def _draw(source: str, wanted: int, rng: np.random.Generator, longest: int) -> Iterator[Example]:
    # The language reference has few, long topics, so that several parts of each are needed.
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
    """Split at line ends into parts of at most `longest` characters; drop parts shorter than SHORTEST."""
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
    """Hash a name to [0, 1): the same number on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _is_held_out(name: str) -> bool:
    return _rank("held-out:" + name) < HELD_OUT_SHARE


def _reference() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics, key=_rank):
        yield Document(name, topics[name].strip(), _is_held_out(name))


def _files(*packages: str) -> Iterator[tuple[str, Path]]:
    """Yield the source files of packages, without tests and generated tables, in an order fixed by their names."""
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "_vendor"}
    files: list[tuple[str, Path]] = []
    for package in packages:
        if package == STANDARD_LIBRARY:
            root = Path(sysconfig.get_paths()["stdlib"])
        else:
            spec = importlib.util.find_spec(package)
            if spec is None or spec.origin is None:
                continue  # not installed: _draw raises if the other packages have too little text
            root = Path(spec.origin).parent
        for path in root.rglob("*.py"):
            name = path.relative_to(root)
            if not skipped.intersection(name.parts):
                files.append((f"{package}/{name.as_posix()}", path))
    yield from sorted(files, key=lambda file: _rank(file[0]))


def _definitions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef, str]]:
    """Yield name, node and file text of every function and class of a file that parses."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return  # templates and deliberately broken files of the library
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield f"{node.name}:{node.lineno}", node, text


def _docstrings(*packages: str) -> Iterator[Document]:
    for name, path in _files(*packages):
        for definition, node, _ in _definitions(path):
            doc = ast.get_docstring(node)
            if doc and len(doc) >= SHORTEST:
                yield Document(f"{name}:{definition}", doc, _is_held_out(name))


def _code(*packages: str) -> Iterator[Document]:
    for name, path in _files(*packages):
        for definition, node, text in _definitions(path):
            if isinstance(node, ast.FunctionDef):
                code = _without_docstring(node, text)
                if len(code) >= SHORTEST:
                    yield Document(f"{name}:{definition}", code, _is_held_out(name))


def _without_docstring(node: ast.FunctionDef, text: str) -> str:
    lines = text.splitlines(keepends=True)[node.lineno - 1 : node.end_lineno]
    if ast.get_docstring(node) is not None:
        first = node.body[0]
        del lines[first.lineno - node.lineno : (first.end_lineno or first.lineno) - node.lineno + 1]
    return textwrap.dedent("".join(lines)).strip()


SOURCES: dict[str, Callable[[], Iterator[Document]]] = {
    "python-reference": _reference,
    "stdlib-docs": lambda: _docstrings(STANDARD_LIBRARY),
    "numpy-docs": lambda: _docstrings("numpy"),
    "scipy-docs": lambda: _docstrings("scipy"),
    "torch-docs": lambda: _docstrings("torch"),
    "stdlib-code": lambda: _code(STANDARD_LIBRARY),
    "library-code": lambda: _code("xarray", "zarr", "rich"),
}
"""The demo's sources, by name."""
